"""How accurately the solves of an outer step are made: as the solvers say, or as accurately as the step needs."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from bilevel.errors import UsageError
from bilevel.linalg.system import rounding_level
from bilevel.solvers import InnerSolver

if TYPE_CHECKING:
    from bilevel.hypergradient.method import Hypergradient

State = dict[str, Tensor]


class Accuracy(ABC):
    """Sets the tolerances of the inner and of the linear solve of each outer step; its state is kept by the outer loop.

    Attributes:
        needs_estimate: whether it goes by the receipt's error estimate; without one it is not asked.
    """

    needs_estimate: ClassVar[bool] = False

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
class DecreasingAccuracy(Accuracy):
    r"""Tolerances that fall by the same factor from one step to the next, down to the solvers' own; for any method.

    At outer step `k` the inner solve is asked for `first_inner decay^k` times the stationarity of the first starting point,
    and the linear solve for a relative residual of `first_linear decay^k`. Approximate hypergradients converge when their
    errors can be summed, as those of a geometric sequence can.

    Args:
        first_inner: stationarity of the first inner solve, relative to that of its starting point.
        first_linear: relative residual of the first linear solve.
        decay: the factor, between 0 and 1.
        last_linear: below this the linear solver's own tolerance holds.

    Reference: Pedregosa (2016), "Hyperparameter optimization with approximate gradient".

    Example:
        >>> accuracy = DecreasingAccuracy(first_linear=0.1, decay=0.5)
        >>> accuracy.linear_rtol(accuracy.init(torch.zeros(3)))
        0.1
    """

    first_inner: float = 1e-2
    first_linear: float = 1e-1
    decay: float = 0.9
    last_linear: float = 1e-6

    def __post_init__(self) -> None:
        """Validate the numbers."""
        for name in ("first_inner", "first_linear", "decay", "last_linear"):
            if not 0 < getattr(self, name) < 1:
                raise UsageError(f"DecreasingAccuracy needs {name} between 0 and 1, but got {getattr(self, name)}.")

    def init(self, params: Tensor) -> State:
        """No absolute tolerance is known before the first inner solve."""
        return {INNER: _number(math.nan), LINEAR: _number(self.first_linear)}

    def tighten(self, solver: InnerSolver, state: State) -> InnerSolver:
        """The solver with this step's tolerance, or with its own where that is looser."""
        atol = float(state[INNER])
        if math.isnan(atol):
            return replace(solver, rtol=max(solver.rtol, self.first_inner))
        return replace(solver, atol=max(solver.atol, atol))

    def linear_rtol(self, state: State) -> float | None:
        """This step's tolerance; the solver's own at the end."""
        rtol = float(state[LINEAR])
        return rtol if rtol >= self.last_linear else None

    def update(self, state: State, result: Hypergradient) -> State:
        """The next member of both sequences; that of the inner solve starts where the first one ended."""
        inner = float(state[INNER])
        inner = result.receipt.stationarity if math.isnan(inner) else inner
        return {INNER: _number(self.decay * inner), LINEAR: _number(self.decay * float(state[LINEAR]))}


