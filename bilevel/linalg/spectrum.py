"""Extreme eigenvalues of a symmetric operator by a few Lanczos steps."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bilevel.errors import UsageError
from bilevel.linalg.operator import LinearOperator, Tag
from bilevel.linalg.system import columns, divide
from bilevel.rng import generator, normal


class RitzValues(NamedTuple):
    """Extreme Ritz values: they lie inside the spectrum and tend to its ends from within.

    Attributes:
        smallest: at least the smallest eigenvalue, `(*batch,)`.
        largest: at most the largest eigenvalue, `(*batch,)`.
        num_mv: products spent (on each system).
    """

    smallest: Tensor
    largest: Tensor
    num_mv: int


def lanczos(operator: LinearOperator, num_steps: int = 20, seed: int = 0) -> RitzValues:
    """Lanczos with full reorthogonalisation from a seeded random start.

    Args:
        operator: symmetric, `(n, n)` with its batch.
        num_steps: products to spend, at most `n`; with `n` of them the values are the eigenvalues.
        seed: of the starting vector.

    Raises:
        UsageError: the operator is not tagged symmetric.

    Example:
        >>> from bilevel.linalg import DiagonalOperator
        >>> values = lanczos(DiagonalOperator(torch.tensor([1.0, 2.0, 5.0])), num_steps=3)
        >>> round(values.smallest.item(), 4), round(values.largest.item(), 4)
        (1.0, 5.0)
    """
    if Tag.symmetric not in operator.tags:
        raise UsageError(f"lanczos needs a symmetric operator, but this {type(operator).__name__} is not tagged so.")
    shape = (*operator.batch_shape, operator.shape[1])
    vector = normal(shape, generator(seed), dtype=operator.dtype, device=operator.device)
    vector = vector / columns(operator.inner(vector, vector).sqrt())
    basis, diagonal, off_diagonal = [vector], [], []
    for number in range(min(num_steps, operator.shape[1])):
        product = operator.mv(basis[-1])
        diagonal.append(operator.inner(basis[-1], product))
        for _ in range(2):  # twice is enough (Giraud et al., 2005)
            for previous in basis:
                product = product - columns(operator.inner(previous, product)) * previous
        length = operator.inner(product, product).sqrt()
        # An invariant subspace was found: the rest of the tridiagonal matrix decouples and must not be noise.
        scale = torch.stack(diagonal).abs().amax(0)
        length = torch.where(length <= 100 * torch.finfo(operator.dtype).eps * scale, 0.0, length)
        if number + 1 < min(num_steps, operator.shape[1]):
            off_diagonal.append(length)
            basis.append(product * columns(divide(torch.ones_like(length), length)))
    return _extremes(torch.stack(diagonal, -1), torch.stack(off_diagonal, -1) if off_diagonal else None)


def _extremes(diagonal: Tensor, off_diagonal: Tensor | None) -> RitzValues:
    """Extreme eigenvalues of the tridiagonal matrices, leaving out what lies behind a zero coupling."""
    num_mv = diagonal.shape[-1]
    matrix = torch.diag_embed(diagonal)
    if off_diagonal is not None:
        matrix = matrix + torch.diag_embed(off_diagonal, 1) + torch.diag_embed(off_diagonal, -1)
        dead = torch.cumsum((off_diagonal == 0).long(), -1) > 0
        first = diagonal[..., :1].expand_as(diagonal[..., 1:])
        replaced = torch.where(dead, first, diagonal[..., 1:])
        matrix = matrix - torch.diag_embed(diagonal) + torch.diag_embed(torch.cat([diagonal[..., :1], replaced], -1))
    broken = ~matrix.isfinite().all(-1).all(-1)  # a non-finite operator: the eigensolver would raise
    values = torch.linalg.eigvalsh(torch.where(broken[..., None, None], torch.zeros_like(matrix), matrix))
    values = torch.where(broken.unsqueeze(-1), torch.nan, values)
    return RitzValues(values[..., 0], values[..., -1], num_mv)
