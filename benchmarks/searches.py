"""What `benchmarks.hpo` compares: an outer loop, and Optuna's searches, on penalties of groups of words."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from benchmarks.common import Row, machine
from benchmarks.peers import versions
from bilevel import Trainer, fit
from bilevel.cli.job import Parts
from bilevel.constraints import Box, Constraint
from bilevel.errors import UsageError
from bilevel.flat import FlatProblem
from bilevel.problems import TextPenalties
from bilevel.solvers import run
from bilevel.tree import TensorDict

OURS, TPE, RANDOM, GRID = "hypergradients", "TPE", "random search", "grid"
RANGE = (1e-8, 1e-2)
START = math.sqrt(RANGE[0] * RANGE[1])
OWN_GRADIENTS = 4  # of a hypergradient: two for the graph of the inner one, the mixed product, the outer loss's
ANEW = 1e-7  # gradient norm at which penalties are judged
EVERY = 60.0  # seconds between two copies of a search that is going on


class WordGroups(TextPenalties):
    """The texts with one penalty for each group of about equally frequent words, within a range.

    Args:
        num_groups: how many; None makes each word a group.
        settings: of `TextPenalties`.

    Raises:
        UsageError: there are not so many groups of about equal shares.
    """

    constraints: ClassVar[Mapping[str, Constraint]] = {"penalty": Box(*RANGE)}

    def __init__(self, num_groups: int | None, **settings: Any) -> None:
        """Walk through the words, the rarest first, and begin a group at each equal share of the features' squares."""
        super().__init__(penalty="per_feature", start=START, **settings)
        columns, squares = self.x.rows.col_indices(), self.x.rows.values().double().square()
        number = self.x.shape[1]
        order = columns.bincount(minlength=number).argsort(stable=True)
        share = torch.zeros(number, dtype=torch.float64).index_add(0, columns, squares)[order].cumsum(0)
        wanted = number if num_groups is None else num_groups
        place = torch.arange(number) if num_groups is None else (share * wanted / share[-1]).ceil().clamp(max=wanted)
        self.group = torch.empty(number, dtype=torch.long)
        self.group[order] = place.unique(return_inverse=True)[1]
        if int(self.group.max()) + 1 != wanted:
            raise UsageError(
                f"{wanted} groups of words were asked for, but some words have more than such a share: ask for fewer."
            )

    def init_hparams(self) -> TensorDict:
        """One penalty for each group."""
        return {"penalty": self.x.rows.values().new_full((int(self.group.max()) + 1,), self.start_penalty)}

    def anchor(self, hparams: Any) -> tuple[TensorDict, TensorDict]:
        """Each word's penalty is its group's."""
        return super().anchor({"penalty": hparams["penalty"][self.group][None]})


@dataclass(frozen=True)
class Point:
    """What a method has by a moment.

    Attributes:
        seconds: since its start.
        gradients: inner gradients and products so far.
        loss: on the validation texts, of the weights that were trained last; infinite where they are not finite.
    """

    seconds: float
    gradients: int
    loss: float


@dataclass(frozen=True)
class Search:
    """What a method came to.

    Attributes:
        points: one for each training.
        anew: validation losses of penalties that were trained anew, from zero and further, outside the clock, by the numbers
            of their points: of hypergradients all, of a search the best.
        metrics: of the best ones.
        training: seconds of trainings alone; None where they are not told from the rest.
        unfinished: trainings that ended short of the tolerance.
        made_with: machine, threads, and Optuna's version.
    """

    points: list[Point]
    anew: dict[int, float]
    metrics: dict[str, float]
    training: float | None
    unfinished: int
    made_with: Row

    @property
    def best(self) -> int:
        """The number of the point with the least loss, as far as the method knew."""
        return int(np.argmin([point.loss for point in self.points]))

    def reaches(self, loss: float) -> Point | None:
        """The first point whose penalties, trained anew, have a loss that is not above this one."""
        return next((self.points[number] for number in sorted(self.anew) if self.anew[number] <= loss), None)


