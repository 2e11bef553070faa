"""Hyperparameter optimisation by hypergradients beside Optuna's TPE, random search and a grid, for 1 to 35,610 hyperparameters.

    python -m benchmarks.hpo --folder outputs/hpo       (hours: rivals make 200 trainings each; goes on where it was cut short)

The problem is the experiment `text_penalties` with a penalty for each group of words: 1, 10, 100 groups, or each word its own.
Words of a group are about equally frequent, and groups have about the same share of the features' squares. Penalties are those
of one range for everybody; hypergradients, TPE and random search begin at its geometric mean. Rivals train with the
experiment's inner solver from the best weights so far, hypergradients from the latest ones, and all lower the same loss on the
validation texts. Hypergradients are the experiment's, with Adam at a rate of 0.5 and betas of 0.5 and 0.95, chosen on split 0
with ten groups, and without its early stop; searches are Optuna's as they come, one seed for each split.

The clock runs through all that a method does, its own bookkeeping too, but for the loading of data. Gradients are inner
gradients and products with the inner Hessian, and four for each hypergradient. Weights that are trained from others may fit
better than their penalties would let them: what counts in the end are losses of penalties trained anew, from zero and further,
outside the clock: each of hypergradients', and the best of a search. TPE's time is also compared without its bookkeeping,
which grows with the square of the number of hyperparameters: the claim is about that smaller time.

A grid needs at least two values of each hyperparameter: 1,024 trainings for ten, of which it gets 200 in random order, and
more than can be listed for 100. What is tuned on the validation texts fits them better than others, the more so the more there
is to tune: the loss on the tenth of them that nothing was chosen by is a column. TPE takes some 7 GB for 35,610.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks import searches
from benchmarks.common import Claim, Row, experiment_parts, finish, parse, table
from benchmarks.kept import fingerprint
from benchmarks.searches import GRID, OURS, RANDOM, TPE, Point, Search, WordGroups, hypergradients, searched
from bilevel.cli.job import Parts
from bilevel.errors import UsageError
from bilevel.jsonable import encode

GROUPS = (1, 10, 100, None)  # None: each word is a group of its own
ADAM = ("outer_optimizer.lr=0.5", "outer_optimizer.betas=[0.5,0.95]")  # whatever the number
TRAININGS, STEPS = 200, 20
MANY = 10  # hyperparameters from which on the claim is made
PICTURE = Path(__file__).parent / "results" / "hpo.png"
Found = dict[tuple[int, str], Search]


def all_searches(
    options: argparse.Namespace, parts: Parts, settings: dict[str, Any], folder: Path
) -> Iterator[tuple[int, str, Search]]:
    """Every method for every number of groups; those that the folder has are read."""
    rivals = (TPE, RANDOM, GRID) if find_spec("optuna") else ()
    if not rivals:
        print("Optuna is not installed: its searches take no part", file=sys.stderr)
    said = searches.console()
    for groups in options.groups:
        problem = WordGroups(groups, **settings)
        problem.to(dtype=torch.float64)
        number = len(problem.init_hparams()["penalty"])
        for method in (OURS, *rivals):
            if method == GRID and number > MANY:
                continue
            name = f"{method.replace(' ', '_')}_{'each' if groups is None else groups}"
            file = folder / f"{name}.json"
            if not file.exists():
                if method == OURS:
                    found = hypergradients(problem, parts, 3 if options.quick else STEPS, said)
                else:
                    copy = None if method == GRID else folder / f"{name}.pt"  # a grid does not know what it has visited
                    trainings = 12 if options.quick else TRAININGS  # TPE has a model from the eleventh on
                    found = searched(method, problem, parts, trainings, copy, said, settings["split_seed"])
                write(found, file)
            yield number, method, read(file)


def write(search: Search, file: Path) -> None:
    """Keep a search; whole, or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_suffix(".new")
    fresh.write_text(json.dumps(encode(asdict(search)), allow_nan=False))
    fresh.replace(file)


