"""What to do where the inner Hessian shows negative curvature: the solution is then no minimum, or not reached yet."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from bilevel.errors import NumericalError, UsageError
from bilevel.linalg import MINRES, LinearOperator, LinearSolver, Tag, damped
from bilevel.linalg.recycling import Subspace, WatchedOperator
from bilevel.linalg.system import rounding_level
from bilevel.result import Result, Solution

MEMORY = 100  # products of a solver that does not look at curvatures, two vectors each
UNSOLVED = (
    Result.negative_curvature,
    Result.diverged,
    Result.breakdown,
)  # what an indefinite operator leads solvers to


class Handled(NamedTuple):
    """What a policy makes of a linear solve.

    Attributes:
        solution: the one to use, with all products counted.
        biased: why it is not that of the system that was asked for; empty when it is.
        damping: that of the system which was solved, `(*batch,)`; None for none.
    """

    solution: Solution
    biased: tuple[str, ...] = ()
    damping: Tensor | None = None


class System(NamedTuple):
    """A linear system and how it is solved.

    Attributes:
        operator: the inner Hessian, or what stands in its place.
        vector: the right-hand side, `(*batch, n)`.
        solver: what it is solved with.
        gauss_newton: makes the operator's counterpart with the Gauss-Newton matrix instead of the Hessian.
        rtol: tolerance of this step; None for the solver's own.
        preconditioner: the preconditioner in use.
        damping: `c` of each system, `(*batch,)`, added to the diagonal of whatever operator is solved with; None for none.
    """

    operator: LinearOperator
    vector: Tensor
    solver: LinearSolver
    gauss_newton: Callable[[], LinearOperator]
    rtol: float | None = None
    preconditioner: LinearOperator | None = None
    damping: Tensor | None = None

    def solve(self, operator: LinearOperator, x0: Tensor | None = None) -> Solution:
        """Solve with an operator, this system's or another; the solution says what curvature its products have shown.

        Curvature and residual are those without the damping; the residual, with what damping leaves, at most. The directions
        of a solver that sees the curvature of the damped operator need not show that of the other: their span does.
        """
        damping = self.damping
        watch = Tag.symmetric in operator.tags and not (self.solver.sees_curvature and damping is None)
        if watch and not isinstance(operator, WatchedOperator):
            operator = WatchedOperator(operator, MEMORY)
        used = operator if damping is None else damped(operator, damping)
        ready = self.solver.transpose(self.solver.init(used))  # the theorem's system is with the transpose
        solution = self.solver.compute(ready, self.vector, x0=x0, rtol=self.rtol, preconditioner=self.preconditioner)
        if damping is not None:
            solution = undamped(solution, damping)
        return _observed(solution, operator) if watch and isinstance(operator, WatchedOperator) else solution


def undamped(solution: Solution, damping: Tensor) -> Solution:
    """A damped system's solution with curvature and residual of the system itself: what damping leaves is `c ‖y‖` at most."""
    left = solution.residual_norm + damping * solution.value.norm(dim=-1)
    least, most = solution.curvature_min - damping, solution.curvature_max - damping
    return replace(solution, residual_norm=left, curvature_min=least, curvature_max=most)


def _observed(solution: Solution, watched: WatchedOperator) -> Solution:
    """A solution with the extreme Ritz values of the space of the products, which the solver has not seen."""
    vectors, products = watched.remembered()
    if not vectors.shape[-2] or not bool(products.isfinite().all()):
        return solution
    space = Subspace(vectors, products)
    used = (space.vectors != 0).any(-1)
    low = torch.where(used, space.curvature, torch.inf).amin(-1)
    high = torch.where(used, space.curvature, -torch.inf).amax(-1)
    return replace(solution, curvature_min=low, curvature_max=high)


class NegativeCurvature(ABC):
    """A policy for systems whose linear solver met `p'Hp <= 0`; one that makes no product (`IdentitySolver`) meets none."""

    @abstractmethod
    def handle(self, system: System, solution: Solution, negative: Tensor) -> Handled:
        """Make the best of it.

        Args:
            system: the linear system.
            solution: how the solver ended.
            negative: which systems of the batch are meant, `(*batch,)`.

        Raises:
            NumericalError: the policy is to stop.
        """


def met(solution: Solution) -> Tensor:
    """Which systems showed negative curvature, well beyond rounding, `(*batch,)`."""
    level = rounding_level(solution.value.shape[-1], solution.value.dtype)
    below = solution.curvature_min < -level * solution.curvature_max.abs()  # False for NaN
    return below | (solution.result == Result.negative_curvature.code)


