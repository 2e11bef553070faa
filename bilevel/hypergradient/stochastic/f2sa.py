"""F2SA: a penalty on the inner problem's optimality stands for its Hessian; first derivatives only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from bilevel.batches import StepBatches
from bilevel.flat import FlatProblem
from bilevel.hypergradient.method import Hypergradient, MethodState
from bilevel.hypergradient.outer import outer_gradients
from bilevel.hypergradient.stochastic.first_order import inner_gradients
from bilevel.hypergradient.stochastic.steps import TRACKED, MinibatchSteps, described, fall
from bilevel.receipt import Receipt
from bilevel.solvers import InnerSolver

PENALISED = "penalised"


@dataclass(frozen=True)
class F2SA(MinibatchSteps):
    r"""`∇_θ L(y) + λ (∇_θ f(y) - ∇_θ f(x))` with `x` on its way to `argmin f` and `y` to `argmin f + L / λ`.

    That is the gradient of `min_y max_x L(y) + λ (f(y) - f(x))`, which is the bilevel problem up to `O(1 / λ)`: as `λ` grows,
    `λ (y - x)` becomes `-[∇²_xx f]^-1 ∇_x L`, so that a difference of first derivatives is the product with the mixed second
    one. In each outer step `x` and `y` make `max_steps` steps of the inner solver's learning rate, which falls as
    `(step + 1)^-exponent`, and `λ = multiplier (step + 1)^growth`.

    Args:
        multiplier: `λ` in the first step. A larger one has less bias and more noise.
        growth: power at which it grows; 1/7 in the paper.
        exponent: by which the learning rate falls; 4/7 in the paper, and 5/7 for the outer one (`outer_scheduler=power`).

    Reference: Kwon, Kwon, Wright and Nowak (2023), "A fully first-order method for stochastic bilevel optimization".
    """

    multiplier: float = 10.0
    growth: float = 1 / 7
    exponent: float = 4 / 7

    def __post_init__(self) -> None:
        """Validate the numbers."""
        self.check_numbers(positive=("multiplier",), not_negative=("growth", "exponent"))

    def init(
        self, problem: FlatProblem, solver: InnerSolver, params: Tensor, hparams: Mapping[str, Tensor]
    ) -> MethodState:
        """Both begin at the same point."""
        return {PENALISED: params.detach()}

    def compute(
        self,
        problem: FlatProblem,
        solver: InnerSolver,
        params: Tensor,
        hparams: Mapping[str, Tensor],
        batches: StepBatches,
        state: MethodState,
    ) -> Hypergradient:
        """Move both, and compare what the hyperparameters could do at either."""
        rate = fall(batches.step, self.exponent) * self.rate(solver)
        multiplier = self.multiplier / fall(batches.step, self.growth)
        number = params.shape[:-1].numel()
        x, y = params.detach(), state[PENALISED]
        for step in range(solver.max_steps):
            x = x - rate * inner_gradients(problem, solver, x, hparams, batches.inner(2 * step)).params
            _, pull, _ = outer_gradients(problem, y, hparams, batches)
            push = inner_gradients(problem, solver, y, hparams, batches.inner(2 * step + 1)).params
            y = y - rate * (push + pull * number / multiplier)
        outer, _, direct = outer_gradients(problem, y, hparams, batches)
        at_x, at_y = (inner_gradients(problem, solver, point, hparams, batches.curvature) for point in (x, y))
        gradient = {name: direct[name] + multiplier * (at_y.hparams[name] - at_x.hparams[name]) for name in direct}
        biased = (TRACKED, "a penalty stands for the inner problem")
        facts = described(at_x.params, 2 * solver.max_steps + 2, inner_steps=solver.max_steps, biased=biased)
        return Hypergradient(gradient, x, {PENALISED: y}, Receipt(**facts), outer, at_x.loss)
