"""How strongly to hold which weight of a network near its start: over a million penalties, chosen on validation images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from bilevel.broadcast import Broadcast, Groups
from bilevel.constraints import Constraint, Positive
from bilevel.errors import UsageError
from bilevel.models import MLP, Network
from bilevel.problems.fashion import NUM_CLASSES, FashionProblem, drawn
from bilevel.tree import TensorDict

Tensors = Mapping[str, Tensor]


class WeightDecay(FashionProblem):
    r"""A network on Fashion-MNIST, `mean CE + Σ λ (x - x₀)² / 2`, with the decay `λ` of each weight learned.

    Weights decay to their random starting values `x₀`, not to zero: for nearly linear units a decay to zero is the same for all
    orthogonal mixtures of a layer's units, the minimum is then a valley, and its derivative is none (see `DigitsMLP`).

    Args:
        network: what is trained; None is a perceptron 784 - 1024 - 256 - 10 with tanh, of 1,068,810 weights.
        decay: how many: `shared` (1), `per_layer`, `per_tensor`, `per_feature`, `per_weight` (each weight its own), or groups
            such as `{weights: "*.weight", biases: "*.bias"}`; see `bilevel.broadcast.Broadcast`.
        start: starting value of every decay.
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

    References: Lorraine, Vicol and Duvenaud (2020), "Optimizing millions of hyperparameters by implicit differentiation" (a
    decay for each weight); Li, Grandvalet and Davoine (2018), "Explicit inductive bias for transfer learning with
    convolutional networks" (decay to the start).
    """

    constraints: ClassVar[Mapping[str, Constraint]] = {"decay": Positive()}

    def __init__(
        self,
        network: Network | None = None,
        decay: str | Groups = "per_weight",
        start: float = 1e-3,
        num_train: int = 2000,
        num_validation: int = 2000,
        holdout: float = 0.25,
        batch_size: int | None = None,
        outer_batch_size: int | None = None,
        root: str | None = None,
        split_seed: int = 0,
        seed: int = 0,
    ) -> None:
        """Load and split."""
        if not start > 0:
            raise UsageError(f"problem.start is the starting decay and must be above 0, but is {start}.")
        network = network or MLP(784, NUM_CLASSES, (1024, 256), "tanh")
        splits = drawn(num_train, num_validation, root, split_seed)
        super().__init__(network, splits, holdout, batch_size, outer_batch_size, seed)
        self.start_decay = start
        self.broadcast = Broadcast.of("decay", decay, self.origin)

    def init_hparams(self) -> TensorDict:
        """The decays."""
        return self.broadcast.start(self.start_decay, self.x)

    def anchor(self, hparams: Tensors) -> tuple[TensorDict, TensorDict]:
        """The decays, on the way from the start."""
        return dict(self.broadcast.expand(hparams)), dict(self.origin)
