"""The outer loop: a hypergradient, a step of the outer optimiser, a record; again."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from bilevel.batches import StepBatches
from bilevel.errors import UsageError
from bilevel.hypergradient import Hypergradient, check_not_all_zero, differentiate
from bilevel.parts import check_parts
from bilevel.result import Result
from bilevel.solvers import InnerResult
from bilevel.trainer.callbacks import Callback
from bilevel.trainer.nonfinite import Nonfinite, Skip
from bilevel.trainer.setup import Setup
from bilevel.trainer.state import Best, TrainState
from bilevel.trainer.worthless import Shrink, Worthless
from bilevel.tree import TensorDict, detach

Record = dict[str, Any]


@dataclass(frozen=True)
class Trainer:
    """Settings of the outer loop.

    Args:
        num_steps: outer steps.
        max_seconds: stop after the step at which so much time has gone into steps, by all processes of the run; None never.
        clip_norm: clip the gradient in raw coordinates to this norm; None does not.
        monitor: by what steps compare: a metric of the problem, the smaller the better; None takes the outer loss. Many
            hyperparameters overfit that, as parameters do their loss; the loss on validation examples that it leaves out shows
            the step at which to stop.
        patience: stop after this many steps without a better one; None never does.
        min_improvement: what counts as better, relative to the best.
        metrics_every: steps between those in which the problem's metrics are evaluated, and what is monitored is looked at.
        nonfinite: what to do with hypergradients that are not finite; none of them is ever applied.
        worthless: what to do with hypergradients that are worth nothing by their own error estimate.
        checkpoint_every: steps between checkpoints; the last step always writes one.
        keep_checkpoints: number of checkpoints that are kept.
    """

    num_steps: int = 50
    max_seconds: float | None = None
    clip_norm: float | None = None
    monitor: str | None = None
    patience: int | None = None
    min_improvement: float = 0.0
    metrics_every: int = 1
    nonfinite: Nonfinite = field(default_factory=Skip)
    worthless: Worthless = field(default_factory=Shrink)
    checkpoint_every: int = 10
    keep_checkpoints: int = 3

    def __post_init__(self) -> None:
        """Validate the parts and the numbers."""
        check_parts(self)
        for name in ("num_steps", "metrics_every", "checkpoint_every", "keep_checkpoints"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise UsageError(f"trainer.{name} must be an integer of at least 1, but is {value}.")
        if self.patience is not None and (not isinstance(self.patience, int) or self.patience < 1):
            raise UsageError(f"trainer.patience must be an integer of at least 1, or null, but is {self.patience}.")
        if self.max_seconds is not None and not self.max_seconds > 0:
            raise UsageError(f"trainer.max_seconds must be above 0 or null, but is {self.max_seconds}.")
        if self.clip_norm is not None and not self.clip_norm > 0:  # NaN is not above 0, either
            raise UsageError(f"trainer.clip_norm must be above 0 or null, but is {self.clip_norm}.")
        if not self.min_improvement >= 0:
            raise UsageError(f"trainer.min_improvement must be at least 0, but is {self.min_improvement}.")

    def steps(self, setup: Setup, state: TrainState, callbacks: Sequence[Callback] = ()) -> Iterator[Record]:
        """Make the outer steps one by one, changing the state; yields each step's record when every callback has seen it.

        A generator so that whoever runs it (a run directory, a notebook) decides what happens between two steps. An
        exception leaves the state in the middle of a step: what `state.save()` returned before that step undoes it.
        """
        if self.monitor is not None and setup.problem.problem.episodes is not None:
            raise UsageError(
                "trainer.monitor compares steps, but each step of this problem has an episode of its own: leave it out."
            )
        if self.patience is not None and not self._compares(setup):
            raise UsageError(
                f"trainer.patience={self.patience} compares the outer losses of steps, but each step of this problem has an "
                "episode or a minibatch of its own: leave patience out and choose num_steps or max_seconds, or let "
                "trainer.monitor name a metric."
            )
        while self.reason_to_stop(state) is None:
            record, hparams = self.step(setup, state)
            for callback in callbacks:
                callback.on_step(record, hparams)
            yield record

    def reason_to_stop(self, state: TrainState) -> str | None:
        """Why no further step is made from this state; None when one is."""
        if self.nonfinite.limit_reached(state.num_nonfinite):
            return f"{state.num_nonfinite} non-finite hypergradients in a row; none was applied{_blame(state.record)}"
        if self.patience is not None and state.step - 1 - state.best.step >= self.patience:
            return f"no better {self.monitor or 'outer loss'} in {self.patience} steps"
        if self.max_seconds is not None and state.seconds >= self.max_seconds:
            return f"{state.seconds:.0f} of {self.max_seconds:g} seconds were used"
        return "all steps were made" if state.step >= self.num_steps else None

    def step(self, setup: Setup, state: TrainState) -> tuple[Record, TensorDict]:
        """One outer step: its record and the natural hyperparameters that it belongs to."""
        started = time.perf_counter()
        natural = setup.natural(state.raw)
        hparams = detach(natural)
        batches = StepBatches(setup.problem.problem, state.step)
        result = differentiate(setup.method, setup.problem, setup.solver, state.params, hparams, batches, state.method)
        norm = hypergradient_norm(result)
        finite = is_finite(result) and math.isfinite(norm)
        if finite and state.step == 0:
            check_not_all_zero(result, setup.method)
        last = state.step == self.num_steps - 1
        measured = finite and (state.step % self.metrics_every == 0 or last)
        metrics = evaluate_metrics(setup, result.params, hparams) if measured else {}
        relative_error = result.receipt.error_estimate / norm if norm > 0 else math.nan
        scale = self.worthless.scale(relative_error)
        record: Record = {
            "step": state.step,
            "num_steps": self.num_steps,
            "outer_loss": result.outer_loss,
            "inner_loss": result.inner_loss,
            "hypergradient_norm": norm,
            "hypergradient_error": relative_error,
            "hypergradient_cosine": cosine(result.gradient, state.gradient),
            "learning_rate": state.outer.learning_rate,
            "skipped": not finite,
            "shrunk": scale < 1.0,
            "comparable": setup.problem.is_comparable,
            **result.receipt.record(),
            **{f"metrics.{name}": value for name, value in metrics.items()},
            **describe_hparams(hparams),
        }
        if finite:
            if measured or self.monitor is None:
                self._keep_best(setup, state, result, hparams, metrics)
            applied = {name: scale * part for name, part in result.gradient.items()}
            self._update(state, natural, applied, result.outer_loss)
            if not self._compares(setup):  # what is kept is then what new tasks are scored with: after the update
                state.best = replace(state.best, hparams=detach(setup.natural(state.raw)))
            state.params, state.method, state.num_nonfinite = result.params, result.state, 0
            state.gradient = result.gradient
        else:  # neither the hyperparameters nor the warm starts take anything from this step
            self.nonfinite.met(state.step, why_unusable(result))
            state.num_nonfinite += 1
        for key in state.work:
            state.work[key] += int(getattr(result.receipt, key))
        state.step += 1
        seconds = time.perf_counter() - started
        state.seconds += seconds
        eta = state.seconds / state.step * (self.num_steps - state.step)
        if self.max_seconds is not None:
            eta = min(eta, max(self.max_seconds - state.seconds, 0.0))
        state.record = {**record, "seconds": seconds, "eta_seconds": eta}
        return state.record, hparams

    def coast(self, setup: Setup, state: TrainState, num_steps: int) -> None:
        """Outer steps along the latest hypergradient, held fixed: the optimiser and its scheduler move, nothing is solved."""
        assert state.record is not None
        scale = self.worthless.scale(state.record["hypergradient_error"])
        gradient = {name: scale * part for name, part in state.gradient.items()}
        for _ in range(num_steps):
            self._update(state, setup.natural(state.raw), gradient, state.record["outer_loss"])
            state.step += 1

    def _update(
        self, state: TrainState, natural: TensorDict, gradient: Mapping[str, Tensor], outer_loss: float
    ) -> None:
        """Chain through the bijections to the raw values, clip, and let the optimiser step."""
        names = list(natural)
        raw_gradient = torch.autograd.grad(
            [natural[name] for name in names], list(state.raw.values()), [gradient[name] for name in names]
        )
        for value, part in zip(state.raw.values(), raw_gradient, strict=True):
            value.grad = part
        if self.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(list(state.raw.values()), self.clip_norm)
        state.outer.step(outer_loss)

    def _keep_best(
        self, setup: Setup, state: TrainState, result: Hypergradient, hparams: TensorDict, metrics: dict[str, float]
    ) -> None:
        best, figure = state.best.figure, self._figure(result, metrics)
        margin = self.min_improvement * abs(best) if best != float("inf") else 0.0
        if figure < best - margin or not self._compares(setup):
            state.best = Best(state.step, result.outer_loss, figure, hparams, result.params, metrics)

    def _compares(self, setup: Setup) -> bool:
        """Whether one step can be better than another."""
        return self.monitor is not None or setup.problem.is_comparable

    def _figure(self, result: Hypergradient, metrics: dict[str, float]) -> float:
        """What the step is compared with others by."""
        if self.monitor is None:
            return result.outer_loss
        if self.monitor not in metrics:
            known = ", ".join(metrics) or "of which it has none"
            raise UsageError(
                f"trainer.monitor was expected to be one of the problem's metrics, {known}, but is '{self.monitor}'."
            )
        return metrics[self.monitor]


def _blame(record: Record | None) -> str:
    """Which solve a record's hypergradient was lost in, in brackets; nothing where none was."""
    inner, linear = ((record or {}).get(f"receipt.{which}_result") for which in ("inner", "linear"))
    if inner is not None and not InnerResult[inner].usable:
        return f" (the inner solve: {InnerResult[inner].value})"
    if linear == Result.diverged.name:  # one that met non-finite values is not where they came from
        return f" (the linear solve: {Result.diverged.value})"
    return ""


