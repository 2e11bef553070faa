"""What the planner tries on a problem: an inner solve, linear solves, a few recorded steps."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bilevel.batches import StepBatches
from bilevel.diagnostics.cost import Cost, Line, Recorded, Units
from bilevel.diagnostics.meter import peak_bytes, seconds_of
from bilevel.flat import FlatProblem
from bilevel.hypergradient import (
    Hypergradient,
    HypergradientMethod,
    Implicit,
    ImplicitUpdate,
    differentiate,
    start_method,
)
from bilevel.hypergradient.method import solve_inner
from bilevel.linalg import AutoSolver
from bilevel.linalg.iterative import IterativeSolver
from bilevel.result import Result
from bilevel.solvers import InnerResult, InnerSolver
from bilevel.solvers.loop import exhausted
from bilevel.tree import TensorDict

PROFILED_STEPS = 2  # inner steps beyond those that fill a solver's memory
PROFILED_PRODUCTS = 250  # more than an error estimate remembers
FEW, MANY = 2, 6  # recorded steps


@dataclass(frozen=True)
class Site:
    """Where a problem is measured.

    Attributes:
        flat: the problem between vectors.
        hparams: natural units.
        batches: of the first outer step.
        start: the starting point of the inner solve.
        allowance: seconds for each part that is measured.
    """

    flat: FlatProblem
    hparams: TensorDict
    batches: StepBatches
    start: Tensor
    allowance: float

    @property
    def device(self) -> torch.device:
        """Where the problem is."""
        return self.start.device

    def clock(self, function: Any) -> float:
        """Median seconds."""
        return seconds_of(function, self.device, allowance=self.allowance)


@dataclass(frozen=True)
class InnerTrial:
    """An inner solve from the starting point.

    Attributes:
        solver: the inner solver.
        params: where it ended.
        seconds: of the whole solve.
        num_steps: of the whole solve.
        num_gradients: of the whole solve.
        num_products: of the whole solve.
        num_made: the steps that were made; fewer than `num_steps` where the rest is extrapolated.
        stationarity: where it ended.
        result: how it ended.
        bytes: at the peak of its steps.
    """

    solver: InnerSolver
    params: Tensor
    seconds: float
    num_steps: int
    num_gradients: float
    num_products: float
    num_made: int
    stationarity: float
    result: InnerResult
    bytes: float

    @property
    def cost(self) -> Cost:
        """Time and memory."""
        return Cost(self.seconds, self.bytes)

    @property
    def converged(self) -> bool:
        """Whether to its tolerance, or as many steps as were asked for."""
        return self.result.successful

    @property
    def extrapolated(self) -> bool:
        """Whether the trial was cut short, and all the steps that the solver may make are counted."""
        return self.num_made < self.num_steps


def try_inner(site: Site, solver: InnerSolver) -> InnerTrial:
    """Solve the inner problem, in pieces that grow, until it is solved or the allowance is spent."""
    x, state, made, piece, part = site.start, None, 0, 1, None
    if solver.compile:  # once in a run, not in each solve
        with torch.no_grad():
            solve_inner(site.flat, solver, x, site.hparams, site.batches, max_steps=1)
    begun = time.perf_counter()
    with torch.no_grad():
        while made < solver.max_steps and (part is None or time.perf_counter() - begun < site.allowance):
            length = min(piece, solver.max_steps - made)
            part = solve_inner(
                site.flat, solver, x, site.hparams, site.batches, offset=made, state=state, max_steps=length
            )
            x, state, made, piece = part.params, part.state, made + part.num_steps, 2 * piece
            if part.result is not exhausted(solver):
                break
    assert part is not None
    seconds = time.perf_counter() - begun
    whole = made if part.result is not exhausted(solver) else solver.max_steps
    share = whole / made
    return InnerTrial(
        solver=solver,
        params=x,
        seconds=share * seconds,
        num_steps=whole,
        num_gradients=share * part.num_gradients,
        num_products=share * part.num_mv,
        num_made=made,
        stationarity=part.stationarity,
        result=part.result,
        bytes=_steps_bytes(site, solver),
    )


def _steps_bytes(site: Site, solver: InnerSolver) -> float:
    """The peak of the solver's steps, once the iterates that it keeps are as many as it ever keeps."""
    num_steps = min(PROFILED_STEPS + getattr(solver, "history", 0), solver.max_steps)
    short = replace(solver, max_steps=num_steps, atol=0.0, rtol=0.0)

    def steps() -> None:
        with torch.no_grad():
            solve_inner(site.flat, short, site.start, site.hparams, site.batches)

    return peak_bytes(steps, site.device)


