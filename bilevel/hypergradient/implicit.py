"""The hypergradient by the implicit function theorem: one linear solve at the inner solution."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from torch import Tensor

from bilevel.batches import StepBatches
from bilevel.errors import UsageError
from bilevel.flat import FlatProblem
from bilevel.hypergradient.accuracy import AdaptiveAccuracy
from bilevel.hypergradient.adjoint import describe_linear, solve_adjoint
from bilevel.hypergradient.damping import AdaptiveDamping, Damping, NoDamping
from bilevel.hypergradient.error_estimate import NOTHING, ErrorEstimate, ErrorEstimator, Solved
from bilevel.hypergradient.method import (
    Hypergradient,
    HypergradientMethod,
    MethodState,
    describe,
    solve_without_graph,
)
from bilevel.hypergradient.negative_curvature import NegativeCurvature, SwitchToMINRES, System
from bilevel.hypergradient.outer import OuterGradients, outer_gradients, outer_gradients_compiled
from bilevel.hypergradient.support import SUPPORT, around, remembered
from bilevel.hypergradient.trial import declared_curvature
from bilevel.hypergradient.unconverged import OuterStep, Unconverged, Warn, settle
from bilevel.linalg import AutoSolver, ConjugateGradient, LinearSolver, Tag
from bilevel.linalg.recycling import WatchedOperator
from bilevel.linearisation import Linearisation, linearise, linearise_compiled
from bilevel.parts import check_parts
from bilevel.preconditioner import AutoPreconditioner, NoPreconditioner, Preconditioner
from bilevel.preconditioner.recycled import corrected, learnt
from bilevel.preconditioner.reuse import note, prepare
from bilevel.receipt import Receipt
from bilevel.result import Solution
from bilevel.solvers import InnerSolution, InnerSolver
from bilevel.tree import TensorDict, detach


@dataclass(frozen=True)
class Implicit(HypergradientMethod):
    r"""`∂L/∂θ - (∂F/∂θ)^T [∂F/∂x]^{-T} ∂L/∂x` at the solution of the inner problem, with any linear solver.

    `F` is the gradient of the inner loss, the problem's `optimality`, or the fixed-point residual of a proximal solver. With a
    non-smooth term that is piecewise linear (`Polyhedral`: a lasso, a box) it is the gradient by the free entries of the
    solution alone, so that time goes by their number, and any linear solver serves.
    Its graph is built once at the solution and serves every product with `∂F/∂x` and the mixed product; after the inner
    solve, time and memory do not depend on the number of inner steps. The number is the hypergradient as far as the
    inner problem and the linear system are solved; the receipt has both residuals. With inner minibatches the Hessian
    is that of the batch of inner step -1, whose inverse is a biased estimate of the inverse Hessian.

    Args:
        warm_start: start each inner solve from the previous solution.
        accuracy: sets the tolerances of each outer step.
        linear_solver: for the system with the inner Hessian (or the Jacobian of `optimality`).
        warm_start_linear: start each linear solve from the previous adjoint. Short where the hyperparameters hardly move;
            elsewhere the old adjoint's error stays where it leaves little residual, along small curvature.
        recycle: largest number of directions of the linear solves before that correct the preconditioner of the next one;
            two vectors of memory each. None of their error stays.
        preconditioner: approximates the inverse of the inner Hessian; built anew when that pays.
        error_estimate: estimates the error of the number from both residuals; None leaves that out, and so do minibatches.
        damping: what is added to the diagonal of the inner Hessian; the receipt's residual and errors include what that does.
        unconverged: what to do where the inner solve ends short of its tolerance.
        negative_curvature: what to do where the inner Hessian is seen not to be positive definite.
        compile: compile the outer gradient and the products (the gradients of inner steps are the inner solver's affair, which
            has a `compile` of its own): seconds once (tens of them for large losses), then up to several times faster where the
            network is small; what cannot be compiled is eager, with a reason in the receipt.

    Reference: Pedregosa (2016), "Hyperparameter optimization with approximate gradient"; Lorraine et al. (2020).
    """

    linear_solver: LinearSolver = field(default_factory=ConjugateGradient)
    warm_start_linear: bool = False
    recycle: int = 0
    preconditioner: Preconditioner = field(default_factory=NoPreconditioner)
    error_estimate: ErrorEstimator | None = field(default_factory=ErrorEstimator)
    damping: Damping = field(default_factory=NoDamping)
    unconverged: Unconverged = field(default_factory=Warn)
    negative_curvature: NegativeCurvature = field(default_factory=SwitchToMINRES)
    compile: bool = False

    def __post_init__(self) -> None:
        """Validate the parts and the number."""
        check_parts(self)
        if not isinstance(self.recycle, int) or self.recycle < 0:
            raise UsageError(f"Implicit needs recycle to be an integer of at least 0, but got {self.recycle}.")

    @classmethod
    def auto(cls, **fields: Any) -> Implicit:
        """The method with nothing to tune, what `hypergradient=implicit_auto` is in a configuration.

        The linear solver and the preconditioner choose, tolerances follow the error estimate, the Hessian is damped within
        them, and linear solves are preconditioned by what the ones of the steps before have found.

        Args:
            **fields: other values of the class's arguments.

        Example:
            >>> type(Implicit.auto(compile=True).linear_solver).__name__
            'AutoSolver'
        """
        chosen: dict[str, Any] = {
            "linear_solver": AutoSolver(),
            "preconditioner": AutoPreconditioner(),
            "accuracy": AdaptiveAccuracy(),
            "damping": AdaptiveDamping(),
            "recycle": 50,
        }
        return cls(**{**chosen, **fields})

    def check(self, solver: InnerSolver) -> None:
        """Refuse an inner solver that cannot serve the policy for unconverged solves."""
        super().check(solver)
        self.unconverged.check(solver)

    def estimates_error(self, problem: FlatProblem, solver: InnerSolver) -> bool:
        """Where it is asked for, and the solution minimises a loss of all data: a batch's gradient does not vanish there."""
        smooth = (
            problem.objective(None) if solver.polyhedral is not None else solver.conditions(problem.objective(None))
        )
        is_loss = smooth.loss is not None
        return self.error_estimate is not None and is_loss and problem.problem.inner_batches is None

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
        if batches.stochastic and self.error_estimate is not None:
            return replace(self, error_estimate=None).compute(problem, solver, params, hparams, batches, state)
        inner = solve_without_graph(problem, solver, params, hparams, batches, self.warm_start)
        handled = settle(self.unconverged, OuterStep(problem, solver, hparams, batches), inner)
        if isinstance(handled, Hypergradient):
            return replace(handled, state=dict(state))  # what later steps can go on from, once solves converge again
        inner = handled
        here = around(problem, solver, inner, hparams, batches.curvature)
        state = remembered(state, here.support)
        evaluate = COMPILED if self.compile and here.support is None else EAGER
        (outer, by_params, direct), outer_fallback = evaluate.outer(here.problem, here.params, hparams, batches)
        at = evaluate.inner(here.problem, here.solver, here.params, hparams, batches.curvature)
        solved = self._solve(at, by_params, inner, state)
        gradient = {name: direct[name] - part for name, part in at.mixed(solved.solution.value).items()}
        estimate = self._estimate(at, here.solver, batches, solved, by_params, gradient)
        biased = solved.biased + here.biased
        if batches.stochastic and batches.curvature is not None:
            biased += ("the Hessian is that of one minibatch",)
        fallback = " ".join(reason for reason in (inner.fallback, outer_fallback, at.fallback) if reason) or None
        receipt = Receipt(
            **{**describe(inner), "stationarity": float(at.stationarity.max()), "fallback": fallback},
            **describe_linear(solved.solution, by_params),
            setup_mv=solved.setup_mv,
            damping=0.0 if solved.damping is None else float(solved.damping.max()),
            error_estimate=estimate.value,
            error_inner=estimate.inner,
            error_linear=estimate.linear,
            error_certified=None if math.isnan(estimate.value) else estimate.certified,
            estimate_mv=estimate.num_mv,
            biased=biased,
        )
        kept = solved.state if here.support is None else {**solved.state, SUPPORT: here.support}
        return Hypergradient(gradient, inner.params.detach(), kept, receipt, outer, at.inner_loss / here.num_systems)

    def _solve(self, at: Linearisation, vector: Tensor, inner: InnerSolution, state: MethodState) -> _Solved:
        """The adjoint `[∂F/∂x]^{-T} vector`: preconditioned, with what earlier solves have left, under the policies."""
        old = {name.removeprefix(PREFIX): value for name, value in state.items() if name.startswith(PREFIX)}
        wanted = self.linear_solver.is_preconditioned(at.operator)
        prepared = prepare(self.preconditioner if wanted else NoPreconditioner(), at, inner, old)
        preconditioner = corrected(prepared.operator, at.operator, state)
        watched = None
        memory = max(self.recycle, 0 if self.error_estimate is None else self.error_estimate.memory)
        if memory and Tag.symmetric in at.operator.tags and at.params.numel():  # there may be no free entry
            watched = WatchedOperator(at.operator, memory)
            at = replace(at, operator=watched)
        rtol = self.accuracy.linear_rtol(state)
        # A direct solver leaves no residual, and `c I` may bring eigenvalues of an unsymmetric matrix to zero.
        dampable = wanted and Tag.symmetric in at.operator.tags
        damping = self.damping.value(state, rtol) if dampable else None
        system = System(at.operator, vector, self.linear_solver, at.gauss_newton, rtol, preconditioner, damping)
        solution, biased, damping = solve_adjoint(system, self.negative_curvature, state.get("adjoint"), self.damping)
        spent = int(solution.num_mv.max())
        kept = {PREFIX + name: value for name, value in note(prepared.state, spent).items()}
        if self.recycle and watched is not None:
            kept |= learnt(state, *watched.remembered(), self.recycle)
        kept |= self.damping.learnt(vector, solution)
        if self.warm_start_linear:
            kept["adjoint"] = solution.value
        return _Solved(solution, biased, kept, prepared.num_mv, watched, damping)

    def _estimate(
        self,
        at: Linearisation,
        solver: InnerSolver,
        batches: StepBatches,
        solved: _Solved,
        vector: Tensor,
        gradient: TensorDict,
    ) -> ErrorEstimate:
        """The error estimate of this step, if there is to be one and the theory has one."""
        if self.error_estimate is None or solved.watched is None:
            return NOTHING
        behind = Solved(solved.watched, vector, solved.solution.value, gradient)
        lower = declared_curvature(at.problem.problem, detach(at.hparams))
        return self.error_estimate.estimate(at, solver, batches, behind, lower)


PREFIX = "preconditioner."


class _Evaluation(NamedTuple):
    """How both problems are differentiated at the inner solution."""

    outer: Callable[..., tuple[OuterGradients, str | None]]  # with why it is eager after all
    inner: Callable[..., Linearisation]


EAGER = _Evaluation(lambda *at: (outer_gradients(*at), None), linearise)
COMPILED = _Evaluation(outer_gradients_compiled, linearise_compiled)


class _Solved(NamedTuple):
    """A linear solve with everything around it."""

    solution: Solution
    biased: tuple[str, ...]
    state: MethodState
    setup_mv: int
    watched: WatchedOperator | None
    damping: Tensor | None
