"""What to do where the inner solve ends short of its tolerance: the theorem wants a solution."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

from torch import Tensor

from bilevel.batches import StepBatches
from bilevel.errors import ConvergenceWarning, NumericalError, UsageError
from bilevel.flat import FlatProblem
from bilevel.hypergradient.method import Hypergradient, solve_inner
from bilevel.hypergradient.unrolled import Unrolled
from bilevel.solvers import InnerResult, InnerSolution, InnerSolver


class OuterStep(NamedTuple):
    """What an inner solve was made of.

    Attributes:
        problem: the problem between vectors.
        solver: the inner solver.
        hparams: natural units.
        batches: the batches of this outer step.
    """

    problem: FlatProblem
    solver: InnerSolver
    hparams: Mapping[str, Tensor]
    batches: StepBatches


class Unconverged(ABC):
    """A policy for inner solves that are usable, but neither converged nor a spent budget.

    Attributes:
        records_steps: whether the inner solver's steps have to be differentiable.
    """

    records_steps: ClassVar[bool] = False

    def check(self, solver: InnerSolver) -> None:
        """Raise `UsageError` when the inner solver cannot serve this policy."""
        if self.records_steps and not solver.differentiable:
            raise UsageError(
                f"the policy {type(self).__name__} records inner steps, but {type(solver).__name__} is not differentiable: "
                "use GradientDescent, ProximalGradient, AndersonAcceleration or Adam, or unconverged=more_steps."
            )

    @abstractmethod
    def handle(self, step: OuterStep, inner: InnerSolution) -> InnerSolution | Hypergradient:
        """A better inner solution (or the same), or a hypergradient that needs no solution.

        Raises:
            NumericalError: the policy is to stop.
        """


def settle(policy: Unconverged, step: OuterStep, inner: InnerSolution) -> InnerSolution | Hypergradient:
    """Ask the policy, where there is something to ask.

    With minibatches no solve gets to a tolerance: the stationarity is one batch's, and the steps are a budget.
    """
    if inner.result.successful or not inner.result.usable or step.batches.stochastic:
        return inner
    return policy.handle(step, inner)


@dataclass(frozen=True)
class Raise(Unconverged):
    """Stop."""

    def handle(self, step: OuterStep, inner: InnerSolution) -> InnerSolution | Hypergradient:
        """Raise `NumericalError`."""
        raise NumericalError(_sentence(step, inner, "or choose unconverged=more_steps, warn or truncated_unroll"))


@dataclass(frozen=True)
class Warn(Unconverged):
    """Say so and go on: the receipt, the trackers and a `ConvergenceWarning` tell it."""

    def handle(self, step: OuterStep, inner: InnerSolution) -> InnerSolution | Hypergradient:
        """Warn."""
        warnings.warn(_sentence(step, inner, "or start closer"), ConvergenceWarning, stacklevel=2)
        return inner


@dataclass(frozen=True)
class MoreSteps(Unconverged):
    """Give the solver its number of steps again, up to `max_rounds` times; a solver that is stuck is left alone.

    Args:
        max_rounds: how often.
    """

    max_rounds: int = 5

    def __post_init__(self) -> None:
        """Validate the number."""
        if self.max_rounds < 1:
            raise UsageError(f"MoreSteps needs max_rounds >= 1, but got {self.max_rounds}.")

    def handle(self, step: OuterStep, inner: InnerSolution) -> InnerSolution | Hypergradient:
        """Go on from the solver's state, so that the rounds make one long solve."""
        for _ in range(self.max_rounds):
            if inner.result is not InnerResult.max_steps:
                break
            further = solve_inner(*step[:2], inner.params, *step[2:], offset=inner.num_steps, state=inner.state)
            inner = replace(further, num_steps=inner.num_steps + further.num_steps)
        if not inner.result.successful:
            warnings.warn(_sentence(step, inner, "or more rounds"), ConvergenceWarning, stacklevel=2)
        return inner


@dataclass(frozen=True)
class TruncatedUnroll(Unconverged):
    """Differentiate `last` further inner steps instead of applying the theorem; biased.

    Args:
        last: number of recorded steps.

    Reference: Shaban et al. (2019), "Truncated back-propagation for bilevel optimization".
    """

    records_steps: ClassVar[bool] = True

    last: int = 10

    def __post_init__(self) -> None:
        """Validate the number."""
        if self.last < 1:
            raise UsageError(f"TruncatedUnroll needs last >= 1, but got {self.last}.")

    def handle(self, step: OuterStep, inner: InnerSolution) -> InnerSolution | Hypergradient:
        """Unroll from the iterate that was reached."""
        solver = replace(step.solver, max_steps=self.last)
        result = Unrolled().further(step.problem, solver, inner, step.hparams, step.batches)
        receipt = replace(
            result.receipt,
            inner_steps=inner.num_steps + result.receipt.inner_steps,
            biased=(
                f"the inner solve ended with {inner.result.name}: its last {result.receipt.inner_steps} steps are unrolled",
            ),
        )
        return replace(result, receipt=receipt)


def _sentence(step: OuterStep, inner: InnerSolution, otherwise: str) -> str:
    return (
        f"the inner solve was expected to reach atol={step.solver.atol:g} (rtol={step.solver.rtol:g}), but ended with "
        f"{inner.result.name} after {inner.num_steps} steps at a gradient norm of {inner.stationarity:.3g}: allow more "
        f"steps, a looser tolerance, another solver, {otherwise}."
    )
