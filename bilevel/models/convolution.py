r"""Convolutions of many tasks at once, each with weights of its own, as often differentiable as one likes.

A convolution is bilinear in images and weights, and so are the two halves of its derivative:

    y = convolve(x, w)      dL/dx = spread(dL/dy, w)      dL/dw = correlate(dL/dy, x)

The derivatives of each of the three are the other two, so that Hessian products cost what they have to (two of each) and
no more; torch's own double backward of grouped convolutions loops over the groups.

Images are `(T, N, H, W, C)`, weights `(T, O, k, k, C)`: channels last, where a patch is a few runs of memory. A convolution
is a product of matrices with the patches, of as many tasks in one call as keep those in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.functional import conv2d

# Bytes of patches that are made and multiplied at a time on a CPU. Measured on Zen 4 with 1 MB of cache a core.
CACHE = 5 * 2**19


class Geometry(NamedTuple):
    """Sizes of a convolution with a square kernel.

    Attributes:
        kernel: its side, pixels.
        stride: pixels between its places.
        padding: zeros around the image.
        height: of the image.
        width: of the image.
    """

    kernel: int
    stride: int
    padding: int
    height: int
    width: int

    @property
    def places(self) -> tuple[int, int]:
        """Height and width of the output."""
        rows, columns = (size + 2 * self.padding - self.kernel for size in (self.height, self.width))
        return rows // self.stride + 1, columns // self.stride + 1


def convolve(inputs: Tensor, weight: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
    """Cross-correlation of images with a square kernel, as `conv2d`, without bias.

    Args:
        inputs: `(*batch, N, H, W, C)`.
        weight: `(O, k, k, C)`, the same for all systems, or one each, `(*batch, O, k, k, C)`.
        stride: pixels between the kernel's places.
        padding: zeros around the image.

    Returns:
        `(*batch, N, H', W', O)`.

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
    flat = inputs.reshape(-1, *images), weight.reshape(-1, *weight.shape[-4:])
    outputs = _Convolve.apply(*flat, geometry)
    return outputs.reshape(*batch, *outputs.shape[1:])


class _Convolve(Function):
    """`y` from images and weights."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
        rows, columns = geometry.places
        result = x.new_empty(*x.shape[:2], rows, columns, weight.shape[1])
        flat, factors = result.flatten(1, 3), weight.flatten(2).mT  # (T, N H' W', O), (T, k k C, O)
        for part in _parts(x, geometry, x.shape):
            torch.bmm(unfold(x[part], geometry), factors[part], out=flat[part])
        return result

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
        shape = (*grad.shape[:2], geometry.height, geometry.width, weight.shape[-1])
        result, flat, factors = grad.new_zeros(shape), grad.flatten(1, 3), weight.flatten(2)
        for part in _parts(grad, geometry, shape):
            fold(torch.bmm(flat[part], factors[part]), geometry, result[part])
        return result

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
        kernel, channels = geometry.kernel, x.shape[-1]
        result = x.new_empty(len(grad), grad.shape[-1], kernel, kernel, channels)
        rows, flat = grad.flatten(1, 3).mT, result.flatten(2)  # (T, O, N H' W'), (T, O, k k C)
        for part in _parts(x, geometry, x.shape):
            torch.bmm(rows[part], unfold(x[part], geometry), out=flat[part])
        return result

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


def unfold(x: Tensor, geometry: Geometry) -> Tensor:
    """All patches of images `(*batch, N, H, W, C)` as rows, `(*batch, N H' W', k k C)`."""
    *batch, number, height, width, channels = x.shape
    kernel, stride, padding = geometry[:3]
    if padding:
        padded = x.new_zeros(*batch, number, height + 2 * padding, width + 2 * padding, channels)
        padded[..., padding : padding + height, padding : padding + width, :] = x
        x = padded
    *outer, by_row, by_column, by_channel = x.stride()
    strides = (*outer, stride * by_row, stride * by_column, by_row, by_column, by_channel)
    shape = (*batch, number, *geometry.places, kernel, kernel, channels)
    return x.as_strided(shape, strides, x.storage_offset()).reshape(*batch, -1, kernel * kernel * channels)


def fold(patches: Tensor, geometry: Geometry, images: Tensor) -> None:
    """The transpose of `unfold`: each patch is added to images `(T, N, H, W, C)`, where it was taken from."""
    patches = patches.view(*images.shape[:2], *geometry.places, geometry.kernel, geometry.kernel, -1)
    for i in range(geometry.kernel):
        from_rows, to_rows = _inside(i, geometry, geometry.places[0], geometry.height)
        for j in range(geometry.kernel):
            from_columns, to_columns = _inside(j, geometry, geometry.places[1], geometry.width)
            images[:, :, to_rows, to_columns].add_(patches[:, :, from_rows, from_columns, i, j])


def _inside(offset: int, geometry: Geometry, places: int, size: int) -> tuple[slice, slice]:
    """The places of a kernel whose pixel of an offset is inside an image, along one axis, and those pixels."""
    stride, before = geometry.stride, geometry.padding - offset
    first = max(0, -(-before // stride))  # the first place with stride * place >= before
    last = max(first, min(places, (size - 1 + before) // stride + 1))
    return slice(first, last), slice(stride * first - before, stride * last - before, stride)


def _patch_bytes(like: Tensor, geometry: Geometry, shape: tuple[int, ...]) -> int:
    """Of one task with images of a shape."""
    rows, columns = geometry.places
    return shape[1] * rows * columns * geometry.kernel**2 * shape[-1] * like.element_size()


def _parts(like: Tensor, geometry: Geometry, shape: tuple[int, ...]) -> Iterator[slice]:
    """The tasks, as many at a time as keep their patches in cache on a CPU, else all."""
    size = shape[0] if like.device.type != "cpu" else max(1, CACHE // _patch_bytes(like, geometry, shape))
    return (slice(begin, begin + size) for begin in range(0, shape[0], size))


def channels_first(images: Tensor) -> Tensor:
    """`(N, H, W, C)` as torch's `(N, C, H, W)` with the same memory."""
    return images.permute(0, 3, 1, 2)


def channels_last(images: Tensor) -> Tensor:
    """And back."""
    return images.permute(0, 2, 3, 1)
