"""The contract of a hypergradient method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from bilevel.batches import StepBatches
from bilevel.errors import UsageError
from bilevel.flat import FlatProblem
from bilevel.hypergradient.accuracy import Accuracy, FixedAccuracy
from bilevel.receipt import Receipt
from bilevel.solvers import InnerSolution, InnerSolver, run
from bilevel.tree import TensorDict

MethodState = dict[str, Tensor]


@dataclass(frozen=True)
class Hypergradient:
    """The result of one hypergradient.

    Attributes:
        gradient: `d outer_loss / d hparams` in natural units, one tensor a hyperparameter.
        params: the inner solution it was taken at, `(n,)` or `(num_tasks, n)`.
        state: the method's state for the next outer step.
        receipt: what the gradient is worth.
        outer_loss: mean over tasks at `params`.
        inner_loss: mean over tasks at `params`; NaN where the inner problem has no loss.
    """

    gradient: TensorDict
    params: Tensor
    state: MethodState
    receipt: Receipt
    outer_loss: float
    inner_loss: float


@dataclass(frozen=True)
class HypergradientMethod(ABC):
    """A way to differentiate the outer loss through the inner solution; it owns the inner solve.

    Args:
        warm_start: start each inner solve from the previous solution instead of `init_params(hparams)`.
        accuracy: sets the tolerances of each outer step.

    Attributes:
        paths: the ways from a hyperparameter to the outer loss that the method differentiates: `direct` (in the outer
            loss), `inner` (in the inner loss), `initial` (in `init_params`), `solver` (an option of the inner solver).
        records_steps: whether the inner solver's steps have to be differentiable.
        begins_at_zero: whether the first hypergradient is zero by construction, and no sign of anything.
    """

    warm_start: bool = True
    accuracy: Accuracy = field(default_factory=FixedAccuracy, kw_only=True)

    paths: ClassVar[frozenset[str]] = frozenset({"direct", "inner"})
    records_steps: ClassVar[bool] = False
    begins_at_zero: ClassVar[bool] = False

    def init(
        self, problem: FlatProblem, solver: InnerSolver, params: Tensor, hparams: Mapping[str, Tensor]
    ) -> MethodState:
        """The state before the first outer step: nothing, for most methods."""
        return {}

    @abstractmethod
    def compute(
        self,
        problem: FlatProblem,
        solver: InnerSolver,
        params: Tensor,
        hparams: Mapping[str, Tensor],
        batches: StepBatches,
        state: MethodState,
    ) -> Hypergradient:
        """Solve the inner problem and differentiate the outer loss at its solution.

        Args:
            problem: the problem between vectors.
            solver: the inner solver.
            params: the previous solution, where a warm start begins.
            hparams: natural units.
            batches: the batches of this outer step.
            state: from `init` or the previous step.
        """

    def estimates_error(self, problem: FlatProblem, solver: InnerSolver) -> bool:
        """Whether receipts will hold an error estimate, which an accuracy that adapts needs."""
        return False

    def check(self, solver: InnerSolver) -> None:
        """Raise `UsageError` when the inner solver cannot serve this method."""
        if self.records_steps and not solver.differentiable:
            raise UsageError(
                f"{type(self).__name__} records the inner steps, but {type(solver).__name__} is not differentiable: "
                "use GradientDescent, ProximalGradient, AndersonAcceleration or Adam, or an implicit hypergradient."
            )
        if self.accuracy.needs_estimate and type(self).estimates_error is HypergradientMethod.estimates_error:
            raise UsageError(
                f"{type(self.accuracy).__name__} goes by the error estimate of implicit hypergradients, and "
                f"{type(self).__name__} has none: use DecreasingAccuracy, which any method can (accuracy=decreasing), or "
                "FixedAccuracy (accuracy=fixed)."
            )


def start_method(
    method: HypergradientMethod,
    problem: FlatProblem,
    solver: InnerSolver,
    params: Tensor,
    hparams: Mapping[str, Tensor],
) -> MethodState:
    """The state before the first outer step: the method's own, and that of its accuracy if that can serve the method."""
    own = method.init(problem, solver, params, hparams)
    if method.accuracy.needs_estimate and not method.estimates_error(problem, solver):
        return own
    return {**own, **method.accuracy.init(params)}


def differentiate(
    method: HypergradientMethod,
    problem: FlatProblem,
    solver: InnerSolver,
    params: Tensor,
    hparams: Mapping[str, Tensor],
    batches: StepBatches,
    state: MethodState,
) -> Hypergradient:
    """One hypergradient as an outer loop wants it: `method.compute` at the accuracy of this step, the problem frozen.

    The arguments are those of `HypergradientMethod.compute`; `state` is from `start_method` or the previous step.
    """
    if solver.atol or solver.rtol:  # with neither, all steps are meant to be made
        solver = method.accuracy.tighten(solver, state)
    with problem.purity.solve():
        result = method.compute(problem, solver, params, hparams, batches, state)
    return replace(result, state={**result.state, **method.accuracy.update(state, result)})


def solve_inner(
    problem: FlatProblem,
    solver: InnerSolver,
    start: Tensor,
    hparams: Mapping[str, Tensor],
    batches: StepBatches,
    *,
    offset: int = 0,
    state: Any = None,
    max_steps: int | None = None,
) -> InnerSolution:
    """Run the inner solver on this outer step's batches; inner step numbers start at `offset`."""
    objective = problem.compiled_objective if solver.compile else problem.objective
    if not batches.stochastic:
        return run(solver, objective(batches.inner(0)), start, hparams, state=state, max_steps=max_steps)

    def at(inner_step: int) -> Any:
        return objective(batches.inner(offset + inner_step))

    return run(solver, at, start, hparams, state=state, max_steps=max_steps)


def starting_point(problem: FlatProblem, params: Tensor, hparams: Mapping[str, Tensor], warm_start: bool) -> Tensor:
    """The previous solution of the same inner problem, detached, or `init_params(hparams)` with its graph."""
    return params.detach() if warm_start and problem.problem.episodes is None else problem.start(hparams)


def solve_without_graph(
    problem: FlatProblem,
    solver: InnerSolver,
    params: Tensor,
    hparams: Mapping[str, Tensor],
    batches: StepBatches,
    warm_start: bool,
) -> InnerSolution:
    """The inner solve of the methods that differentiate at its end only, from the previous solution or the beginning."""
    with torch.no_grad():
        return solve_inner(problem, solver, starting_point(problem, params, hparams, warm_start), hparams, batches)


def describe(solution: InnerSolution) -> dict[str, Any]:
    """The inner solve's part of a receipt."""
    return {
        "stationarity": solution.stationarity,
        "inner_steps": solution.num_steps,
        "inner_gradients": solution.num_gradients,
        "inner_products": solution.num_mv,
        "inner_result": solution.result.name,
        "fallback": solution.fallback,
    }
