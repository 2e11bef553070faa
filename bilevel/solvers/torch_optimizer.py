"""Any optimiser of `torch.optim` as an inner solver."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from bilevel.solvers.objective import Hparams, Objective
from bilevel.solvers.solver import InnerSolver, State, fresh_state, row_norm


def _adam(params: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.Adam(params)


@dataclass(frozen=True)
class TorchOptimizer(InnerSolver):
    """Adapter for `torch.optim`; not differentiable, since those optimisers work in place outside the graph.

    Args:
        max_steps: number of steps.
        atol: stop when the gradient norm is at most this.
        rtol: stop as well when it is at most this times that of the starting point.
        optimizer: makes the optimiser from a list of tensors, for instance `partial(torch.optim.Adam, lr=1e-2)`.

    Example:
        >>> from functools import partial
        >>> objective = Objective(lambda x, h: (x ** 2).sum(-1) / 2)
        >>> solver, x = TorchOptimizer(optimizer=partial(torch.optim.SGD, lr=0.5)), torch.ones(1)
        >>> solver.step(x, solver.init(x, objective, {}), objective, {})[0]
        tensor([0.5000])
    """

    differentiable: ClassVar[bool] = False

    optimizer: Callable[..., torch.optim.Optimizer] = _adam

    def init(self, params: Tensor, loss: Objective, hparams: Hparams) -> State:
        """The state of a fresh optimiser."""
        leaf = params.detach().clone().requires_grad_()
        return {**fresh_state(params), "optimizer": self.optimizer([leaf]).state_dict()}

    def step(self, params: Tensor, state: State, loss: Objective, hparams: Hparams) -> tuple[Tensor, State]:
        """One step of the optimiser, which may evaluate the gradient several times (`torch.optim.LBFGS`)."""
        leaf = params.detach().clone().requires_grad_()
        optimizer = self.optimizer([leaf])
        optimizer.load_state_dict(
            copy.deepcopy(state["optimizer"])
        )  # it works in place; the state given stays as it was
        seen: list[Tensor] = []

        def closure() -> Any:
            with torch.no_grad():
                if loss.loss is None:
                    value, gradient = torch.zeros(()), loss.gradient(leaf.detach(), hparams)
                else:
                    value, gradient = loss.value_and_gradient(leaf.detach(), hparams)
            leaf.grad = gradient
            seen.append(row_norm(gradient))
            return value.sum()

        optimizer.step(closure)
        return leaf.detach(), {
            **state,
            "optimizer": optimizer.state_dict(),
            "stationarity": seen[-1],
            "num_gradients": state["num_gradients"] + len(seen),
        }
