"""A network of four convolutions, of the kind that few-shot papers use for Omniglot."""

from __future__ import annotations

from torch import Tensor

from bilevel.errors import UsageError
from bilevel.models.layers import are_many, each_task, normalised_convolution
from bilevel.models.network import Activation, FeatureNetwork, Params, activation_of, conv_weights, linear_weights
from bilevel.tree import TensorDict


class Conv4(FeatureNetwork):
    """Four times: 3x3 convolution with stride 2, normalisation by the batch, ReLU; then a linear layer.

    28 x 28 images become 2 x 2 x `num_filters` features, which the head sees all, as in the code of implicit MAML; MAML's and
    matching networks' are averaged or pooled to `num_filters`. As in these each task is normalised by the statistics of the
    images that are given together, its support or its query set.

    Args:
        num_outputs: classes of a task (its way).
        num_filters: of each convolution.
        image_size: height and width, pixels.
        num_channels: of the images.
        num_layers: convolutions.
        activation: a function of `torch.nn.functional`, by its name: `relu_` is ReLU in place, `softplus` makes the network
            smooth.

    References: Vinyals et al. (2016), "Matching networks for one shot learning"; Finn, Abbeel and Levine (2017),
    "Model-agnostic meta-learning for fast adaptation of deep networks"; Rajeswaran, Finn, Kakade and Levine (2019),
    "Meta-learning with implicit gradients".

    Example:
        >>> import torch
        >>> network = Conv4(num_outputs=5)
        >>> network(network.init(seed=0), torch.rand(2, 10, 28, 28, 1)).shape
        torch.Size([2, 10, 5])
    """

    def __init__(
        self,
        num_outputs: int = 5,
        num_filters: int = 64,
        image_size: int = 28,
        num_channels: int = 1,
        num_layers: int = 4,
        activation: str | Activation = "relu_",
    ) -> None:
        """Check the sizes."""
        for name, value in vars().items():
            if name not in ("self", "activation") and (not isinstance(value, int) or value < 1):
                raise UsageError(f"Conv4 needs {name} >= 1, an integer, but got {value!r}.")
        self.num_outputs, self.num_filters, self.num_channels = num_outputs, num_filters, num_channels
        self.num_layers, self.activation = num_layers, activation_of(activation)
        side = image_size
        for _ in range(num_layers):
            side = (side + 1) // 2
        self.num_features = side * side * num_filters

    def init(self, seed: int) -> TensorDict:
        """Glorot's weights, gains one, biases zero."""
        params: TensorDict = {}
        for layer in range(self.num_layers):
            before = self.num_filters if layer else self.num_channels
            params |= conv_weights(f"conv{layer}", before, self.num_filters, 3, seed, layer)
        return params | linear_weights("head", self.num_features, self.num_outputs, seed, self.num_layers)

    def features(self, params: Params, inputs: Tensor) -> Tensor:
        """The activations of the last convolution, flattened, `(*batch, N, D)`."""
        if are_many(inputs, params["conv0.weight"]):
            return each_task(self.features, params, inputs)
        x = inputs
        for layer in range(self.num_layers):
            x = normalised_convolution(params, f"conv{layer}", x, self.activation, stride=2, padding=1)
        return x.flatten(-3)
