"""Non-smooth terms of an inner problem, known by their proximal maps, and what is smooth around a solution."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bilevel.solvers.objective import Hparams
from bilevel.solvers.options import Option, option


class Proximal(ABC):
    """A non-smooth term `g`, known by `prox(x, step) = argmin_z g(z) + ‖z - x‖² / (2 step)`."""

    @abstractmethod
    def prox(self, params: Tensor, step: float | Tensor, hparams: Hparams) -> Tensor:
        """The proximal map, `(*batch, n)`."""


class Piece(NamedTuple):
    """An interval for each entry on which the term is linear; those that stay have a single point.

    Attributes:
        low: its beginning, `(*batch, n)`.
        high: its end.
        slope: the term's derivative there.
    """

    low: Tensor
    high: Tensor
    slope: Tensor


class Polyhedral(Proximal):
    r"""A term that is piecewise linear in each entry by itself: `g(x) = Σ_j g_j(x_j)`.

    At a solution an entry is either *free*, on a linear piece of its `g_j`, or *held* at a kink or a bound. As long as that
    does not change, the solution is smooth in the hyperparameters, and only free entries have an equation to be solved:
    `∇f(x)_j + g_j' = 0` (their set is the support of a sparse solution). It does not change nearby where no held entry is at
    the edge, `margin > 0`.

    References: Bertrand, Klopfenstein, Massias, Blondel, Vaiter, Gramfort and Salmon (2022), "Implicit differentiation for
    fast hyperparameter selection in non-smooth convex learning"; Lewis (2002), "Active sets, nonsmoothness, and sensitivity".
    """

    @abstractmethod
    def value(self, params: Tensor, hparams: Hparams) -> Tensor:
        """`g`, `(*batch,)`; inside its domain."""

    @abstractmethod
    def free(self, params: Tensor, hparams: Hparams) -> Tensor:
        """Which entries are on a linear piece, `(*batch, n)`, boolean."""

    @abstractmethod
    def held(self, params: Tensor, hparams: Hparams) -> Tensor:
        """Where the others are held, `(*batch, n)`; differentiable in the hyperparameters."""

    @abstractmethod
    def slope(self, params: Tensor, hparams: Hparams) -> Tensor:
        """`g_j'` of the free entries, `(*batch, n)`; differentiable in the hyperparameters."""

    @abstractmethod
    def margin(self, params: Tensor, gradient: Tensor, hparams: Hparams) -> Tensor:
        """By how much `∇f(x)_j` has to change before a held entry comes free, `(*batch, n)`, in the gradient's units.

        Args:
            params: a solution.
            gradient: `∇f` there.
            hparams: natural units.
        """

    @abstractmethod
    def piece(self, params: Tensor, gradient: Tensor, hparams: Hparams) -> Piece:
        """The linear piece that each entry is on or, from a kink or a bound, wants to go to.

        Args:
            params: a point.
            gradient: `∇f` there.
            hparams: natural units.
        """

    @abstractmethod
    def on(self, entries: Tensor, params: Tensor, hparams: Hparams) -> Polyhedral:
        """The term of some entries by themselves, as numbers.

        Args:
            entries: their numbers, `(m,)`.
            params: of all entries, for shape and dtype.
            hparams: natural units.
        """


def least_subgradient(term: Polyhedral, params: Tensor, gradient: Tensor, hparams: Hparams) -> Tensor:
    """The shortest element of `∇f(x) + ∂g(x)`, `(*batch, n)`: zero at a solution.

    Args:
        term: `g`.
        params: `x`.
        gradient: `∇f(x)`.
        hparams: of the term.
    """
    short = torch.relu(-term.margin(params, gradient, hparams)) * gradient.sign()
    return torch.where(term.free(params, hparams), gradient + term.slope(params, hparams), short)


@dataclass(frozen=True)
class SoftThreshold(Polyhedral):
    """`g(x) = Σ_j strength_j |x_j|`.

    Args:
        strength: a number, or the name of a hyperparameter (a scalar, or one entry for each parameter).
    """

    strength: Option | Tensor = 1.0

    def prox(self, params: Tensor, step: float | Tensor, hparams: Hparams) -> Tensor:
        """Shrink towards zero."""
        threshold = _spread(self.strength, params, hparams) * step
        return torch.sign(params) * torch.relu(params.abs() - threshold)

    def value(self, params: Tensor, hparams: Hparams) -> Tensor:
        """The weighted 1-norm."""
        return (_spread(self.strength, params, hparams) * params.abs()).sum(-1)

    def free(self, params: Tensor, hparams: Hparams) -> Tensor:
        """Those that are not zero, and those without a penalty."""
        return (params != 0) | (_spread(self.strength, params, hparams) == 0)

    def held(self, params: Tensor, hparams: Hparams) -> Tensor:
        """At zero."""
        return torch.zeros_like(params)

    def slope(self, params: Tensor, hparams: Hparams) -> Tensor:
        """The strength, with the entry's sign."""
        return _spread(self.strength, params, hparams) * params.sign()

    def margin(self, params: Tensor, gradient: Tensor, hparams: Hparams) -> Tensor:
        """An entry is zero as long as its gradient is no larger than the strength."""
        return _spread(self.strength, params, hparams) - gradient.abs()

    def piece(self, params: Tensor, gradient: Tensor, hparams: Hparams) -> Piece:
        """The half line of the entry's sign; from zero that down the gradient, if it is larger than the strength."""
        strength = _spread(self.strength, params, hparams)
        down = -gradient.sign() * (gradient.abs() > strength)
        sign = torch.where(params == 0, down, params.sign())
        free = strength == 0  # on a single piece, the whole line
        low = torch.where((sign < 0) | free, -torch.inf, 0.0).to(params.dtype)
        high = torch.where((sign > 0) | free, torch.inf, 0.0).to(params.dtype)
        return Piece(low, high, strength * sign)

    def on(self, entries: Tensor, params: Tensor, hparams: Hparams) -> SoftThreshold:
        """With the strengths of these entries."""
        return SoftThreshold(_spread(self.strength, params, hparams)[..., entries])


