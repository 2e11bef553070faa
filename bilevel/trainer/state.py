"""Everything that a resumed run needs, in one place."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel import rng
from bilevel.trainer.optimizer import OuterOptimizer
from bilevel.tree import TensorDict, to


@dataclass
class Best:
    """The best step so far; the latest one where outer losses of different steps cannot be compared.

    Attributes:
        step: its number; -1 before the first.
        outer_loss: its outer loss.
        figure: what steps compare by, the smaller the better: the outer loss, or the metric that the trainer monitors.
        hparams: its hyperparameters, natural units; those after its update where steps cannot be compared.
        params: its inner solution.
        metrics: the problem's own figures there.
    """

    step: int
    outer_loss: float
    figure: float
    hparams: TensorDict
    params: Tensor
    metrics: dict[str, float]


@dataclass
class TrainState:
    """The state of an outer loop between two steps; `save` and `load` are exact to the bit.

    Attributes:
        step: number of the next outer step.
        params: the previous inner solution.
        raw: unconstrained hyperparameters, the leaves that the optimiser moves.
        outer: the outer optimiser and its scheduler.
        method: the hypergradient method's own state.
        gradient: the latest hypergradient that was applied, natural units; empty before the first.
        best: the best step so far.
        num_nonfinite: non-finite hypergradients in a row.
        seconds: wall time of the steps so far.
        wall_seconds: wall time so far with everything around the steps, over all processes that made them.
        work: inner gradients and products so far.
        record: the record of the latest step, None before the first.
    """

    step: int
    params: Tensor
    raw: TensorDict
    outer: OuterOptimizer
    method: TensorDict
    gradient: TensorDict
    best: Best
    num_nonfinite: int
    seconds: float
    wall_seconds: float
    work: dict[str, int]
    record: dict[str, Any] | None = None

    def save(self) -> dict[str, Any]:
        """As nested tensors and numbers, which later steps leave as they are: what a step changes in place is copied."""
        scheduler = self.outer.scheduler
        return {
            "step": self.step,
            "params": self.params,
            "raw": {name: value.detach().clone() for name, value in self.raw.items()},
            "optimizer": copy.deepcopy(self.outer.optimizer.state_dict()),
            "scheduler": None if scheduler is None else copy.deepcopy(_plain(scheduler.state_dict())),
            "method": dict(self.method),
            "gradient": dict(self.gradient),
            "best": vars(self.best),
            "num_nonfinite": self.num_nonfinite,
            "seconds": self.seconds,
            "wall_seconds": self.wall_seconds,
            "work": dict(self.work),
            "record": self.record,
            "rng": rng.get_state(),
        }

    def load(self, saved: Mapping[str, Any]) -> None:
        """Put back what `save` returned, on this state's device; `saved` can be loaded again."""
        device = self.params.device
        with torch.no_grad():
            for name, value in self.raw.items():
                value.copy_(saved["raw"][name])
        self.step, self.params = saved["step"], saved["params"].to(device)
        # Both take the tensors over and go on to change them in place.
        self.outer.optimizer.load_state_dict(copy.deepcopy(saved["optimizer"]))
        if self.outer.scheduler is not None:
            self.outer.scheduler.load_state_dict(copy.deepcopy(saved["scheduler"]))
        self.method, self.gradient = to(dict(saved["method"]), device), to(dict(saved["gradient"]), device)
        self.best = Best(**to(dict(saved["best"]), device))
        self.num_nonfinite = saved["num_nonfinite"]
        self.seconds, self.wall_seconds = saved["seconds"], saved["wall_seconds"]
        self.work, self.record = dict(saved["work"]), saved["record"]
        rng.set_state(saved["rng"])


def _plain(value: Any) -> Any:
    """A scheduler's state without what is no data (functions, the optimiser)."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items() if _is_data(entry)}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value


def _is_data(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str | list | tuple | dict | Tensor)
