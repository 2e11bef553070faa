"""What to do with a hypergradient that is not finite; whatever the policy, it is never applied."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from bilevel.errors import NumericalError, UsageError


class Nonfinite(ABC):
    """A policy for outer steps whose hypergradient cannot be applied."""

    @abstractmethod
    def limit_reached(self, num_in_a_row: int) -> bool:
        """Whether the loop ends after so many such steps in a row."""

    @abstractmethod
    def met(self, step: int, why: str) -> None:
        """Called at each such step, before the next one.

        Args:
            step: its number.
            why: what was not finite.

        Raises:
            NumericalError: the policy is to stop at once.
        """


@dataclass(frozen=True)
class Skip(Nonfinite):
    """Leave the step out; end the loop after `max_in_a_row` of them.

    Args:
        max_in_a_row: how many.
    """

    max_in_a_row: int = 3

    def __post_init__(self) -> None:
        """Validate the number."""
        if not isinstance(self.max_in_a_row, int) or self.max_in_a_row < 1:
            raise UsageError(f"Skip needs max_in_a_row to be an integer of at least 1, but got {self.max_in_a_row}.")

    def limit_reached(self, num_in_a_row: int) -> bool:
        """After `max_in_a_row`."""
        return num_in_a_row >= self.max_in_a_row

    def met(self, step: int, why: str) -> None:
        """The record says `skipped`; nothing else happens."""


@dataclass(frozen=True)
class Raise(Nonfinite):
    """Stop at the first one."""

    def limit_reached(self, num_in_a_row: int) -> bool:
        """Never: the first one raises."""
        return False

    def met(self, step: int, why: str) -> None:
        """Raise `NumericalError`."""
        raise NumericalError(
            f"the hypergradient of step {step} was expected to be finite, but {why}: lower the learning rates, check the "
            "losses, use dtype=float64, or choose nonfinite=skip."
        )
