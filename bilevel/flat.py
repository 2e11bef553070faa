"""A problem between plain vectors: ravelled once, tasks batched, shapes and values checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel.errors import UsageError
from bilevel.problem import Problem
from bilevel.solvers import Objective
from bilevel.tree import Layout, TensorDict, flatten_names

Loss = Callable[[Mapping[str, Tensor], Mapping[str, Tensor], Any], Tensor]


@dataclass(frozen=True)
class FlatProblem:
    """A `Problem` as solvers and hypergradient methods see it: `params` are vectors `(n,)` or `(num_tasks, n)`.

    Attributes:
        problem: what the user wrote.
        layout: names and shapes of one task's parameters.
    """

    problem: Problem
    layout: Layout

    @classmethod
    def of(cls, problem: Problem, hparams: Mapping[str, Tensor]) -> FlatProblem:
        """Look at the starting parameters once."""
        with torch.no_grad():
            return cls(problem, Layout.of(flatten_names(problem.init_params(hparams))))

    @property
    def num_batch(self) -> int:
        """Leading dimensions of `params`: 1 with tasks, else 0."""
        return 0 if self.problem.num_tasks is None else 1

    def start(self, hparams: Mapping[str, Tensor]) -> Tensor:
        """The starting point, differentiable in the hyperparameters; the same for every task."""
        x = self.layout.ravel(flatten_names(self.problem.init_params(hparams)))
        return x if self.problem.num_tasks is None else x.expand(self.problem.num_tasks, -1).clone()

    def unravel(self, params: Tensor) -> TensorDict:
        """Named parameters, with a leading task dimension if there are tasks."""
        return self.layout.unravel(params)

    def objective(self, batch: Any) -> Objective:
        """The inner problem on a batch."""
        optimality = getattr(self.problem, "optimality", None)
        if optimality is None:
            return Objective(loss=self._over_tasks(self.problem.inner_loss, "inner_loss", batch))

        def residual(params: Mapping[str, Tensor], hparams: Mapping[str, Tensor], data: Any) -> Tensor:
            return self.layout.ravel(flatten_names(optimality(params, hparams, data)))

        return Objective(optimality=self._over_tasks(residual, None, batch))

    def outer_loss(self, params: Tensor, hparams: Mapping[str, Tensor], batch: Any) -> Tensor:
        """Outer loss of each task, `(*batch,)`."""
        return self._over_tasks(self.problem.outer_loss, "outer_loss", batch)(params, hparams)

    def _over_tasks(
        self, function: Loss, scalar: str | None, batch: Any
    ) -> Callable[[Tensor, Mapping[str, Tensor]], Tensor]:
        def single(x: Tensor, hparams: Mapping[str, Tensor], data: Any) -> Tensor:
            value = function(self.layout.unravel(x), hparams, data)
            if scalar is not None and (not isinstance(value, Tensor) or value.ndim != 0):
                shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise UsageError(
                    f"{scalar} was expected to return a scalar tensor for one task, but returned {shape}: "
                    "take the mean or the sum."
                )
            return value

        if self.problem.num_tasks is None:
            return lambda x, hparams: single(x, hparams, batch)
        data_dim = None if batch is None else 0
        return lambda x, hparams: torch.vmap(single, in_dims=(0, None, data_dim))(x, hparams, batch)


@dataclass(frozen=True)
class StepBatches:
    """The batches of one outer step, each a pure function of the step's number, so that nothing has to be stored.

    Attributes:
        problem: where they come from.
        step: number of the outer step.
    """

    problem: Problem
    step: int

    @property
    def stochastic(self) -> bool:
        """Whether the inner problem has minibatches."""
        return self.problem.inner_batches is not None

    def inner(self, inner_step: int) -> Any:
        """The batch of an inner step; None for the full batch."""
        batches = self.problem.inner_batches
        return None if batches is None else batches(self.step, inner_step)

    @property
    def curvature(self) -> Any:
        """The one inner batch that all Hessian products of this step share: the operator must not change between them."""
        return self.inner(-1)

    @property
    def outer(self) -> Any:
        """The batch of the outer loss."""
        batches = self.problem.outer_batches
        return None if batches is None else batches(self.step, 0)
