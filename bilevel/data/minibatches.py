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
