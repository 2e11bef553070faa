"""The preconditioner that is built once it pays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from bilevel.linalg import POSITIVE_DEFINITE, AutoSolver, DiagonalOperator, LinearOperator, Tag
from bilevel.linearisation import Linearisation
from bilevel.preconditioner.base import Preconditioner, Prepared, State
from bilevel.preconditioner.kfac import KFAC
from bilevel.preconditioner.lbfgs_pairs import LBFGSPairs, has_pairs
from bilevel.preconditioner.nystrom import Nystrom
from bilevel.preconditioner.penalty import penalty_scale
from bilevel.solvers import InnerSolution


@dataclass(frozen=True)
class AutoPreconditioner(Preconditioner):
    """The penalty's diagonal, until linear solves have taken as many products as the cheapest better one costs.

    Of the candidates that is the Kronecker-factored one where the model is made of linear maps and has few outputs, else the
    sketch. Where the inner solver keeps curvature pairs, these correct it: they are free, and new in each outer step.

    Where `linear_solver=auto` forms the matrix, or the operator is not symmetric, there is none for good.

    Args:
        candidates: of those that serve the cheapest is built, and the first of equals.

    Reference: Karlin, Manasse, Rudolph and Sleator (1988), "Competitive snoopy caching", for when to build.
    """

    candidates: Sequence[Preconditioner] = field(default_factory=lambda: (KFAC(), Nystrom()))

    def price(self, at: Linearisation) -> float:
        """That of the cheapest candidate; infinity where none serves."""
        return min(self._prices(at), default=math.inf)

    def pays(self, at: Linearisation, num_mv: int) -> bool:
        """For a symmetric operator that is too large to be factorised, after solves that took as long as building takes."""
        return self._serves(at) and num_mv > 0 and num_mv >= self.price(at)

    def meanwhile(self, at: Linearisation) -> LinearOperator | None:
        """The inverse of the penalty's Hessian, where that has more than one value."""
        scale = penalty_scale(at) if self._serves(at) else None
        if scale is None or bool((scale == scale[..., :1]).all()):
            return None
        return DiagonalOperator(1.0 / scale, POSITIVE_DEFINITE)

    def build(self, at: Linearisation, inner: InnerSolution | None) -> Prepared:
        """That of the cheapest candidate, and the inner solver's pairs."""
        prices = self._prices(at)
        number = min(range(len(prices)), key=prices.__getitem__)
        pairs = inner is not None and has_pairs(inner)
        built = self._chosen(number, pairs).build(at, inner)
        choice = {CHOICE: torch.tensor(number), PAIRS: torch.tensor(pairs)}
        return Prepared(built.operator, {**built.state, **choice}, built.num_mv)

    def refresh(self, state: State, inner: InnerSolution | None) -> State:
        """That of what was built."""
        return self._built(state).refresh(state, inner)

    def restore(self, at: Linearisation, state: State) -> LinearOperator | None:
        """That of what was built."""
        return self._built(state).restore(at, {name: state[name] for name in state if name not in (CHOICE, PAIRS)})

    def _serves(self, at: Linearisation) -> bool:
        """For symmetric operators that are too large to be factorised."""
        return at.operator.shape[0] > AutoSolver().dense_size and Tag.symmetric in at.operator.tags

    def _prices(self, at: Linearisation) -> list[float]:
        return [candidate.price(at) for candidate in self.candidates]

    def _built(self, state: State) -> Preconditioner:
        return self._chosen(int(state[CHOICE]), bool(state[PAIRS]))

    def _chosen(self, number: int, pairs: bool) -> Preconditioner:
        candidate = self.candidates[number]
        return LBFGSPairs(candidate) if pairs else candidate


CHOICE, PAIRS = "auto.candidate", "auto.pairs"
