"""One-step differentiation: the derivative of a single inner step taken at the solution."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.autograd import grad

from bilevel.batches import StepBatches
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
from bilevel.tree import detach


@dataclass(frozen=True)
class OneStep(HypergradientMethod):
    r"""`∂L/∂θ + (∂T/∂θ)^T ∂L/∂x` with `T(x, θ)` one step of the inner solver from the solution.

    Needs no linear solve and no memory for the loop. Biased by about the contraction rate of the step: nearly exact for
    fast inner solvers, and for gradient descent with learning rate `a` the same as `A^-1 ≈ a I`.

    Args:
        warm_start: start each inner solve from the previous solution.

    Reference: Bolte, Pauwels and Vaiter (2023), "One-step differentiation of iterative algorithms".
    """

    paths: ClassVar[frozenset[str]] = frozenset({"direct", "inner", "solver"})
    records_steps: ClassVar[bool] = True

    def compute(
        self,
        problem: FlatProblem,
        solver: InnerSolver,
        params: Tensor,
        hparams: Mapping[str, Tensor],
        batches: StepBatches,
        state: MethodState,
    ) -> Hypergradient:
        """Solve without a graph, then record one step."""
        inner = solve_without_graph(problem, solver, params, hparams, batches, self.warm_start)
        x, at = inner.params.detach(), leaves(hparams)
        objective = problem.objective(batches.curvature)
        with torch.enable_grad():
            stepped, _ = solver.step(x, solver.init(x, objective, at), objective, at)
        outer, by_params, direct = outer_gradients(problem, stepped.detach(), hparams, batches)
        through = [torch.zeros_like(value) for value in at.values()]
        if stepped.requires_grad:
            through = list(grad(stepped, list(at.values()), by_params, materialize_grads=True))
        gradient = {name: direct[name] + part for name, part in zip(at, through, strict=True)}
        facts = describe(inner)
        facts["inner_gradients"] += 1
        receipt = Receipt(**facts, biased=("one inner step stands for the whole iteration",))
        value = inner_value(problem, stepped.detach(), detach(hparams), batches.curvature)
        return Hypergradient(gradient, stepped.detach(), {}, receipt, outer, value)
