"""Hyperparameter optimisation by hypergradients beside Optuna's TPE, random search and a grid, for 1 to 35,610 hyperparameters.

    python -m benchmarks.hpo --folder outputs/hpo       (hours: rivals make 200 trainings each; goes on where it was cut short)

The problem is the experiment `text_penalties` with a penalty for each group of words: 1, 10, 100 groups, or each word its own.
Words of a group are about equally frequent, and every group has the same share of the features' squares. Everybody begins at
the geometric mean of the same range, trains with the experiment's inner solver from the best weights so far (hypergradients:
from the latest ones), and lowers the same loss on the validation texts. Hypergradients are the experiment's; Adam makes longer
steps than there, the same for every number. The clock runs through all that a method does, its own bookkeeping too; gradients
are inner gradients and products with the inner Hessian, those of hypergradients included.

A grid needs at least two values of each hyperparameter: 1,024 trainings for ten, of which it gets 200 in random order, and
more than can be listed for 100. What is tuned on the validation texts fits them better than others, the more so the more there
is to tune: the loss on the tenth of them that nothing was chosen by is a column.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import Claim, Row, experiment_parts, finish, parse, table
from benchmarks.kept import fingerprint
from benchmarks.peers import versions
from bilevel import fit
from bilevel.cli.job import Parts
from bilevel.flat import FlatProblem
from bilevel.problems import TextPenalties
from bilevel.solvers import run
from bilevel.tree import TensorDict

OURS, TPE, RANDOM, GRID = "hypergradients", "TPE", "random search", "grid"
GROUPS = (1, 10, 100, None)  # None: each word is a group of its own
RANGE = (1e-8, 1e-2)
START = math.sqrt(RANGE[0] * RANGE[1])
TRAININGS, STEPS = 200, 20
MANY = 10  # hyperparameters from which on the claim is made
ADAM = ("outer_optimizer.lr=0.5", "outer_optimizer.betas=[0.5,0.95]")  # of hypergradients, whatever their number
PICTURE = Path(__file__).parent / "results" / "hpo.png"


class WordGroups(TextPenalties):
    """The texts with one penalty for each group of equally frequent words.

    Args:
        num_groups: how many; None makes each word a group.
        settings: of `TextPenalties`.
    """

    def __init__(self, num_groups: int | None, **settings: Any) -> None:
        """Walk through the words, the rarest first, and begin a group at each equal share of the features' squares."""
        super().__init__(penalty="per_feature", start=START, **settings)
        columns, squares = self.x.rows.col_indices(), self.x.rows.values().double().square()
        number = self.x.shape[1]
        order = columns.bincount(minlength=number).argsort(stable=True)
        share = torch.zeros(number, dtype=torch.float64).index_add(0, columns, squares)[order].cumsum(0)
        place = torch.arange(number) if num_groups is None else (share * num_groups / share[-1]).ceil().long()
        self.group = torch.empty(number, dtype=torch.long)
        self.group[order] = place.unique(return_inverse=True)[1]

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
        loss: on the validation texts, of the weights that were trained last.
    """

    seconds: float
    gradients: int
    loss: float


@dataclass(frozen=True)
class Search:
    """What a method came to.

    Attributes:
        points: one for each training.
        metrics: of the weights with the least validation loss.
        training: seconds of trainings alone.
    """

    points: list[Point]
    metrics: dict[str, float]
    training: float

    def reaches(self, loss: float) -> Point | None:
        """The first point with a loss that is not above this one."""
        return next((point for point in self.points if point.loss <= loss), None)

    @property
    def best(self) -> float:
        """The least validation loss."""
        return min(point.loss for point in self.points)


class Clock:
    """Notes a point at each outer step."""

    def __init__(self) -> None:
        """Starts now."""
        self.began, self.gradients = time.perf_counter(), 0
        self.points: list[Point] = []

    def on_step(self, record: dict[str, Any], hparams: TensorDict) -> None:
        """Its loss is of the hyperparameters before the step."""
        self.gradients += sum(record[f"receipt.{name}"] for name in ("inner_gradients", "inner_products", "products"))
        self.points.append(Point(time.perf_counter() - self.began, self.gradients, record["outer_loss"]))

    def on_start(self, run: Any) -> None:
        """Nothing to do."""

    def on_end(self, summary: dict[str, Any]) -> None:
        """Nothing to do."""


def hypergradients(problem: WordGroups, parts: Parts, num_steps: int) -> Search:
    """The outer loop."""
    clock = Clock()
    found = fit(problem, **{**parts.keywords, "trainer": None, "callbacks": [clock]}, num_steps=num_steps)
    metrics = problem.metrics(found.params, found.hparams)
    return Search(clock.points, metrics, clock.points[-1].seconds)


class Trainings:
    """Validation losses of penalties, each trained from the best weights so far.

    Args:
        problem: the texts.
        parts: of the experiment.

    Attributes:
        points: one for each training.
        seconds: in trainings.
    """

    def __init__(self, problem: WordGroups, parts: Parts) -> None:
        """Starts now."""
        self.began, self.seconds, self.gradients = time.perf_counter(), 0.0, 0
        self.points: list[Point] = []
        self.problem, self.solver = problem, parts.solver
        hparams = problem.init_hparams()
        self.flat = FlatProblem.of(problem, hparams)
        self.best, self.least = self.flat.start(hparams), math.inf

    def __call__(self, penalty: Tensor) -> float:
        """The loss of one training."""
        begun = time.perf_counter()
        hparams = {"penalty": penalty}
        with torch.no_grad():
            inner = run(self.solver, self.flat.objective(None), self.best, hparams)
            loss = float(self.problem.outer_loss(self.flat.unravel(inner.params), hparams, None))
        if loss < self.least:
            self.best, self.least = inner.params, loss
        ended = time.perf_counter()
        self.seconds += ended - begun
        self.gradients += inner.num_gradients + inner.num_mv
        self.points.append(Point(ended - self.began, self.gradients, loss))
        return loss

    def search(self) -> Search:
        """What they came to."""
        return Search(self.points, self.problem.metrics(self.flat.unravel(self.best), {}), self.seconds)


def searched(method: str, problem: WordGroups, parts: Parts, num_trainings: int) -> Search:
    """A rival's trainings, the first one at the starting values."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    start = problem.init_hparams()["penalty"]
    names = [str(number) for number in range(len(start))]
    trainings = Trainings(problem, parts)
    if method == GRID:
        values = np.geomspace(*RANGE, 200).tolist() if len(names) == 1 else np.geomspace(*RANGE, 4)[1:3].tolist()
        sampler = optuna.samplers.GridSampler(dict.fromkeys(names, values), seed=0)
    else:
        sampler = {TPE: optuna.samplers.TPESampler, RANDOM: optuna.samplers.RandomSampler}[method](seed=0)
    study = optuna.create_study(sampler=sampler)
    if method != GRID:
        study.enqueue_trial(dict(zip(names, start.tolist(), strict=True)))

    def objective(trial: Any) -> float:
        return trainings(start.new_tensor([trial.suggest_float(name, *RANGE, log=True) for name in names]))

    study.optimize(objective, n_trials=num_trainings)
    return trainings.search()


