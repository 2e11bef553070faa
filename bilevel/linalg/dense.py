"""Direct solvers: the operator as a matrix, factorised once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from bilevel.errors import UsageError
from bilevel.linalg.matrix import MatrixOperator
from bilevel.linalg.operator import SYMMETRIC, LinearOperator, Tag, as_matrix, norm
from bilevel.linalg.solver import LinearSolver, check_vector
from bilevel.linalg.spectrum import lanczos
from bilevel.linalg.system import rounding_level, worthless_level
from bilevel.result import Result, Solution

SPECTRUM_SIZE = 1000  # unknowns up to which eigenvalues take less time than as many products
NUM_LANCZOS = 100  # steps for larger ones


class _State(NamedTuple):
    operator: LinearOperator
    matrix: Tensor  # (*batch, n, n)
    factor: tuple[Tensor, ...]
    defect: Tensor  # (*batch,) codes: running where the factorisation is sound
    spectrum: tuple[Tensor, Tensor]  # its ends, (*batch,) each; NaN where they are not known
    num_mv: int
    adjoint: bool


@dataclass(frozen=True)
class _DenseSolver(LinearSolver):
    """What both share: materialise by `n` products (none for a matrix), factorise, solve, measure the residual.

    Of a symmetric operator that is materialised the extreme eigenvalues are reported, too.

    Args:
        max_size: refuse larger operators, whose matrix would take `8 n²` bytes in float64.
    """

    sees_curvature: ClassVar[bool] = True

    max_size: int = 20_000

    def init(self, operator: LinearOperator) -> _State:
        """Materialise and factorise."""
        self.check(operator)
        n = operator.shape[0]
        if n > self.max_size:
            raise UsageError(
                f"{type(self).__name__} would build a dense {n} x {n} matrix (max_size is {self.max_size}): "
                f"use an iterative solver, or raise max_size."
            )
        with torch.no_grad():
            given = isinstance(operator, MatrixOperator)
            matrix = operator.matrix if isinstance(operator, MatrixOperator) else as_matrix(operator)
            factor, defect = self.factorise(matrix)
            finite = matrix.isfinite().all(-1).all(-1)
            defect = torch.where(finite, defect, Result.nonfinite.code)
            spectrum = (torch.full_like(defect, torch.nan, dtype=matrix.dtype),) * 2
            if (
                Tag.symmetric in operator.tags and not given and n > 0
            ):  # of a given matrix they cost more than the solve
                spectrum = extreme_eigenvalues(matrix)
        return _State(operator, matrix, factor, defect, spectrum, 0 if given else n, False)

    def is_preconditioned(self, operator: LinearOperator) -> bool:
        """Never."""
        return False

    def factorise(self, matrix: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """The factors, and a code of `Result` for each system."""
        raise AssertionError("abstract")

    def backsolve(self, state: _State, vector: Tensor) -> Tensor:
        """Solve with the factors."""
        raise AssertionError("abstract")

    def transpose(self, state: _State) -> _State:
        """The same factors, used the other way."""
        return state._replace(operator=state.operator.transpose(), matrix=state.matrix.mT, adjoint=not state.adjoint)

    def compute(
        self,
        state: _State,
        vector: Tensor,
        *,
        x0: Tensor | None = None,
        rtol: float | None = None,
        preconditioner: LinearOperator | None = None,
    ) -> Solution:
        """Back-substitute; starting point, tolerance and preconditioner have nothing to do here."""
        check_vector(state.operator, vector)
        with torch.no_grad():
            bad = state.defect != Result.running.code
            value = self.backsolve(state, vector)
            zero = (vector == 0).all(-1, keepdim=True)
            value = torch.where(zero | bad.unsqueeze(-1), 0.0, value)
            residual = _residual(state.matrix, value, vector)
            result = torch.where(bad, state.defect, Result.converged.code)
            # A residual that is not even small is the mark of a matrix whose pivots only rounding kept from vanishing.
            size = norm(state.operator, vector)
            level, worthless = (of(vector.shape[-1], vector.dtype) * size for of in (rounding_level, worthless_level))
            residual_norm = norm(state.operator, residual)
            # So is a solution so large that rounding its product with A could leave that much, unless it is exact.
            grown = torch.linalg.matrix_norm(state.matrix) * norm(state.operator, value)
            large = rounding_level(vector.shape[-1], vector.dtype) * grown > worthless
            singular = (residual_norm > worthless) | (large & (residual_norm > level))
            result = torch.where(~bad & singular, Result.singular.code, result)
            result = torch.where(value.isfinite().all(-1) & vector.isfinite().all(-1), result, Result.nonfinite.code)
            result = torch.where(zero.squeeze(-1), Result.converged.code, result)
            low, high = (end.expand(vector.shape[:-1]) for end in state.spectrum)
            num_mv = torch.full_like(result, state.num_mv)
            return Solution(value, result, num_mv, residual_norm, low, high)


def extreme_eigenvalues(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest eigenvalue of a symmetric matrix, or of a Krylov space if it is large; NaN if it is not finite."""
    if matrix.shape[-1] > SPECTRUM_SIZE:
        ritz = lanczos(MatrixOperator(matrix, SYMMETRIC), NUM_LANCZOS)
        return ritz.smallest, ritz.largest
    finite = matrix.isfinite().all(-1).all(-1)  # the eigensolver would raise
    values = torch.linalg.eigvalsh(torch.where(finite[..., None, None], 0.5 * (matrix + matrix.mT), 0.0))
    values = torch.where(finite.unsqueeze(-1), values, torch.nan)
    return values[..., 0], values[..., -1]


