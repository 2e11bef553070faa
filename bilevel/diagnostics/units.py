"""The unit costs of a problem, as the planner measures them at one point."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from bilevel.batches import StepBatches
from bilevel.diagnostics.cost import Units
from bilevel.diagnostics.meter import peak_bytes, seconds_of
from bilevel.diagnostics.trials import Site
from bilevel.flat import FlatProblem
from bilevel.hypergradient import Implicit, differentiate
from bilevel.hypergradient.outer import outer_gradients
from bilevel.linalg import GMRES, MINRES, LinearSolver, Tag
from bilevel.linearisation import inner_value, leaves, linearise
from bilevel.solvers import InnerSolver

BLOCK = 512  # rows of the matrix whose factorisation is timed


def measure_units(site: Site, solver: InnerSolver, params: Tensor) -> tuple[Units, bool]:
    """Unit costs at a point, usually an inner solution, and whether products are symmetric there."""
    flat, hparams, batches = site.flat, site.hparams, site.batches
    objective = flat.objective(batches.curvature)
    at = linearise(flat, solver, params, hparams, batches.curvature)
    _, vector, _ = outer_gradients(flat, params, hparams, batches)

    def gradient() -> None:
        with torch.no_grad():
            objective.gradient(params, hparams)

    symmetric = Tag.symmetric in at.operator.tags
    few: LinearSolver = MINRES(rtol=None, max_steps=2) if symmetric else GMRES(rtol=None, max_steps=2)
    method = Implicit(linear_solver=few, error_estimate=None)
    stopped = replace(solver, max_steps=1, atol=0.0, rtol=0.0)

    def side() -> None:
        _by_hparams(flat, params, hparams, batches)

    def theorem() -> None:
        differentiate(method, flat, stopped, params, hparams, batches, {})

    theorem()
    numbers = params.numel()
    units = Units(
        gradient=site.clock(gradient),
        product=site.clock(lambda: at.operator.transpose().mv(vector)),
        linearise=site.clock(lambda: linearise(flat, solver, params, hparams, batches.curvature)),
        mixed=site.clock(lambda: at.mixed(vector)),
        outer=site.clock(lambda: outer_gradients(flat, params, hparams, batches)),
        side=site.clock(side),
        graph_bytes=peak_bytes(theorem, site.device),
        side_bytes=peak_bytes(side, site.device),
        flops=_flops(params),
        num_params=numbers,
        num_unknowns=params.shape[-1],
        itemsize=params.element_size(),
    )
    return units, symmetric


def _by_hparams(flat: FlatProblem, params: Tensor, hparams: Mapping[str, Tensor], batches: StepBatches) -> None:
    """A gradient of the inner loss with respect to the hyperparameters, where there is a loss."""
    objective = flat.objective(batches.curvature)
    if objective.loss is None:
        inner_value(flat, params, hparams, batches.curvature)
        return
    with torch.enable_grad():
        at = leaves(hparams)
        value = objective.loss(params.detach(), at).sum()
        if value.requires_grad:
            torch.autograd.grad(value, list(at.values()), materialize_grads=True)


def _flops(like: Tensor) -> float:
    """Of a Cholesky factorisation, `n³ / 3` operations."""
    size = min(BLOCK, like.shape[-1])
    matrix = torch.eye(size, dtype=like.dtype, device=like.device)
    return size**3 / 3 / max(seconds_of(lambda: torch.linalg.cholesky_ex(matrix), like.device, repeats=3), 1e-9)
