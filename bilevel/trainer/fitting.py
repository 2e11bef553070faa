"""`fit`: the outer loop in one call, without Hydra, files or a directory."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from bilevel import rng
from bilevel.errors import UsageError
from bilevel.hypergradient import HypergradientMethod, Implicit, default_solver
from bilevel.problem import Problem
from bilevel.solvers import InnerSolver
from bilevel.trainer.callbacks import Callback, RunStart
from bilevel.trainer.optimizer import OptimizerFactory, SchedulerFactory
from bilevel.trainer.setup import set_up
from bilevel.trainer.summary import summarise
from bilevel.trainer.trainer import Record, Trainer
from bilevel.tree import TensorDict


@dataclass(frozen=True)
class Fit:
    """What `fit` returns.

    Attributes:
        hparams: the best hyperparameters, natural units.
        params: the inner solution there.
        history: the record of each outer step; `receipt.*` entries say what its hypergradient is worth.
        summary: final figures, why the loop ended, the work done.
    """

    hparams: TensorDict
    params: TensorDict = field(repr=False)
    history: list[Record] = field(repr=False)
    summary: dict[str, Any] = field(repr=False)


def fit(
    problem: Problem,
    *,
    solver: InnerSolver | None = None,
    hypergradient: HypergradientMethod | None = None,
    optimizer: OptimizerFactory | None = None,
    scheduler: SchedulerFactory | None = None,
    trainer: Trainer | None = None,
    num_steps: int | None = None,
    callbacks: Sequence[Callback] = (),
    seed: int = 0,
) -> Fit:
    """Tune a problem's hyperparameters by hypergradients.

    Args:
        problem: what to tune.
        solver: the inner solver; L-BFGS by default, or gradient descent for problems with minibatches.
        hypergradient: the method; `Implicit.auto()` by default.
        optimizer: makes the outer optimiser; Adam with learning rate 0.1 on the raw (for positive ones: logarithmic)
            hyperparameters by default.
        scheduler: makes a learning-rate scheduler from it.
        trainer: settings of the loop.
        num_steps: shorthand for `Trainer(num_steps=...)`, instead of `trainer`.
        callbacks: called at the start, after each step, at the end.
        seed: seeds the global generators.

    Raises:
        UsageError: the parts do not fit each other; the sentence says what to change.

    Example:
        >>> from bilevel import Problem, Positive, fit
        >>> class Shrink(Problem):
        ...     constraints = {"penalty": Positive()}
        ...     def init_hparams(self):
        ...         return {"penalty": torch.tensor(5.0)}
        ...     def init_params(self, hparams):
        ...         return {"w": torch.zeros(1)}
        ...     def inner_loss(self, params, hparams, batch):  # solution: w = 2 / (1 + penalty)
        ...         return (params["w"] - 2).square().sum() + hparams["penalty"] * params["w"].square().sum()
        ...     def outer_loss(self, params, hparams, batch):  # best at w = 1, so at penalty = 1
        ...         return (params["w"] - 1).square().sum()
        >>> round(float(fit(Shrink(), num_steps=60).hparams["penalty"]), 2)
        1.0
    """
    if trainer is not None and num_steps is not None:
        raise UsageError(
            f"fit got both trainer (with num_steps={trainer.num_steps}) and num_steps={num_steps}: give the number of steps "
            "once, inside Trainer(num_steps=...) or alone."
        )
    started = time.perf_counter()
    rng.seed_everything(seed)
    solver = solver or default_solver(problem)
    method = hypergradient if hypergradient is not None else Implicit.auto()
    if optimizer is None:
        optimizer = functools.partial(torch.optim.Adam, lr=0.1)
    if trainer is None:
        trainer = Trainer() if num_steps is None else Trainer(num_steps=num_steps)
    setup, state = set_up(problem, solver, method, optimizer, scheduler)
    for callback in callbacks:
        if not all(hasattr(callback, name) for name in ("on_start", "on_step", "on_end")):
            raise UsageError(
                f"a callback needs on_start, on_step and on_end, but {callback!r} lacks one: derive it from "
                "bilevel.Callback and override what you want."
            )
    start = RunStart.of(setup, state, trainer.num_steps)
    for callback in callbacks:
        callback.on_start(start)
    history = list(trainer.steps(setup, state, callbacks))
    stopped = trainer.reason_to_stop(state)
    assert stopped is not None
    state.wall_seconds = time.perf_counter() - started
    summary = summarise({}, setup, state, stopped, monitor=trainer.monitor)
    for callback in callbacks:
        callback.on_end(summary)
    return Fit(state.best.hparams, setup.problem.unravel(state.best.params), history, summary)
