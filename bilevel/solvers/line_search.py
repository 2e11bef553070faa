"""Backtracking line search for a batch of systems at once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bilevel.solvers.objective import Hparams, Objective

MAX_TRIALS = 30
EASED = 0.9  # of the slope, that is left after a step that the loss is too coarse to judge


class Point(NamedTuple):
    """A point with its value and gradient, for each system."""

    params: Tensor
    value: Tensor
    gradient: Tensor


def search(loss: Objective, start: Point, direction: Tensor, hparams: Hparams) -> tuple[Point, Tensor, int]:
    """The first of the steps 1, 1/2, 1/4, ... that lowers the loss enough (Armijo), one step for each system.

    Close to a minimum the loss no longer resolves the descent, but its gradient does, which is small itself instead of a
    difference of large numbers. There a step is taken when the loss does not rise by more than rounding, and the gradient
    norm falls, or the slope along the direction by a tenth (the approximate Wolfe conditions).

    Returns:
        The new point, which systems moved `(*batch,)`, and the number of evaluations.

    Reference: Hager and Zhang (2005), "A new conjugate gradient method with guaranteed descent and an efficient line search".
    """
    slope = torch.linalg.vecdot(start.gradient, direction)
    eps = torch.finfo(start.value.dtype).eps
    slack = 10 * eps * start.value.abs()
    size = torch.ones_like(slope)
    moved = torch.zeros_like(slope, dtype=torch.bool)
    best = start
    num_trials = 0
    for num_trials in range(1, MAX_TRIALS + 1):  # noqa: B007 - the count is returned
        params = start.params + size.unsqueeze(-1) * direction
        value, gradient = loss.value_and_gradient(params, hparams)
        lower = (value <= start.value + 1e-4 * size * slope) & (value < start.value - slack)
        eased = torch.linalg.vecdot(gradient, direction).abs() <= EASED * slope.abs()
        eased |= gradient.norm(dim=-1) < start.gradient.norm(dim=-1)
        flat = (value <= start.value + slack) & eased
        still = (params == start.params).all(-1)  # a step below rounding; shorter ones would be, too
        take = (lower | flat) & ~moved & ~still & value.isfinite()
        best = Point(
            torch.where(take.unsqueeze(-1), params, best.params),
            torch.where(take, value, best.value),
            torch.where(take.unsqueeze(-1), gradient, best.gradient),
        )
        moved = moved | take
        if bool((moved | still).all()):
            break
        size = torch.where(moved, size, 0.5 * size)
    return best, moved, num_trials
