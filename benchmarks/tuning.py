"""The experiment digits_mlp with nothing tuned beside its hand-tuned rivals, and a picture.

    python -m benchmarks.tuning            (two hours on two cores: the tuning, and telling equals apart, take them)

`--runs FILE` keeps every finished run in a file, and takes from it those that an earlier command, cut short, has made. Where
the code has changed since, the first and the last run of each method are made again, and have to come out the same.

For the rivals the tuning is done here: conjugate gradient with a fixed number of steps K and a damping alpha added to the
Hessian, and the Neumann series with K terms and step size alpha, both from zero in every outer step, as iMAML and the
hyperparameter papers run them. Problem, inner solver, outer optimiser, scheduler and the number of outer steps are the
experiment's, with one difference in favour of the rivals: their inner problems are always solved to its tolerance.

Every run starts from random weights, and the figures of a setting are means over several. All settings are tried on a few
starts, the best ones of each rival on some more, and the best one of those is judged on starts that nothing was chosen by:
on 128 the rival that comes out best before, since a loss scatters by a sixth from start to start and a mean of 32 would
not tell 5 % from nothing, and on 32 the other one.
There each start is a pair: the loss of the one over the loss of the other, from the same weights. Settings that are equally
good differ by chance in every figure, so the claims are about the 95 % interval of the mean (geometric) ratio: that it
reaches down to 1 (the other is not better by more than chance) and that it ends below 1.05 (enough starts to say so).
"""

from __future__ import annotations

import statistics
import sys
import warnings
from argparse import ArgumentParser
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from math import exp, log
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from scipy import stats
from torch import Tensor

from benchmarks import common
from benchmarks.common import Claim, Row, experiment_parts, finish, parse, table
from benchmarks.kept import Kept
from bilevel import fit
from bilevel.errors import ConvergenceWarning
from bilevel.hypergradient import HypergradientMethod, Implicit
from bilevel.hypergradient.negative_curvature import Handled, NegativeCurvature, System
from bilevel.linalg import ConjugateGradient, LinearOperator, LinearSolver, NeumannSeries, damped
from bilevel.result import Solution

EXPERIMENT = "digits_mlp"
AUTO, CG, NEUMANN = "implicit_auto", "conjugate gradient", "Neumann series"
STEPS = {CG: (10, 20, 50, 100, 200), NEUMANN: (50, 200, 1000)}
ALPHAS = {CG: (0.0, 1e-5, 1e-4, 1e-3), NEUMANN: (1.0, 0.3)}
TRIED = range(10, 14)  # starts that every setting is tried on
FINALS, FINALISTS = range(14, 22), 3  # further starts for the best few settings of each rival
JUDGED = range(100, 228)  # starts that nothing was chosen by
FEWER = 32  # of them, for the rival that is not the better one
SHARE = 0.5  # of the products of the best setting
SOURCES = (Path(__file__), Path(common.__file__))  # besides the library and the configuration
MARGIN = 1.05  # ratio of two losses below which they count as the same


@dataclass(frozen=True)
class Damping(LinearSolver):
    """Another solver for `H + alpha I`, as iMAML and others damp."""

    solver: LinearSolver
    alpha: float

    def init(self, operator: LinearOperator) -> Any:
        """That of the solver, for the damped operator."""
        return self.solver.init(damped(operator, self.alpha) if self.alpha else operator)

    def transpose(self, state: Any) -> Any:
        """That of the solver."""
        return self.solver.transpose(state)

    def compute(self, state: Any, vector: Tensor, **options: Any) -> Solution:
        """That of the solver."""
        return self.solver.compute(state, vector, **options)


class Ignore(NegativeCurvature):
    """Negative curvature is not looked for: the answer is what the fixed number of steps leads to."""

    def handle(self, system: System, solution: Solution, negative: Tensor) -> Handled:
        """The solution as it is."""
        return Handled(solution)


