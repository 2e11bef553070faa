"""What went less than well in a run: each kind of trouble told when it is met first, and counted at the end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bilevel.outcome import Result
from bilevel.tracking.format import number

__all__ = ["Troubles"]


class Troubles:
    """Reads the records of a run for solves that did not succeed and for steps that were not applied.

    Example:
        >>> troubles = Troubles()
        >>> for step in range(3):
        ...     troubles.news({"step": step, "receipt.inner_result": "max_steps", "receipt.stationarity": 0.5})
        ['step 0: the inner solve ended with max_steps, and the norm of its gradient is 0.5000']
        []
        []
        >>> troubles.totals()
        ['3 of 3 steps: the inner solve ended with max_steps']
    """

    def __init__(self) -> None:
        """Nothing has happened yet."""
        self._num_steps = 0
        self._counts: dict[str, int] = {}

    def news(self, record: Mapping[str, Any]) -> list[str]:
        """Count the troubles of a step; a sentence about each kind that is met for the first time."""
        self._num_steps += 1
        said = []
        for kind, details in _troubles(record):
            if kind not in self._counts:
                said.append(f"step {record['step']}: {kind}{details}")
            self._counts[kind] = self._counts.get(kind, 0) + 1
        return said

    def totals(self) -> list[str]:
        """How many steps had each kind of trouble; empty when none had."""
        return [f"{number(count)} of {number(self._num_steps)} steps: {kind}" for kind, count in self._counts.items()]


def _is_negative(record: Mapping[str, Any]) -> bool:
    """Whether the inner Hessian was seen to be indefinite, well beyond rounding."""
    least, largest = record.get("receipt.curvature_min"), record.get("receipt.curvature_max")
    if not isinstance(least, int | float) or not isinstance(largest, int | float):
        return False
    return least < -1e-6 * abs(largest)


def _troubles(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The kinds of trouble of one step, each with what is to be said of it once."""
    found = []
    successes = {None, *(result.name for result in Result if result.successful)}  # inner solvers use the same words
    linear, inner = record.get("receipt.linear_result"), record.get("receipt.inner_result")
    if inner not in successes:
        stationarity = number(record.get("receipt.stationarity"))
        hint = " (no lower loss in this precision: try dtype=float64, or a larger atol)" if inner == "stagnated" else ""
        found.append((f"the inner solve ended with {inner}{hint}", f", and the norm of its gradient is {stationarity}"))
    if linear not in successes:
        known = Result.__members__.get(str(linear))
        found.append((f"the linear solve ended with {linear}", f": {known.value}" if known is not None else ""))
    if _is_negative(record):
        least = number(record["receipt.curvature_min"], 3)
        found.append(("the inner Hessian has negative curvature", f" (least seen {least}): the solution is no minimum"))
    if record.get("receipt.fallback"):
        found.append(("not all is compiled that was to be", f": {record['receipt.fallback']}"))
    if record.get("shrunk"):
        error = number(record.get("hypergradient_error"), 3)
        found.append(("the hypergradient was shrunk", f": its estimated error is {error} times its norm"))
    if overfitting := record.get("overfitting"):
        least, loss = (number(overfitting[key]) for key in ("best_loss", "loss"))
        details = f": the loss on what it leaves out was {least} at step {overfitting['best_step']}, and is {loss}"
        found.append(("the outer loss still falls, but only on its own examples", details))
    if record.get("skipped"):
        found.append(("skipped, for the hypergradient was not finite or a solve diverged", ""))
    return found
