"""The certificate of a hypergradient: a table of checks, what they found, and a verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from bilevel.diagnostics.checks import CHECKS, one_function
from bilevel.diagnostics.deadline import Deadline
from bilevel.diagnostics.finding import TITLES, Flaw, Limits, Row
from bilevel.diagnostics.methods import Point, best_of, every_method
from bilevel.diagnostics.subject import Subject
from bilevel.errors import UsageError, nearest
from bilevel.hypergradient import HypergradientMethod, Implicit, default_solver
from bilevel.hypergradient.trial import check_arguments
from bilevel.problem import Problem
from bilevel.solvers import InnerSolver

# What a flaw explains: rows that fail only for that reason say so instead of naming flaws of their own.
EVERYTHING = frozenset(
    {
        "finite",
        "repeatable",
        "symmetric",
        "spectrum",
        "smooth",
        "adjoint",
        "stationarity",
        "finite_differences",
        "method",
        "first_steps",
    }
)
CONSEQUENCES: Mapping[Flaw, frozenset[str]] = {
    Flaw.hidden_randomness: EVERYTHING,
    Flaw.fresh_minibatch: EVERYTHING,
    Flaw.changed_in_place: EVERYTHING,
    Flaw.nonfinite: EVERYTHING | {"optimality_and_loss"},
    Flaw.kink: EVERYTHING,
    Flaw.singular_hessian: frozenset(
        {"smooth", "adjoint", "stationarity", "finite_differences", "method", "first_steps"}
    ),
    Flaw.wrong_optimality: frozenset({"stationarity", "finite_differences", "method", "first_steps"}),
    Flaw.wrong_derivative: frozenset({"stationarity", "finite_differences", "method", "first_steps"}),
    Flaw.wrong_mixed_product: frozenset({"finite_differences"}),
}


class Verdict(Enum):
    """What a certificate says; the value begins its last line."""

    sound = "sound: every check passed"
    approximate = "approximate as declared: what was found is what was declared"
    fault = "fault: see what to do above"


@dataclass(frozen=True)
class Certificate:
    """The result of `check`.

    Attributes:
        rows: one a check.
        declared: findings that were expected, with their reasons.
        methods: for each method that serves the problem, its error for more and more products.
    """

    rows: tuple[Row, ...]
    declared: Mapping[str, str] = field(default_factory=dict)
    methods: Mapping[str, list[Point]] = field(default_factory=dict)

    @property
    def found(self) -> dict[Flaw, str]:
        """The flaws, each with its first place."""
        flaws: dict[Flaw, str] = {}
        for row in self.rows:
            for flaw, place in row.flaws:
                flaws.setdefault(flaw, place)
        return flaws

    @property
    def undeclared(self) -> list[Flaw]:
        """Flaws that nobody expected."""
        return [flaw for flaw in self.found if flaw.name not in self.declared]

    @property
    def absent(self) -> list[str]:
        """Declared flaws that were not found: the declaration is out of date."""
        return [name for name in self.declared if Flaw[name] not in self.found]

    @property
    def verdict(self) -> Verdict:
        """Sound, approximate as declared, or fault."""
        if self.undeclared or self.absent:
            return Verdict.fault
        return Verdict.approximate if self.declared else Verdict.sound

    @property
    def not_judged(self) -> list[str]:
        """Titles of the checks that a finding makes meaningless, so that nothing is known of what they look for."""
        return [row.check for row in self.rows if not row.judged]

    @property
    def sentence(self) -> str:
        """The verdict in words; a declaration covers what was found, not what could not be looked for."""
        if self.verdict is not Verdict.approximate:
            return self.verdict.value
        rest = (
            f"; not judged for that reason: {', '.join(self.not_judged)}" if self.not_judged else ", and nothing else"
        )
        return self.verdict.value + rest

    def as_json(self) -> dict[str, Any]:
        """For `certificate.json`."""
        return {
            "verdict": self.verdict.name,
            "sentence": self.sentence,
            "not judged": self.not_judged,
            "checks": [row.as_json() for row in self.rows],
            "declared": dict(self.declared),
            "undeclared": [flaw.name for flaw in self.undeclared],
            "declared but absent": self.absent,
            "methods": {name: [point._asdict() for point in points] for name, points in self.methods.items()},
        }


def check(
    problem: Problem,
    *,
    solver: InnerSolver | None = None,
    hypergradient: HypergradientMethod | None = None,
    hparams: Mapping[str, Any] | None = None,
    declared: Mapping[str, str] | None = None,
    tolerance: float = 1e-2,
    seed: int = 0,
    seconds: float | None = None,
) -> Certificate:
    r"""Certify the hypergradient of a problem, in float64 and at the problem's own solution.

    Looks whether the losses are functions (no draws, no changing buffers) and finite, whether products repeat and are
    symmetric, at the spectrum of the inner Hessian, at kinks, at the mixed product, at what the inner solve leaves, and
    compares the theorem's number with finite differences of the *re-solved* problem, and the configured method with both. An
    error is relative to the hypergradient, or to a thousandth of its terms where these cancel further. The method is
    certified at the tolerances that the solvers were given; where it adapts them, the errors of its first two steps are
    told. So is what every other method makes of the same solution, for more and more products.

    Args:
        problem: is copied; the copy is moved to float64.
        solver: the inner solver; L-BFGS by default, gradient descent for problems with minibatches.
        hypergradient: the method to certify; `Implicit.auto()` by default, as in `fit`.
        hparams: where, natural units; `init_hparams()` by default.
        declared: findings that are expected, by name, each with its reason; others fail, and so does one that is absent.
        tolerance: relative error of the hypergradient that passes.
        seed: of the random directions.
        seconds: when to give up; None for never.

    Raises:
        UsageError: the seconds are over; a declared name is no finding, the tolerance is not above 0, `hparams` are not those
            of the problem, or the parts do not fit each other.

    Example:
        >>> import torch
        >>> from bilevel import Problem, check
        >>> class Shrink(Problem):
        ...     def init_hparams(self):
        ...         return {"penalty": torch.tensor(3.0)}
        ...     def init_params(self, hparams):
        ...         return {"w": torch.zeros(1)}
        ...     def inner_loss(self, params, hparams, batch):
        ...         return (params["w"] - 2).square().sum() + hparams["penalty"] * params["w"].square().sum()
        ...     def outer_loss(self, params, hparams, batch):
        ...         return (params["w"] - 1).square().sum()
        >>> check(Shrink()).verdict.name
        'sound'
    """
    names = [flaw.name for flaw in Flaw]
    for name in declared or {}:
        if name not in names:
            hint = nearest(name, names, f"they are {', '.join(names)}.")
            raise UsageError(f"a declared finding was expected to be a known one, but is '{name}': {hint}")
    if not 0 < tolerance < math.inf:
        raise UsageError(f"check needs a tolerance above 0, a relative error such as 0.01, but got {tolerance!r}.")
    solver = default_solver(problem) if solver is None else solver
    method = Implicit.auto() if hypergradient is None else hypergradient
    check_arguments(problem, solver, method)
    subject = Subject.of(problem, solver, method, hparams, seed, Deadline(seconds))
    rows, limits = [], Limits(tolerance)
    rows.append(one_function(subject, limits))  # outside the solve, inside of which nothing would be seen
    with subject.flat.purity.solve():
        rows += _run(subject, limits, rows[0])
        explained = {name: flaw for row in rows for name, flaw in _consequences(row).items()}
        if explained:
            rows.append(_not_judged("methods", next(iter(explained.values()))))
            return Certificate(tuple(rows), dict(declared or {}))
        methods = every_method(subject)
    last = best_of(methods) if methods else Row(TITLES["methods"], "the hypergradient is zero: no relative errors")
    return Certificate((*rows, last), dict(declared or {}), methods)


def _run(subject: Subject, limits: Limits, first: Row) -> list[Row]:
    """The checks in order; a check that an earlier flaw makes meaningless is not judged."""
    rows: list[Row] = []
    explained = _consequences(first)
    for one in CHECKS:
        if one.__name__ in explained:
            rows.append(_not_judged(one.__name__, explained[one.__name__]))
            continue
        row = one(subject, limits)
        rows.append(row)
        explained = {**_consequences(row), **explained}
    return rows


def _consequences(row: Row) -> dict[str, Flaw]:
    """The checks that a row's flaws make meaningless, each with its flaw."""
    return {name: flaw for flaw, _ in row.flaws for name in CONSEQUENCES.get(flaw, ())}


def _not_judged(check: str, flaw: Flaw) -> Row:
    return Row(TITLES[check], f"not judged: {flaw.name}", judged=False)
