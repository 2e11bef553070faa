"""SAMA: the identity for the inner Hessian, scaled as an adaptive optimiser scales its steps; first derivatives only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

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
from bilevel.solvers import InnerSolution, InnerSolver, Objective, UpdateRule
from bilevel.tree import TensorDict, detach


@dataclass(frozen=True)
class SAMA(HypergradientMethod):
    r"""`∂L/∂θ - (∂g/∂θ)^T v - (∂u/∂θ)^T c`, with `v = ∂u/∂g c`, `c = ∂L/∂x`, `u(g, θ)` the update and `g = ∇f(x, θ)`.

    A solution that an optimiser finds is a zero of its update, `u = 0`, so that the theorem holds with `u` in the place of
    `g`; the identity stands for `∂u/∂x`, and `∂u/∂θ = ∂u/∂g ∂g/∂θ` keeps the optimiser's scale. The update is elementwise and
    `∂u/∂g` a diagonal; for Adam, of its next step after the inner solve,

        a [ (1 - β₁) / (1 - β₁^t) - m̂ / (√v̂ + ε) (1 - β₂) g / ((1 - β₂^t) √v̂) ] / (√v̂ + ε)

    and for gradient descent the learning rate, as in `Implicit` with `IdentitySolver(learning_rate)`. The product
    `(∂g/∂θ)^T v` is the central difference of `∇_θ f` between `x ± ε v` with `ε = radius / ‖v‖`: no second derivative is
    taken. The last term reaches the options of the inner solver that name hyperparameters, as one step from the solution
    does. Biased.

    Args:
        warm_start: start each inner solve from the previous solution.
        accuracy: sets the tolerances of each outer step.
        radius: length of the finite-difference step.

    Reference: Choe et al. (2023), "Making scalable meta learning practical".
    """

    paths: ClassVar[frozenset[str]] = frozenset({"direct", "inner", "solver"})

    radius: float = 0.01

    def __post_init__(self) -> None:
        """Validate the number."""
        if not 0 < self.radius < float("inf"):
            raise UsageError(f"SAMA needs radius > 0, but got {self.radius}.")

    def check(self, solver: InnerSolver) -> None:
        """Refuse an inner solver whose update has no derivative that is known."""
        super().check(solver)
        solver.update_rule()

    def compute(
        self,
        problem: FlatProblem,
        solver: InnerSolver,
        params: Tensor,
        hparams: Mapping[str, Tensor],
        batches: StepBatches,
        state: MethodState,
    ) -> Hypergradient:
        """Solve, pull the outer gradient back through the update, difference."""
        rule = solver.update_rule()
        inner = solve_without_graph(problem, solver, params, hparams, batches, self.warm_start)
        with torch.no_grad():
            x = inner.params.detach()
            gradient = problem.objective(batches.curvature).gradient(x, hparams)
        outer, by_params, direct = outer_gradients(problem, x, hparams, batches)
        direction, by_options = pull_update(rule, inner, gradient, hparams, by_params)
        mixed = difference_mixed(problem, x, hparams, batches.curvature, direction, self.radius)
        facts = describe(inner)
        facts["inner_gradients"] += 3
        receipt = Receipt(
            **facts,
            biased=(
                "the identity and the optimiser's scale stand for the inverse Hessian, a finite difference for the "
                "mixed product",
            ),
        )
        total = {name: direct[name] - by_options[name] - mixed[name] for name in direct}
        value = inner_value(problem, x, detach(hparams), batches.curvature)
        return Hypergradient(total, x, {}, receipt, outer, value)


def pull_update(
    rule: UpdateRule, inner: InnerSolution, gradient: Tensor, hparams: Mapping[str, Tensor], cotangent: Tensor
) -> tuple[Tensor, TensorDict]:
    """`(∂u/∂g)^T c` and, at a fixed gradient, `(∂u/∂θ)^T c` of the update `u` that the inner solver would make next.

    Args:
        rule: of the inner solver.
        inner: where it stands, and its state.
        gradient: `g` there.
        hparams: natural units.
        cotangent: `c`.
    """
    x = inner.params.detach()
    with torch.enable_grad():
        leaf, at = gradient.detach().requires_grad_(), leaves(hparams)
        stepped, _ = rule.solver.step(x, rule.translate(inner.state, x), Objective(optimality=lambda *_: leaf), at)
        update = x - stepped
    pulled, *parts = grad(update, [leaf, *at.values()], cotangent, materialize_grads=True)
    return pulled, dict(zip(at, parts, strict=True))


def difference_mixed(
    problem: FlatProblem, params: Tensor, hparams: Mapping[str, Tensor], batch: Any, direction: Tensor, radius: float
) -> TensorDict:
    """`(∂∇_x f/∂θ)^T v` by a central difference of `∇_θ f` between `x ± ε v`, `ε = radius / ‖v‖` for each task.

    Summed over tasks: the direction carries the factor of their mean.

    Args:
        problem: the problem between vectors.
        params: `x`.
        hparams: natural units.
        batch: the inner batch.
        direction: `v`, `(n,)` or `(num_tasks, n)`.
        radius: how far the two points are from `x`.

    Raises:
        UsageError: the problem defines only `optimality`.
    """
    objective = problem.objective(batch)
    if objective.loss is None:
        raise UsageError("SAMA needs inner_loss, but the problem defines only optimality: use Implicit or OneStep.")
    length = direction.norm(dim=-1, keepdim=True)
    epsilon = radius / torch.where(length > 0, length, 1.0)
    sides = []
    for sign in (1.0, -1.0):
        with torch.enable_grad():
            at = leaves(hparams)
            losses = objective.loss(params + sign * epsilon * direction, at)
            value = (losses / (2 * epsilon.squeeze(-1))).sum()
        if not value.requires_grad:
            return {name: torch.zeros_like(leaf) for name, leaf in at.items()}
        sides.append(grad(value, list(at.values()), materialize_grads=True))
    return {name: plus - minus for name, plus, minus in zip(hparams, *sides, strict=True)}
