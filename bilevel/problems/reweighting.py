"""Training images weighted by their loss, through a small network that is learned by a few validation images."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bilevel.errors import UsageError
from bilevel.models import MLP, Network
from bilevel.problems.fashion import NUM_CLASSES, FashionProblem, accuracy, long_tailed
from bilevel.tree import TensorDict

Tensors = Mapping[str, Tensor]
RARE = 3  # classes, the rarest ones, whose accuracy is a metric


class Reweighting(FashionProblem):
    r"""Fashion-MNIST with few images of some classes: `Σ v_i CE_i / Σ v_i` with weights `v_i = V(CE_i; θ)` between 0 and 1.

    `V` is a perceptron with one hidden layer and a sigmoid (meta-weight-net). Its weights `θ` are learned by the loss of a few
    validation images, as many of each class: what it gives more weight to, such as images of rare classes, whose loss is large,
    is what these need. What `V` is given is a number and not differentiated: the gradient of the training loss is the weighted
    mean of the images' gradients. So there is no inner loss of which a minimum could be differentiated; the method is
    `hypergradient=one_step` with a single inner step (`solver.max_steps=1`), which differentiates by `θ` alone. It is exact
    for what one step of training does to the validation loss.

    Args:
        network: what is trained; None is a perceptron 784 - 256 - 10.
        imbalance: how many times as many training images the largest class has as the smallest one; see `long_tailed`.
        num_most: training images of the largest class.
        num_validation: validation images of each class.
        hidden: width of `V`.
        holdout: share of the validation images that the outer loss leaves out; the metric `holdout_loss` is theirs.
        batch_size: training images in a minibatch; None takes all.
        outer_batch_size: validation images in one of the outer loss; None takes all.
        root: the data folder; None takes the variable BILEVEL_DATA, or a cache folder in the user's home.
        split_seed: of the draw.
        seed: of the starting weights of both networks, and of the minibatches.

    Raises:
        UsageError: there are not so many images, or a number is out of its range.

    Reference: Shu, Xie, Yi, Zhao, Zhou, Xu and Meng (2019), "Meta-Weight-Net: learning an explicit mapping for sample
    weighting" (imbalance 200, 100, 50 and less, ten validation images of each class).
    """

    def __init__(
        self,
        network: Network | None = None,
        imbalance: float = 100,
        num_most: int = 5000,
        num_validation: int = 10,
        hidden: int = 100,
        holdout: float = 0.0,
        batch_size: int | None = 100,
        outer_batch_size: int | None = None,
        root: str | None = None,
        split_seed: int = 0,
        seed: int = 0,
    ) -> None:
        """Load, and leave images away."""
        if not isinstance(hidden, int) or hidden < 1:
            raise UsageError(f"problem.hidden was expected to be an integer of at least 1, but is {hidden}.")
        splits = long_tailed(imbalance, num_most, num_validation, root, split_seed)
        super().__init__(network or MLP(784, NUM_CLASSES, (256,)), splits, holdout, batch_size, outer_batch_size, seed)
        self.weighting = MLP(1, 1, (hidden,))
        self.start = {f"weighting.{name}": value for name, value in self.weighting.init(seed).items()}

    @property
    def counts(self) -> Tensor:
        """Training images of each class, `(10,)`."""
        return torch.bincount(self.y, minlength=NUM_CLASSES)

    def init_hparams(self) -> TensorDict:
        """The weights of `V`."""
        return dict(self.start)

    def weights(self, losses: Tensor, hparams: Tensors) -> Tensor:
        """`V` of each loss `(B,)`, between 0 and 1."""
        params = {name.removeprefix("weighting."): value for name, value in hparams.items()}
        return torch.sigmoid(self.weighting(params, losses.unsqueeze(-1)).squeeze(-1))

    def output_loss(self, outputs: Tensor, hparams: Tensors, batch: Tensor | None) -> Tensor:
        """Cross-entropy of each training image in the batch, times its share of the mean weight, `(B,)`."""
        losses = super().output_loss(outputs, hparams, batch)
        weights = self.weights(losses.detach(), hparams)
        return losses * weights / weights.mean()

    def metrics(self, params: Tensors, hparams: Tensors) -> dict[str, float]:
        """Test accuracy of all and of the rarest classes, and loss and accuracy of what the outer loss leaves out."""
        found = super().metrics(params, hparams)
        rare = self.y_test >= NUM_CLASSES - RARE
        with torch.no_grad():
            found["rare_accuracy"] = accuracy(self.network(params, self.x_test[rare]), self.y_test[rare])
        return found
