"""What a certificate looks at: the problem in float64, its own solution, a refined one, and both linearised."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bilevel.batches import StepBatches
from bilevel.constraints import Bijections
from bilevel.diagnostics.deadline import Deadline, TimedOperator
from bilevel.diagnostics.resolved import Measured, directional_derivatives, pull_to_raw
from bilevel.errors import UsageError
from bilevel.flat import FlatProblem
from bilevel.hypergradient import HypergradientMethod
from bilevel.hypergradient.method import solve_inner
from bilevel.hypergradient.outer import outer_gradients
from bilevel.hypergradient.trial import first_look, given_hparams
from bilevel.linalg import GMRES, MINRES, DenseLU, LinearOperator, MatrixOperator, Tag, as_matrix
from bilevel.linearisation import Linearisation, linearise
from bilevel.problem import Problem
from bilevel.result import Result, Solution
from bilevel.rng import generator, normal
from bilevel.solvers import LBFGS, InnerResult, InnerSolution, InnerSolver, Objective, run
from bilevel.tree import Layout, TensorDict

DENSE_LIMIT = 800  # parameters up to which a solve builds the inner Hessian as a matrix of its own
MATRIX_LIMIT = 3000  # the same for the one matrix of the refined solution, which serves all solves near it
NEAR_STEPS = 50  # of a solve with that matrix's inverse, which takes two or three where the point is near indeed
MAX_NEWTON = 30
# Of the linear solves of Newton's steps: each then takes four digits, and none is paid for that the next step would take away.
NEWTON_RTOL = 1e-4
ACCURATE = 1e-11
MAX_DESCENT = 5000
BETWEEN = 50  # steps of it between two looks at the clock
CANCELLED = 1e-3  # of the terms of a hypergradient: where they cancel further, what they leave counts as zero
ASIDE = 0.1  # of the size of a solution: how far from it the terms are looked at, too


@dataclass(frozen=True)
class Subject:
    """A problem with the parts that would tune it, at one setting of its hyperparameters.

    Attributes:
        problem: a copy in float64.
        solver: the inner solver.
        method: the hypergradient method that is certified.
        hparams: natural units.
        flat: the problem between vectors.
        batches: of outer step 0.
        paths: of each hyperparameter to the outer loss.
        seed: of random directions.
        deadline: when to give up.
    """

    problem: Problem
    solver: InnerSolver
    method: HypergradientMethod
    hparams: TensorDict
    flat: FlatProblem
    batches: StepBatches
    paths: dict[str, set[str]]
    seed: int = 0
    deadline: Deadline = field(default_factory=lambda: Deadline(None))

    @classmethod
    def of(
        cls,
        problem: Problem,
        solver: InnerSolver,
        method: HypergradientMethod,
        hparams: Mapping[str, Any] | None,
        seed: int = 0,
        deadline: Deadline | None = None,
    ) -> Subject:
        """Copy the problem, move the copy to float64, and look at its starting values.

        Raises:
            UsageError: a function of the problem fails, or the parts do not fit each other.
        """
        twin = copy.deepcopy(problem).to(dtype=torch.float64)
        at = given_hparams(twin, hparams)
        try:
            flat, solver, _, batches, ways = first_look(twin, solver, method, at)
        except UsageError as error:
            if "dtype" not in str(error.__cause__):
                raise
            raise UsageError(
                f"{error} A certificate is made in float64, whatever the problem's own: hold tensors as attributes, which are "
                "moved, or make them in the dtype of params."
            ) from error.__cause__
        return cls(twin, solver, method, at, flat, batches, ways, seed, deadline or Deadline(None))

    @cached_property
    def bijections(self) -> Bijections:
        """From raw to natural hyperparameters: directions are drawn in raw coordinates, where every point is allowed."""
        return Bijections.of(self.problem.constraints, list(self.hparams))

    @cached_property
    def inner(self) -> InnerSolution:
        """The inner solve as the outer loop would make it in its first step."""
        with torch.no_grad():
            return solve_inner(self.flat, self.solver, self.flat.start(self.hparams), self.hparams, self.batches)

    @cached_property
    def at_own(self) -> Linearisation:
        """The problem linearised at its own solution."""
        return self.linearise(self.inner.params, self.hparams)

    @cached_property
    def refined(self) -> Tensor:
        """The own solution, brought to rounding level: downhill as far as that goes, then by plain Newton steps."""
        objective = self.solver.conditions(self.flat.objective(self.batches.curvature))
        x = self.inner.params
        if objective.loss is not None:
            x = self._downhill(objective, x)
        return self.refine(x, self.hparams)

    def _downhill(self, objective: Objective, x: Tensor) -> Tensor:
        solver, state = LBFGS(max_steps=MAX_DESCENT, atol=1e-9), None
        for _ in range(MAX_DESCENT // BETWEEN):
            self.deadline.check("refining the inner solution")
            with torch.no_grad():
                solution = run(solver, objective, x, self.hparams, state=state, max_steps=BETWEEN)
            x, state = solution.params, solution.state
            if solution.result is not InnerResult.budget_spent:
                break
        return x

    @cached_property
    def at_refined(self) -> Linearisation:
        """The problem linearised there."""
        return self.linearise(self.refined, self.hparams)

    @cached_property
    def matrix(self) -> Tensor | None:
        """`∂F/∂x` there as a matrix, where it is not too large."""
        operator = self.at_refined.operator
        return as_matrix(operator) if operator.shape[0] <= MATRIX_LIMIT else None

    @cached_property
    def inverse(self) -> LinearOperator | None:
        """The inverse of that matrix, where it has one."""
        if self.matrix is None or not bool(self.matrix.isfinite().all()):
            return None
        inverse, info = torch.linalg.inv_ex(self.matrix)
        return None if bool((info > 0).any()) or not bool(inverse.isfinite().all()) else MatrixOperator(inverse)

    @cached_property
    def exact(self) -> Tensor:
        """The hypergradient at the refined solution by an accurate linear solve, ravelled in natural units."""
        return self.exact_solve[0]

    @cached_property
    def exact_solve(self) -> tuple[Tensor, Solution]:
        """The hypergradient at the refined solution, and its linear solve."""
        return self.hypergradient(self.at_refined)

    @cached_property
    def own(self) -> Tensor:
        """The same formula where the inner solve ended."""
        return self.hypergradient(self.at_own)[0]

    @cached_property
    def measured(self) -> list[Measured]:
        """Derivatives of the outer loss by finite differences of the re-solved problem."""
        return directional_derivatives(self, self.exact, self.seed)

    @cached_property
    def terms(self) -> list[Tensor]:
        """The two terms of the hypergradient, `∂L/∂θ` and `(∂F/∂θ)^T y`, at the refined solution and beside it.

        What rounding and loose solves leave is a part of these, so that their sizes say which hypergradient counts as zero.
        At an outer optimum they may be zero themselves: `∂L/∂x = 0` where there are as many hyperparameters as parameters,
        or `y` is orthogonal to `∂F/∂θ`. At a random point beside the solution neither holds; the Hessian is left as it is,
        since that of another point may be singular.
        """
        x = self.refined
        vector = normal(tuple(x.shape), generator(self.seed, 50), x.dtype, x.device)
        step = ASIDE * x.norm(dim=-1, keepdim=True) * vector / vector.norm(dim=-1, keepdim=True)
        found = []
        for at in (self.at_refined, self.linearise(x + step, self.hparams)):
            _, by_params, direct = outer_gradients(self.flat, at.params, self.hparams, self.batches)
            mixed = at.mixed(solve(self.at_refined, by_params, transposed=True, inverse=self.inverse).value)
            found += [self.layout.ravel(direct), self.layout.ravel(mixed)]
        return [one for one in found if bool(one.isfinite().all())]  # a loss may be undefined beside its solution

    @cached_property
    def floor(self) -> float:
        """The length below which a hypergradient counts as zero, in natural units."""
        return CANCELLED * sum(float(one.norm()) for one in self.terms)

    @cached_property
    def raw_floor(self) -> float:
        """The same in raw coordinates."""
        return CANCELLED * sum(float(pull_to_raw(self, one).norm()) for one in self.terms)

    @property
    def layout(self) -> Layout:
        """Names and shapes of the hyperparameters."""
        return Layout.of(self.hparams)

    def linearise(self, params: Tensor, hparams: Mapping[str, Tensor]) -> Linearisation:
        """At any point, on the batch that all products share."""
        found = linearise(self.flat, self.solver, params.detach(), hparams, self.batches.curvature)
        return replace(found, operator=TimedOperator(found.operator, self.deadline))

    def hypergradient(self, at: Linearisation) -> tuple[Tensor, Solution]:
        """The theorem's formula at a point with an accurate linear solve, and that solve."""
        _, by_params, direct = outer_gradients(self.flat, at.params, self.hparams, self.batches)
        solution = solve(at, by_params, transposed=True)
        mixed = at.mixed(solution.value)
        return self.layout.ravel({name: direct[name] - mixed[name] for name in direct}), solution

    def resolved(self, hparams: Mapping[str, Tensor]) -> Tensor:
        """The solution at hyperparameters beside those given, on the branch of the refined one."""
        return self.refine(self.refined, hparams, self.inverse)

    def refine(self, params: Tensor, hparams: Mapping[str, Tensor], inverse: LinearOperator | None = None) -> Tensor:
        """The root of the optimality that is nearest in Newton's sense: follows the branch, be it a saddle."""
        x, at = params, self.linearise(params, hparams)
        for _ in range(MAX_NEWTON):
            size = at.stationarity
            step = solve(at, at.optimality.detach(), rtol=NEWTON_RTOL, inverse=inverse).value
            moved = False
            for halving in range(30):
                trial = self.linearise(x - step / 2**halving, hparams)
                lower = trial.stationarity < size
                if bool(lower.any()):
                    keep = lower.unsqueeze(-1)
                    x = torch.where(keep, trial.params.detach(), x)
                    at, moved = self.linearise(x, hparams), True
                    break
            if not moved or bool((at.stationarity > 0.5 * size).all() and (size < 1e-12).all()):
                break
        return x


