"""One way to take a gradient that is right in every setting: plainly, recorded for a derivative, or under a transform."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._C import _functorch as functorch  # no public way tells whether a torch.func transform is active


def in_transform() -> bool:
    """True inside `torch.func` transforms, where `torch.autograd.grad` must not be used."""
    return functorch.peek_interpreter_stack() is not None


def value_and_gradient(function: Callable[[Tensor], Tensor], point: Tensor) -> tuple[Tensor, Tensor]:
    """Values `(*batch,)` and gradients `(*batch, n)` of a function that acts on each row of the point by itself.

    Recorded for further derivatives when gradients are enabled (an inner loop that is unrolled) or under a transform;
    otherwise detached.

    Example:
        >>> with torch.no_grad():
        ...     value_and_gradient(lambda x: (x ** 2).sum(-1), torch.tensor([1.0, 2.0]))
        (tensor(5.), tensor([2., 4.]))
    """
    if in_transform():

        def total(x: Tensor) -> tuple[Tensor, Tensor]:
            values = function(x)
            return values.sum(), values

        gradient, values = torch.func.grad(total, has_aux=True)(point)
        return values, gradient
    record = torch.is_grad_enabled()
    with torch.enable_grad():
        leaf = point if record and point.requires_grad else point.detach().requires_grad_()
        values = function(leaf)
        (gradient,) = torch.autograd.grad(values.sum(), leaf, create_graph=record, materialize_grads=True)
    return (values, gradient) if record else (values.detach(), gradient)
