"""A quadratic plus a piecewise linear term, minimised: by Newton's method on the free entries, safeguarded by FISTA."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bilevel.solvers.objective import Hparams
from bilevel.solvers.proximal import Polyhedral, least_subgradient
from bilevel.solvers.solver import row_norm

ARC = 0.5 ** torch.arange(8)  # lengths of a step that are tried
MAX_ROUNDS = 100
SAFE_STEPS = 50  # of FISTA, where Newton's step comes no closer
NO_GAIN = 3  # rounds without progress: this is all that rounding allows


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

        Newton's step on the linear piece of each entry, projected on the pieces. Where that comes no closer, FISTA goes on.

        Args:
            term: `g`.
            hparams: of the term.
            tolerance: in the gradient's units, for each system.

        Reference: Bertsekas (1982), "Projected Newton methods for optimization problems with simple constraints".
        """
        best, found = self.point, self._residual(term, self.point, hparams)
        lowest = term.value(best, hparams)
        failures = 0
        for _ in range(MAX_ROUNDS):
            if bool((found <= tolerance).all()) or failures == NO_GAIN:
                break
            before = lowest, found
            for attempt in (self._newton, self._fista):
                x = attempt(term, best, hparams)
                value, residual = self._value(x) + term.value(x, hparams), self._residual(term, x, hparams)
                closer = (value < lowest) | ((value <= lowest + 1e-15 * lowest.abs()) & (residual < found))
                best = torch.where(closer.unsqueeze(-1), x, best)
                lowest, found = torch.where(closer, value, lowest), torch.where(closer, residual, found)
                if bool((closer | (found <= tolerance)).all()):
                    break
            failures = 0 if bool(((lowest < before[0]) | (found < before[1])).any()) else failures + 1
        return best

    def _residual(self, term: Polyhedral, x: Tensor, hparams: Hparams) -> Tensor:
        return row_norm(least_subgradient(term, x, self.gradient_at(x), hparams)).nan_to_num(nan=torch.inf)

    def _times(self, x: Tensor) -> Tensor:
        return (self.hessian @ x.unsqueeze(-1)).squeeze(-1)

    def _newton(self, term: Polyhedral, x: Tensor, hparams: Hparams) -> Tensor:
        """Newton's step of the entries that are free on their pieces, along its arc in them."""
        gradient = self.gradient_at(x)
        low, high, slope = term.piece(x, gradient, hparams)
        free = low < high
        among_free = free.unsqueeze(-1) & free.unsqueeze(-2)
        identity = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
        rhs = torch.where(free, -gradient - slope, 0.0)
        direction, _ = torch.linalg.solve_ex(torch.where(among_free, self.hessian, identity), rhs)
        arc = (x + ARC.to(x).reshape(-1, *[1] * x.ndim) * direction).clamp(low, high)  # (T, *batch, m)
        values = self._value(arc) + term.value(arc, hparams)
        shortest = values.nan_to_num(nan=torch.inf).argmin(0)
        return arc.gather(0, shortest.unsqueeze(0).unsqueeze(-1).expand(1, *x.shape)).squeeze(0)

    def _value(self, x: Tensor) -> Tensor:
        moved = x - self.point
        return ((self.gradient + self._times(moved) / 2) * moved).sum(-1)

    def _fista(self, term: Polyhedral, x: Tensor, hparams: Hparams) -> Tensor:
        largest = self.hessian.abs().sum(-1).amax(-1, keepdim=True)  # no smaller than the largest eigenvalue
        size = 1 / largest.clamp(min=torch.finfo(x.dtype).tiny)
        point, inertia = x, 1.0
        for _ in range(SAFE_STEPS):
            new = term.prox(point - size * self.gradient_at(point), size, hparams)
            inertia, last = (1 + (1 + 4 * inertia**2) ** 0.5) / 2, inertia
            point, x = new + (last - 1) / inertia * (new - x), new
        return x
