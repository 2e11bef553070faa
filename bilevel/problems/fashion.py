"""What problems on Fashion-MNIST share: a network, the splits, the loss of validation images, the figures to log."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from bilevel.data import FashionMNIST, Partition, load_fashion_mnist
from bilevel.errors import UsageError
from bilevel.models import Network, SoftmaxRegression
from bilevel.problem import Problem
from bilevel.rng import generator
from bilevel.tree import TensorDict

Tensors = Mapping[str, Tensor]
NUM_CLASSES = 10


class FashionProblem(Problem):
    """A network that is trained on some images, and judged by others in the outer loss; derived classes say what is learned.

    Args:
        network: what is trained; None is softmax regression.
        num_train: training images.
        num_validation: validation images; they and the training images are drawn from the 60,000 images for training.
        holdout: share of the validation images that the outer loss leaves out; the metric `holdout_loss` is theirs.
        batch_size: training images in a minibatch; None takes all.
        outer_batch_size: validation images in one of the outer loss; None takes all.
        root: the data folder; None takes the variable BILEVEL_DATA, or a cache folder in the user's home.
        split_seed: of the split.
        seed: of the starting weights and of the minibatches.

    Raises:
        UsageError: there are not so many images, or a number is out of its range.
    """

    def __init__(
        self,
        network: Network | None,
        num_train: int,
        num_validation: int,
        holdout: float,
        batch_size: int | None,
        outer_batch_size: int | None,
        root: str | None,
        split_seed: int,
        seed: int,
    ) -> None:
        """Load and split."""
        if not 0 <= holdout < 1:
            raise UsageError(f"problem.holdout was expected to be a share from 0 to below 1, but is {holdout}.")
        self.network = network or SoftmaxRegression()
        data = load_fashion_mnist(root)
        train, validation = _drawn(data, num_train, num_validation, split_seed)
        kept = num_validation - round(holdout * num_validation)
        if kept < 1:
            raise UsageError(f"problem.holdout={holdout} leaves none of {num_validation} examples to the outer loss.")
        self.x, self.y = pixels(data.train_images[train]), data.train_labels[train]
        x, y = pixels(data.train_images[validation]), data.train_labels[validation]
        self.x_validation, self.y_validation = x[:kept], y[:kept]
        self.x_holdout, self.y_holdout = x[kept:], y[kept:]
        self.x_test, self.y_test = pixels(data.test_images), data.test_labels
        self.origin = self.network.init(seed)
        self.inner_batches = None if batch_size is None else Partition(num_train, batch_size, seed)
        self.outer_batches = None if outer_batch_size is None else Partition(kept, outer_batch_size, seed + 1)

    def init_params(self, hparams: Tensors) -> TensorDict:
        """The network's starting weights."""
        return dict(self.origin)

    def outputs(self, params: Tensors, hparams: Tensors, batch: Tensor | None) -> Tensor:
        """Scores of the training images in the batch."""
        return self.network(params, self.x if batch is None else self.x[batch])

    def output_loss(self, outputs: Tensor, hparams: Tensors, batch: Tensor | None) -> Tensor:
        """Cross-entropy of each of them, `(B,)`."""
        return cross_entropy(outputs, self.y if batch is None else self.y[batch], reduction="none")

    def outer_loss(self, params: Tensors, hparams: Tensors, batch: Tensor | None) -> Tensor:
        """Mean cross-entropy of the validation images in the batch."""
        x, y = self.x_validation, self.y_validation
        x, y = (x, y) if batch is None else (x[batch], y[batch])
        return cross_entropy(self.network(params, x), y)

    def metrics(self, params: Tensors, hparams: Tensors) -> dict[str, float]:
        """Test accuracy, and loss and accuracy of what the outer loss leaves out."""
        with torch.no_grad():
            found = {"test_accuracy": accuracy(self.network(params, self.x_test), self.y_test)}
            if len(self.x_holdout):
                scores = self.network(params, self.x_holdout)
                found["holdout_loss"] = float(cross_entropy(scores, self.y_holdout))
                found["holdout_accuracy"] = accuracy(scores, self.y_holdout)
        return found


def accuracy(scores: Tensor, labels: Tensor) -> float:
    """Share of the rows whose largest score is that of their label."""
    return float((scores.argmax(-1) == labels).double().mean())


def pixels(images: Tensor) -> Tensor:
    """From bytes to numbers from 0 to 1, in float32 as networks' weights are."""
    return images.to(torch.float32) / 255


def _drawn(data: FashionMNIST, num_train: int, num_validation: int, seed: int) -> tuple[Tensor, Tensor]:
    """Which images are for training, and which for validation."""
    most = len(data.train_labels)
    if num_train < 1 or num_validation < 1 or num_train + num_validation > most:
        raise UsageError(
            f"problem.num_train and problem.num_validation were expected to be at least 1, and {most:,} together at most, but "
            f"are {num_train:,} and {num_validation:,}."
        )
    order = torch.randperm(most, generator=generator(seed))
    return order[:num_train], order[num_train : num_train + num_validation]