@dataclass(frozen=True)
class LinearTrial:
    """An implicit hypergradient from the first inner solution: all but the inner solve.

    Attributes:
        products: of the linear solve, what prepares it, and the error estimate.
        product_seconds: of a product with its share of everything that is not fixed.
        made: the products that were made; fewer than `products` where the rest is extrapolated.
        bytes: at the peak, with `PROFILED_PRODUCTS` at most.
        residual: relative, at the end of the linear solve.
        solved: whether to its tolerance, as far as was seen.
        negative: whether negative curvature was met.
        error: the receipt's error estimate over the norm; NaN where there is none.
    """

    products: float
    product_seconds: float
    made: int
    bytes: float
    residual: float
    solved: bool
    negative: bool
    error: float = math.nan


def try_linear(
    site: Site, units: Units, solver: InnerSolver, params: Tensor, method: Implicit | ImplicitUpdate
) -> LinearTrial:
    """Make it with as many linear steps as the allowance has room for, and extrapolate the decrease of the residual.

    Args:
        site: where.
        units: unit costs, for what is fixed and for the number of steps.
        solver: the inner solver, which is told to be content with the point as it is.
        params: the inner solution.
        method: an implicit method with an iterative linear solver, or one that may choose one.

    Raises:
        UsageError: the parts of the method do not fit each other or the problem.
    """
    linear, content = method.linear_solver, replace(solver, max_steps=1, atol=math.inf, rtol=0.0)
    assert isinstance(linear, IterativeSolver | AutoSolver)
    flat = site.flat.beginning_at(params)
    state = start_method(method, flat, content, params, site.hparams)
    rtol = method.accuracy.linear_rtol(state) or linear.rtol
    limit = max(min(linear.max_steps, int(site.allowance / units.product)), 5)

    def hypergradient(max_steps: int) -> Hypergradient:
        short = replace(method, linear_solver=replace(linear, max_steps=max_steps))
        return differentiate(short, flat, content, params, site.hparams, site.batches, state)

    started = time.perf_counter()
    result = hypergradient(limit)
    receipt, norm = result.receipt, float(torch.cat([part.flatten() for part in result.gradient.values()]).norm())
    seconds = time.perf_counter() - started
    made = max(receipt.products, 1)
    products, solved = float(made), receipt.linear_result in ("converged", "budget_spent")
    if limit < linear.max_steps and receipt.linear_result == Result.max_steps.name and rtol:
        products, solved = _reach(made, receipt.linear_residual, rtol, linear.max_steps), True
    return LinearTrial(
        products=products,
        product_seconds=max(seconds - units.fixed, 0.0) / made,
        made=made,
        bytes=peak_bytes(partial(hypergradient, min(limit, PROFILED_PRODUCTS)), site.device),
        residual=receipt.linear_residual,
        solved=solved,
        negative=receipt.curvature_min < 0,
        error=receipt.error_estimate / norm if norm > 0 else math.nan,
    )


def _reach(made: int, residual: float, rtol: float, max_steps: int) -> float:
    """Products to the tolerance at the mean rate so far, at most those that the solver may make."""
    if not 0 < residual < 1:
        return float(max_steps)
    return min(made * math.log(rtol) / math.log(residual), float(max_steps))


def try_recorded(site: Site, method: HypergradientMethod, solver: InnerSolver) -> Recorded:
    """A method that records inner steps, with few of them and with some more.

    Raises:
        UsageError: the method refuses the problem or the solver.
    """

    def hypergradient(num_steps: int) -> Any:
        short = replace(solver, max_steps=num_steps, atol=0.0, rtol=0.0)
        state = start_method(method, site.flat, short, site.start, site.hparams)
        return differentiate(method, site.flat, short, site.start, site.hparams, site.batches, state)

    method.check(solver)
    hypergradient(1)  # the first call of a transform imports much
    low, high = (site.clock(partial(hypergradient, number)) for number in (FEW, MANY))
    small, large = (peak_bytes(partial(hypergradient, number), site.device) for number in (FEW, MANY))
    return Recorded(Line.through(FEW, low, MANY, high), Line.through(FEW, small, MANY, large))
