"""The error estimate of an implicit hypergradient against its true error, over problems, condition numbers and tolerances.

    python -m benchmarks.error_estimate              (writes benchmarks/results/error_estimate.png)
    python -m benchmarks.error_estimate --calibrate  (how the two constants of ErrorEstimator were fixed)

Every seed draws, for each decade of the condition number, one problem (ridge, logistic regression or a damped MLP in
turn; 20 to 200 parameters; one shared penalty, or one for each parameter; spectra that are log-uniform, a power law or
geometric, with the penalty as their floor) and an inner solver, stops the inner solve at two tolerances (relative to the
gradient at the start) and each linear solve at two, and compares the estimate with the error. The truth is the inner
problem solved to rounding by Newton's method with a dense Hessian, and a dense linear solve there. A problem counts for
the decade of the condition number of that Hessian. The penalty is the declared lower bound of the curvature: it is one
for ridge and logistic regression; for the MLP it need not be, and then the estimate is mostly not certified.

Constants were fixed on seeds 0-99 (`--calibrate`): of a small grid, the pair with the smallest worst median ratio whose
coverage is at least 0.97 in every decade. Seeds 100-299 are judged. Not judged, and counted: linear solves that end
without success and say so, inner solves that do not reach their tolerance, and stationary points that are no minima.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import statistics
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.common import Claim, Row, finish, parse, table
from benchmarks.conditioned import PROBLEMS, Regression, descend, truth_near, uniform
from bilevel.batches import StepBatches
from bilevel.flat import FlatProblem
from bilevel.hypergradient.error_estimate import ErrorEstimate, ErrorEstimator, Solved
from bilevel.hypergradient.outer import outer_gradients
from bilevel.linalg import ConjugateGradient, as_matrix
from bilevel.linalg.recycling import WatchedOperator
from bilevel.linearisation import Linearisation, linearise
from bilevel.solvers import LBFGS, GradientDescent, InnerSolver, NewtonCG, run
from bilevel.tree import TensorDict

DECADES = range(1, 7)
INNER = [10.0**-k for k in range(2, 9)]
LINEAR = [10.0**-k for k in range(1, 9)]
CALIBRATION, JUDGED, QUICK = range(0, 100), range(100, 300), range(100, 103)
TRUST, DOUBT = (1.25, 1.5, 2.0, 2.5, 3.0, 4.0), (0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
COVERAGE, RATIO, COST = 0.95, 10.0, 0.25
MARGIN = 0.02  # of coverage, when the constants are fixed
PICTURE = Path(__file__).parent / "results" / "error_estimate.png"


@dataclass(frozen=True)
class Cell:
    """One hypergradient: its error and its estimate.

    Attributes:
        problem: name.
        decade: of the condition number at the solution.
        many: one hyperparameter for each parameter.
        error: true; at least one rounding of the hypergradient.
        parts: the estimate by what was computed alone, and what a doubt of one adds to it (trust and doubt multiply these).
        estimate: with the estimator's own constants.
        num_mv: products of the linear solve.
    """

    problem: str
    decade: int
    many: bool
    error: float
    parts: tuple[float, float]
    estimate: ErrorEstimate
    num_mv: int

    @property
    def ratio(self) -> float:
        """Estimate over error."""
        return self.estimate.value / self.error

    def with_constants(self, trust: float, doubt: float) -> float:
        """Estimate over error, had the constants been these."""
        return (trust * self.parts[0] + doubt * self.parts[1]) / self.error


def solver_for(flat: FlatProblem, start: Tensor, hparams: TensorDict, draw: torch.Generator) -> InnerSolver:
    """L-BFGS, Newton-CG or gradient descent with momentum, with enough steps for most tolerances."""
    kind = int(torch.randint(3, (), generator=draw))
    if kind < 2:
        return LBFGS(max_steps=1000, atol=0.0) if kind == 0 else NewtonCG(max_steps=60, atol=0.0)
    top = float(torch.linalg.eigvalsh(as_matrix(linearise(flat, LBFGS(), start, hparams).operator))[-1])
    return GradientDescent(max_steps=1500, atol=0.0, learning_rate=0.5 / top, momentum=0.9)


def inner_points(
    flat: FlatProblem, solver: InnerSolver, start: Tensor, hparams: TensorDict, draw: torch.Generator
) -> Iterator[Tensor | None]:
    """Where the solver stands at two tolerances (gradient descent: of the three loosest); None where it did not get."""
    choice = 3 if isinstance(solver, GradientDescent) else len(INNER)
    first, second = sorted(torch.randperm(choice, generator=draw)[:2].tolist())
    params, state, left = start, None, solver.max_steps
    size = float(flat.objective(None).value_and_gradient(start, hparams)[1].norm())
    for index in (first, second):
        stopping = type(solver)(**{**vars(solver), "atol": INNER[index] * size})
        with torch.no_grad():
            found = run(stopping, flat.objective(None), params, hparams, state=state, max_steps=left)
        params, state, left = found.params, found.state, left - found.num_steps
        yield params if found.result.name == "converged" else None
        if left < 1:
            yield from [None] * (index == first)
            return


def estimates(
    flat: FlatProblem, at: Linearisation, rtol: float, calibrate: bool
) -> tuple[Tensor, int, list[ErrorEstimate]] | None:
    """The hypergradient, its products, and the estimates; None where the linear solve failed."""
    batches, problem = StepBatches(flat.problem, 0), flat.problem
    assert isinstance(problem, Regression)
    own = ErrorEstimator()
    watched = WatchedOperator(at.operator, own.memory)
    _, rhs, direct = outer_gradients(flat, at.params, at.hparams, batches)
    solution = ConjugateGradient(rtol=rtol, max_steps=3000).compute(watched, rhs)
    if not solution.successful:
        return None
    gradient = {"penalty": direct["penalty"] - at.mixed(solution.value)["penalty"]}
    solved = Solved(watched, rhs, solution.value, gradient)
    estimators = [own, *(ErrorEstimator(trust=1.0, doubt=doubt) for doubt in (0.0, 1.0) if calibrate)]
    found = [estimator.estimate(at, LBFGS(), batches, solved, problem.lower_curvature({})) for estimator in estimators]
    return gradient["penalty"].reshape(-1), int(solution.num_mv), found


def cells(seed: int, decade: int, calibrate: bool) -> Iterator[Cell | str]:
    """The cells of one problem; a word for each that is left out."""
    draw = torch.Generator().manual_seed(10 * seed + decade)
    name = list(PROBLEMS)[(seed + decade) % len(PROBLEMS)]
    size, kappa = (
        int(10 ** uniform(draw, math.log10(20), math.log10(200))),
        10 ** uniform(draw, decade + 0.3, decade + 1.3),
    )
    problem = PROBLEMS[name](size, kappa, draw)
    hparams = problem.init_hparams()
    flat = FlatProblem.of(problem, hparams)
    start = flat.start(hparams)
    if problem.warm:
        previous = {"penalty": 1.5 * hparams["penalty"]}
        with torch.no_grad():
            start = run(LBFGS(max_steps=200, atol=0.0), flat.objective(None), start, previous).params
        start = descend(flat, start, previous, 40)[0].params.detach()
    solver = solver_for(flat, start, hparams, draw)
    points = list(inner_points(flat, solver, start, hparams, draw))
    rtols = [torch.randperm(len(LINEAR), generator=draw)[:2].tolist() for _ in points]
    reached = [point for point in points if point is not None]
    if reached:
        truth = truth_near(flat, reached[-1], hparams)
        size_at_start = float(flat.objective(None).value_and_gradient(start, hparams)[1].norm())
        kappa = float(truth.eigenvalues[-1] / truth.eigenvalues[0])
    for point, indices in zip(points, rtols, strict=True):
        for index in indices:
            if point is None:
                yield f"inner tolerance not reached by {type(solver).__name__}"
            elif kappa <= 0 or truth.stationarity > 1e-11 * size_at_start:
                yield "no minimum found"
            elif not 10 <= kappa < 1e7:
                yield "condition number outside 1e1 .. 1e7"
            elif (found := estimates(flat, linearise(flat, LBFGS(), point, hparams), LINEAR[index], calibrate)) is None:
                yield "linear solve failed, and said so"
            else:
                gradient, num_mv, (own, *rest) = found
                computed, both = (estimate.value for estimate in rest) if calibrate else (math.nan, math.nan)
                rounding = torch.finfo(gradient.dtype).eps * float(truth.gradient.norm())
                error = max(float((gradient - truth.gradient).norm()), rounding)
                many = problem.penalty.ndim > 0
                yield Cell(name, int(math.log10(kappa)), many, error, (computed, both - computed), own, num_mv)


def of_seed(seed: int, calibrate: bool = False) -> list[Cell | str]:
    """All cells of a seed, in float64 on one thread."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    warnings.simplefilter("ignore")
    return [cell for decade in DECADES for cell in cells(seed, decade, calibrate)]


