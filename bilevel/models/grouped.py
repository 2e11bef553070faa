"""Convolutions of many tasks as one grouped convolution of the library of the processor, a group a task.

The channels of all tasks stand beside each other, `(N, H, W, T, C)` in memory, where each group's are a run. Tensors keep
the shape `(T, N, H, W, C)`; results have strides of that layout, which elementwise operations and reductions keep, so that
images are not copied between such convolutions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bilevel.models.geometry import Geometry


def convolve(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """`y` from images `(T, N, H, W, C)` and weights `(T, O, k, k, C)`."""
    stride, padding = geometry.stride, geometry.padding
    outputs = torch.conv2d(_beside(x), _below(weight), None, stride, padding, groups=len(x))
    return _apart(outputs, len(x))


def spread(grad: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """`dL/dx` from `dL/dy` `(T, N, H', W', O)` and the weights: the transposed convolution."""
    number, channels = len(grad), weight.shape[-1]
    like = grad.new_empty(grad.shape[1], geometry.height, geometry.width, number * channels).permute(0, 3, 1, 2)
    by_x, _, _ = _backward(_beside(grad), like, _below(weight), geometry, number, [True, False, False])
    return _apart(by_x, number)


def correlate(grad: Tensor, x: Tensor, geometry: Geometry) -> Tensor:
    """`dL/dw` from `dL/dy` and the images."""
    number, kernel = len(grad), geometry.kernel
    like = grad.new_empty(number * grad.shape[-1], kernel, kernel, x.shape[-1]).permute(0, 3, 1, 2)
    _, by_weight, _ = _backward(_beside(grad), _beside(x), like, geometry, number, [False, True, False])
    return by_weight.permute(0, 2, 3, 1).unflatten(0, (number, -1))


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, groups: int, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """The derivatives that are wanted, by images, weights and bias."""
    stride, padding = [geometry.stride] * 2, [geometry.padding] * 2
    result: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
        grad, x, weight, None, stride, padding, [1, 1], False, [0, 0], groups, wanted
    )
    return result


def _beside(x: Tensor) -> Tensor:
    """`(T, N, H, W, C)` as torch's `(N, T C, H, W)`, channels last."""
    return x.permute(1, 2, 3, 0, 4).flatten(3).permute(0, 3, 1, 2)


def _apart(x: Tensor, number: int) -> Tensor:
    """And back."""
    return x.permute(0, 2, 3, 1).unflatten(3, (number, -1)).permute(3, 0, 1, 2, 4)


def _below(weight: Tensor) -> Tensor:
    """`(T, O, k, k, C)` as torch's `(T O, C, k, k)`, channels last."""
    return weight.flatten(0, 1).permute(0, 3, 1, 2)
