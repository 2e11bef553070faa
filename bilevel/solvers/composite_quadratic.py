"""A quadratic plus a piecewise linear term, minimised: by Newton's method on its pieces."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bilevel.solvers.objective import Hparams
from bilevel.solvers.proximal import Polyhedral, least_subgradient
from bilevel.solvers.solver import row_norm

ARC = 0.5 ** torch.arange(8)  # lengths of a step that are tried
MAX_ROUNDS = 500
SMALLEST, LARGEST = 1e-12, 1e6  # of what is added to the diagonal, over its mean
SHRINK, GROW = 0.1, 10.0


class Quadratic(NamedTuple):
    r"""`q(x) = gradient^T (x - point) + (x - point)^T hessian (x - point) / 2`, positive semidefinite; one for each system.

    Attributes:
        hessian: `(*batch, m, m)`.
        gradient: `(*batch, m)`.
        point: `(*batch, m)`.
    """

    hessian: Tensor
    gradient: Tensor
    point: Tensor

    def gradient_at(self, x: Tensor) -> Tensor:
        """`∇q(x)`."""
        return self.gradient + self._times(x - self.point)

    def minimum(self, term: Polyhedral, hparams: Hparams, tolerance: float) -> Tensor:
        """`argmin q + g`, to a norm of the least subgradient, `(*batch, m)`.

        Newton's step on the linear piece of each entry, projected on the pieces. What is added to the diagonal for it grows
        where that gains nothing (a step of projected gradient descent in the limit), and shrinks where it does: more entries
        may be free than the Hessian has a rank.

        Args:
            term: `g`.
            hparams: of the term.
            tolerance: in the gradient's units, for each system.

        References: Bertsekas (1982), "Projected Newton methods for optimization problems with simple constraints"; Moré (1978),
        "The Levenberg-Marquardt algorithm".
        """
        x, lowest = self.point, term.value(self.point, hparams)
        left = self._left(term, x, hparams)
        scale = self.hessian.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=torch.finfo(x.dtype).tiny)
        damping = torch.full_like(scale, SMALLEST)
        for _ in range(MAX_ROUNDS):
            if bool(((left <= tolerance) | (damping > LARGEST)).all()):
                break
            point = self._projected(term, x, damping * scale, hparams)
            value, short = self._value(point) + term.value(point, hparams), self._left(term, point, hparams)
            slack = _slack(lowest)  # below which values do not tell, but subgradients do
            better = (value < lowest - slack) | ((value <= lowest + slack) & (short < left))
            x = torch.where(better.unsqueeze(-1), point, x)
            lowest, left = torch.where(better, value, lowest), torch.where(better, short, left)
            damping = torch.where(better, (SHRINK * damping).clamp(min=SMALLEST), GROW * damping)
        return x

    def _left(self, term: Polyhedral, x: Tensor, hparams: Hparams) -> Tensor:
        """Norm of the least subgradient; infinite where there is none."""
        return row_norm(least_subgradient(term, x, self.gradient_at(x), hparams)).nan_to_num(nan=torch.inf)

    def _times(self, x: Tensor) -> Tensor:
        """Of one vector of each system, or of several, `(T, *batch, m)`."""
        many = x if x.ndim == self.hessian.ndim else x.unsqueeze(0)
        return (self.hessian @ many.movedim(0, -1)).movedim(-1, 0).reshape(x.shape)

    def _projected(self, term: Polyhedral, x: Tensor, damping: Tensor, hparams: Hparams) -> Tensor:
        """The best of some lengths of Newton's step of the free entries, on its way in their pieces."""
        gradient = self.gradient_at(x)
        low, high, slope = term.piece(x, gradient, hparams)
        free = low < high
        some = (
            free.reshape(-1, x.shape[-1]).any(0).nonzero().squeeze(-1)
        )  # those of any system: the others have no equation
        mine = free[..., some]
        among_mine, identity = (
            mine.unsqueeze(-1) & mine.unsqueeze(-2),
            torch.eye(len(some), dtype=x.dtype, device=x.device),
        )
        hessian = self.hessian[..., some[:, None], some] + damping[..., None, None] * identity
        rhs = torch.where(mine, (-gradient - slope)[..., some], 0.0)
        solved, _ = torch.linalg.solve_ex(torch.where(among_mine, hessian, identity), rhs)
        direction = torch.zeros_like(x).index_copy(-1, some, solved)
        arc = (x + ARC.to(x).reshape(-1, *[1] * x.ndim) * direction).clamp(low, high)  # (T, *batch, m)
        values = self._value(arc) + term.value(arc, hparams)
        values = values.nan_to_num(nan=torch.inf)
        least = values.amin(0)
        longest = (
            (values <= least + _slack(least)).int().argmax(0)
        )  # the first one, of those that values do not tell apart
        return arc.gather(0, longest.unsqueeze(0).unsqueeze(-1).expand(1, *x.shape)).squeeze(0)

    def _value(self, x: Tensor) -> Tensor:
        moved = x - self.point
        return ((self.gradient + self._times(moved) / 2) * moved).sum(-1)


def _slack(value: Tensor) -> Tensor:
    """What rounding makes of a value."""
    return 10 * torch.finfo(value.dtype).eps * value.abs()
