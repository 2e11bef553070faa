r"""What Kronecker-factored curvature is made of: inputs of the linear maps and gradients of their outputs.

The Gauss-Newton matrix is `Σ_n J_n^T H_n J_n`, with `H_n` the Hessian of example `n`'s loss in its outputs and `J_n` the
outputs' derivative. With `H_n = S_n S_n^T` it is `Σ_n Σ_c g_nc g_nc^T`, `g_nc = J_n^T S_n e_c`: one backward pass for each
column `c` gives the gradients of all examples at the outputs of every linear map.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel.errors import UsageError
from bilevel.flat import FlatProblem
from bilevel.linalg import HessianOperator
from bilevel.linearisation import Linearisation
from bilevel.preconditioner.capture import Capture, Use
from bilevel.preconditioner.penalty import signs
from bilevel.rng import generator
from bilevel.tree import TensorDict, detach

NUM_PROBES = 10  # for the diagonal of parameters that belong to no linear map
COVERED = 0.9  # share of the parameters in linear maps below which a diagonal would be most of what is known


@dataclass(frozen=True)
class LinearMap:
    """A linear map `y = a M` of a model, with the data that its block of the Gauss-Newton matrix is made of.

    Attributes:
        index: positions of `M`'s entries in the vector of parameters, `(p, q)`; a bias is the last row.
        inputs: `a`, `(*batch, N, T, p)`, with a 1 at the end where there is a bias.
        gradients: with respect to `y`, one for each column, `(columns, *batch, N, T, q)`.
    """

    index: Tensor
    inputs: Tensor
    gradients: Tensor


@dataclass(frozen=True)
class Backpropagation:
    """The linear maps of a model, and a diagonal for the parameters that belong to none.

    Attributes:
        maps: no two of them share a parameter.
        diagonal: of the Gauss-Newton matrix, without the penalty, estimated without bias (each entry has a relative standard
            error of at most 0.45); zero where a map serves, `(*batch, n)`.
        num_passes: backward passes made, and one for the forward passes.
    """

    maps: list[LinearMap]
    diagonal: Tensor
    num_passes: int


def backpropagate(at: Linearisation, num_samples: int | None, seed: int) -> Backpropagation:
    """Run the model once and propagate the columns of the loss's Hessian roots back.

    Args:
        at: the inner problem, made of `outputs` and `output_loss`.
        num_samples: random combinations of the columns to use instead of all of them.
        seed: of the random signs.

    Raises:
        UsageError: the problem is not made of `outputs` and `output_loss`, or these do not fit together.
    """
    problem, point, hparams = at.problem, at.params.detach(), detach(at.hparams)
    model = problem.model(point, hparams, at.batch)
    outputs, added, uses, leaf = _forward(problem, point, hparams, at.batch)
    nb = problem.num_batch
    if outputs.ndim == nb:
        raise UsageError(
            "K-FAC needs outputs with a leading dimension of examples, but they are a scalar: return (B, ...)."
        )
    flat = outputs.detach().flatten(nb)
    root = _root(lambda z: model.output_loss(z, hparams), flat, outputs.shape[nb])  # (*batch, N, m, m)
    source = generator(seed)
    columns = root if num_samples is None else _mixed(root, num_samples, source) / num_samples**0.5
    passes = columns.unbind(-1) if added else ()
    live = [column for column in passes if bool((column != 0).any())] or list(passes[:1])
    gradients = [_pull(outputs, column, added) for column in live]
    maps = _maps(uses, [torch.stack(of_use) for of_use in zip(*gradients, strict=True)], nb)
    diagonal, num_passes = torch.zeros_like(point), len(live) + 1
    covered = _covered([one.index for one in maps], point)
    if not bool(covered.all()):
        # Random signs make the cross terms of a squared gradient vanish in the mean: what stays is the diagonal.
        mixed = _mixed(root, NUM_PROBES, source)
        probes = torch.stack([_pull(outputs, column, [leaf])[0].square() for column in mixed.unbind(-1)])
        diagonal = torch.where(covered, 0.0, probes.mean(0))
        num_passes += NUM_PROBES
    return Backpropagation(maps, diagonal, num_passes)


def num_passes(at: Linearisation, num_samples: int | None) -> float:
    """Passes that `backpropagate` takes at most; infinity where there are no outputs or less than `COVERED` is in linear maps.

    One forward pass, no backward one.
    """
    problem, point, hparams = at.problem, at.params.detach(), detach(at.hparams)
    try:
        problem.model(point, hparams, at.batch)
        outputs, _, uses, _ = _forward(problem, point, hparams, at.batch)
    except UsageError:
        return math.inf
    if outputs.ndim == problem.num_batch:
        return math.inf
    covered = _covered([_index(use) for use in uses], point)
    if float(covered.double().mean()) < COVERED:
        return math.inf
    shape = outputs.shape[problem.num_batch :]
    columns = shape[1:].numel() if num_samples is None else num_samples
    return columns + 1 + (0 if bool(covered.all()) else NUM_PROBES)


def _mixed(root: Tensor, number: int, source: torch.Generator) -> Tensor:
    """Random combinations of the columns, with other signs for each example, `(*batch, N, m, number)`."""
    return root @ signs((*root.shape[:-1], number), source, root)


def _pull(outputs: Tensor, column: Tensor, wanted: list[Tensor]) -> list[Tensor]:
    """One backward pass."""
    parts = torch.autograd.grad(
        outputs, wanted, column.reshape(outputs.shape), retain_graph=True, materialize_grads=True
    )
    return [part.detach() for part in parts]


def _forward(
    problem: FlatProblem, point: Tensor, hparams: TensorDict, batch: Any
) -> tuple[Tensor, list[Tensor], list[Use], Tensor]:
    """The outputs with a graph, the zeros that were added to each use's output, the uses, and the leaf of parameters."""
    layout = problem.layout
    positions = layout.unravel(torch.arange(layout.size, device=point.device))
    latest: list[Capture] = []

    def captured(x: Tensor, added: Any, data: Any) -> tuple[Tensor, list[Tensor]]:
        params = layout.unravel(x)
        with Capture(params, positions, added) as capture:
            outputs: Tensor = problem.problem.outputs(params, hparams, data)  # type: ignore[attr-defined]  # FlatProblem.model has checked it
        latest[:] = [capture]
        return outputs, [use.inputs for use in capture.uses]

    run = _each_task(problem, captured, batch)
    with torch.no_grad():
        run(point, None)
        batch_shape = point.shape[:-1]
        added = [point.new_zeros(*batch_shape, *shape) for shape in latest[0].shapes]
    with torch.enable_grad():
        leaf = point.clone().requires_grad_()
        added = [zeros.requires_grad_() for zeros in added]
        outputs, inputs = run(leaf, added)
    uses = [_with_inputs(use, one.detach()) for use, one in zip(latest[0].uses, inputs, strict=True)]
    return outputs, added, uses, leaf