@dataclass(frozen=True)
class Setting:
    """A rival with its numbers, or the experiment as it is.

    Attributes:
        method: `AUTO`, `CG` or `NEUMANN`.
        num_steps: K; None for `AUTO`.
        alpha: damping, or step size; None for `AUTO`.
    """

    method: str
    num_steps: int | None = None
    alpha: float | None = None

    def hypergradient(self, own: HypergradientMethod) -> HypergradientMethod:
        """What the outer loop is given; `own` is the experiment's."""
        if self.num_steps is None or self.alpha is None:
            return own
        solver: LinearSolver
        if self.method == CG:
            solver = Damping(ConjugateGradient(rtol=None, max_steps=self.num_steps), self.alpha)
        else:
            solver = NeumannSeries(rtol=None, max_steps=self.num_steps, step_size=self.alpha)
        return Implicit(linear_solver=solver, error_estimate=None, negative_curvature=Ignore())

    def __str__(self) -> str:
        return (
            self.method if self.num_steps is None else f"{self.method} (K = {self.num_steps}, alpha = {self.alpha:g})"
        )


@dataclass(frozen=True)
class Mean:
    """A setting's figures over its starts.

    Attributes:
        setting: what was run.
        runs: a row a start.
    """

    setting: Setting
    runs: tuple[Row, ...]

    def of(self, name: str) -> float:
        """The mean of a figure."""
        return statistics.fmean(run[name] for run in self.runs)

    @property
    def row(self) -> Row:
        """A line of the table; `+-` is the standard error of the mean validation loss."""
        losses = [run["validation loss"] for run in self.runs]
        return {
            "method": self.setting.method, "K": self.setting.num_steps, "alpha": self.setting.alpha,
            "starts": len(losses), "validation loss": statistics.fmean(losses),
            "+-": statistics.stdev(losses) / len(losses) ** 0.5 if len(losses) > 1 else None,
            "test loss": self.of("test loss"), "products": self.of("products"),
            "inner gradients": self.of("inner gradients"),
        }  # fmt: skip


def outer_run(task: tuple[Setting, int, tuple[str, ...]]) -> Row:
    """One run of the experiment, in a process of its own."""
    setting, seed, keys = task
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", ConvergenceWarning)
    parts = experiment_parts(EXPERIMENT, f"seed={seed}", *keys)
    run = fit(parts.problem, **{**parts.keywords, "hypergradient": setting.hypergradient(parts.hypergradient)})
    return {
        "method": setting.method, "K": setting.num_steps, "alpha": setting.alpha, "seed": seed,
        "validation loss": run.summary["best"]["outer_loss"], "test loss": run.history[-1]["metrics.test_loss"],
        "products": run.summary["work"]["products"], "inner gradients": run.summary["work"]["inner_gradients"],
    }  # fmt: skip


