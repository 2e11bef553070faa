"""The first outer steps of a run, made for real, and the others forecast from them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bilevel.diagnostics.cost import Units, Work, forecast
from bilevel.diagnostics.meter import held_bytes, peak_held_bytes
from bilevel.hypergradient import HypergradientMethod
from bilevel.problem import Problem
from bilevel.solvers import InnerSolver
from bilevel.trainer.callbacks import Callback, RunStart
from bilevel.trainer.checkpoint import save_checkpoint
from bilevel.trainer.optimizer import OptimizerFactory, SchedulerFactory
from bilevel.trainer.setup import Setup, set_up
from bilevel.trainer.state import TrainState
from bilevel.trainer.summary import summarise
from bilevel.trainer.trainer import Record, Trainer


@dataclass(frozen=True)
class Job:
    """A run that is to be planned.

    Attributes:
        problem: the problem.
        solver: the inner solver.
        method: the hypergradient method.
        optimizer: makes the outer optimiser.
        scheduler: makes its scheduler; None for none.
        trainer: settings of the outer loop.
        callbacks: trackers whose cost counts; they are started and ended.
        directory: a folder to be thrown away, for checkpoints; None for a run without any, as `fit` makes it.
    """

    problem: Problem
    solver: InnerSolver
    method: HypergradientMethod
    optimizer: OptimizerFactory
    scheduler: SchedulerFactory | None
    trainer: Trainer
    callbacks: Sequence[Callback] = ()
    directory: Path | None = None


@dataclass(frozen=True)
class Pilot:
    """What the first outer steps of a run took.

    Attributes:
        num_steps: outer steps of the whole run.
        num_checkpoints: checkpoints that it writes.
        warm_start: whether its inner solves start from the previous solution.
        set_up_seconds: from the start of the run to its first step.
        step_seconds: of each step that was made.
        work: of each step that was made.
        beside_seconds: of trackers, between two steps.
        checkpoint_seconds: of a checkpoint.
        held_bytes: what the process held before the first step.
        peak_before: the most that it had held until then.
        peak_bytes: the most that it had held after the steps.
        records: what the outer loop said of each step.
    """

    num_steps: int
    num_checkpoints: int
    warm_start: bool
    set_up_seconds: float
    step_seconds: tuple[float, ...]
    work: tuple[Work, ...]
    beside_seconds: float
    checkpoint_seconds: float
    held_bytes: float
    peak_before: float
    peak_bytes: float
    records: tuple[Record, ...] = ()

    @property
    def num_future(self) -> int:
        """Steps that are forecast."""
        return self.num_steps - len(self.work)

    @property
    def around_seconds(self) -> float:
        """What the whole run spends beside its steps."""
        return (
            self.set_up_seconds + self.num_steps * self.beside_seconds + self.num_checkpoints * self.checkpoint_seconds
        )

    def future(self) -> list[Work]:
        """The work of the steps that were not made."""

        def ahead(name: str, cold: bool) -> list[float]:
            return forecast([getattr(one, name) for one in self.work], self.num_future, cold=cold)

        cold = self.warm_start
        gradients, inner, products = ahead("gradients", cold), ahead("inner_products", cold), ahead("products", False)
        return [Work(*counts) for counts in zip(gradients, inner, products, strict=True)]

    def steps_seconds(self, units: Units) -> float:
        """All steps: those made as they were, the others by unit costs, corrected by what the former took."""
        modelled = [units.fixed + units.work_seconds(one) for one in self.work]
        factor = statistics.median(real / model for real, model in zip(self.step_seconds, modelled, strict=True))
        return sum(self.step_seconds) + factor * sum(units.fixed + units.work_seconds(one) for one in self.future())

    def memory(self, own_bytes: float) -> float:
        """The peak of a process whose hypergradients take so much; what was held while it was set up counts, too."""
        return max(self.held_bytes + own_bytes, self.peak_before)  # in this order NaN stays NaN

    def run_seconds(self, units: Units) -> float:
        """From the start of the run to its summary."""
        return self.around_seconds + self.steps_seconds(units)


def rehearse(job: Job, num_steps: int, allowance: float) -> tuple[Pilot, Setup]:
    """Make the first outer steps of a run, with its checkpoints and trackers but without leaving anything behind.

    Args:
        job: the run.
        num_steps: how many steps, at most.
        allowance: seconds after which no further step is begun; one is made in any case.

    Raises:
        UsageError: the parts of the run do not fit each other.
    """
    begun = time.perf_counter()
    setup, state = set_up(job.problem, job.solver, job.method, job.optimizer, job.scheduler)
    with torch.no_grad():
        start = RunStart({}, job.directory, 0, job.trainer.num_steps, setup.natural(state.raw))
    for callback in job.callbacks:
        callback.on_start(start)
    first, device = time.perf_counter(), state.params.device
    held, before = held_bytes(device), peak_held_bytes(device)
    try:
        records = _steps(job, setup, state, num_steps, first + allowance)
        beside = max(time.perf_counter() - first - state.seconds, 0.0) / len(records)
        checkpoint = _checkpoint(job, state)
    finally:
        summary: dict[str, Any] = summarise({}, setup, state, "planned")
        for callback in job.callbacks:
            callback.on_end(summary)
    pilot = Pilot(
        num_steps=job.trainer.num_steps,
        num_checkpoints=0 if job.directory is None else -(-job.trainer.num_steps // job.trainer.checkpoint_every),
        warm_start=job.method.warm_start,
        set_up_seconds=first - begun,
        step_seconds=tuple(record["seconds"] for record in records),
        work=tuple(_work(record) for record in records),
        beside_seconds=beside,
        checkpoint_seconds=checkpoint,
        held_bytes=held,
        peak_before=before,
        peak_bytes=peak_held_bytes(device),
        records=tuple(records),
    )
    return pilot, setup


def _steps(job: Job, setup: Setup, state: TrainState, num_steps: int, deadline: float) -> list[Record]:
    records: list[Record] = []
    for record in job.trainer.steps(setup, state, job.callbacks):
        state.save()  # as a run does after each step
        records.append(record)
        if len(records) >= num_steps or time.perf_counter() > deadline:
            break
    return records


def _checkpoint(job: Job, state: TrainState) -> float:
    """Seconds of one checkpoint; zero for a run that writes none."""
    if job.directory is None:
        return 0.0
    started = time.perf_counter()
    save_checkpoint(job.directory / "checkpoints", state.step, state.save(), keep=1)
    return time.perf_counter() - started


def _work(record: Record) -> Work:
    return Work(record["receipt.inner_gradients"], record["receipt.inner_products"], record["receipt.products"])