@dataclass(frozen=True)
class Project(Polyhedral):
    """`g(x) = 0` in the box, infinite outside: the projection on it.

    Args:
        low: lower bound of every parameter; a number, or the name of a hyperparameter (a scalar, or one entry for each).
        high: upper bound, likewise.
    """

    low: Option | Tensor = 0.0
    high: Option | Tensor = float("inf")

    def prox(self, params: Tensor, step: float | Tensor, hparams: Hparams) -> Tensor:
        """Clip."""
        low, high = _spread(self.low, params, hparams), _spread(self.high, params, hparams)
        return torch.minimum(torch.maximum(params, low), high)

    def value(self, params: Tensor, hparams: Hparams) -> Tensor:
        """Zero."""
        return params.new_zeros(params.shape[:-1])

    def free(self, params: Tensor, hparams: Hparams) -> Tensor:
        """Those strictly between the bounds."""
        return (params > _spread(self.low, params, hparams)) & (params < _spread(self.high, params, hparams))

    def held(self, params: Tensor, hparams: Hparams) -> Tensor:
        """At the bound where they are."""
        low, high = _spread(self.low, params, hparams), _spread(self.high, params, hparams)
        return torch.where(params <= low, low, high)

    def slope(self, params: Tensor, hparams: Hparams) -> Tensor:
        """None."""
        return torch.zeros_like(params)

    def margin(self, params: Tensor, gradient: Tensor, hparams: Hparams) -> Tensor:
        """An entry stays at a bound as long as its gradient pushes it there."""
        return torch.where(params <= _spread(self.low, params, hparams), gradient, -gradient)

    def piece(self, params: Tensor, gradient: Tensor, hparams: Hparams) -> Piece:
        """The box, but for entries that their gradient pushes to the bound where they are."""
        low, high = _spread(self.low, params, hparams), _spread(self.high, params, hparams)
        stays = ((params <= low) & (gradient >= 0)) | ((params >= high) & (gradient <= 0))
        return Piece(torch.where(stays, params, low), torch.where(stays, params, high), torch.zeros_like(params))

    def on(self, entries: Tensor, params: Tensor, hparams: Hparams) -> Project:
        """With the bounds of these entries."""
        return Project(*(_spread(bound, params, hparams)[..., entries] for bound in (self.low, self.high)))


def _spread(value: Option | Tensor, params: Tensor, hparams: Hparams) -> Tensor:
    """An option as one number for each entry of params."""
    found = value if isinstance(value, Tensor) else option(value, hparams)
    return torch.as_tensor(found, dtype=params.dtype, device=params.device).expand(params.shape)
