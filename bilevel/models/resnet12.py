"""The residual network of twelve layers that few-shot papers use for larger images."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import leaky_relu, max_pool2d

from bilevel.errors import UsageError
from bilevel.models.layers import are_many, each_task, identity, normalised_convolution
from bilevel.models.network import FeatureNetwork, Params, conv_weights, linear_weights
from bilevel.tree import TensorDict


class ResNet12(FeatureNetwork):
    """Four blocks of three 3x3 convolutions with a 1x1 convolution beside them, each halving the image; mean; linear layer.

    Normalised by the batch, leaky ReLU of slope 0.1.

    Args:
        num_outputs: classes of a task (its way).
        widths: filters of the blocks.
        num_channels: of the images.

    References: Mishra et al. (2018), "A simple neural attentive meta-learner"; Lee et al. (2019), "Meta-learning with
    differentiable convex optimization", for these widths.

    Example:
        >>> import torch
        >>> network = ResNet12(num_outputs=5, widths=(8, 8, 16, 16), num_channels=3)
        >>> network(network.init(seed=0), torch.rand(4, 32, 32, 3)).shape
        torch.Size([4, 5])
    """

    def __init__(
        self, num_outputs: int = 5, widths: Sequence[int] = (64, 160, 320, 640), num_channels: int = 1
    ) -> None:
        """Check the sizes."""
        if not isinstance(widths, Sequence):
            raise UsageError(f"ResNet12 needs widths to be a list, but got {widths!r}.")
        if not widths or not all(isinstance(width, int) and width >= 1 for width in widths):
            raise UsageError(f"ResNet12 needs widths of at least 1, but got {list(widths)}.")
        for name, value in (("num_outputs", num_outputs), ("num_channels", num_channels)):
            if not isinstance(value, int) or value < 1:
                raise UsageError(f"ResNet12 needs {name} >= 1, an integer, but got {value!r}.")
        self.num_outputs, self.widths, self.num_channels = num_outputs, tuple(widths), num_channels

    def init(self, seed: int) -> TensorDict:
        """Glorot's weights, gains one, biases zero."""
        params: TensorDict = {}
        before = self.num_channels
        for block, width in enumerate(self.widths):
            for layer in range(3):
                params |= conv_weights(
                    f"block{block}.conv{layer}", width if layer else before, width, 3, seed, 4 * block + layer
                )
            params |= conv_weights(f"block{block}.shortcut", before, width, 1, seed, 4 * block + 3)
            before = width
        return params | linear_weights("head", before, self.num_outputs, seed, 4 * len(self.widths))

    def features(self, params: Params, inputs: Tensor) -> Tensor:
        """Mean activations of the last block, `(*batch, N, D)`."""
        if are_many(inputs, params["block0.conv0.weight"]):
            return each_task(self.features, params, inputs)
        x = inputs
        for block in range(len(self.widths)):
            y = x
            for layer in range(3):
                activation = _leaky if layer < 2 else identity
                y = normalised_convolution(params, f"block{block}.conv{layer}", y, activation, padding=1)
            shortcut = normalised_convolution(params, f"block{block}.shortcut", x)
            x = _halve(_leaky(y + shortcut))
        return x.mean((-3, -2))


def _leaky(x: Tensor) -> Tensor:
    return leaky_relu(x, 0.1)


def _halve(images: Tensor) -> Tensor:
    """Maximum of each 2x2 square, `(*batch, N, H, W, C)`; the last row and column count by themselves where they are odd."""
    flat = images.flatten(0, -4).permute(0, 3, 1, 2)
    pooled = max_pool2d(flat, 2, ceil_mode=True).permute(0, 2, 3, 1)
    return pooled.unflatten(0, images.shape[:-3])