def searches(
    options: argparse.Namespace, parts: Parts, settings: dict[str, Any], folder: Path
) -> Iterator[tuple[int, str, Search]]:
    """Every method for every number of groups; those that the folder has are read."""
    rivals = (TPE, RANDOM, GRID) if find_spec("optuna") else ()
    if not rivals:
        print("Optuna is not installed: its searches take no part", file=sys.stderr)
    for groups in options.groups:
        problem = WordGroups(groups, **settings)
        problem.to(dtype=torch.float64)
        number = len(problem.init_hparams()["penalty"])
        for method in (OURS, *rivals):
            if method == GRID and number > MANY:
                continue
            file = folder / f"{method.replace(' ', '_')}_{number}.json"
            if not file.exists():
                if method == OURS:
                    found = hypergradients(problem, parts, 3 if options.quick else STEPS)
                else:
                    found = searched(method, problem, parts, 3 if options.quick else TRAININGS)
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps(asdict(found)))
            kept = json.loads(file.read_text())
            yield number, method, Search(**{**kept, "points": [Point(**point) for point in kept["points"]]})


def rows_of(found: dict[tuple[int, str], Search]) -> list[Row]:
    """The table; a time to TPE's loss where TPE has run."""
    rows: list[Row] = []
    for (number, method), search in found.items():
        rival = found.get((number, TPE))
        reached = search.reaches(rival.best) if rival else None
        rows.append(
            {
                "hyperparameters": number,
                "method": method,
                "trainings": len(search.points),
                "seconds": search.points[-1].seconds,
                "in trainings": search.training,
                "gradients": search.points[-1].gradients,
                "validation loss": search.best,
                "left out": search.metrics["holdout_loss"],
                "test accuracy": search.metrics["test_accuracy"],
                "seconds to TPE's": reached and reached.seconds,
                "gradients to TPE's": reached and reached.gradients,
            }
        )
    return rows


