"""The inverse of Kronecker-factored blocks and a diagonal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bilevel.linalg.operator import POSITIVE_DEFINITE, LinearOperator


@dataclass(frozen=True)
class KroneckerBlock:
    r"""Entries of the vector that form a matrix `V`, on which the inverse acts as `L ((L^T V R) / E) R^T`.

    Attributes:
        index: positions of the matrix's entries in the vector, `(p, q)`.
        left: `L`, `(*batch, p, p)`.
        right: `R`, `(*batch, q, q)`.
        values: `E`, above 0, `(*batch, p, q)`.
    """

    index: Tensor
    left: Tensor
    right: Tensor
    values: Tensor


class BlockKroneckerInverse(LinearOperator):
    r"""Block-diagonal: blocks that are Kronecker products in their own bases, and a diagonal for everything else.

    Args:
        like: an operator on the same vectors; its shape and its inner product are taken over.
        blocks: no two of them share an entry.
        diagonal: what the entries in no block are divided by, above 0, `(*batch, n)`.

    Example:
        >>> from bilevel.linalg import IdentityOperator
        >>> eye, index = torch.eye(2), torch.tensor([[0, 2], [1, 3]])
        >>> block = KroneckerBlock(index, eye, eye, torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        >>> BlockKroneckerInverse(IdentityOperator(5), [block], 5 * torch.ones(5)).mv(12 * torch.ones(5))
        tensor([12.0000,  4.0000,  6.0000,  3.0000,  2.4000])
    """

    def __init__(self, like: LinearOperator, blocks: Sequence[KroneckerBlock], diagonal: Tensor) -> None:
        """Put the entries in the order of the blocks, those of one shape side by side, and those in none of them last."""
        self.like, self.diagonal = like, diagonal
        self.shape, self.batch_shape = like.shape, like.batch_shape
        self.dtype, self.device, self.tags = like.dtype, like.device, POSITIVE_DEFINITE
        self.stacks = [_Stack.of(same) for same in _by_shape(blocks)]
        places = [block.index.flatten() for block in self.blocks]
        alone = torch.ones(like.shape[0], dtype=torch.bool, device=like.device)
        for place in places:
            alone[place] = False
        places.append(alone.nonzero().squeeze(-1))
        self.sizes = [*(stack.values.shape[-3:].numel() for stack in self.stacks), len(places[-1])]
        self.order = torch.cat(places)
        self.back = self.order.argsort()
        self.rest = diagonal[..., places[-1]]

    @property
    def blocks(self) -> tuple[KroneckerBlock, ...]:
        """The blocks, those of one shape side by side."""
        return tuple(block for stack in self.stacks for block in stack.blocks())

    def mv(self, vector: Tensor) -> Tensor:
        """The product: four small matrix products a block, those of blocks of one shape at once."""
        *parts, rest = vector.index_select(-1, self.order).split(self.sizes, -1)
        results = [stack.solve(part) for stack, part in zip(self.stacks, parts, strict=True)]
        return torch.cat([*results, rest / self.rest], -1).index_select(-1, self.back)

    def transpose(self) -> LinearOperator:
        """Itself."""
        return self

    def inner(self, u: Tensor, v: Tensor) -> Tensor:
        """The inner product that was taken over."""
        return self.like.inner(u, v)


class _Stack(NamedTuple):
    """Blocks of one shape, `(*batch, blocks, ., .)`: layers of equal widths are one batch of matrix products."""

    places: list[Tensor]
    left: Tensor
    right: Tensor
    values: Tensor

    @classmethod
    def of(cls, blocks: Sequence[KroneckerBlock]) -> _Stack:
        def stacked(values: Sequence[Tensor]) -> Tensor:
            return values[0].unsqueeze(-3) if len(values) == 1 else torch.stack(list(values), -3)  # one is not copied

        parts = zip(*((block.left, block.right, block.values) for block in blocks), strict=True)
        return cls([block.index for block in blocks], *map(stacked, parts))

    def blocks(self) -> list[KroneckerBlock]:
        parts = (part.unbind(-3) for part in (self.left, self.right, self.values))
        return [KroneckerBlock(*block) for block in zip(self.places, *parts, strict=True)]

    def solve(self, entries: Tensor) -> Tensor:
        """The inverse on the blocks' entries, `(..., blocks p q)`."""
        matrix = self.left.mT @ entries.unflatten(-1, self.values.shape[-3:]) @ self.right  # (..., blocks, p, q)
        return (self.left @ (matrix / self.values) @ self.right.mT).flatten(-3)


def _by_shape(blocks: Sequence[KroneckerBlock]) -> list[list[KroneckerBlock]]:
    groups: dict[torch.Size, list[KroneckerBlock]] = {}
    for block in blocks:
        groups.setdefault(block.index.shape, []).append(block)
    return list(groups.values())
