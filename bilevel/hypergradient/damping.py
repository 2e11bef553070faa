"""What is added to the diagonal of the inner Hessian: nothing, or what the linear tolerance leaves room for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bilevel.result import Solution

State = dict[str, Tensor]


class Damping(ABC):
    """Chooses `c` in `(∂F/∂x + c I)^{-1}` for each outer step; its state is kept by the outer loop.

    Where the Hessian of some system shows negative curvature, the step is made without.

    Attributes:
        biased: whether the number stays another one than the theorem's as the tolerance of the linear solve goes to zero.
    """

    biased: ClassVar[bool] = True

    @abstractmethod
    def value(self, state: State, rtol: float | None) -> Tensor | None:
        """`c` of each system in this step, `(*batch,)`, at least 0, in units of the inner Hessian; None for no damping.

        Args:
            state: what `learnt` returned at the step before, among other things; empty at the first.
            rtol: relative tolerance that the accuracy sets for this step's linear solve; None where it sets none.
        """

    def revised(self, damping: Tensor, rtol: float | None, rhs: Tensor, adjoint: Tensor) -> Tensor | None:
        """Another `c` to solve with, seeing what this one has led to; None where it may stay."""
        return None

    def learnt(self, rhs: Tensor, solution: Solution) -> State:
        """What the next step's choice goes by, from this step's right-hand side and solution."""
        return {}


@dataclass(frozen=True)
class NoDamping(Damping):
    """The theorem as it stands."""

    biased: ClassVar[bool] = False

    def value(self, state: State, rtol: float | None) -> Tensor | None:
        """None."""
        return None


@dataclass(frozen=True)
class AdaptiveDamping(Damping):
    r"""As much as leaves a residual of the size of the linear solve's tolerance; none where the solvers' own tolerances hold.

    A solve to a tolerance is wrong somewhere, and where is left to chance. Damping decides it: `(H + c I)^{-1} b` is the
    shortest of the adjoints `y` with the same error `(y - y*)' H (y - y*)` (Lavrentiev's regularisation), and `c` is the one
    at which the residual that it leaves, `b - H y = c y`, is as long as the solver's may be: `c ‖y‖ = rtol ‖b‖`
    (the discrepancy principle). The two together are at most twice the tolerance, or a little more while `c` is found. What is
    left out is what small curvature blows up: there the inner solution moves far for little, a step of finite length takes
    it out of the range in which the theorem holds, and the exact hypergradient spends the step on it
    (`python -m benchmarks.damping`).

    The first step is not damped. Later ones take `‖b‖ / ‖y‖` from the step before, and solve again with less, from where they
    are, where `c ‖y‖` comes out above twice `rtol ‖b‖`. What damping leaves counts in the receipt's residual and error
    estimate like any other residual; where `accuracy` follows the estimate, it vanishes with the error that it allows.
    Not damped are a direct linear solver, which leaves no residual, an unsymmetric system, and the step after a failed solve.

    References: Lavrentiev (1967), "Some improperly posed problems of mathematical physics"; Morozov (1966), "On the solution
    of functional equations by the method of regularization".
    """

    biased: ClassVar[bool] = False

    def value(self, state: State, rtol: float | None) -> Tensor | None:
        """`rtol ‖b‖ / ‖y‖`."""
        if rtol is None or SIZE not in state or not bool(state[SIZE].any()):
            return None
        return rtol * state[SIZE]

    def revised(self, damping: Tensor, rtol: float | None, rhs: Tensor, adjoint: Tensor) -> Tensor | None:
        """The same with the adjoint that was found, for the systems where that was too much."""
        left = damping * adjoint.norm(dim=-1)
        room = (rtol or 0.0) * rhs.norm(dim=-1)
        over = left > SLACK * room
        return torch.where(over, damping * room / left, damping) if bool(over.any()) else None

    def learnt(self, rhs: Tensor, solution: Solution) -> State:
        """The ratio of the norms, `(*batch,)`; 0 where one of them is."""
        if not solution.successful:
            return {}
        size = rhs.norm(dim=-1) / solution.value.norm(dim=-1)
        return {SIZE: torch.where(size.isfinite(), size, 0.0).detach()}


SIZE = "damping.size"
SLACK = 2.0  # of the room, that damping may take before it is solved with less
