"""What a finished linear solve still knows: the span of the vectors it multiplied, on which other systems are free."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bilevel.linalg.operator import LinearOperator, Tag
from bilevel.linalg.system import columns


class WatchedOperator(LinearOperator):
    """An operator that remembers the products made with it.

    Args:
        operator: what is watched.
        memory: number of products to remember, the latest; those made at once (a dense solver's) are kept together.

    Attributes:
        num_mv: products made, remembered or not.

    Example:
        >>> from bilevel.linalg import DiagonalOperator
        >>> watched = WatchedOperator(DiagonalOperator(torch.tensor([1.0, 2.0])), memory=10)
        >>> watched.mv(torch.ones(2))
        tensor([1., 2.])
        >>> watched.num_mv, watched.remembered()[1].tolist()
        (1, [[1.0, 2.0]])
    """

    def __init__(self, operator: LinearOperator, memory: int) -> None:
        """Nothing is remembered yet."""
        self.operator, self.memory, self.num_mv = operator, memory, 0
        self.shape, self.batch_shape = operator.shape, operator.batch_shape
        self.dtype, self.device, self.tags = operator.dtype, operator.device, operator.tags
        self._blocks: deque[tuple[Tensor, Tensor]] = deque()
        self._size = 0

    def mv(self, vector: Tensor) -> Tensor:
        """`A v`, remembered."""
        product = self.operator.mv(vector)
        vectors, products = (part.detach().reshape(-1, *self.batch_shape, self.shape[1]) for part in (vector, product))
        self._blocks.append((vectors, products))
        self.num_mv, self._size = self.num_mv + len(vectors), self._size + len(vectors)
        while self._size > self.memory and len(self._blocks) > 1:
            self._size -= len(self._blocks.popleft()[0])
        return product

    def transpose(self) -> LinearOperator:
        """Itself if it is symmetric, else the transposed operator, whose products are not remembered."""
        return self if Tag.symmetric in self.tags else self.operator.transpose()

    def inner(self, u: Tensor, v: Tensor) -> Tensor:
        """The operator's inner product."""
        return self.operator.inner(u, v)

    def fuse(self, function: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Sequence[Tensor]]:
        """As the operator does."""
        return self.operator.fuse(function)

    def remembered(self) -> tuple[Tensor, Tensor]:
        """The vectors and their products, `(*batch, k, n)`."""
        if not self._blocks:
            none = torch.zeros(*self.batch_shape, 0, self.shape[1], dtype=self.dtype, device=self.device)
            return none, none
        vectors, products = (torch.cat(parts).movedim(0, -2) for parts in zip(*self._blocks, strict=True))
        return vectors, products


class Subspace:
    r"""A subspace on which the products with a symmetric operator are known, by a basis of conjugate vectors.

    The basis `u_i` begins with the Ritz vectors: orthonormal, `u_i' A u_j = 0`, and `u_i' A u_i` the Ritz values.
    Vectors that `extend` adds are of length one and conjugate to all others. On it `A x = f` is solved by projection,
    `x = Σ u_i (u_i'f) / (u_i' A u_i)`, which for a positive definite operator minimises the A-norm of the error, and the
    residual is orthogonal to the subspace. Directions in which the given vectors depend on each other to rounding are
    left out, and basis vectors that a system of the batch has no use for are zero.

    Args:
        vectors: `(*batch, k, n)`.
        products: `A v` of each, of the same shape.

    Attributes:
        vectors: the basis, `(*batch, j, n)`.
        products: `A u` of each.
        curvature: `u' A u` of each, `(*batch, j)`; 0 where the vector is zero.
        largest: largest size of a Ritz value, `(*batch,)`.

    References: Parlett (1998), "The symmetric eigenvalue problem"; Saad, Yeung, Erhel and Guyomarc'h (2000), "A deflated
    version of the conjugate gradient algorithm".

    Example:
        >>> space = Subspace(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([[2.0, 0.0], [2.0, 4.0]]))
        >>> space.solve(torch.tensor([2.0, 2.0]))[0]
        tensor([1.0000, 0.5000])
    """

    def __init__(self, vectors: Tensor, products: Tensor) -> None:
        """Orthonormalise, then diagonalise."""
        vectors, products = _orthonormal(vectors, products)
        projected = vectors @ products.mT
        values, rotation = torch.linalg.eigh(0.5 * (projected + projected.mT))
        size = values.abs()
        self.largest = size.amax(-1)
        self.vectors, self.products = rotation.mT @ vectors, rotation.mT @ products
        self.curvature = torch.where(size > torch.finfo(values.dtype).eps * columns(self.largest), values, 0.0)

    def solve(self, rhs: Tensor) -> tuple[Tensor, Tensor]:
        """The projected solution of `A x = f`, and the residual `f - A x`, each `(*batch, n)`."""
        solution, residual = torch.zeros_like(rhs), rhs
        for _ in range(2):  # once more, for what rounding has left
            weights = self.coordinates(residual) * _inverse(self.curvature)
            solution = solution + _combine(self.vectors, weights)
            residual = residual - _combine(self.products, weights)
        return solution, residual

    def coordinates(self, vector: Tensor) -> Tensor:
        """`u_i' v`, `(*batch, j)`."""
        return (self.vectors @ vector.unsqueeze(-1)).squeeze(-1)

    def product(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """`A` times the orthogonal projection of a vector, before any `extend`, and what the projection leaves over."""
        weights = self.coordinates(vector)
        return _combine(self.products, weights), vector - _combine(self.vectors, weights)

    @property
    def full(self) -> bool:
        """Whether nothing is outside, in some system."""
        return bool(((self.curvature != 0).sum(-1) >= self.vectors.shape[-1]).any())

    @property
    def smallest(self) -> Tensor:
        """Smallest size of a Ritz value, at least the smallest curvature if `A` is positive definite, `(*batch,)`.

        NaN where the products were not finite, as those of a series that has diverged.
        """
        scaled = self.vectors * columns(_inverse(self.curvature.abs()).sqrt())
        gram = scaled @ scaled.mT
        size = gram.diagonal(dim1=-2, dim2=-1).amax(-1)[..., None, None]  # LAPACK fails at what it cannot square
        largest = torch.linalg.eigvalsh(torch.where(size.isfinite() & (size > 0), gram / size, 0.0))[..., -1]
        return torch.where(size.isfinite()[..., 0, 0], 1.0 / (largest * size[..., 0, 0]), torch.nan)

    @property
    def definite(self) -> bool:
        """Whether no negative curvature was seen."""
        return not bool((self.curvature < 0).any())

    def extend(self, operator: LinearOperator, vector: Tensor) -> None:
        """Add a vector, made conjugate to the basis: one product."""
        direction = vector
        for _ in range(2):
            weights = (self.products @ direction.unsqueeze(-1)).squeeze(-1) * _inverse(self.curvature)
            direction = direction - _combine(self.vectors, weights)
        direction = direction * columns(_inverse(direction.norm(dim=-1)))
        product = operator.mv(direction)
        curvature = torch.linalg.vecdot(direction, product)
        curvature = torch.where(curvature.abs() > torch.finfo(vector.dtype).eps * self.largest, curvature, 0.0)
        self.vectors = torch.cat([self.vectors, direction.unsqueeze(-2)], -2)
        self.products = torch.cat([self.products, product.unsqueeze(-2)], -2)
        self.curvature = torch.cat([self.curvature, columns(curvature)], -1)


def _orthonormal(vectors: Tensor, products: Tensor) -> tuple[Tensor, Tensor]:
    """An orthonormal basis of the span by the eigenvectors of the Gram matrix, twice; dependent directions become zero.

    A direction is dropped where its share of the (normalised) vectors is below `eps^(3/8)`, one in 10^6 in float64: the
    rounding of its product, which dividing by the share enlarges, then stays near `eps^(5/8)` of the operator's norm.
    """
    size = vectors.norm(dim=-1, keepdim=True)
    finite = (size * products.norm(dim=-1, keepdim=True)).isfinite()  # a solver that diverges has left others, too
    size = torch.where(finite, _inverse(size), 0.0)
    vectors, products = (torch.where(finite, part, 0.0) * size for part in (vectors, products))
    for _ in range(2):
        values, rotation = torch.linalg.eigh(vectors @ vectors.mT)
        kept = values > torch.finfo(values.dtype).eps ** 0.75 * values[..., -1:]
        change = (rotation * torch.where(kept, _inverse(values.abs()).sqrt(), 0.0).unsqueeze(-2)).mT
        vectors, products = change @ vectors, change @ products
    most = max(1, int(kept.sum(-1).max()))  # the eigenvalues ascend: what was kept is at the end
    return vectors[..., -most:, :], products[..., -most:, :]


def _combine(rows: Tensor, weights: Tensor) -> Tensor:
    """`Σ_i w_i row_i`."""
    return (weights.unsqueeze(-2) @ rows).squeeze(-2)


def _inverse(values: Tensor) -> Tensor:
    """`1 / v`, and 0 where `v` is 0."""
    return torch.where(values == 0, 0.0, 1.0 / torch.where(values == 0, 1.0, values))
