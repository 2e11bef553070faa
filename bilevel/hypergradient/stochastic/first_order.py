"""What penalty methods share: gradients of both losses by params and hyperparameters, and no product with a Hessian."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import grad

from bilevel.flat import FlatProblem
from bilevel.linearisation import leaves
from bilevel.solvers import InnerSolver
from bilevel.tree import TensorDict


class Gradients(NamedTuple):
    """Mean loss over tasks, and its derivatives by params and by each hyperparameter."""

    loss: float
    params: Tensor
    hparams: TensorDict


def inner_gradients(
    problem: FlatProblem, solver: InnerSolver, params: Tensor, hparams: Mapping[str, Tensor], batch: Any
) -> Gradients:
    """Of the inner loss, with what the solver adds to it; those by params are of each task, those by hyperparameters a mean.

    Args:
        problem: the problem between vectors; one with an inner loss.
        solver: the inner solver.
        params: where, `(n,)` or `(num_tasks, n)`.
        hparams: in natural units.
        batch: the inner batch.
    """
    conditions = solver.conditions(problem.objective(batch))
    assert conditions.loss is not None
    with torch.enable_grad():
        x, at = params.detach().requires_grad_(), leaves(hparams)
        losses = conditions.loss(x, at)
        by_params, *parts = grad(losses.sum(), [x, *at.values()], materialize_grads=True)
    number = max(losses.numel(), 1)
    return Gradients(
        float(losses.detach().mean()),
        by_params,
        {name: part / number for name, part in zip(at, parts, strict=True)},
    )
