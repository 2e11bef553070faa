"""Typed hyperparameters: natural units for people and problems, unconstrained `raw` values for the optimiser."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Transform, biject_to, constraints

from bilevel.errors import UsageError
from bilevel.tree import TensorDict


class Constraint(ABC):
    """A set that a hyperparameter stays in, with the smooth bijection from unconstrained values onto it."""

    @abstractmethod
    def bijection(self) -> Transform:
        """The map `raw -> natural`, from `torch.distributions`."""

    @property
    def description(self) -> str:
        """What the constraint demands, for messages."""
        return type(self).__name__.lower()

    def to_natural(self, raw: Tensor) -> Tensor:
        """Natural value of a raw one; differentiable."""
        natural: Tensor = self.bijection()(raw)
        return natural

    def to_raw(self, natural: Tensor, name: str = "hyperparameter") -> Tensor:
        """Raw value of a natural one.

        Raises:
            UsageError: the value lies outside the set or on its border, where the raw value would be infinite.
        """
        raw: Tensor = self.bijection().inv(natural)
        if not bool(raw.isfinite().all()) or not bool(natural.isfinite().all()):
            low, high = float(natural.min()), float(natural.max())
            raise UsageError(
                f"'{name}' was expected to be {self.description}, but has values from {low:.6g} to {high:.6g}: "
                "start it strictly inside."
            )
        return raw


@dataclass(frozen=True)
class Real(Constraint):
    """Any number; raw and natural values are the same."""

    def bijection(self) -> Transform:
        """The identity."""
        return biject_to(constraints.real)


@dataclass(frozen=True)
class Positive(Constraint):
    """Above zero; `natural = exp(raw)`, so that steps are multiplicative.

    Example:
        >>> round(float(Positive().to_raw(torch.tensor(1.0))), 4)
        0.0
        >>> Positive().to_raw(torch.tensor(0.0), "penalty")
        Traceback (most recent call last):
        ...
        bilevel.errors.UsageError: 'penalty' was expected to be above 0, but has values from 0 to 0: start it strictly inside.
    """

    @property
    def description(self) -> str:
        """For messages."""
        return "above 0"

    def bijection(self) -> Transform:
        """The exponential."""
        return biject_to(constraints.positive)


@dataclass(frozen=True)
class Box(Constraint):
    """Between two bounds; a scaled sigmoid.

    Args:
        low: lower bound.
        high: upper bound.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        """Validate the bounds."""
        if not self.low < self.high:
            raise UsageError(f"Box needs low < high, but got {self.low} and {self.high}.")

    @property
    def description(self) -> str:
        """For messages."""
        return f"between {self.low:g} and {self.high:g}"

    def bijection(self) -> Transform:
        """A sigmoid, scaled and shifted."""
        return biject_to(constraints.interval(self.low, self.high))

    def to_raw(self, natural: Tensor, name: str = "hyperparameter") -> Tensor:
        """Raw value; values on or outside the bounds are refused before the bijection would clip them."""
        if not bool(((natural > self.low) & (natural < self.high)).all()):
            raise UsageError(
                f"'{name}' was expected to be {self.description}, but has values from {float(natural.min()):.6g} to "
                f"{float(natural.max()):.6g}: start it strictly inside."
            )
        return super().to_raw(natural, name)


@dataclass(frozen=True)
class UnitInterval(Box):
    """Between 0 and 1."""

    low: float = 0.0
    high: float = 1.0


@dataclass(frozen=True)
class Simplex(Constraint):
    """Positive and summing to 1 along the last dimension; raw values have one entry less (stick breaking).

    Example:
        >>> Simplex().to_natural(torch.zeros(2))
        tensor([0.3333, 0.3333, 0.3333])
    """

    @property
    def description(self) -> str:
        """For messages."""
        return "positive with sum 1 along its last dimension"

    def bijection(self) -> Transform:
        """Stick breaking."""
        return biject_to(constraints.simplex)

    def to_raw(self, natural: Tensor, name: str = "hyperparameter") -> Tensor:
        """Raw value; a sum other than 1 is refused instead of normalised in silence."""
        if not natural.ndim:
            raise UsageError(f"'{name}' was expected to be {self.description}, but is a single number.")
        total = natural.sum(-1)
        tolerance = 100 * max(
            torch.finfo(natural.dtype).eps, torch.finfo(torch.float32).eps
        )  # it may come from float32
        if bool(((total - 1).abs() > tolerance).any()) or bool((natural <= 0).any()):
            raise UsageError(
                f"'{name}' was expected to be {self.description}, but has smallest entry {float(natural.min()):.6g} and a "
                f"sum of {float(total.flatten()[0]):.9g}: divide it by its sum."
            )
        return super().to_raw(natural, name)


@dataclass(frozen=True)
class Bijections:
    """The constraints of all hyperparameters; a name stands for itself and for every dotted name below it.

    Example:
        >>> bijections = Bijections.of({"penalty": Positive()}, ["penalty.layer1", "shift"])
        >>> natural = bijections.to_natural({"penalty.layer1": torch.tensor(0.0), "shift": torch.tensor(2.0)})
        >>> {name: value.item() for name, value in natural.items()}
        {'penalty.layer1': 1.0, 'shift': 2.0}
    """

    constraints: Mapping[str, Constraint]

    @classmethod
    def of(cls, declared: Mapping[str, Any], names: list[str]) -> Bijections:
        """Match declared names with hyperparameters; the longest match wins.

        Raises:
            UsageError: a declared name matches no hyperparameter, or what is declared is no constraint.
        """
        matched: dict[str, Constraint] = {}
        for name in names:
            fitting = [key for key in declared if name == key or name.startswith(key + ".")]
            matched[name] = declared[max(fitting, key=len)] if fitting else Real()
        for key, constraint in declared.items():
            if not isinstance(constraint, Constraint):
                made = f": write {constraint.__name__}()" if isinstance(constraint, type) else ""
                raise UsageError(
                    f"the constraint of '{key}' was expected to be one such as Positive(), but is {constraint}{made}."
                )
            if not any(name == key or name.startswith(key + ".") for name in names):
                raise UsageError(f"constraints name '{key}', but the hyperparameters are {sorted(names)}.")
        return cls(matched)

    def to_natural(self, raw: Mapping[str, Tensor]) -> TensorDict:
        """Natural values; differentiable, and with memory of their own: optimisers change raw values in place."""
        return {name: self.constraints[name].to_natural(value.clone()) for name, value in raw.items()}

    def to_raw(self, natural: Mapping[str, Tensor]) -> TensorDict:
        """Raw values; raises `UsageError` naming a hyperparameter outside its set."""
        return {name: self.constraints[name].to_raw(value, name) for name, value in natural.items()}
