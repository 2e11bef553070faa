"""Implicit MAML beside MAML on sine waves, 10-shot: squared error of the same 1,000 test tasks for as many evaluations.

    python -m benchmarks.meta_sinusoid          (writes benchmarks/results/meta_sinusoid.png)

Both are the experiments as shipped, `imaml_sinusoid` and `maml_sinusoid`. What an outer step costs is counted in evaluations
of a gradient: those of the inner loss, line searches included, one of the outer loss, and products with the inner Hessian:
the ones of conjugate gradient, with the gradient at the solution that they start from, and one for each unrolled step, of
which the way back consists. MAML makes so many outer steps that its evaluations are not fewer than implicit MAML's. A test
task adapts by its method's inner solver: to implicit MAML in ten steps, to MAML in the best of all numbers of steps up to as
many as implicit MAML takes gradients for its ten, at the rate of its training.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import Claim, Row, experiment_parts, finish, parse, table
from bilevel import fit
from bilevel.cli.job import Parts
from bilevel.hypergradient import Unrolled
from bilevel.meta import Adaptation, Mean, evaluate

OURS, OTHER = "imaml_sinusoid", "maml_sinusoid"
PICTURE = Path(__file__).parent / "results" / "meta_sinusoid.png"
SEEDS, NUM_TASKS = (0, 1, 2), 1000
STEPS, MOST = 10, 30  # inner steps of test tasks: those that implicit MAML counts with, and all that are looked at
WINDOW = 100  # outer steps that a point of the learning curve is the mean of
QUICK = ("problem.num_tasks=2", "trainer.num_steps=3")


@dataclass(frozen=True)
class Run:
    """A trained starting point on test tasks.

    Attributes:
        history: records of the outer steps.
        spent: evaluations up to each of them.
        adaptation: squared errors of the test tasks along the inner solve.
        gradients: of the inner loss that an outer step took, at the median.
    """

    history: list[dict[str, Any]]
    spent: list[int]
    adaptation: Adaptation
    gradients: int

    def error_after(self, num_steps: int) -> Tensor:
        """Of each test task, `(T,)`."""
        return self.adaptation.scores[self.adaptation.steps.index(num_steps)]

    def best_within(self, num_steps: int) -> int:
        """The number of inner steps up to this one with the smallest mean error."""
        return min(
            (step for step in self.adaptation.steps if step <= num_steps),
            key=lambda step: float(self.error_after(step).mean()),
        )


def evaluations(record: dict[str, Any], unrolled: bool) -> int:
    """What an outer step took."""
    made = sum(int(record[f"receipt.{name}"]) for name in ("inner_gradients", "inner_products", "products"))
    return made + 1 + (int(record["receipt.inner_steps"]) if unrolled else 1)


def train(parts: Parts, seed: int, num_tasks: int) -> Run:
    """Train, and let test tasks adapt."""
    found = fit(parts.problem, **parts.keywords, seed=seed)
    unrolled = isinstance(parts.hypergradient, Unrolled)
    spent = list(accumulate(evaluations(record, unrolled) for record in found.history))
    marks = range(1, MOST + 1)
    adaptation = evaluate(parts.problem, parts.solver, found.hparams, num_tasks=num_tasks, steps=marks)
    gradients = sorted(int(record["receipt.inner_gradients"]) for record in found.history)
    return Run(found.history, spent, adaptation, gradients[len(gradients) // 2])


def pair(seed: int, keys: tuple[str, ...], num_tasks: int) -> dict[str, Run]:
    """Both methods from one seed."""
    ours = train(experiment_parts(OURS, f"seed={seed}", *keys), seed, num_tasks)
    each = 2 * experiment_parts(OTHER).solver.max_steps + 1  # evaluations of an outer step
    num_steps = f"trainer.num_steps={math.ceil(ours.spent[-1] / each)}"
    other = train(experiment_parts(OTHER, f"seed={seed}", *keys, num_steps), seed, num_tasks)
    assert other.spent[-1] >= ours.spent[-1]
    return {OURS: ours, OTHER: other}


def plot(runs: dict[str, list[Run]], path: Path) -> None:
    """Error against evaluations during training, and against inner steps of the test tasks; a line each seed."""
    from matplotlib.figure import Figure

    from bilevel.report.style import LIGHT, Plate, Theme, blank, draw, log_axis

    def paint(theme: Theme) -> Figure:
        figure, (left, right) = blank(1, 2, 3.0)
        shown: list[float] = []
        for name, colour in zip((OURS, OTHER), theme.series, strict=False):
            for place, run in enumerate(runs[name]):
                losses = torch.tensor([record["outer_loss"] for record in run.history])
                whole = len(losses) // WINDOW * WINDOW
                smooth = losses[:whole].unflatten(0, (-1, WINDOW)).mean(-1)
                label = None if place else name  # one entry of the legend for all seeds
                left.plot(run.spent[WINDOW - 1 : whole : WINDOW], smooth, color=colour, linewidth=1, label=label)
                steps = [step for step in run.adaptation.steps if step]
                errors = [float(run.error_after(step).mean()) for step in steps]
                right.plot(steps, errors, "o-", color=colour, markersize=3, linewidth=1)
                shown += [*errors, *smooth.tolist()]
        left.set(xlabel="evaluations of a gradient", ylabel="query error, training tasks")
        right.set(xlabel="inner steps", ylabel="query error, test tasks")
        for axes in (left, right):
            log_axis(axes, shown)
        left.legend()
        return figure

    caption = "Squared error on the query sets during training, and of test tasks after each number of inner steps."
    draw(Plate(path.stem, "Sine waves from ten points", caption, paint), LIGHT, path.parent)


def main(argv: list[str] | None = None) -> int:
    """Train both from each seed, and compare."""
    options = parse(str(__doc__).splitlines()[0], argv, device=False)
    torch.set_num_threads(1)  # the work of a step is small
    seeds, keys, num_tasks = (SEEDS[:1], QUICK, 4) if options.quick else (SEEDS, (), NUM_TASKS)
    runs: dict[str, list[Run]] = {OURS: [], OTHER: []}
    rows: list[Row] = []
    gaps = []
    for seed in seeds:
        both = pair(seed, keys, num_tasks)
        ours, other = both[OURS], both[OTHER]
        allowed = math.ceil(STEPS * ours.gradients / ours.adaptation.num_steps)
        after = {OURS: STEPS, OTHER: other.best_within(min(MOST, allowed))}
        for name, run in both.items():
            error = Mean.of(run.error_after(after[name]))
            rows.append(
                {
                    "experiment": name,
                    "seed": seed,
                    "outer steps": len(run.history),
                    "evaluations": run.spent[-1],
                    "inner steps": after[name],
                    "squared error": error.value,
                    "95 %": error.half_width,
                    "floor": float(run.adaptation.floor.mean()),
                }
            )
            print(table([rows[-1]]), flush=True)
            runs[name].append(run)
        gaps.append(ours.error_after(after[OURS]) - other.error_after(after[OTHER]))
    print()
    print(table(rows))
    pooled = Mean.of(torch.stack(gaps).mean(0))
    print(f"\n{OURS} minus {OTHER}, paired by task: {pooled}")
    if options.quick:
        return finish(options, rows, [])
    plot(runs, PICTURE)
    claims = [Claim("squared error over that of MAML", ratio(rows), 1.0)]
    return finish(options, rows, claims, {"difference": [pooled.value, pooled.half_width]})


def ratio(rows: list[Row]) -> float:
    """Mean squared error of all seeds, ours over the other's."""
    mean = {name: sum(row["squared error"] for row in rows if row["experiment"] == name) for name in (OURS, OTHER)}
    return float(mean[OURS] / mean[OTHER])


if __name__ == "__main__":
    sys.exit(main())
