"""A linear support vector machine, trained by its dual problem: a box of which one side is the hyperparameter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import softplus

from bilevel.constraints import Constraint, Positive
from bilevel.errors import UsageError
from bilevel.problem import Problem
from bilevel.problems.sparse_designs import RandomDesign, Source
from bilevel.rng import generator
from bilevel.sparse import SparseMatrix
from bilevel.tree import TensorDict

Tensors = Mapping[str, Tensor]


class SupportVectors(Problem):
    r"""`min_α ‖Σ_i α_i y_i x_i‖² / 2 - Σ_i α_i` with `0 ≤ α_i ≤ cost`: the dual of the hinge loss, without an intercept.

    The weights are `w = Σ_i α_i y_i x_i`; the outer loss is the mean logistic loss of the validation examples' margins. The box
    belongs to the inner solver: `ProximalNewton(proximal=Project(0.0, "cost"))`. Examples at the upper bound move with it, so
    that the hypergradient has a part through them besides that of the free ones, the support vectors on the margin.

    Args:
        design: where features and targets come from, of which the signs count; None is `RandomDesign()`.
        start: starting cost.
        validation_fraction: share of the examples.
        split_seed: of the split.

    Raises:
        UsageError: a number is out of its range.

    References: Cortes and Vapnik (1995), "Support-vector networks"; Hsieh et al. (2008), "A dual coordinate descent method for
    large-scale linear SVM" (the problem without an intercept).
    """

    constraints: ClassVar[Mapping[str, Constraint]] = {"cost": Positive()}

    def __init__(
        self, design: Source | None = None, start: float = 1.0, validation_fraction: float = 0.33, split_seed: int = 0
    ) -> None:
        """Load and split."""
        x, y, _ = (design or RandomDesign()).load()
        number = round(validation_fraction * len(y))
        if not start > 0 or not 0 < validation_fraction < 1 or not 1 <= number < len(y):
            raise UsageError(
                "problem.start was expected to be above 0, and problem.validation_fraction to leave both parts examples, but "
                f"they are {start} and {validation_fraction}."
            )
        order = torch.randperm(len(y), generator=generator(split_seed))
        validation, train = order[:number], order[number:]
        self.start_cost = start
        self.x, self.x_validation = _rows(x, train), _rows(x, validation)
        self.y, self.y_validation = y.sign()[train], y.sign()[validation]

    def init_hparams(self) -> TensorDict:
        """The cost."""
        return {"cost": self.y.new_tensor(self.start_cost)}

    def init_params(self, hparams: Tensors) -> TensorDict:
        """No support vectors."""
        return {"alpha": torch.zeros_like(self.y)}

    def weight(self, params: Tensors) -> Tensor:
        """Of the features, `(p, 1)`."""
        return self.x.mT @ (params["alpha"] * self.y).unsqueeze(-1)

    def inner_loss(self, params: Tensors, hparams: Tensors, batch: None) -> Tensor:
        """The dual objective."""
        return self.weight(params).square().sum() / 2 - params["alpha"].sum()

    def outer_loss(self, params: Tensors, hparams: Tensors, batch: None) -> Tensor:
        """Mean logistic loss of the validation margins."""
        return softplus(-self.y_validation * (self.x_validation @ self.weight(params)).squeeze(-1)).mean()

    def metrics(self, params: Tensors, hparams: Tensors) -> dict[str, float]:
        """Validation accuracy, and how many examples are support vectors, and at the upper bound."""
        with torch.no_grad():
            scores, alpha = (self.x_validation @ self.weight(params)).squeeze(-1), params["alpha"]
            return {
                "validation_accuracy": float((scores.sign() == self.y_validation).double().mean()),
                "num_support": float((alpha > 0).sum()),
                "num_at_bound": float((alpha >= hparams["cost"]).sum()),
            }


def _rows(x: Tensor | SparseMatrix, rows: Tensor) -> Tensor | SparseMatrix:
    return x.mT.select(rows).mT if isinstance(x, SparseMatrix) else x[rows]
