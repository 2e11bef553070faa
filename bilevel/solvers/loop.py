"""The one loop that runs every inner solver."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from bilevel.errors import UsageError
from bilevel.linalg.allocator import keep_freed_memory
from bilevel.solvers.objective import Hparams, Objective
from bilevel.solvers.solver import InnerSolver, State

GROWTH = 1e10  # of the gradient norm, from its first value or from one; nothing that has been there is of use

RECORDED = "the gradients of inner steps are eager, not compiled, because they are recorded for a derivative."

LossAt = Callable[[int], Objective]  # inner step -> the objective on that step's batch


class InnerResult(Enum):
    """How an inner solve ended."""

    converged = "every system is stationary to the solver's tolerance"
    budget_spent = "max_steps were made, as asked for: atol and rtol are 0"
    max_steps = "max_steps were made before every system was stationary to the solver's tolerance"
    stagnated = "no step lowers the loss any more in this precision: use float64 or a looser atol"
    diverged = "the gradient norm grew ten-billionfold: lower the learning rate, or use LBFGS or NewtonCG"
    nonfinite = "a non-finite gradient appeared: lower the learning rate, or check the loss"

    @property
    def successful(self) -> bool:
        """Whether the solve ended as asked for."""
        return self in (InnerResult.converged, InnerResult.budget_spent)

    @property
    def usable(self) -> bool:
        """Whether the iterate is worth a hypergradient."""
        return self not in (InnerResult.diverged, InnerResult.nonfinite)


@dataclass(frozen=True)
class InnerSolution:
    """What an inner solve returns.

    Attributes:
        params: the last iterate with a finite gradient, `(*batch, n)`.
        state: the solver's state there.
        result: how it ended.
        num_steps: inner steps made.
        stationarity: largest norm of the latest gradient over the systems.
        num_gradients: gradients evaluated (of all systems at once).
        num_mv: Hessian-vector products spent inside the steps.
        fallback: why gradients that were to be compiled are not, a sentence; None where they are, or were not meant to be.
    """

    params: Tensor
    state: State
    result: InnerResult
    num_steps: int
    stationarity: float
    num_gradients: int
    num_mv: int
    fallback: str | None = None


def verdict(solver: InnerSolver, state: State) -> InnerResult | None:
    """Whether the loop ends at this state, and how; growth counts from the state's `first_stationarity`."""
    stationarity, first = state["stationarity"], state["first_stationarity"]
    if not bool(((stationarity <= GROWTH * first.clamp(min=1.0)) & (stationarity < torch.inf)).all()):
        return InnerResult.diverged if bool(stationarity.isfinite().all()) else InnerResult.nonfinite
    if bool(solver.done(state).all()):
        return InnerResult.converged
    return InnerResult.stagnated if bool(state.get("stuck", False)) else None


def exhausted(solver: InnerSolver) -> InnerResult:
    """How a loop ends that has made all its steps."""
    return InnerResult.budget_spent if solver.atol == 0 and solver.rtol == 0 else InnerResult.max_steps


def run(
    solver: InnerSolver,
    loss: Objective | LossAt,
    params: Tensor,
    hparams: Hparams,
    *,
    state: State | None = None,
    max_steps: int | None = None,
) -> InnerSolution:
    """Step until every system is stationary, the iteration diverges, or the steps are used up.

    Recorded for a derivative when gradients are enabled; otherwise under `torch.no_grad()`.

    Args:
        solver: how to step.
        loss: the objective, or a function from the number of the inner step to the objective on its batch.
        params: where to start, `(*batch, n)`.
        hparams: hyperparameters in natural units.
        state: the solver's state to go on from; None starts afresh.
        max_steps: overrides the solver's own number.

    Example:
        >>> from bilevel.solvers import GradientDescent
        >>> objective = Objective(lambda x, h: ((x - h["target"]) ** 2).sum(-1))
        >>> solver = GradientDescent(learning_rate=0.25, max_steps=100, atol=1e-4)
        >>> with torch.no_grad():
        ...     solution = run(solver, objective, torch.zeros(2), {"target": torch.tensor(3.0)})
        >>> solution.result.name, [round(v, 2) for v in solution.params.tolist()]
        ('converged', [3.0, 3.0])
    """
    if not isinstance(loss, Objective) and solver.full_batch:
        raise UsageError(
            f"{type(solver).__name__} compares the losses of successive steps and needs the full batch, but this problem "
            "has inner minibatches: use GradientDescent or TorchOptimizer."
        )
    keep_freed_memory()
    at = (lambda _: loss) if isinstance(loss, Objective) else loss
    limit = solver.max_steps if max_steps is None else max_steps
    objective = at(0)
    state = solver.init(params, objective, hparams) if state is None else state
    result, number = None, 0
    for number in range(1, limit + 1):
        objective = at(number - 1)
        new_params, new_state = solver.step(params, state, objective, hparams)
        new_state.setdefault("first_stationarity", new_state["stationarity"])  # carried: a loop in pieces is one loop
        result = verdict(solver, new_state)
        if result is not InnerResult.nonfinite:
            params, state = new_params, new_state
        if result is not None:
            break
    return InnerSolution(
        params=params,
        state=state,
        result=result or exhausted(solver),
        num_steps=number,
        stationarity=float(state["stationarity"].max()) if limit else torch.nan,
        num_gradients=int(state["num_gradients"]),
        num_mv=int(state["num_mv"]),
        fallback=_fallback(objective),
    )


def _fallback(objective: Objective) -> str | None:
    """Why the gradients of the loop that ends were not compiled, if they were meant to be."""
    if objective.compiled is None:
        return None
    return RECORDED if torch.is_grad_enabled() else objective.compiled.fallback
