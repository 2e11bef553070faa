"""From what the user wrote to the state before the first step; whatever cannot work is refused here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel.constraints import Bijections
from bilevel.errors import UsageError
from bilevel.flat import FlatProblem, StepBatches, natural_hparams
from bilevel.hypergradient import HypergradientMethod, check_paths, start_method
from bilevel.hypergradient.trial import bind_solver, blaming, check_arguments, report_impurities, try_losses
from bilevel.problem import Problem
from bilevel.solvers import InnerSolver
from bilevel.trainer.optimizer import OptimizerFactory, OuterOptimizer, SchedulerFactory
from bilevel.trainer.state import Best, TrainState
from bilevel.tree import TensorDict, detach


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
    _check_num_tasks(problem)
    natural = _starting_hparams(problem)
    bijections = Bijections.of(problem.constraints, list(natural))
    raw = {name: value.clone().requires_grad_() for name, value in bijections.to_raw(natural).items()}
    with torch.no_grad():
        natural = bijections.to_natural(raw)
    with blaming(problem, "init_params", hparams=natural):
        flat = FlatProblem.of(problem, natural)
        with torch.no_grad():
            params = flat.start(natural).detach()
    if not params.numel() or not params.is_floating_point():
        came = f"are {params.dtype}" if params.numel() else "have no entry"
        raise UsageError(f"{type(problem).__name__}.init_params was expected to return real numbers, but they {came}.")
    method.check(solver)
    solver = bind_solver(solver, flat, natural)
    batches = StepBatches(problem, 0)
    with flat.purity.rehearsal():
        try_losses(flat, params, natural, batches)
    report_impurities(flat, params, natural, batches)
    given = {"params": flat.unravel(params), "hparams": natural}
    with flat.purity.rehearsal(), blaming(problem, "inner_loss or outer_loss, differentiated,", **given):
        check_paths(method, flat, solver, natural, batches)
    state = TrainState(
        step=0,
        params=params,
        raw=raw,
        outer=OuterOptimizer.of(optimizer, scheduler, list(raw.values())),
        method=start_method(method, flat, solver, params, natural),
        gradient={},
        best=Best(-1, float("inf"), natural, params, {}),
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


def _check_num_tasks(problem: Problem) -> None:
    number = problem.num_tasks
    if number is not None and (not isinstance(number, int) or number < 1):
        raise UsageError(
            f"{type(problem).__name__}.num_tasks must be an integer of at least 1, or None for a single system, "
            f"but is {number!r}."
        )


def _starting_hparams(problem: Problem) -> TensorDict:
    with blaming(problem, "init_hparams"):
        natural = detach(natural_hparams(problem))
    if not natural:
        raise UsageError(
            f"{type(problem).__name__}.init_hparams() returned no hyperparameter: there is nothing to tune."
        )
    for name, value in natural.items():
        if not value.is_floating_point():
            raise UsageError(f"hyperparameter '{name}' was expected to be floating-point, but is {value.dtype}.")
    return natural
