"""The contract of a network: starting weights, and outputs as a pure function of weights and inputs."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional

from bilevel.errors import UsageError
from bilevel.rng import generator
from bilevel.tree import TensorDict

Params = Mapping[str, Tensor]
Activation = Callable[[Tensor], Tensor]


class Network(ABC):
    """A network as a pure function.

    Attributes:
        handles_tasks: whether weights and inputs may have leading task dimensions, weights of one task `(*shape)` being
            shared by all; else it is written for one task.
    """

    handles_tasks: ClassVar[bool] = True

    @abstractmethod
    def init(self, seed: int) -> TensorDict:
        """Starting weights of one task, in float32 on the CPU: the same ones for a seed everywhere."""

    @abstractmethod
    def __call__(self, params: Params, inputs: Tensor) -> Tensor:
        """Outputs `(*batch, N, O)` of inputs `(*batch, N, ...)`; images are channels last, `(*batch, N, H, W, C)`."""


class FeatureNetwork(Network):
    """A network of features and a linear layer on top, `head.weight` `(O, D)` and `head.bias` `(O,)`.

    What adapts the last layer alone (ANIL), or solves for it in closed form (a ridge head), needs the two apart.
    """

    @abstractmethod
    def features(self, params: Params, inputs: Tensor) -> Tensor:
        """Features `(*batch, N, D)`."""

    def head(self, params: Params, features: Tensor) -> Tensor:
        """`features head.weight^T + head.bias`."""
        return features @ params["head.weight"].mT + params["head.bias"].unsqueeze(-2)

    def __call__(self, params: Params, inputs: Tensor) -> Tensor:
        """The head on the features."""
        return self.head(params, self.features(params, inputs))


@dataclass(frozen=True, eq=False)  # a dataclass, so that its module moves with the problem that holds it
class ModuleNetwork(Network):
    """Any `torch.nn.Module` of one task: weights are its parameters, images come to it channels first.

    Its buffers are constants. One that tracks running statistics should not (`track_running_stats=False`): a task
    normalises by its own batch. It stays in the mode it is in: dropout is for `module.eval()` to switch off, since
    evaluation adapts tasks as training does.

    Args:
        module: the module.

    Example:
        >>> network = ModuleNetwork(torch.nn.Linear(2, 3))
        >>> network(network.init(0), torch.ones(4, 2)).shape
        torch.Size([4, 3])
    """

    handles_tasks: ClassVar[bool] = False

    module: torch.nn.Module

    def __post_init__(self) -> None:
        """Refuse what is no module."""
        if not isinstance(self.module, torch.nn.Module):
            raise UsageError(f"ModuleNetwork was expected to get a torch.nn.Module, but got {self.module!r}.")

    def init(self, seed: int) -> TensorDict:
        """Copies of the module's own parameters; the seed is not used."""
        return {name: value.detach().clone() for name, value in self.module.named_parameters()}

    def __call__(self, params: Params, inputs: Tensor) -> Tensor:
        """`functional_call` of the module."""
        images = inputs.movedim(-1, -3) if inputs.ndim == 4 else inputs
        outputs: Tensor = functional_call(self.module, dict(params), (images,))
        return outputs


def as_vectors(inputs: Tensor, size: int) -> Tensor | None:
    """Inputs as `(*batch, N, size)`: the last dimensions, as many as hold so many numbers, become one; None: none do.

    Example:
        >>> as_vectors(torch.ones(5, 2, 2, 3), 12).shape
        torch.Size([5, 12])
    """
    for first in range(inputs.ndim - 1, 0, -1):
        if math.prod(inputs.shape[first:]) == size:
            return inputs.flatten(first)
    return None


def activation_of(name: str | Activation) -> Activation:
    """A function of `torch.nn.functional` by its name, or the function that is given.

    Raises:
        UsageError: there is none of that name.
    """
    found = getattr(functional, name, None) if isinstance(name, str) else name
    if not callable(found) or isinstance(found, type):
        raise UsageError(
            f"activation was expected to be a function of torch.nn.functional such as relu, tanh or softplus, but is {name!r}."
        )
    return found


def glorot(shape: tuple[int, ...], fan_in: int, fan_out: int, *seeds: int) -> Tensor:
    """Uniform weights of variance `2 / (fan_in + fan_out)`.

    Reference: Glorot and Bengio (2010), "Understanding the difficulty of training deep feedforward neural networks".
    """
    limit = (6.0 / (fan_in + fan_out)) ** 0.5
    values = torch.rand(shape, generator=generator(*seeds), dtype=torch.float64)
    return ((2.0 * values - 1.0) * limit).to(torch.float32)


def linear_weights(name: str, num_inputs: int, num_outputs: int, *seeds: int) -> TensorDict:
    """`NAME.weight` `(O, I)` and `NAME.bias` `(O,)`, zero."""
    weight = glorot((num_outputs, num_inputs), num_inputs, num_outputs, *seeds)
    return {f"{name}.weight": weight, f"{name}.bias": torch.zeros(num_outputs, dtype=weight.dtype)}


def conv_weights(name: str, num_inputs: int, num_outputs: int, kernel: int, *seeds: int) -> TensorDict:
    """`NAME.weight` `(O, k, k, I)`, and gain and bias `(O,)` of the normalisation behind it."""
    area = kernel * kernel
    weight = glorot((num_outputs, kernel, kernel, num_inputs), area * num_inputs, area * num_outputs, *seeds)
    return {
        f"{name}.weight": weight,
        f"{name}.gain": torch.ones(num_outputs, dtype=weight.dtype),
        f"{name}.bias": torch.zeros(num_outputs, dtype=weight.dtype),
    }
