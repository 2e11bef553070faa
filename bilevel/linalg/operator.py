"""The contract of a linear operator: products, transpose, inner product and structure tags."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from enum import Enum
from functools import partial

import torch
from torch import Tensor


class Tag(Enum):
    """Structure that an operator is known to have; solvers ask for tags, never for classes."""

    symmetric = "symmetric"
    positive_definite = "positive definite"
    diagonal = "diagonal"


NO_TAGS: frozenset[Tag] = frozenset()
SYMMETRIC: frozenset[Tag] = frozenset({Tag.symmetric})
POSITIVE_DEFINITE: frozenset[Tag] = frozenset({Tag.symmetric, Tag.positive_definite})


class LinearOperator(ABC):
    """A batch of linear maps `A: R^n -> R^m`, known by their products.

    Attributes:
        shape: `(m, n)` of one system.
        batch_shape: shape of the batch of systems, `()` for a single one.
        dtype: dtype of vectors.
        device: device of vectors.
        tags: the structure it is known to have.

    Operators compose: `A + B`, `c * A` (`c` a number or a tensor of `batch_shape`), `A @ B`, `damped(A, c)`.
    """

    shape: tuple[int, int]
    batch_shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    tags: frozenset[Tag]

    @abstractmethod
    def mv(self, vector: Tensor) -> Tensor:
        """`A v`, `(*extra, *batch, n) -> (*extra, *batch, m)`: extra leading dimensions broadcast."""

    @abstractmethod
    def transpose(self) -> LinearOperator:
        """The operator whose product is `A^T v`."""

    def inner(self, u: Tensor, v: Tensor) -> Tensor:
        """Inner product of each system, `(*batch,)`; the only reduction over `n` that solvers use.

        A sharded operator sums it over its shards, and every solver then works on sharded vectors unchanged.
        """
        return torch.linalg.vecdot(u, v)

    def fuse(self, function: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Sequence[Tensor]]:
        """How a solver runs vector arithmetic, `function(inner, *tensors)`: as it is written; compiled operators compile it."""
        return partial(function, self.inner)

    def __add__(self, other: LinearOperator) -> LinearOperator:
        """The sum `A + B`."""
        from bilevel.linalg.composite import SumOperator

        return SumOperator(self, other)

    def __rmul__(self, factor: float | Tensor) -> LinearOperator:
        """The scaled operator `c A`."""
        from bilevel.linalg.composite import ScaledOperator

        return ScaledOperator(self, factor)

    def __matmul__(self, other: LinearOperator) -> LinearOperator:
        """The product `A B`."""
        from bilevel.linalg.composite import ProductOperator

        return ProductOperator(self, other)


def norm(operator: LinearOperator, vector: Tensor) -> Tensor:
    """Norm of each system's vector in the operator's inner product, `(*batch,)`; safe from underflow.

    The square of a small float32 vanishes below 1e-23, so where the plain product is that small the vector is scaled
    by a power of two first (the decision rests on `inner` alone, so that all shards decide alike).
    """
    square = operator.inner(vector, vector)
    info = torch.finfo(vector.dtype)
    if bool((square > info.tiny / info.eps).all()):
        return square.sqrt()
    scale = 2.0 ** (60 if vector.dtype == torch.float32 else 500)
    scaled = vector * scale
    careful = operator.inner(scaled, scaled).sqrt() / scale
    return torch.where(square > info.tiny / info.eps, square.sqrt(), careful)


def as_matrix(operator: LinearOperator) -> Tensor:
    """The operator as a dense tensor `(*batch, m, n)`, by `n` products made at once."""
    n = operator.shape[1]
    basis = torch.eye(n, dtype=operator.dtype, device=operator.device)
    basis = basis.reshape(n, *([1] * len(operator.batch_shape)), n).expand(n, *operator.batch_shape, n)
    columns = operator.mv(basis.contiguous())  # (n, *batch, m)
    return columns.movedim(0, -1)
