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
    r"""Fashion-MNIST with few images of some classes, trained along `Σ v_i ∇CE_i / Σ v_i` with weights `v_i = V(CE_i; θ)`.

    `V` is a perceptron with one hidden layer and a sigmoid (meta-weight-net). Its weights `θ` are learned by the loss of a few
    validation images, as many of each class: what it gives more weight to, such as images of rare classes, whose loss is large,
    is what these need.

    Training goes along the weighted mean of the images' gradients, which is the gradient of no loss, since `V` depends on the
    network's weights, too: the problem has an `optimality`, and no `inner_loss` to log. Derivatives through several steps, or
    of the point where the mean is zero, see what the weights change there. The paper differentiates one step of training:
    `hypergradient=one_step` with `solver.max_steps=1`. In an outer step that makes two steps of training, the second of which
    is the one that is differentiated.

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
        imbalance: float = 100.0,
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

    def optimality(self, params: Tensors, hparams: Tensors, batch: Tensor | None) -> TensorDict:
        """The weighted mean of the gradients of the training images in the batch."""

        def losses(at: TensorDict) -> Tensor:
            return self.output_loss(self.outputs(at, hparams, batch), hparams, batch)

        values, pull = torch.func.vjp(losses, dict(params))[:2]
        weights = self.weights(values, hparams)
        (mean,) = pull(weights / weights.sum())
        found: TensorDict = mean
        return found

    def metrics(self, params: Tensors, hparams: Tensors) -> dict[str, float]:
        """Test accuracy of all and of the rarest classes, and loss and accuracy of what the outer loss leaves out."""
        found = super().metrics(params, hparams)
        rare = self.y_test >= NUM_CLASSES - RARE
        with torch.no_grad():
            found["rare_accuracy"] = accuracy(self.network(params, self.x_test[rare]), self.y_test[rare])
        return found
