"""The inverse of a diagonal plus a low-rank matrix, and the orthonormal bases that it needs."""

from __future__ import annotations

import torch
from torch import Tensor

from bilevel.linalg.operator import POSITIVE_DEFINITE, LinearOperator


def gram(operator: LinearOperator, left: Tensor, right: Tensor) -> Tensor:
    """Inner products of two lists of vectors, `(k, *batch, n)` and `(l, *batch, n) -> (*batch, k, l)`, by `operator.inner`.

    Where the operator has the plain inner product it is one matrix product; else `l` calls of `inner`.
    """
    if type(operator).inner is LinearOperator.inner:
        return left.movedim(0, -2) @ right.movedim(0, -1)
    if len(right) == 0:
        return left.new_zeros(*left.shape[1:-1], len(left), 0)
    return torch.stack([operator.inner(left, vector).movedim(0, -1) for vector in right], -1)


def combine(vectors: Tensor, weights: Tensor) -> Tensor:
    """`Σ_i w_ij v_i`: vectors `(k, *batch, n)` and weights `(*batch, k, l)` to vectors `(l, *batch, n)`."""
    return (vectors.movedim(0, -1) @ weights).movedim(-1, 0)


def principal(operator: LinearOperator, vectors: Tensor) -> tuple[Tensor, Tensor]:
    r"""Left singular vectors and squared singular values of the matrix `V` with these columns, in ascending order.

    By the Gram matrix: `V^T V = W S W^T` and `U = V W S^{-1/2}`, made orthonormal once more because small singular values
    amplify rounding. Directions that are rounding alone come out as zero vectors with the value 0.

    Args:
        operator: whose inner product counts.
        vectors: `(k, *batch, n)`.

    Returns:
        `U`, `(k, *batch, n)`, and the diagonal of `S`, `(*batch, k)`.
    """
    if len(vectors) == 0:
        return vectors, vectors.new_zeros(*vectors.shape[1:-1], 0)
    squares, rotation = torch.linalg.eigh(_symmetrised(gram(operator, vectors, vectors)))
    level = len(vectors) * torch.finfo(vectors.dtype).eps
    live = squares > level * squares[..., -1:]
    squares = torch.where(live, squares, 0.0)
    inverse_root = torch.where(live, torch.where(live, squares, 1.0).rsqrt(), 0.0)
    basis = combine(vectors, rotation * inverse_root.unsqueeze(-2))
    again = _symmetrised(gram(operator, basis, basis)) + torch.diag_embed((~live).to(vectors.dtype))
    values, turn = torch.linalg.eigh(again)  # near 1: the nearest orthonormal basis keeps each vector in its place
    return combine(basis, (turn * values.clamp(min=level).rsqrt().unsqueeze(-2)) @ turn.mT), squares


def _symmetrised(matrix: Tensor) -> Tensor:
    return (matrix + matrix.mT) / 2


class InverseDiagonalPlusLowRank(LinearOperator):
    r"""`(D + F F^T)^{-1}` for a positive diagonal and a thin `F`; symmetric positive definite, also under rounding.

    With `D^{-1/2} F = U S^{1/2} W^T` it is `D^{-1/2} (I - U diag(s / (1 + s)) U^T) D^{-1/2}` (Woodbury in the basis where it
    is diagonal: no difference of large terms). Values of `s` beyond what the precision can tell from infinity are cut.

    Args:
        like: an operator on the same vectors; its shape and its inner product are taken over.
        diagonal: `D`, `(*batch, n)`, above 0.
        factor: the columns of `F`, `(k, *batch, n)`.

    Example:
        >>> from bilevel.linalg import IdentityOperator
        >>> inverse = InverseDiagonalPlusLowRank(IdentityOperator(2), torch.tensor([1.0, 2.0]), torch.tensor([[1.0, 0.0]]))
        >>> inverse.mv(torch.ones(2))
        tensor([0.5000, 0.5000])
    """

    def __init__(self, like: LinearOperator, diagonal: Tensor, factor: Tensor) -> None:
        """Find the basis; see the class."""
        self.like = like
        self.shape, self.batch_shape = like.shape, like.batch_shape
        self.dtype, self.device, self.tags = like.dtype, like.device, POSITIVE_DEFINITE
        self.root = diagonal.rsqrt()
        self.basis, squares = principal(like, self.root * factor)
        squares = squares.clamp(max=0.01 / torch.finfo(squares.dtype).eps)
        self.shrink = squares / (1.0 + squares)  # (*batch, k)

    def mv(self, vector: Tensor) -> Tensor:
        """`(D + F F^T)^{-1} v`; one sweep over the basis each way."""
        scaled = self.root * vector
        if len(self.basis) == 0:
            return self.root * scaled
        return self.root * (scaled - self._project(scaled))

    def _project(self, vector: Tensor) -> Tensor:
        """`U diag(s / (1 + s)) U^T v`."""
        if type(self.like).inner is LinearOperator.inner:
            rows = self.basis.movedim(0, -2)  # (*batch, k, n)
            weights = self.shrink * (rows @ vector.unsqueeze(-1)).squeeze(-1)
            return (weights.unsqueeze(-2) @ rows).squeeze(-2)
        basis = self.basis.reshape(len(self.basis), *[1] * (vector.ndim + 1 - self.basis.ndim), *self.basis.shape[1:])
        weights = self.like.inner(basis, vector)  # (k, *extra, *batch)
        weights = weights * self.shrink.movedim(-1, 0).reshape(basis.shape[:-1])
        return (weights.unsqueeze(-1) * basis).sum(0)

    def transpose(self) -> LinearOperator:
        """Itself."""
        return self

    def inner(self, u: Tensor, v: Tensor) -> Tensor:
        """The inner product that was taken over."""
        return self.like.inner(u, v)
