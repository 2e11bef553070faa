"""The outer optimiser and its scheduler: any of torch's, tried once before a run begins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from bilevel.errors import UsageError

OptimizerFactory = Callable[[list[Tensor]], torch.optim.Optimizer]
SchedulerFactory = Callable[[torch.optim.Optimizer], Any]
MISTAKES = (TypeError, ValueError, KeyError, RuntimeError, AssertionError)  # what torch raises about arguments


@dataclass(frozen=True)
class OuterOptimizer:
    """An optimiser of the raw hyperparameters with its scheduler, or None.

    One outer step is one evaluation of the outer loss and its hypergradient, which the optimiser gets as it is: a closure
    that it may call returns the same loss again. `torch.optim.LBFGS` therefore makes one quasi-Newton step, whatever its
    `max_iter`, and cannot search along a line.
    """

    optimizer: torch.optim.Optimizer
    scheduler: Any

    @classmethod
    def of(cls, optimizer: OptimizerFactory, scheduler: SchedulerFactory | None, raw: list[Tensor]) -> OuterOptimizer:
        """Make both, and let them make one step on copies first.

        Raises:
            UsageError: one of them cannot be made or cannot step, or the optimiser searches along a line.
        """
        trial = [value.detach().clone().requires_grad_() for value in raw]
        for value in trial:
            value.grad = torch.ones_like(value)
        cls._make(optimizer, scheduler, trial)._try()
        return cls._make(optimizer, scheduler, raw)

    @classmethod
    def _make(
        cls, optimizer: OptimizerFactory, scheduler: SchedulerFactory | None, raw: list[Tensor]
    ) -> OuterOptimizer:
        what = "optimizer"
        try:
            made = optimizer(raw)
            what = "scheduler"
            return cls(made, None if scheduler is None else scheduler(made))
        except MISTAKES as error:
            raise UsageError(f"the outer {what} cannot be made: {_one_line(error)}.") from error

    def _try(self) -> None:
        name = type(self.optimizer).__name__
        if any(group.get("line_search_fn") for group in self.optimizer.param_groups):
            raise UsageError(
                f"{name} was asked to search along a line (line_search_fn), for which every trial point would need an inner "
                "solve of its own: leave line_search_fn out and set lr."
            )
        try:
            self.optimizer.step(lambda: 1.0)
            name = type(self.scheduler).__name__
            self._schedule(1.0)
        except MISTAKES as error:
            raise UsageError(
                f"{name} cannot step on the raw hyperparameters, dense tensors with dense gradients: {_one_line(error)}; "
                "use another one, such as torch.optim.Adam or torch.optim.lr_scheduler.StepLR."
            ) from error

    @property
    def learning_rate(self) -> float:
        """Of the first group of tensors; NaN for an optimiser that has none."""
        return float(self.optimizer.param_groups[0].get("lr", torch.nan))

    def step(self, outer_loss: float) -> None:
        """Move the tensors by their gradients, forget those, and let the scheduler take note."""
        self.optimizer.step(lambda: outer_loss)
        self.optimizer.zero_grad(set_to_none=True)
        self._schedule(outer_loss)

    def _schedule(self, outer_loss: float) -> None:
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(outer_loss)
        elif self.scheduler is not None:
            self.scheduler.step()


def _one_line(error: Exception) -> str:
    reason = str(error.args[0]) if error.args else type(error).__name__  # str of a KeyError has quotes around it
    return " ".join(reason.split()).rstrip(".")
