"""What a solver says about its answer: a result for each system, in words, and the numbers behind it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.errors import NumericalError
from bilevel.outcome import Result

__all__ = ["Result", "Solution", "SolveError", "full_codes"]


class SolveError(NumericalError):
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
    method: str = ""

    def continued_by(self, again: Solution, mask: Tensor) -> Solution:
        """Another solution for the systems in the mask `(*batch,)`; products and curvatures of both count."""
        return Solution(
            value=torch.where(mask.unsqueeze(-1), again.value, self.value),
            result=torch.where(mask, again.result, self.result),
            num_mv=self.num_mv + torch.where(mask, again.num_mv, 0),
            residual_norm=torch.where(mask, again.residual_norm, self.residual_norm),
            curvature_min=torch.fmin(self.curvature_min, again.curvature_min),
            curvature_max=torch.fmax(self.curvature_max, again.curvature_max),
            method=", ".join(filter(None, (self.method, again.method))),
        )

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
