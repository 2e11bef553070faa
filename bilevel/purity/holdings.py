"""What a problem holds, found by walking its attributes: modules, buffers, tensors and generators, with their names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bilevel.purity.sources import Source, as_source

_OWN = frozenset(vars(torch.nn.Module()))  # hooks and the like, besides the three dictionaries below
_CONTENTS = ("_parameters", "_buffers", "_modules")
_INERT = (str, bytes, int, float, complex, type(None), type, ModuleType, np.ndarray)  # hold nothing of interest


@dataclass(frozen=True, eq=False)
class Buffer:
    """A module's buffer and every place where the problem keeps it.

    Attributes:
        name: dotted.
        module: whose it is.
        places: containers and keys under which this very tensor lies: a module's buffers, but for instance also a
            dictionary that the problem hands to `functional_call`.
    """

    name: str
    module: torch.nn.Module
    places: list[tuple[Any, Any]]

    @property
    def tensor(self) -> Tensor:
        """The tensor that lies there now."""
        container, key = self.places[0]
        return container[key]

    def replace(self, tensor: Tensor) -> None:
        """Put another tensor in all places."""
        for container, key in self.places:
            container[key] = tensor


@dataclass(frozen=True)
class Holdings:
    """What a problem holds.

    Attributes:
        modules: by dotted names.
        buffers: the buffers of all modules.
        sources: generators other than the global ones.
        tensors: every other tensor by its dotted name.
    """

    modules: dict[str, torch.nn.Module] = field(default_factory=dict)
    buffers: list[Buffer] = field(default_factory=list)
    sources: list[Source] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, problem: Any, name: str = "problem") -> Holdings:
        """Walk an object; generators, modules and containers among the attributes of its class count as its own.

        Example:
            >>> held = Holdings.of({"model": torch.nn.Sequential(torch.nn.BatchNorm1d(2)), "seed": torch.Generator()})
            >>> [buffer.name for buffer in held.buffers][0], [source.name for source in held.sources]
            ("problem['model'].0.running_mean", ["problem['seed']"])
        """
        found, known = cls(), set()
        places: dict[int, list[_Place]] = {}
        buffers: dict[int, _Place] = {}
        for place in _walk(problem, name):
            value = place.value
            if isinstance(value, Tensor):
                places.setdefault(id(value), []).append(place)
                if isinstance(place.owner, torch.nn.Module) and place.container is place.owner._buffers:
                    buffers.setdefault(id(value), place)
            elif id(value) in known:
                continue
            elif isinstance(value, torch.nn.Module):
                found.modules[place.name] = value
            elif (source := as_source(place.name, value)) is not None:
                found.sources.append(source)
            known.add(id(value))
        for key, alike in places.items():
            if key in buffers:
                slots = [(one.container, one.key) for one in alike if one.container is not None]
                found.buffers.append(Buffer(buffers[key].name, buffers[key].owner, slots))
            else:
                found.tensors[alike[0].name] = alike[0].value
        return found


class _Place(NamedTuple):
    """A value met on the walk: its name, who has it, and the container and key where it can be exchanged, if it can."""

    name: str
    value: Any
    owner: Any = None
    container: Any = None
    key: Any = None


def _walk(root: Any, name: str) -> Iterator[_Place]:
    """Everything within reach, depth first; tensors once for each place, what is inside of an object only once."""
    entered: dict[int, Any] = {}  # keeps what it names alive, so that no identity is given twice
    pending = [_Place(name, root)]
    while pending:
        place = pending.pop()
        yield place
        if isinstance(place.value, Tensor) or id(place.value) in entered:
            continue
        entered[id(place.value)] = place.value
        parts = list(_parts(place.name, place.value))
        parts += _class_attributes(name, root) if place.value is root else ()
        pending.extend(part for part in reversed(parts) if not isinstance(part.value, _INERT))


def _parts(name: str, value: Any) -> Iterator[_Place]:
    """What lies directly inside an object."""
    if isinstance(value, torch.nn.Module):
        for contents in _CONTENTS:
            container = getattr(value, contents)
            for key in list(container):
                if container[key] is not None:
                    yield _Place(f"{name}.{key}", container[key], value, container, key)
    if isinstance(value, dict):
        for key, part in list(value.items()):
            yield _Place(f"{name}[{key!r}]", part, value, value, key)
    elif isinstance(value, list | tuple | set | frozenset):
        exchangeable = value if isinstance(value, list) else None
        for index, part in enumerate(value):
            if isinstance(part, _INERT):  # a long list of numbers is passed quickly
                continue
            yield _Place(f"{name}[{index}]", part, value, exchangeable, index)
    elif isinstance(value, MethodType):
        yield _Place(name, value.__self__)
        yield _Place(name, value.__func__)
    elif isinstance(value, partial):
        for index, part in enumerate([value.func, *value.args]):
            yield _Place(f"{name}[{index}]", part)
        yield _Place(name, value.keywords)
    elif isinstance(value, FunctionType):
        for variable, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            try:
                yield _Place(f"{name}.{variable}", cell.cell_contents)
            except ValueError:  # a variable that has no value yet
                continue
    yield from _attributes(name, value)


def _attributes(name: str, value: Any) -> Iterator[_Place]:
    """Attributes of an object of whatever class, with and without `__dict__`."""
    own = getattr(value, "__dict__", None)
    skipped: frozenset[str] = _OWN if isinstance(value, torch.nn.Module) else frozenset()
    if isinstance(own, dict):
        for key in [key for key in own if key not in skipped]:
            yield _Place(f"{name}.{key}", own[key], value, own, key)
    for kind in type(value).__mro__:
        slots = vars(kind).get("__slots__", ())
        for key in (slots,) if isinstance(slots, str) else slots:
            if key not in ("__dict__", "__weakref__") and hasattr(value, key):
                yield _Place(f"{name}.{key}", getattr(value, key), value)


def _class_attributes(name: str, root: Any) -> Iterator[_Place]:
    """Modules, generators and containers that the class of the problem holds for all its instances."""
    for kind in type(root).__mro__:
        for key, part in vars(kind).items():
            if isinstance(part, dict | list | tuple | torch.nn.Module | Tensor) or as_source(key, part) is not None:
                if not key.startswith("__"):
                    yield _Place(f"{name}.{key}", part, root)
