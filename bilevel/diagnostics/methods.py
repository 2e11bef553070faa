"""Every hypergradient method at the solution: its error, beside the theorem and beside finite differences, and its products."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from bilevel.diagnostics.finding import TITLES, Row
from bilevel.diagnostics.resolved import discrepancy
from bilevel.diagnostics.subject import Subject, relative
from bilevel.errors import NumericalError, UsageError
from bilevel.hypergradient import (
    SAMA,
    FiniteDifference,
    FixedAccuracy,
    ForwardMode,
    HypergradientMethod,
    Implicit,
    ImplicitUpdate,
    OneStep,
    Unrolled,
    differentiate,
    start_method,
)
from bilevel.linalg import (
    GMRES,
    LSMR,
    MINRES,
    AutoSolver,
    BiCGStab,
    ConjugateGradient,
    IdentitySolver,
    IterativeSolver,
    NeumannSeries,
    Tag,
)
from bilevel.solvers import GradientDescent, InnerSolver

MAX_PRODUCTS = 2000
MAX_RECORDED = 64  # inner steps
DIGITS = 10  # after which an error is rounding
ENDED = (None, "budget_spent", "converged")


class Point(NamedTuple):
    """What a method makes of the hypergradient for its products.

    Attributes:
        products: with the inner Hessian; the derivative of an inner step takes one for each vector.
        error: relative, to the theorem's number by an accurate solve.
        measured: largest relative error beside finite differences of the re-solved problem.
    """

    products: int
    error: float
    measured: float


class Trial(NamedTuple):
    """One hypergradient to make.

    Attributes:
        method: with its budget or its tolerance.
        solver: makes at most one step from the solution, or those that are recorded.
        recorded: inner steps that are pulled back, or pushed forward along each hyperparameter.
    """

    method: HypergradientMethod
    solver: InnerSolver
    recorded: int = 0


Maker = Callable[[Subject], Iterator[Trial]]


def every_method(subject: Subject) -> dict[str, list[Point]]:
    """For each option of `hypergradient=` that serves the problem, what it gives for more and more products."""
    found = {name: list(_points(subject, make(subject))) for name, make in METHODS.items()}
    return {name: points for name, points in found.items() if points}


def best_of(methods: Mapping[str, list[Point]]) -> Row:
    """A row of the table, which informs: which method comes nearest, and for how many products."""
    best = {name: best_point(points) for name, points in methods.items()}
    name = min(best, key=lambda one: (best[one].error, best[one].products))
    return Row(
        TITLES["methods"], f"{len(best)}; {name} is right to {best[name].error:.2g} for {best[name].products} products"
    )


def best_point(points: Sequence[Point]) -> Point:
    """The point of least error."""
    return min(points, key=lambda point: point.error)


def _points(subject: Subject, trials: Iterator[Trial]) -> Iterator[Point]:
    """Until a method refuses, fails, or has nothing more to gain."""
    start, exact = subject.refined.detach(), subject.exact
    flat = subject.flat.beginning_at(start)
    for method, solver, recorded in trials:
        subject.deadline.check("comparing the methods")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that a budget leaves a residual is what the picture shows
                method.check(solver)
                state = start_method(method, flat, solver, start, subject.hparams)
                made = differentiate(method, flat, solver, start, subject.hparams, subject.batches, state)
        except (UsageError, NumericalError):
            return
        gradient = subject.layout.ravel(made.gradient)
        error, receipt = relative(gradient, exact, subject.floor), made.receipt
        products = receipt.products + recorded
        if math.isfinite(error):
            yield Point(products, error, discrepancy(subject, subject.measured, gradient))
        if not error > 10.0**-DIGITS or receipt.linear_result not in ENDED or products >= MAX_PRODUCTS:
            return


def _content(subject: Subject) -> InnerSolver:
    """The configured inner solver, told to be content with the solution as it is."""
    return replace(subject.solver, max_steps=1, atol=math.inf, rtol=0.0)


def _recordable(subject: Subject) -> InnerSolver:
    """The configured inner solver if its steps can be recorded, else gradient descent at the inverse largest curvature."""
    if subject.solver.differentiable:
        return subject.solver
    curvature = float(subject.exact_solve[1].curvature_max.abs().max())
    return GradientDescent(learning_rate=1.0 / curvature) if 0 < curvature < math.inf else GradientDescent()


def _krylov(kind: type[IterativeSolver], symmetric: bool, subject: Subject) -> Iterator[Trial]:
    """Budgets that grow fourfold from one product on: all of a curve costs a third more than its last point."""
    if symmetric is not (Tag.symmetric in subject.at_refined.operator.tags):
        return
    budget = 1
    while budget <= MAX_PRODUCTS:
        options: dict[str, Any] = {"restart": budget} if kind is GMRES else {}
        solver = kind(rtol=None, max_steps=budget, **options)
        yield Trial(Implicit(linear_solver=solver, error_estimate=None), _content(subject))
        budget *= 4


def _auto(subject: Subject) -> Iterator[Trial]:
    """The automatic method at tolerances that fall, as in a first outer step: there is nothing to learn from yet."""
    for digits in (1, *range(2, DIGITS + 1, 2)):
        solver = AutoSolver(rtol=10.0**-digits)
        method = Implicit.auto(linear_solver=solver, error_estimate=None, accuracy=FixedAccuracy())
        yield Trial(method, _content(subject))


def _recorded(method: HypergradientMethod, directions: int, subject: Subject) -> Iterator[Trial]:
    """More and more inner steps from the solution on; with minibatches each would lead away from it."""
    if subject.batches.stochastic:
        return
    solver, num_steps = _recordable(subject), 1
    while num_steps <= MAX_RECORDED:
        yield Trial(method, replace(solver, max_steps=num_steps, atol=0.0, rtol=0.0), directions * num_steps)
        num_steps *= 4


def _unrolled(subject: Subject) -> Iterator[Trial]:
    return _recorded(Unrolled(checkpoint_every=8), 1, subject)


def _forward(subject: Subject) -> Iterator[Trial]:
    directions = subject.layout.size
    if directions * MAX_RECORDED <= MAX_PRODUCTS:
        yield from _recorded(ForwardMode(), directions, subject)


def _once(method: HypergradientMethod, records: bool, subject: Subject) -> Iterator[Trial]:
    """One number, whatever it is worth."""
    solver = replace(_recordable(subject), max_steps=1, atol=math.inf, rtol=0.0) if records else _content(subject)
    yield Trial(method, solver)


# By option of `hypergradient=`. The direct solvers are left out: they are what the errors are measured by.
METHODS: Mapping[str, Maker] = {
    "implicit_auto": _auto,
    "implicit_cg": partial(_krylov, ConjugateGradient, True),
    "implicit_minres": partial(_krylov, MINRES, True),
    "implicit_neumann": partial(_krylov, NeumannSeries, True),
    "implicit_gmres": partial(_krylov, GMRES, False),
    "implicit_bicgstab": partial(_krylov, BiCGStab, False),
    "implicit_lsmr": partial(_krylov, LSMR, False),
    "implicit_update": partial(_once, ImplicitUpdate(), True),
    "implicit_identity": partial(_once, Implicit(linear_solver=IdentitySolver(), error_estimate=None), False),
    "unrolled": _unrolled,
    "forward": _forward,
    "one_step": partial(_once, OneStep(), True),
    "finite_difference": partial(_once, FiniteDifference(), False),
    "sama": partial(_once, SAMA(), True),
}
