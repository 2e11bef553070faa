"""Dictionaries of tensors to plain vectors and back: done once, at the edge.

Everything below the edge (operators, linear solvers, inner solvers) sees tensors of shape `(*batch, n)`; everything
above it (problems, logs, checkpoints) sees `dict[str, Tensor]` with dotted names.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from bilevel.errors import UsageError

TensorDict = dict[str, Tensor]
Nested = TypeVar("Nested")


@dataclass(frozen=True)
class Layout:
    """Where each named tensor lies in a vector of length `size`.

    Example:
        >>> layout = Layout.of({"weight": torch.zeros(2, 3), "bias": torch.zeros(3)})
        >>> layout.size
        9
        >>> {name: tuple(value.shape) for name, value in layout.unravel(torch.zeros(5, 9), num_batch=1).items()}
        {'weight': (5, 2, 3), 'bias': (5, 3)}
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], num_batch: int = 0) -> Layout:
        """The layout of a dictionary whose tensors share `num_batch` leading batch dimensions."""
        return cls(tuple(tensors), tuple(tuple(value.shape[num_batch:]) for value in tensors.values()))

    @property
    def sizes(self) -> list[int]:
        """Number of entries of each tensor."""
        return [math.prod(shape) for shape in self.shapes]

    @property
    def size(self) -> int:
        """Number of entries of all tensors together."""
        return sum(self.sizes)

    def ravel(self, tensors: Mapping[str, Tensor], num_batch: int = 0) -> Tensor:
        """The dictionary as one vector `(*batch, n)`; differentiable.

        Raises:
            UsageError: names or shapes are not those of the layout.
        """
        if set(tensors) != set(self.names):
            missing, extra = set(self.names) - set(tensors), set(tensors) - set(self.names)
            raise UsageError(
                f"expected tensors named {sorted(self.names)}; missing {sorted(missing)}, not expected {sorted(extra)}."
            )
        for name, shape in zip(self.names, self.shapes, strict=True):
            if tuple(tensors[name].shape[num_batch:]) != shape:
                raise UsageError(
                    f"'{name}' was expected to have shape {shape}, but has {tuple(tensors[name].shape[num_batch:])}."
                )
        parts = [
            tensors[name].reshape(*tensors[name].shape[:num_batch], size)
            for name, size in zip(self.names, self.sizes, strict=True)
        ]
        return torch.cat(parts, dim=-1)

    def unravel(self, vector: Tensor, num_batch: int | None = None) -> TensorDict:
        """Views of the vector `(*batch, n)` as named tensors `(*batch, *shape)`; differentiable."""
        batch = vector.shape[:-1] if num_batch is None else vector.shape[:num_batch]
        if not self.names:
            return {}
        parts = vector.split(self.sizes, dim=-1)
        return {
            name: part.reshape((*batch, *shape))
            for name, part, shape in zip(self.names, parts, self.shapes, strict=True)
        }


def flatten_names(tensors: Mapping[str, Any], prefix: str = "") -> TensorDict:
    """Nested dictionaries of tensors as one dictionary with dotted names.

    Example:
        >>> list(flatten_names({"penalty": {"layer1": torch.tensor(1.0)}, "scale": torch.tensor(2.0)}))
        ['penalty.layer1', 'scale']

    Raises:
        UsageError: there is no dictionary, two entries get the same name, a name is both a tensor and a group, or a value
            is not a tensor.
    """
    if not isinstance(tensors, Mapping):
        raise UsageError(
            f"a dictionary of tensors was expected, but a {type(tensors).__name__} came: give each a name."
        )
    flat: TensorDict = {}
    for key, value in tensors.items():
        name = f"{prefix}{key}"
        entries = flatten_names(value, name + ".") if isinstance(value, Mapping) else {name: value}
        for entry, tensor in entries.items():
            if not isinstance(tensor, Tensor):
                raise UsageError(
                    f"'{entry}' was expected to be a tensor, but is a {type(tensor).__name__}: "
                    f"write torch.tensor(...) or torch.as_tensor(...)."
                )
            if entry in flat:
                raise UsageError(f"two tensors have the name '{entry}': rename one of them.")
            flat[entry] = tensor
    check_names(flat)
    return flat


def check_names(names: Mapping[str, Any] | set[str]) -> None:
    """Refuse dotted names of which one is a group in another.

    Example:
        >>> check_names({"penalty", "penalty.layer1"})
        Traceback (most recent call last):
        ...
        bilevel.errors.UsageError: 'penalty' is a tensor and also the group of 'penalty.layer1': rename one of them.
    """
    for name in sorted(names):
        parts = name.split(".")
        for end in range(1, len(parts)):
            group = ".".join(parts[:end])
            if group in names:
                raise UsageError(f"'{group}' is a tensor and also the group of '{name}': rename one of them.")


def to(value: Nested, device: Any = None, dtype: torch.dtype | None = None) -> Nested:
    """The same value on another device, its floating-point tensors in another dtype, however they are nested.

    Goes through dictionaries, lists, tuples and dataclasses, which are copied; modules move in place, as `Module.to`
    does; anything else stays as it is.

    Example:
        >>> moved = to({"x": [torch.ones(1), torch.ones(1, dtype=torch.int64)], "name": "a"}, dtype=torch.float64)
        >>> moved["x"][0].dtype, moved["x"][1].dtype, moved["name"]
        (torch.float64, torch.int64, 'a')
    """
    moved: Any = value
    if isinstance(value, Tensor):
        moved = value.to(device=device, dtype=dtype if value.is_floating_point() else None)
    elif isinstance(value, torch.nn.Module):
        moved = value.to(device=device, dtype=dtype)
    elif isinstance(value, tuple):
        parts = [to(part, device, dtype) for part in value]
        moved = type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    elif isinstance(value, dict | list):
        moved = copy.copy(value)  # keeps what it is: an OrderedDict, a defaultdict
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            moved[key] = to(part, device, dtype)
    elif is_dataclass(value) and not isinstance(value, type):
        moved = copy.copy(value)
        for entry in fields(value):
            object.__setattr__(moved, entry.name, to(getattr(value, entry.name), device, dtype))  # also frozen ones
    return moved


def detach(tensors: Mapping[str, Tensor]) -> TensorDict:
    """The same values, cut from every graph."""
    return {name: value.detach() for name, value in tensors.items()}
