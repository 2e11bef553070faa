"""Newton's method with conjugate gradient for the step (truncated Newton)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bilevel.linalg import ConjugateGradient, HessianOperator
from bilevel.solvers.line_search import Point, search
from bilevel.solvers.objective import Hparams, Objective
from bilevel.solvers.solver import InnerSolver, State, fresh_state, row_norm


@dataclass(frozen=True)
class NewtonCG(InnerSolver):
    r"""Newton-CG: `H d = -∇f` solved to `min(1/2, √‖∇f‖)`, which makes it superlinear, then a line search.

    Where CG meets negative curvature its last iterate is taken if the model is less steep there, else steepest descent.
    Each step costs one gradient with its graph, a few Hessian-vector products and the line search. Needs the full batch.

    Args:
        max_steps: largest number of Newton steps.
        atol: stop when the gradient norm is at most this.
        rtol: stop as well when it is at most this times that of the starting point.
        max_products: largest number of Hessian-vector products a step.

    Reference: Dembo and Steihaug (1983), "Truncated-Newton algorithms for large-scale unconstrained optimization".

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
        """Nothing is known before the first step."""
        return fresh_state(params)

    def step(self, params: Tensor, state: State, loss: Objective, hparams: Hparams) -> tuple[Tensor, State]:
        """One Newton step; from a stationary point it does not move."""
        function = loss.loss
        if function is None:
            loss.value_and_gradient(params, hparams)  # raises: there is no loss
        assert function is not None
        with torch.no_grad():
            value = torch.zeros(())

            def recorded(x: Tensor) -> Tensor:
                nonlocal value
                value = function(x, hparams)
                return value

            hessian = HessianOperator(recorded, params)
            start = Point(params, value.detach(), hessian.gradient.detach())
            size = row_norm(start.gradient)
            counted = {
                "first_stationarity": size,  # unless the state has it already
                **state,
                "stationarity": size,
                "num_gradients": state["num_gradients"] + 1,
            }
            if bool((size <= self.atol).all()):
                return params, counted
            forcing = float(size.sqrt().clamp(max=0.5).min())
            solver = ConjugateGradient(rtol=min(0.5, forcing), max_steps=self.max_products)
            solution = solver.compute(solver.init(hessian), -start.gradient)
            # Cut short by negative curvature, CG may stand where the model is steeper than at its start.
            steepest = (solution.value == 0).all(-1) | (solution.residual_norm >= size)
            direction = torch.where(steepest.unsqueeze(-1), -start.gradient, solution.value)
            end, moved, trials = search(loss, start, direction, hparams)
            # Both gradients are rounded in their own way: near rounding level one that seems lower may be no progress.
            gained = moved & ((end.value < start.value) | (row_norm(end.gradient) < state["stationarity"]))
            return end.params, {
                **counted,
                "stationarity": row_norm(end.gradient),
                "num_gradients": counted["num_gradients"] + trials,
                "num_mv": state["num_mv"] + int(solution.num_mv.max()),
                "stuck": ~gained.any(),
            }
