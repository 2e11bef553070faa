"""How accurately the solves of an outer step are made: as the solvers say, or as accurately as the step needs."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bilevel.errors import UsageError
from bilevel.solvers import InnerSolver

if TYPE_CHECKING:
    from bilevel.hypergradient.method import Hypergradient

State = dict[str, Tensor]


class Accuracy(ABC):
    """Sets the tolerances of the inner and of the linear solve of each outer step; its state is kept by the outer loop."""

    def init(self, params: Tensor) -> State:
        """The state before the first outer step."""
        return {}

    @abstractmethod
    def tighten(self, solver: InnerSolver, state: State) -> InnerSolver:
        """The inner solver with the tolerance of this step."""

    @abstractmethod
    def linear_rtol(self, state: State) -> float | None:
        """Relative tolerance of this step's linear solve; None leaves the solver's own."""

    @abstractmethod
    def update(self, state: State, result: Hypergradient) -> State:
        """The state for the next step, from what this one was worth."""


@dataclass(frozen=True)
class FixedAccuracy(Accuracy):
    """The tolerances that the solvers were made with."""

    def tighten(self, solver: InnerSolver, state: State) -> InnerSolver:
        """As it is."""
        return solver

    def linear_rtol(self, state: State) -> float | None:
        """The solver's own."""
        return None

    def update(self, state: State, result: Hypergradient) -> State:
        """Nothing to remember."""
        return {}


@dataclass(frozen=True)
class AdaptiveAccuracy(Accuracy):
    r"""As accurate as a step needs: both tolerances follow the error estimate, and tighten as the hypergradient vanishes.

    A step along a hypergradient `g` with error `e` lowers the outer loss as long as `‖e‖ < ‖g‖`, so each of the two parts
    of the estimate is steered to half of `relative_error ‖g‖`: after a step whose part was `k` times that, the tolerance of
    the next one is divided by `k` (by `max_change` at most, up or down). The first step has `first_inner` and
    `first_linear`, relative to what it starts from. Where there is no estimate the tolerances stay as they are.

    Args:
        relative_error: of the hypergradient, that is aimed at.
        first_inner: stationarity of the first inner solve, relative to that of its starting point.
        first_linear: relative residual of the first linear solve.
        max_change: largest factor by which a tolerance changes from one step to the next.

    References: Pedregosa (2016), "Hyperparameter optimization with approximate gradient"; Ehrhardt and Roberts (2021),
    "Inexact derivative-free optimization for bilevel learning"; Salehi et al. (2024), "An adaptively inexact first-order
    method for bilevel optimization with application to hyperparameter learning".
    """

    relative_error: float = 0.1
    first_inner: float = 1e-3
    first_linear: float = 1e-2
    max_change: float = 10.0

    def __post_init__(self) -> None:
        """Validate the numbers."""
        for name in ("relative_error", "first_inner", "first_linear"):
            if not 0 < getattr(self, name) < 1:
                raise UsageError(f"AdaptiveAccuracy needs {name} between 0 and 1, but got {getattr(self, name)}.")
        if not self.max_change > 1:
            raise UsageError(f"AdaptiveAccuracy needs max_change > 1, but got {self.max_change}.")

    def init(self, params: Tensor) -> State:
        """No absolute tolerance is known before the first inner solve."""
        return {INNER: _number(math.nan), LINEAR: _number(self.first_linear)}

    def tighten(self, solver: InnerSolver, state: State) -> InnerSolver:
        """The solver with this step's tolerance in the place of its own."""
        atol = float(state[INNER])
        if math.isnan(atol):
            return replace(solver, rtol=max(solver.rtol, self.first_inner))
        return replace(solver, atol=atol, rtol=0.0)

    def linear_rtol(self, state: State) -> float | None:
        """This step's tolerance."""
        return float(state[LINEAR])

    def update(self, state: State, result: Hypergradient) -> State:
        """Scale both tolerances by what their parts of the error should be over what they are."""
        receipt = result.receipt
        norm = float(torch.cat([part.flatten() for part in result.gradient.values()]).norm())
        target = 0.5 * self.relative_error * norm
        inner, linear = float(state[INNER]), float(state[LINEAR])
        if receipt.stationarity > 0:
            inner = (receipt.stationarity if math.isnan(inner) else inner) * self._factor(target, receipt.error_inner)
        linear = linear * self._factor(target, receipt.error_linear)
        return {INNER: _number(inner), LINEAR: _number(min(max(linear, MIN_RTOL), MAX_RTOL))}

    def _factor(self, target: float, part: float) -> float:
        """What a tolerance is multiplied by; 1 where there is no estimate."""
        if not math.isfinite(part) or not math.isfinite(target) or target == 0:
            return 1.0
        return min(max(target / part, 1 / self.max_change), self.max_change) if part > 0 else self.max_change


INNER, LINEAR = "accuracy.inner_atol", "accuracy.linear_rtol"
MIN_RTOL, MAX_RTOL = 1e-12, 0.5


def _number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)
