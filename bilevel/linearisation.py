"""An inner problem linearised at a point: one graph serves all products with `∂F/∂x` and `∂F/∂θ`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import grad

from bilevel.flat import FlatProblem
from bilevel.linalg import GaussNewtonOperator, HessianOperator, JacobianOperator, LinearOperator
from bilevel.solvers import InnerSolver
from bilevel.tree import TensorDict, detach


@dataclass(frozen=True)
class Linearisation:
    """The optimality `F(x, θ)` of an inner problem at a point, with its graph.

    Attributes:
        problem: the problem.
        batch: the inner batch that `F` is evaluated on; None for the full one.
        params: `x`, a leaf of the graph, `(n,)` or `(num_tasks, n)`.
        hparams: `θ` in natural units, leaves of the graph.
        operator: `∂F/∂x`, the Hessian of the inner loss where there is one.
        optimality: `F(x, θ)`, shaped like `params`.
        inner_loss: mean over tasks; NaN for a problem without one.
        pull: the mixed product `v -> (∂F/∂θ)^T v` where it is not that of the graph: compiled products have none.
        fallback: why the products are not compiled, a sentence; None where they are, or were not meant to be.
    """

    problem: FlatProblem
    batch: Any
    params: Tensor
    hparams: TensorDict
    operator: LinearOperator
    optimality: Tensor
    inner_loss: float
    pull: Callable[[Tensor], TensorDict] | None = None
    fallback: str | None = None

    @property
    def stationarity(self) -> Tensor:
        """Norm of the optimality of each task, `(*batch,)`."""
        return self.optimality.detach().norm(dim=-1)

    def mixed(self, vector: Tensor) -> TensorDict:
        """`(∂F/∂θ)^T v`, by names, summed over tasks: one backward pass through the graph."""
        if self.pull is not None:
            return self.pull(vector)
        if not self.hparams or not self.optimality.requires_grad:
            return {name: torch.zeros_like(value) for name, value in self.hparams.items()}
        parts = grad(self.optimality, list(self.hparams.values()), vector, retain_graph=True, materialize_grads=True)
        return dict(zip(self.hparams, parts, strict=True))

    def gauss_newton(self) -> LinearOperator:
        r"""`J^T H_l J` of the outputs plus the penalty's Hessian, at the same point: what stands for an indefinite Hessian.

        Raises:
            UsageError: the inner loss is not made of `outputs` and `output_loss`.
        """
        point, hparams = self.params.detach(), detach(self.hparams)
        model = self.problem.model(point, hparams, self.batch)
        operator: LinearOperator = GaussNewtonOperator(
            lambda x: model.outputs(x, hparams), lambda outputs: model.output_loss(outputs, hparams), point
        )
        if model.penalty is not None:
            penalty = model.penalty
            operator = operator + HessianOperator(lambda x: penalty(x, hparams), point)
        return operator


def linearise(
    problem: FlatProblem, solver: InnerSolver, params: Tensor, hparams: Mapping[str, Tensor], batch: Any = None
) -> Linearisation:
    """Evaluate the optimality at a point and keep its graph: about two gradients, once.

    Args:
        problem: the problem between vectors.
        solver: the inner solver, which knows what vanishes at its solutions.
        params: where, `(n,)` or `(num_tasks, n)`.
        hparams: in natural units.
        batch: the inner batch; None for the full one.
    """
    objective = problem.objective(batch)
    conditions = solver.conditions(objective)
    with torch.enable_grad():
        leaf, at = params.detach().requires_grad_(), leaves(hparams)
        if conditions.loss is None:
            assert conditions.optimality is not None
            jacobian = JacobianOperator.from_output(conditions.optimality(leaf, at), leaf)
            value = inner_value(problem, params, hparams, batch)
            return Linearisation(problem, batch, leaf, at, jacobian, jacobian.output, value)
        loss, gradient = conditions.value_and_gradient(leaf, at)
    hessian = HessianOperator.from_gradient(gradient, leaf)
    return Linearisation(problem, batch, leaf, at, hessian, gradient, float(loss.detach().mean()))


def linearise_compiled(
    problem: FlatProblem, solver: InnerSolver, params: Tensor, hparams: Mapping[str, Tensor], batch: Any = None
) -> Linearisation:
    """As `linearise`, with compiled products: one compilation for a problem, a solver and shapes, used at every point.

    Where compiling fails, or gives other numbers than the eager products it is once compared with, the products are
    eager and `fallback` says why.
    """
    from bilevel.linalg.compiled import CompiledDerivatives  # the compiler takes half a second to import

    def function(x: Tensor, at: Mapping[str, Tensor], data: Any) -> Tensor:
        conditions = solver.conditions(problem.objective(data))
        chosen = conditions.loss or conditions.optimality
        assert chosen is not None
        return chosen(x, at)

    # What vanishes at a solution does not depend on how accurately it is asked for, which changes from step to step.
    key = replace(solver, max_steps=1, atol=math.inf, rtol=0.0)
    found = problem.kept(key, CompiledDerivatives).at(function, params, hparams, batch)
    is_loss = found.value.ndim < params.ndim
    value = float(found.value.mean()) if is_loss else inner_value(problem, params, hparams, batch)
    return Linearisation(
        problem,
        batch,
        params.detach(),
        detach(hparams),
        found.operator,
        found.optimality,
        value,
        found.mixed,
        found.fallback,
    )


def inner_value(problem: FlatProblem, params: Tensor, hparams: Mapping[str, Tensor], batch: Any) -> float:
    """Mean inner loss over tasks; NaN for a problem without one."""
    objective = problem.objective(batch)
    if objective.loss is None:
        return float("nan")
    with torch.no_grad():
        return float(objective.loss(params, hparams).mean())


def leaves(hparams: Mapping[str, Tensor]) -> TensorDict:
    """Fresh leaves that require gradients."""
    return {name: value.requires_grad_() for name, value in detach(hparams).items()}
