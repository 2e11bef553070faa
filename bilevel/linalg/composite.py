"""Operators made of operators: sum, scaling, product, damping."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bilevel.errors import UsageError
from bilevel.linalg.matrix import IdentityOperator
from bilevel.linalg.operator import NO_TAGS, POSITIVE_DEFINITE, LinearOperator, Tag


class SumOperator(LinearOperator):
    """`A + B`: keeps the tags that both have."""

    def __init__(self, first: LinearOperator, second: LinearOperator) -> None:
        """Keep both; raise `UsageError` when the shapes differ."""
        if first.shape != second.shape:
            raise UsageError(f"operators of shapes {first.shape} and {second.shape} cannot be added.")
        self.first, self.second = first, second
        self.shape = first.shape
        self.batch_shape = tuple(torch.broadcast_shapes(first.batch_shape, second.batch_shape))
        self.dtype, self.device, self.tags = first.dtype, first.device, first.tags & second.tags

    def mv(self, vector: Tensor) -> Tensor:
        """`A v + B v`."""
        return self.first.mv(vector) + self.second.mv(vector)

    def transpose(self) -> LinearOperator:
        """`A^T + B^T`."""
        return self if Tag.symmetric in self.tags else SumOperator(self.first.transpose(), self.second.transpose())

    def inner(self, u: Tensor, v: Tensor) -> Tensor:
        """The first operator's inner product."""
        return self.first.inner(u, v)

    def fuse(self, function: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Sequence[Tensor]]:
        """As the first operator does."""
        return self.first.fuse(function)


class ScaledOperator(LinearOperator):
    """`c A` with a number or one factor for each system (shape `batch_shape`).

    Positive definiteness survives a positive number; of a tensor of factors it is not known, so the tag is dropped.
    """

    def __init__(self, operator: LinearOperator, factor: float | Tensor) -> None:
        """Keep both; see the class."""
        self.operator, self.factor = operator, factor
        self.shape, self.batch_shape = operator.shape, operator.batch_shape
        self.dtype, self.device = operator.dtype, operator.device
        keeps = not isinstance(factor, Tensor) and factor > 0
        self.tags = operator.tags if keeps else operator.tags - {Tag.positive_definite}

    def mv(self, vector: Tensor) -> Tensor:
        """`c A v`."""
        factor = self.factor.unsqueeze(-1) if isinstance(self.factor, Tensor) else self.factor
        return factor * self.operator.mv(vector)

    def transpose(self) -> LinearOperator:
        """`c A^T`."""
        return self if Tag.symmetric in self.tags else ScaledOperator(self.operator.transpose(), self.factor)

    def inner(self, u: Tensor, v: Tensor) -> Tensor:
        """The operator's inner product."""
        return self.operator.inner(u, v)


class ProductOperator(LinearOperator):
    """`A B`, with the tags that the caller vouches for (`A^T A` is symmetric, but a product in general is not)."""

    def __init__(self, left: LinearOperator, right: LinearOperator, tags: frozenset[Tag] = NO_TAGS) -> None:
        """Keep both; raise `UsageError` when the shapes do not chain."""
        if left.shape[1] != right.shape[0]:
            raise UsageError(f"operators of shapes {left.shape} and {right.shape} cannot be multiplied.")
        self.left, self.right = left, right
        self.shape = (left.shape[0], right.shape[1])
        self.batch_shape = tuple(torch.broadcast_shapes(left.batch_shape, right.batch_shape))
        self.dtype, self.device, self.tags = left.dtype, left.device, tags

    def mv(self, vector: Tensor) -> Tensor:
        """`A (B v)`."""
        return self.left.mv(self.right.mv(vector))

    def transpose(self) -> LinearOperator:
        """`B^T A^T`."""
        if Tag.symmetric in self.tags:
            return self
        return ProductOperator(self.right.transpose(), self.left.transpose(), self.tags)

    def inner(self, u: Tensor, v: Tensor) -> Tensor:
        """The right operator's inner product: that of the space the product acts on."""
        return self.right.inner(u, v)


class SharedOperator(LinearOperator):
    """One operator for many right-hand sides: its batch gets extra leading dimensions, its products are the same."""

    def __init__(self, operator: LinearOperator, extra: tuple[int, ...]) -> None:
        """Share `operator` over leading dimensions of sizes `extra`."""
        self.operator = operator
        self.shape, self.batch_shape = operator.shape, (*extra, *operator.batch_shape)
        self.dtype, self.device, self.tags = operator.dtype, operator.device, operator.tags

    def mv(self, vector: Tensor) -> Tensor:
        """`A v`; the operator broadcasts over leading dimensions itself."""
        return self.operator.mv(vector)

    def transpose(self) -> LinearOperator:
        """The transposed operator, shared alike."""
        extra = self.batch_shape[: len(self.batch_shape) - len(self.operator.batch_shape)]
        return self if Tag.symmetric in self.tags else SharedOperator(self.operator.transpose(), extra)

    def inner(self, u: Tensor, v: Tensor) -> Tensor:
        """The operator's inner product."""
        return self.operator.inner(u, v)

    def fuse(self, function: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Sequence[Tensor]]:
        """As the operator does."""
        return self.operator.fuse(function)


def damped(operator: LinearOperator, damping: float | Tensor) -> LinearOperator:
    """`A + c I` (Tikhonov damping), `c` a number or one for each system; its solution is biased towards zero.

    Example:
        >>> from bilevel.linalg import DiagonalOperator
        >>> damped(DiagonalOperator(torch.tensor([1.0, 2.0])), 0.5).mv(torch.ones(2))
        tensor([1.5000, 2.5000])

    Raises:
        UsageError: the operator is not square.
    """
    if operator.shape[0] != operator.shape[1]:
        raise UsageError(f"only a square operator can be damped, but this one has shape {operator.shape}.")
    identity = IdentityOperator(operator.shape[0], operator.batch_shape, operator.dtype, operator.device)
    total = SumOperator(operator, ScaledOperator(identity, damping))
    nonnegative = bool((damping >= 0).all()) if isinstance(damping, Tensor) else damping >= 0
    if nonnegative and operator.tags >= POSITIVE_DEFINITE:
        total.tags = total.tags | POSITIVE_DEFINITE
    return total
