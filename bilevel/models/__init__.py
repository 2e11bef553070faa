"""Networks as pure functions of weights and inputs, written for many tasks at once."""

from bilevel.models.conv4 import Conv4
from bilevel.models.convolution import convolve
from bilevel.models.mlp import MLP
from bilevel.models.network import FeatureNetwork, ModuleNetwork, Network
from bilevel.models.normalisation import normalise
from bilevel.models.resnet12 import ResNet12
from bilevel.models.softmax import SoftmaxRegression

__all__ = [
    "MLP",
    "Conv4",
    "FeatureNetwork",
    "ModuleNetwork",
    "Network",
    "ResNet12",
    "SoftmaxRegression",
    "convolve",
    "normalise",
]
