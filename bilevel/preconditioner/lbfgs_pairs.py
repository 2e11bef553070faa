"""The preconditioner made of the inner solver's own curvature pairs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bilevel.errors import UsageError
from bilevel.linalg import InverseBFGS, LinearOperator
from bilevel.linalg.lbfgs import Pairs
from bilevel.linearisation import Linearisation
from bilevel.parts import check_parts
from bilevel.preconditioner.base import Preconditioner, Prepared, State
from bilevel.solvers import InnerSolution

PREFIX, STEPS, CHANGES = "base.", "steps", "changes"


@dataclass(frozen=True)
class LBFGSPairs(Preconditioner):
    """The L-BFGS approximation of the inverse Hessian, from the pairs that the inner solver ends with; no product.

    The pairs are differences of gradients along the solver's latest steps, which go where its own progress was slowest: along
    small curvature, the end of the spectrum that sketches and Kronecker factors do not see. The usual history of ten is too
    few for that; a `history` of some hundreds in the inner solver costs memory, not products. With a `base` they correct
    another preconditioner instead of a multiple of the identity. A warm-started inner solve of few steps leaves few pairs;
    those of the outer steps before stay beside them, up to the number of one history.

    Args:
        base: what the pairs correct; None for a multiple of the identity.

    Reference: Morales and Nocedal (2000), "Automatic preconditioning by limited memory quasi-Newton updating"; Ramzi et al.
        (2022), "SHINE: SHaring the INverse Estimate from the forward pass for bi-level optimization and implicit models".
    """

    base: Preconditioner | None = None

    def __post_init__(self) -> None:
        """Validate the base."""
        check_parts(self)

    def price(self, at: Linearisation) -> float:
        """That of the base."""
        return 0.0 if self.base is None else self.base.price(at)

    def build(self, at: Linearisation, inner: InnerSolution | None) -> Prepared:
        """Take the pairs over, and build the base.

        Raises:
            UsageError: the inner solver keeps no pairs.
        """
        if inner is None or not has_pairs(inner):
            came = "there was no inner solve" if inner is None else "the inner solver's state holds none"
            raise UsageError(
                f"LBFGSPairs needs the curvature pairs of an inner solve by LBFGS, but {came}: use solver=lbfgs, or "
                "preconditioner=nystrom."
            )
        below = None if self.base is None else self.base.build(at, inner)
        kept = {} if below is None else {PREFIX + name: value for name, value in below.state.items()}
        state = {**kept, STEPS: inner.state["s"].detach(), CHANGES: inner.state["y"].detach()}
        initial = None if below is None else below.operator
        return Prepared(_corrected(at, state, initial), state, 0 if below is None else below.num_mv)

    def refresh(self, state: State, inner: InnerSolution | None) -> State:
        """The pairs of this step's inner solve after those of earlier ones, of which as many of the latest are kept."""
        if inner is None or not has_pairs(inner):
            return state
        size = max(len(state[STEPS]), len(inner.state["s"]))
        pairs = {
            name: torch.cat([state[name], inner.state[key].detach()])[-size:] if size else state[name]
            for name, key in ((STEPS, "s"), (CHANGES, "y"))
        }
        return {**state, **pairs}

    def restore(self, at: Linearisation, state: State) -> LinearOperator:
        """The pairs on the restored base."""
        below = {name.removeprefix(PREFIX): value for name, value in state.items() if name.startswith(PREFIX)}
        return _corrected(at, state, None if self.base is None else self.base.restore(at, below))


def has_pairs(inner: InnerSolution) -> bool:
    """Whether an inner solver keeps curvature pairs, some or none yet."""
    return {"s", "y"} <= set(inner.state)


def _corrected(at: Linearisation, state: State, initial: LinearOperator | None) -> LinearOperator:
    return InverseBFGS(at.operator, Pairs.of(at.operator, state[STEPS], state[CHANGES]), initial)
