"""Limited-memory BFGS for a batch of systems."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bilevel.errors import UsageError
from bilevel.linalg import IdentityOperator, InverseBFGS
from bilevel.linalg.lbfgs import Pairs
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
        first_length: largest length of the first step, which is along the gradient: nothing is known of the curvature yet.
            One that is too long costs an evaluation for each halving.

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
    first_length: float = 1.0

    def __post_init__(self) -> None:
        """Validate the numbers."""
        super().__post_init__()
        if self.history < 1:
            raise UsageError(f"LBFGS needs history >= 1, but got {self.history}.")
        if not 0 < self.first_length < float("inf"):
            raise UsageError(f"LBFGS needs first_length > 0, but got {self.first_length}.")

    def init(self, params: Tensor, loss: Objective, hparams: Hparams) -> State:
        """Value and gradient at the start; no pairs."""
        with torch.no_grad():
            value, gradient = loss.value_and_gradient(params, hparams)
        size = row_norm(gradient)
        state = {**fresh_state(params), "value": value, "gradient": gradient, **_kept(Pairs.none(params))}
        return {
            **state,
            "stationarity": size,
            "first_stationarity": size,
            "num_gradients": torch.ones((), dtype=torch.int64),
            "over": torch.zeros_like(size, dtype=torch.bool),
        }

    def step(self, params: Tensor, state: State, loss: Objective, hparams: Hparams) -> tuple[Tensor, State]:
        """A product with the approximate inverse Hessian, and a line search."""
        with torch.no_grad():
            start = Point(params, state["value"], state["gradient"])
            scale = self.first_length / row_norm(start.gradient).clamp(min=self.first_length)  # before there is a pair
            pairs = Pairs(state["s"], state["y"], state["sy"], state["yy"], state["rooms"])
            like = IdentityOperator(params.shape[-1], params.shape[:-1], dtype=params.dtype, device=params.device)
            direction = -InverseBFGS(like, pairs, scale=scale).mv(start.gradient)
            over = self.done(state) | state["over"]  # these would have all others evaluated until their search gives up
            direction = torch.where(over.unsqueeze(-1), 0.0, direction)
            end, moved, trials = search(loss, start, direction, hparams)
            pairs = pairs.append(end.params - start.params, end.gradient - start.gradient, self.history)
            return end.params, {
                **state,
                "value": end.value,
                "gradient": end.gradient,
                **_kept(pairs),
                "stationarity": row_norm(end.gradient),
                "num_gradients": state["num_gradients"] + trials,
                "over": ~moved,  # nor would it from here at the next step
                "stuck": ~moved.any(),
            }


def _kept(pairs: Pairs) -> State:
    """The pairs' part of the state."""
    return {"s": pairs.steps, "y": pairs.changes, "sy": pairs.products, "yy": pairs.lengths, "rooms": pairs.rooms}
