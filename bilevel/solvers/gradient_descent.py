"""Gradient descent with momentum and weight decay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bilevel.errors import UsageError
from bilevel.solvers.objective import Hparams, Objective
from bilevel.solvers.options import Option, option
from bilevel.solvers.solver import InnerSolver, State, fresh_state, row_norm
from bilevel.solvers.update_rule import UpdateRule, unchanged


@dataclass(frozen=True)
class GradientDescent(InnerSolver):
    r"""`v <- momentum v + ∇f(x) + w x`, `x <- x - learning_rate v`, with `w` the weight decay.

    Heavy ball, and plain gradient descent without momentum. The decay is that of `torch.optim.SGD`, the same as a penalty
    `w ‖x‖² / 2`: a solution is a zero of `∇f(x) + w x`, whose norm the stationarity is.

    Args:
        max_steps: number of steps.
        atol: stop when the gradient norm is at most this.
        rtol: stop as well when it is at most this times that of the starting point.
        learning_rate: a number, or the name of the hyperparameter that holds it.
        momentum: a number in [0, 1), or the name of a hyperparameter.
        weight_decay: `w`, a number, or the name of a hyperparameter.

    Reference: Polyak (1964), "Some methods of speeding up the convergence of iteration methods".

    Example:
        >>> objective = Objective(lambda x, h: (x ** 2).sum(-1) / 2)
        >>> solver = GradientDescent(learning_rate=0.5)
        >>> x = torch.ones(1)
        >>> with torch.no_grad():
        ...     solver.step(x, solver.init(x, objective, {}), objective, {})[0]
        tensor([0.5000])
    """

    moves_solution: ClassVar[tuple[str, ...]] = ("weight_decay",)

    learning_rate: Option = 0.1
    momentum: Option = 0.0
    weight_decay: Option = 0.0

    def __post_init__(self) -> None:
        """Validate the numbers."""
        super().__post_init__()
        if isinstance(self.learning_rate, int | float) and not 0 < self.learning_rate < float("inf"):
            raise UsageError(f"GradientDescent needs learning_rate > 0, but got {self.learning_rate}.")
        if isinstance(self.momentum, int | float) and not 0 <= self.momentum < 1:
            raise UsageError(f"GradientDescent needs momentum in [0, 1), but got {self.momentum}.")
        if isinstance(self.weight_decay, int | float) and not 0 <= self.weight_decay < float("inf"):
            raise UsageError(f"GradientDescent needs weight_decay >= 0, but got {self.weight_decay}.")

    def init(self, params: Tensor, loss: Objective, hparams: Hparams) -> State:
        """No velocity."""
        return {**fresh_state(params), "velocity": torch.zeros_like(params)}

    def step(self, params: Tensor, state: State, loss: Objective, hparams: Hparams) -> tuple[Tensor, State]:
        """One step."""
        gradient = loss.gradient(params, hparams)
        if self.weight_decay != 0:
            gradient = gradient + option(self.weight_decay, hparams) * params
        still = isinstance(self.momentum, int | float) and self.momentum == 0  # a pass over all tasks' params less
        velocity = gradient if still else option(self.momentum, hparams) * state["velocity"] + gradient
        rate = option(self.learning_rate, hparams)
        if isinstance(rate, Tensor):
            params = torch.addcmul(params, rate, velocity, value=-1)
        else:
            params = torch.add(params, velocity, alpha=-rate)
        counted = state["num_gradients"] + 1
        return params, {
            **state,
            "velocity": velocity,
            "stationarity": row_norm(gradient),
            "num_gradients": counted,
        }

    def conditions(self, loss: Objective) -> Objective:
        """The loss plus the decay's penalty, or the optimality plus its gradient."""
        if self.weight_decay == 0:
            return loss
        value, optimality = loss.loss, loss.optimality

        def penalised(params: Tensor, hparams: Hparams) -> Tensor:
            assert value is not None
            return value(params, hparams) + (option(self.weight_decay, hparams) * params.square()).sum(-1) / 2

        def decayed(params: Tensor, hparams: Hparams) -> Tensor:
            assert optimality is not None
            return optimality(params, hparams) + option(self.weight_decay, hparams) * params

        return Objective(penalised if value else None, decayed if optimality else None)

    def update_rule(self) -> UpdateRule:
        """Its own."""
        return UpdateRule(self, ("velocity",), unchanged)
