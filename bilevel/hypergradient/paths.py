"""By which paths a hyperparameter reaches the outer loss, and whether the chosen method differentiates one of them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.autograd import grad

from bilevel.errors import UsageError
from bilevel.flat import FlatProblem, StepBatches
from bilevel.hypergradient.method import Hypergradient, HypergradientMethod, leaves
from bilevel.result import Result
from bilevel.solvers import InnerSolver

EXPLANATIONS = {
    "direct": "it stands in the outer loss",
    "inner": "it shapes the inner problem",
    "initial": "it only enters the starting point of the inner solve, which a solution does not depend on",
    "solver": "it is an option of the inner solver, which a solution does not depend on",
}
REMEDIES = {
    "initial": "use hypergradient=unrolled or hypergradient=forward, or tie it to the solution by a proximal term",
    "solver": "use hypergradient=unrolled or hypergradient=forward",
    "inner": "use hypergradient=implicit_cg",
    "direct": "use any other hypergradient method",
}


def find_paths(
    problem: FlatProblem, solver: InnerSolver, hparams: Mapping[str, Tensor], batches: StepBatches
) -> dict[str, set[str]]:
    """The paths of each hyperparameter, read off the graphs (whether it is used at all, not how much)."""
    with torch.enable_grad():
        at = leaves(hparams)
        start = problem.start(at)
        x = start.detach().requires_grad_()
        outer = problem.outer_loss(x, at, batches.outer).sum()
        objective = problem.objective(batches.curvature)
        if objective.loss is None:
            assert objective.optimality is not None
            optimality = objective.optimality(x, at)
        else:
            value = objective.loss(x, at)
            _check_finite(value)
            (optimality,) = grad(value.sum(), x, create_graph=True, materialize_grads=True)
        found: dict[str, set[str]] = {name: set() for name in at}
        for path, output in (("direct", outer), ("inner", optimality), ("initial", start)):
            used: tuple[Tensor | None, ...] = (None,) * len(at)
            if output.requires_grad:
                used = grad(output.sum(), list(at.values()), allow_unused=True, retain_graph=True)
            for name, derivative in zip(at, used, strict=True):
                if derivative is not None:
                    found[name].add(path)
    for name in solver.hparam_names:
        if name in found:
            found[name].add("solver")
    return found


def _check_finite(values: Tensor) -> None:
    bad = (~values.detach().isfinite()).flatten().nonzero().flatten().tolist()
    if bad:
        where = f" of task {bad[0]}" if values.ndim else ""
        raise UsageError(
            f"inner_loss{where} is {float(values.detach().flatten()[bad[0]])} at the starting point, but must be finite: "
            "check the data, init_params and init_hparams."
        )


def check_paths(
    method: HypergradientMethod,
    problem: FlatProblem,
    solver: InnerSolver,
    hparams: Mapping[str, Tensor],
    batches: StepBatches,
) -> None:
    """Refuse hyperparameters that would get a silent zero.

    Raises:
        UsageError: names the hyperparameter, why the method gives it no gradient, and a method that would.
    """
    covered = method.paths - ({"initial"} if method.warm_start else set())
    for name, paths in find_paths(problem, solver, hparams, batches).items():
        if paths & covered:
            continue
        if not paths:
            raise UsageError(
                f"hyperparameter '{name}' is used nowhere (neither in the outer loss, the inner loss, init_params nor an "
                "option of the inner solver), so it has no hypergradient: use it, or take it out of init_hparams."
            )
        path = sorted(paths)[0]
        remedy = REMEDIES[path]
        if path in method.paths:
            remedy = "set hypergradient.warm_start=false"
        raise UsageError(
            f"hyperparameter '{name}' gets no hypergradient from {type(method).__name__}: {EXPLANATIONS[path]}; {remedy}."
        )


def check_not_all_zero(result: Hypergradient, method: HypergradientMethod) -> None:
    """Refuse a first hypergradient of which a whole tensor is exactly zero (single zeros are common and fine).

    A linear solve that failed may return zero for reasons of its own, which its receipt tells; that proves nothing here.
    """
    linear = result.receipt.linear_result
    if linear is not None and not Result[linear].successful:
        return
    for name, value in result.gradient.items():
        if value.numel() and not bool(value.any()):
            raise UsageError(
                f"the whole hypergradient of '{name}' is exactly zero in the first step, so {type(method).__name__} cannot "
                "move it: it is multiplied by zero or detached on its way to the outer loss, or the outer loss does not "
                "depend on what it changes."
            )
