"""The layer that few-shot networks are made of: a convolution, normalised by the statistics of the batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bilevel.models.convolution import channels_first, channels_last, convolve, groups_are_fast
from bilevel.models.geometry import Geometry
from bilevel.models.network import Activation, Params
from bilevel.models.normalisation import normalise
from bilevel.models.patches import unfold

EPS = 1e-5
MANY = 36_000  # pixels of a task's images, from which on it is faster by itself on a CPU
SMALL_PATCH = 16  # numbers in a patch, up to which statistics of outputs are worked out from those of the patches


def identity(x: Tensor) -> Tensor:
    """No activation."""
    return x


def normalised_convolution(
    params: Params,
    name: str,
    inputs: Tensor,
    activation: Activation = identity,
    stride: int = 1,
    padding: int = 0,
    eps: float = EPS,
) -> Tensor:
    r"""`activation(gain (y - mean y) / sqrt(var y + eps) + bias)` with `y = convolve(inputs, weight)`.

    The activation comes before the result gets its shape: one that works in place on a view would have autograd copy the
    gradient twice.

    Where patches are small (the first layer of grey images has nine pixels in one), nothing of the size of `y` but the
    result is made: with centred patches `P` (M, K) and their covariance `S = P^T P / M` the mean of `y = P W` is zero and its
    variance is the diagonal of `W^T S W`, so that normalising is scaling the columns of `W`.

    Args:
        params: has `NAME.weight` `(*batch, O, k, k, C)`, `NAME.gain` and `NAME.bias` `(*batch, O)`, or without batch.
        name: of the layer.
        inputs: images `(*batch, N, H, W, C)`.
        activation: a function of each entry by itself, which may work in place.
        stride: as of `convolve`.
        padding: as of `convolve`.
        eps: added to the variances.

    Returns:
        `(*batch, N, H', W', O)`.
    """
    weight, gain, bias = (params[f"{name}.{part}"] for part in ("weight", "gain", "bias"))
    if inputs.ndim == weight.ndim == 4:  # one task
        outputs = channels_first(convolve(inputs, weight, stride, padding))
        return channels_last(activation(torch.batch_norm(outputs, gain, bias, None, None, True, 0.0, eps, False)))
    if weight.shape[-1] * weight.shape[-2] ** 2 > SMALL_PATCH:
        outputs = convolve(inputs, weight, stride, padding)
        return activation(normalise(outputs.flatten(-4, -2), gain, bias, eps)).view(outputs.shape)
    geometry = Geometry(weight.shape[-2], stride, padding, *inputs.shape[-3:-1])
    patches = unfold(inputs, geometry)  # (*batch, M, K)
    patches = patches - patches.mean(-2, keepdim=True)
    covariance = patches.mT @ patches / patches.shape[-2]
    columns = weight.flatten(-3).mT  # (*batch, K, O)
    variance = (covariance @ columns * columns).sum(-2, keepdim=True)
    scaled = columns * (gain.unsqueeze(-2) * (variance + eps).rsqrt())
    outputs = activation(patches @ scaled + bias.unsqueeze(-2))
    return outputs.unflatten(-2, (inputs.shape[-4], *geometry.places))


def are_many(inputs: Tensor, weight: Tensor) -> bool:
    """Whether each task had better be by itself: tasks with weights of their own, and many images each, on a CPU in float32.

    Args:
        inputs: images, `(T, N, H, W, C)` if there are tasks.
        weight: of a convolution.
    """
    return groups_are_fast(inputs) and inputs.ndim == weight.ndim == 5 and inputs[0, ..., 0].numel() >= MANY


def each_task(function: Callable[[Params, Tensor], Tensor], params: Params, inputs: Tensor) -> Tensor:
    """A function of one task's weights and inputs, for one task after the other, stacked."""
    results = [function({name: value[task] for name, value in params.items()}, one) for task, one in enumerate(inputs)]
    return torch.stack(results)
