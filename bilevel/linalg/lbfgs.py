"""The inverse Hessian approximation of L-BFGS, from pairs of steps and changes of the gradient."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bilevel.linalg.lowrank import combine, gram
from bilevel.linalg.operator import POSITIVE_DEFINITE, LinearOperator
from bilevel.linalg.system import columns


class Room:
    """Rows of a growing list with spare ones behind them, shared by the lists that have grown from it.

    A list that ends where the room is filled to grows in place; one whose next row another list has taken is copied first.
    So lists are values, and a row costs a few rows instead of a copy of all.

    Args:
        rows: the beginning, `(m, *shape)`.
        capacity: number of rows there is room for.
    """

    def __init__(self, rows: Tensor, capacity: int) -> None:
        """Copy the beginning."""
        self.rows, self.filled = rows.new_empty(capacity, *rows.shape[1:]), len(rows)
        self.rows[: self.filled] = rows

    def append(self, row: Tensor) -> None:
        """Fill one more."""
        self.rows[self.filled] = row
        self.filled += 1


class Pairs(NamedTuple):
    """Curvature pairs, oldest first, with their inner products, which are made once for each new pair.

    Attributes:
        steps: `s`, differences of the point, `(m, *batch, n)`.
        changes: `y`, differences of the gradient, likewise.
        products: `s_i' y_j` for `i <= j`, `(*batch, m, m)`; what is below the diagonal does not count.
        lengths: `y_i' y_i`, `(*batch, m)`.
        rooms: where steps and changes lie, and the number of rows up to their ends; None where they lie alone.
    """

    steps: Tensor
    changes: Tensor
    products: Tensor
    lengths: Tensor
    rooms: tuple[Room, Room, int] | None = None

    @classmethod
    def none(cls, like: Tensor) -> Pairs:
        """No pair yet, for points `(*batch, n)`."""
        batch = like.shape[:-1]
        empty = like.new_zeros(0, *like.shape)
        return cls(empty, empty, like.new_zeros(*batch, 0, 0), like.new_zeros(*batch, 0))

    @classmethod
    def of(cls, operator: LinearOperator, steps: Tensor, changes: Tensor) -> Pairs:
        """Those of two lists, in an operator's inner product."""
        lengths = operator.inner(changes, changes).movedim(0, -1)
        return cls(steps, changes, gram(operator, steps, changes), lengths)

    def append(self, step: Tensor, change: Tensor, size: int) -> Pairs:
        """With one more, `(*batch, n)` each, and without the oldest where there would be more than `size`."""
        kept = slice(max(len(self.steps) + 1 - size, 0), None)
        first, second, end = self._room(kept, size)
        first.append(step)
        second.append(change)
        begin = end - len(self.steps[kept])
        steps, changes = first.rows[begin : end + 1], second.rows[begin : end + 1]
        column = (steps.movedim(0, -2) @ change.unsqueeze(-1)).squeeze(-1)  # the new row is below the diagonal
        products = torch.nn.functional.pad(self.products[..., kept, kept], (0, 0, 0, 1))
        products = torch.cat([products, column.unsqueeze(-1)], -1)
        length = torch.linalg.vecdot(change, change).unsqueeze(-1)
        lengths = torch.cat([self.lengths[..., kept], length], -1)
        return Pairs(steps, changes, products, lengths, (first, second, end + 1))

    def _room(self, kept: slice, size: int) -> tuple[Room, Room, int]:
        """Where one more can be filled in behind these."""
        if self.rooms is not None:
            room, _, end = self.rooms
            if room.filled == end < len(room.rows):
                return self.rooms
        capacity = size + size // 4 + 1
        first, second = (Room(rows[kept], capacity) for rows in (self.steps, self.changes))
        return first, second, first.filled


