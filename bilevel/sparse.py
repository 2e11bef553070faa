"""Sparse matrices of data, whose products can be differentiated as often as wanted and are never made dense."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bilevel.errors import UsageError


@dataclass(frozen=True)
class SparseMatrix:
    """A constant matrix `A (m, n)` of which few entries are not zero, and its products with dense matrices.

    The transpose is kept beside it: the derivative of `A W` needs products with `A^T`, and torch's own takes the matrix apart
    for each of them, nine times as long as a product with one that is there (and knows no `vmap`).

    Attributes:
        rows: the matrix, compressed by rows.
        columns: its transpose, likewise.

    Example:
        >>> from scipy.sparse import csr_array
        >>> matrix = SparseMatrix.of(csr_array([[0.0, 2.0, 0.0], [1.0, 0.0, 3.0]]), torch.float64)
        >>> matrix @ torch.eye(3, dtype=torch.float64)[:, 1:]
        tensor([[2., 0.],
                [0., 3.]], dtype=torch.float64)
        >>> matrix.mT.shape
        torch.Size([3, 2])
    """

    rows: Tensor
    columns: Tensor

    @classmethod
    def of(cls, matrix: Any, dtype: torch.dtype | None = None) -> SparseMatrix:
        """From a matrix of SciPy's, in whatever format.

        Args:
            matrix: `(m, n)`, finite.
            dtype: of the entries; None takes torch's default.

        Raises:
            UsageError: it is no sparse matrix of SciPy's, or it has entries that are not finite.
        """
        if not hasattr(matrix, "tocsr"):
            raise UsageError(f"SparseMatrix.of expected a sparse matrix of SciPy's, but got a {type(matrix).__name__}.")
        if not np.isfinite(matrix.tocsr().data).all():
            raise UsageError("SparseMatrix.of expected finite entries, but some are not.")
        return cls(_compressed(matrix, dtype), _compressed(matrix.T, dtype))

    def __deepcopy__(self, memo: Any) -> SparseMatrix:
        """Tensors of its own: torch does not copy sparse ones by itself."""
        return SparseMatrix(self.rows.clone(), self.columns.clone())

    @property
    def shape(self) -> torch.Size:
        """`(m, n)`."""
        return self.rows.shape

    @property
    def mT(self) -> SparseMatrix:
        """The transpose, without a copy."""
        return SparseMatrix(self.columns, self.rows)

    def select(self, columns: Tensor) -> SparseMatrix:
        """Some of the columns.

        Args:
            columns: their numbers, `(k,)`, each at most once.

        Example:
            >>> from scipy.sparse import csr_array
            >>> matrix = SparseMatrix.of(csr_array([[0.0, 2.0, 0.0], [1.0, 0.0, 3.0]]), torch.float64)
            >>> matrix.select(torch.tensor([2, 0])) @ torch.eye(2, dtype=torch.float64)
            tensor([[0., 0.],
                    [3., 1.]], dtype=torch.float64)
        """
        starts, sizes = self.columns.crow_indices(), self.columns.crow_indices().diff()[columns]
        ends = sizes.cumsum(0)
        crow = torch.cat([ends.new_zeros(1), ends]).to(starts.dtype)
        inside = torch.arange(int(crow[-1]), device=columns.device) - crow[:-1].long().repeat_interleave(sizes)
        entries = starts[columns].long().repeat_interleave(sizes) + inside
        parts = crow, self.columns.col_indices()[entries], self.columns.values()[entries]
        shape = (len(columns), self.shape[0])
        with warnings.catch_warnings():  # that it is in beta state
            warnings.simplefilter("ignore", UserWarning)
            transposed = torch.sparse_csr_tensor(*parts, size=shape, check_invariants=True)
            rows = torch.sparse_csc_tensor(*parts, size=shape[::-1], check_invariants=True).to_sparse_csr()
        return SparseMatrix(_with_short_indices(rows), transposed)

    def __matmul__(self, dense: Tensor) -> Tensor:
        """`A W`, `(n, k) -> (m, k)`; differentiable in `W`, in reverse mode as often as wanted, and under `vmap`.

        Raises:
            UsageError: the shapes do not fit.
        """
        if dense.ndim != 2 or len(dense) != self.shape[1]:
            raise UsageError(
                f"a sparse matrix {tuple(self.shape)} was expected to be multiplied with ({self.shape[1]}, k), but got "
                f"{tuple(dense.shape)}."
            )
        product: Tensor = _Product.apply(self, dense)
        return product


class _Product(torch.autograd.Function):
    """`A W`; its derivative is the same function with the transpose.

    Without a `jvp`: a forward derivative of a forward derivative would be zero in silence, as that of any such function is.
    """

    @staticmethod
    def forward(matrix: SparseMatrix, dense: Tensor) -> Tensor:
        """`A W`."""
        return matrix.rows @ dense.contiguous()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[SparseMatrix, Tensor], output: Tensor) -> None:
        """The matrix alone, since the product is linear."""
        ctx.matrix = inputs[0]

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[None, Tensor]:
        """`A^T G`."""
        return None, ctx.matrix.mT @ cotangent

    @staticmethod
    def vmap(info: Any, in_dims: tuple[None, int], matrix: SparseMatrix, dense: Tensor) -> tuple[Tensor, int]:
        """All dense matrices side by side: one product."""
        beside = dense.movedim(in_dims[1], -1)  # (n, k, B)
        return (matrix @ beside.flatten(1)).unflatten(1, beside.shape[1:]), 2


def _with_short_indices(matrix: Tensor) -> Tensor:
    """The same with indices of 32 bits."""
    crow, column = matrix.crow_indices().int(), matrix.col_indices().int()
    return torch.sparse_csr_tensor(crow, column, matrix.values(), size=matrix.shape, check_invariants=True)


def _compressed(matrix: Any, dtype: torch.dtype | None) -> Tensor:
    """By rows, with indices of 32 bits, which are what the processor's library takes."""
    csr = matrix.tocsr(copy=True)
    csr.sum_duplicates()  # which sorts them, too
    crow, column = (torch.from_numpy(part.astype(np.int32)) for part in (csr.indptr, csr.indices))
    values = torch.from_numpy(csr.data).to(dtype or torch.get_default_dtype())
    with warnings.catch_warnings():  # that it is in beta state
        warnings.simplefilter("ignore", UserWarning)
        return torch.sparse_csr_tensor(crow, column, values, size=csr.shape, check_invariants=True)
