"""How accurately the solves of an outer step are made: as the solvers say, or as accurately as the step needs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from bilevel.solvers import InnerSolver

if TYPE_CHECKING:
    from bilevel.hypergradient.method import Hypergradient

State = dict[str, Tensor]


class Accuracy(ABC):
    """Sets the tolerances of the inner and of the linear solve of each outer step; its state is kept by the outer loop."""

    def init(self, params: Tensor) -> State:
        """The state before the first outer step."""
        return {}

    @abstractmethod
    def tighten(self, solver: InnerSolver, state: State) -> InnerSolver:
        """The inner solver with the tolerance of this step."""

    @abstractmethod
    def linear_rtol(self, state: State) -> float | None:
        """Relative tolerance of this step's linear solve; None leaves the solver's own."""

    @abstractmethod
    def update(self, state: State, result: Hypergradient) -> State:
        """The state for the next step, from what this one was worth."""


@dataclass(frozen=True)
class FixedAccuracy(Accuracy):
    """The tolerances that the solvers were made with."""

    def tighten(self, solver: InnerSolver, state: State) -> InnerSolver:
        """As it is."""
        return solver

    def linear_rtol(self, state: State) -> float | None:
        """The solver's own."""
        return None

    def update(self, state: State, result: Hypergradient) -> State:
        """Nothing to remember."""
        return {}
