"""The second-order approximation of DARTS: a finite difference in place of the mixed product."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import grad

from bilevel.batches import StepBatches
from bilevel.errors import UsageError
from bilevel.flat import FlatProblem
from bilevel.hypergradient.method import (
    Hypergradient,
    HypergradientMethod,
    MethodState,
    describe,
    solve_without_graph,
)
from bilevel.hypergradient.outer import outer_gradients
from bilevel.linearisation import inner_value, leaves
from bilevel.receipt import Receipt
from bilevel.solvers import InnerSolver
from bilevel.tree import TensorDict, detach


@dataclass(frozen=True)
class FiniteDifference(HypergradientMethod):
    r"""DARTS: one virtual inner step `x' = x - ξ ∇_x f(x, θ)`, and its mixed product by a central difference.

    `∂L/∂θ(x') - ξ [∇_θ f(x⁺, θ) - ∇_θ f(x⁻, θ)] / (2ε)` with `x± = x ± ε ∇_x L(x')` and `ε = radius / ‖∇_x L(x')‖`. Needs
    first derivatives only, and is biased as one step from the solution is.

    Args:
        warm_start: start each inner solve from the previous solution.
        virtual_step: `ξ`, the learning rate of the virtual step; 0 gives the first-order variant.
        radius: length of the finite-difference step.

    Reference: Liu, Simonyan and Yang (2019), "DARTS: differentiable architecture search".
    """

    virtual_step: float = 0.1
    radius: float = 0.01

    def __post_init__(self) -> None:
        """Validate the numbers."""
        if self.virtual_step < 0 or self.radius <= 0:
            raise UsageError(
                f"FiniteDifference needs virtual_step >= 0 and radius > 0, but got {self.virtual_step} and {self.radius}."
            )

    def check(self, solver: InnerSolver) -> None:
        """Refuse solvers with a proximal term: the virtual step is one of plain gradient descent."""
        super().check(solver)
        if solver.composite:
            raise UsageError(
                f"FiniteDifference takes its virtual step along the gradient of inner_loss, but {type(solver).__name__} "
                "adds a non-smooth term: use Unrolled, ForwardMode, OneStep, or Implicit."
            )

    def compute(
        self,
        problem: FlatProblem,
        solver: InnerSolver,
        params: Tensor,
        hparams: Mapping[str, Tensor],
        batches: StepBatches,
        state: MethodState,
    ) -> Hypergradient:
        """Solve, take the virtual step, difference."""
        inner = solve_without_graph(problem, solver, params, hparams, batches, self.warm_start)
        with torch.no_grad():
            objective = problem.objective(batches.curvature)
            virtual = inner.params - self.virtual_step * objective.gradient(inner.params, hparams)
        outer, by_params, direct = outer_gradients(problem, virtual, hparams, batches)
        length = by_params.norm(dim=-1, keepdim=True)
        epsilon = self.radius / torch.where(length > 0, length, 1.0)  # each task's own
        plus = _by_hparams(problem, inner.params + epsilon * by_params, hparams, batches, epsilon)
        minus = _by_hparams(problem, inner.params - epsilon * by_params, hparams, batches, epsilon)
        gradient = {name: direct[name] - self.virtual_step * (plus[name] - minus[name]) for name in direct}
        facts = describe(inner)
        facts["inner_gradients"] += 3
        receipt = Receipt(**facts, biased=("one virtual step and a finite difference stand for the inverse Hessian",))
        value = inner_value(problem, inner.params, detach(hparams), batches.curvature)
        return Hypergradient(gradient, inner.params.detach(), {}, receipt, outer, value)


def _by_hparams(
    problem: FlatProblem, params: Tensor, hparams: Mapping[str, Tensor], batches: StepBatches, epsilon: Tensor
) -> TensorDict:
    """`∇_θ f / (2ε)`, summed over tasks (the outer gradient already carries the factor of their mean)."""
    objective = problem.objective(batches.curvature)
    if objective.loss is None:
        raise UsageError("FiniteDifference needs inner_loss, but the problem defines only optimality: use Implicit.")
    with torch.enable_grad():
        at = leaves(hparams)
        value = (objective.loss(params.detach(), at) / (2 * epsilon.squeeze(-1))).sum()
        if not value.requires_grad:
            return {name: torch.zeros_like(leaf) for name, leaf in at.items()}
        return dict(zip(at, grad(value, list(at.values()), materialize_grads=True), strict=True))
