"""Adam with decoupled weight decay (AdamW), differentiable."""

from __future__ import annotations

import math
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
class Adam(InnerSolver):
    r"""`m <- β₁ m + (1 - β₁) g`, `v <- β₂ v + (1 - β₂) g²`, `x <- x - a (m̂ / (√v̂ + ε) + w x)`, with `g = ∇f(x)`.

    `m̂ = m / (1 - β₁^t)` and `v̂ = v / (1 - β₂^t)`; the same steps as `torch.optim.AdamW`. Every option is a number or the
    name of a hyperparameter, and a step can be recorded.

    Without decay a solution is a zero of `g`. With it a solution has `m = g` and `v = g²`, hence `g / (|g| + ε) + w x = 0`,
    or `F(x) = g + w x (|g| + ε) = 0`, so that `|x| < 1 / w`. An entry that the loss wants inside that bound has a `g` of the
    size of `ε`: the usual `1e-8` leaves the decay no effect there, and what AdamW's decay does in practice it does on the
    way. An entry that the loss wants outside is held just below the bound. The Jacobian of
    `F` is not symmetric: for `Implicit` choose GMRES or DenseLU, or `ImplicitUpdate`, whose system is. Stationarity is the
    norm of `F`.

    Args:
        max_steps: number of steps.
        atol: stop when the norm of `F` is at most this.
        rtol: stop as well when it is at most this times that of the starting point.
        learning_rate: `a`.
        beta1: `β₁` in [0, 1), how much of the first moment a step keeps: the momentum.
        beta2: `β₂` in [0, 1), how much of the second moment a step keeps.
        epsilon: `ε`, added to the root of the second moment.
        weight_decay: `w`, decoupled from the gradient.

    Reference: Kingma and Ba (2015), "Adam: a method for stochastic optimization"; Loshchilov and Hutter (2019), "Decoupled
        weight decay regularization"; Xie and Li (2024), "Implicit bias of AdamW: l∞ norm constrained optimization".

    Example:
        >>> objective = Objective(lambda x, h: (x ** 2).sum(-1) / 2)
        >>> solver, x = Adam(learning_rate=0.5), torch.tensor([1.0, -3.0])
        >>> with torch.no_grad():  # the first step has the learning rate's length
        ...     solver.step(x, solver.init(x, objective, {}), objective, {})[0]
        tensor([ 0.5000, -2.5000])
    """

    moves_solution: ClassVar[tuple[str, ...]] = ("weight_decay",)

    learning_rate: Option = 0.01
    beta1: Option = 0.9
    beta2: Option = 0.999
    epsilon: Option = 1e-8
    weight_decay: Option = 0.0

    def __post_init__(self) -> None:
        """Validate the numbers."""
        super().__post_init__()
        for name in ("learning_rate", "epsilon"):
            value = getattr(self, name)
            if isinstance(value, int | float) and not 0 < value < math.inf:
                raise UsageError(f"Adam needs {name} > 0, but got {value}.")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            if isinstance(value, int | float) and not 0 <= value < 1:
                raise UsageError(f"Adam needs {name} in [0, 1), but got {value}.")
        if isinstance(self.weight_decay, int | float) and not 0 <= self.weight_decay < math.inf:
            raise UsageError(f"Adam needs weight_decay >= 0, but got {self.weight_decay}.")

    def init(self, params: Tensor, loss: Objective, hparams: Hparams) -> State:
        """No moments."""
        nothing = torch.zeros_like(params)
        count = torch.zeros((), dtype=torch.int64)
        return {**fresh_state(params), "first_moment": nothing, "second_moment": nothing, "count": count}

    def step(self, params: Tensor, state: State, loss: Objective, hparams: Hparams) -> tuple[Tensor, State]:
        """One step."""
        beta1, beta2 = option(self.beta1, hparams), option(self.beta2, hparams)
        gradient = loss.gradient(params, hparams)
        first = beta1 * state["first_moment"] + (1 - beta1) * gradient
        second = beta2 * state["second_moment"] + (1 - beta2) * gradient.square()
        count = state["count"] + 1
        number = int(count)  # as a number: a power of Python's floats is rounded less than one of float32 tensors
        scale = _root(second / (1 - beta2**number)) + option(self.epsilon, hparams)
        direction = first / (1 - beta1**number) / scale + option(self.weight_decay, hparams) * params
        return params - option(self.learning_rate, hparams) * direction, {
            **state,
            "first_moment": first,
            "second_moment": second,
            "count": count,
            "stationarity": row_norm(self._residual(gradient, params, hparams)),
            "num_gradients": state["num_gradients"] + 1,
        }

    def conditions(self, loss: Objective) -> Objective:
        """The gradient of the loss, or `g + w x (|g| + ε)` with decay."""
        if self.weight_decay == 0:
            return loss
        return Objective(optimality=lambda x, hparams: self._residual(loss.gradient(x, hparams), x, hparams))

    def update_rule(self) -> UpdateRule:
        """Its own."""
        return UpdateRule(self, ("first_moment", "second_moment"), unchanged)

    def _residual(self, gradient: Tensor, params: Tensor, hparams: Hparams) -> Tensor:
        decay = option(self.weight_decay, hparams) * params
        return gradient + decay * (gradient.abs() + option(self.epsilon, hparams))


def _root(square: Tensor) -> Tensor:
    """`√v`, with the derivative 0 where `v` is 0: all gradients were zero there, and so is the moment that it divides."""
    positive = square > 0
    return torch.where(positive, torch.where(positive, square, 1.0).sqrt(), 0.0)