class Runs:
    """All runs that were made, a row each.

    Args:
        pool: makes them.
        keys: changes of the experiment, as on its command line.
        file: where finished runs are kept, and taken from (`Kept`); None for nowhere.

    Raises:
        UsageError: the file does not serve.
    """

    def __init__(self, pool: Executor, keys: tuple[str, ...] = (), file: Path | None = None) -> None:
        """Take what the file holds."""
        self.pool, self.keys = pool, keys
        self.kept = None if file is None else Kept(file, SOURCES, keys, self.remake)
        self.made = {(setting_of(row), row["seed"]): row for row in (self.kept.rows if self.kept else [])}

    def remake(self, rows: list[Row]) -> Iterable[tuple[Row, Row]]:
        """The first and the last run of each method, beside what they give now."""
        by_method: dict[str, list[Row]] = {}
        for row in rows:
            by_method.setdefault(row["method"], []).append(row)
        chosen = [row for same in by_method.values() for row in ([same[0], same[-1]] if len(same) > 1 else same)]
        print(f"the code has changed: making {len(chosen)} of {len(rows)} kept runs again", flush=True)
        tasks = [(setting_of(row), row["seed"], self.keys) for row in chosen]
        return zip(chosen, self.pool.map(outer_run, tasks), strict=True)

    @property
    def rows(self) -> list[Row]:
        """In the order in which they were made."""
        return list(self.made.values())

    def make(
        self, settings: Sequence[Setting], seeds: Iterable[int], title: str, starts: Iterable[int] = ()
    ) -> list[Mean]:
        """Run each setting from each start that it has not run from, and print its line.

        Args:
            settings: to run.
            seeds: of the starts.
            title: of the lines.
            starts: further ones that the means are over, which have been made before.

        Returns:
            The means, best first.
        """
        print(f"\n{title}", flush=True)
        seeds = list(seeds)
        tasks = [(one, seed, self.keys) for seed in seeds for one in settings if (one, seed) not in self.made]
        for number, row in enumerate(self.pool.map(outer_run, tasks), start=1):
            self.made[setting_of(row), row["seed"]] = row
            if self.kept is not None:
                self.kept.add(row)
            print(f"run {number} of {len(tasks)}", end="\r", file=sys.stderr, flush=True)
        means = [Mean(one, tuple(self.made[one, seed] for seed in (*starts, *seeds))) for one in settings]
        means.sort(key=lambda mean: (mean.setting.method != AUTO, mean.setting.method, mean.of("validation loss")))
        print(table([mean.row for mean in means]), flush=True)
        return means


def setting_of(row: Row) -> Setting:
    """Of a run."""
    return Setting(row["method"], row["K"], row["alpha"])


def best(means: Iterable[Mean], method: str, number: int) -> list[Setting]:
    """The settings of a method with the least validation loss."""
    return [mean.setting for mean in means if mean.setting.method == method][:number]


def tune(runs: Runs, grid: Sequence[Setting], starts: Sequence[Sequence[int]]) -> tuple[list[Mean], list[Mean]]:
    """Every setting on the first starts, the best few on the second, the best one on the third beside `AUTO`.

    Returns:
        The means of the first and of the last.
    """
    rivals = list(dict.fromkeys(setting.method for setting in grid))
    tried = runs.make(grid, starts[0], f"every setting, {len(starts[0])} starts")
    finalists = [setting for method in rivals for setting in best(tried, method, FINALISTS)]
    finals = runs.make(finalists, starts[1], f"the best of them, {len(starts[1])} starts more", starts[0])
    winners = [setting for method in rivals for setting in best(finals, method, 1)]
    losses = {mean.setting: mean.of("validation loss") for mean in finals}
    first = min(winners, key=losses.__getitem__)
    judged = runs.make([Setting(AUTO), first], starts[2], f"the best one beside {AUTO}, {len(starts[2])} other starts")
    others, fewer = [one for one in winners if one != first], starts[2][:FEWER]
    judged += runs.make(others, fewer, f"the best one of each other rival, {len(fewer)} of these starts")
    return tried, judged


@dataclass(frozen=True)
class Pairs:
    """Validation losses of two settings from the starts of the second, and the 95 % interval of their mean ratio.

    Attributes:
        one: the numerator.
        other: the denominator.
    """

    one: Mean
    other: Mean

    @property
    def interval(self) -> tuple[float, float, float]:
        """Geometric mean of the ratios and the ends of its interval, by Student's t for the mean of their logarithms.

        Raises:
            ValueError: the first did not run from all starts of the other, or there is only one.
        """
        losses = [{run["seed"]: run["validation loss"] for run in mean.runs} for mean in (self.one, self.other)]
        if not losses[1].keys() <= losses[0].keys() or len(losses[1]) < 2:
            raise ValueError(f"paired starts, two or more: got {sorted(losses[0])} and {sorted(losses[1])}")
        logs = [log(losses[0][seed] / losses[1][seed]) for seed in losses[1]]
        test = stats.ttest_1samp(logs, 0.0).confidence_interval(0.95)
        return exp(statistics.fmean(logs)), exp(test.low), exp(test.high)

    @property
    def row(self) -> Row:
        """A line of the table."""
        mean, low, high = self.interval
        return {
            "over": str(self.other.setting), "loss ratio": mean, "from": low, "to": high,
            "products ratio": self.one.of("products") / self.other.of("products"),
        }  # fmt: skip