class InverseBFGS(LinearOperator):
    r"""The L-BFGS approximation of an inverse, made of pairs; symmetric positive definite.

    In compact form, so that a product is a few matrix products instead of `2 m` vector operations one after the other:

        `H = H_0 + [S  H_0 Y] [[R^{-T} (D + Y^T H_0 Y) R^{-1}, -R^{-T}], [-R^{-1}, 0]] [S  H_0 Y]^T`

    with `R` the upper triangle of `S^T Y` and `D` its diagonal. Computed as `(I - S R^{-T} Y^T) H_0 (I - Y R^{-1} S^T) +
    S R^{-T} D R^{-1} S^T`, which no rounding makes indefinite. Pairs with `s'y <= 0` act as if they were not there.

    Args:
        like: an operator on the same vectors; its shape and its inner product are taken over.
        pairs: `s` and `y` with their inner products.
        initial: `H_0`, symmetric positive definite; None starts from `s'y / y'y` of the newest pair times the identity.
        scale: multiple of the identity for systems without a pair, `(*batch,)`; one where it is None.

    Reference: Byrd, Nocedal and Schnabel (1994), "Representations of quasi-Newton matrices and their use in limited memory
        methods".

    Example:
        >>> from bilevel.linalg import IdentityOperator
        >>> step = torch.tensor([[1.0, 0.0]])
        >>> like = IdentityOperator(2)
        >>> InverseBFGS(like, Pairs.of(like, step, 4 * step)).mv(torch.tensor([4.0, 4.0]))
        tensor([1., 1.])
    """

    def __init__(
        self,
        like: LinearOperator,
        pairs: Pairs,
        initial: LinearOperator | None = None,
        scale: Tensor | None = None,
    ) -> None:
        """Make the small matrix; see the class."""
        self.like, self.initial, self.steps, self.changes = like, initial, pairs.steps, pairs.changes
        self.shape, self.batch_shape = like.shape, like.batch_shape
        self.dtype, self.device, self.tags = like.dtype, like.device, POSITIVE_DEFINITE
        curvature = torch.diagonal(pairs.products, dim1=-2, dim2=-1)
        good = curvature > torch.finfo(like.dtype).eps * pairs.lengths  # beyond rounding
        one = torch.ones(like.batch_shape, dtype=like.dtype, device=like.device)
        self.scale = _scale(curvature, pairs.lengths, good, one if scale is None else scale)
        # Pairs of length one: R is then as well conditioned as the pairs allow, and its diagonal is one.
        self.size = torch.where(good, torch.where(good, curvature, 1.0).rsqrt(), 0.0)  # (*batch, m)
        scaled = self.size.unsqueeze(-1) * pairs.products * self.size.unsqueeze(-2)
        self.upper = scaled.triu(1) + torch.eye(scaled.shape[-1], dtype=like.dtype, device=like.device)

    def mv(self, vector: Tensor) -> Tensor:
        """The product: four sweeps over the pairs and one product with `H_0`."""
        along = self._against(self.steps, vector)  # S^T v, (*extra, *batch, m)
        weights = self._solve(along, transposed=False)  # R^{-1} S^T v
        middle = self._start(vector - self._towards(self.changes, weights))
        # The second half is the first one's transpose, and the pairs' own part, D = I after the scaling.
        back = weights - self._against(self.changes, middle)
        return middle + self._towards(self.steps, self._solve(back, transposed=True))

    def _start(self, vector: Tensor) -> Tensor:
        return columns(self.scale) * vector if self.initial is None else self.initial.mv(vector)

    def _solve(self, weights: Tensor, transposed: bool) -> Tensor:
        matrix = self.upper.mT if transposed else self.upper
        return torch.linalg.solve_triangular(matrix, weights.unsqueeze(-1), upper=not transposed).squeeze(-1)

    def _against(self, vectors: Tensor, vector: Tensor) -> Tensor:
        """Inner products of the scaled list with a vector, `(*extra, *batch, m)`."""
        if vector.ndim == vectors.ndim - 1:
            return self.size * gram(self.like, vectors, vector.unsqueeze(0)).squeeze(-1)
        return torch.stack([self._against(vectors, one) for one in vector])

    def _towards(self, vectors: Tensor, weights: Tensor) -> Tensor:
        """The combination of the scaled list, `(*extra, *batch, n)`."""
        return combine(vectors, (self.size * weights).unsqueeze(-1)).squeeze(0)

    def transpose(self) -> LinearOperator:
        """Itself."""
        return self

    def inner(self, u: Tensor, v: Tensor) -> Tensor:
        """The inner product that was taken over."""
        return self.like.inner(u, v)


def _scale(curvature: Tensor, lengths: Tensor, good: Tensor, otherwise: Tensor) -> Tensor:
    """`s'y / y'y` of the newest good pair, `(*batch,)`."""
    if not good.shape[-1]:
        return otherwise
    newest = (good * torch.arange(1, good.shape[-1] + 1, device=good.device)).argmax(-1, keepdim=True)
    ratio = curvature.gather(-1, newest) / lengths.gather(-1, newest)
    return torch.where(good.any(-1), ratio.squeeze(-1), otherwise)
