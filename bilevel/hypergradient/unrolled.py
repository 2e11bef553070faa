"""Reverse mode through the inner loop: full, truncated to the last steps, or checkpointed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.autograd import grad

from bilevel.batches import StepBatches
from bilevel.errors import UsageError
from bilevel.flat import FlatProblem
from bilevel.hypergradient.method import (
    Hypergradient,
    HypergradientMethod,
    MethodState,
    describe,
    solve_inner,
    starting_point,
)
from bilevel.hypergradient.outer import outer_gradients
from bilevel.linearisation import inner_value, leaves
from bilevel.receipt import Receipt
from bilevel.solvers import InnerSolution, InnerSolver
from bilevel.solvers.loop import exhausted
from bilevel.solvers.solver import State, split_state
from bilevel.tree import TensorDict, detach


@dataclass(frozen=True)
class Unrolled(HypergradientMethod):
    r"""Differentiates the inner iteration itself, from `init_params(hparams)` or from the last `k` steps.

    Exact for the iterate that the loop returns, whatever it is worth as a solution, and the only way (besides forward
    mode) to hyperparameters of the inner solver and of the starting point. Memory grows with the recorded steps, time is
    two to three times that of the loop. With `checkpoint_every = K` only every K-th iterate is kept and the segments
    between are run again: memory of `N / K + K` steps for one more run of the loop.

    Args:
        warm_start: start from the previous solution, as a constant (the path through `init_params` is cut).
        last: record only the last `last` steps (truncation, biased); None records all.
        checkpoint_every: length of a segment; None keeps everything.

    Reference: Maclaurin, Duvenaud and Adams (2015), "Gradient-based hyperparameter optimization through reversible
    learning"; Shaban et al. (2019), "Truncated back-propagation for bilevel optimization".
    """

    paths: ClassVar[frozenset[str]] = frozenset({"direct", "inner", "initial", "solver"})
    records_steps: ClassVar[bool] = True

    warm_start: bool = False
    last: int | None = None
    checkpoint_every: int | None = None

    def __post_init__(self) -> None:
        """Validate the numbers."""
        for name in ("last", "checkpoint_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"Unrolled needs {name} >= 1 or None, but got {value}.")

    def _num_recorded(self, solver: InnerSolver) -> int:
        return solver.max_steps if self.last is None else min(self.last, solver.max_steps)

    def compute(
        self,
        problem: FlatProblem,
        solver: InnerSolver,
        params: Tensor,
        hparams: Mapping[str, Tensor],
        batches: StepBatches,
        state: MethodState,
    ) -> Hypergradient:
        """Run the loop with a graph and pull the outer gradient back through it."""
        at = leaves(hparams)
        with torch.enable_grad():
            start = starting_point(problem, params, at, self.warm_start)
        total, last = solver.max_steps, self._num_recorded(solver)
        while True:  # the loop may converge before `total` steps: then the recorded ones are moved forward
            skipped = _skip(problem, solver, start.detach(), detach(at), batches, total - last)
            if skipped is not None and skipped.result is not exhausted(solver):
                total = skipped.num_steps
                continue
            beginning = start if skipped is None else skipped.params
            inner, outer, gradient = self._derive(problem, solver, beginning, at, batches, skipped)
            made = inner.num_steps + (0 if skipped is None else skipped.num_steps)
            if skipped is None or made == total:
                break
            total = made
        params = inner.params.detach()
        biased = () if skipped is None else (f"only the last {inner.num_steps} of {made} steps are recorded",)
        value = inner_value(problem, params, detach(hparams), batches.curvature)
        receipt = Receipt(**{**describe(inner), "inner_steps": made}, biased=biased)
        return Hypergradient(gradient, params, {}, receipt, outer, value)

    def further(
        self,
        problem: FlatProblem,
        solver: InnerSolver,
        inner: InnerSolution,
        hparams: Mapping[str, Tensor],
        batches: StepBatches,
    ) -> Hypergradient:
        """The hypergradient through further steps only, which go on from the end of a solve with the solver's own state."""
        start = inner.params.detach()
        more, outer, gradient = self._derive(problem, solver, start, leaves(hparams), batches, inner)
        params = more.params.detach()
        value = inner_value(problem, params, detach(hparams), batches.curvature)
        return Hypergradient(gradient, params, {}, Receipt(**describe(more)), outer, value)

    def _derive(
        self,
        problem: FlatProblem,
        solver: InnerSolver,
        start: Tensor,
        at: TensorDict,
        batches: StepBatches,
        skipped: InnerSolution | None,
    ) -> tuple[InnerSolution, float, TensorDict]:
        """The recorded steps, the outer loss and its gradient through them."""
        derive = self._record if self.checkpoint_every is None else self._in_segments
        return derive(problem, solver, start, at, batches, skipped)

    def _record(
        self,
        problem: FlatProblem,
        solver: InnerSolver,
        start: Tensor,
        at: TensorDict,
        batches: StepBatches,
        skipped: InnerSolution | None,
    ) -> tuple[InnerSolution, float, TensorDict]:
        """One graph for the whole loop."""
        with torch.enable_grad():
            last = self._num_recorded(solver)
            offset, state = (0, None) if skipped is None else (skipped.num_steps, skipped.state)
            inner = solve_inner(problem, solver, start, at, batches, offset=offset, state=state, max_steps=last)
        outer, by_params, direct = outer_gradients(problem, inner.params, at, batches)
        return inner, outer, _add(direct, _pull({"params": inner.params}, {"params": by_params}, [], at)[1])

    def _in_segments(
        self,
        problem: FlatProblem,
        solver: InnerSolver,
        start: Tensor,
        at: TensorDict,
        batches: StepBatches,
        skipped: InnerSolution | None,
    ) -> tuple[InnerSolution, float, TensorDict]:
        """Forwards without a graph, keeping the segments' beginnings; backwards, each segment once more with one."""
        assert self.checkpoint_every is not None
        kept: list[tuple[int, int, Tensor, State]] = []
        constants = detach(at)
        offset, total = 0 if skipped is None else skipped.num_steps, self._num_recorded(solver)
        with torch.no_grad():
            objective = problem.objective(batches.inner(offset))
            state = skipped.state if skipped is not None else solver.init(start.detach(), objective, constants)
            x, made, inner = start.detach(), 0, skipped
            while made < total:
                length = min(self.checkpoint_every, total - made)
                part = solve_inner(
                    problem, solver, x, constants, batches, offset=offset + made, state=state, max_steps=length
                )
                kept.append((offset + made, part.num_steps, x, state))
                x, state, made = part.params, part.state, made + part.num_steps
                inner = part
                if part.result is not exhausted(solver):
                    break
        assert inner is not None
        outer, by_params, gradient = outer_gradients(problem, x, at, batches)
        cotangents: TensorDict = {"params": by_params}
        for first, length, x0, state0 in reversed(kept):
            with torch.enable_grad():
                moving, others = split_state(state0)
                inputs = {name: value.detach().requires_grad_() for name, value in {"params": x0, **moving}.items()}
                again = solve_inner(
                    problem, solver, inputs["params"], at, batches, offset=first,
                    state={**others, **{key: value for key, value in inputs.items() if key != "params"}}, max_steps=length,
                )  # fmt: skip
            outputs = {"params": again.params, **split_state(again.state)[0]}
            pulled, by_hparams = _pull(outputs, cotangents, list(inputs.values()), at)
            cotangents = dict(zip(inputs, pulled, strict=True))
            gradient = _add(gradient, by_hparams)
        if skipped is None:  # the state that the solver begins with may depend on the starting point, too
            with torch.enable_grad():
                begun = solver.init(start, problem.objective(batches.inner(0)), at)
            gradient = _add(gradient, _pull({"params": start, **split_state(begun)[0]}, cotangents, [], at)[1])
        return replace(inner, num_steps=made), outer, gradient


def _skip(
    problem: FlatProblem, solver: InnerSolver, start: Tensor, hparams: TensorDict, batches: StepBatches, num_steps: int
) -> InnerSolution | None:
    """The steps before the recorded ones, without a graph."""
    if num_steps <= 0:
        return None
    with torch.no_grad():
        return solve_inner(problem, solver, start, hparams, batches, max_steps=num_steps)


def _pull(
    outputs: TensorDict, cotangents: TensorDict, inputs: list[Tensor], at: TensorDict
) -> tuple[list[Tensor], TensorDict]:
    """Cotangents of the inputs and of the hyperparameters."""
    reached = [name for name in cotangents if name in outputs and outputs[name].requires_grad]
    targets = [*inputs, *at.values()]
    if not reached:
        pulled = [torch.zeros_like(t) for t in targets]
    else:
        ends, given = [outputs[name] for name in reached], [cotangents[name] for name in reached]
        pulled = list(grad(ends, targets, given, materialize_grads=True))
    return pulled[: len(inputs)], dict(zip(at, pulled[len(inputs) :], strict=True))


def _add(first: TensorDict, second: TensorDict) -> TensorDict:
    return {name: value + second[name] for name, value in first.items()}
