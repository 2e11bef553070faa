"""The meta-gradient at full size: beside finite differences, beside tasks in a loop; the error of conjugate gradient.

    python -m benchmarks.meta_gradient          (writes benchmarks/results/meta_gradient.png)

5-way 1-shot on the Omniglot network of 64 filters, made smooth (softplus), in float64; images are noise around a prototype of
each class. The inner problems are solved to rounding level, so that the theorem has to agree with what it is a theorem about:
the outer loss of the problem solved anew beside a point, along the gradient and random directions of all 112,965 starting
weights. The error of k steps of conjugate gradient in the norm of the inner Hessian is set against the classical bound
`2 ((sqrt(kappa) - 1) / (sqrt(kappa) + 1))^k`, with kappa from Lanczos' extreme Ritz values, each task with its own.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.common import Claim, Row, finish, parse, relative_difference, table
from bilevel import hypergradient_at
from bilevel.batches import StepBatches
from bilevel.data import ClassEpisodes
from bilevel.flat import FlatProblem
from bilevel.hypergradient import Implicit
from bilevel.hypergradient.trial import starting_hparams
from bilevel.linalg import ConjugateGradient, HessianOperator
from bilevel.linalg.spectrum import lanczos
from bilevel.linearisation import linearise
from bilevel.meta import ProximalFewShot
from bilevel.models import Conv4
from bilevel.models.network import Params
from bilevel.rng import generator, normal
from bilevel.solvers import InnerResult, NewtonCG, run

PICTURE = Path(__file__).parent / "results" / "meta_gradient.png"
WAY, STRENGTH, STEP = 5, 8.0, 2e-5
SOLVER = NewtonCG(atol=1e-12, max_steps=300)
METHOD = Implicit(warm_start=False, linear_solver=ConjugateGradient(rtol=1e-12), error_estimate=None)


def images(num_examples: int, seed: int) -> Tensor:
    """Ten prototypes with noise, `(10, examples, 28, 28, 1)`."""
    draw = torch.Generator().manual_seed(seed)
    prototypes = torch.randint(0, 256, (10, 1, 28, 28, 1), generator=draw)
    noise = torch.randint(-40, 40, (10, num_examples, 28, 28, 1), generator=draw)
    return (prototypes + noise).clamp(0, 255).to(torch.uint8)


class Looped(Conv4):
    """The same network, written for one task, and in a way that vmap cannot take: tasks are evaluated in a loop."""

    handles_tasks = False

    def features(self, params: Params, inputs: Tensor) -> Tensor:
        """Those of the network, after a look at a number."""
        assert math.isfinite(inputs.sum().item())
        return super().features(params, inputs)


def problem_of(
    seed: int, num_filters: int, num_tasks: int, num_query: int, kind: type[Conv4] = Conv4
) -> ProximalFewShot:
    """Implicit MAML in float64."""
    source = ClassEpisodes(images(1 + num_query, seed), {"train": range(10)}, WAY, 1, num_query)
    network = kind(WAY, num_filters, activation="softplus")
    return ProximalFewShot(source, network, num_tasks=num_tasks, strength=STRENGTH, seed=seed).to(dtype=torch.float64)


def differences(
    problem: ProximalFewShot, gradient: Mapping[str, Tensor], params: Tensor, seed: int, number: int
) -> float:
    """Largest relative difference to finite differences, along the gradient and random directions.

    The inner problem has many minima; the theorem is about the one that was found, so solves start there.
    """
    start, batches = starting_hparams(problem), StepBatches(problem, 0)
    flat = FlatProblem.of(problem, start)
    directions = [gradient]
    directions += [
        {
            name: normal(tuple(value.shape), generator(seed, one, place), value.dtype)
            for place, (name, value) in enumerate(start.items())
        }
        for one in range(number)
    ]
    found = []
    for direction in directions:
        length = float(sum(part.square().sum() for part in direction.values())) ** 0.5
        unit = {name: part / length for name, part in direction.items()}

        def loss(step: float, unit: Mapping[str, Tensor] = unit) -> float:
            moved = {name: value + step * unit[name] for name, value in start.items()}
            with torch.no_grad():
                solution = run(SOLVER, flat.objective(batches.inner(0)), params, moved)
                assert solution.result is InnerResult.converged
                return float(flat.outer_loss(solution.params, moved, batches.outer).mean())

        coarse, fine = ((loss(step) - loss(-step)) / (2 * step) for step in (STEP, STEP / 2))
        slope = float(sum((gradient[name] * part).sum() for name, part in unit.items()))
        found.append(abs((4 * fine - coarse) / 3 - slope) / abs(slope))
        print(f"difference {(4 * fine - coarse) / 3:.10e}, hypergradient {slope:.10e}", flush=True)
    return largest(found)


def largest(values: Iterable[float]) -> float:
    """NaN if there is one, which `max` would lose."""
    return float(torch.tensor(list(values)).max())


def bound_and_errors(problem: ProximalFewShot, params: Tensor, steps: range) -> tuple[list[Tensor], list[Tensor]]:
    """For each number of steps the bound, and the A-norm of the error, both relative to the solution's; `(T,)`."""
    hparams = starting_hparams(problem)
    with torch.no_grad():
        flat = FlatProblem.of(problem, hparams)
    batches = StepBatches(problem, 0)
    at = linearise(flat, SOLVER, params, hparams, batches.curvature)
    leaf = params.detach().requires_grad_()
    (vector,) = torch.autograd.grad(flat.outer_loss(leaf, hparams, batches.outer).sum(), leaf)
    operator = at.operator
    assert isinstance(operator, HessianOperator)
    ends = lanczos(operator, num_steps=min(100, params.shape[-1]))
    root = (ends.largest / ends.smallest).sqrt()
    exact = solved(operator, vector, ConjugateGradient(rtol=1e-14, max_steps=2000))

    def size(error: Tensor) -> Tensor:
        return torch.linalg.vecdot(error, operator.mv(error)).clamp(min=0).sqrt()

    whole = size(exact)
    errors = [size(solved(operator, vector, ConjugateGradient(rtol=None, max_steps=k)) - exact) / whole for k in steps]
    return [2 * ((root - 1) / (root + 1)) ** k for k in steps], errors