def _with_inputs(use: Use, inputs: Tensor) -> Use:
    return Use(use.index, use.bias, inputs, use.rows)


def _each_task(problem: FlatProblem, function: Callable[..., Any], batch: Any) -> Callable[..., Any]:
    """A function of `(params, added, batch)` for one task, applied to all of them with their parts of the batch."""
    if problem.num_batch == 0:
        return lambda x, added: function(x, added, batch)
    data = None if batch is None else 0
    return lambda x, added: torch.vmap(function, in_dims=(0, None if added is None else 0, data))(x, added, batch)


def _root(loss: Callable[[Tensor], Tensor], flat: Tensor, num_examples: int) -> Tensor:
    """`S_n` with `S_n S_n^T` the positive part of each example's block of the loss's Hessian, `(*batch, N, m, m)`."""
    operator = HessianOperator(loss, flat)
    shape = (*flat.shape[:-1], num_examples, -1)
    blocks = []
    for position in range(flat.shape[-1] // max(num_examples, 1)):
        probe = torch.zeros_like(flat).reshape(shape)
        probe[..., position] = 1.0  # examples do not mix, so all of them are asked at once
        blocks.append(operator.mv(probe.reshape(flat.shape)).reshape(shape))
    hessian = torch.stack(blocks, -1)
    values, vectors = torch.linalg.eigh((hessian + hessian.mT) / 2)
    level = hessian.shape[-1] * torch.finfo(flat.dtype).eps
    values = torch.where(values > level * values[..., -1:], values, 0.0)
    return vectors * values.sqrt().unsqueeze(-2)


def _covered(indices: list[Tensor], point: Tensor) -> Tensor:
    """Which parameters belong to the linear maps of these positions, `(n,)`."""
    mask = torch.zeros(point.shape[-1], dtype=torch.bool, device=point.device)
    for index in indices:
        mask[index.flatten()] = True
    return mask


def _index(use: Use) -> Tensor:
    return use.index if use.bias is None else torch.cat([use.index, use.bias.unsqueeze(0)])


def _maps(uses: list[Use], gradients: list[Tensor], nb: int) -> list[LinearMap]:
    """One map for each matrix: uses of the same one are more places in the example.

    Where two uses share only some entries (a slice here, the whole there), the first counts.
    """
    maps: list[LinearMap] = []
    for use, gradient in zip(uses, gradients, strict=True):
        rows: Callable[[Tensor], Tensor] = use.rows
        for _ in range(nb + 1):
            rows = torch.vmap(rows)
        index, inputs, gradient = _index(use), use.inputs, rows(gradient)
        if use.bias is not None:
            inputs = torch.cat([inputs, inputs.new_ones(*inputs.shape[:-1], 1)], -1)
        for place, other in enumerate(maps):
            if torch.equal(other.index, index) and other.inputs.shape[-3] == inputs.shape[-3]:
                maps[place] = LinearMap(
                    index, torch.cat([other.inputs, inputs], -2), torch.cat([other.gradients, gradient], -2)
                )
                break
            if bool(torch.isin(index, other.index).any()):
                break
        else:
            maps.append(LinearMap(index, inputs, gradient))
    return maps
