"""What problems on Fashion-MNIST share: a network, the splits, the loss of validation images, the figures to log."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

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


class Splits(NamedTuple):
    """Which of the 60,000 images for training a problem trains on, and which it validates on.

    Attributes:
        data: all images.
        train: numbers of the training images.
        validation: numbers of the validation images.
    """

    data: FashionMNIST
    train: Tensor
    validation: Tensor


class FashionProblem(Problem):
    """A network that is trained on some images, and judged by others in the outer loss; derived classes say what is learned.

    Args:
        network: what is trained; None is softmax regression.
        splits: which images are for what.
        holdout: share of the validation images that the outer loss leaves out; the metric `holdout_loss` is theirs.
        batch_size: training images in a minibatch; None takes all.
        outer_batch_size: validation images in one of the outer loss; None takes all.
        seed: of the starting weights and of the minibatches.

    Raises:
        UsageError: a number is out of its range.
    """

    def __init__(
        self,
        network: Network | None,
        splits: Splits,
        holdout: float,
        batch_size: int | None,
        outer_batch_size: int | None,
        seed: int,
    ) -> None:
        """Take the images apart."""
        if not 0 <= holdout < 1:
            raise UsageError(f"problem.holdout was expected to be a share from 0 to below 1, but is {holdout}.")
        self.network = network or SoftmaxRegression()
        data, train, validation = splits
        kept = len(validation) - round(holdout * len(validation))
        if kept < 1:
            raise UsageError(f"problem.holdout={holdout} leaves none of {len(validation)} examples to the outer loss.")
        self.x, self.y = pixels(data.train_images[train]), data.train_labels[train]
        x, y = pixels(data.train_images[validation]), data.train_labels[validation]
        self.x_validation, self.y_validation = x[:kept], y[:kept]
        self.x_holdout, self.y_holdout = x[kept:], y[kept:]
        self.x_test, self.y_test = pixels(data.test_images), data.test_labels
        self.origin = self.network.init(seed)
        self.inner_batches = None if batch_size is None else Partition(len(train), batch_size, seed)
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


def drawn(num_train: int, num_validation: int, root: str | None, seed: int) -> Splits:
    """Training and validation images at random.

    Args:
        num_train: training images.
        num_validation: validation images.
        root: the data folder, see `load_fashion_mnist`.
        seed: of the draw.

    Raises:
        UsageError: there are not so many images.
    """
    data = load_fashion_mnist(root)
    most = len(data.train_labels)
    if num_train < 1 or num_validation < 1 or num_train + num_validation > most:
        raise UsageError(
            f"problem.num_train and problem.num_validation were expected to be at least 1, and {most:,} together at most, but "
            f"are {num_train:,} and {num_validation:,}."
        )
    order = torch.randperm(most, generator=generator(seed))
    return Splits(data, order[:num_train], order[num_train : num_train + num_validation])


def long_tailed(imbalance: float, num_most: int, num_validation: int, root: str | None, seed: int) -> Splits:
    """As many validation images of each class, and training images that are fewer from class to class.

    Class `c` of `C` has `num_most imbalance^(-c / (C - 1))` training images, rounded down: the first one `imbalance` times as
    many as the last one.

    Args:
        imbalance: ratio of the largest and the smallest class.
        num_most: training images of the largest class.
        num_validation: validation images of each class.
        root: the data folder, see `load_fashion_mnist`.
        seed: of the draw.

    Raises:
        UsageError: there are not so many images, or a class has none.

    Reference: Cui, Jia, Lin, Song and Belongie (2019), "Class-balanced loss based on effective number of samples".
    """
    data = load_fashion_mnist(root)
    if not 1 <= imbalance <= num_most or num_validation < 1:
        raise UsageError(
            "problem.imbalance was expected to be from 1 to problem.num_most, and problem.num_validation at least 1, but they "
            f"are {imbalance}, {num_most:,} and {num_validation:,}."
        )
    order = torch.randperm(len(data.train_labels), generator=generator(seed))
    train, validation = [], []
    for label in range(NUM_CLASSES):
        members = order[data.train_labels[order] == label]
        number = int(
            num_most * imbalance ** (-label / (NUM_CLASSES - 1)) + 1e-9
        )  # a power may be just below a whole number
        if number + num_validation > len(members):
            raise UsageError(
                f"class {label} has {len(members):,} images, but problem.num_most={num_most:,} and problem.num_validation="
                f"{num_validation:,} want {number + num_validation:,} of them."
            )
        validation.append(members[:num_validation])
        train.append(members[num_validation : num_validation + number])
    # Class by class in turns, so that a hold-out, the last ones, has as many of each, but for one.
    return Splits(data, torch.cat(train), torch.stack(validation, 1).flatten())
