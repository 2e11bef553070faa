"""Few-shot tasks: many small problems with a support set to adapt to and a query set to judge by."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bilevel.errors import UsageError
from bilevel.rng import generator

PARTS = ("train", "validation", "test")


class Examples(NamedTuple):
    """Inputs `(T, N, ...)` and targets `(T, N)` or `(T, N, O)` of `T` tasks."""

    inputs: Tensor
    targets: Tensor


class Episode(NamedTuple):
    """`T` tasks, each with its two disjoint sets of examples."""

    support: Examples
    query: Examples


class TaskSource(ABC):
    """A distribution of tasks, in parts that share nothing.

    A draw is a pure function of its numbers, so that a resumed run meets the same tasks and nothing has to be stored. It uses
    NumPy where work is to be done, see `Prefetched`.
    """

    @abstractmethod
    def draw(self, part: str, num_tasks: int, *seeds: int) -> Episode:
        """Tasks of a part (`train`, `validation` or `test`); other seeds give other tasks."""

    def has_part(self, part: str) -> bool:
        """Whether tasks can be drawn from a part."""
        return part in PARTS

    def check_part(self, part: str) -> None:
        """Refuse a part that there is not."""
        if part not in PARTS:
            raise UsageError(f"a part of the tasks was expected, one of {', '.join(PARTS)}, but got {part!r}.")


class ClassEpisodes(TaskSource):
    """N-way K-shot classification: a task has `way` classes, `shot` examples of each to adapt to and `num_query` to judge by.

    Classes and examples are drawn without replacement; labels of a task are 0 to `way - 1`, in the order of the draw.

    Args:
        images: `(classes, examples, H, W, C)`, unsigned bytes.
        classes: the class numbers of each part; the parts share none.
        way: classes in a task.
        shot: support examples of a class.
        num_query: query examples of a class.
        rotated_parts: parts in which each class is also three more, turned by 90, 180 and 270 degrees. A task may hold a
            class in two of its turns.
        shift: pixels by which each training image is moved at most, in both directions; what comes in is zero.

    Raises:
        UsageError: the images are no bytes of that shape, parts share classes or name one that is not there, a part has fewer
            classes than a task, or a class fewer examples than one needs.

    Example:
        >>> images = torch.zeros(12, 20, 28, 28, 1, dtype=torch.uint8)
        >>> tasks = ClassEpisodes(images, {"train": range(8), "test": range(8, 12)}, way=3)
        >>> episode = tasks.draw("train", 16, 0)
        >>> episode.support.inputs.shape, episode.query.targets.shape
        (torch.Size([16, 3, 28, 28, 1]), torch.Size([16, 45]))
    """

    def __init__(
        self,
        images: Tensor,
        classes: Mapping[str, Sequence[int]],
        way: int = 5,
        shot: int = 1,
        num_query: int = 15,
        rotated_parts: Sequence[str] = (),
        shift: int = 0,
    ) -> None:
        """Check that tasks can be drawn."""
        if isinstance(rotated_parts, str) or not isinstance(rotated_parts, Sequence):
            raise UsageError(f"rotated_parts was expected to be a list of parts, but is {rotated_parts!r}.")
        for part in (*classes, *rotated_parts):
            self.check_part(part)
        _check_images(images, rotated_parts)
        self.images, self.way, self.shot, self.num_query = images, way, shot, num_query
        self.rotated_parts, self.shift = tuple(rotated_parts), shift
        self.classes = {part: np.array(list(chosen), dtype=np.int64) for part, chosen in classes.items()}
        for name, value in (("way", way), ("shot", shot), ("num_query", num_query)):
            if not isinstance(value, int) or value < (2 if name == "way" else 1):
                raise UsageError(
                    f"{name} was expected to be an integer of at least {2 if name == 'way' else 1}, but is {value!r}."
                )
        side = min(images.shape[2:4])
        if not isinstance(shift, int) or not 0 <= shift < side:
            raise UsageError(
                f"shift was expected to be from 0 to {side - 1} pixels, below the images' side, but is {shift!r}."
            )
        _check_disjoint(classes, len(images))
        for part, chosen in self.classes.items():
            number = len(chosen) * self._turns(part)
            if number and way > number:
                raise UsageError(
                    f"a task of {way} classes (way) cannot be drawn from the {part} part, which has {number}: lower way, or "
                    f"give that part more classes{', or none' if part == 'validation' else ''}."
                )
        if shot + num_query > images.shape[1]:
            raise UsageError(
                f"a task needs {shot} + {num_query} examples of a class (shot + num_query), but each class has "
                f"{images.shape[1]}: lower one of the two."
            )

    def has_part(self, part: str) -> bool:
        """Whether it has classes."""
        return len(self.classes.get(part, ())) > 0

    def _turns(self, part: str) -> int:
        """As how many classes each class of a part counts."""
        return 4 if part in self.rotated_parts else 1

    def draw(self, part: str, num_tasks: int, *seeds: int) -> Episode:
        """See `TaskSource.draw`; inputs are between 0 and 1, in torch's default dtype."""
        self.check_part(part)
        if not self.has_part(part):
            raise UsageError(f"there are no classes for the {part} part of these tasks.")
        chosen = self.classes[part]
        source = generator(PARTS.index(part), *seeds)
        turns = self._turns(part)
        drawn = _without_replacement(num_tasks, len(chosen) * turns, self.way, source)  # (T, way)
        classes, turn = chosen[drawn % len(chosen)], drawn // len(chosen)
        number = self.shot + self.num_query
        examples = _without_replacement(num_tasks * self.way, self.images.shape[1], number, source)
        images = self.images.numpy()[classes[..., None], examples.reshape(num_tasks, self.way, number)]
        for quarter in range(1, turns):  # images: (T, way, shot + num_query, H, W, C)
            images[turn == quarter] = np.rot90(images[turn == quarter], quarter, (2, 3))
        if self.shift and part == "train":
            images = _shifted(images, self.shift, source)
        inputs = images.astype(numpy_dtype()) / 255
        labels = np.broadcast_to(np.arange(self.way)[None, :, None], inputs.shape[:3])

        def part_of(cut: slice) -> Examples:
            both = (inputs[:, :, cut], labels[:, :, cut].copy())
            return Examples(*(torch.from_numpy(one.reshape(num_tasks, -1, *one.shape[3:])) for one in both))

        return Episode(part_of(slice(self.shot)), part_of(slice(self.shot, None)))


