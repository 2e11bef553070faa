"""SOBA and MA-SOBA: params, adjoint and hyperparameters move together, each a step along a minibatch's direction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from bilevel.batches import StepBatches
from bilevel.errors import UsageError
from bilevel.flat import FlatProblem
from bilevel.hypergradient.method import Hypergradient, MethodState
from bilevel.hypergradient.outer import outer_gradients
from bilevel.hypergradient.stochastic.steps import MinibatchSteps, check_single, described, fall
from bilevel.linearisation import linearise
from bilevel.receipt import Receipt
from bilevel.solvers import InnerSolver
from bilevel.tree import TensorDict

ADJOINT = "adjoint"


class Directions(NamedTuple):
    """Where the three variables would move, down these directions, and the losses of the minibatches.

    Attributes:
        params: `D_x`, `(n,)` or `(num_tasks, n)`.
        adjoint: `D_v`, likewise.
        hparams: `D_θ`, by names.
        outer_loss: mean over tasks.
        inner_loss: mean over tasks.
        evaluated: inner minibatches, each with a gradient and a product.
    """

    params: Tensor
    adjoint: Tensor
    hparams: TensorDict
    outer_loss: float
    inner_loss: float
    evaluated: int = 1


@dataclass(frozen=True)
class SOBA(MinibatchSteps):
    r"""One step of each variable at once, down unbiased estimates of the directions in which their equations are solved.

        D_x = ∇_x f,    D_v = ∇²_xx f v - ∇_x L,    D_θ = ∇_θ L - ∇²_θx f v

    on a minibatch of the inner and one of the outer loss. `D_θ` is the hypergradient where `x` is the inner solution and `v`
    solves `∇²_xx f v = ∇_x L`; they follow as the hyperparameters move. `x` moves by the inner solver's learning rate, `v` by
    `linear_learning_rate`, both times `(step + 1)^-exponent`; give the outer optimiser the same schedule
    (`outer_scheduler=power`). No inner problem and no linear system is ever solved.

    Args:
        linear_learning_rate: of `v`.
        exponent: by which both learning rates fall; the outer one falls by its scheduler. 1/2 in the paper.

    Reference: Dagréou, Ablin, Vaiter and Moreau (2022), "A framework for bilevel optimization that enables stochastic and
    global variance reduction algorithms".
    """

    begins_at_zero: ClassVar[bool] = True  # as the adjoint does

    linear_learning_rate: float = 0.1
    exponent: float = 0.5

    def __post_init__(self) -> None:
        """Validate the numbers."""
        self.check_numbers(positive=("linear_learning_rate",), not_negative=("exponent",))
        if not self.warm_start:
            raise UsageError(
                f"{type(self).__name__} makes one inner step from where the one before has ended: warm_start must be true."
            )

    def check(self, solver: InnerSolver) -> None:
        """Refuse an inner solver whose step is no step along the gradient."""
        super().check(solver)
        check_single(type(self).__name__, solver)

    def init(
        self, problem: FlatProblem, solver: InnerSolver, params: Tensor, hparams: Mapping[str, Tensor]
    ) -> MethodState:
        """An adjoint of zero."""
        return {ADJOINT: torch.zeros_like(params)}

    def compute(
        self,
        problem: FlatProblem,
        solver: InnerSolver,
        params: Tensor,
        hparams: Mapping[str, Tensor],
        batches: StepBatches,
        state: MethodState,
    ) -> Hypergradient:
        """Evaluate the directions at the present point, and move params and adjoint down theirs."""
        found, memory = self.directions(problem, solver, params, hparams, batches, state)
        slow, rate = fall(batches.step, self.exponent), self.rate(solver)
        adjoint = state[ADJOINT] - slow * self.linear_learning_rate * found.adjoint
        moved = params - slow * rate * found.params
        gradient, averages = self.outer_direction(found.hparams, batches, state)
        receipt = Receipt(**described(found.params, found.evaluated, num_mv=found.evaluated))
        kept = {ADJOINT: adjoint.detach(), **memory, **averages}
        return Hypergradient(gradient, moved.detach(), kept, receipt, found.outer_loss, found.inner_loss)

    def directions(
        self,
        problem: FlatProblem,
        solver: InnerSolver,
        params: Tensor,
        hparams: Mapping[str, Tensor],
        batches: StepBatches,
        state: MethodState,
    ) -> tuple[Directions, MethodState]:
        """Unbiased estimates of all three directions, and what of the state they change."""
        at = linearise(problem, solver, params, hparams, batches.curvature)
        outer, by_params, direct = outer_gradients(problem, params, hparams, batches)
        adjoint = state[ADJOINT]
        mixed = at.mixed(adjoint)
        return (
            Directions(
                at.optimality.detach(),
                at.operator.mv(adjoint).detach() - by_params,
                {name: direct[name] - mixed[name] for name in direct},
                outer,
                at.inner_loss,
            ),
            {},
        )

    def outer_direction(
        self, direction: TensorDict, batches: StepBatches, state: MethodState
    ) -> tuple[TensorDict, MethodState]:
        """What the hyperparameters move down, and what of the state that changes: `D_θ` itself."""
        return direction, {}


@dataclass(frozen=True)
class MASOBA(SOBA):
    r"""SOBA with a moving average of `D_θ`: `h <- (1 - a) h + a D_θ` with `a = averaging (step + 1)^-exponent`.

    The average has less variance, at the rate at which everything moves; the hyperparameters move down it.

    Args:
        averaging: `a` in the first step, from 0 to 1.

    Reference: Chen, Xiao and Balasubramanian (2023), "Optimal algorithms for stochastic bilevel optimization under relaxed
    smoothness conditions".
    """

    averaging: float = 1.0

    def __post_init__(self) -> None:
        """Validate the numbers."""
        super().__post_init__()
        if not 0 < self.averaging <= 1:
            raise UsageError(f"MASOBA needs averaging above 0 and at most 1, but got {self.averaging}.")

    def outer_direction(
        self, direction: TensorDict, batches: StepBatches, state: MethodState
    ) -> tuple[TensorDict, MethodState]:
        """The average."""
        share = self.averaging * fall(batches.step, self.exponent)
        average = {
            name: torch.lerp(state.get(f"average.{name}", torch.zeros_like(value)), value, share)
            for name, value in direction.items()
        }
        return average, {f"average.{name}": value for name, value in average.items()}
