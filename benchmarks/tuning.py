"""The experiment digits_mlp with nothing tuned beside its hand-tuned rivals, and a picture.

    python -m benchmarks.tuning            (about half an hour on two cores: the tuning is what takes it)

For the rivals the tuning is done here: conjugate gradient with a fixed number of steps K and a damping alpha added to the
Hessian, and the Neumann series with K terms and step size alpha, both from zero in every outer step, as iMAML and the
hyperparameter papers run them. Problem, inner solver, outer optimiser and the number of outer steps are the experiment's,
with one difference in favour of the rivals: their inner problems are always solved to its tolerance. The inner problem is
not convex, and small differences lead to other minima: every setting is judged by its mean over several starting weights.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import Claim, Row, finish, parse, table
from bilevel import Trainer, fit
from bilevel.errors import ConvergenceWarning
from bilevel.hypergradient import HypergradientMethod, Implicit
from bilevel.hypergradient.negative_curvature import Handled, NegativeCurvature, System
from bilevel.linalg import ConjugateGradient, LinearOperator, LinearSolver, NeumannSeries, damped
from bilevel.problems import DigitsMLP
from bilevel.result import Solution
from bilevel.solvers import LBFGS

AUTO, CG, NEUMANN = "implicit_auto", "conjugate gradient", "Neumann series"
STEPS = {CG: (10, 20, 50, 100, 200), NEUMANN: (50, 200, 1000)}
ALPHAS = {CG: (0.0, 1e-4, 1e-3, 1e-2), NEUMANN: (1.0, 0.3)}
SEEDS = (10, 11, 12, 13)  # of the starting weights; none of them was looked at while the method was made
SHARE = 0.5  # of the products of the best setting


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
    """A method with its numbers.

    Attributes:
        method: `AUTO`, `CG` or `NEUMANN`.
        num_steps: K.
        alpha: damping, or step size.
    """

    method: str
    num_steps: int | None = None
    alpha: float | None = None

    def hypergradient(self) -> HypergradientMethod:
        """What the outer loop is given."""
        if self.num_steps is None or self.alpha is None:
            return Implicit.auto()
        solver: LinearSolver
        if self.method == CG:
            solver = Damping(ConjugateGradient(rtol=None, max_steps=self.num_steps), self.alpha)
        else:
            solver = NeumannSeries(rtol=None, max_steps=self.num_steps, step_size=self.alpha)
        return Implicit(linear_solver=solver, error_estimate=None, negative_curvature=Ignore())


def outer_run(task: tuple[Setting, int, int]) -> Row:
    """One run of the experiment, in a process of its own."""
    setting, seed, num_outer = task
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    warnings.simplefilter("ignore", ConvergenceWarning)
    problem = DigitsMLP(seed=seed).to(dtype=torch.float64)
    run = fit(
        problem,
        solver=LBFGS(max_steps=4000, atol=3e-7),
        hypergradient=setting.hypergradient(),
        optimizer=partial(torch.optim.Adam, lr=0.1),
        trainer=Trainer(num_steps=num_outer),
    )
    losses = [record["outer_loss"] for record in run.history]
    products = [record["receipt.products"] for record in run.history]
    return {
        "method": setting.method, "K": setting.num_steps, "alpha": setting.alpha, "seed": seed,
        "validation loss": run.summary["best"]["outer_loss"], "products": run.summary["work"]["products"],
        "inner gradients": run.summary["work"]["inner_gradients"], "losses": losses, "products of steps": products,
    }  # fmt: skip


def mean(rows: Sequence[Row]) -> list[Row]:
    """One row a setting, figures averaged over the seeds; best first within a method."""
    settings = list(dict.fromkeys((row["method"], row["K"], row["alpha"]) for row in rows))
    found = []
    for setting in settings:
        same = [row for row in rows if (row["method"], row["K"], row["alpha"]) == setting]
        figures = {
            name: sum(row[name] for row in same) / len(same)
            for name in ("validation loss", "products", "inner gradients")
        }
        spread = [row["validation loss"] for row in same]
        found.append(
            {"method": setting[0], "K": setting[1], "alpha": setting[2], **figures,
             "least": min(spread), "largest": max(spread)}
        )  # fmt: skip
    return sorted(found, key=lambda row: (row["method"] != AUTO, row["method"], row["validation loss"]))


def draw(rows: Iterable[Row], path: Path) -> None:
    """Validation loss against products: a point a setting, the untuned run marked."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    marks = {AUTO: ("*", 260, "tab:red"), CG: ("o", 40, "tab:blue"), NEUMANN: ("s", 40, "tab:gray")}
    for method, (mark, size, color) in marks.items():
        own = [row for row in rows if row["method"] == method]
        axes.scatter(
            [row["products"] for row in own], [row["validation loss"] for row in own],
            marker=mark, s=size, color=color, label=method, zorder=3 if method == AUTO else 2,
        )  # fmt: skip
        if method != AUTO:
            for row in own:
                text = f"K={row['K']}, {row['alpha']:g}"
                place = (row["products"], row["validation loss"])
                axes.annotate(text, place, xytext=(4, 3), textcoords="offset points", fontsize=6)
    axes.set(xscale="log", yscale="log", xlabel="Hessian products of the whole run",
             ylabel="validation loss after the run (mean over starting weights)")  # fmt: skip
    axes.grid(visible=True, which="both", alpha=0.25)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    """Sweep, average, compare."""
    options = parse(str(__doc__).splitlines()[0], argv, device=False)
    settings = [Setting(AUTO)]
    for method in (CG, NEUMANN):
        pairs = list(product(STEPS[method], ALPHAS[method]))
        settings += [Setting(method, *pair) for pair in (pairs[:1] if options.quick else pairs)]
    seeds, num_outer = (SEEDS[:1], 2) if options.quick else (SEEDS, 20)
    tasks = [(setting, seed, num_outer) for setting in settings for seed in seeds]
    with ProcessPoolExecutor(1 if options.quick else 2, mp_context=get_context("spawn")) as pool:
        runs = []
        for number, row in enumerate(pool.map(outer_run, tasks), start=1):
            runs.append(row)
            print(f"run {number} of {len(tasks)}", end="\r", file=sys.stderr, flush=True)
    rows = mean(runs)
    print(table(rows))
    auto, *_ = rows
    claims = []
    for method in (CG, NEUMANN):
        best = next(row for row in rows if row["method"] == method)
        name = f"the best of {method} (K = {best['K']}, alpha = {best['alpha']:g})"
        claims += [
            Claim(
                f"validation loss of {AUTO} over that of {name}", auto["validation loss"] / best["validation loss"], 1.0
            ),
            Claim(f"products of {AUTO} over those of {name}", auto["products"] / best["products"], SHARE),
        ]
    if options.json is not None:
        draw(rows, options.json.with_suffix(".png"))
    return finish(options, rows, claims, {"runs": runs})


if __name__ == "__main__":
    sys.exit(main())
