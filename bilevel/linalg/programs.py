"""The compiled programs of one function, each for some shapes of its arguments, or the sentence why there is none."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from bilevel.linalg.tracing import Untraceable

Program = TypeVar("Program")

log = logging.getLogger("bilevel")

MAX_PROGRAMS = 8  # shapes, and values of what is no tensor, for which one function is compiled
MAX_CHANGES = 3  # times that it is traced again because something has changed that it reads but is not given


class Programs(Generic[Program]):
    """Programs by the key of what they serve; a function that cannot be compiled is not tried again.

    Args:
        what: the compiled things, as a sentence begins: "the products are".

    Attributes:
        changes: how often a program was seen to be no longer the function.
    """

    def __init__(self, what: str) -> None:
        """Nothing is compiled yet."""
        self.what = what
        self._found: dict[Any, Program | str] = {}
        self.changes = 0

    def __len__(self) -> int:
        """How many keys have been tried."""
        return len(self._found)

    def get(self, key: Any) -> Program | str | None:
        """The program, why there is none, or None: not tried yet."""
        return self._found.get(key)

    def outdated(self) -> None:
        """A program was seen to be no longer the function; who has seen it makes another."""
        self.changes += 1

    def make(self, key: Any, build: Callable[[], Program]) -> Program | str:
        """Build a program and keep it, or a sentence where building raises, or has been asked for too often."""
        program = self._built(key, build)
        if key in self._found or len(self) < MAX_PROGRAMS:
            self._found[key] = program
        return program

    def _built(self, key: Any, build: Callable[[], Program]) -> Program | str:
        if self.changes > MAX_CHANGES:
            return self.sentence(
                f"the function's value was {self.changes} times not that of its graph, so it reads something that changes "
                "and is not among its arguments: make it a hyperparameter or part of the batch"
            )
        if len(self) >= MAX_PROGRAMS and key not in self._found:
            return self.sentence(f"{MAX_PROGRAMS} other shapes of its arguments have been compiled already")
        log.info("%s being compiled, the first time on a machine in up to minutes", self.what)
        try:
            return build()
        except Untraceable as reason:
            return self.sentence(str(reason))
        except Exception as error:  # of any kind; it is not the function's own, which has just been evaluated
            first = str(error).strip().partition("\n")[0].rstrip(".:") or "no message"
            return self.sentence(f"they could not be compiled ({type(error).__name__}: {first})")

    def sentence(self, reason: str) -> str:
        """The whole of it."""
        return f"{self.what} eager, not compiled, because {reason}."


def agree(found: Tensor, expected: Tensor, terms: float = 0.0) -> bool:
    """Whether half of the digits are the same: far above rounding, far below any mistake.

    Args:
        found: of a program.
        expected: of the function.
        terms: norm of what is added up to the values, by which they are rounded where nothing is left of the sum.
    """
    tolerance = torch.finfo(expected.dtype).eps ** 0.5
    return bool((found - expected).norm() <= tolerance * (expected.norm() + terms))
