"""The step of an inner solver as an update rule: what is carried over from step to step, and how it is differentiated."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from bilevel.errors import UsageError

if TYPE_CHECKING:
    from bilevel.solvers.solver import InnerSolver

State = dict[str, Any]


class UpdateRule(NamedTuple):
    """A step `(x, memory) <- T(x, memory, ∇f(x), θ)` that acts on each entry by itself and can be differentiated.

    Attributes:
        solver: a differentiable solver that makes this step.
        memory: the entries of its state that a step carries over, each shaped like `params` and each made of its own old
            value, `x` and the gradient; with these, and no fewer, a solution is a fixed point of the step.
        translate: its state at `x` from that of the solver that was run, `(state, x) -> state`; the same where that is the one.
    """

    solver: InnerSolver
    memory: tuple[str, ...]
    translate: Callable[[State, Tensor], State]


def unchanged(state: State, params: Tensor) -> State:
    """The translation of a solver that is its own update rule."""
    return state


def no_rule(came: str) -> UsageError:
    """The sentence about an inner solver without an update rule."""
    return UsageError(
        "SAMA and ImplicitUpdate need an inner solver whose step is an elementwise rule that they can differentiate, but "
        f"{came}: use Adam, GradientDescent, or TorchOptimizer with Adam, AdamW or SGD."
    )
