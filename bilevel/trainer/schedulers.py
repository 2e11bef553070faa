"""Schedules of the outer learning rate that torch does not have."""

from __future__ import annotations

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from bilevel.errors import UsageError


def power_decay(optimizer: Optimizer, exponent: float = 0.5) -> LambdaLR:
    """The learning rate times `(step + 1)^-exponent`, as theory has it for stochastic methods.

    Args:
        optimizer: the outer one.
        exponent: 1/2 for SOBA, 3/5 for TTSA, 5/7 for F2SA.

    Raises:
        UsageError: the exponent is below 0.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        >>> scheduler = power_decay(optimizer)
        >>> for _ in range(3):
        ...     optimizer.step()
        ...     scheduler.step()
        >>> optimizer.param_groups[0]["lr"]
        0.5
    """
    if not exponent >= 0:
        raise UsageError(f"power_decay needs exponent >= 0, but got {exponent}.")
    return LambdaLR(optimizer, lambda step: (step + 1) ** -exponent)
