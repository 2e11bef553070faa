"""Data hyper-cleaning: one weight for each training example, many of which are labelled wrongly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from bilevel.constraints import Constraint, UnitInterval
from bilevel.data import FashionMNIST, Partition, load_fashion_mnist, mislabelled
from bilevel.errors import UsageError
from bilevel.models import Network, SoftmaxRegression
from bilevel.problem import Problem
from bilevel.rng import generator
from bilevel.tree import TensorDict

Tensors = Mapping[str, Tensor]
NUM_CLASSES = 10
TRUSTED = 0.5  # an example with a weight below this is held to be labelled wrongly


class HyperCleaning(Problem):
    r"""Fashion-MNIST with wrong training labels: `mean_i w_i CE_i + λ ‖x - x₀‖² / 2`, weights `w_i` between 0 and 1.

    A network is trained on weighted examples; the weights are learned by its loss on validation images, which are labelled
    rightly. Those of a wrong label fall, since what it teaches raises that loss.

    Args:
        network: what is trained; None is softmax regression. `x₀` are its starting weights.
        num_train: training examples.
        num_validation: validation examples; they and the training examples are drawn from the 60,000 images for training.
        corruption: share of training labels that are wrong, each of the other nine classes as likely.
        start: starting value of every weight.
        penalty: `λ`.
        holdout: share of the validation examples that the outer loss leaves out; the metric `holdout_loss` is theirs.
        batch_size: training examples in a minibatch; None takes all.
        outer_batch_size: validation examples in one of the outer loss; None takes all.
        root: the data folder; None takes the variable BILEVEL_DATA, or a cache folder in the user's home.
        split_seed: of the split and of the wrong labels.
        seed: of the starting weights and of the minibatches.

    Raises:
        UsageError: there are not so many images, or a number is out of its range.

    References: Franceschi, Donini, Frasconi and Pontil (2017), "Forward and reverse gradient-based hyperparameter
    optimization" (5,000 training, 5,000 validation and 10,000 test examples of MNIST, half of the training labels wrong).
    """

    constraints: ClassVar[Mapping[str, Constraint]] = {"weight": UnitInterval()}

    def __init__(
        self,
        network: Network | None = None,
        num_train: int = 5000,
        num_validation: int = 5000,
        corruption: float = 0.5,
        start: float = 0.5,
        penalty: float = 0.01,
        holdout: float = 0.2,
        batch_size: int | None = None,
        outer_batch_size: int | None = None,
        root: str | None = None,
        split_seed: int = 0,
        seed: int = 0,
    ) -> None:
        """Load, split and mislabel."""
        if not penalty > 0:
            raise UsageError(f"problem.penalty was expected to be above 0, but is {penalty}.")
        if not 0 <= holdout < 1:
            raise UsageError(f"problem.holdout was expected to be a share from 0 to below 1, but is {holdout}.")
        self.network = network or SoftmaxRegression()
        self.start_weight, self.penalty_strength = start, penalty
        data = load_fashion_mnist(root)
        train, validation = _drawn(data, num_train, num_validation, split_seed)
        self.x, self.y_true = _pixels(data.train_images[train]), data.train_labels[train]
        self.y = mislabelled(self.y_true, corruption, NUM_CLASSES, split_seed, 1)
        kept = num_validation - round(holdout * num_validation)
        if kept < 1:
            raise UsageError(f"problem.holdout={holdout} leaves none of {num_validation} examples to the outer loss.")
        x, y = _pixels(data.train_images[validation]), data.train_labels[validation]
        self.x_validation, self.y_validation = x[:kept], y[:kept]
        self.x_holdout, self.y_holdout = x[kept:], y[kept:]
        self.x_test, self.y_test = _pixels(data.test_images), data.test_labels
        self.origin = self.network.init(seed)
        self.inner_batches = None if batch_size is None else Partition(num_train, batch_size, seed)
        self.outer_batches = None if outer_batch_size is None else Partition(kept, outer_batch_size, seed + 1)

    @property
    def corrupted(self) -> Tensor:
        """Which labels are wrong, `(N,)`; nothing that is learned knows it."""
        return self.y != self.y_true

    def init_hparams(self) -> TensorDict:
        """The weights."""
        return {"weight": self.x.new_full((len(self.x),), self.start_weight)}

    def init_params(self, hparams: Tensors) -> TensorDict:
        """The network's starting weights."""
        return dict(self.origin)

    def anchor(self, hparams: Tensors) -> tuple[float, TensorDict]:
        """The penalty, on the way from the start."""
        return self.penalty_strength, dict(self.origin)

    def lower_curvature(self, hparams: Tensors) -> float | None:
        """The penalty, where the rest is convex."""
        return self.penalty_strength if isinstance(self.network, SoftmaxRegression) else None

    def outputs(self, params: Tensors, hparams: Tensors, batch: Tensor | None) -> Tensor:
        """Scores of the training examples in the batch."""
        return self.network(params, self.x if batch is None else self.x[batch])

    def output_loss(self, outputs: Tensor, hparams: Tensors, batch: Tensor | None) -> Tensor:
        """Weighted cross-entropy of each of them, `(B,)`."""
        if batch is None:
            return hparams["weight"] * cross_entropy(outputs, self.y, reduction="none")
        return hparams["weight"][batch] * cross_entropy(outputs, self.y[batch], reduction="none")

    def outer_loss(self, params: Tensors, hparams: Tensors, batch: Tensor | None) -> Tensor:
        """Mean cross-entropy of the validation examples in the batch."""
        x, y = self.x_validation, self.y_validation
        x, y = (x, y) if batch is None else (x[batch], y[batch])
        return cross_entropy(self.network(params, x), y)

    def metrics(self, params: Tensors, hparams: Tensors) -> dict[str, float]:
        """How well wrong labels are found, test accuracy, and loss and accuracy of what the outer loss leaves out."""
        with torch.no_grad():
            found = detection(hparams["weight"], self.corrupted)
            found["test_accuracy"] = _accuracy(self.network(params, self.x_test), self.y_test)
            if len(self.x_holdout):
                scores = self.network(params, self.x_holdout)
                found["holdout_loss"] = float(cross_entropy(scores, self.y_holdout))
                found["holdout_accuracy"] = _accuracy(scores, self.y_holdout)
        return found


def detection(weight: Tensor, corrupted: Tensor) -> dict[str, float]:
    """Precision, recall and F1 of taking examples with weights below a half for the wrongly labelled ones.

    Example:
        >>> detection(torch.tensor([0.1, 0.2, 0.9, 0.8]), torch.tensor([True, False, True, False]))
        {'precision': 0.5, 'recall': 0.5, 'f1': 0.5}
    """
    suspected = weight < TRUSTED
    right, said, all_wrong = int((suspected & corrupted).sum()), int(suspected.sum()), int(corrupted.sum())
    return {
        "precision": right / max(said, 1),
        "recall": right / max(all_wrong, 1),
        "f1": 2 * right / max(said + all_wrong, 1),
    }


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


def _accuracy(scores: Tensor, labels: Tensor) -> float:
    return float((scores.argmax(-1) == labels).double().mean())


def _pixels(images: Tensor) -> Tensor:
    """From bytes to numbers from 0 to 1, `(N, 28, 28, 1)`, in float32 as the network's weights are."""
    return images.to(torch.float32) / 255
