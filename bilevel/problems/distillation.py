"""Dataset distillation: a few images that a network learns as much from as from all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from bilevel.constraints import Constraint, Positive
from bilevel.data import load_fashion_mnist
from bilevel.errors import UsageError
from bilevel.models import Network, SoftmaxRegression
from bilevel.problem import Problem
from bilevel.problems.fashion import NUM_CLASSES, accuracy, pixels
from bilevel.rng import generator
from bilevel.tree import TensorDict

Tensors = Mapping[str, Tensor]
SIDE = 28


class Distillation(Problem):
    r"""Images of Fashion-MNIST's classes, made so that training on them alone does well on the real ones.

    A network is trained on the images, `mean CE + λ ‖x - x₀‖² / 2`; the images and `λ` are learned by its loss on real training
    images, through the training. Pixels are free numbers, from normal noise around grey.

    Args:
        network: what is trained; None is softmax regression. `x₀` are its starting weights.
        num_per_class: images of each class.
        penalty: starting value of `λ`.
        noise: standard deviation of the starting pixels.
        num_train: real training images in the outer loss, drawn from the 60,000; None takes all.
        holdout: share of those that the outer loss leaves out; the metric `holdout_loss` is theirs.
        root: the data folder; None takes the variable BILEVEL_DATA, or a cache folder in the user's home.
        split_seed: of the draw.
        seed: of the starting pixels and of the starting weights.

    Raises:
        UsageError: a number is out of its range.

    References: Wang, Zhu, Torralba and Efros (2018), "Dataset distillation"; Lorraine, Vicol and Duvenaud (2020), "Optimizing
    millions of hyperparameters by implicit differentiation".
    """

    constraints: ClassVar[Mapping[str, Constraint]] = {"penalty": Positive()}

    def __init__(
        self,
        network: Network | None = None,
        num_per_class: int = 1,
        penalty: float = 0.01,
        noise: float = 0.1,
        num_train: int | None = None,
        holdout: float = 0.1,
        root: str | None = None,
        split_seed: int = 0,
        seed: int = 0,
    ) -> None:
        """Load, split and draw the starting pixels."""
        if num_per_class < 1 or not penalty > 0 or not noise >= 0:
            raise UsageError(
                "problem.num_per_class was expected to be at least 1, problem.penalty above 0 and problem.noise at least 0, "
                f"but they are {num_per_class}, {penalty} and {noise}."
            )
        if not 0 <= holdout < 1:
            raise UsageError(f"problem.holdout was expected to be a share from 0 to below 1, but is {holdout}.")
        self.network = network or SoftmaxRegression()
        data = load_fashion_mnist(root)
        available = len(data.train_labels)
        number = available if num_train is None else num_train
        kept = number - round(holdout * number)
        if not 1 <= number <= available or kept < 1:
            raise UsageError(
                f"problem.num_train was expected to be from 1 to {available:,}, or null, and to leave some to the outer loss, "
                f"but is {number:,} with problem.holdout={holdout}."
            )
        order = torch.randperm(available, generator=generator(split_seed))[:number]
        images, labels = pixels(data.train_images[order]), data.train_labels[order]
        self.x_train, self.y_train = images[:kept], labels[:kept]
        self.x_holdout, self.y_holdout = images[kept:], labels[kept:]
        self.x_test, self.y_test = pixels(data.test_images), data.test_labels
        self.labels = torch.arange(NUM_CLASSES).repeat(num_per_class)
        self.origin = self.network.init(seed)
        shape = (len(self.labels), SIDE, SIDE, 1)
        self.start = {
            "images": 0.5 + noise * torch.randn(shape, generator=generator(seed, 1), dtype=torch.float32),
            "penalty": torch.tensor(penalty, dtype=torch.float32),
        }

    def init_hparams(self) -> TensorDict:
        """The images and the penalty."""
        return dict(self.start)

    def init_params(self, hparams: Tensors) -> TensorDict:
        """The network's starting weights."""
        return dict(self.origin)

    def anchor(self, hparams: Tensors) -> tuple[Tensor, TensorDict]:
        """The penalty, on the way from the start."""
        return hparams["penalty"], dict(self.origin)

    def lower_curvature(self, hparams: Tensors) -> float | None:
        """The penalty, where the rest is convex."""
        return float(hparams["penalty"]) if isinstance(self.network, SoftmaxRegression) else None

    def outputs(self, params: Tensors, hparams: Tensors, batch: None) -> Tensor:
        """Scores of the distilled images."""
        return self.network(params, hparams["images"])

    def output_loss(self, outputs: Tensor, hparams: Tensors, batch: None) -> Tensor:
        """Cross-entropy of each distilled image, `(N,)`."""
        return cross_entropy(outputs, self.labels, reduction="none")

    def outer_loss(self, params: Tensors, hparams: Tensors, batch: None) -> Tensor:
        """Mean cross-entropy of real training images."""
        return cross_entropy(self.network(params, self.x_train), self.y_train)

    def metrics(self, params: Tensors, hparams: Tensors) -> dict[str, float]:
        """Accuracy on the test images, and the loss of what the outer loss leaves out."""
        with torch.no_grad():
            found = {"test_accuracy": accuracy(self.network(params, self.x_test), self.y_test)}
            if len(self.y_holdout):
                found["holdout_loss"] = float(cross_entropy(self.network(params, self.x_holdout), self.y_holdout))
        return found
