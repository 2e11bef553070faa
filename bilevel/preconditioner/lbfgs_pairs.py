"""The preconditioner made of the inner solver's own curvature pairs."""

from __future__ import annotations

from dataclasses import dataclass

from bilevel.errors import UsageError
from bilevel.linalg import InverseBFGS, LinearOperator
from bilevel.linearisation import Linearisation
from bilevel.preconditioner.base import Preconditioner, Prepared, State
from bilevel.solvers import InnerSolution

PREFIX = "base."


@dataclass(frozen=True)
class LBFGSPairs(Preconditioner):
    """The L-BFGS approximation of the inverse Hessian, from the pairs that the inner solver ends with; no product.

    The pairs are differences of gradients along the solver's latest steps, which go where its own progress was slowest: along
    small curvature, the end of the spectrum that sketches and Kronecker factors do not see. The usual history of ten is too
    few for that; a `history` of some hundreds in the inner solver costs memory, not products. With a `base` they correct
    another preconditioner instead of a multiple of the identity. A warm-started inner solve of few steps leaves few pairs.

    Args:
        base: what the pairs correct; None for a multiple of the identity.

    Reference: Morales and Nocedal (2000), "Automatic preconditioning by limited memory quasi-Newton updating"; Ramzi et al.
        (2022), "SHINE: SHaring the INverse Estimate from the forward pass for bi-level optimization and implicit models".
    """

    base: Preconditioner | None = None

    def build(self, at: Linearisation, inner: InnerSolution | None) -> Prepared:
        """Take the pairs over, and build the base.

        Raises:
            UsageError: the inner solver keeps no pairs.
        """
        if inner is None or not {"s", "y"} <= set(inner.state):
            came = "there was no inner solve" if inner is None else "the inner solver's state holds none"
            raise UsageError(
                f"LBFGSPairs needs the curvature pairs of an inner solve by LBFGS, but {came}: use solver=lbfgs, or "
                "preconditioner=nystrom."
            )
        state = {"steps": inner.state["s"].detach(), "changes": inner.state["y"].detach()}
        if self.base is None:
            return Prepared(InverseBFGS(at.operator, state["steps"], state["changes"]), state)
        below = self.base.build(at, inner)
        operator = InverseBFGS(at.operator, state["steps"], state["changes"], below.operator)
        return Prepared(operator, state | {PREFIX + name: value for name, value in below.state.items()}, below.num_mv)

    def restore(self, at: Linearisation, state: State) -> LinearOperator:
        """The same pairs, on the restored base."""
        initial = None
        if self.base is not None:
            below = {name.removeprefix(PREFIX): value for name, value in state.items() if name.startswith(PREFIX)}
            initial = self.base.restore(at, below)
        return InverseBFGS(at.operator, state["steps"], state["changes"], initial)
