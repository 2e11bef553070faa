"""What is added to the diagonal of the inner Hessian: nothing, or what the linear tolerance leaves room for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

State = dict[str, Tensor]


class Damping(ABC):
    """Chooses `c` in `(∂F/∂x + c I)^{-1}` for each outer step; its state is kept by the outer loop.

    Attributes:
        biased: whether the number stays another one than the theorem's as the tolerance of the linear solve goes to zero.
    """

    biased: ClassVar[bool] = True

    @abstractmethod
    def value(self, state: State, rtol: float | None) -> float:
        """`c` of this step, at least 0, in units of the inner Hessian.

        Args:
            state: what `learnt` returned at the step before, among other things; empty at the first.
            rtol: relative tolerance that the accuracy sets for this step's linear solve; None where it sets none.
        """

    def learnt(self, rhs: Tensor, adjoint: Tensor) -> State:
        """What the next step's choice goes by, from this step's right-hand side and solution."""
        return {}


@dataclass(frozen=True)
class NoDamping(Damping):
    """The theorem as it stands."""

    biased: ClassVar[bool] = False

    def value(self, state: State, rtol: float | None) -> float:
        """0."""
        return 0.0


@dataclass(frozen=True)
class AdaptiveDamping(Damping):
    r"""As much as leaves a residual of the size of the linear solve's tolerance; none where the solvers' own tolerances hold.

    A solve to a tolerance is wrong somewhere, and where is left to chance. Damping decides it: of the adjoints `y` whose
    residual `‖b - H y‖` is `rtol ‖b‖`, the solution of `(H + c I) y = b` with `c ‖y‖ = rtol ‖b‖` is the shortest one
    (Morozov's discrepancy principle). It leaves out what small curvature blows up: there the solution of the inner problem
    moves far for little, a step of finite length takes it out of the range in which the theorem holds, and the exact
    hypergradient spends the step on it. The damped system is better conditioned besides, and takes fewer products.

    `‖b‖ / ‖y‖` is that of the step before, so the first step is not damped. What damping leaves counts in the receipt's
    residual and error estimate like any other residual; where `accuracy` follows the estimate, it vanishes with the error
    that it allows. Not damped are a direct linear solver, which leaves no residual, and an unsymmetric system.

    Reference: Morozov (1966), "On the solution of functional equations by the method of regularization".
    """

    biased: ClassVar[bool] = False

    def value(self, state: State, rtol: float | None) -> float:
        """`rtol ‖b‖ / ‖y‖`."""
        return rtol * float(state[SIZE]) if rtol is not None and SIZE in state else 0.0

    def learnt(self, rhs: Tensor, adjoint: Tensor) -> State:
        """The ratio of the norms over all systems."""
        size = rhs.norm() / adjoint.norm()
        return {SIZE: size.detach()} if bool(size.isfinite()) else {}


SIZE = "damping.size"
