"""Softmax regression: a linear layer on the pixels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from bilevel.errors import UsageError
from bilevel.models.network import Network, Params, as_vectors
from bilevel.tree import TensorDict


class SoftmaxRegression(Network):
    """Class scores `x W^T + b`, from zero: the loss is convex, and no start is better than another.

    Args:
        num_inputs: numbers in an input, whatever its shape.
        num_outputs: classes.

    Example:
        >>> network = SoftmaxRegression(num_inputs=12, num_outputs=3)
        >>> network(network.init(seed=0), torch.rand(5, 2, 2, 3)).shape
        torch.Size([5, 3])
    """

    def __init__(self, num_inputs: int = 784, num_outputs: int = 10) -> None:
        """Check the sizes."""
        if not all(isinstance(size, int) and size >= 1 for size in (num_inputs, num_outputs)):
            raise UsageError(
                f"SoftmaxRegression needs sizes of at least 1, but got num_inputs={num_inputs} and num_outputs={num_outputs}."
            )
        self.num_inputs, self.num_outputs = num_inputs, num_outputs

    def init(self, seed: int) -> TensorDict:
        """Zeros, whatever the seed."""
        shape = (self.num_outputs, self.num_inputs)
        return {"weight": torch.zeros(shape, dtype=torch.float32), "bias": torch.zeros(shape[0], dtype=torch.float32)}

    def __call__(self, params: Params, inputs: Tensor) -> Tensor:
        """Scores `(*batch, N, O)`; inputs without the leading dimensions of the weights are shared by all, which is faster.

        Raises:
            UsageError: inputs have another number of entries.
        """
        x, weight, bias = as_vectors(inputs, self.num_inputs), params["weight"], params["bias"]
        if x is None:
            raise UsageError(
                f"SoftmaxRegression takes inputs of {self.num_inputs} numbers (model.num_inputs), but they have shape "
                f"{tuple(inputs.shape)}."
            )
        if x.ndim == 2:
            # One product for all. Not `x @ weight.mT`, whose backward pass multiplies the transposed inputs: that takes
            # three times as long.
            scores = linear(x, weight.flatten(0, -2), bias.flatten())  # (N, batch O)
            return scores.unflatten(-1, bias.shape).movedim(0, -2)
        return x @ weight.mT + bias.unsqueeze(-2)
