"""What a method is forecast to cost, what a run may cost, and the method that follows from both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bilevel.errors import UsageError

GB = 1e9
EXACT = 1e-2  # estimated relative error from where on a number that adapts to the step is not called exact
ACCURACY = 0.25  # relative error of a forecast; a method that is faster by less is no reason to change anything


@dataclass(frozen=True)
class Budget:
    """What a run may cost.

    Args:
        seconds: of the whole run; None for any.
        memory_gb: of the process at its peak (on a GPU: of torch's tensors there), in 10^9 bytes; None for any.
    """

    seconds: float | None = None
    memory_gb: float | None = None

    def __post_init__(self) -> None:
        """Validate the numbers."""
        for name in ("seconds", "memory_gb"):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not (number and value > 0):
                raise UsageError(f"plan.{name} is a budget and must be above 0, or null for any, but is {value!r}.")

    def excess(self, row: Forecast) -> float:
        """The largest ratio of a cost to its budget; 0 without a budget."""
        ratios = [0.0]
        if self.seconds is not None:
            ratios.append(row.run_seconds / self.seconds)
        if self.memory_gb is not None:
            ratios.append(row.memory_bytes / (GB * self.memory_gb))
        return max(ratios)

    def __str__(self) -> str:
        """The budget in words."""
        parts = [] if self.seconds is None else [f"{self.seconds:g} s"]
        parts += [] if self.memory_gb is None else [f"{self.memory_gb:g} GB"]
        return " and ".join(parts) or "no limit"


@dataclass(frozen=True)
class Forecast:
    """One row of a plan.

    Attributes:
        name: the method.
        keys: what to write on the command line; empty for the configuration as it is.
        seconds: of the first hypergradient, its inner solve included; NaN where the method is refused.
        run_seconds: of the run, from its start to its summary.
        memory_bytes: peak of the process.
        own_bytes: the part of it that the hypergradient takes.
        biased: why its number is not the hypergradient; empty when it is.
        short: why its solves end short of their tolerance; empty when they do not.
        further: whether its inner solver ends further from the solution than the configured one.
        unusable: why it cannot be used on this problem; empty when it can.
        source: what the figures rest on.
        counts: inner steps and products, in words.
        error: estimated relative error of the first step's number, where tolerances adapt; NaN elsewhere.
    """

    name: str
    keys: str
    seconds: float
    run_seconds: float
    memory_bytes: float
    own_bytes: float
    biased: str = ""
    short: str = ""
    further: bool = False
    unusable: str = ""
    source: str = ""
    counts: str = ""
    error: float = math.nan

    @property
    def worth(self) -> str:
        """What its number is worth, in a few words."""
        if self.unusable:
            return "-"
        if self.biased or self.short:
            return "biased" if self.biased else "as far as solved"
        return f"as needed: {100 * self.error:.2g} %" if self.error > EXACT else "exact"

    @property
    def flaw(self) -> str:
        """Why its number is not the exact one; empty when it is."""
        return self.biased or self.short

    @property
    def price(self) -> str:
        """Time and memory of a run, in words."""
        return f"{self.run_seconds:.3g} s and {self.memory_bytes / GB:.3g} GB"

    def as_json(self) -> dict[str, Any]:
        """For `plan.json`."""
        return {**vars(self), "worth": self.worth}

    @property
    def rank(self) -> int:
        """Exact, or as a step needs; as far as the solves go that were asked for; by a solver that gets less far; biased."""
        return 3 if self.biased else 2 if self.further else 1 if self.short else 0


def recommend(rows: Sequence[Forecast], budget: Budget) -> tuple[Forecast | None, str]:
    """The best row under a budget: the soundest numbers first, then the fastest run; or the nearest miss.

    Args:
        rows: the configuration as it is, then the methods.
        budget: what the run may cost.

    Returns:
        The recommended row, None where nothing fits, and a sentence why.
    """
    usable = [row for row in rows if not row.unusable]
    if not usable:
        return None, "no method gives every hyperparameter a gradient: see the reasons above."
    fitting = [row for row in usable if budget.excess(row) <= 1]
    if not fitting:
        near = min(usable, key=budget.excess)
        return None, (
            f"nothing fits {budget}: the nearest is {near.name} with {near.price}, {budget.excess(near):.3g} times the budget; "
            "allow more, or make fewer outer steps (trainer.num_steps) or looser solves (solver.atol, linear_solver.rtol)."
        )
    best = min(fitting, key=lambda row: (row.rank, row.run_seconds))
    own = rows[0]
    if own in fitting and own.rank == best.rank and best.run_seconds >= own.run_seconds / (1 + ACCURACY):
        fits = "" if budget == Budget() else f"it fits {budget}, and "
        said = f"{own.name}, {own.price}: {fits}no method as sound is faster by more than a forecast may err"
        best = own
    else:
        among = "the soundest" if budget == Budget() else f"the soundest that fit {budget}"
        said = f"{best.name}, {best.price}: the fastest among {among} ({best.worth})"
    faster = [row for row in fitting if row.rank > best.rank and row.run_seconds < best.run_seconds / (1 + ACCURACY)]
    if faster:
        first = min(faster, key=lambda row: row.run_seconds)
        said += f"; {first.name} would take {first.run_seconds:.3g} s, but {first.flaw}"
    return best, f"{said}."
