"""Operators that hold their numbers: a dense matrix, a diagonal, the identity."""

from __future__ import annotations

import torch
from torch import Tensor

from bilevel.errors import UsageError
from bilevel.linalg.operator import NO_TAGS, POSITIVE_DEFINITE, SYMMETRIC, LinearOperator, Tag


class MatrixOperator(LinearOperator):
    """A dense matrix, or a batch of them.

    Args:
        matrix: shape `(*batch, m, n)`.
        tags: structure that the caller vouches for, for instance `SYMMETRIC`; nothing is inferred from the numbers.

    Example:
        >>> MatrixOperator(torch.tensor([[2.0, 0.0], [1.0, 1.0]])).mv(torch.tensor([1.0, 1.0]))
        tensor([2., 2.])
    """

    def __init__(self, matrix: Tensor, tags: frozenset[Tag] = NO_TAGS) -> None:
        """Keep the matrix; see the class."""
        if matrix.ndim < 2:
            raise UsageError(f"a matrix needs shape (*batch, m, n), but this tensor has shape {tuple(matrix.shape)}.")
        if tags and matrix.shape[-1] != matrix.shape[-2]:
            raise UsageError(f"only a square matrix can be symmetric, but this one is {tuple(matrix.shape[-2:])}.")
        self.matrix = matrix
        self.shape = (matrix.shape[-2], matrix.shape[-1])
        self.batch_shape = tuple(matrix.shape[:-2])
        self.dtype, self.device, self.tags = matrix.dtype, matrix.device, tags

    def mv(self, vector: Tensor) -> Tensor:
        """`A v`."""
        return (self.matrix @ vector.unsqueeze(-1)).squeeze(-1)

    def transpose(self) -> LinearOperator:
        """The transposed matrix; a symmetric one is its own transpose."""
        return self if Tag.symmetric in self.tags else MatrixOperator(self.matrix.mT)


class DiagonalOperator(LinearOperator):
    """A diagonal matrix, `(A v)_i = d_i v_i`.

    Args:
        diagonal: shape `(*batch, n)`.
        tags: `POSITIVE_DEFINITE` when the caller knows that every entry is positive.
    """

    def __init__(self, diagonal: Tensor, tags: frozenset[Tag] = SYMMETRIC) -> None:
        """Keep the diagonal; see the class."""
        self.diagonal = diagonal
        self.shape = (diagonal.shape[-1], diagonal.shape[-1])
        self.batch_shape = tuple(diagonal.shape[:-1])
        self.dtype, self.device = diagonal.dtype, diagonal.device
        self.tags = tags | {Tag.symmetric, Tag.diagonal}

    def mv(self, vector: Tensor) -> Tensor:
        """`d * v`."""
        return self.diagonal * vector

    def transpose(self) -> LinearOperator:
        """Itself."""
        return self


class IdentityOperator(LinearOperator):
    """The identity on `R^n`.

    Args:
        n: length of a vector.
        batch_shape: shape of the batch of systems.
        dtype: dtype of vectors.
        device: device of vectors.
    """

    def __init__(
        self,
        n: int,
        batch_shape: tuple[int, ...] = (),
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """Describe the space; see the class."""
        self.shape, self.batch_shape = (n, n), tuple(batch_shape)
        self.dtype, self.device = dtype or torch.get_default_dtype(), torch.device(device)
        self.tags = POSITIVE_DEFINITE | {Tag.diagonal}

    def mv(self, vector: Tensor) -> Tensor:
        """`v` itself."""
        return vector

    def transpose(self) -> LinearOperator:
        """Itself."""
        return self
