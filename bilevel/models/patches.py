"""Convolutions of many tasks as products of matrices with patches; on a CPU as many tasks in one call as stay in its cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bilevel.models.geometry import Geometry

# Bytes of patches that are made and multiplied at a time on a CPU. Measured on Zen 4 with 1 MB of cache a core.
CACHE = 5 * 2**19


def convolve(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """`y` from images `(T, N, H, W, C)` and weights `(T, O, k, k, C)`."""
    rows, columns = geometry.places
    result = x.new_empty(*x.shape[:2], rows, columns, weight.shape[1])
    flat, factors = result.flatten(1, 3), weight.flatten(2).mT  # (T, N H' W', O), (T, k k C, O)
    for part in _parts(x, geometry, x.shape):
        torch.bmm(unfold(x[part], geometry), factors[part], out=flat[part])
    return result


def spread(grad: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """`dL/dx` from `dL/dy` `(T, N, H', W', O)` and the weights: the transposed convolution."""
    shape = (*grad.shape[:2], geometry.height, geometry.width, weight.shape[-1])
    result, flat, factors = grad.new_zeros(shape), grad.flatten(1, 3), weight.flatten(2)
    for part in _parts(grad, geometry, shape):
        fold(torch.bmm(flat[part], factors[part]), geometry, result[part])
    return result


def correlate(grad: Tensor, x: Tensor, geometry: Geometry) -> Tensor:
    """`dL/dw` from `dL/dy` and the images."""
    kernel, channels = geometry.kernel, x.shape[-1]
    result = x.new_empty(len(grad), grad.shape[-1], kernel, kernel, channels)
    rows, flat = grad.flatten(1, 3).mT, result.flatten(2)  # (T, O, N H' W'), (T, O, k k C)
    for part in _parts(x, geometry, x.shape):
        torch.bmm(rows[part], unfold(x[part], geometry), out=flat[part])
    return result


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