def claims_of(found: dict[tuple[int, str], Search]) -> list[Claim]:
    """Time of hypergradients to TPE's loss over TPE's time, for each number of at least ten."""
    claims = []
    for number in dict.fromkeys(number for number, _ in found if number >= MANY):
        ours, rival = found[number, OURS], found.get((number, TPE))
        figure = None
        if rival:
            reached = ours.reaches(rival.best)
            figure = reached.seconds / rival.points[-1].seconds if reached else math.inf
        claims.append(Claim(f"{number:,} hyperparameters: wall time to what TPE reaches, over TPE's", figure, 0.1))
    return claims


def plot(found: dict[tuple[int, str], Search], path: Path) -> None:
    """The least loss so far against time, and against gradients; a column for each number of hyperparameters."""
    from matplotlib.figure import Figure

    from bilevel.report.style import LIGHT, Plate, Theme, blank, draw

    numbers = list(dict.fromkeys(number for number, _ in found))

    def paint(theme: Theme) -> Figure:
        figure, axes = blank(2, len(numbers), 6.0)
        for place, number in enumerate(numbers):
            for name, panel in (("seconds", axes[place]), ("gradients", axes[len(numbers) + place])):
                for method, colour in zip((OURS, TPE, RANDOM, GRID), (theme.ink, *theme.series), strict=False):
                    if (number, method) in found:
                        points = found[number, method].points
                        losses = torch.tensor([point.loss for point in points]).cummin(0).values.tolist()
                        spent = [getattr(point, name) for point in points]
                        panel.step(spent, losses, where="post", color=colour, linewidth=1.2, label=method)
                panel.set(xscale="log", xlabel=name)
            axes[place].set_title(f"{number:,} hyperparameter{'s' * (number > 1)}")
        for panel in (axes[0], axes[len(numbers)]):
            panel.set_ylabel("least validation loss so far")
        axes[0].legend()
        return figure

    caption = "Least validation loss so far of each method, against wall time and against gradients."
    draw(Plate(path.stem, "Hyperparameter optimisation", caption, paint), LIGHT, path.parent)


def main(argv: list[str] | None = None) -> int:
    """Search in every way, and compare."""
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--folder", type=Path, default=Path("outputs/hpo"), help="where the searches are, or will be")
    own.add_argument("--split-seed", type=int, default=0, help="of the split of the texts (default: 0)")
    own.add_argument(
        "--groups", nargs="+", type=_groups, default=list(GROUPS), help="of words, or `each` (default: 1 10 100 each)"
    )
    options = parse(str(__doc__).splitlines()[0], argv, device=False, parents=[own])
    settings: dict[str, Any] = {"split_seed": options.split_seed}
    if options.quick:
        settings["num_texts"], options.groups = 1500, [1, 10]
    parts = experiment_parts("text_penalties", "callbacks=none", *ADAM, "problem.num_texts=1500")
    found: dict[tuple[int, str], Search] = {}
    with TemporaryDirectory() as scratch:
        kept = (Path(scratch) if options.quick else options.folder) / fingerprint([Path(__file__)])[:8]
        folder = kept / str(options.split_seed)
        for number, method, search in searches(options, parts, settings, folder):
            found[number, method] = search
            print(
                f"{number:,} hyperparameters, {method}: {search.best:.5f} in {search.points[-1].seconds:.1f} s",
                flush=True,
            )
    rows = rows_of(found)
    print(table(rows))
    if not options.quick:
        plot(found, PICTURE)
    return finish(options, rows, claims_of(found), {"peers": versions(["optuna"])})


def _groups(word: str) -> int | None:
    return None if word == "each" else int(word)


if __name__ == "__main__":
    sys.exit(main())
