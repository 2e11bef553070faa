"""Whatever random numbers come from, each with a way to read its state and to write it back."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Source:
    """A generator of random numbers.

    Attributes:
        name: what messages call it.
        read: a copy of its state.
        write: puts a state back.
        dear: whether that takes ten microseconds and more (the 624 words of a Mersenne twister outside torch), so that
            it is done only for functions that draw from it; the others take less than one.
    """

    name: str
    read: Callable[[], Any]
    write: Callable[[Any], None]
    dear: bool = False


def global_sources() -> list[Source]:
    """The generators that everybody draws from; those of CUDA once it is in use."""
    sources = [_torch_source("torch's global generator", torch.default_generator)]
    if torch.cuda.is_initialized():
        sources += [
            _torch_source(f"torch's global generator of cuda:{index}", one)
            for index, one in enumerate(torch.cuda.default_generators)
        ]
    return [
        *sources,
        Source("NumPy's global generator", np.random.get_state, np.random.set_state, dear=True),
        Source("Python's random module", random.getstate, random.setstate, dear=True),
    ]


def as_source(name: str, value: Any) -> Source | None:
    """The source that an object is; None for one that is none, has no state to read, or is a global generator."""
    if isinstance(value, torch.Generator) and not _is_global(value):
        return _torch_source(name, value)
    if isinstance(value, np.random.Generator):
        return _bit_source(name, value.bit_generator)
    if isinstance(value, np.random.BitGenerator):
        return _bit_source(name, value)
    if isinstance(value, np.random.RandomState) and value is not np.random.mtrand._rand:
        return Source(name, value.get_state, value.set_state, dear=True)
    # SystemRandom asks the operating system for each number: there is no state, and `disturbances` finds it out.
    if isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):
        return Source(name, value.getstate, value.setstate, dear=True)
    return None


def _is_global(value: torch.Generator) -> bool:
    return value is torch.default_generator or any(value is one for one in torch.cuda.default_generators)


def _torch_source(name: str, value: torch.Generator) -> Source:
    def write(state: Any) -> None:
        value.set_state(state)

    return Source(name, value.get_state, write)  # states are plain tensors under transforms, too


def _bit_source(name: str, value: np.random.BitGenerator) -> Source:
    def read() -> Any:
        return value.state

    def write(state: Any) -> None:
        value.state = state

    return Source(name, read, write, dear=isinstance(value, np.random.MT19937))


def same(first: Any, second: Any) -> bool:
    """Whether two values agree to the bit, NaN with NaN: tensors, arrays, numbers and containers of them.

    What is none of these (a function, an open file) cannot be compared and counts as the same.

    Example:
        >>> same({"x": torch.tensor([1.0, torch.nan])}, {"x": torch.tensor([1.0, torch.nan])}), same([1, 2], [1, 3])
        (True, False)
    """
    if type(first) is not type(second):
        return False
    if isinstance(first, Tensor):
        if first.shape != second.shape or first.dtype != second.dtype or first.layout != second.layout:
            return False
        if first.layout != torch.strided:
            return same(_stored(first), _stored(second))
        return bool(((first == second) | ((first != first) & (second != second))).all())
    if isinstance(first, np.ndarray):
        return np.array_equal(first, second, equal_nan=first.dtype.kind in "fc")
    if isinstance(first, Mapping):
        return list(first) == list(second) and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        if {*map(type, first), *map(type, second)} == {int}:  # the 625 words of a Python generator, at once
            return first == second
        return len(first) == len(second) and all(map(same, first, second))
    if is_dataclass(first) and not isinstance(first, type) and hasattr(first, "__dict__"):
        return same(vars(first), vars(second))
    if isinstance(first, float | complex | np.generic):
        return bool(first == second) or bool(first != first and second != second)
    return not isinstance(first, int | str | bytes) or first == second


def _stored(tensor: Tensor) -> tuple[Tensor, ...]:
    """The dense tensors that a sparse one is made of."""
    if tensor.layout == torch.sparse_coo:
        return tensor._indices(), tensor._values()
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return tensor.crow_indices(), tensor.col_indices(), tensor.values()
    return tensor.ccol_indices(), tensor.row_indices(), tensor.values()
