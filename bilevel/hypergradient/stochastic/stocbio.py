"""StocBiO: a Neumann series with a minibatch for each factor."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from bilevel.batches import StepBatches
from bilevel.hypergradient.method import MethodState
from bilevel.hypergradient.stochastic.sampled import Product, SampledAdjoint


@dataclass(frozen=True)
class StocBiO(SampledAdjoint):
    r"""`v = b Σ_{q=0..Q} Π_{k=1..q} (I - b H_k) ∇_x L` with `Q = num_products`, each `H_k` of a minibatch of its own.

    Its mean is the truncated Neumann series of the full Hessian, `Q + 1` terms. Inner steps are warm-started; learning rates
    are constant.

    Args:
        linear_learning_rate: `b`, below `2 / λ_max` of the minibatches' Hessians.
        num_products: `Q`.
        exponent: by which learning rates fall; 0 in the paper.

    Reference: Ji, Yang and Liang (2021), "Bilevel optimization: convergence analysis and enhanced design".
    """

    def adjoint(
        self, product: Product, vector: Tensor, batches: StepBatches, state: MethodState, rate: float
    ) -> tuple[Tensor, MethodState]:
        """The terms, one after the other."""
        term, total = vector, vector
        for number in range(self.num_products):
            term = term - rate * product(number, term)
            total = total + term
        return rate * total, {}
