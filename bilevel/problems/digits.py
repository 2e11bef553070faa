"""Classifying handwritten digits: how strongly to penalise which weight, chosen on a validation split."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from bilevel.broadcast import Broadcast, Groups
from bilevel.constraints import Constraint, Positive
from bilevel.data import Minibatches, load_digits
from bilevel.errors import UsageError
from bilevel.problem import Problem
from bilevel.rng import generator, normal

Tensors = Mapping[str, Tensor]
NUM_PIXELS, NUM_CLASSES = 64, 10


class _Digits(Problem):
    """What both models share: the splits, the losses and the metrics; the penalty is quadratic in the weights."""

    constraints: ClassVar[Mapping[str, Constraint]] = {"penalty": Positive()}

    def __init__(self, start: float, batch_size: int | None, split_seed: int, seed: int) -> None:
        if not start > 0:
            raise UsageError(f"problem.start is the starting penalty and must be above 0, but is {start}.")
        self.start_penalty = start
        train, validation, test = load_digits(split_seed)
        self.x, self.y = train.x, train.y
        self.x_validation, self.y_validation = validation.x, validation.y
        self.x_test, self.y_test = test.x, test.y
        self.inner_batches = None if batch_size is None else Minibatches(len(self.x), batch_size, seed)

    def logits(self, params: Tensors, x: Tensor) -> Tensor:
        """Class scores `(N, 10)`."""
        raise AssertionError("abstract")

    def outputs(self, params: Tensors, hparams: Tensors, batch: Tensor | None) -> Tensor:
        """Scores of the training examples in the batch."""
        return self.logits(params, self.x if batch is None else self.x[batch])

    def output_loss(self, outputs: Tensor, hparams: Tensors, batch: Tensor | None) -> Tensor:
        """Cross-entropy of each example, `(B,)`."""
        return cross_entropy(outputs, self.y if batch is None else self.y[batch], reduction="none")

    def outer_loss(self, params: Tensors, hparams: Tensors, batch: None) -> Tensor:
        """Mean cross-entropy on the validation split, without penalty."""
        return cross_entropy(self.logits(params, self.x_validation), self.y_validation)

    def metrics(self, params: Tensors, hparams: Tensors) -> dict[str, float]:
        """Accuracy on both held-out splits and the test loss."""
        with torch.no_grad():
            validation, test = self.logits(params, self.x_validation), self.logits(params, self.x_test)
            return {
                "validation_accuracy": float((validation.argmax(-1) == self.y_validation).double().mean()),
                "test_loss": float(cross_entropy(test, self.y_test)),
                "test_accuracy": float((test.argmax(-1) == self.y_test).double().mean()),
            }


class DigitsSoftmax(_Digits):
    r"""Softmax regression: `mean CE + Σ λ w² / 2`, intercepts unpenalised; convex, 649 parameters.

    Adding a constant to all intercepts changes no prediction, so the first one is fixed at 0: the same minimiser, and a
    Hessian that is not singular.

    Args:
        penalty: one penalty (`shared`), one for each pixel (`per_feature`, 64) or each weight (`per_weight`, 640); see
            `bilevel.broadcast.Broadcast`.
        start: starting value of every penalty.
        batch_size: examples in an inner minibatch; None uses all.
        split_seed: seed of the split.
        seed: seed of the minibatches.
    """

    def __init__(
        self,
        penalty: str = "shared",
        start: float = 1e-2,
        batch_size: int | None = None,
        split_seed: int = 0,
        seed: int = 0,
    ) -> None:
        """Load the data; see the class."""
        super().__init__(start, batch_size, split_seed, seed)
        self.broadcast = Broadcast.of("penalty", penalty, {"weight": self.init_params({})["weight"]})

    def init_hparams(self) -> dict[str, Tensor]:
        """The penalties."""
        return self.broadcast.start(self.start_penalty, self.x)

    def init_params(self, hparams: Tensors) -> dict[str, Tensor]:
        """Zeros: the problem is convex."""
        return {"weight": self.x.new_zeros(NUM_CLASSES, NUM_PIXELS), "bias": self.x.new_zeros(NUM_CLASSES - 1)}

    def logits(self, params: Tensors, x: Tensor) -> Tensor:
        """`x Wᵀ + b` with the first intercept 0."""
        bias = torch.cat([params["bias"].new_zeros(1), params["bias"]])
        return x @ params["weight"].mT + bias

    def penalty(self, params: Tensors, hparams: Tensors) -> Tensor:
        """`Σ λ w² / 2` over the weights."""
        return 0.5 * (self.broadcast.expand(hparams)["weight"] * params["weight"].square()).sum()


class DigitsMLP(_Digits):
    r"""A smooth multilayer perceptron 64 - hidden - ... - 10, held near its start: `mean CE + Σ λ (w - w₀)² / 2`.

    The penalty is on the way from the random starting value `w₀`, for weights and biases. One towards 0 would be the same
    for every orthogonal mixture of a layer's units as long as the units are nearly linear: the inner problem would have
    many minimisers along which the loss hardly changes, and the hypergradient, which follows one of them, would be large
    in directions that a finite step of the hyperparameters does not keep. Towards `w₀` no two mixtures are alike.

    References: Hu, Li and Yu (2020), "Simple and effective regularization methods for training on noisily labeled data with
    generalization guarantee"; Li, Grandvalet and Davoine (2018), "Explicit inductive bias for transfer learning with
    convolutional networks" (L2-SP).

    Args:
        hidden: widths of the hidden layers.
        start: starting value of every penalty.
        penalty: how many: `shared` (1), `per_layer`, `per_tensor`, `per_feature`, `per_weight` (each parameter its own), or
            groups such as `{weights: "*.weight", biases: "*.bias"}`; see `bilevel.broadcast.Broadcast`.
        batch_size: examples in an inner minibatch; None uses all.
        split_seed: seed of the split.
        seed: seed of the minibatches and of the starting weights.
    """

    def __init__(
        self,
        hidden: tuple[int, ...] | list[int] = (32,),
        start: float = 1e-3,
        penalty: str | Groups = "per_weight",
        batch_size: int | None = None,
        split_seed: int = 0,
        seed: int = 0,
    ) -> None:
        """Load the data; see the class."""
        super().__init__(start, batch_size, split_seed, seed)
        if not all(width >= 1 for width in hidden):
            raise UsageError(f"problem.hidden must hold widths of at least 1, but is {list(hidden)}.")
        self.widths = [NUM_PIXELS, *hidden, NUM_CLASSES]
        self.origin = self._draw(seed)
        self.broadcast = Broadcast.of("penalty", penalty, self.origin)

    def init_hparams(self) -> dict[str, Tensor]:
        """The penalties."""
        return self.broadcast.start(self.start_penalty, self.x)

    def init_params(self, hparams: Tensors) -> dict[str, Tensor]:
        """Where the penalty is 0: scaled normal weights (LeCun), zero biases."""
        return dict(self.origin)

    def _draw(self, seed: int) -> dict[str, Tensor]:
        """The starting values of a seed."""
        source, params = generator(seed), {}
        for index, (before, after) in enumerate(pairwise(self.widths)):
            weight = normal((after, before), source, self.x.dtype, self.x.device) / before**0.5
            params[f"layer{index}.weight"] = weight
            params[f"layer{index}.bias"] = self.x.new_zeros(after)
        return params

    def logits(self, params: Tensors, x: Tensor) -> Tensor:
        """Layers with tanh between them."""
        for index in range(len(self.widths) - 1):
            x = torch.addmm(params[f"layer{index}.bias"], x, params[f"layer{index}.weight"].mT)
            if index < len(self.widths) - 2:
                x = torch.tanh(x)
        return x

    def penalty(self, params: Tensors, hparams: Tensors) -> Tensor:
        """`Σ λ (w - w₀)² / 2` over weights and biases."""
        decay = self.broadcast.expand(hparams)
        return (
            0.5
            * torch.stack(
                [(decay[name] * (value - self.origin[name]).square()).sum() for name, value in params.items()]
            ).sum()
        )
