"""When a preconditioner of an earlier outer step still serves, and when it is built anew."""

from __future__ import annotations

from dataclasses import replace

import torch

from bilevel.linearisation import Linearisation
from bilevel.preconditioner.base import Preconditioner, Prepared, State
from bilevel.solvers import InnerSolution

COUNTS = (
    "age",
    "setup",
    "first",
    "latest",
)  # outer steps since it was built; products: of building, the first solve, the latest


def prepare(
    preconditioner: Preconditioner, at: Linearisation, inner: InnerSolution | None, state: State, refresh_every: int
) -> Prepared:
    """The preconditioner of an earlier step, or a new one where that is too old; none as long as none pays.

    It is too old after `refresh_every` steps, or once the latest solve took more products than the first one and the
    building together: a new one would have been cheaper.

    Args:
        preconditioner: how it is built.
        at: the inner problem at its solution.
        inner: the inner solve that led there.
        state: what `note` returned after the latest solve; empty before the first.
        refresh_every: the largest age, in outer steps.
    """
    counts = {name: int(state[name]) for name in COUNTS if name in state}
    tensors = {name: value for name, value in state.items() if name not in COUNTS}
    if not tensors and not preconditioner.pays(at, counts.get("latest", 0)):
        return Prepared(None, {"age": _count(0), "setup": _count(0)})
    if tensors and counts["age"] < refresh_every and counts["latest"] <= counts["first"] + counts["setup"]:
        return Prepared(preconditioner.restore(at, tensors), state)
    built = preconditioner.build(at, inner)
    return replace(built, state={**built.state, "age": _count(0), "setup": _count(built.num_mv)})


def note(state: State, num_mv: int) -> State:
    """The state after a solve that took so many products."""
    return {**state, "age": state["age"] + 1, "first": state.get("first", _count(num_mv)), "latest": _count(num_mv)}


def _count(number: int) -> torch.Tensor:
    return torch.tensor(number, dtype=torch.int64)
