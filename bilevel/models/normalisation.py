r"""Normalisation by the statistics of a batch, many tasks at once, with first and second derivatives in a few passes.

Composed of torch's elementary operations it takes some thirty passes over the activations for a gradient and its product
with a vector; written out it is ten. With `h = (x - mean x) r`, `r = (var x + eps)^(-1/2)`, over `M` rows, and the
projection `P v = v - mean(v) - h mean(h v)`, which is symmetric:

    y = gain h + bias
    dL/dx = gain r P g      dL/dgain = sum(g h)      dL/dbias = sum g             g = dL/dy

The cotangents `u`, `a`, `b` of these three have, with `k = (a - gain r mean(u h)) g - gain r mean(g h) u`,

    by g:     gain r P u + a h + b
    by gain:  r sum(u P g)
    by x:     r P k - gain r^2 sum(u P g) h / M
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


def normalise(inputs: Tensor, gain: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Batch normalisation by the batch itself, as `batch_norm(training=True)` without running statistics.

    Args:
        inputs: `(*batch, M, C)`; the statistics of each system and channel are those of its `M` rows.
        gain: `(C,)`, the same for all systems, or one each, `(*batch, C)`.
        bias: likewise.
        eps: added to the variances, in their units.

    Example:
        >>> normalise(torch.tensor([[1.0], [3.0]]), torch.ones(1), torch.zeros(1)).flatten()
        tensor([-1.0000,  1.0000])
    """
    each = (*inputs.shape[:-2], 1, inputs.shape[-1])
    outputs: Tensor = _Normalise.apply(inputs, _rows(gain).expand(each), _rows(bias).expand(each), eps)[0]
    return outputs


def _rows(values: Tensor) -> Tensor:
    """One value a channel as a row, `(*batch, 1, C)`."""
    return values.unsqueeze(-2)


class _Normalise(Function):
    """`y`, and besides it `h` and `r`, which the derivatives need again."""

    @staticmethod
    def forward(x: Tensor, gain: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        h, r = _standardise(x, eps)
        return torch.addcmul(bias, h, gain), h, r

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, gain, _, ctx.eps = inputs
        _, h, r = output
        ctx.mark_non_differentiable(h, r)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, gain, h, r)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if g is None:
            return None, None, None, None
        return *_Gradient.apply(g, *ctx.saved_tensors, ctx.eps), None


class _Gradient(Function):
    """The cotangents of `x`, `gain` and `bias` for that of `y`; of its own cotangents `u`, `a`, `b` see above."""

    @staticmethod
    def forward(g: Tensor, x: Tensor, gain: Tensor, h: Tensor, r: Tensor, eps: float) -> tuple[Tensor, ...]:
        by_bias, by_gain = _sum(g), _sum(g * h)
        m = x.shape[-2]
        scale = gain * r
        by_x = torch.addcmul(torch.addcmul(-scale * by_bias / m, g, scale), h, -scale * by_gain / m)
        return by_x, by_gain, by_bias

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        g, x, gain, h, r, ctx.eps = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(g, x, gain, h, r)

    @staticmethod
    def backward(ctx: Any, u: Tensor | None, a: Tensor | None, b: Tensor | None) -> tuple[Tensor | None, ...]:
        g, x, gain, h, r = ctx.saved_tensors
        if torch.is_grad_enabled():  # the next derivative goes through h and r, too, which are no outputs with a graph
            h, r = _standardise(x, ctx.eps)
        u, a, b = (torch.zeros_like(like) if value is None else value for value, like in ((u, g), (a, gain), (b, gain)))
        m, scale = x.shape[-2], gain * r
        mean_g, mean_gh, mean_u, mean_uh = (_sum(value) / m for value in (g, g * h, u, u * h))
        product = _sum(u * g) - m * (mean_u * mean_g + mean_uh * mean_gh)  # sum(u P g)
        of_g, of_u = a - scale * mean_uh, -scale * mean_gh  # k = of_g g + of_u u
        by_g = torch.addcmul(torch.addcmul(b - scale * mean_u, u, scale), h, of_g)
        mean_k = of_g * mean_g + of_u * mean_u
        of_h = -r * (of_g * mean_gh + of_u * mean_uh) - gain * product * r.square() / m
        by_x = torch.addcmul(torch.addcmul(torch.addcmul(-r * mean_k, u, r * of_u), g, r * of_g), h, of_h)
        return by_g, by_x, r * product, None, None, None


def _standardise(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`h` and `r`."""
    centred = x - x.mean(-2, keepdim=True)
    r = (_sum(centred * centred) / x.shape[-2] + eps).rsqrt()
    return centred * r, r


def _sum(value: Tensor) -> Tensor:
    return value.sum(-2, keepdim=True)