@dataclass(frozen=True)
class Raise(NegativeCurvature):
    """Stop: the theorem is then applied at a point that is no minimum."""

    def handle(self, system: System, solution: Solution, negative: Tensor) -> Handled:
        """Raise `NumericalError`."""
        smallest = float(torch.where(negative, solution.curvature_min, torch.inf).min())
        seen = f" (a Rayleigh quotient of {smallest:.3g} was seen)" if smallest < 0 else ""
        raise NumericalError(
            f"the inner Hessian was expected to be positive definite at the solution, but has negative curvature{seen}: solve "
            "the inner problem further, add a penalty, or choose negative_curvature=minres, damp or gauss_newton."
        )


@dataclass(frozen=True)
class SwitchToMINRES(NegativeCurvature):
    """Solve the indefinite system by the minimal residual method: the theorem asks for an invertible Hessian only.

    The number is the derivative of a stationary point, a saddle perhaps; what another solver has found is kept.

    Args:
        max_steps: largest number of further steps.
    """

    max_steps: int = 1000

    def handle(self, system: System, solution: Solution, negative: Tensor) -> Handled:
        """Go on from where the solver stopped, in the systems that it has not solved."""
        failed = negative & torch.stack([solution.result == one.code for one in UNSOLVED]).any(0)
        if not bool(failed.any()):
            return Handled(solution)
        rtol = system.rtol if system.rtol is not None else getattr(system.solver, "rtol", None)
        solver = MINRES(rtol=1e-6 if rtol is None else rtol, max_steps=self.max_steps)
        vector = torch.where(failed.unsqueeze(-1), system.vector, 0.0)
        met_it = solution.result == Result.negative_curvature.code  # any other failure leaves nothing to go on from
        start = torch.where((failed & met_it).unsqueeze(-1), solution.value, 0.0)
        again = solver.compute(solver.init(system.operator), vector, x0=start, preconditioner=system.preconditioner)
        return Handled(solution.continued_by(again, failed))


@dataclass(frozen=True)
class Damp(NegativeCurvature):
    r"""Solve `(H + c I) y = b` with `c` just large enough that no negative curvature shows; biased towards zero.

    `c` starts at `factor` times the most negative curvature seen and is multiplied by `factor` until the solver succeeds.

    Args:
        factor: growth of the damping, above 1.
        max_rounds: largest number of attempts.
    """

    factor: float = 2.0
    max_rounds: int = 20

    def __post_init__(self) -> None:
        """Validate the numbers."""
        if not self.factor > 1 or self.max_rounds < 1:
            raise UsageError(f"Damp needs factor > 1 and max_rounds >= 1, but got {self.factor} and {self.max_rounds}.")

    def handle(self, system: System, solution: Solution, negative: Tensor) -> Handled:
        """Damp the systems concerned until they are solved without negative curvature."""
        size = torch.maximum(-solution.curvature_min, 1e-6 * solution.curvature_max.abs()).nan_to_num(nan=1.0)
        damping = torch.where(negative, self.factor * size, 0.0)
        for _ in range(self.max_rounds):
            again = system.solve(damped(system.operator, damping))
            solution = solution.continued_by(undamped(again, damping), negative)
            still = negative & met(again)
            if not bool(still.any()):
                break
            damping = torch.where(still, self.factor * damping, damping)
        else:
            solution = replace(solution, result=torch.where(still, Result.negative_curvature.code, solution.result))
        reason = f"negative curvature: the Hessian is damped by {float(damping.max()):.3g}"
        return Handled(solution, (reason,), damping)


@dataclass(frozen=True)
class GaussNewton(NegativeCurvature):
    r"""Solve with the generalised Gauss-Newton matrix `J^T H_l J + ∇²penalty` in the place of the Hessian; biased.

    Needs a problem that defines `outputs` and `output_loss`; positive semi-definite where `output_loss` is convex in the
    outputs.

    Reference: Schraudolph (2002), "Fast curvature matrix-vector products for second-order gradient descent".
    """

    def handle(self, system: System, solution: Solution, negative: Tensor) -> Handled:
        """Solve the systems concerned anew."""
        again = system.solve(system.gauss_newton())
        return Handled(
            solution.continued_by(again, negative),
            ("negative curvature: the Gauss-Newton matrix stands for the Hessian",),
        )


@dataclass(frozen=True)
class Truncate(NegativeCurvature):
    """Keep what the solver had found before it met negative curvature, zero if that was at once; biased.

    For many systems of which few are concerned and none is worth more products, as the tasks of a meta-batch are.

    Reference: Steihaug (1983), "The conjugate gradient method and trust regions in large scale optimization".
    """

    def handle(self, system: System, solution: Solution, negative: Tensor) -> Handled:
        """Call the solve done."""
        failed = negative & (solution.result == Result.negative_curvature.code)
        if not bool(failed.any()):
            return Handled(solution)
        of = f" in {int(failed.sum())} of {failed.numel()} tasks" if failed.ndim else ""
        reason = f"negative curvature{of}: the linear solve ends before it"
        done = torch.where(failed, Result.budget_spent.code, solution.result)
        return Handled(replace(solution, result=done), (reason,))