class Clock:
    """A callback that notes a point, and the penalties, at each outer step."""

    def __init__(self) -> None:
        """Starts now."""
        self.began, self.gradients, self.unfinished = time.perf_counter(), 0, 0
        self.points: list[Point] = []
        self.penalties: list[Tensor] = []

    def on_start(self, run: Any) -> None:
        """The first penalties."""
        self.following = run.hparams["penalty"].detach().clone()

    def on_step(self, record: dict[str, Any], hparams: TensorDict) -> None:
        """The loss is of the penalties before the step."""
        spent = sum(record[f"receipt.{name}"] for name in ("inner_gradients", "inner_products", "products"))
        self.gradients += spent + OWN_GRADIENTS
        self.unfinished += record["receipt.inner_result"] != "converged"
        self.points.append(Point(time.perf_counter() - self.began, self.gradients, _finite(record["outer_loss"])))
        self.penalties.append(self.following)
        self.following = hparams["penalty"].detach().clone()

    def on_end(self, summary: dict[str, Any]) -> None:
        """Nothing to do."""


def hypergradients(problem: WordGroups, parts: Parts, num_steps: int, console: Console) -> Search:
    """The outer loop."""
    console.print(f"{num_steps} outer steps")
    clock = Clock()
    trainer = Trainer(num_steps=num_steps, metrics_every=num_steps)
    fit(problem, **{**parts.keywords, "trainer": trainer, "callbacks": [clock]})
    judge = Judge(problem, parts)
    anew = {number: judge(penalty) for number, penalty in enumerate(clock.penalties)}
    best = clock.penalties[int(np.argmin([point.loss for point in clock.points]))]
    return Search(clock.points, anew, judge.metrics(best), None, clock.unfinished, _made_with())


class Judge:
    """Validation losses of penalties that are trained from zero, further than in a search: a function of the penalties.

    Args:
        problem: the texts.
        parts: of the experiment.
    """

    def __init__(self, problem: WordGroups, parts: Parts) -> None:
        """Nothing is trained yet."""
        self.problem, self.solver = problem, replace(parts.solver, atol=ANEW, max_steps=500)
        self.flat = FlatProblem.of(problem, problem.init_hparams())

    def _trained(self, penalty: Tensor) -> TensorDict:
        hparams = {"penalty": penalty}
        with torch.no_grad():
            found = run(self.solver, self.flat.objective(None), self.flat.start(hparams), hparams)
        return self.flat.unravel(found.params)

    def __call__(self, penalty: Tensor) -> float:
        """The loss."""
        with torch.no_grad():
            return _finite(float(self.problem.outer_loss(self._trained(penalty), {"penalty": penalty}, None)))

    def metrics(self, penalty: Tensor) -> dict[str, float]:
        """Loss and accuracy on the other parts."""
        return self.problem.metrics(self._trained(penalty), {"penalty": penalty})


