"""What methods of single steps share: who makes them, how their sizes fall, and what a receipt says of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from bilevel.errors import UsageError
from bilevel.hypergradient.method import HypergradientMethod
from bilevel.solvers import GradientDescent, InnerSolver

TRACKED = "params and what the hypergradient is made of follow by single steps, and are no solutions"


def fall(step: int, exponent: float) -> float:
    """What step sizes are multiplied by in an outer step: `(step + 1)^-exponent`.

    Example:
        >>> [fall(step, 0.5) for step in (0, 3)]
        [1.0, 0.5]
    """
    return float((step + 1) ** -exponent)


def plain_rate(name: str, solver: InnerSolver) -> float:
    """The learning rate of plain gradient descent, the only solver whose steps these methods can share.

    Args:
        name: of the method, for the message.
        solver: the inner solver.

    Raises:
        UsageError: it is another solver, has momentum, a tolerance, or a hyperparameter for its learning rate.
    """
    if not isinstance(solver, GradientDescent):
        raise UsageError(
            f"{name} steps along gradients of minibatches, but {type(solver).__name__} does more: use solver=gradient_descent."
        )
    if isinstance(solver.learning_rate, bool) or not isinstance(solver.learning_rate, int | float):
        raise UsageError(
            f"{name} needs a number for solver.learning_rate, but it is {solver.learning_rate!r}: use hypergradient=unrolled "
            "for an option that is a hyperparameter."
        )
    if solver.momentum != 0:
        raise UsageError(f"{name} forgets velocities between outer steps: use solver.momentum=0.")
    if solver.atol or solver.rtol:
        raise UsageError(
            f"{name} makes all its inner steps, and the gradient of a minibatch says nothing of convergence: use "
            "solver.atol=0 and solver.rtol=0."
        )
    return float(solver.learning_rate)


@dataclass(frozen=True)
class MinibatchSteps(HypergradientMethod):
    """A method that makes the inner solver's steps itself, or some of them, along gradients of minibatches."""

    def check(self, solver: InnerSolver) -> None:
        """Refuse an inner solver whose steps are no steps along gradients of minibatches."""
        super().check(solver)
        self.rate(solver)

    def rate(self, solver: InnerSolver) -> float:
        """The learning rate of the inner solver's steps; raises `UsageError` as `plain_rate` does."""
        return plain_rate(type(self).__name__, solver)

    def check_numbers(self, *, positive: tuple[str, ...] = (), not_negative: tuple[str, ...] = ()) -> None:
        """Refuse settings out of their range.

        Args:
            positive: names of those above 0.
            not_negative: names of those of at least 0.

        Raises:
            UsageError: one is not, or is not finite.
        """
        for name in positive + not_negative:
            value, zero_too = getattr(self, name), name in not_negative
            if not 0 <= value < float("inf") or (value == 0 and not zero_too):
                raise UsageError(f"{type(self).__name__} needs {name} {'>=' if zero_too else '>'} 0, but got {value}.")


def check_single(name: str, solver: InnerSolver) -> None:
    """Refuse an inner solver that would make more than one step.

    Raises:
        UsageError: it would.
    """
    if solver.max_steps != 1:
        raise UsageError(
            f"{name} moves params by one step in each outer step, but solver.max_steps is {solver.max_steps}: use "
            "solver.max_steps=1, or AmIGO for more."
        )


def described(gradient: Tensor, num_gradients: int, *, num_mv: int = 0, **facts: Any) -> dict[str, Any]:
    """Entries of a receipt.

    Args:
        gradient: the latest inner gradient, of a minibatch.
        num_gradients: inner gradients of minibatches.
        num_mv: Hessian-vector products of minibatches.
        **facts: further entries.
    """
    return {
        "stationarity": float(gradient.detach().norm(dim=-1).max()),
        "inner_steps": 1,
        "inner_gradients": num_gradients,
        "inner_result": "budget_spent",
        "num_mv": num_mv,
        "biased": (TRACKED,),
        **facts,
    }
