"""The hypergradient by the implicit function theorem: one linear solve at the inner solution."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bilevel.flat import FlatProblem, StepBatches
from bilevel.hypergradient.method import (
    Hypergradient,
    HypergradientMethod,
    MethodState,
    describe,
    outer_gradients,
    solve_inner,
    starting_point,
)
from bilevel.linalg import ConjugateGradient, LinearSolver
from bilevel.linearisation import linearise
from bilevel.receipt import Receipt
from bilevel.result import Result, Solution
from bilevel.solvers import InnerSolver


@dataclass(frozen=True)
class Implicit(HypergradientMethod):
    r"""`∂L/∂θ - (∂F/∂θ)^T [∂F/∂x]^{-T} ∂L/∂x` at the solution of the inner problem, with any linear solver.

    `F` is the gradient of the inner loss, the problem's `optimality`, or the fixed-point residual of a proximal solver.
    Its graph is built once at the solution and serves every product with `∂F/∂x` and the mixed product; after the inner
    solve, time and memory do not depend on the number of inner steps. The number is the hypergradient as far as the
    inner problem and the linear system are solved; the receipt has both residuals. With inner minibatches the Hessian
    is that of the batch of inner step -1, whose inverse is a biased estimate of the inverse Hessian.

    Args:
        warm_start: start each inner solve from the previous solution.
        linear_solver: for the system with the inner Hessian (or the Jacobian of `optimality`).
        warm_start_linear: start each linear solve from the previous adjoint.

    Reference: Pedregosa (2016), "Hyperparameter optimization with approximate gradient"; Lorraine et al. (2020).
    """

    linear_solver: LinearSolver = field(default_factory=ConjugateGradient)
    warm_start_linear: bool = False

    def init(
        self, problem: FlatProblem, solver: InnerSolver, params: Tensor, hparams: Mapping[str, Tensor]
    ) -> MethodState:
        """The adjoint that the next linear solve starts from, if it is to."""
        return {"adjoint": torch.zeros_like(params)} if self.warm_start_linear else {}

    def compute(
        self,
        problem: FlatProblem,
        solver: InnerSolver,
        params: Tensor,
        hparams: Mapping[str, Tensor],
        batches: StepBatches,
        state: MethodState,
    ) -> Hypergradient:
        """Inner solve without a graph, then the theorem."""
        with torch.no_grad():
            start = starting_point(problem, params, hparams, self.warm_start)
            inner = solve_inner(problem, solver, start, hparams, batches)
        outer, by_params, direct = outer_gradients(problem, inner.params, hparams, batches)
        at = linearise(problem, solver, inner.params, hparams, batches.curvature)
        prepared = self.linear_solver.init(at.operator)
        # F's own system is with A^T: the same for a Hessian, not for the Jacobian of an optimality.
        solution = self.linear_solver.compute(
            self.linear_solver.transpose(prepared), by_params, x0=state.get("adjoint")
        )
        gradient = {name: direct[name] - part for name, part in at.mixed(solution.value).items()}
        biased = (f"{type(self.linear_solver).__name__} replaces the inverse Hessian",) * self.linear_solver.biased
        if batches.curvature is not None:
            biased += ("the Hessian is that of one minibatch",)
        receipt = Receipt(
            **{**describe(inner), "stationarity": float(at.stationarity.max())},
            **describe_linear(solution, by_params),
            biased=biased,
        )
        new_state = {"adjoint": solution.value} if self.warm_start_linear else {}
        return Hypergradient(gradient, inner.params.detach(), new_state, receipt, outer, at.inner_loss)


def describe_linear(solution: Solution, rhs: Tensor) -> dict[str, Any]:
    """The linear solve's part of a receipt; a square system with no better than a least-squares solution is singular."""
    size, worst = rhs.norm(dim=-1), solution.worst
    relative = torch.where(size > 0, solution.residual_norm / torch.where(size > 0, size, 1.0), 0.0)
    return {
        "linear_residual": float(relative.max()),
        "num_mv": int(solution.num_mv.max()),
        "linear_result": (Result.singular if worst is Result.least_squares else worst).name,
        "curvature_min": float(solution.curvature_min.min()),
        "curvature_max": float(solution.curvature_max.max()),
    }
