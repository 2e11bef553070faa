"""The diagonal of the penalty's Hessian: the part of the curvature that is known without looking at data."""

from __future__ import annotations

import torch
from torch import Tensor

from bilevel.errors import UsageError
from bilevel.linalg import HessianOperator
from bilevel.linearisation import Linearisation
from bilevel.rng import generator
from bilevel.tree import detach

NUM_PROBES = 10  # for penalties whose Hessian is not diagonal


def penalty_diagonal(at: Linearisation) -> Tensor | None:
    r"""Diagonal of `∇²penalty` at the linearisation's point, `(*batch, n)`, at least 0; None where nothing is known.

    Weight decay has a diagonal Hessian, so that one product with ones, with random signs `z`, is all of it: `z ∘ (D z)`.
    A second product with other signs shows whether it is diagonal; where it is not, the mean of ten such products stands
    for the diagonal (Hutchinson's estimate). No product touches the data.
    """
    point, hparams = at.params.detach(), detach(at.hparams)
    try:
        penalty = at.problem.model(point, hparams, at.batch).penalty
    except UsageError:
        return None  # an inner loss in one piece
    if penalty is None:
        return None
    operator = HessianOperator(lambda x: penalty(x, hparams), point)
    source = generator(0)
    with torch.no_grad():
        first, second = (_probe(operator, point, source) for _ in range(2))
        if not torch.allclose(first, second, rtol=100 * torch.finfo(point.dtype).eps, atol=0.0):
            more = [_probe(operator, point, source) for _ in range(NUM_PROBES - 2)]
            first = torch.stack([first, second, *more]).mean(0)
        return first.clamp(min=0.0)


def penalty_scale(at: Linearisation) -> Tensor | None:
    """`penalty_diagonal`, with the geometric mean of the others where an entry has no penalty; None where none has one."""
    penalty = penalty_diagonal(at)
    if penalty is None or not bool((penalty > 0).any(-1).all()):
        return None
    positive = penalty > 0
    logs = torch.where(positive, torch.where(positive, penalty, 1.0).log(), 0.0)
    mean = (logs.sum(-1, keepdim=True) / positive.sum(-1, keepdim=True)).exp()
    return torch.where(positive, penalty, mean)


def signs(shape: tuple[int, ...], source: torch.Generator, like: Tensor) -> Tensor:
    """Random signs, the same on every device."""
    drawn = torch.randint(0, 2, shape, generator=source, dtype=torch.int8)
    return (2 * drawn - 1).to(device=like.device, dtype=like.dtype)


def _probe(operator: HessianOperator, point: Tensor, source: torch.Generator) -> Tensor:
    z = signs(tuple(point.shape), source, point)
    return z * operator.mv(z)
