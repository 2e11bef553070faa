"""SABA: SOBA with the variance taken out by a table of what each minibatch gave when it was last seen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from bilevel.batches import StepBatches
from bilevel.errors import UsageError
from bilevel.flat import FlatProblem
from bilevel.hypergradient.method import MethodState
from bilevel.hypergradient.outer import outer_gradients_on
from bilevel.hypergradient.stochastic.soba import ADJOINT, SOBA, Directions
from bilevel.linearisation import linearise
from bilevel.solvers import InnerSolver
from bilevel.tree import TensorDict


@runtime_checkable
class Numbered(Protocol):
    """Minibatches of which there are so many, that come again: what `bilevel.data.Partition` makes."""

    @property
    def count(self) -> int:
        """Number of the parts."""

    def number(self, step: int, inner_step: int) -> int:
        """Which part it is."""

    def part(self, number: int) -> Any:
        """A part by its number."""


@dataclass(frozen=True)
class SABA(SOBA):
    r"""SOBA with `D = new - old + mean of the table` for each sum over minibatches, as in SAGA.

    It is unbiased, and its variance vanishes as everything comes to rest.

    The table holds the gradients and products of every inner minibatch, and the gradients of every outer one, at the point
    where it was last seen; a first pass over all of them fills it. Memory: for each inner minibatch two vectors like params and
    one like the hyperparameters, for each outer one a vector of both. Batches have to come again (`bilevel.data.Partition`).

    Args:
        linear_learning_rate: of the adjoint.
        exponent: by which learning rates fall; 0 in the paper, since the variance vanishes.

    References: Dagréou et al. (2022), as SOBA; Defazio, Bach and Lacoste-Julien (2014), "SAGA: a fast incremental gradient
    method".
    """

    exponent: float = 0.0

    def init(
        self, problem: FlatProblem, solver: InnerSolver, params: Tensor, hparams: Mapping[str, Tensor]
    ) -> MethodState:
        """Refuse minibatches that do not come again."""
        for name in ("inner_batches", "outer_batches"):
            batches = getattr(problem.problem, name)
            if batches is not None and not isinstance(batches, Numbered):
                raise UsageError(
                    f"SABA remembers what each minibatch gave, but those of {name} are drawn anew: use "
                    "bilevel.data.Partition, or hypergradient=soba."
                )
        return super().init(problem, solver, params, hparams)

    def directions(
        self,
        problem: FlatProblem,
        solver: InnerSolver,
        params: Tensor,
        hparams: Mapping[str, Tensor],
        batches: StepBatches,
        state: MethodState,
    ) -> tuple[Directions, MethodState]:
        """The estimates of SOBA, each less what the same minibatch gave before, plus the mean of the table."""
        here = _Point(problem, solver, params, hparams, state[ADJOINT])
        inner, seen = here.corrected("inner", problem.problem.inner_batches, batches.step, -1, state)
        outer, also = here.corrected("outer", problem.problem.outer_batches, batches.step, 0, state)
        mixed = {name: inner[f"mixed.{name}"] for name in hparams}
        found = Directions(
            inner["gradient"],
            inner["product"] - outer["gradient"],
            {name: outer[f"direct.{name}"] - mixed[name] for name in hparams},
            here.losses["outer"],
            here.losses["inner"],
            here.evaluated,
        )
        return found, {**seen, **also}


class _Point:
    """What minibatches give at a point."""

    def __init__(
        self, problem: FlatProblem, solver: InnerSolver, params: Tensor, hparams: Mapping[str, Tensor], adjoint: Tensor
    ) -> None:
        self.problem, self.solver, self.params, self.hparams, self.adjoint = problem, solver, params, hparams, adjoint
        self.losses: dict[str, float] = {}
        self.evaluated = 0  # inner minibatches

    def corrected(
        self, which: str, source: Any, step: int, inner_step: int, state: MethodState
    ) -> tuple[TensorDict, MethodState]:
        """Estimates from one minibatch and the table, and the table with it; exact ones where there is one batch only."""
        evaluate = {"inner": self._inner, "outer": self._outer}[which]
        if source is None:
            return evaluate(None), {}
        prefix = f"table.{which}."
        table = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        if not table:
            rows = [evaluate(self._placed(source.part(number))) for number in range(source.count)]
            table = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        number = source.number(step, inner_step)
        new = evaluate(self._placed(source.part(number)))
        index = torch.tensor([number], device=self.params.device)
        estimate = {name: value - table[name][number] + table[name].mean(0) for name, value in new.items()}
        # A copy: what was saved of the state before must stay as it was.
        kept = {prefix + name: table[name].index_copy(0, index, value.unsqueeze(0)) for name, value in new.items()}
        return estimate, kept

    def _placed(self, batch: Any) -> Any:
        return self.problem.problem.place(batch)

    def _inner(self, batch: Any) -> TensorDict:
        self.evaluated += 1
        at = linearise(self.problem, self.solver, self.params, self.hparams, batch)
        self.losses["inner"] = at.inner_loss
        mixed = {f"mixed.{name}": value for name, value in at.mixed(self.adjoint).items()}
        return {"gradient": at.optimality.detach(), "product": at.operator.mv(self.adjoint).detach(), **mixed}

    def _outer(self, batch: Any) -> TensorDict:
        self.losses["outer"], by_params, direct = outer_gradients_on(self.problem, self.params, self.hparams, batch)
        return {"gradient": by_params, **{f"direct.{name}": value for name, value in direct.items()}}
