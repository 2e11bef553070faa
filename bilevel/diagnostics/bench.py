"""What the planner measures methods with, and a method with its price."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from bilevel.diagnostics.cost import Cost, Units
from bilevel.diagnostics.trials import InnerTrial, Site
from bilevel.hypergradient import HypergradientMethod, Implicit, find_paths
from bilevel.hypergradient.paths import EXPLANATIONS
from bilevel.solvers import InnerSolver

UNITS = "measured unit costs and counts"


@dataclass(frozen=True)
class Candidate:
    """A method with what it would cost, or why it is none.

    Attributes:
        name: for the table.
        method: what to pass as `hypergradient`.
        solver: the inner solver that it goes with.
        keys: what to write on the command line.
        cost: of the first hypergradient; None where it is refused.
        inner_seconds: of its inner solve, if that is the configured one; None otherwise.
        grows: whether its linear solves get longer and shorter in the course of a run, as the configured ones do.
        biased: why the number is not the hypergradient even when all solves are exact; empty when it is.
        short: why its solves do not come to their tolerance; empty when they do.
        further: whether its inner solver ends further from the solution than the configured one.
        refused: why it cannot be used here; empty when it can.
        unreached: hyperparameters that would get no gradient, each with the reason.
        source: what the cost rests on.
        counts: inner steps and products, in words.
        error: estimated relative error of the number, where the method's accuracy adapts; NaN elsewhere.
    """

    name: str
    method: HypergradientMethod
    solver: InnerSolver
    keys: str
    cost: Cost | None = None
    inner_seconds: float | None = None
    grows: bool = False
    biased: str = ""
    short: str = ""
    further: bool = False
    refused: str = ""
    unreached: dict[str, str] = field(default_factory=dict)
    source: str = UNITS
    counts: str = ""
    error: float = math.nan


@dataclass(frozen=True)
class Bench:
    """Everything that prices are made of.

    Attributes:
        site: where the problem is measured.
        units: unit costs.
        symmetric: whether products with the inner Jacobian are.
        own: the inner solve with the configured solver.
        recorded: one with a differentiable solver, the same where that is one.
        implicit: the configured method, or a plain implicit one in its place.
    """

    site: Site
    units: Units
    symmetric: bool
    own: InnerTrial
    recorded: InnerTrial
    implicit: Implicit


def reach(site: Site, method: HypergradientMethod, solver: InnerSolver) -> dict[str, str]:
    """The hyperparameters that get no gradient from a method, each with the reason."""
    covered = method.paths - ({"initial"} if method.warm_start else set())
    found = {}
    for name, paths in find_paths(site.flat, solver, site.hparams, site.batches).items():
        if not paths & covered:
            reasons = [EXPLANATIONS[path] for path in sorted(paths)]
            found[name] = reasons[0] if reasons else "it is used nowhere on the way to the outer loss"
    return found