def _wide(tensor: Tensor) -> torch.dtype:
    """Float64, where the device has it."""
    return tensor.dtype if tensor.device.type == "mps" else torch.float64


def _residual(matrix: Tensor, value: Tensor, vector: Tensor) -> Tensor:
    """`b - A x`, computed in float64: what is left of float32 numbers that nearly cancel is rounding."""
    wide = _wide(vector)
    product = (matrix.to(wide) @ value.to(wide).unsqueeze(-1)).squeeze(-1)
    return (vector.to(wide) - product).to(vector.dtype)


def _vanishing(pivots: Tensor) -> Tensor:
    """True where the smallest pivot is zero to working precision beside the largest, `(*batch,)`."""
    eps = pivots.shape[-1] * torch.finfo(pivots.dtype).eps
    if pivots.shape[-1] == 0:
        return torch.zeros(pivots.shape[:-1], dtype=torch.bool, device=pivots.device)
    return pivots.amin(-1) <= eps * pivots.amax(-1)


class DenseCholesky(_DenseSolver):
    r"""Cholesky factorisation `A = L L^T` of a symmetric positive definite operator, `n` products and `n³/3` operations.

    An operator that is not positive definite is reported as `negative_curvature`, a singular one as `singular`.

    Args:
        max_size: refuse larger operators.

    Example:
        >>> solver = DenseCholesky()
        >>> state = solver.init(MatrixOperator(torch.tensor([[4.0, 2.0], [2.0, 3.0]]), SYMMETRIC))
        >>> solver.compute(state, torch.tensor([2.0, 3.0])).value
        tensor([0., 1.])
    """

    requires: ClassVar[frozenset[Tag]] = SYMMETRIC
    instead: ClassVar[str] = "use DenseLU, or tag it if it is symmetric."

    def factorise(self, matrix: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """`L`."""
        factor, info = torch.linalg.cholesky_ex(matrix)
        pivots = torch.diagonal(factor, dim1=-2, dim2=-1).square()
        defect = torch.where(info > 0, Result.negative_curvature.code, Result.running.code)
        return (factor,), torch.where((info == 0) & _vanishing(pivots), Result.singular.code, defect)

    def backsolve(self, state: _State, vector: Tensor) -> Tensor:
        """`L^-T L^-1 b`."""
        return torch.cholesky_solve(vector.unsqueeze(-1), state.factor[0]).squeeze(-1)


class DenseLU(_DenseSolver):
    r"""LU factorisation with partial pivoting of any square operator, `n` products and `2n³/3` operations.

    Args:
        max_size: refuse larger operators.

    Example:
        >>> solver = DenseLU()
        >>> solver.compute(solver.init(MatrixOperator(torch.tensor([[0.0, 1.0], [2.0, 0.0]]))), torch.ones(2)).value
        tensor([0.5000, 1.0000])
    """

    def factorise(self, matrix: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """`LU` and the pivots."""
        factor, pivots, info = torch.linalg.lu_factor_ex(matrix)
        diagonal = torch.diagonal(factor, dim1=-2, dim2=-1).abs()
        bad = (info > 0) | _vanishing(diagonal)
        return (factor, pivots), torch.where(bad, Result.singular.code, Result.running.code)

    def backsolve(self, state: _State, vector: Tensor) -> Tensor:
        """Two triangular solves."""
        factor, pivots = state.factor
        return torch.linalg.lu_solve(factor, pivots, vector.unsqueeze(-1), adjoint=state.adjoint).squeeze(-1)
