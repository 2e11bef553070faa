"""When a preconditioner of an earlier outer step still serves, and when it is built anew.

It is the question of whether to rent or to buy, and the answer is the one that never pays more than twice what the best
decision in hindsight would have: rent until the rent paid comes to the price.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from bilevel.linearisation import Linearisation
from bilevel.preconditioner.base import Preconditioner, Prepared, State
from bilevel.solvers import InnerSolution

# Products: of building it, of the first solve with it, and of the solves since beyond what the first one took. Before
# there is one, `first` is 0.
COUNTS = ("setup", "first", "excess")


def prepare(preconditioner: Preconditioner, at: Linearisation, inner: InnerSolution | None, state: State) -> Prepared:
    """The preconditioner of an earlier step, or a new one where that no longer serves; what is free as long as none pays.

    It no longer serves once the solves since the first with it have together taken so many more products than that one
    each as building it took.

    Args:
        preconditioner: how it is built.
        at: the inner problem at its solution.
        inner: the inner solve that led there.
        state: what `note` returned after the latest solve; empty before the first.

    Reference: Karlin, Manasse, Rudolph and Sleator (1988), "Competitive snoopy caching", for the rule and its factor of two.
    """
    counts = {name: int(state[name]) for name in COUNTS if name in state}
    tensors = {name: value for name, value in state.items() if name not in COUNTS}
    excess = counts.get("excess", 0)
    if not tensors and not preconditioner.pays(at, excess):
        return Prepared(
            preconditioner.meanwhile(at), {"setup": _count(0), "first": _count(0), "excess": _count(excess)}
        )
    if tensors and (excess < counts["setup"] or excess == 0):
        tensors = preconditioner.refresh(tensors, inner)
        return Prepared(preconditioner.restore(at, tensors), {**state, **tensors})
    built = preconditioner.build(at, inner)
    return replace(built, state={**built.state, "setup": _count(built.num_mv)})


def note(state: State, num_mv: int) -> State:
    """The state after a solve that took so many products."""
    first = int(state.get("first", num_mv))
    excess = int(state.get("excess", 0)) + max(num_mv - first, 0)
    return {**state, "first": _count(first), "excess": _count(excess)}


def _count(number: int) -> torch.Tensor:
    return torch.tensor(number, dtype=torch.int64)
