"""Gradient descent with momentum."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.errors import UsageError
from bilevel.solvers.objective import Hparams, Objective
from bilevel.solvers.solver import InnerSolver, State, fresh_state, option, row_norm


@dataclass(frozen=True)
class GradientDescent(InnerSolver):
    r"""`v <- momentum v + ∇f(x)`, `x <- x - learning_rate v` (heavy ball; plain gradient descent without momentum).

    Args:
        max_steps: number of steps.
        atol: stop when the gradient norm is at most this.
        rtol: stop as well when it is at most this times that of the starting point.
        learning_rate: a number, or the name of the hyperparameter that holds it.
        momentum: a number in [0, 1), or the name of a hyperparameter.

    Reference: Polyak (1964), "Some methods of speeding up the convergence of iteration methods".

    Example:
        >>> objective = Objective(lambda x, h: (x ** 2).sum(-1) / 2)
        >>> solver = GradientDescent(learning_rate=0.5)
        >>> x = torch.ones(1)
        >>> with torch.no_grad():
        ...     solver.step(x, solver.init(x, objective, {}), objective, {})[0]
        tensor([0.5000])
    """

    learning_rate: float | str = 0.1
    momentum: float | str = 0.0

    def __post_init__(self) -> None:
        """Validate the numbers."""
        super().__post_init__()
        if not isinstance(self.learning_rate, str) and not 0 < self.learning_rate < float("inf"):
            raise UsageError(f"GradientDescent needs learning_rate > 0, but got {self.learning_rate}.")
        if not isinstance(self.momentum, str) and not 0 <= self.momentum < 1:
            raise UsageError(f"GradientDescent needs momentum in [0, 1), but got {self.momentum}.")

    def init(self, params: Tensor, loss: Objective, hparams: Hparams) -> State:
        """No velocity."""
        return {**fresh_state(params), "velocity": torch.zeros_like(params)}

    def step(self, params: Tensor, state: State, loss: Objective, hparams: Hparams) -> tuple[Tensor, State]:
        """One step."""
        gradient = loss.gradient(params, hparams)
        velocity = option(self.momentum, hparams) * state["velocity"] + gradient
        params = params - option(self.learning_rate, hparams) * velocity
        counted = state["num_gradients"] + 1
        return params, {
            **state,
            "velocity": velocity,
            "stationarity": row_norm(gradient),
            "num_gradients": counted,
        }