def gather(seeds: Sequence[int], calibrate: bool = False) -> tuple[list[Cell], Counter[str]]:
    """All cells of the seeds, on all cores; and how many were left out, by reason."""
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found: list[Cell | str] = []
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for number, part in enumerate(pool.map(of_seed, seeds, itertools.repeat(calibrate)), start=1):
            found += part
            if sys.stderr.isatty():
                print(f"\r{number} of {len(seeds)} seeds", end="", file=sys.stderr, flush=True)
    return [cell for cell in found if isinstance(cell, Cell)], Counter(cell for cell in found if isinstance(cell, str))


# --- judgement --------------------------------------------------------------------------------------------------------


def summary(what: str, kappa: str, some: Sequence[Cell]) -> Row:
    """A row of the table."""
    ratios = sorted(cell.ratio for cell in some)
    return {
        "problem": what,
        "condition": kappa,
        "cells": len(some),
        "covered": sum(ratio >= 1 for ratio in ratios) / len(some),
        "median ratio": statistics.median(ratios),
        "90 % ratio": ratios[int(0.9 * len(some))],
        "extra cost": sum(cell.estimate.num_mv for cell in some) / sum(cell.num_mv for cell in some),
        "certified": f"{sum(cell.estimate.certified for cell in some) / len(some):.0%}",
    }


