"""Penalties of sparse linear models, chosen by cross-validation: lasso, elastic net, sparse logistic regression."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import softplus

from bilevel.broadcast import Broadcast
from bilevel.constraints import Constraint, Positive
from bilevel.errors import UsageError
from bilevel.problem import Problem
from bilevel.problems.sparse_designs import RandomDesign, Source
from bilevel.rng import generator
from bilevel.sparse import SparseMatrix
from bilevel.tree import TensorDict

Tensors = Mapping[str, Tensor]


class LinearModel(ABC):
    """The loss of a linear model's outputs.

    Attributes:
        centred: whether features and targets are centred, fold by fold, which is the same as an intercept.
    """

    centred: ClassVar[bool] = False

    @abstractmethod
    def inner(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Of training examples, one by one."""

    @abstractmethod
    def outer(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Of validation examples, one by one."""


class LeastSquares(LinearModel):
    """`(output - target)² / 2`, as scikit-learn's `Lasso` has it, judged by squared errors; with an intercept."""

    centred: ClassVar[bool] = True

    def inner(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Half the squared error."""
        return (outputs - targets).square() / 2

    def outer(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The squared error."""
        return (outputs - targets).square()


class Logistic(LinearModel):
    """`log(1 + exp(-target output))`, targets 1 and -1; without an intercept, as coordinate-descent libraries have it."""

    def inner(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The negative log-likelihood."""
        return softplus(-targets * outputs)

    def outer(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The same."""
        return self.inner(outputs, targets)


class SparsePenalties(Problem):
    r"""For each fold `k` the weights `w_k = argmin mean_{i not in k} φ(x_i w, y_i) + Σ_j λ_j |w_j| + μ ‖w‖² / 2`.

    The outer loss is the mean over folds of the mean loss of the examples in the fold, as in scikit-learn's `LassoCV`. The
    1-norm is no part of `inner_loss`: it belongs to the inner solver, `ProximalNewton(proximal=SoftThreshold("penalty"))` or
    `ProximalGradient`. All folds are solved at once, as tasks.

    Args:
        design: where features and targets come from; None is `RandomDesign()`.
        model: `φ`; None is `LeastSquares()`.
        num_folds: of all examples, next to each other as scikit-learn's `KFold` takes them; 1 validates on the last third.
        start: starting penalty, over the smallest one at which all weights are zero.
        penalty: one (`shared`), or one for each feature (`per_feature`).
        ridge: starting value of `μ`; None leaves the term out.
        split_seed: shuffles the examples first; None takes them as they come.

    Raises:
        UsageError: a number is out of its range.

    References: Tibshirani (1996), "Regression shrinkage and selection via the lasso"; Zou and Hastie (2005), "Regularization
    and variable selection via the elastic net".
    """

    constraints: ClassVar[Mapping[str, Constraint]] = {"penalty": Positive()}
    handles_tasks = True

    def __init__(
        self,
        design: Source | None = None,
        model: LinearModel | None = None,
        num_folds: int = 5,
        start: float = 0.1,
        penalty: str = "shared",
        ridge: float | None = None,
        split_seed: int | None = None,
    ) -> None:
        """Load, split, centre."""
        x, y, self.names = (design or RandomDesign()).load()
        number = len(y)
        if not 1 <= num_folds <= number // 2:
            raise UsageError(f"problem.num_folds was expected to be from 1 to {number // 2}, but is {num_folds}.")
        if not 0 < start < 1 or (ridge is not None and not ridge > 0):
            raise UsageError(
                f"problem.start was expected to be between 0 and 1, problem.ridge above 0 or null, but got {start} and {ridge}."
            )
        if ridge is not None:
            self.constraints = {"penalty": Positive(), "ridge": Positive()}  # type: ignore[misc]  # there only then
        self.model, self.num_tasks, self.start_share, self.start_ridge = (
            model or LeastSquares(),
            num_folds,
            start,
            ridge,
        )
        validation = _folds(number, num_folds, split_seed)  # (K, N)
        self.train = (~validation).double() / (~validation).sum(1, keepdim=True)
        self.validation = validation.double() / validation.sum(1, keepdim=True)
        self.x = x
        self.targets = y.expand(num_folds, -1)
        self.means = torch.zeros(num_folds, self.x.shape[1], dtype=torch.float64)
        if self.model.centred:
            self.means = (x.mT @ self.train.mT).mT
            self.targets = y - self.train @ y.unsqueeze(-1)
        self.broadcast = Broadcast.of("penalty", penalty, {"weight": torch.empty(1, x.shape[1])})
        self.largest = self._largest_penalty()

    def _largest_penalty(self) -> float:
        """The smallest penalty at which the weights of all folds are zero."""
        weight = torch.zeros_like(self.means).requires_grad_()
        with torch.enable_grad():
            loss = (self.train * self.model.inner(self.outputs_of(weight), self.targets)).sum()
        return float(torch.autograd.grad(loss, weight)[0].abs().max())

    def init_hparams(self) -> TensorDict:
        """The penalties, and the ridge."""
        found = self.broadcast.start(self.start_share * self.largest, self.targets)
        found = {name: value.flatten() if value.ndim else value for name, value in found.items()}
        return found if self.start_ridge is None else {**found, "ridge": self.targets.new_tensor(self.start_ridge)}

    def init_params(self, hparams: Tensors) -> TensorDict:
        """Zeros: the problem is convex."""
        return {"weight": self.targets.new_zeros(self.x.shape[1])}

    def outputs_of(self, weight: Tensor) -> Tensor:
        """Of all examples by the weights of each fold, `(K, N)`."""
        return (self.x @ weight.mT).mT - (self.means * weight).sum(-1, keepdim=True)

    def inner_loss(self, params: Tensors, hparams: Tensors, batch: None) -> Tensor:
        """Without the 1-norm; of each fold, `(K,)`."""
        weight = params["weight"]
        loss = (self.train * self.model.inner(self.outputs_of(weight), self.targets)).sum(-1)
        return loss if "ridge" not in hparams else loss + hparams["ridge"] * weight.square().sum(-1) / 2

    def outer_loss(self, params: Tensors, hparams: Tensors, batch: None) -> Tensor:
        """Of each fold, `(K,)`."""
        return (self.validation * self.model.outer(self.outputs_of(params["weight"]), self.targets)).sum(-1)

    def restricted(self, kept: Tensors) -> SparsePenalties:
        """The same with the features whose weights are not zero."""
        columns = kept["weight"].nonzero().squeeze(-1)
        smaller = copy.copy(self)
        smaller.x = self.x.select(columns) if isinstance(self.x, SparseMatrix) else self.x[:, columns]
        smaller.means = self.means[:, columns]
        return smaller

    def metrics(self, params: Tensors, hparams: Tensors) -> dict[str, float]:
        """How many weights of a fold are not zero, in the mean."""
        return {"num_nonzero": float((params["weight"] != 0).sum(-1).double().mean())}


def _folds(number: int, num_folds: int, seed: int | None) -> Tensor:
    """Which examples validate in which fold, `(K, N)`."""
    order = torch.arange(number) if seed is None else torch.randperm(number, generator=generator(seed))
    parts = torch.tensor_split(order, num_folds) if num_folds > 1 else [order[2 * number // 3 :]]
    found = torch.zeros(num_folds, number, dtype=torch.bool)
    for fold, part in enumerate(parts):
        found[fold, part] = True
    return found