def evaluate_metrics(setup: Setup, params: Tensor, hparams: TensorDict) -> dict[str, float]:
    """The problem's own figures.

    Raises:
        UsageError: one of them is not a single number.
    """
    figures: dict[str, float] = {}
    for name, value in setup.problem.problem.metrics(setup.problem.unravel(params), hparams).items():
        try:
            figures[name] = float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise UsageError(
                f"metrics was expected to return numbers, but '{name}' is a {type(value).__name__}: take the mean."
            ) from error
    return figures


def hypergradient_norm(result: Hypergradient) -> float:
    """Norm over all hyperparameters, in natural units."""
    return float(torch.cat([part.flatten() for part in result.gradient.values()]).norm())


def cosine(gradient: TensorDict, previous: TensorDict) -> float:
    """Of the angle between two hypergradients in natural units; NaN where there is no previous one or one is zero."""
    if not previous:
        return math.nan
    now, before = (torch.cat([one[name].flatten() for name in gradient]) for one in (gradient, previous))
    return float(torch.nn.functional.cosine_similarity(now, before, dim=0, eps=0.0))


def why_unusable(result: Hypergradient) -> str:
    """The end of a sentence about a hypergradient that must not be applied."""
    inner = result.receipt.inner_result
    if inner is not None and not InnerResult[inner].usable:
        return f"the inner solve ended with {inner} ({InnerResult[inner].value})"
    bad = [name for name, part in result.gradient.items() if not bool(part.isfinite().all())]
    if bad:
        return f"that of {', '.join(map(repr, bad))} is not"
    if not math.isfinite(result.outer_loss):
        return f"the outer loss is {result.outer_loss}"
    linear = result.receipt.linear_result
    if linear is not None and not Result[linear].usable:
        return f"the linear solve ended with {linear} ({Result[linear].value})"
    return "the inner solution is not"


def is_finite(result: Hypergradient) -> bool:
    """Whether a hypergradient may be applied: no solve diverged, and loss, solution and entries are finite."""
    parts = [result.params, torch.tensor(result.outer_loss), *result.gradient.values()]
    inner, linear = result.receipt.inner_result, result.receipt.linear_result
    usable = (inner is None or InnerResult[inner].usable) and (linear is None or Result[linear].usable)
    return usable and all(bool(part.isfinite().all()) for part in parts)


def describe_hparams(hparams: Mapping[str, Tensor]) -> Record:
    """Hyperparameters for a record: the number itself, or minimum, median and maximum."""
    record: Record = {}
    for name, value in hparams.items():
        if value.numel() == 1:
            record[f"hparams.{name}"] = float(value)
        elif value.numel():
            record[f"hparams.{name}.min"] = float(value.min())
            record[f"hparams.{name}.median"] = float(value.median())
            record[f"hparams.{name}.max"] = float(value.max())
    return record
