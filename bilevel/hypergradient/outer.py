"""The outer loss and its partial derivatives, by eager evaluation or by machine code."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bilevel.batches import StepBatches
from bilevel.flat import FlatProblem
from bilevel.linearisation import leaves
from bilevel.tree import TensorDict

OuterGradients = tuple[
    float, Tensor, TensorDict
]  # mean loss, derivatives by params, and directly by each hyperparameter


def outer_gradients(
    problem: FlatProblem, params: Tensor, hparams: Mapping[str, Tensor], batches: StepBatches
) -> OuterGradients:
    """Mean outer loss and its partial derivatives: with respect to params, and directly to hyperparameters."""
    return outer_gradients_on(problem, params, hparams, batches.outer)


def outer_gradients_on(
    problem: FlatProblem, params: Tensor, hparams: Mapping[str, Tensor], batch: Any
) -> OuterGradients:
    """The same, on a batch that is given."""
    number = params.shape[:-1].numel()
    parts = problem.in_parts(params.detach(), batch)
    return _summed([_outer_gradient(part, x, hparams, batch, number) for part, x, batch in parts], hparams)


def outer_gradients_compiled(
    problem: FlatProblem, params: Tensor, hparams: Mapping[str, Tensor], batches: StepBatches
) -> tuple[OuterGradients, str | None]:
    """The same by machine code, and why it is not, a sentence, where it could not be compiled."""
    number, programs = params.shape[:-1].numel(), problem.compiled("the gradients of the outer loss are")
    found, reasons = [], []
    for part, x, batch in problem.in_parts(params.detach(), batches.outer):

        def evaluate(
            x: Tensor, hparams: Mapping[str, Tensor], data: Any, part: FlatProblem = part
        ) -> tuple[Tensor, ...]:
            return _outer_gradient(part, x, hparams, data, number)

        def value(x: Tensor, hparams: Mapping[str, Tensor], data: Any, part: FlatProblem = part) -> Tensor:
            return part.outer_loss(x, hparams, data).sum() / number

        compiled = programs.of_function(evaluate, value, batch, problem.purity.active)
        found.append(compiled(x, hparams) or evaluate(x, hparams, batch))
        reasons.append(compiled.fallback)
    return _summed(found, hparams), " ".join(dict.fromkeys(reason for reason in reasons if reason)) or None


def _outer_gradient(
    problem: FlatProblem, params: Tensor, hparams: Mapping[str, Tensor], batch: Any, number: int
) -> tuple[Tensor, ...]:
    """Sum of the outer losses of some tasks over the number of all, and its derivatives by params and each hyperparameter."""
    with torch.enable_grad():
        leaf, direct = params.detach().requires_grad_(), leaves(hparams)
        loss = problem.outer_loss(leaf, direct, batch).sum() / number
        return loss.detach(), *torch.autograd.grad(loss, [leaf, *direct.values()], materialize_grads=True)


def _summed(parts: list[tuple[Tensor, ...]], hparams: Mapping[str, Tensor]) -> OuterGradients:
    """The parts' values and derivatives by hyperparameters, added up, and those by params, one after the other."""
    losses, by_params, *by_hparams = zip(*parts, strict=True)
    total = sum(float(loss) for loss in losses)
    summed = {
        name: functools.reduce(torch.add, values, torch.zeros_like(hparams[name]))
        for name, values in zip(hparams, by_hparams, strict=True)
    }
    return total, by_params[0] if len(by_params) == 1 else torch.cat(by_params), summed