def read(file: Path) -> Search:
    """A search that was kept."""
    kept = json.loads(file.read_text())
    kept["points"] = [Point(one["seconds"], one["gradients"], float(one["loss"])) for one in kept["points"]]
    kept["anew"] = {int(number): float(loss) for number, loss in kept["anew"].items()}
    return Search(**kept)


def rows_of(found: Found) -> list[Row]:
    """The table; a time to TPE's loss where TPE has run."""
    rows: list[Row] = []
    for (number, method), search in found.items():
        rival = found.get((number, TPE))
        reached = search.reaches(target(rival)) if rival else None
        rows.append(
            {
                "hyperparameters": number,
                "method": method,
                "trainings": len(search.points),
                "unfinished": search.unfinished,
                "seconds": search.points[-1].seconds,
                "in trainings": search.training,
                "gradients": search.points[-1].gradients,
                "best at": 1 + search.best,
                "validation loss": search.points[search.best].loss,
                "trained anew": search.anew[search.best],
                "left out": search.metrics["holdout_loss"],
                "test accuracy": search.metrics["test_accuracy"],
                "seconds to TPE's": reached and reached.seconds,
                "gradients to TPE's": reached and reached.gradients,
            }
        )
    return rows


def target(rival: Search) -> float:
    """The loss of its best penalties."""
    return rival.anew[rival.best]


def claims_of(found: Found) -> list[Claim]:
    """Time of hypergradients to TPE's loss over that of TPE's trainings, for each number of at least ten.

    Raises:
        UsageError: they were made with other threads, or on another machine.
    """
    claims = []
    for number in dict.fromkeys(number for number, _ in found if number >= MANY):
        ours, rival = found[number, OURS], found.get((number, TPE))
        figure = None
        if rival and rival.best:  # else it has not come further than where everybody begins
            if ours.made_with != rival.made_with:
                raise UsageError(
                    f"searches for {number:,} hyperparameters were made with {ours.made_with} and {rival.made_with}, whose "
                    "times do not compare: give another folder."
                )
            reached = ours.reaches(target(rival))
            figure = reached.seconds / (rival.training or math.nan) if reached else math.inf
        claims.append(Claim(f"{number:,} hyperparameters: time to what TPE reaches over TPE's trainings", figure, 0.1))
    return claims


def plot(found: Found, path: Path) -> None:
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
    own.add_argument(
        "--split-seed", type=int, default=1, help="of the split of the texts, and of searches (default: 1)"
    )
    own.add_argument(
        "--groups", nargs="+", type=_groups, default=list(GROUPS), help="of words, or `each` (default: 1 10 100 each)"
    )
    options = parse(str(__doc__).splitlines()[0], argv, device=False, parents=[own])
    settings: dict[str, Any] = {"split_seed": options.split_seed}
    if options.quick:
        settings["num_texts"], options.groups = 1500, [1, 10]
    parts = experiment_parts("text_penalties", "callbacks=none", *ADAM, "problem.num_texts=1500")
    found: Found = {}
    with TemporaryDirectory() as scratch:
        kept = (Path(scratch) if options.quick else options.folder) / fingerprint([Path(searches.__file__)])[:8]
        for number, method, search in all_searches(options, parts, settings, kept / str(options.split_seed)):
            found[number, method] = search
            print(
                f"{number:,} hyperparameters, {method}: {search.anew[search.best]:.5f} in {search.points[-1].seconds:.1f} s",
                flush=True,
            )
    rows = rows_of(found)
    print(table(rows))
    if options.groups == list(GROUPS):
        plot(found, PICTURE)
    made_with = {f"{number}, {method}": search.made_with for (number, method), search in found.items()}
    return finish(options, rows, claims_of(found), {"searches": made_with})


def _groups(word: str) -> int | None:
    if word != "each" and not (word.isdecimal() and int(word)):
        raise argparse.ArgumentTypeError(f"a number of groups, at least 1, or `each` was expected, but got {word}.")
    return None if word == "each" else int(word)


if __name__ == "__main__":
    sys.exit(main())
