"""Implicit differentiation of the inner solver's step: a solution is its fixed point."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.autograd import grad

from bilevel.batches import StepBatches
from bilevel.flat import FlatProblem
from bilevel.hypergradient.adjoint import describe_linear, solve_adjoint
from bilevel.hypergradient.method import (
    Hypergradient,
    HypergradientMethod,
    MethodState,
    describe,
    solve_without_graph,
)
from bilevel.hypergradient.negative_curvature import NegativeCurvature, SwitchToMINRES, System
from bilevel.hypergradient.outer import outer_gradients
from bilevel.hypergradient.paths import explain_vanishing
from bilevel.hypergradient.unconverged import OuterStep, Unconverged, Warn, settle
from bilevel.linalg import MINRES, DiagonalOperator, LinearSolver
from bilevel.linearisation import leaves, linearise
from bilevel.parts import check_parts
from bilevel.receipt import Receipt
from bilevel.solvers import GradientDescent, InnerResult, InnerSolution, InnerSolver, Objective, UpdateRule
from bilevel.tree import TensorDict

EXPLAINED = "explained"  # the method state's mark that the zeros were explained


@dataclass(frozen=True)
class ImplicitUpdate(HypergradientMethod):
    r"""`∂L/∂θ + (∂T/∂θ)^T [I - ∂T/∂z]^{-T} (∂L/∂x, 0)` with `z = T(z, θ)` one step of the inner solver.

    `z = (x, s)` holds the iterate and what the step carries over, the velocity or Adam's moments: only together are they a
    fixed point. So options that move the solution (`weight_decay`) get their exact derivative, through the moments as well;
    with `s` as a constant AdamW's would be wrong. `s` is eliminated: a step acts on each entry by itself but for the
    gradient, and what is left is a system with the inner Hessian `H` plus a diagonal that stands for the decay (see
    `ResponseToGradient`), symmetric, of the length of `params`, and as well conditioned as that of `Implicit`.

    At a solution the derivative with respect to a learning rate, a momentum or Adam's betas is zero by the theorem; the
    number then is what the inner solve left over, and a warning says so once. Stopped earlier, it is the derivative of
    steps that would go on as at the last iterate, which needs no memory for the loop; the receipt marks it as biased.

    Args:
        warm_start: start each inner solve from the previous solution.
        accuracy: sets the tolerances of each outer step.
        linear_solver: for the system, symmetric unless the problem has an `optimality`. For plain gradient descent `K` terms
            of `NeumannSeries(step_size=learning_rate, rtol=None, max_steps=K)` are the series of the reference.
        unconverged: what to do where the inner solve ends short of its tolerance; a spent budget (`atol=0`) is as asked for.
        negative_curvature: what to do where the system is seen not to be positive definite.

    Reference: Clarke, Oldewage and Hernández-Lobato (2022), "Scalable one-pass optimisation of high-dimensional
        weight-update hyperparameters by implicit differentiation" (there with the optimiser's state as a constant).
    """

    paths: ClassVar[frozenset[str]] = frozenset({"direct", "inner", "solver"})

    linear_solver: LinearSolver = field(default_factory=MINRES)
    unconverged: Unconverged = field(default_factory=Warn)
    negative_curvature: NegativeCurvature = field(default_factory=SwitchToMINRES)

    def __post_init__(self) -> None:
        """Validate the parts."""
        check_parts(self)

    def check(self, solver: InnerSolver) -> None:
        """Refuse an inner solver whose step cannot be differentiated, or is no function that has a fixed point."""
        super().check(solver)
        self.unconverged.check(solver)
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
        """Inner solve without a graph, then the theorem for one step."""
        inner = solve_without_graph(problem, solver, params, hparams, batches, self.warm_start)
        handled = settle(self.unconverged, OuterStep(problem, solver, hparams, batches), inner)
        if isinstance(handled, Hypergradient):
            return replace(handled, state=dict(state))  # what later steps can go on from, once solves converge again
        inner = handled
        outer, by_params, direct = outer_gradients(problem, inner.params, hparams, batches)
        # of the inner loss alone: what the solver adds to it is in the response
        at = linearise(problem, GradientDescent(), inner.params, hparams, batches.curvature)
        response = ResponseToGradient.of(solver.update_rule(), inner, at.optimality.detach(), hparams)
        pull = DiagonalOperator(response.pull / response.size)
        system = System(
            at.operator + pull, by_params, self.linear_solver, lambda: at.gauss_newton() + pull,
            self.accuracy.linear_rtol(state),
        )  # fmt: skip
        solution, biased, _ = solve_adjoint(system, self.negative_curvature)
        mixed, by_options = at.mixed(solution.value), response.by_hparams(solution.value / response.size)
        gradient = {name: direct[name] - mixed[name] + by_options[name] for name in direct}
        kept: MethodState = {EXPLAINED: state[EXPLAINED]} if EXPLAINED in state else {}
        if solver.hparam_names and inner.result is InnerResult.converged and not kept:
            explain_vanishing(self, problem, solver, hparams, batches)
            kept[EXPLAINED] = torch.ones((), device=by_params.device)
        receipt = Receipt(
            **{**describe(inner), "stationarity": response.stationarity},
            **describe_linear(solution, by_params),
            biased=biased + self._reasons(solver, inner, batches),
        )
        return Hypergradient(gradient, inner.params.detach(), kept, receipt, outer, at.inner_loss)

    def _reasons(self, solver: InnerSolver, inner: InnerSolution, batches: StepBatches) -> tuple[str, ...]:
        """Why the number is not the hypergradient."""
        reasons = []
        if solver.hparam_names and inner.result is not InnerResult.converged:
            reasons.append(
                "one step, differentiated where the inner solver stopped short of a fixed point, stands for all"
            )
        if batches.stochastic and batches.curvature is not None:
            reasons.append("the step is that of one minibatch")
        return tuple(reasons)


@dataclass(frozen=True)
class ResponseToGradient:
    r"""How a solver's step answers to a gradient that changes for good, entry by entry, its memory settled.

    Let a step be `x' = X(x, s, g, θ)` and `s' = S(x, s, g, θ)` with `g = ∇f(x, θ)`; the derivatives `X_x`, `S_g`, ... are
    diagonal, and `∂g/∂x = H`. The adjoint `(w, r)` of `I - ∂T/∂z` for the right-hand side `(c, 0)` obeys

        (I - X_x - H X_g) w - Σ (S_x + H S_g) r = c,    (I - S_s) r = X_s w

    Each `r` is `κ w` with `κ = X_s / (1 - S_s)`, and what is left is `(P + H D) w = c` with `D = -X_g - Σ S_g κ` and
    `P = I - X_x - Σ S_x κ`. In the unknown `y = D w` it is `(H + P / D) y = c`, and `(∂g/∂θ)^T` meets just `-y`. For gradient
    descent `D` is `learning_rate / (1 - momentum)` and `P / D` the weight decay; for Adam at a fixed point
    `D = a ε / (|g| + ε)²` and `P = a w`.

    Attributes:
        size: `D`, kept off zero by its own rounding error, `(*batch, n)`.
        pull: `P`.
        carried: `κ`, for each entry of the memory.
        stepped: the step's new `x` and memory, with a graph from `hparams` at the fixed gradient.
        hparams: leaves.
        stationarity: at the point, the largest over tasks.
    """

    size: Tensor
    pull: Tensor
    carried: tuple[Tensor, ...]
    stepped: tuple[Tensor, ...]
    hparams: TensorDict
    stationarity: float

    @classmethod
    def of(
        cls, rule: UpdateRule, inner: InnerSolution, gradient: Tensor, hparams: Mapping[str, Tensor]
    ) -> ResponseToGradient:
        """Differentiate the step that would come next, at the gradient `g` where the inner solve ended."""
        state = rule.translate(inner.state, inner.params)
        with torch.enable_grad():
            at, x, g = leaves(hparams), inner.params.detach().requires_grad_(), gradient.detach().requires_grad_()
            memory = {name: state[name].detach().requires_grad_() for name in rule.memory}
            fixed = Objective(optimality=lambda *_: g)
            new, after = rule.solver.step(x, {**state, **memory}, fixed, at)

        def diagonals(output: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
            return grad(output.sum(), inputs, retain_graph=True, materialize_grads=True)

        by_x, by_gradient, *by_memory = diagonals(new, [x, g, *memory.values()])
        pull, size, scale, carried = 1 - by_x, -by_gradient, by_gradient.abs(), []
        for (name, old), slope in zip(memory.items(), by_memory, strict=True):
            memory_by_x, memory_by_gradient, kept = diagonals(after[name], [x, g, old])
            carried.append(slope / (1 - kept))
            pull = pull - memory_by_x * carried[-1]
            size = size - memory_by_gradient * carried[-1]
            scale = scale + (memory_by_gradient * carried[-1]).abs()
        floor = torch.finfo(size.dtype).eps * scale
        size = torch.where(size.abs() > floor, size, floor)
        stepped = (new, *(after[name] for name in rule.memory))
        return cls(size, pull, tuple(carried), stepped, at, float(after["stationarity"].max()))

    def by_hparams(self, adjoint: Tensor) -> TensorDict:
        """`(∂X/∂θ)^T w + Σ (∂S/∂θ)^T κ w` at a fixed gradient, by names, summed over tasks."""
        cotangents = [adjoint, *(factor * adjoint for factor in self.carried)]
        parts = grad(self.stepped, list(self.hparams.values()), cotangents, materialize_grads=True)
        return dict(zip(self.hparams, parts, strict=True))
