"""How a linear solve ended, in words; without torch, for whoever only reads records."""

from __future__ import annotations

from enum import Enum
from functools import cached_property
from typing import SupportsInt


class Result(Enum):
    """How a solve ended; the value is the sentence a user reads, `code` the number kept in tensors.

    Example:
        >>> Result.from_code(Result.stagnated.code) is Result.stagnated
        True
    """

    converged = "converged: the residual meets the tolerance, or cannot be made smaller in this precision"
    running = "the solve is still going on"
    budget_spent = "the budget of steps was spent, as asked for: no tolerance was set"
    max_steps = "the tolerance was not met within max_steps: allow more steps, precondition, or loosen the tolerance"
    stagnated = (
        "the residual stopped falling above the tolerance: the best iterate is returned; precondition, "
        "use float64, a larger restart, or a direct solver"
    )
    negative_curvature = (
        "the operator is not positive definite (p'Ap <= 0 was met): use MINRES or GMRES, add damping, "
        "or solve the inner problem further"
    )
    diverged = "the iteration diverges: the step is too large for this operator; leave it out to have it estimated"
    breakdown = "the recurrence broke down (a pivot vanished): use GMRES or a direct solver"
    singular = (
        "the operator is singular to working precision: the derivative does not exist, is not unique, or needs float64 "
        "or damping"
    )
    least_squares = (
        "the system has no exact solution; the least-squares solution is returned (its residual is orthogonal "
        "to the operator's range)"
    )
    nonfinite = "a non-finite value appeared: check the inputs, the inner solution and the precision"

    @cached_property
    def code(self) -> int:
        """Position in the enumeration; what tensors of results hold."""
        return list(Result).index(self)

    @classmethod
    def from_code(cls, code: SupportsInt) -> Result:
        """The member with that code."""
        return list(cls)[int(code)]

    @property
    def successful(self) -> bool:
        """True when the answer is what was asked for (a spent budget is)."""
        return self in (Result.converged, Result.budget_spent, Result.least_squares)

    @property
    def usable(self) -> bool:
        """False where the answer says nothing of the solution, and must not be applied."""
        return self not in (Result.diverged, Result.nonfinite)
