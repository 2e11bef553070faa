"""What an iterative method and the loop hand each other: the system, a step's progress, and arithmetic under masks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bilevel.linalg.operator import LinearOperator

# Rounding errors of a long sum add up as those of so many numbers one after the other: libraries sum in blocks, and blocks of
# blocks. Nor is any sum in a Hessian-vector product of a network as long as its vector.
BLOCK = 4096


def rounding_level(n: int, dtype: torch.dtype) -> float:
    """Backward error that rounding leaves in a product of length `n`: `max(8, √min(n, BLOCK)) eps`; no solver can do better."""
    return max(8.0, math.sqrt(min(n, BLOCK))) * torch.finfo(dtype).eps


def worthless_level(n: int, dtype: torch.dtype) -> float:
    """Relative residual above which rounding is no excuse: where the attainable one is larger, `A` is as good as singular.

    The fourth root of the rounding level: a condition number of about 1e11 in float64, 3e4 in float32.
    """
    return rounding_level(n, dtype) ** 0.25


@dataclass
class System:
    """What a method may use: products, which it counts, the preconditioner and the operator's inner product.

    Attributes:
        operator: `A`.
        preconditioner: approximates the inverse of `A`.
        spent: products made and not yet charged to a system.
        bound: the residual norm of each system at which it claims to be done; below 0 for none. The loop sets it.
    """

    operator: LinearOperator
    preconditioner: LinearOperator | None = None
    spent: int = 0
    bound: Tensor = field(default_factory=lambda: torch.tensor(-1.0))

    def mv(self, vector: Tensor) -> Tensor:
        """`A v`."""
        self.spent += 1
        return self.operator.mv(vector)

    def transposed_mv(self, vector: Tensor) -> Tensor:
        """`A^T v`."""
        self.spent += 1
        return self.operator.transpose().mv(vector)

    def precondition(self, vector: Tensor) -> Tensor:
        """`M^-1 v`, or `v` without a preconditioner."""
        return vector if self.preconditioner is None else self.preconditioner.mv(vector)

    def inner(self, u: Tensor, v: Tensor) -> Tensor:
        """Inner product of each system."""
        return self.operator.inner(u, v)

    def fuse(self, function: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Sequence[Tensor]]:
        """A function of the inner product and of tensors as one of the tensors, in the operator's way of running it."""
        return self.operator.fuse(function)

    def norm(self, vector: Tensor) -> Tensor:
        """Norm of each system's vector."""
        return self.operator.inner(vector, vector).sqrt()


class Facts(NamedTuple):
    """What the loop learns of each system from a step, shapes `(*batch,)`, or from several, `(steps, *batch)`.

    Attributes:
        gain: a lower estimate of the operator's norm, from a product.
        status: codes of `Result`; `running` where all is well.
        curvature: Rayleigh quotient that was seen, if the method has one.
        peak: largest residual norm on the way to the step's own, where a step passes several residuals.
    """

    gain: Tensor
    status: Tensor
    curvature: Tensor | None = None
    peak: Tensor | None = None


class Progress(NamedTuple):
    """What one step tells the loop about each system, shapes `(*batch,)`.

    Attributes:
        estimate: norm of the residual as the recurrence has it.
        facts: what is looked at from time to time only: `Facts`, or whatever the solver's `facts` makes those of.
        event: where the loop has to look closer, if the step has worked that out: the status is not `running`, the estimate is
            at most `System.bound`, or it is not finite. None leaves that to the loop.
        optimal: norm of `A^T r` over the norm of `r` (least squares only).
    """

    estimate: Tensor
    facts: Any
    event: Tensor | None = None
    optimal: Tensor | None = None


def divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """`a / b`, and 0 where `b` is 0: a system that is done stays where it is instead of turning into NaN."""
    return (numerator / denominator).masked_fill_(denominator == 0, 0.0)


def columns(scalar: Tensor) -> Tensor:
    """A scalar for each system, `(*batch,)`, ready to multiply vectors `(*batch, n)`."""
    return scalar.unsqueeze(-1)


def select(mask: Tensor, new: Any, old: Any) -> Any:
    """Field by field, the new memory for the systems in the mask and the old one for the others."""

    def pick(fresh: Tensor, stale: Tensor) -> Tensor:
        if fresh is stale:
            return stale
        shape = mask.shape + (1,) * (fresh.ndim - mask.ndim)
        return torch.where(mask.reshape(shape), fresh, stale)

    return type(old)(*(pick(fresh, stale) for fresh, stale in zip(new, old, strict=True)))
