"""From what the user wrote to the state before the first step; whatever cannot work is refused here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel.constraints import Bijections
from bilevel.errors import UsageError
from bilevel.flat import FlatProblem
from bilevel.hypergradient import HypergradientMethod, check_paths, start_method
from bilevel.hypergradient.trial import check_arguments, first_look, report_impurities, starting_hparams
from bilevel.problem import Problem
from bilevel.solvers import InnerSolver
from bilevel.trainer.optimizer import OptimizerFactory, OuterOptimizer, SchedulerFactory
from bilevel.trainer.state import Best, TrainState
from bilevel.tree import TensorDict


@dataclass(frozen=True)
class Setup:
    """What an outer loop works with and that does not change."""

    problem: FlatProblem
    solver: InnerSolver
    method: HypergradientMethod
    bijections: Bijections

    def natural(self, raw: Mapping[str, Tensor]) -> TensorDict:
        """Natural hyperparameters, differentiable in the raw ones."""
        return self.bijections.to_natural(raw)


def set_up(
    problem: Problem,
    solver: InnerSolver,
    method: HypergradientMethod,
    optimizer: OptimizerFactory,
    scheduler: SchedulerFactory | None,
) -> tuple[Setup, TrainState]:
    """Look at the problem once, refuse what cannot work, and make the state before the first step.

    Raises:
        UsageError: a hyperparameter outside its constraint or out of the method's reach, names that collide, functions of
            the problem that raise, losses that are no scalars or not finite, batches that do not fit the tasks, a solver
            that cannot serve the method, an optimiser or scheduler that cannot step.
    """
    check_arguments(problem, solver, method)
    _check_factory(optimizer)
    natural = starting_hparams(problem)
    bijections = Bijections.of(problem.constraints, list(natural))
    raw = {name: value.clone().requires_grad_() for name, value in bijections.to_raw(natural).items()}
    with torch.no_grad():
        natural = bijections.to_natural(raw)
    flat, solver, params, batches, paths = first_look(problem, solver, method, natural)
    report_impurities(flat, params, natural, batches)
    check_paths(method, solver, paths)
    state = TrainState(
        step=0,
        params=params,
        raw=raw,
        outer=OuterOptimizer.of(optimizer, scheduler, list(raw.values())),
        method=start_method(method, flat, solver, params, natural),
        gradient={},
        best=Best(-1, float("inf"), float("inf"), natural, params, {}),
        num_nonfinite=0,
        seconds=0.0,
        wall_seconds=0.0,
        work=dict.fromkeys(("inner_steps", "inner_gradients", "inner_products", "products"), 0),
    )
    return Setup(flat, solver, method, bijections), state


def _check_factory(optimizer: Any) -> None:
    """Refuse an optimiser where a function that makes one belongs."""
    if isinstance(optimizer, torch.optim.Optimizer) or not callable(optimizer):
        name = type(optimizer).__name__
        raise UsageError(
            "optimizer was expected to be a function that makes one from the raw hyperparameters, but is "
            f"an object of {name}: write functools.partial(torch.optim.Adam, lr=0.1)."
        )
