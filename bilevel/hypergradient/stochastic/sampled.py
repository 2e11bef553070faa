"""Inner steps, an adjoint from Hessian-vector products of minibatches, then the hypergradient: what three methods share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bilevel.batches import StepBatches
from bilevel.errors import UsageError
from bilevel.flat import FlatProblem
from bilevel.hypergradient.method import (
    Hypergradient,
    MethodState,
    describe,
    solve_without_graph,
)
from bilevel.hypergradient.outer import outer_gradients
from bilevel.hypergradient.stochastic.steps import TRACKED, MinibatchSteps, fall
from bilevel.linearisation import linearise
from bilevel.receipt import Receipt
from bilevel.solvers import GradientDescent, InnerSolver

Product = Callable[[int, Tensor], Tensor]  # (number, v) -> H v on the minibatch of that number


@dataclass(frozen=True)
class SampledAdjoint(MinibatchSteps):
    """`max_steps` of the inner solver from where it was, then an adjoint by products, each with a minibatch of its own.

    Args:
        linear_learning_rate: of the adjoint's steps.
        num_products: Hessian-vector products.
        exponent: by which learning rates fall, `(step + 1)^-exponent`.
    """

    linear_learning_rate: float = 0.1
    num_products: int = 10
    exponent: float = 0.0

    def __post_init__(self) -> None:
        """Validate the numbers."""
        self.check_numbers(positive=("linear_learning_rate",), not_negative=("exponent",))
        if not isinstance(self.num_products, int) or self.num_products < 1:
            raise UsageError(
                f"{type(self).__name__} needs num_products to be an integer of at least 1, but got {self.num_products}."
            )

    def compute(
        self,
        problem: FlatProblem,
        solver: InnerSolver,
        params: Tensor,
        hparams: Mapping[str, Tensor],
        batches: StepBatches,
        state: MethodState,
    ) -> Hypergradient:
        """Step, then the adjoint and the hypergradient at the new params."""
        assert isinstance(solver, GradientDescent)  # `check` has refused others
        slow = fall(batches.step, self.exponent)
        stepping = replace(solver, learning_rate=self.rate(solver) * slow)
        inner = solve_without_graph(problem, stepping, params, hparams, batches, self.warm_start)
        x = inner.params.detach()
        outer, by_params, direct = outer_gradients(problem, x, hparams, batches)
        spent = 0

        def product(number: int, vector: Tensor) -> Tensor:
            nonlocal spent
            spent += 1
            at = linearise(problem, solver, x, hparams, batches.inner(-2 - number))
            return at.operator.mv(vector).detach()

        with torch.no_grad():
            adjoint, kept = self.adjoint(product, by_params, batches, state, slow * self.linear_learning_rate)
        at = linearise(problem, solver, x, hparams, batches.curvature)
        mixed = at.mixed(adjoint)
        facts = describe(inner)
        # Each product builds the gradient's graph of its minibatch; the mixed product does, too.
        facts["inner_gradients"] += spent + 1
        receipt = Receipt(**facts, num_mv=spent, biased=(TRACKED,))
        gradient = {name: direct[name] - mixed[name] for name in direct}
        return Hypergradient(gradient, x, kept, receipt, outer, at.inner_loss)

    @abstractmethod
    def adjoint(
        self, product: Product, vector: Tensor, batches: StepBatches, state: MethodState, rate: float
    ) -> tuple[Tensor, MethodState]:
        """An estimate of `H^-1 vector`, and the state for the next outer step.

        Args:
            product: Hessian-vector products, each number's on another minibatch.
            vector: the outer gradient by params.
            batches: of this outer step.
            state: from the step before.
            rate: the adjoint's learning rate in this step.
        """
