"""Derivatives of the outer loss by solving the inner problem again beside a point: no theorem, no graph through a solve."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from bilevel.rng import generator, normal
from bilevel.tree import TensorDict

if TYPE_CHECKING:
    from bilevel.diagnostics.subject import Subject

STEP = 2e-3  # in raw coordinates: logarithms for positive hyperparameters
AGREEMENT = 1e-3  # of differences of two step lengths
MAX_HALVINGS = 6


class Measured(NamedTuple):
    """A derivative of the outer loss along one direction of the raw hyperparameters.

    Attributes:
        direction: of length one, ravelled.
        value: by finite differences of the re-solved problem.
    """

    direction: Tensor
    value: float


def directional_derivatives(subject: Subject, gradient: Tensor, seed: int) -> list[Measured]:
    """Along a gradient and along a random direction.

    Args:
        subject: the problem and its refined solution.
        gradient: a hypergradient, ravelled, natural units.
        seed: of the random direction.
    """
    flat, natural = raw_coordinates(subject)
    slope = pull_to_raw(subject, gradient)
    chosen = normal((len(flat),), generator(seed, 40), flat.dtype, flat.device)
    directions = [one / one.norm() for one in (slope, chosen) if float(one.norm()) > 0]
    least = _along_one(subject.raw_floor, slope)
    differences = [partial(_difference, subject, natural, flat, one) for one in directions]
    return [Measured(one, _extrapolated(along, least)) for one, along in zip(directions, differences, strict=True)]


def discrepancy(subject: Subject, measured: Sequence[Measured], gradient: Tensor) -> float:
    """How far a hypergradient is from measured derivatives: the largest relative error.

    Relative to the larger of the two, or to what a random direction would have: of this gradient, or of the floor.
    """
    slope = pull_to_raw(subject, gradient)
    usual = _along_one(max(float(slope.norm()), subject.raw_floor), slope)
    errors = [0.0]
    for direction, value in measured:
        own = float(slope @ direction)
        gap = abs(value - own)
        errors.append(gap / max(abs(value), abs(own), usual) if gap != 0 else 0.0)
    # max() alone passes over a NaN that does not come first.
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def _along_one(length: float, slope: Tensor) -> float:
    """What a random direction would see of a gradient of this length."""
    return length / max(len(slope), 1) ** 0.5


def raw_coordinates(subject: Subject) -> tuple[Tensor, Callable[[Tensor], TensorDict]]:
    """The raw hyperparameters as one vector, and the way from there to natural ones."""
    raw = {name: value.detach() for name, value in subject.bijections.to_raw(subject.hparams).items()}
    places = raw_places(subject)

    def natural(point: Tensor) -> TensorDict:
        return subject.bijections.to_natural(
            {name: point[places[name]].reshape(value.shape) for name, value in raw.items()}
        )

    return torch.cat([value.flatten() for value in raw.values()]), natural


def raw_places(subject: Subject) -> dict[str, slice]:
    """Where each hyperparameter is in that vector."""
    places, start = {}, 0
    for name, value in subject.bijections.to_raw(subject.hparams).items():
        places[name] = slice(start, start + value.numel())
        start += value.numel()
    return places


def pull_to_raw(subject: Subject, gradient: Tensor) -> Tensor:
    """A gradient with respect to natural hyperparameters, with respect to raw ones."""
    flat, natural = raw_coordinates(subject)
    leaf = flat.clone().requires_grad_()
    (slope,) = torch.autograd.grad(subject.layout.ravel(natural(leaf)), leaf, gradient)
    return slope


def _extrapolated(difference: Callable[[float], float], least: float) -> float:
    """Richardson's value of central differences, at the first step that agrees with the next one.

    A larger step may reach beyond a point where the solution is not smooth, such as a change of the active set. Below
    `least` a derivative counts as zero: two numbers that are rounding would never agree.
    """
    step, coarse = STEP, difference(STEP)
    for _ in range(MAX_HALVINGS):
        fine = difference(step / 2)
        if abs(fine - coarse) <= AGREEMENT * max(abs(fine), abs(coarse), least):
            break
        step, coarse = step / 2, fine
    return (4 * fine - coarse) / 3


def _difference(
    subject: Subject, natural: Callable[[Tensor], TensorDict], flat: Tensor, direction: Tensor, step: float
) -> float:
    """Central difference of the outer loss at re-solved inner problems."""
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            hparams = {name: value.detach() for name, value in natural(flat + sign * step * direction).items()}
        params = subject.resolved(hparams)
        with torch.no_grad():
            values.append(float(subject.flat.outer_loss(params, hparams, subject.batches.outer).mean()))
    return (values[0] - values[1]) / (2 * step)