def _without_replacement(rows: int, population: int, number: int, source: torch.Generator) -> NDArray[np.int64]:
    """Distinct numbers below `population` for each row, `(rows, number)`, every order equally likely."""
    keys = torch.rand(rows, population, generator=source, dtype=torch.float64).numpy()
    smallest = np.argpartition(keys, number - 1)[:, :number] if number < population else np.arange(population)[None]
    order = np.argsort(np.take_along_axis(keys, np.broadcast_to(smallest, (rows, number)), 1), 1)
    return np.take_along_axis(np.broadcast_to(smallest, (rows, number)), order, 1)


def _shifted(images: NDArray[np.uint8], largest: int, source: torch.Generator) -> NDArray[np.uint8]:
    """Each image `(..., H, W, C)` moved by up to so many pixels along both sides."""
    by = torch.randint(-largest, largest + 1, (2, *images.shape[:-3], 1), generator=source).numpy()
    for axis, size in ((-3, images.shape[-3]), (-2, images.shape[-2])):
        places = np.arange(size) + by[axis + 3]  # (..., size): where each row, or column, comes from
        blank = (places < 0) | (places >= size)
        spread = (..., slice(None), None, None) if axis == -3 else (..., None, slice(None), None)
        moved = np.take_along_axis(images, places.clip(0, size - 1)[spread], axis)
        images = np.where(blank[spread], np.uint8(0), moved)
    return images


def numpy_dtype() -> str:
    """Torch's default dtype by NumPy's name."""
    return str(torch.get_default_dtype()).removeprefix("torch.")


def _check_images(images: Tensor, rotated_parts: Sequence[str]) -> None:
    if not isinstance(images, Tensor) or images.dtype != torch.uint8 or images.ndim != 5:
        came = f"{images.dtype} {tuple(images.shape)}" if isinstance(images, Tensor) else f"a {type(images).__name__}"
        raise UsageError(
            f"images were expected to be a tensor of bytes (torch.uint8), (classes, examples, H, W, C), but came as {came}."
        )
    if rotated_parts and images.shape[2] != images.shape[3]:
        raise UsageError(
            f"rotations need square images, but these have {images.shape[2]} x {images.shape[3]} pixels: rotated_parts=[]."
        )


def _check_disjoint(classes: Mapping[str, Sequence[int]], number: int) -> None:
    owner: dict[int, str] = {}
    for part, chosen in classes.items():
        if len({int(one) for one in chosen}) < len(chosen):
            raise UsageError(f"a class is in the {part} part twice: name each class once.")
        for one in chosen:
            if not 0 <= int(one) < number:
                raise UsageError(
                    f"class {int(one)} of the {part} part is not among the images, which have {number} classes."
                )
            if owner.setdefault(int(one), part) != part:
                raise UsageError(
                    f"the parts of a few-shot data set must share no class, but class {int(one)} is in both {owner[int(one)]} "
                    f"and {part}: what is tested on would be trained on."
                )