class Trainings:
    """Validation losses of penalties, each trained from the best weights so far.

    Args:
        problem: the texts.
        parts: of the experiment.
        file: where a copy is kept while it goes on; None keeps none. What it holds is taken from there.
    """

    def __init__(self, problem: WordGroups, parts: Parts, file: Path | None) -> None:
        """Take what there is, and start the clock."""
        self.problem, self.solver, self.file = problem, parts.solver, file
        hparams = problem.init_hparams()
        self.flat = FlatProblem.of(problem, hparams)
        self.best, self.least = self.flat.start(hparams), math.inf
        self.points: list[Point] = []
        self.penalties: list[Tensor] = []
        self.seconds, self.gradients, self.unfinished = 0.0, 0, 0
        if file is not None and file.exists():
            kept = torch.load(file, weights_only=True)
            self.points = [Point(*point) for point in kept["points"]]
            self.penalties, self.best, self.least = kept["penalties"], kept["best"], kept["least"]
            self.seconds, self.unfinished = kept["seconds"], kept["unfinished"]
            self.gradients = self.points[-1].gradients
        self.began = time.perf_counter() - (self.points[-1].seconds if self.points else 0.0)
        self.copied = time.perf_counter()

    def __call__(self, penalty: Tensor) -> float:
        """The loss of one training."""
        begun = time.perf_counter()
        hparams = {"penalty": penalty}
        with torch.no_grad():
            inner = run(self.solver, self.flat.objective(None), self.best, hparams)
            loss = _finite(float(self.problem.outer_loss(self.flat.unravel(inner.params), hparams, None)))
        if loss < self.least:
            self.best, self.least = inner.params, loss
        ended = time.perf_counter()
        self.seconds += ended - begun
        self.gradients += inner.num_gradients + inner.num_mv
        self.unfinished += not inner.result.successful
        self.points.append(Point(ended - self.began, self.gradients, loss))
        self.penalties.append(penalty)
        if self.file is not None and ended > self.copied + EVERY:
            self._copy(self.file)
            self.copied = time.perf_counter()
            self.began += self.copied - ended  # copying is no part of it
        return loss

    def _copy(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        fresh = file.with_suffix(".new")
        points = [(point.seconds, point.gradients, point.loss) for point in self.points]
        kept = {"points": points, "penalties": self.penalties, "best": self.best, "least": self.least}
        torch.save({**kept, "seconds": self.seconds, "unfinished": self.unfinished}, fresh)
        fresh.replace(file)


def searched(
    method: str, problem: WordGroups, parts: Parts, num_trainings: int, file: Path | None, console: Console, seed: int
) -> Search:
    """A rival's trainings; but for the grid the first one at the starting values."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    start = problem.init_hparams()["penalty"]
    names = [str(number) for number in range(len(start))]
    distribution = optuna.distributions.FloatDistribution(*RANGE, log=True)
    trainings = Trainings(problem, parts, file)
    study = optuna.create_study(sampler=_sampler(method, names, seed + len(trainings.points)))
    for penalty, point in zip(trainings.penalties, trainings.points, strict=True):
        values = dict(zip(names, penalty.tolist(), strict=True))
        study.add_trial(
            optuna.trial.create_trial(params=values, distributions=dict.fromkeys(names, distribution), value=point.loss)
        )
    left = num_trainings - len(trainings.points)
    if method != GRID and not trainings.points:
        study.enqueue_trial(dict(zip(names, start.tolist(), strict=True)))
    trainings.began = time.perf_counter() - (trainings.points[-1].seconds if trainings.points else 0.0)
    with Progress(*Progress.get_default_columns(), console=console, transient=True) as progress:
        task = progress.add_task(f"{method}, {len(names):,}", total=left)

        def objective(trial: Any) -> float:
            loss = trainings(start.new_tensor([trial.suggest_float(name, *RANGE, log=True) for name in names]))
            progress.advance(task)
            return loss

        study.optimize(objective, n_trials=left)
    judge, best = Judge(problem, parts), int(np.argmin([point.loss for point in trainings.points]))
    found = trainings.penalties[best]
    anew = {best: judge(found)}
    return Search(trainings.points, anew, judge.metrics(found), trainings.seconds, trainings.unfinished, _made_with())


def _sampler(method: str, names: list[str], seed: int) -> Any:
    from optuna import samplers

    if method == GRID:
        values = np.geomspace(*RANGE, 200) if len(names) == 1 else np.geomspace(*RANGE, 4)[1:3]
        return samplers.GridSampler(dict.fromkeys(names, values.tolist()), seed=0)
    makers: dict[str, Callable[..., Any]] = {TPE: samplers.TPESampler, RANDOM: samplers.RandomSampler}
    return makers[method](seed=seed)


def _finite(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf


def _made_with() -> Row:
    own = machine()
    return {**{name: own[name] for name in ("device", "cores", "threads", "torch")}, **versions(["optuna", "numpy"])}


def console() -> Console:
    """For progress, which is no part of the table."""
    return Console(file=sys.stderr)
