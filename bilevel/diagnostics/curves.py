"""Error of the hypergradient against products, for each linear solver that the inner problem allows: data of a picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bilevel.diagnostics.subject import Subject
from bilevel.errors import UsageError
from bilevel.hypergradient.method import outer_gradients
from bilevel.linalg import GMRES, MINRES, BiCGStab, ConjugateGradient, IterativeSolver, NeumannSeries, Tag

MAX_PRODUCTS = 2000

HESSIAN: Mapping[str, type[IterativeSolver]] = {"cg": ConjugateGradient, "minres": MINRES, "neumann": NeumannSeries}
JACOBIAN: Mapping[str, type[IterativeSolver]] = {"gmres": GMRES, "bicgstab": BiCGStab}


def error_curves(subject: Subject, max_products: int = MAX_PRODUCTS) -> dict[str, list[tuple[int, float]]]:
    """For each solver, pairs of products and relative error of the hypergradient at the refined solution.

    Budgets double from one product on, so that all of a curve costs twice its last point.
    """
    at, exact, layout = subject.at_refined, subject.exact, subject.layout
    _, by_params, direct = outer_gradients(subject.flat, at.params, subject.hparams, subject.batches)
    size = float(exact.norm())
    curves: dict[str, list[tuple[int, float]]] = {}
    for name, kind in (HESSIAN if Tag.symmetric in at.operator.tags else JACOBIAN).items():
        curve: list[tuple[int, float]] = []
        budget = 1
        while budget <= max_products:
            options: dict[str, Any] = {"restart": budget} if kind is GMRES else {}
            solver = kind(rtol=None, max_steps=budget, **options)
            try:
                solution = solver.compute(solver.transpose(solver.init(at.operator)), by_params)
            except UsageError:  # a solver that this operator does not serve
                break
            mixed = at.mixed(solution.value)
            gradient = layout.ravel({key: direct[key] - mixed[key] for key in direct})
            error = float((gradient - exact).norm()) / size if size > 0 else 0.0
            curve.append((int(solution.num_mv.max()), error))
            if not error > 1e-10 or not solution.successful:
                break
            budget *= 2
        if curve:
            curves[name] = curve
    return curves
