"""BOME: down the outer loss, and down the inner loss's distance from its minimum as much as the former allows."""

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
class BOME(MinibatchSteps):
    r"""One step of params and hyperparameters together along `∇L + λ ∇q`, `q = f(x, θ) - f(x⁺, θ)`.

    `x⁺` is what `max_steps` of the inner solver make of `x`, and held fixed, so that `q` is the distance of the inner loss
    from its minimum. `λ = max(0, strength - ⟨∇L, ∇q⟩ / ‖∇q‖²)` is the least for which `q` falls by `strength ‖∇q‖²`: the step
    is that of a descent of `L` under the constraint `q <= 0`. First derivatives only; the learning rate of `x` is that of the
    inner solver.

    Args:
        strength: `η` of the paper, 1/2 there.

    Reference: Liu, Ye, Wright, Stone and Liu (2022), "BOME! Bilevel optimization made easy: a simple first-order approach".
    """

    begins_at_zero: ClassVar[bool] = True  # where the distance falls fast enough along the outer loss alone

    strength: float = 0.5

    def __post_init__(self) -> None:
        """Validate the number."""
        self.check_numbers(positive=("strength",))

    def compute(
        self,
        problem: FlatProblem,
        solver: InnerSolver,
        params: Tensor,
        hparams: Mapping[str, Tensor],
        batches: StepBatches,
        state: MethodState,
    ) -> Hypergradient:
        """Find the distance's gradient, and move along both."""
        rate, number = self.rate(solver), params.shape[:-1].numel()
        x = lower = params.detach()
        for step in range(solver.max_steps):
            lower = lower - rate * inner_gradients(problem, solver, lower, hparams, batches.inner(step)).params
        outer, pull, direct = outer_gradients(problem, x, hparams, batches)
        here, there = (inner_gradients(problem, solver, point, hparams, batches.curvature) for point in (x, lower))
        by_params = here.params / number
        by_hparams = {name: here.hparams[name] - there.hparams[name] for name in direct}
        size = by_params.square().sum() + sum(part.square().sum() for part in by_hparams.values())
        along = (pull * by_params).sum() + sum((direct[name] * by_hparams[name]).sum() for name in direct)
        share = (self.strength - along / size).clamp(min=0.0).nan_to_num(0.0)
        moved = x - rate * number * (pull + share * by_params)
        gradient = {name: direct[name] + share * by_hparams[name] for name in direct}
        biased = (TRACKED, "the step of a constrained descent, which weighs both losses")
        facts = described(here.params, solver.max_steps + 2, inner_steps=solver.max_steps, biased=biased)
        return Hypergradient(gradient, moved, {}, Receipt(**facts), outer, here.loss)
