"""Hypergradients of a starting point without second derivatives: first-order MAML and Reptile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.autograd import grad

from bilevel.batches import StepBatches
from bilevel.flat import FlatProblem
from bilevel.hypergradient import Hypergradient, HypergradientMethod
from bilevel.hypergradient.method import MethodState, describe, solve_without_graph
from bilevel.hypergradient.outer import outer_gradients
from bilevel.linearisation import inner_value, leaves
from bilevel.receipt import Receipt
from bilevel.solvers import InnerSolution, InnerSolver
from bilevel.tree import TensorDict, detach


@dataclass(frozen=True)
class FirstOrder(HypergradientMethod):
    r"""`∂L/∂θ + (∂init_params/∂θ)^T ∂L/∂x` at the end of the inner solve: the solution is taken to move with its start.

    One gradient of the outer loss besides the inner solve; biased by what the inner steps make of a change of their start.

    Reference: Finn, Abbeel and Levine (2017), "Model-agnostic meta-learning for fast adaptation of deep networks", section 5.2.
    """

    paths: ClassVar[frozenset[str]] = frozenset({"direct", "initial"})

    warm_start: bool = field(default=False, init=False)  # each solve begins at `init_params(hparams)`

    def compute(
        self,
        problem: FlatProblem,
        solver: InnerSolver,
        params: Tensor,
        hparams: Mapping[str, Tensor],
        batches: StepBatches,
        state: MethodState,
    ) -> Hypergradient:
        """Solve without a graph, and hand the outer gradient to the starting point."""
        inner = solve_without_graph(problem, solver, params, hparams, batches, warm_start=False)
        outer, by_params, direct = outer_gradients(problem, inner.params, hparams, batches)
        through = to_start(problem, hparams, by_params)
        gradient = {name: direct[name] + part for name, part in through.items()}
        reason = "the inner solution is taken to move as its starting point does"
        return _result(problem, gradient, inner, outer, hparams, batches, reason)


@dataclass(frozen=True)
class Reptile(HypergradientMethod):
    r"""`(∂init_params/∂θ)^T (init_params - x)`: the starting point moves towards where the inner solves end, on average.

    With gradient descent as the outer optimiser this is the paper's rule, its step size the learning rate. No gradient of the
    outer loss enters, which is evaluated for the record alone.

    Reference: Nichol, Achiam and Schulman (2018), "On first-order meta-learning algorithms".
    """

    paths: ClassVar[frozenset[str]] = frozenset({"initial"})

    warm_start: bool = field(default=False, init=False)  # each solve begins at `init_params(hparams)`

    def compute(
        self,
        problem: FlatProblem,
        solver: InnerSolver,
        params: Tensor,
        hparams: Mapping[str, Tensor],
        batches: StepBatches,
        state: MethodState,
    ) -> Hypergradient:
        """Solve without a graph, and take the way back."""
        inner = solve_without_graph(problem, solver, params, hparams, batches, warm_start=False)
        x = inner.params.detach()
        with torch.no_grad():
            way_back = (problem.start(hparams) - x) / x.shape[:-1].numel()
            outer = torch.cat(
                [
                    part.outer_loss(y, hparams, batch).reshape(-1)
                    for part, y, batch in problem.in_parts(x, batches.outer)
                ]
            )
        gradient = to_start(problem, hparams, way_back)
        reason = "the way from the inner solution back to its starting point stands for a gradient"
        return _result(problem, gradient, inner, float(outer.mean()), hparams, batches, reason)


def to_start(problem: FlatProblem, hparams: Mapping[str, Tensor], cotangent: Tensor) -> TensorDict:
    """`(∂init_params/∂θ)^T cotangent`, summed over tasks, by names."""
    with torch.enable_grad():
        at = leaves(hparams)
        start = problem.start(at)
    if not start.requires_grad:
        return {name: torch.zeros_like(value) for name, value in at.items()}
    return dict(zip(at, grad(start, list(at.values()), cotangent, materialize_grads=True), strict=True))


def _result(
    problem: FlatProblem,
    gradient: TensorDict,
    inner: InnerSolution,
    outer: float,
    hparams: Mapping[str, Tensor],
    batches: StepBatches,
    reason: str,
) -> Hypergradient:
    """With a receipt that gives the reason why the number is biased."""
    x = inner.params.detach()
    value = inner_value(problem, x, detach(hparams), batches.curvature)
    return Hypergradient(gradient, x, {}, Receipt(**describe(inner), biased=(reason,)), outer, value)
