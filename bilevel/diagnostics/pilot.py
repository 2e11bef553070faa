"""Outer steps of a run made for real, the first ones and some further on, and the others forecast from them.

How much work an outer step is changes along a run: hyperparameters move to where the inner problem is better or worse
conditioned, and a schedule or convergence brings the warm starts closer. The first steps do not tell. Further points are
reached without solving anything: the optimiser goes on with the latest hypergradient, held fixed. From there one step is
made to arrive, which starts too far away to be typical, and one that counts. That is projective integration (Gear and
Kevrekidis 2003, "Projective methods for stiff differential equations"), for the work along the path instead of the path.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bilevel.diagnostics.cost import Units, Work, forecast
from bilevel.diagnostics.meter import held_bytes, peak_held_bytes
from bilevel.errors import NumericalError
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

MAX_LATER = 8  # the work of single steps scatters by a third and more; the mean of so many is known to a tenth or two


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
class Made:
    """An outer step that was made.

    Attributes:
        step: its number.
        seconds: what it took.
        work: what it did.
    """

    step: int
    seconds: float
    work: Work

    @classmethod
    def of(cls, record: Record) -> Made:
        """From what the outer loop said."""
        counts = (record[f"receipt.{name}"] for name in ("inner_gradients", "inner_products", "products"))
        return cls(record["step"], record["seconds"], Work(*counts))


@dataclass(frozen=True)
class Pilot:
    """What outer steps of a run took.

    Attributes:
        num_steps: outer steps of the whole run.
        num_checkpoints: checkpoints that it writes.
        warm_start: whether its inner solves start from the previous solution.
        set_up_seconds: from the start of the run to its first step.
        first: the first outer steps.
        later: outer steps further on.
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
    first: tuple[Made, ...]
    later: tuple[Made, ...]
    beside_seconds: float
    checkpoint_seconds: float
    held_bytes: float
    peak_before: float
    peak_bytes: float
    records: tuple[Record, ...] = ()

    @property
    def num_future(self) -> int:
        """Steps that are forecast."""
        return self.num_steps - len(self.first)

    @property
    def around_seconds(self) -> float:
        """What the whole run spends beside its steps."""
        return (
            self.set_up_seconds + self.num_steps * self.beside_seconds + self.num_checkpoints * self.checkpoint_seconds
        )

    def future(self) -> list[Work]:
        """The work of the steps after the first ones, between the mean of those that had a warm start and the later ones."""
        typical = self.first[1:] if self.warm_start and len(self.first) > 1 else self.first
        place = sum(one.step for one in typical) / len(typical)

        def ahead(name: str) -> list[float]:
            mean = sum(getattr(one.work, name) for one in typical) / len(typical)
            made: dict[float, float] = {one.step: getattr(one.work, name) for one in self.later}
            return forecast({place: mean, **made}, range(len(self.first), self.num_steps))

        names = ("gradients", "inner_products", "products")
        return [Work(*counts) for counts in zip(*map(ahead, names), strict=True)]

    def work(self) -> list[Work]:
        """That of all steps."""
        return [*(one.work for one in self.first), *self.future()]

    def steps_seconds(self, units: Units) -> float:
        """All steps: the first ones as they were, the others by unit costs, corrected by what those made took."""
        made = (*self.first, *self.later)
        factor = statistics.median(one.seconds / (units.fixed + units.work_seconds(one.work)) for one in made)
        ahead = factor * sum(units.fixed + units.work_seconds(one) for one in self.future())
        return sum(one.seconds for one in self.first) + ahead

    def memory(self, own_bytes: float) -> float:
        """The peak of a process whose hypergradients take so much; what was held while it was set up counts, too."""
        return max(self.held_bytes + own_bytes, self.peak_before)  # in this order NaN stays NaN

    def run_seconds(self, units: Units) -> float:
        """From the start of the run to its summary."""
        return self.around_seconds + self.steps_seconds(units)


def rehearse(job: Job, num_steps: int, allowance: float) -> tuple[Pilot, Setup]:
    """Make some outer steps of a run, with its checkpoints and trackers but without leaving anything behind.

    Args:
        job: the run.
        num_steps: how many first steps, at most.
        allowance: seconds after which no further one of the first steps is begun (one is made in any case), and seconds
            for the later ones.

    Raises:
        UsageError: the parts of the run do not fit each other.
    """
    begun = time.perf_counter()
    setup, state = set_up(job.problem, job.solver, job.method, job.optimizer, job.scheduler)
    start = RunStart.of(setup, state, job.trainer.num_steps, directory=job.directory)
    for callback in job.callbacks:
        callback.on_start(start)
    first, device = time.perf_counter(), state.params.device
    held, before = held_bytes(device), peak_held_bytes(device)
    try:
        records = _steps(job, setup, state, num_steps, first + allowance)
        beside = max(time.perf_counter() - first - state.seconds, 0.0) / len(records)
        checkpoint = _checkpoint(job, state)
        later = _later(job, setup, state, records, allowance)
    finally:
        summary: dict[str, Any] = summarise({}, setup, state, "planned")
        for callback in job.callbacks:
            callback.on_end(summary)
    pilot = Pilot(
        num_steps=job.trainer.num_steps,
        num_checkpoints=0 if job.directory is None else -(-job.trainer.num_steps // job.trainer.checkpoint_every),
        warm_start=job.method.warm_start,
        set_up_seconds=first - begun,
        first=tuple(map(Made.of, records)),
        later=tuple(later),
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


def _later(job: Job, setup: Setup, state: TrainState, records: Sequence[Record], allowance: float) -> list[Made]:
    """Outer steps at points spread over the rest of the run; as many as the time allows."""
    end = time.perf_counter() + allowance
    each = 2 * statistics.mean(record["seconds"] for record in records[1:] or records)  # to arrive, and to count
    made: list[Made] = []
    while state.gradient and (left := job.trainer.num_steps - state.step) >= 3:
        affordable = (end - time.perf_counter()) / each
        if affordable < 1 or len(made) == MAX_LATER:
            break
        # Twice as many, as steps tend to become shorter; where they do not, the last one goes to the end.
        number = min(MAX_LATER - len(made), left // 3, int(2 * affordable)) if affordable >= 2 else 1
        job.trainer.coast(setup, state, round(left / number) - 2)
        pair = []
        for _ in range(2):
            try:
                record, _ = job.trainer.step(setup, state)
            except NumericalError:  # a policy that is to raise
                return made
            if record["skipped"]:  # the hypergradient, held fixed, has led to where there is none
                return made
            pair.append(Made.of(record))
        made.append(pair[1])
        each = sum(one.seconds for one in pair)
    return made
