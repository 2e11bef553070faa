"""The preconditioner that is built once it pays."""

from __future__ import annotations

from dataclasses import dataclass, field

from bilevel.errors import UsageError
from bilevel.linalg import AutoSolver, LinearOperator, Tag
from bilevel.linearisation import Linearisation
from bilevel.preconditioner.base import Preconditioner, Prepared, State
from bilevel.preconditioner.nystrom import Nystrom
from bilevel.solvers import InnerSolution


@dataclass(frozen=True)
class AutoPreconditioner(Preconditioner):
    """None, until a linear solve has taken so many products that building one is cheap beside it.

    Where `linear_solver=auto` forms the matrix, or the operator is not symmetric, there is none for good.

    Args:
        base: what is built then.
        patience: products of a solve from which on it is built; the smallest sketch of the default takes 25.
    """

    base: Preconditioner = field(default_factory=Nystrom)
    patience: int = 50

    def __post_init__(self) -> None:
        """Validate the number."""
        if self.patience < 1:
            raise UsageError(f"AutoPreconditioner needs patience >= 1, but got {self.patience}.")

    def pays(self, at: Linearisation, num_mv: int) -> bool:
        """For a symmetric operator that is too large to be factorised, after a solve that took long."""
        large = at.operator.shape[0] > AutoSolver().dense_size
        return large and Tag.symmetric in at.operator.tags and num_mv >= self.patience

    def build(self, at: Linearisation, inner: InnerSolution | None) -> Prepared:
        """That of the base."""
        return self.base.build(at, inner)

    def restore(self, at: Linearisation, state: State) -> LinearOperator | None:
        """That of the base."""
        return self.base.restore(at, state)
