"""The batches of an outer step, and what is done with a batch however it is nested."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from bilevel.errors import UsageError
from bilevel.problem import Batches, Problem


@dataclass(frozen=True)
class StepBatches:
    """The batches of one outer step, each a pure function of the step's number, so that nothing has to be stored.

    Attributes:
        problem: where they come from, and on whose device they are put.
        step: number of the outer step.
    """

    problem: Problem
    step: int

    @property
    def stochastic(self) -> bool:
        """Whether the inner problem has minibatches."""
        return self.problem.episodes is None and self.problem.inner_batches is not None

    def inner(self, inner_step: int) -> Any:
        """The batch of an inner step; None for the full batch, that of the episode where there is one."""
        if self.problem.episodes is not None:
            return self._episode[0]
        return self._drawn(self.problem.inner_batches, inner_step)

    @property
    def curvature(self) -> Any:
        """The one inner batch that all Hessian products of this step share: the operator must not change between them."""
        return self.inner(-1)

    @property
    def outer(self) -> Any:
        """The batch of the outer loss."""
        if self.problem.episodes is not None:
            return self._episode[1]
        return self._drawn(self.problem.outer_batches, 0)

    @cached_property
    def _episode(self) -> tuple[Any, Any]:
        assert self.problem.episodes is not None
        inner, outer = self.problem.episodes(self.step)
        return self.problem.place(inner), self.problem.place(outer)

    def _drawn(self, batches: Batches | None, inner_step: int) -> Any:
        return None if batches is None else self.problem.place(batches(self.step, inner_step))


def check_tasks(batch: Any, num_tasks: int, source: str) -> None:
    """Refuse a batch whose parts have no leading dimension of the tasks.

    Args:
        batch: nested dictionaries, lists and tuples of tensors.
        num_tasks: what the dimension has to be.
        source: the attribute of the problem that the batch comes from, for the message.

    Raises:
        UsageError: a part is no tensor, or of another length.
    """
    for name, part in named_parts(batch, source):
        if not isinstance(part, Tensor):
            came = f"is a {type(part).__name__}"
        elif part.ndim == 0 or part.shape[0] != num_tasks:
            came = f"has shape {tuple(part.shape)}"
        else:
            continue
        raise UsageError(
            f"{name} was expected to be a tensor with num_tasks={num_tasks} as its leading dimension, but {came}: "
            "stack the tasks' data along dimension 0."
        )


def take(batch: Any, tasks: int | slice) -> Any:
    """The part of a batch, nested dictionaries, lists and tuples of tensors, that belongs to some tasks.

    Example:
        >>> import torch
        >>> take({"x": torch.arange(6).view(3, 2)}, slice(1, 3))
        {'x': tensor([[2, 3],
                [4, 5]])}
    """
    if isinstance(batch, Mapping):
        return {key: take(part, tasks) for key, part in batch.items()}
    if isinstance(batch, list | tuple):
        parts = [take(part, tasks) for part in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return None if batch is None else batch[tasks]


def named_parts(batch: Any, name: str) -> Iterator[tuple[str, Any]]:
    """What a batch of nested dictionaries, lists and tuples consists of, each part with its place.

    Example:
        >>> [place for place, _ in named_parts({"x": (1, 2), "y": 3}, "batch")]
        ["batch['x'][0]", "batch['x'][1]", "batch['y']"]
    """
    if isinstance(batch, Mapping):
        for key, part in batch.items():
            yield from named_parts(part, f"{name}[{key!r}]")
    elif isinstance(batch, list | tuple):
        for index, part in enumerate(batch):
            yield from named_parts(part, f"{name}[{index}]")
    else:
        yield name, batch