@dataclass(frozen=True)
class AdaptiveAccuracy(Accuracy):
    r"""As accurate as a step needs: both tolerances follow the error estimate, and tighten as the hypergradient vanishes.

    A step along a hypergradient `g` with error `e` lowers the outer loss as long as `‖e‖ < ‖g‖`. Each of the two parts of
    the estimate of `‖e‖` is steered to half of `relative_error ‖g‖`: after a step whose part was `k` times that, the
    tolerance of the next one is divided by `√k`, by `tighten_by` at most, or multiplied by `1/√k`, by `loosen_by` at most.
    The estimate varies several times from one step to the next; half of the way, on a log scale, averages over steps.
    Where there is no estimate (a method that makes none, an unsymmetric system) nothing says how loose a tolerance may be:
    the solvers' own hold.

    An estimate that is not certified is no measure of the error: short solves make it several times too large, long ones of
    an ill-conditioned system too small. `uncertified` times as much of it is allowed, so that products are not spent on it.

    Far from a minimum the theory fails before an estimate shows how far: a non-convex inner problem that is solved too
    loosely has an indefinite or nearly singular Hessian, and its linear systems cost most and are worth least. Therefore
    the inner tolerance never gets looser than the first solve ended, which is a careful one. Where a step has met negative
    curvature, or an inner part of the estimate that says nothing (`MEANINGLESS` times `‖g‖`), it becomes `tighten_by` times
    tighter for good; the linear part then says nothing either.

    Args:
        relative_error: the estimate that is aimed at, over the norm of the hypergradient. The estimate is 3 to 5 times the
            error (`python -m benchmarks.error_estimate`), so 1 asks for an error of a quarter of the hypergradient.
        uncertified: factor of `relative_error` where the estimate is not certified.
        first_inner: stationarity of the first inner solve, relative to that of its starting point; the solver's own `atol`
            where that is larger.
        first_linear: relative residual of the first linear solve.
        tighten_by: largest factor by which a tolerance gets tighter from one step to the next.
        loosen_by: largest factor by which it gets looser; smaller, as too loose a step costs more than too tight a one.

    References: Pedregosa (2016), "Hyperparameter optimization with approximate gradient"; Ehrhardt and Roberts (2021),
    "Inexact derivative-free optimization for bilevel learning"; Salehi et al. (2024), "An adaptively inexact first-order
    method for bilevel optimization with application to hyperparameter learning".
    """

    needs_estimate: ClassVar[bool] = True

    relative_error: float = 1.0
    uncertified: float = 2.0
    first_inner: float = 1e-7
    first_linear: float = 0.1
    tighten_by: float = 10.0
    loosen_by: float = 3.0

    def __post_init__(self) -> None:
        """Validate the numbers."""
        if not 0 < self.relative_error < math.inf:
            raise UsageError(f"AdaptiveAccuracy needs relative_error > 0, but got {self.relative_error}.")
        if not 1 <= self.uncertified < math.inf:
            raise UsageError(f"AdaptiveAccuracy needs uncertified >= 1, but got {self.uncertified}.")
        for name in ("first_inner", "first_linear"):
            if not 0 < getattr(self, name) < 1:
                raise UsageError(f"AdaptiveAccuracy needs {name} between 0 and 1, but got {getattr(self, name)}.")
        for name in ("tighten_by", "loosen_by"):
            if not 1 < getattr(self, name) < math.inf:
                raise UsageError(f"AdaptiveAccuracy needs {name} > 1, but got {getattr(self, name)}.")

    def init(self, params: Tensor) -> State:
        """No absolute tolerance is known before the first inner solve."""
        unknown = _number(math.nan)
        return {INNER: unknown, LOOSEST: unknown, TIGHTEST: unknown, LINEAR: _number(self.first_linear)}

    def tighten(self, solver: InnerSolver, state: State) -> InnerSolver:
        """The solver with this step's tolerance in the place of its own."""
        if INNER not in state:
            return solver
        atol = float(state[INNER])
        if math.isnan(atol):
            return replace(solver, rtol=max(solver.rtol, self.first_inner))
        return replace(solver, atol=atol, rtol=0.0)

    def linear_rtol(self, state: State) -> float | None:
        """This step's tolerance."""
        return float(state[LINEAR]) if LINEAR in state else None

    def update(self, state: State, result: Hypergradient) -> State:
        """Scale both tolerances by what their parts of the error should be over what they are."""
        receipt = result.receipt
        if LINEAR not in state or math.isnan(receipt.error_estimate):
            return {}
        inner, loosest, tightest, linear = (float(state[name]) for name in (INNER, LOOSEST, TIGHTEST, LINEAR))
        if math.isnan(inner) and receipt.stationarity > 0:
            inner = loosest = receipt.stationarity
            tightest = MIN_INNER * inner
        norm = float(torch.cat([part.flatten() for part in result.gradient.values()]).norm())
        rounding = rounding_level(result.params.shape[-1], result.params.dtype)
        if receipt.curvature_min < -rounding * abs(receipt.curvature_max) or receipt.error_inner > MEANINGLESS * norm:
            inner = loosest = max(min(inner, receipt.stationarity) / self.tighten_by, tightest)
        else:
            target = 0.5 * self.relative_error * norm * (1.0 if receipt.error_certified else self.uncertified)
            inner = max(min(inner * self._factor(target, receipt.error_inner), loosest), tightest)
            linear = min(max(linear * self._factor(target, receipt.error_linear), MIN_RTOL), MAX_RTOL)
        return {
            INNER: _number(inner),
            LOOSEST: _number(loosest),
            TIGHTEST: _number(tightest),
            LINEAR: _number(linear),
        }

    def _factor(self, target: float, part: float) -> float:
        """What a tolerance is multiplied by."""
        if not math.isfinite(part) or not math.isfinite(target) or target == 0:
            return 1.0
        return min(max((target / part) ** GAIN, 1 / self.tighten_by), self.loosen_by) if part > 0 else self.loosen_by


INNER, LINEAR = "accuracy.inner_atol", "accuracy.linear_rtol"
LOOSEST, TIGHTEST = "accuracy.inner_loosest", "accuracy.inner_tightest"
GAIN = 0.5  # of the way, on a log scale, that a tolerance goes in one step
MEANINGLESS = 10.0  # inner part of the error over the norm of the hypergradient
MIN_INNER = 1e-6  # stationarity over that of the first solve: nothing that is met at a better one is the inner solve's
MIN_RTOL, MAX_RTOL = 1e-12, 0.1  # below one digit, a residual says little about a solution


def _number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)
