"""What a solver says about its answer: a result for each system, in words, and the numbers behind it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import cached_property

import torch
from torch import Tensor


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
    singular = "the operator is singular to working precision: the derivative does not exist or is not unique"
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
    def from_code(cls, code: int | Tensor) -> Result:
        """The member with that code."""
        return list(cls)[int(code)]

    @property
    def successful(self) -> bool:
        """True when the answer is what was asked for (a spent budget is)."""
        return self in (Result.converged, Result.budget_spent, Result.least_squares)


class SolveError(RuntimeError):
    """A solve with `throw=True` failed; the message names the result and the figures, `solution` holds the rest."""

    def __init__(self, message: str, solution: Solution) -> None:
        """Keep the solution beside the sentence."""
        super().__init__(message)
        self.solution = solution


@dataclass(frozen=True)
class Solution:
    """The answer to a (batch of) linear system(s) and what it is worth.

    Attributes:
        value: the solution, shape `(*batch, n)`.
        result: codes of `Result`, one a system, shape `(*batch,)`.
        num_mv: matrix-vector products spent on each system (products with the transpose included), shape `(*batch,)`.
        residual_norm: norm of `b - A x` in the operator's inner product, same units as the right-hand side, `(*batch,)`.
        curvature_min: smallest Rayleigh quotient `p'Ap / p'p` that was seen, NaN where none was, `(*batch,)`.
        curvature_max: largest one, `(*batch,)`.
    """

    value: Tensor
    result: Tensor
    num_mv: Tensor
    residual_norm: Tensor
    curvature_min: Tensor
    curvature_max: Tensor

    @property
    def results(self) -> list[Result]:
        """The result of each system, in flattened order."""
        return [Result.from_code(code) for code in self.result.flatten().tolist()]

    @property
    def worst(self) -> Result:
        """The first unsuccessful result in the batch, else the first one."""
        results = self.results
        return next((result for result in results if not result.successful), results[0])

    @property
    def successful(self) -> bool:
        """True when every system got what was asked for."""
        return all(result.successful for result in self.results)

    def raise_if_failed(self, what: str) -> Solution:
        """Return self, or raise `SolveError` with a sentence about the systems that failed."""
        if self.successful:
            return self
        failed = [index for index, result in enumerate(self.results) if not result.successful]
        where = "" if self.result.ndim == 0 else f" in {len(failed)} of {self.result.numel()} systems"
        residual = self.residual_norm.flatten()[failed].max().item()
        products = int(self.num_mv.max())
        raise SolveError(
            f"{what} failed{where} after {products} products with residual norm {residual:.3g}: {self.worst.value}.",
            self,
        )


def full_codes(result: Result, batch_shape: torch.Size | tuple[int, ...], device: torch.device | None = None) -> Tensor:
    """A tensor of `batch_shape` that holds one result for every system."""
    return torch.full(tuple(batch_shape), result.code, dtype=torch.int64, device=device)
