"""AmIGO: several warm-started steps for params, several for the adjoint, then one for the hyperparameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.batches import StepBatches
from bilevel.flat import FlatProblem
from bilevel.hypergradient.method import MethodState
from bilevel.hypergradient.stochastic.sampled import Product, SampledAdjoint
from bilevel.hypergradient.stochastic.soba import ADJOINT
from bilevel.solvers import InnerSolver


@dataclass(frozen=True)
class AmIGO(SampledAdjoint):
    r"""Warm-started SGD for params, then SGD for the adjoint: `v <- v - b (H_k v - ∇_x L)`, `k = 1, ..., num_products`.

    Both start where the outer step before has left them; constant learning rates, as in the paper.

    Args:
        linear_learning_rate: `b`.
        num_products: steps of the adjoint.
        exponent: by which learning rates fall; 0 in the paper.

    Reference: Arbel and Mairal (2022), "Amortized implicit differentiation for stochastic bilevel optimization".
    """

    def init(
        self, problem: FlatProblem, solver: InnerSolver, params: Tensor, hparams: Mapping[str, Tensor]
    ) -> MethodState:
        """An adjoint of zero."""
        return {ADJOINT: torch.zeros_like(params)}

    def adjoint(
        self, product: Product, vector: Tensor, batches: StepBatches, state: MethodState, rate: float
    ) -> tuple[Tensor, MethodState]:
        """Steps from the adjoint of the outer step before."""
        v = state[ADJOINT]
        for number in range(self.num_products):
            v = v - rate * (product(number, v) - vector)
        return v, {ADJOINT: v}
