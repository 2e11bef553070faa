"""TTSA: two time scales, and one term of the Neumann series drawn at random."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.batches import StepBatches
from bilevel.hypergradient.method import MethodState
from bilevel.hypergradient.stochastic.sampled import Product, SampledAdjoint
from bilevel.hypergradient.stochastic.steps import check_single
from bilevel.rng import generator
from bilevel.solvers import InnerSolver


@dataclass(frozen=True)
class TTSA(SampledAdjoint):
    r"""`v = b (Q + 1) Π_{k=1..q} (I - b H_k) ∇_x L` with `q` drawn from `0, ..., Q`, `Q = num_products`; one inner step.

    The mean is that of StocBiO's series at half of the products, and the variance larger. Params move on the faster time scale,
    by learning rates that fall with the power 2/5; let those of the outer optimiser fall with 3/5 (`outer_scheduler=power
    outer_scheduler.exponent=0.6`).

    Args:
        linear_learning_rate: `b`.
        num_products: `Q`.
        exponent: by which learning rates fall; 2/5 in the paper.
        seed: of the draws.

    Reference: Hong, Wai, Wang and Yang (2023), "A two-timescale stochastic algorithm framework for bilevel optimization:
    complexity analysis and application to actor-critic".
    """

    exponent: float = 0.4
    seed: int = 0

    def check(self, solver: InnerSolver) -> None:
        """One inner step."""
        super().check(solver)
        check_single(type(self).__name__, solver)

    def adjoint(
        self, product: Product, vector: Tensor, batches: StepBatches, state: MethodState, rate: float
    ) -> tuple[Tensor, MethodState]:
        """The term."""
        source = generator(self.seed, batches.step)
        drawn = int(torch.randint(self.num_products + 1, (), generator=source))
        term = vector
        for number in range(drawn):
            term = term - rate * product(number, term)
        return rate * (self.num_products + 1) * term, {}
