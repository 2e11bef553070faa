r"""Convolutions of many tasks at once, each with weights of its own, as often differentiable as one likes.

A convolution is bilinear in images and weights, and so are the two halves of its derivative:

    y = convolve(x, w)      dL/dx = spread(dL/dy, w)      dL/dw = correlate(dL/dy, x)

The derivatives of each of the three are the other two, so that Hessian products cost what they have to (two of each) and
no more; torch's own double backward of grouped convolutions loops over the groups.

Images are `(T, N, H, W, C)`, weights `(T, O, k, k, C)`: channels last. Two modules know how the three are computed, `patches`
and `grouped`.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.functional import conv2d

from bilevel.errors import UsageError
from bilevel.models import grouped, patches
from bilevel.models.geometry import Geometry

# Places of a task's kernels up to which its weights take oneDNN longer to rearrange than it saves. Measured on Zen 4: with 20
# places a convolution and its derivatives take a third less as products of matrices, with 80 a half more.
FEW_PLACES = 32


def convolve(inputs: Tensor, weight: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
    """Cross-correlation of images with a square kernel, as `conv2d`, without bias.

    Args:
        inputs: `(*batch, N, H, W, C)`.
        weight: `(O, k, k, C)`, the same for all systems, or one each, `(*batch, O, k, k, C)`.
        stride: pixels between the kernel's places.
        padding: zeros around the image.

    Returns:
        `(*batch, N, H', W', O)`.

    Raises:
        UsageError: weights are of other tasks than images.

    Example:
        >>> convolve(torch.ones(2, 5, 28, 28, 1), torch.ones(2, 64, 3, 3, 1), stride=2, padding=1).shape
        torch.Size([2, 5, 14, 14, 64])
    """
    batch, images = inputs.shape[:-4], inputs.shape[-4:]
    if weight.ndim == 4:  # one convolution of all images
        first = channels_first(inputs.reshape(-1, *images[1:]))
        outputs = channels_last(conv2d(first, channels_first(weight), None, stride, padding))
        return outputs.reshape(*batch, -1, *outputs.shape[1:])
    geometry = Geometry(weight.shape[-2], stride, padding, *images[1:3])
    if batch != weight.shape[:-4]:
        raise UsageError(
            f"images of tasks {tuple(batch)} were expected to come with weights of as many tasks, or with one weight "
            f"(O, k, k, C) for all, but weights have shape {tuple(weight.shape)}."
        )
    x, factors = inputs.reshape(-1, *images), weight.reshape(-1, *weight.shape[-4:])
    outputs = _Convolve.apply(x, factors, geometry)
    return outputs.reshape(*batch, *outputs.shape[1:])


def groups_are_fast(like: Tensor) -> bool:
    """Whether grouped convolutions of tensors like this one are oneDNN's; elsewhere they take long."""
    onednn = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    return bool(onednn) and like.device.type == "cpu" and like.dtype == torch.float32


def _implementation(images: Tensor, geometry: Geometry) -> ModuleType:
    """The module that computes convolutions of tasks like these, `(T, N, ...)`."""
    rows, columns = geometry.places
    many = len(images) > 0 and images.shape[1] * rows * columns > FEW_PLACES
    return grouped if many and groups_are_fast(images) else patches


class _Convolve(Function):
    """`y` from images and weights."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
        return _implementation(x, geometry).convolve(x, weight, geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, ctx.geometry = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        by_x, by_weight, _ = ctx.needs_input_grad
        return (
            _Spread.apply(grad, weight, ctx.geometry) if by_x else None,
            _Correlate.apply(grad, x, ctx.geometry) if by_weight else None,
            None,
        )


class _Spread(Function):
    """`dL/dx` from `dL/dy` and the weights: the transposed convolution."""

    @staticmethod
    def forward(grad: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
        return _implementation(grad, geometry).spread(grad, weight, geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        grad, weight, ctx.geometry = inputs
        ctx.save_for_backward(grad, weight)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        grad, weight = ctx.saved_tensors
        by_grad, by_weight, _ = ctx.needs_input_grad
        return (
            _Convolve.apply(cotangent, weight, ctx.geometry) if by_grad else None,
            _Correlate.apply(grad, cotangent, ctx.geometry) if by_weight else None,
            None,
        )


class _Correlate(Function):
    """`dL/dw` from `dL/dy` and the images."""

    @staticmethod
    def forward(grad: Tensor, x: Tensor, geometry: Geometry) -> Tensor:
        return _implementation(x, geometry).correlate(grad, x, geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        grad, x, ctx.geometry = inputs
        ctx.save_for_backward(grad, x)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        grad, x = ctx.saved_tensors
        by_grad, by_x, _ = ctx.needs_input_grad
        return (
            _Convolve.apply(x, cotangent, ctx.geometry) if by_grad else None,
            _Spread.apply(grad, cotangent, ctx.geometry) if by_x else None,
            None,
        )


def channels_first(images: Tensor) -> Tensor:
    """`(N, H, W, C)` as torch's `(N, C, H, W)` with the same memory."""
    return images.permute(0, 3, 1, 2)


def channels_last(images: Tensor) -> Tensor:
    """And back."""
    return images.permute(0, 2, 3, 1)
