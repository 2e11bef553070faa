"""Derivatives of the outer loss by solving the inner problem again beside a point: no theorem, no graph through a solve."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from bilevel.diagnostics.subject import Subject
from bilevel.rng import generator, normal
from bilevel.tree import TensorDict

STEP = 2e-3  # in raw coordinates: logarithms for positive hyperparameters
AGREEMENT = 1e-3  # of differences of two step lengths
MAX_HALVINGS = 6


class Directional(NamedTuple):
    """A derivative along one direction of the raw hyperparameters.

    Attributes:
        direction: what it is, in words.
        measured: by finite differences of the re-solved problem.
        expected: by the hypergradient.
        error: their difference, relative to the larger of the derivative and what a random direction would have.
    """

    direction: str
    measured: float
    expected: float
    error: float


def directional_derivatives(subject: Subject, gradient: Tensor, seed: int) -> list[Directional]:
    """Along the gradient itself and along a random direction.

    Args:
        subject: the problem and its refined solution.
        gradient: a hypergradient, ravelled, natural units.
        seed: of the random direction.
    """
    raw = {name: value.detach() for name, value in subject.bijections.to_raw(subject.hparams).items()}
    names, sizes = list(raw), [value.numel() for value in raw.values()]
    flat = torch.cat([raw[name].flatten() for name in names])

    def natural(point: Tensor) -> TensorDict:
        parts = dict(zip(names, point.split(sizes), strict=True))
        return subject.bijections.to_natural({name: part.reshape(raw[name].shape) for name, part in parts.items()})

    leaf = flat.clone().requires_grad_()
    (slope,) = torch.autograd.grad(subject.layout.ravel(natural(leaf)), leaf, gradient)
    scale = float(slope.norm())
    along = slope / scale if scale > 0 else torch.zeros_like(slope)
    chosen = normal((len(flat),), generator(seed, 40), flat.dtype, flat.device)
    found = []
    for words, direction in (("the gradient", along), ("a random direction", chosen / chosen.norm())):
        if not float(direction.norm()) > 0:
            continue
        expected = float(slope @ direction)
        measured = _extrapolated(partial(_difference, subject, natural, flat, direction))
        size = max(abs(expected), abs(measured), scale / len(flat) ** 0.5, 1e-12)
        found.append(Directional(words, measured, expected, abs(measured - expected) / size))
    return found


def _extrapolated(difference: Callable[[float], float]) -> float:
    """Richardson's value of central differences, at the first step that agrees with the next one.

    A larger step may reach beyond a point where the solution is not smooth, such as a change of the active set.
    """
    step, coarse = STEP, difference(STEP)
    for _ in range(MAX_HALVINGS):
        fine = difference(step / 2)
        if abs(fine - coarse) <= AGREEMENT * max(abs(fine), abs(coarse)):
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
        params = subject.refine(subject.refined, hparams)
        with torch.no_grad():
            values.append(float(subject.flat.outer_loss(params, hparams, subject.batches.outer).mean()))
    return (values[0] - values[1]) / (2 * step)
