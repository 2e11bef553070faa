"""Reverse mode through the inner loop: full, truncated to the last steps, or checkpointed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.autograd import grad

from bilevel.errors import UsageError
from bilevel.flat import FlatProblem, StepBatches
from bilevel.hypergradient.method import (
    Hypergradient,
    HypergradientMethod,
    MethodState,
    describe,
    inner_value,
    leaves,
    outer_gradients,
    solve_inner,
    starting_point,
)
from bilevel.receipt import Receipt
from bilevel.solvers import InnerSolution, InnerSolver
from bilevel.solvers.solver import State
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
        skipped: InnerSolution | None = None
        if self.last is not None and solver.max_steps > self.last:
            with torch.no_grad():
                head = solver.max_steps - self.last
                skipped = solve_inner(problem, solver, start.detach(), detach(at), batches, max_steps=head)
            start = skipped.params
        if self.checkpoint_every is None:
            inner, outer, gradient = self._record(problem, solver, start, at, batches, skipped)
        else:
            inner, outer, gradient = self._in_segments(problem, solver, start, at, batches, skipped)
        params = inner.params.detach()
        facts = describe(inner)
        if skipped is not None:
            facts["inner_steps"] += skipped.num_steps
        biased = () if skipped is None else (f"only the last {self.last} of {facts['inner_steps']} steps are recorded",)
        value = inner_value(problem, params, detach(hparams), batches)
        return Hypergradient(gradient, params, {}, Receipt(**facts, biased=biased), outer, value)

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
            inner = _go_on(problem, solver, start, at, batches, skipped, self.last)
        outer, by_params, direct = outer_gradients(problem, inner.params, at, batches)
        return inner, outer, _add(direct, _pull([inner.params], [by_params], [], at)[1])

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
        offset = 0 if skipped is None else skipped.num_steps
        total = solver.max_steps - offset if self.last is None else min(self.last, solver.max_steps)
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
                if part.num_steps < length or part.result.name in ("converged", "nonfinite"):
                    break
        assert inner is not None
        outer, by_params, gradient = outer_gradients(problem, x, at, batches)
        cotangents: TensorDict = {"params": by_params}
        for first, length, x0, state0 in reversed(kept):
            with torch.enable_grad():
                inputs = {"params": x0.detach().requires_grad_(), **_tensors(state0, record=True)}
                again = solve_inner(
                    problem, solver, inputs["params"], at, batches, offset=first,
                    state={**state0, **{key: value for key, value in inputs.items() if key != "params"}}, max_steps=length,
                )  # fmt: skip
            outputs = {"params": again.params, **_tensors(again.state)}
            names = [name for name in cotangents if name in outputs and outputs[name].requires_grad]
            pulled, by_hparams = _pull(
                [outputs[name] for name in names], [cotangents[name] for name in names], list(inputs.values()), at
            )
            cotangents = dict(zip(inputs, pulled, strict=True))
            gradient = _add(gradient, by_hparams)
        if start.requires_grad:
            gradient = _add(gradient, _pull([start], [cotangents["params"]], [], at)[1])
        return replace(inner, num_steps=made), outer, gradient


def _go_on(
    problem: FlatProblem,
    solver: InnerSolver,
    start: Tensor,
    at: TensorDict,
    batches: StepBatches,
    skipped: InnerSolution | None,
    last: int | None,
) -> InnerSolution:
    offset, state = (0, None) if skipped is None else (skipped.num_steps, skipped.state)
    return solve_inner(problem, solver, start, at, batches, offset=offset, state=state, max_steps=last)


def _tensors(state: State, record: bool = False) -> TensorDict:
    """The floating-point tensors of a solver's state that derivatives flow through."""
    chosen = {
        key: value for key, value in state.items()
        if isinstance(value, Tensor) and value.is_floating_point() and key != "stationarity"
    }  # fmt: skip
    return {key: value.detach().requires_grad_() for key, value in chosen.items()} if record else chosen


def _pull(
    outputs: list[Tensor], cotangents: list[Tensor], inputs: list[Tensor], at: TensorDict
) -> tuple[list[Tensor], TensorDict]:
    """Cotangents of the inputs and of the hyperparameters."""
    reached = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
    targets = [*inputs, *at.values()]
    if not reached:
        pulled = [torch.zeros_like(t) for t in targets]
    else:
        pulled = list(grad([o for o, _ in reached], targets, [c for _, c in reached], materialize_grads=True))
    return pulled[: len(inputs)], dict(zip(at, pulled[len(inputs) :], strict=True))


def _add(first: TensorDict, second: TensorDict) -> TensorDict:
    return {name: value + second[name] for name, value in first.items()}
