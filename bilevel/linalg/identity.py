"""The solver that does not solve: the inverse is replaced by a multiple of the identity, or by the preconditioner."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bilevel.errors import UsageError
from bilevel.linalg.operator import LinearOperator
from bilevel.linalg.solver import LinearSolver, check_vector
from bilevel.result import Result, Solution, full_codes


@dataclass(frozen=True)
class IdentitySolver(LinearSolver):
    r"""`A^-1 ≈ scale I`, or `scale M^-1` with a preconditioner: no product at all; the T1-T2 or first-order hypergradient.

    Biased: exact only where `A = I / scale` (or `A = M / scale`). With `scale` the inner learning rate it is the derivative
    of one inner gradient step from the solution; with a preconditioner, of one preconditioned step.

    Args:
        scale: the factor, above 0.

    Reference: Luketina et al. (2016), "Scalable gradient-based tuning of continuous regularization hyperparameters".
    """

    biased: ClassVar[bool] = True

    scale: float = 1.0

    def __post_init__(self) -> None:
        """Validate the scale."""
        if self.scale <= 0:
            raise UsageError(f"IdentitySolver needs scale > 0, but got {self.scale}.")

    def init(self, operator: LinearOperator) -> LinearOperator:
        """Check that the operator is square."""
        self.check(operator)
        return operator

    def transpose(self, state: LinearOperator) -> LinearOperator:
        """The transposed operator."""
        return state.transpose()

    def compute(
        self,
        state: LinearOperator,
        vector: Tensor,
        *,
        x0: Tensor | None = None,
        rtol: float | None = None,
        preconditioner: LinearOperator | None = None,
    ) -> Solution:
        """`scale * b` or `scale * M^-1 b`; the residual is not known without a product, and is NaN."""
        check_vector(state, vector)
        with torch.no_grad():
            value = vector if preconditioner is None else preconditioner.mv(vector)
        nan = torch.full(vector.shape[:-1], torch.nan, dtype=vector.dtype, device=vector.device)
        result = full_codes(Result.budget_spent, vector.shape[:-1], vector.device)
        return Solution(self.scale * value, result, torch.zeros_like(result), nan, nan, nan)
