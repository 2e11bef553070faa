"""Proximal gradient with acceleration, for a smooth loss plus a term with a cheap proximal map."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from bilevel.errors import UsageError
from bilevel.solvers.objective import Hparams, Objective
from bilevel.solvers.options import Option, option
from bilevel.solvers.proximal import Polyhedral, Proximal, SoftThreshold
from bilevel.solvers.solver import InnerSolver, State, fresh_state, row_norm


@dataclass(frozen=True)
class ProximalGradient(InnerSolver):
    r"""FISTA with restart: `x <- prox(y - a ∇f(y), a)`, `y` the extrapolated point.

    The inner loss is the smooth part `f` alone. Stationarity is the norm of the gradient mapping `(y - x) / a`. The
    momentum of a system restarts when its step turns against it (O'Donoghue and Candès, 2015).

    The implicit function theorem is applied to the free entries of a solution (see `Polyhedral`), whose Hessian is symmetric;
    for another proximal term a solution is a root of `F(x) = (x - prox(x - a ∇f(x), a)) / a`, whose Jacobian is not: choose
    GMRES, BiCGStab, LSMR or DenseLU then. Derivatives exist where the active set does not change.

    Args:
        max_steps: largest number of steps.
        atol: stop when the norm of the gradient mapping is at most this.
        rtol: stop as well when it is at most this times that of the starting point.
        proximal: the non-smooth term.
        learning_rate: `a`, at most the inverse of the largest curvature of `f`; or the name of a hyperparameter.

    Reference: Beck and Teboulle (2009), "A fast iterative shrinkage-thresholding algorithm".

    Example:
        >>> from bilevel.solvers import run
        >>> objective = Objective(lambda x, h: ((x - torch.tensor([3.0, 0.5])) ** 2).sum(-1) / 2)
        >>> solver = ProximalGradient(proximal=SoftThreshold(1.0), learning_rate=0.5)
        >>> [round(v, 3) for v in run(solver, objective, torch.zeros(2), {}).params.tolist()]
        [2.0, 0.0]
    """

    composite: ClassVar[bool] = True

    proximal: Proximal = field(default_factory=SoftThreshold)
    learning_rate: Option = 0.1

    def __post_init__(self) -> None:
        """Validate the numbers."""
        super().__post_init__()
        if isinstance(self.learning_rate, int | float) and not 0 < self.learning_rate < float("inf"):
            raise UsageError(f"ProximalGradient needs learning_rate > 0, but got {self.learning_rate}.")

    @property
    def polyhedral(self) -> Polyhedral | None:
        """The proximal term, where it is piecewise linear."""
        return self.proximal if isinstance(self.proximal, Polyhedral) else None

    def conditions(self, loss: Objective) -> Objective:
        """The fixed-point residual; its roots do not depend on the learning rate, which is a constant in it."""

        def residual(params: Tensor, hparams: Hparams) -> Tensor:
            size = option(self.learning_rate, hparams)
            size = size.detach() if isinstance(size, Tensor) else size
            gradient = loss.gradient(params, hparams)
            return (params - self.proximal.prox(params - size * gradient, size, hparams)) / size

        return Objective(optimality=residual)

    def init(self, params: Tensor, loss: Objective, hparams: Hparams) -> State:
        """No momentum."""
        return {**fresh_state(params), "point": params, "inertia": torch.ones_like(fresh_state(params)["stationarity"])}

    def step(self, params: Tensor, state: State, loss: Objective, hparams: Hparams) -> tuple[Tensor, State]:
        """One accelerated step."""
        size, point, inertia = option(self.learning_rate, hparams), state["point"], state["inertia"]
        gradient = loss.gradient(point, hparams)
        new = self.proximal.prox(point - size * gradient, size, hparams)
        against = torch.linalg.vecdot((point - new).detach(), (new - params).detach()) > 0
        inertia = torch.where(against, 1.0, inertia)
        next_inertia = (1 + torch.sqrt(1 + 4 * inertia**2)) / 2
        momentum = torch.where(against, 0.0, (inertia - 1) / next_inertia)
        extrapolated = new + momentum.unsqueeze(-1) * (new - params)
        return new, {
            **state,
            "point": extrapolated,
            "inertia": torch.where(against, 1.0, next_inertia),
            "stationarity": row_norm((point - new) / size),
            "num_gradients": state["num_gradients"] + 1,
        }
