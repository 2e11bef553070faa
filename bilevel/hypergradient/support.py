"""An inner problem with a non-smooth term, seen from its solution: smooth, and of the free entries alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bilevel.errors import UsageError
from bilevel.flat import FlatProblem, Model
from bilevel.linearisation import leaves
from bilevel.solvers import InnerSolution, InnerSolver, NewtonCG, Objective, Polyhedral
from bilevel.tree import Layout

Lift = Callable[[Tensor, Mapping[str, Tensor]], Tensor]  # (free entries, hparams) -> the params of `whole`
SUPPORT = "support"  # in a method's state: the free entries of the step before
SLACK = 10.0  # a held entry is at the edge where its margin is below so many times the stationarity that was reached


@dataclass(frozen=True, kw_only=True)
class OnSupport(FlatProblem):
    r"""`min_z f(x(z, θ), θ) + slope(θ)^T z` over the free entries `z` of a solution, the others held: one system, smooth.

    Attributes:
        whole: the problem of all entries, or what is left of it when those that are held at zero are gone.
        lift: puts the free entries among the held ones.
        slope: of the non-smooth term, `hparams -> (num_free,)`.
        num_systems: tasks whose free entries stand side by side.
    """

    whole: FlatProblem = field(repr=False)
    lift: Lift = field(repr=False, compare=False)
    slope: Callable[[Mapping[str, Tensor]], Tensor] = field(repr=False, compare=False)
    num_systems: int = 1

    @property
    def num_batch(self) -> int:
        """No leading dimension: all tasks are one system."""
        return 0

    def objective(self, batch: Any) -> Objective:
        """Smooth part and slope, added up over tasks."""
        smooth = self.whole.loss_objective(batch).loss
        assert smooth is not None

        def loss(z: Tensor, hparams: Mapping[str, Tensor]) -> Tensor:
            return smooth(self.lift(z, hparams), hparams).sum() + self.slope(hparams) @ z

        return Objective(loss)

    def outer_loss(self, params: Tensor, hparams: Mapping[str, Tensor], batch: Any) -> Tensor:
        """Mean over tasks, a scalar."""
        return self.whole.outer_loss(self.lift(params, hparams), hparams, batch).mean()

    def in_parts(self, params: Tensor, batch: Any) -> Iterator[tuple[FlatProblem, Tensor, Any]]:
        """In one: the held entries of all tasks are there at once."""
        yield self, params, batch

    def model(self, params: Tensor, hparams: Mapping[str, Tensor], batch: Any) -> Model:
        """The parts of the whole inner loss as functions of the free entries.

        Raises:
            UsageError: there are tasks, or the problem has no such parts.
        """
        if self.num_systems > 1:
            raise UsageError("the Gauss-Newton matrix of several tasks with a non-smooth term is not available.")
        parts = self.whole.model(self.lift(params, hparams), hparams, batch)
        penalty = parts.penalty
        return Model(
            outputs=lambda z, h: parts.outputs(self.lift(z, h), h),
            output_loss=parts.output_loss,
            penalty=None if penalty is None else lambda z, h: penalty(self.lift(z, h), h),
        )


class AtSolution(NamedTuple):
    """What the theorem is applied to.

    Attributes:
        problem: a smooth one.
        solver: whose solutions are its stationary points.
        params: the solution.
        support: which entries of the whole solution they are; None: all.
        num_systems: tasks that have become one system.
        biased: why the theorem does not hold there.
    """

    problem: FlatProblem
    solver: InnerSolver
    params: Tensor
    support: Tensor | None = None
    num_systems: int = 1
    biased: tuple[str, ...] = ()


def around(
    problem: FlatProblem, solver: InnerSolver, inner: InnerSolution, hparams: Mapping[str, Tensor], batch: Any
) -> AtSolution:
    """The problem as the implicit function theorem wants it: as it is, or on the free entries of a non-smooth solution.

    Args:
        problem: with all entries.
        solver: the inner solver, which may add a non-smooth term.
        inner: what it came to.
        hparams: natural units.
        batch: the inner batch at whose solution the theorem is applied.
    """
    term = solver.polyhedral
    if term is None or problem.objective(batch).loss is None:
        return AtSolution(problem, solver, inner.params)
    params = inner.params.detach()
    with torch.no_grad():
        free = term.free(params, hparams)
        gradient = problem.loss_objective(batch).gradient(params, hparams)
        edge = ~free & (term.margin(params, gradient, hparams) <= SLACK * _resolution(inner, gradient))
    smooth = NewtonCG(max_steps=solver.max_steps, atol=solver.atol, rtol=solver.rtol)
    number, kinks = params.shape[:-1].numel(), _kinks(int(edge.sum()))
    return AtSolution(_restricted(problem, term, params, free, hparams), smooth, params[free], free, number, kinks)


def _resolution(inner: InnerSolution, gradient: Tensor) -> float:
    """Differences of gradients below this are none: what the inner solve left, or rounding."""
    return max(inner.stationarity, torch.finfo(gradient.dtype).eps * float(gradient.abs().max()))


def _kinks(number: int) -> tuple[str, ...]:
    if not number:
        return ()
    return (
        f"{number} held entries of the inner solution are, within its accuracy, about to come free: it has a kink there",
    )


def _restricted(
    problem: FlatProblem, term: Polyhedral, params: Tensor, free: Tensor, hparams: Mapping[str, Tensor]
) -> OnSupport:
    layout = Layout(("free",), ((int(free.sum()),),))
    whole, lift = problem, _among_held(term, params, free)
    if hasattr(problem.problem, "restricted") and _held_at_zero(term, params, free, hparams):
        kept = free.reshape(-1, params.shape[-1]).any(0)  # by any of the tasks
        entries = kept.nonzero().squeeze(-1)
        whole = problem.restricted(kept)
        lift = _among_held(term.on(entries, params, hparams), params[..., entries], free[..., entries])
    return OnSupport(
        problem.problem,
        layout,
        problem.purity,
        problem.looped,
        whole=whole,
        lift=lift,
        slope=lambda hparams: term.slope(params, hparams)[free],
        num_systems=params.shape[:-1].numel(),
    )


def _among_held(term: Polyhedral, params: Tensor, free: Tensor) -> Lift:
    where = free.flatten().nonzero().squeeze(-1)

    def lift(z: Tensor, hparams: Mapping[str, Tensor]) -> Tensor:
        held = term.held(params, hparams).flatten()
        return held.index_put((where,), z).reshape(params.shape)

    return lift


def _held_at_zero(term: Polyhedral, params: Tensor, free: Tensor, hparams: Mapping[str, Tensor]) -> bool:
    """Whether the held entries are zero, whatever the hyperparameters."""
    with torch.enable_grad():
        held = term.held(params, leaves(hparams))
    return not held.requires_grad and not bool(held[~free].any())


def remembered(state: Mapping[str, Tensor], support: Tensor | None) -> dict[str, Tensor]:
    """A method's state without what belongs to the free entries of the step before, where these are others now."""
    before = state.get(SUPPORT)
    same = before is support or (before is not None and support is not None and torch.equal(before, support))
    return {name: value for name, value in state.items() if name != SUPPORT and (same or value.ndim == 0)}
