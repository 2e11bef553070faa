"""A time by which a certificate has to be done: it solves to rounding level, which large problems take hours for."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from torch import Tensor

from bilevel.errors import UsageError
from bilevel.linalg import LinearOperator


class Deadline:
    """So many seconds from now.

    Args:
        seconds: above 0; None for no end.

    Raises:
        UsageError: `seconds` is not above 0.

    Example:
        >>> Deadline(None).check("all of it")
    """

    def __init__(self, seconds: float | None) -> None:
        """Start the clock."""
        if seconds is not None and not seconds > 0:
            raise UsageError(f"check needs seconds above 0, or None for no limit, but got {seconds!r}.")
        self.seconds = seconds
        self.end = None if seconds is None else time.perf_counter() + seconds

    def check(self, work: str) -> None:
        """Go on while there is time.

        Args:
            work: what is being done, for the message.

        Raises:
            UsageError: there is none left.
        """
        if self.end is not None and time.perf_counter() > self.end:
            raise UsageError(
                f"the certificate was not done after {self.seconds:g} seconds, while {work}: it solves to rounding level, "
                "which takes long for a problem of this size. Check a smaller problem of the same kind (fewer tasks, a "
                "narrower network), or allow more seconds (check.seconds=null for no limit)."
            )


class TimedOperator(LinearOperator):
    """An operator whose products look at the clock.

    Args:
        operator: what makes the products.
        deadline: when to stop.
    """

    def __init__(self, operator: LinearOperator, deadline: Deadline) -> None:
        """Take over what the operator is."""
        self.operator, self.deadline = operator, deadline
        self.shape, self.batch_shape = operator.shape, operator.batch_shape
        self.dtype, self.device, self.tags = operator.dtype, operator.device, operator.tags

    def mv(self, vector: Tensor) -> Tensor:
        """`A v`."""
        self.deadline.check("solving with the inner Hessian")
        return self.operator.mv(vector)

    def transpose(self) -> LinearOperator:
        """The transposed operator, by the same clock."""
        return TimedOperator(self.operator.transpose(), self.deadline)

    def inner(self, u: Tensor, v: Tensor) -> Tensor:
        """The operator's inner product."""
        return self.operator.inner(u, v)

    def fuse(self, function: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Sequence[Tensor]]:
        """As the operator does."""
        return self.operator.fuse(function)
