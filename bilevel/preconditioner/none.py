"""No preconditioner."""

from __future__ import annotations

from dataclasses import dataclass

from bilevel.linearisation import Linearisation
from bilevel.preconditioner.base import Preconditioner, Prepared, State
from bilevel.solvers import InnerSolution


@dataclass(frozen=True)
class NoPreconditioner(Preconditioner):
    """The linear system as it is."""

    def build(self, at: Linearisation, inner: InnerSolution | None) -> Prepared:
        """Nothing."""
        return Prepared(None, {})

    def restore(self, at: Linearisation, state: State) -> None:
        """Nothing."""
        return None
