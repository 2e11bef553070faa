"""Newton's method with conjugate gradient for the step (truncated Newton), within a trust region."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bilevel.linalg import HessianOperator
from bilevel.solvers.line_search import Point, search
from bilevel.solvers.objective import Hparams, Objective
from bilevel.solvers.solver import InnerSolver, State, fresh_state, row_norm
from bilevel.solvers.trust_region import next_radius, truncated_cg


@dataclass(frozen=True)
class NewtonCG(InnerSolver):
    r"""Newton-CG: `H d = -∇f` solved to `min(1/2, √‖∇f‖)`, which makes it superlinear, within a trust region.

    Where CG meets negative curvature it follows it to the boundary of the region, of which every system of a batch has its
    own, from the first failure or negative curvature on. A step that does not lower the loss is halved by a line search.
    Each step costs one gradient with its graph, a few Hessian-vector products and the line search. Needs the full batch.

    Args:
        max_steps: largest number of Newton steps.
        atol: stop when the gradient norm is at most this.
        rtol: stop as well when it is at most this times that of the starting point.
        max_products: largest number of Hessian-vector products a step.

    References: Dembo and Steihaug (1983), "Truncated-Newton algorithms for large-scale unconstrained optimization"; Steihaug
    (1983), "The conjugate gradient method and trust regions in large scale optimization".

    Example:
        >>> from bilevel.solvers import run
        >>> objective = Objective(lambda x, h: (x ** 4 + x ** 2).sum(-1))
        >>> run(NewtonCG(), objective, torch.ones(3), {}).result.name
        'converged'
    """

    differentiable: ClassVar[bool] = False
    full_batch: ClassVar[bool] = True

    max_products: int = 200

    def init(self, params: Tensor, loss: Objective, hparams: Hparams) -> State:
        """Nothing is known before the first step: no bound on it."""
        state = fresh_state(params)
        return {**state, "radius": torch.full_like(state["stationarity"], torch.inf)}

    def step(self, params: Tensor, state: State, loss: Objective, hparams: Hparams) -> tuple[Tensor, State]:
        """One Newton step; from a stationary point it does not move."""
        with torch.enable_grad():
            leaf = params.detach().requires_grad_()
            value, gradient = loss.value_and_gradient(leaf, hparams)
        hessian = HessianOperator.from_gradient(gradient, leaf)
        with torch.no_grad():
            start = Point(params, value.detach(), gradient.detach())
            size = row_norm(start.gradient)
            counted = {
                "first_stationarity": size,  # unless the state has it already
                **state,
                "stationarity": size,
                "num_gradients": state["num_gradients"] + 1,
            }
            solved = self.done(counted)  # these stay where they are
            if bool(solved.all()):
                return params, counted
            tolerance = (size * size.sqrt().clamp(max=0.5)).masked_fill(solved, torch.inf)
            model = truncated_cg(hessian, start.gradient, state["radius"], tolerance, self.max_products)
            end, moved, trials = search(loss, start, model.direction, hparams)
            # Both gradients are rounded in their own way: near rounding level one that seems lower may be no progress.
            gained = moved & ((end.value < start.value) | (row_norm(end.gradient) < state["stationarity"]))
            radius = next_radius(state["radius"], start, end, model)
            return end.params, {
                **counted,
                "stationarity": row_norm(end.gradient),
                "num_gradients": counted["num_gradients"] + trials,
                "num_mv": state["num_mv"] + model.num_mv,
                "radius": radius,
                "stuck": ~(gained | (radius < state["radius"])).any(),  # a smaller region turns the step
            }
