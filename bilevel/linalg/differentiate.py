"""A function at a point: its value, and the products with its derivatives by one retained graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel.linalg.derivative import HessianOperator, JacobianOperator
from bilevel.linalg.operator import LinearOperator
from bilevel.tree import TensorDict, detach

Function = Callable[[Tensor, TensorDict, Any], Tensor]


@dataclass(frozen=True)
class Derivatives:
    """A function's value at a point, and the products with its derivatives.

    Attributes:
        value: what the function returned, detached.
        optimality: `F(x, θ)`, the gradient of a loss or the value itself, detached, `(*batch, m)`.
        operator: `∂F/∂x`, the Hessian of a loss.
        mixed: `v -> (∂F/∂θ)^T v` by names, summed over the batch.
        fallback: why the products are not compiled, a sentence; None where they are, or were not meant to be.
    """

    value: Tensor
    optimality: Tensor
    operator: LinearOperator
    mixed: Callable[[Tensor], TensorDict]
    fallback: str | None = None


def differentiate(function: Function, point: Tensor, args: Mapping[str, Tensor], data: Any = None) -> Derivatives:
    """The derivatives by a retained graph, which serves all products.

    Args:
        function: `(x, args, data)` to a loss `(*batch,)`, whose gradient is `F`, or to `F` itself, `(*batch, m)`; row `b`
            of either depends on row `b` of `x` alone.
        point: `x`, `(*batch, n)`.
        args: `θ`, by names: what the mixed product differentiates by.
        data: whatever else the function is given.

    Example:
        >>> at = differentiate(lambda x, args, _: (args["c"] * x ** 3).sum(-1), torch.ones(2), {"c": torch.tensor(2.0)})
        >>> at.optimality, at.operator.mv(torch.ones(2)), at.mixed(torch.ones(2))
        (tensor([6., 6.]), tensor([12., 12.]), {'c': tensor(6.)})
    """
    with torch.enable_grad():
        leaf = point.detach().requires_grad_()
        leaves = {name: value.requires_grad_() for name, value in detach(args).items()}
        value = optimality = function(leaf, leaves, data)
        if is_loss := value.ndim < leaf.ndim:
            (optimality,) = torch.autograd.grad(value.sum(), leaf, create_graph=True, materialize_grads=True)
    jacobian = (HessianOperator.from_gradient if is_loss else JacobianOperator.from_output)(optimality, leaf)

    def mixed(vector: Tensor) -> TensorDict:
        if not leaves or not optimality.requires_grad:
            return {name: torch.zeros_like(value) for name, value in args.items()}
        wanted = list(leaves.values())
        parts = torch.autograd.grad(optimality, wanted, vector, retain_graph=True, materialize_grads=True)
        return dict(zip(leaves, parts, strict=True))

    return Derivatives(value.detach(), optimality.detach(), jacobian, mixed)
