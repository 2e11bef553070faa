"""The contract of an inner solver: `init`, `step`, `done`; the loop is in `solvers/loop.py`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, ClassVar

import torch
from torch import Tensor

from bilevel.errors import UsageError
from bilevel.solvers.objective import Hparams, Objective
from bilevel.solvers.options import hparam_names
from bilevel.solvers.proximal import Polyhedral
from bilevel.solvers.update_rule import UpdateRule, no_rule

State = dict[str, Any]


@dataclass(frozen=True)
class InnerSolver(ABC):
    """An iterative way to solve the inner problem; a step is a pure function of its arguments.

    `params` are vectors `(*batch, n)`, one for each system. The state is a dictionary of tensors and holds at least
    `stationarity`, the norm of the latest gradient of each system `(*batch,)`, and `num_gradients`; the loop adds
    `first_stationarity`, that of the starting point, where the solver has not.

    Args:
        max_steps: largest number of inner steps.
        atol: stop when the stationarity (norm of the gradient, in its units) is at most this.
        rtol: stop as well when it is at most this times that of the starting point. With `atol` and `rtol` both 0 all
            the steps are made.
        compile: compile the gradients of a problem's inner steps where these are not recorded for a derivative: seconds once
            (tens of them for convolutional networks); `fit` and the hypergradients tell in the receipt where that fails, and
            why. An objective that is no problem's is evaluated as it is.

    Attributes:
        differentiable: whether a step can be recorded, as the unrolled, forward and one-step methods need.
        full_batch: whether steps compare losses with each other, so that minibatches would mislead them.
        composite: whether a non-smooth term is added to the loss, so that a solution is no zero of the loss's gradient.
        moves_solution: the options that a solution depends on (they stand in `conditions`); the others change the way there.
    """

    max_steps: int = 200
    atol: float = 1e-6
    rtol: float = field(default=0.0, kw_only=True)
    compile: bool = field(default=False, kw_only=True)

    differentiable: ClassVar[bool] = True
    full_batch: ClassVar[bool] = False
    composite: ClassVar[bool] = False
    moves_solution: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        """Validate the numbers."""
        name = type(self).__name__
        if not _is(Integral, self.max_steps) or self.max_steps < 1:
            raise UsageError(f"{name} needs max_steps >= 1, an integer, but got {self.max_steps!r}.")
        if not _is(Real, self.atol) or not self.atol >= 0:
            raise UsageError(f"{name} needs atol >= 0, but got {self.atol!r}.")
        if not _is(Real, self.rtol) or not 0 <= self.rtol < 1:
            raise UsageError(f"{name} needs rtol in [0, 1), but got {self.rtol!r}.")
        if not isinstance(self.compile, bool):
            raise UsageError(f"{name} needs compile to be true or false, but got {self.compile!r}.")

    @property
    def hparam_names(self) -> tuple[str, ...]:
        """The options of this solver that name a hyperparameter instead of holding a number."""
        return hparam_names(self)

    @property
    def polyhedral(self) -> Polyhedral | None:
        """The non-smooth term of a composite solver, where it is one that leaves a smooth problem around a solution."""
        return None

    @abstractmethod
    def init(self, params: Tensor, loss: Objective, hparams: Hparams) -> State:
        """The state before the first step."""

    @abstractmethod
    def step(self, params: Tensor, state: State, loss: Objective, hparams: Hparams) -> tuple[Tensor, State]:
        """One step."""

    def conditions(self, loss: Objective) -> Objective:
        """What vanishes at a solution, for the implicit function theorem: the gradient of the loss, unless overridden."""
        return loss

    def update_rule(self) -> UpdateRule:
        """The step as an elementwise rule that can be differentiated.

        Raises:
            UsageError: it is none.
        """
        raise no_rule(f"{type(self).__name__} has none")

    def done(self, state: State) -> Tensor:
        """Which systems are stationary, `(*batch,)`."""
        tolerance: float | Tensor = self.atol
        if self.rtol > 0:
            tolerance = (self.rtol * state["first_stationarity"]).clamp(min=self.atol)
        stationary: Tensor = state["stationarity"] <= tolerance
        return stationary


def fresh_state(params: Tensor) -> State:
    """The entries that every solver's state has."""
    batch = params.shape[:-1]
    return {
        "stationarity": torch.full(batch, torch.inf, dtype=params.dtype, device=params.device),
        "num_gradients": torch.zeros((), dtype=torch.int64),
        "num_mv": torch.zeros((), dtype=torch.int64),
    }


def split_state(state: State) -> tuple[dict[str, Tensor], State]:
    """The part of a state that derivatives flow through (floating-point tensors, no measurements), and the rest."""
    moving = {
        key: value for key, value in state.items()
        if isinstance(value, Tensor) and value.is_floating_point() and "stationarity" not in key
    }  # fmt: skip
    return moving, {key: value for key, value in state.items() if key not in moving}


def row_norm(vector: Tensor) -> Tensor:
    """Norm of each system's vector, cut from every graph: a measurement, not a part of the step."""
    return torch.linalg.vector_norm(vector.detach(), dim=-1)


def _is(kind: type, value: Any) -> bool:
    """Whether it is a number of the kind: whatever is given in spite of the annotations."""
    return isinstance(value, kind)