def solved(operator: HessianOperator, vector: Tensor, solver: ConjugateGradient) -> Tensor:
    """The solution of the linear systems."""
    return solver.compute(solver.init(operator), vector).value


def plot(steps: range, bounds: list[Tensor], errors: list[Tensor], path: Path) -> None:
    """Errors of the tasks and their bounds against steps."""
    from matplotlib.figure import Figure

    from bilevel.report.style import LIGHT, Plate, Theme, blank, draw

    def paint(theme: Theme) -> Figure:
        figure, (axes,) = blank(1, 1, 3.0)
        for label, values, colour, style in (
            ("bound", bounds, theme.faint, "--"),
            ("conjugate gradient", errors, theme.series[0], "o-"),
        ):
            lines = axes.plot(list(steps), torch.stack(values), style, color=colour, markersize=3)
            lines[0].set_label(label)
        axes.set(yscale="log", xlabel="steps", ylabel="error in the A-norm, relative")
        axes.legend()
        return figure

    caption = "A line each task: the error of k steps of conjugate gradient in a meta-gradient, and its bound."
    draw(Plate(path.stem, "Conjugate gradient in a meta-gradient", caption, paint), LIGHT, path.parent)


def main(argv: list[str] | None = None) -> int:
    """Print the table and the claims."""
    options = parse(str(__doc__).splitlines()[0], argv, device=False)
    torch.set_default_dtype(torch.float64)
    filters, number, num_query, seeds = (4, 2, 1, range(1)) if options.quick else (64, 4, 15, range(3))
    steps = range(1, 6 if options.quick else 31)
    rows: list[Row] = []
    for seed in seeds:
        problem = problem_of(seed, filters, number, num_query)
        found = hypergradient_at(problem, method=METHOD, solver=SOLVER)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            looped = hypergradient_at(
                problem_of(seed, filters, number, num_query, Looped), method=METHOD, solver=SOLVER
            )
        assert any("one after the other" in str(one.message) for one in told)
        params = FlatProblem.of(problem, starting_hparams(problem)).layout.ravel(found.params, 1)
        bounds, errors = bound_and_errors(problem, params, steps)
        floor = 1e-12  # of rounding in the solution that errors are measured by
        rows.append(
            {
                "seed": seed,
                "inner stationarity": found.receipt.stationarity,
                "finite differences": differences(problem, found.gradient, params, seed, 1 if options.quick else 3),
                "loop": relative_difference(found.gradient, looped.gradient),
                "largest error over bound": largest(
                    float(((error - floor).clamp(min=0) / bound).max())
                    for error, bound in zip(errors, bounds, strict=True)
                ),
            }
        )
        print(table([rows[-1]]), flush=True)
    print()
    print(table(rows))
    if not options.quick:
        plot(steps, bounds, errors, PICTURE)
    claims = [
        Claim("difference to finite differences", largest(row["finite differences"] for row in rows), 1e-5),
        Claim("difference to tasks in a loop", largest(row["loop"] for row in rows), 1e-10),
        Claim(
            "error of conjugate gradient over its bound", largest(row["largest error over bound"] for row in rows), 1.0
        ),
    ]
    return finish(options, rows, [] if options.quick else claims)


if __name__ == "__main__":
    sys.exit(main())
