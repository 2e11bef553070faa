"""Data hyper-cleaning: one weight for each training example, many of which are labelled wrongly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from bilevel.constraints import Constraint, UnitInterval
from bilevel.data import mislabelled
from bilevel.errors import UsageError
from bilevel.models import Network, SoftmaxRegression
from bilevel.problems.fashion import NUM_CLASSES, FashionProblem, drawn
from bilevel.tree import TensorDict

Tensors = Mapping[str, Tensor]
TRUSTED = 0.5  # an example with a weight below this is held to be labelled wrongly


class HyperCleaning(FashionProblem):
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
        splits = drawn(num_train, num_validation, root, split_seed)
        super().__init__(network, splits, holdout, batch_size, outer_batch_size, seed)
        self.start_weight, self.penalty_strength = start, penalty
        self.y_true = self.y
        self.y = mislabelled(self.y_true, corruption, NUM_CLASSES, split_seed, 1)

    @property
    def corrupted(self) -> Tensor:
        """Which labels are wrong, `(N,)`; nothing that is learned knows it."""
        return self.y != self.y_true

    def init_hparams(self) -> TensorDict:
        """The weights."""
        return {"weight": self.x.new_full((len(self.x),), self.start_weight)}

    def anchor(self, hparams: Tensors) -> tuple[float, TensorDict]:
        """The penalty, on the way from the start."""
        return self.penalty_strength, dict(self.origin)

    def lower_curvature(self, hparams: Tensors) -> float | None:
        """The penalty, where the rest is convex."""
        return self.penalty_strength if isinstance(self.network, SoftmaxRegression) else None

    def output_loss(self, outputs: Tensor, hparams: Tensors, batch: Tensor | None) -> Tensor:
        """Weighted cross-entropy of each of them, `(B,)`."""
        weight = hparams["weight"] if batch is None else hparams["weight"][batch]
        return weight * super().output_loss(outputs, hparams, batch)

    def metrics(self, params: Tensors, hparams: Tensors) -> dict[str, float]:
        """How well wrong labels are found, test accuracy, and loss and accuracy of what the outer loss leaves out."""
        return detection(hparams["weight"], self.corrupted) | super().metrics(params, hparams)


def detection(weight: Tensor, corrupted: Tensor) -> dict[str, float]:
    """Precision, recall and F1 of taking examples with weights below a half for the wrongly labelled ones.

    Example:
        >>> import torch
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
