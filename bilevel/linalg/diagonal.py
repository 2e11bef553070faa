"""The direct solver for diagonal operators."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from bilevel.linalg.matrix import DiagonalOperator
from bilevel.linalg.operator import LinearOperator, Tag, norm
from bilevel.linalg.solver import LinearSolver, check_vector
from bilevel.result import Result, Solution


class _State(NamedTuple):
    operator: LinearOperator
    diagonal: Tensor  # (*batch, n)
    num_mv: int


@dataclass(frozen=True)
class DiagonalSolver(LinearSolver):
    """Division by the diagonal, which one product with ones shows; a zero on it is reported as `singular`.

    Example:
        >>> solver = DiagonalSolver()
        >>> solver.compute(solver.init(DiagonalOperator(torch.tensor([2.0, -4.0]))), torch.ones(2)).value
        tensor([ 0.5000, -0.2500])
    """

    sees_curvature: ClassVar[bool] = True
    requires: ClassVar[frozenset[Tag]] = frozenset({Tag.diagonal})
    instead: ClassVar[str] = "use AutoSolver, or tag it if it is diagonal."

    def init(self, operator: LinearOperator) -> _State:
        """The diagonal."""
        self.check(operator)
        if isinstance(operator, DiagonalOperator):
            return _State(operator, operator.diagonal, 0)
        shape = (*operator.batch_shape, operator.shape[1])
        with torch.no_grad():
            ones = torch.ones(shape, dtype=operator.dtype, device=operator.device)
            return _State(operator, operator.mv(ones), 1)

    def is_preconditioned(self, operator: LinearOperator) -> bool:
        """Never."""
        return False

    def transpose(self, state: _State) -> _State:
        """The same."""
        return state

    def compute(
        self,
        state: _State,
        vector: Tensor,
        *,
        x0: Tensor | None = None,
        rtol: float | None = None,
        preconditioner: LinearOperator | None = None,
    ) -> Solution:
        """Divide; starting point, tolerance and preconditioner have nothing to do here."""
        operator, diagonal = state.operator, state.diagonal
        check_vector(operator, vector)
        with torch.no_grad():
            # An entry with nothing to divide stays zero, whatever the diagonal is there.
            value = torch.where(vector == 0, 0.0, vector / diagonal)
            singular = ((diagonal == 0) & (vector != 0)).any(-1)
            value = torch.where(singular.unsqueeze(-1), 0.0, value)
            result = torch.where(singular, Result.singular.code, Result.converged.code)
            finite = value.isfinite().all(-1) & vector.isfinite().all(-1) & diagonal.isfinite().all(-1)
            result = torch.where(finite, result, Result.nonfinite.code)
            ends = diagonal.aminmax(dim=-1)
            low, high = (end.expand(vector.shape[:-1]) for end in ends)
            residual = norm(operator, vector - diagonal * value)
            return Solution(value, result, torch.full_like(result, state.num_mv), residual, low, high)
