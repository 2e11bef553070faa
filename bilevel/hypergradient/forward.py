"""Forward mode through the inner loop: one tangent of the iterate for each hyperparameter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import grad
from torch.func import jvp, vmap

from bilevel.batches import StepBatches
from bilevel.errors import UsageError
from bilevel.flat import FlatProblem
from bilevel.hypergradient.method import (
    Hypergradient,
    HypergradientMethod,
    MethodState,
)
from bilevel.hypergradient.outer import outer_gradients
from bilevel.linearisation import inner_value, leaves
from bilevel.receipt import Receipt
from bilevel.solvers import InnerResult, InnerSolver
from bilevel.solvers.loop import exhausted, verdict
from bilevel.solvers.solver import State, split_state
from bilevel.tree import Layout, TensorDict, detach


@dataclass(frozen=True)
class ForwardMode(HypergradientMethod):
    r"""Carries `dx_k/dθ` along with the iteration: memory does not grow with the steps, cost grows with the hyperparameters.

    Gives the same number as full unrolling. All directions go through a step at once (vmapped Jacobian-vector products).

    Args:
        warm_start: start from the previous solution as a constant.
        max_directions: refuse more hyperparameters than this, since each one costs another inner loop.

    Reference: Franceschi et al. (2017), "Forward and reverse gradient-based hyperparameter optimization".
    """

    paths: ClassVar[frozenset[str]] = frozenset({"direct", "inner", "initial", "solver"})
    records_steps: ClassVar[bool] = True

    warm_start: bool = False
    max_directions: int = 1000

    def compute(
        self,
        problem: FlatProblem,
        solver: InnerSolver,
        params: Tensor,
        hparams: Mapping[str, Tensor],
        batches: StepBatches,
        state: MethodState,
    ) -> Hypergradient:
        """Step the iterate and its tangents together."""
        at = detach(hparams)
        layout = Layout.of(at)
        if layout.size > self.max_directions:
            raise UsageError(
                f"ForwardMode would carry {layout.size} directions (max_directions is {self.max_directions}): "
                "use an implicit or unrolled hypergradient, or raise max_directions."
            )
        basis = layout.unravel(torch.eye(layout.size, dtype=params.dtype, device=params.device), num_batch=1)
        x = params.detach()
        tangents = x.new_zeros(layout.size, *x.shape)
        if not self.warm_start:
            x, tangents = _push_start(problem, at, basis, layout.size)
        objective = problem.objective(batches.inner(0))

        def begin(z: Tensor, h: TensorDict) -> Any:
            return split_state(solver.init(z, objective, h))

        floats, state_tangents, others = _push(begin, (x, at), (tangents, basis))
        result, number = None, 0
        for number in range(1, solver.max_steps + 1):
            objective = problem.objective(batches.inner(number - 1))

            def step(z: Tensor, floats: TensorDict, h: TensorDict, *, others: State, loss: Any) -> Any:
                new, after = solver.step(z, {**others, **floats}, loss, h)
                moving, rest = split_state(after)
                return (new, moving), rest

            (new_x, new_floats), (new_tangents, new_state_tangents), rest = _push(
                partial(step, others=others, loss=objective), (x, floats, at), (tangents, state_tangents, basis)
            )
            rest.setdefault("first_stationarity", rest["stationarity"])
            result = verdict(solver, rest)
            if result is not InnerResult.nonfinite:
                x, tangents, state_tangents = new_x, new_tangents, new_state_tangents
                floats, others = new_floats, rest
            if result is not None:
                break
        outer, by_params, direct = outer_gradients(problem, x, at, batches)
        total = layout.ravel(direct) + tangents.flatten(1) @ by_params.flatten()
        receipt = Receipt(
            stationarity=float(others["stationarity"].max()),
            inner_steps=number,
            inner_gradients=int(others["num_gradients"]),
            inner_products=number * layout.size,
            inner_result=(result or exhausted(solver)).name,
        )
        value = inner_value(problem, x, at, batches.curvature)
        return Hypergradient(layout.unravel(total), x.detach(), {}, receipt, outer, value)


def _push_start(problem: FlatProblem, at: TensorDict, basis: TensorDict, count: int) -> tuple[Tensor, Tensor]:
    """The starting point and its tangents, by reverse mode twice: `init_params` may draw random numbers but once."""
    with torch.enable_grad():
        inputs = leaves(at)
        x = problem.start(inputs)
        if not x.requires_grad:
            return x, x.new_zeros(count, *x.shape)
        probe = torch.zeros_like(x).requires_grad_()
        pulled = grad(x, list(inputs.values()), probe, create_graph=True, materialize_grads=True)
    moving = [(part, basis[name]) for name, part in zip(inputs, pulled, strict=True) if part.requires_grad]
    rows = [
        grad([part for part, _ in moving], probe, [moves[index] for _, moves in moving], retain_graph=True)[0]
        for index in range(count)
    ]
    return x.detach(), torch.stack(rows)


def _push(function: Callable[..., Any], primals: Any, tangents: Any) -> tuple[Any, Any, Any]:
    """Values of a function, their tangents vmapped over directions, and its auxiliary output."""

    def along(moves: Any) -> Any:
        return jvp(function, primals, moves, has_aux=True)

    out_dims: Any = (None, 0, None)  # torch's annotation leaves out the None that its documentation allows
    values, pushed, rest = vmap(along, out_dims=out_dims, randomness="same")(tangents)
    return values, pushed, rest