def compare(judged: Sequence[Mean]) -> list[Row]:
    """`AUTO`, the first, over each of the others."""
    return [Pairs(judged[0], rival).row for rival in judged[1:]]


def claims_of(compared: Iterable[Row]) -> list[Claim]:
    """What is said of `AUTO`: as good a loss, with half of the products."""
    claims = []
    for row in compared:
        pair = f"{AUTO} over {row['over']}"
        claims += [
            Claim(f"{pair}: validation loss, lower end of the 95 % interval", row["from"], 1.0),
            Claim(f"{pair}: validation loss, upper end", row["to"], MARGIN),
            Claim(f"{pair}: products", row["products ratio"], SHARE),
        ]
    return claims


def draw(tried: Iterable[Mean], judged: Iterable[Mean], path: Path) -> None:
    """Validation loss against products: a point a setting; those that were judged with their standard errors."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    marks = {AUTO: ("*", 14, "tab:red"), CG: ("o", 6, "tab:blue"), NEUMANN: ("s", 6, "tab:gray")}
    for mean in tried:
        mark, size, color = marks[mean.setting.method]
        place = (mean.of("products"), mean.of("validation loss"))
        axes.plot(*place, mark, markersize=size, color=color, fillstyle="none")
        text = f"K={mean.setting.num_steps}, {mean.setting.alpha:g}"
        axes.annotate(text, place, xytext=(4, 3), textcoords="offset points", fontsize=6)
    for mean in judged:
        mark, size, color = marks[mean.setting.method]
        label = f"{mean.setting.method}, " + ("untuned" if mean.setting.method == AUTO else "its best setting")
        axes.errorbar(
            mean.of("products"), mean.of("validation loss"), yerr=mean.row["+-"],
            fmt=mark, markersize=size, color=color, capsize=3, label=f"{label}, other starts", zorder=3,
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="Hessian products of the whole run",
             ylabel="validation loss after the run (mean over starts)")  # fmt: skip
    axes.grid(visible=True, which="both", alpha=0.25)
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    """Sweep, average, compare."""
    words = ArgumentParser(add_help=False)
    words.add_argument(
        "--runs", type=Path, metavar="FILE", help="keep finished runs in FILE, and take those that it holds"
    )
    options = parse(str(__doc__).splitlines()[0], argv, device=False, parents=[words])
    grid = [Setting(method, *pair) for method in (CG, NEUMANN) for pair in product(STEPS[method], ALPHAS[method])]
    starts: tuple[Sequence[int], ...] = (TRIED, FINALS, JUDGED)
    keys: tuple[str, ...] = ()
    if options.quick:
        grid, starts = (
            [setting for setting in grid if setting.num_steps == STEPS[setting.method][0]],
            ((0,), (1,), (2, 3)),
        )
        keys = ("trainer.num_steps=2",)
    with ProcessPoolExecutor(1 if options.quick else 2, mp_context=get_context("spawn")) as pool:
        runs = Runs(pool, keys, options.runs)
        tried, judged = tune(runs, grid, starts)
    compared = compare(judged)
    print(f"\n{AUTO} over the best one of each, start by start\n{table(compared)}")
    if options.json is not None:
        draw(tried, judged, options.json.with_suffix(".png"))
    rows = [{"stage": stage, **mean.row} for stage, means in (("tried", tried), ("judged", judged)) for mean in means]
    return finish(options, rows, claims_of(compared), {"compared": compared, "runs": runs.rows})


if __name__ == "__main__":
    sys.exit(main())