def solve(
    at: Linearisation,
    vector: Tensor,
    *,
    transposed: bool = False,
    rtol: float = ACCURATE,
    inverse: LinearOperator | None = None,
) -> Solution:
    """A solve with `∂F/∂x` (or its transpose) to a relative residual, direct where the matrix is small.

    Args:
        at: the point.
        vector: the right-hand side.
        transposed: whether to solve with the transpose.
        rtol: relative residual.
        inverse: of `∂F/∂x` at a point near this one. It saves work and decides nothing: the residual is that at the point, and
            where the tolerance is not met in a few steps the solve is made without.
    """
    if inverse is not None:
        near = GMRES(rtol=rtol, max_steps=NEAR_STEPS, restart=NEAR_STEPS)
        operator, inverse = (at.operator.transpose(), inverse.transpose()) if transposed else (at.operator, inverse)
        found = near.compute(near.init(operator), vector, preconditioner=inverse)
        if bool((found.result == Result.converged.code).all()):
            return found
    symmetric = Tag.symmetric in at.operator.tags
    solver: Any  # each kind has a state of its own
    if at.operator.shape[0] <= DENSE_LIMIT:
        solver = DenseLU()
    elif symmetric:
        solver = MINRES(rtol=rtol, max_steps=5000)
    else:
        solver = GMRES(rtol=rtol, max_steps=2000, restart=200)
    state = solver.init(at.operator)
    solution: Solution = solver.compute(solver.transpose(state) if transposed else state, vector)
    return solution


def relative(value: Tensor, reference: Tensor, floor: float = 0.0) -> float:
    """Norm of the difference over the norm of the reference, or over the floor where that is larger; 0 for two zeros."""
    gap, size = float((value - reference).norm()), max(float(reference.norm()), floor)
    if gap == 0:
        return 0.0
    return gap / size if size > 0 else float("inf")
