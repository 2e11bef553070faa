"""PBGD-Free: the penalised inner problem followed by single steps, and nothing but the direct derivative."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from bilevel.batches import StepBatches
from bilevel.flat import FlatProblem
from bilevel.hypergradient.method import Hypergradient, MethodState
from bilevel.hypergradient.outer import outer_gradients
from bilevel.hypergradient.stochastic.first_order import inner_gradients
from bilevel.hypergradient.stochastic.steps import TRACKED, MinibatchSteps, described
from bilevel.receipt import Receipt
from bilevel.solvers import InnerSolver


@dataclass(frozen=True)
class PBGDFree(MinibatchSteps):
    r"""`∇_θ L(y)` with `y` on its way to `argmin f + L / λ`, by `max_steps` of the inner solver's learning rate.

    F2SA without its second term, `λ (∇_θ f(y) - ∇_θ f(x))`, which is small where the outer loss hardly depends on params: that
    is the method's condition (flatness). A hyperparameter that only shapes the inner problem, as weights of examples or
    penalties do, gets nothing from it and is refused.

    Args:
        multiplier: `λ`.

    References: Jiang, Xiao, Chen and Chen (2025), "Beyond value functions: single-loop bilevel optimization under flatness
    conditions"; the same (2025), "Efficient penalty-based bilevel methods: improved analysis, novel updates, and flatness
    condition".
    """

    paths: ClassVar[frozenset[str]] = frozenset({"direct"})

    multiplier: float = 10.0

    def __post_init__(self) -> None:
        """Validate the number."""
        self.check_numbers(positive=("multiplier",))

    def compute(
        self,
        problem: FlatProblem,
        solver: InnerSolver,
        params: Tensor,
        hparams: Mapping[str, Tensor],
        batches: StepBatches,
        state: MethodState,
    ) -> Hypergradient:
        """Move params, and differentiate the outer loss directly."""
        rate, number, y = self.rate(solver), params.shape[:-1].numel(), params.detach()
        for step in range(solver.max_steps):
            _, pull, _ = outer_gradients(problem, y, hparams, batches)
            push = inner_gradients(problem, solver, y, hparams, batches.inner(step))
            y = y - rate * (push.params + pull * number / self.multiplier)
        outer, _, direct = outer_gradients(problem, y, hparams, batches)
        biased = (TRACKED, "what the hyperparameters do to the inner solution is left out")
        facts = described(push.params, solver.max_steps, inner_steps=solver.max_steps, biased=biased)
        return Hypergradient(direct, y, {}, Receipt(**facts), outer, push.loss)
