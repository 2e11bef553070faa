"""A multilayer perceptron."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from bilevel.errors import UsageError
from bilevel.models.network import Activation, FeatureNetwork, Params, activation_of, as_vectors, linear_weights
from bilevel.tree import TensorDict


class MLP(FeatureNetwork):
    """Linear layers with an activation between them; the last one is the head.

    Args:
        num_inputs: numbers in an input, whatever its shape.
        num_outputs: numbers in an output.
        hidden: widths of the layers between.
        activation: a function of `torch.nn.functional`, by its name.

    Example:
        >>> import torch
        >>> network = MLP()
        >>> network(network.init(seed=0), torch.rand(3, 10, 1)).shape
        torch.Size([3, 10, 1])
    """

    def __init__(
        self,
        num_inputs: int = 1,
        num_outputs: int = 1,
        hidden: Sequence[int] = (40, 40),
        activation: str | Activation = "relu",
    ) -> None:
        """Check the sizes."""
        if not isinstance(hidden, Sequence):
            raise UsageError(f"MLP needs hidden to be a list of widths, but got {hidden!r}.")
        self.widths = (num_inputs, *hidden)
        if not all(isinstance(width, int) and width >= 1 for width in (*self.widths, num_outputs)):
            raise UsageError(f"MLP needs widths of at least 1, but got {[*self.widths, num_outputs]}.")
        self.num_outputs, self.activation = num_outputs, activation_of(activation)

    def init(self, seed: int) -> TensorDict:
        """Glorot's weights, biases zero."""
        params: TensorDict = {}
        for layer, (before, after) in enumerate(pairwise(self.widths)):
            params |= linear_weights(f"layer{layer}", before, after, seed, layer)
        return params | linear_weights("head", self.widths[-1], self.num_outputs, seed, len(self.widths))

    def features(self, params: Params, inputs: Tensor) -> Tensor:
        """The activations of the last hidden layer, `(*batch, N, D)`.

        Raises:
            UsageError: inputs have another number of entries than the first layer takes.
        """
        batched = [value.ndim for name, value in params.items() if name.endswith(".weight") and value.ndim > 2]
        x = as_vectors(inputs, self.widths[0])
        if x is None or (batched and x.ndim != batched[0]):
            raise UsageError(
                f"MLP takes inputs of {self.widths[0]} numbers (model.num_inputs), as many tasks of them as its weights are "
                f"for, but they have shape {tuple(inputs.shape)}."
            )
        for layer in range(len(self.widths) - 1):
            x = x @ params[f"layer{layer}.weight"].mT + params[f"layer{layer}.bias"].unsqueeze(-2)
            x = self.activation(x)
        return x
