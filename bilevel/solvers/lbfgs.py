"""Limited-memory BFGS for a batch of systems."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bilevel.errors import UsageError
from bilevel.linalg.lbfgs import two_loop
from bilevel.solvers.line_search import Point, search
from bilevel.solvers.objective import Hparams, Objective
from bilevel.solvers.solver import InnerSolver, State, fresh_state, row_norm


@dataclass(frozen=True)
class LBFGS(InnerSolver):
    r"""L-BFGS with backtracking; every system of a batch has its own curvature pairs and its own step size.

    Pairs with `s'y <= 0` are left out, so that the approximation stays positive definite. Needs the full batch.

    Args:
        max_steps: largest number of steps.
        atol: stop when the gradient norm is at most this.
        rtol: stop as well when it is at most this times that of the starting point.
        history: number of curvature pairs.

    Reference: Liu and Nocedal (1989), "On the limited memory BFGS method for large scale optimization".

    Example:
        >>> from bilevel.solvers import run
        >>> objective = Objective(lambda x, h: ((x - 1) ** 2 * torch.tensor([1.0, 50.0])).sum(-1))
        >>> solution = run(LBFGS(atol=1e-4), objective, torch.zeros(2), {})
        >>> solution.result.name
        'converged'
    """

    differentiable: ClassVar[bool] = False
    full_batch: ClassVar[bool] = True

    history: int = 10

    def __post_init__(self) -> None:
        """Validate the numbers."""
        super().__post_init__()
        if self.history < 1:
            raise UsageError(f"LBFGS needs history >= 1, but got {self.history}.")

    def init(self, params: Tensor, loss: Objective, hparams: Hparams) -> State:
        """Value and gradient at the start; no pairs."""
        with torch.no_grad():
            value, gradient = loss.value_and_gradient(params, hparams)
        empty = params.new_zeros(0, *params.shape)
        size = row_norm(gradient)
        state = {**fresh_state(params), "value": value, "gradient": gradient, "s": empty, "y": empty}
        return {
            **state,
            "stationarity": size,
            "first_stationarity": size,
            "num_gradients": torch.ones((), dtype=torch.int64),
        }

    def step(self, params: Tensor, state: State, loss: Objective, hparams: Hparams) -> tuple[Tensor, State]:
        """Two-loop recursion and a line search."""
        with torch.no_grad():
            start = Point(params, state["value"], state["gradient"])
            scale = 1.0 / row_norm(start.gradient).clamp(min=1.0)  # before there is a pair: a step of length 1 at most
            direction = -two_loop(start.gradient, state["s"], state["y"], scale)
            end, moved, trials = search(loss, start, direction, hparams)
            s, y = end.params - start.params, end.gradient - start.gradient
            keep = slice(-self.history, None)
            return end.params, {
                **state,
                "value": end.value,
                "gradient": end.gradient,
                "s": torch.cat([state["s"], s.unsqueeze(0)])[keep],
                "y": torch.cat([state["y"], y.unsqueeze(0)])[keep],
                "stationarity": row_norm(end.gradient),
                "num_gradients": state["num_gradients"] + trials,
                "stuck": ~moved.any(),
            }
