"""Everything that a resumed run needs, in one place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel import rng
from bilevel.constraints import Bijections
from bilevel.errors import UsageError
from bilevel.flat import FlatProblem, StepBatches
from bilevel.hypergradient import HypergradientMethod, check_paths
from bilevel.problem import Problem
from bilevel.solvers import InnerSolver
from bilevel.tree import TensorDict, detach, flatten_names

OptimizerFactory = Callable[[list[Tensor]], torch.optim.Optimizer]
SchedulerFactory = Callable[[torch.optim.Optimizer], Any]


@dataclass
class Best:
    """The best step so far.

    Attributes:
        step: its number; -1 before the first.
        outer_loss: its outer loss.
        hparams: its hyperparameters, natural units.
        params: its inner solution.
    """

    step: int
    outer_loss: float
    hparams: TensorDict
    params: Tensor


@dataclass
class TrainState:
    """The state of an outer loop between two steps; `save` and `load` are exact to the bit.

    Attributes:
        step: number of the next outer step.
        params: the previous inner solution.
        raw: unconstrained hyperparameters, the leaves that the optimiser moves.
        optimizer: the outer optimiser.
        scheduler: its scheduler, or None.
        method: the hypergradient method's own state.
        best: the best step so far.
        num_nonfinite: non-finite hypergradients in a row.
        seconds: wall time of the steps so far.
        work: inner gradients and products so far.
        record: the record of the latest step, None before the first.
    """

    step: int
    params: Tensor
    raw: TensorDict
    optimizer: torch.optim.Optimizer
    scheduler: Any
    method: TensorDict
    best: Best
    num_nonfinite: int
    seconds: float
    work: dict[str, int]
    record: dict[str, Any] | None = None

    def save(self) -> dict[str, Any]:
        """As nested tensors and numbers, for a checkpoint."""
        return {
            "step": self.step,
            "params": self.params,
            "raw": detach(self.raw),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else _plain(self.scheduler.state_dict()),
            "method": self.method,
            "best": vars(self.best),
            "num_nonfinite": self.num_nonfinite,
            "seconds": self.seconds,
            "work": self.work,
            "record": self.record,
            "rng": rng.get_state(),
        }

    def load(self, saved: Mapping[str, Any]) -> None:
        """Put back what `save` returned, on this state's device."""
        device = self.params.device
        with torch.no_grad():
            for name, value in self.raw.items():
                value.copy_(saved["raw"][name])
        self.step, self.params = saved["step"], saved["params"].to(device)
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(saved["scheduler"])
        self.method = {name: value.to(device) for name, value in saved["method"].items()}
        best = saved["best"]
        self.best = Best(
            best["step"],
            best["outer_loss"],
            {name: value.to(device) for name, value in best["hparams"].items()},
            best["params"].to(device),
        )
        self.num_nonfinite, self.seconds = saved["num_nonfinite"], saved["seconds"]
        self.work, self.record = dict(saved["work"]), saved["record"]
        rng.set_state(saved["rng"])


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
        UsageError: a hyperparameter outside its constraint or out of the method's reach, names that collide, losses that
            are no scalars or not finite, a solver that cannot serve the method.
    """
    natural = flatten_names(problem.init_hparams())
    if not natural:
        raise UsageError(
            f"{type(problem).__name__}.init_hparams() returned no hyperparameter: there is nothing to tune."
        )
    for name, value in natural.items():
        if not value.is_floating_point():
            raise UsageError(f"hyperparameter '{name}' was expected to be floating-point, but is {value.dtype}.")
    natural = detach(natural)
    bijections = Bijections.of(problem.constraints, list(natural))
    raw = {name: value.clone().requires_grad_() for name, value in bijections.to_raw(natural).items()}
    with torch.no_grad():
        natural = bijections.to_natural(raw)
    flat = FlatProblem.of(problem, natural)
    method.check(solver)
    if solver.full_batch and problem.inner_batches is not None:
        raise UsageError(
            f"{type(solver).__name__} needs the full batch, but this problem has inner minibatches: "
            "use GradientDescent or TorchOptimizer."
        )
    check_paths(method, flat, solver, natural, StepBatches(problem, 0))
    with torch.no_grad():
        params = flat.start(natural).detach()
    outer = optimizer(list(raw.values()))
    state = TrainState(
        step=0,
        params=params,
        raw=raw,
        optimizer=outer,
        scheduler=None if scheduler is None else scheduler(outer),
        method=method.init(flat, solver, params, natural),
        best=Best(-1, float("inf"), natural, params),
        num_nonfinite=0,
        seconds=0.0,
        work={"inner_steps": 0, "inner_gradients": 0, "inner_products": 0, "num_mv": 0},
    )
    return Setup(flat, solver, method, bijections), state


def _plain(value: Any) -> Any:
    """A scheduler's state without what is no data (functions, the optimiser)."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items() if _is_data(entry)}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value


def _is_data(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str | list | tuple | dict | Tensor)
