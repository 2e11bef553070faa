"""Minibatches as a pure function of the step: a resumed run draws the same ones, and nothing has to be stored."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.errors import UsageError
from bilevel.rng import generator


@dataclass(frozen=True)
class Minibatches:
    """Example indices for `(step, inner_step)`, drawn without replacement, so that a mean over them is unbiased.

    Args:
        num_examples: size of the data set.
        batch_size: examples in a batch.
        seed: of the draws.

    Example:
        >>> batches = Minibatches(num_examples=100, batch_size=4, seed=0)
        >>> bool((batches(3, 7) == batches(3, 7)).all()), len(batches(0, 0))
        (True, 4)
    """

    num_examples: int
    batch_size: int
    seed: int = 0

    def __post_init__(self) -> None:
        """Validate the sizes."""
        if not 1 <= self.batch_size <= self.num_examples:
            raise UsageError(
                f"batch_size must be between 1 and the number of examples ({self.num_examples}), but is {self.batch_size}."
            )

    def __call__(self, step: int, inner_step: int) -> Tensor:
        """Indices `(batch_size,)`."""
        return torch.randperm(self.num_examples, generator=generator(self.seed, step, inner_step))[: self.batch_size]


@dataclass(frozen=True)
class Partition:
    """Minibatches that are the same ones again and again, in an order drawn anew for each pass: what a table can remember.

    A draw of a batch is uniform over the parts, so that a mean over it is unbiased where all parts have the same size: the
    last `num_examples % batch_size` examples of the shuffled ones are in none.

    Args:
        num_examples: size of the data set.
        batch_size: examples in a batch.
        seed: of the parts and of their order.

    Example:
        >>> batches = Partition(num_examples=100, batch_size=25, seed=0)
        >>> batches.count, sorted(batches.number(step, 0) for step in range(4))
        (4, [0, 1, 2, 3])
        >>> bool((batches(5, 0) == batches.part(batches.number(5, 0))).all())
        True
    """

    num_examples: int
    batch_size: int
    seed: int = 0

    def __post_init__(self) -> None:
        """Validate the sizes."""
        Minibatches(self.num_examples, self.batch_size)

    @property
    def count(self) -> int:
        """Number of the parts."""
        return self.num_examples // self.batch_size

    def number(self, step: int, inner_step: int) -> int:
        """Which part it is: all of them in `count` steps, in an order of its own for each pass and inner step."""
        turn, place = divmod(step, self.count)
        return int(torch.randperm(self.count, generator=generator(self.seed, 1, turn, inner_step))[place])

    def part(self, number: int) -> Tensor:
        """Indices `(batch_size,)`."""
        order = torch.randperm(self.num_examples, generator=generator(self.seed, 0))
        return order[number * self.batch_size : (number + 1) * self.batch_size]

    def __call__(self, step: int, inner_step: int) -> Tensor:
        """Indices `(batch_size,)`."""
        return self.part(self.number(step, inner_step))
