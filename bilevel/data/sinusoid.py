"""Regression of sine waves from a few points, the simplest family of few-shot tasks."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray

from bilevel.data.episodes import PARTS, Episode, Examples, TaskSource, numpy_dtype
from bilevel.errors import UsageError
from bilevel.rng import generator


class Sinusoid(TaskSource):
    r"""Tasks `y = a sin(x - p)` with amplitude `a` from [0.1, 5], phase `p` from [0, π] and points `x` from [-5, 5].

    Args:
        shot: support points.
        num_query: query points.

    Reference: Finn, Abbeel and Levine (2017), "Model-agnostic meta-learning for fast adaptation of deep networks".

    Example:
        >>> Sinusoid(shot=10).draw("train", 25, 0).support.inputs.shape
        torch.Size([25, 10, 1])
    """

    def __init__(self, shot: int = 10, num_query: int = 50) -> None:
        """Check the numbers."""
        for name, value in (("shot", shot), ("num_query", num_query)):
            if not isinstance(value, int) or value < 1:
                raise UsageError(f"data.{name} was expected to be an integer of at least 1, but is {value!r}.")
        self.shot, self.num_query = shot, num_query

    def draw(self, part: str, num_tasks: int, *seeds: int) -> Episode:
        """See `TaskSource.draw`."""
        self.check_part(part)
        source = generator(PARTS.index(part), *seeds)

        def uniform(low: float, high: float, *shape: int) -> NDArray[np.float64]:
            values: NDArray[np.float64] = torch.rand(shape, generator=source, dtype=torch.float64).numpy()
            return low + (high - low) * values

        amplitude, phase = uniform(0.1, 5.0, num_tasks, 1, 1), uniform(0.0, math.pi, num_tasks, 1, 1)
        x = uniform(-5.0, 5.0, num_tasks, self.shot + self.num_query, 1)
        y = amplitude * np.sin(x - phase)
        dtype, cut = numpy_dtype(), self.shot

        def part_of(points: slice) -> Examples:
            return Examples(*(torch.from_numpy(one[:, points].astype(dtype)) for one in (x, y)))

        return Episode(part_of(slice(cut)), part_of(slice(cut, None)))
