"""The randomised Nyström preconditioner."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bilevel.errors import UsageError
from bilevel.linalg import InverseDiagonalPlusLowRank, LinearOperator, lanczos
from bilevel.linalg.lowrank import principal
from bilevel.linalg.nystrom import nystrom, sketch
from bilevel.linearisation import Linearisation
from bilevel.preconditioner.base import Preconditioner, Prepared, State
from bilevel.preconditioner.penalty import penalty_scale
from bilevel.solvers import InnerSolution

BLOCK = 25  # products between looks at the spectrum, while the rank is sought
NEAR = 10.0  # how far above the lower curvature the smallest captured eigenvalue may stay; CG's steps grow as its root


class _Scale(NamedTuple):
    """The part of the operator that is known: `diag(d) (* known)`.

    Attributes:
        diagonal: `d`, above 0, `(*batch, n)`.
        known: 1 where `d` is the penalty's Hessian, 0 where it is nothing but a scale.
    """

    diagonal: Tensor
    known: float


@dataclass(frozen=True)
class Nystrom(Preconditioner):
    r"""Deflates the large eigenvalues that a random sketch of the Hessian finds.

    With the penalty's Hessian `D` (known, diagonal) and `D^{-1/2} (H - D) D^{-1/2} ≈ U diag(s) U^T` of rank `r`, it is

        `P^{-1} = D^{-1/2} [ U diag(1 / (1 + s)) U^T + (I - U U^T) / (1 + s_r) ] D^{-1/2}`,

    Frangella's preconditioner with `μ = 1` in coordinates where all penalties are one. Without a penalty `D = I` and the `1 +`
    are dropped; entries that the penalty leaves out count as if they had the geometric mean of the others. Positive definite,
    also where the Hessian is not: eigenvalues that the sketch sees below zero are left out.
    What does not deflate is the small end of the spectrum; it pays where the data's curvature falls quickly below the penalty.

    Kept across outer steps are `D^{1/2} U` and `s`; with other penalties they are made orthonormal again in the new scale.

    Args:
        rank: number of products, and of eigenvectors; None adds blocks of 25 until the smallest eigenvalue that is found is
            near the lower curvature (10 times the penalty, or 10 times the smallest Ritz value of 20 Lanczos steps where there
            is no penalty).
        max_rank: where None stops at the latest; memory is that many vectors.
        seed: of the sketch.

    Reference: Frangella, Tropp and Udell (2021), "Randomized Nyström preconditioning".
    """

    rank: int | None = None
    max_rank: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        """Validate the numbers."""
        if self.rank is not None and self.rank < 1:
            raise UsageError(f"Nystrom needs rank >= 1 or None (found from the spectrum), but got {self.rank}.")
        if self.max_rank < 1:
            raise UsageError(f"Nystrom needs max_rank >= 1, but got {self.max_rank}.")

    def price(self, at: Linearisation) -> float:
        """The rank; two blocks where that is still to be found."""
        return 2 * BLOCK if self.rank is None else self.rank

    def build(self, at: Linearisation, inner: InnerSolution | None) -> Prepared:
        """Sketch the operator at the linearisation's point."""
        with torch.no_grad():
            scale = _scale(at)
            operator = _Scaled(at.operator, scale)
            vectors, values, num_mv = self._capture(operator, bool(scale.known))
            state = {"vectors": scale.diagonal.sqrt() * vectors, "values": values}
            return Prepared(_assemble(at.operator, scale, state), state, num_mv)

    def restore(self, at: Linearisation, state: State) -> LinearOperator:
        """The old eigenvectors beside the present penalty."""
        with torch.no_grad():
            return _assemble(at.operator, _scale(at), state)

    def _capture(self, operator: LinearOperator, penalised: bool) -> tuple[Tensor, Tensor, int]:
        """Eigenvectors, eigenvalues and the products that they took."""
        n = operator.shape[0]
        if self.rank is not None:
            rank = min(self.rank, n)
            return *nystrom(operator, sketch(operator, rank, self.seed)), rank
        spent, lower = 0, torch.ones((), dtype=operator.dtype, device=operator.device)
        if not penalised:
            ends = lanczos(operator, 20, self.seed)
            spent, lower = ends.num_mv, ends.smallest.clamp(min=0.0)
        taken = None
        while True:
            size = 0 if taken is None else len(taken.probes)
            taken = sketch(operator, min(BLOCK, min(self.max_rank, n) - size), self.seed, before=taken)
            vectors, values = nystrom(operator, taken)
            size = len(taken.probes)
            if size >= min(self.max_rank, n) or bool((values[..., 0] <= NEAR * lower).all()):
                return vectors, values, spent + size


class _Scaled(LinearOperator):
    """`D^{-1/2} H D^{-1/2}`, less the identity where `D` is a known part of `H`."""

    def __init__(self, operator: LinearOperator, scale: _Scale) -> None:
        self.operator, self.root, self.known = operator, scale.diagonal.rsqrt(), scale.known
        self.shape, self.batch_shape = operator.shape, operator.batch_shape
        self.dtype, self.device, self.tags = operator.dtype, operator.device, operator.tags

    def mv(self, vector: Tensor) -> Tensor:
        return self.root * self.operator.mv(self.root * vector) - self.known * vector

    def transpose(self) -> LinearOperator:
        return self

    def inner(self, u: Tensor, v: Tensor) -> Tensor:
        return self.operator.inner(u, v)


def _scale(at: Linearisation) -> _Scale:
    """The penalty; ones where there is none at all."""
    scale = penalty_scale(at)
    return _Scale(torch.ones_like(at.params).detach(), 0.0) if scale is None else _Scale(scale, 1.0)


def _assemble(like: LinearOperator, scale: _Scale, state: State) -> LinearOperator:
    """The inverse in the present scale, where what was orthonormal in an earlier one has to be made so again."""
    root = scale.diagonal.sqrt()
    weights = state["values"].sqrt().movedim(-1, 0).unsqueeze(-1)  # (k, *batch, 1)
    basis, values = principal(like, state["vectors"] * weights / root)
    rest = values[..., :1]  # the complement is put at the level of the smallest captured eigenvalue
    if not scale.known:
        captured = torch.where(values > 0, values, torch.inf).amin(-1, keepdim=True)
        rest = torch.where(captured.isfinite(), captured, 1.0)
    excess = (values - rest).clamp(min=0.0).sqrt().movedim(-1, 0).unsqueeze(-1)
    return InverseDiagonalPlusLowRank(like, scale.diagonal * (scale.known + rest), root * basis * excess)