def rows_of(found: Sequence[Cell]) -> list[Row]:
    """All problems by decade, then each problem, then few and many hyperparameters."""
    groups: list[tuple[str, str, list[Cell]]] = []
    for what in ("all", *PROBLEMS):
        for decade in DECADES:
            mine = [cell for cell in found if cell.decade == decade and what in ("all", cell.problem)]
            groups.append((what, f"1e{decade} .. 1e{decade + 1}", mine))
    groups += [
        (f"{'many' if many else 'one'}, all", "any", [c for c in found if c.many == many]) for many in (False, True)
    ]
    return [summary(*group) for group in groups if group[2]]


def claims_of(rows: Sequence[Row]) -> list[Claim]:
    """Three for each decade."""
    claims = []
    for row in rows:
        if row["problem"] == "all":
            where = f"condition {row['condition']}"
            claims.append(Claim(f"share of errors covered, {where}", row["covered"], COVERAGE, at_least=True))
            claims.append(Claim(f"median of estimate over error, {where}", row["median ratio"], RATIO))
            claims.append(Claim(f"extra cost over the solve's products, {where}", row["extra cost"], COST))
    return claims


def calibrate(found: Sequence[Cell]) -> int:
    """Print coverage and median ratio for each pair of constants, and the choice; worst decade each."""
    rows: list[Row] = []
    for trust, doubt in itertools.product(TRUST, DOUBT):
        worst, median = 1.0, 0.0
        for decade in DECADES:
            ratios = [cell.with_constants(trust, doubt) for cell in found if cell.decade == decade]
            worst = min(worst, sum(ratio >= 1 for ratio in ratios) / len(ratios))
            median = max(median, statistics.median(ratios))
        rows.append({"trust": trust, "doubt": doubt, "least covered": worst, "largest median ratio": median})
    print(table(rows))
    good = [row for row in rows if row["least covered"] >= COVERAGE + MARGIN]
    if good:
        best = min(good, key=lambda row: row["largest median ratio"])
        print(f"\nchosen: trust = {best['trust']}, doubt = {best['doubt']}")
    return 0 if good else 1


def plot(found: Sequence[Cell], path: Path) -> None:
    """Estimate against error, both logarithmic; one panel a problem, one colour for each pair of decades."""
    from matplotlib.figure import Figure

    from bilevel.report.style import LIGHT, Plate, Theme, blank, draw

    def paint(theme: Theme) -> Figure:
        figure, panels = blank(1, len(PROBLEMS), 3.0, sharex=True, sharey=True)
        for axes, name in zip(panels, PROBLEMS, strict=True):
            for index, colour in zip(range(3), theme.series, strict=False):
                mine = [c for c in found if c.problem == name and (c.decade - 1) // 2 == index]
                label = f"condition 1e{2 * index + 1} .. 1e{2 * index + 3}"
                xs, ys = [c.error for c in mine], [c.estimate.value for c in mine]
                axes.plot(xs, ys, ".", markersize=2, alpha=0.6, color=colour, label=label, rasterized=True)
            line = [1e-12, 1e12]
            axes.plot(line, line, color=theme.ink, linewidth=0.8)
            axes.plot(line, [10 * end for end in line], color=theme.ink, linewidth=0.8, linestyle=":")
            axes.set(xscale="log", yscale="log", xlabel="error", title=name, xlim=line, ylim=line)
            axes.set_xticks([1e-9, 1e-3, 1e3, 1e9])
        panels[0].set_ylabel("estimate")
        panels[-1].legend(loc="upper left", markerscale=4)
        return figure

    caption = "Solid: the error itself; dotted: ten times it."
    draw(Plate(path.stem, "Estimate of the hypergradient's error", caption, paint), LIGHT, path.parent)


def main(argv: list[str] | None = None) -> int:
    """Measure, print, judge."""
    arguments = sys.argv[1:] if argv is None else argv
    calibrating = "--calibrate" in arguments
    options: argparse.Namespace = parse(
        str(__doc__).splitlines()[0], [word for word in arguments if word != "--calibrate"], device=False
    )
    if calibrating:
        return calibrate(gather(CALIBRATION[:3] if options.quick else CALIBRATION, True)[0])
    found, left_out = gather(QUICK if options.quick else JUDGED)
    rows = rows_of(found)
    print(table(rows))
    for reason, number in left_out.items():
        print(f"left out: {reason}: {number}")
    if options.quick:
        return finish(options, rows, [])
    plot(found, PICTURE)
    return finish(options, rows, claims_of(rows), {"left out": dict(left_out)})


if __name__ == "__main__":
    sys.exit(main())
