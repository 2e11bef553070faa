"""The preconditioner that is built once it pays."""

from __future__ import annotations

from dataclasses import dataclass, field

from bilevel.errors import UsageError
from bilevel.linalg import POSITIVE_DEFINITE, AutoSolver, DiagonalOperator, LinearOperator, Tag
from bilevel.linearisation import Linearisation
from bilevel.preconditioner.base import Preconditioner, Prepared, State
from bilevel.preconditioner.nystrom import Nystrom
from bilevel.preconditioner.penalty import penalty_scale
from bilevel.solvers import InnerSolution


@dataclass(frozen=True)
class AutoPreconditioner(Preconditioner):
    """The penalty's diagonal, until linear solves have taken as many products as building a better one may cost.

    Where `linear_solver=auto` forms the matrix, or the operator is not symmetric, there is none for good.

    Args:
        base: what is built then.
        patience: products of the linear solves so far from which on it is built; a sketch of the default takes 25 or more.
    """

    base: Preconditioner = field(default_factory=Nystrom)
    patience: int = 50

    def __post_init__(self) -> None:
        """Validate the number."""
        if self.patience < 1:
            raise UsageError(f"AutoPreconditioner needs patience >= 1, but got {self.patience}.")

    def pays(self, at: Linearisation, num_mv: int) -> bool:
        """For a symmetric operator that is too large to be factorised, after solves that took as long."""
        return self._serves(at) and num_mv >= self.patience

    def meanwhile(self, at: Linearisation) -> LinearOperator | None:
        """The inverse of the penalty's Hessian, where that has more than one value."""
        scale = penalty_scale(at) if self._serves(at) else None
        if scale is None or bool((scale == scale[..., :1]).all()):
            return None
        return DiagonalOperator(1.0 / scale, POSITIVE_DEFINITE)

    def _serves(self, at: Linearisation) -> bool:
        """For symmetric operators that are too large to be factorised."""
        return at.operator.shape[0] > AutoSolver().dense_size and Tag.symmetric in at.operator.tags

    def build(self, at: Linearisation, inner: InnerSolution | None) -> Prepared:
        """That of the base."""
        return self.base.build(at, inner)

    def restore(self, at: Linearisation, state: State) -> LinearOperator | None:
        """That of the base."""
        return self.base.restore(at, state)
