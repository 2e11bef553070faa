"""What to do with a hypergradient whose own error estimate says that it is worth nothing."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from bilevel.errors import UsageError


class Worthless(ABC):
    """A policy for outer steps whose hypergradient is finite, but may be all error."""

    @abstractmethod
    def scale(self, relative_error: float) -> float:
        """What the hypergradient is multiplied by before the outer optimiser sees it.

        Args:
            relative_error: the error estimate over the norm of the hypergradient; NaN where there is none.
        """


@dataclass(frozen=True)
class Shrink(Worthless):
    r"""Multiply it by `(beyond ‖g‖ / ‖e‖)²` where the estimated error `‖e‖` is more than `beyond` times its norm `‖g‖`.

    Where the inner Hessian is nearly singular the solution jumps, and the theorem's number, which is of the size of the
    inverse of the smallest eigenvalue, says nothing of a step of finite length. One such hypergradient in a hundred is
    enough to halt an optimiser that divides by a running mean of squares: Adam's, with `betas=[0.9, 0.999]`, remembers it
    for a thousand steps. What is shrunk leaves the optimiser's averages as they are, and the step is that of its momentum.
    The square is how the best linear estimate of a quantity falls with the error of its measurement (Wiener's filter).

    Args:
        beyond: the estimate over the norm from where on. The estimate is 3 to 5 times the error
            (`python -m benchmarks.error_estimate`), so that at 10 the error is two or three times what it is the error of.
    """

    beyond: float = 10.0

    def __post_init__(self) -> None:
        """Validate the number."""
        if not 0 < self.beyond < math.inf:
            raise UsageError(f"Shrink needs beyond > 0, but got {self.beyond}.")

    def scale(self, relative_error: float) -> float:
        """1 up to `beyond`, and where there is no estimate."""
        return (self.beyond / relative_error) ** 2 if relative_error > self.beyond else 1.0  # False for NaN


@dataclass(frozen=True)
class Apply(Worthless):
    """Apply it as it is."""

    def scale(self, relative_error: float) -> float:
        """1."""
        return 1.0
