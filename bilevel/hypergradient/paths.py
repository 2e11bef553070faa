"""By which paths a hyperparameter reaches the outer loss, and whether the chosen method differentiates one of them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.autograd import grad

from bilevel.batches import StepBatches
from bilevel.errors import UsageError
from bilevel.flat import FlatProblem
from bilevel.hypergradient.method import Hypergradient, HypergradientMethod
from bilevel.linearisation import leaves
from bilevel.result import Result
from bilevel.solvers import InnerSolver
from bilevel.solvers.options import Spread

EXPLANATIONS = {
    "direct": "it stands in the outer loss",
    "inner": "it shapes the inner problem",
    "initial": "it only enters the starting point of the inner solve, which a solution does not depend on",
    "solver": "it is an option of the inner solver{option}, which changes the way to a solution and not the solution itself",
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
    """The paths of each hyperparameter, read off the graphs (whether it is used at all, not how much).

    All but the direct path lead through `params`: they count only where the outer loss depends on those. Of many tasks it is
    looked at for as many as are differentiated at a time: the graph of all may be more than there is memory for.

    Raises:
        UsageError: the inner loss is not finite at the starting point, or does not depend on `params`.
    """
    with torch.enable_grad():
        at = leaves(hparams)
        start = problem.start(at)
        x = start.detach().requires_grad_()
        part, some, batch = next(problem.in_parts(x, batches.outer))
        outer = part.outer_loss(some, at, batch).sum()
        outputs = {"direct": outer}
        if _used(outer, [x])[0]:
            outputs |= {"inner": _optimality(problem, solver, x, at, batches), "initial": start}
        found: dict[str, set[str]] = {name: set() for name in at}
        for path, output in outputs.items():
            for name, used in zip(at, _used(output.sum(), list(at.values())), strict=True):
                if used:
                    found[name].add(path)
    for name in solver.hparam_names:
        if name in found and len(outputs) > 1:
            found[name].add("solver")
    return found


def _used(output: Tensor, inputs: list[Tensor]) -> list[bool]:
    """Which of the inputs stand in the graph of a scalar."""
    if not output.requires_grad:
        return [False] * len(inputs)
    return [part is not None for part in grad(output, inputs, allow_unused=True, retain_graph=True)]


def _optimality(
    problem: FlatProblem, solver: InnerSolver, x: Tensor, at: Mapping[str, Tensor], batches: StepBatches
) -> Tensor:
    """What vanishes at the solution, with its graph: the gradient of the inner loss, or an optimality."""
    objective = problem.objective(batches.curvature)
    conditions = solver.conditions(objective)
    if conditions.optimality is not None:
        return conditions.optimality(x, at)
    assert conditions.loss is not None
    value = conditions.loss(x, at)
    _check_finite(value)
    gradient = grad(value.sum(), x, create_graph=True, allow_unused=True)[0] if value.requires_grad else None
    if gradient is None:
        raise UsageError(
            "inner_loss was expected to depend on params, but no derivative leads there: compute it from params by "
            "differentiable operations, without detach(), item() or NumPy."
        )
    return gradient


def _check_finite(values: Tensor) -> None:
    bad = (~values.detach().isfinite()).flatten().nonzero().flatten().tolist()
    if bad:
        where = f" of task {bad[0]}" if values.ndim else ""
        raise UsageError(
            f"inner_loss{where} is {float(values.detach().flatten()[bad[0]])} at the starting point, but must be finite: "
            "check the data, init_params and init_hparams."
        )


def check_paths(method: HypergradientMethod, solver: InnerSolver, found: Mapping[str, set[str]]) -> None:
    """Refuse hyperparameters that would get a silent zero.

    Args:
        method: of which some paths are those it differentiates.
        solver: whose options may name hyperparameters.
        found: from `find_paths`.

    Raises:
        UsageError: names the hyperparameter, why the method gives it no gradient, and a method that would.
    """
    covered = method.paths - ({"initial"} if method.warm_start else set())
    for name, paths in found.items():
        if paths & covered:
            continue
        if not paths:
            raise UsageError(
                f"hyperparameter '{name}' is used nowhere on the way to the outer loss (neither in it nor, through params, "
                "in the gradient of the inner loss, init_params or an option of the inner solver), so it has no "
                "hypergradient: use it, or take it out of init_hparams."
            )
        path = sorted(paths)[0]
        remedy = REMEDIES[path]
        if path in method.paths:
            remedy = "set hypergradient.warm_start=false"
        raise UsageError(
            f"hyperparameter '{name}' gets no hypergradient from {type(method).__name__}: "
            f"{EXPLANATIONS[path].format(option=_option(solver, name))}; {remedy}."
        )


def explain_vanishing(
    method: HypergradientMethod,
    problem: FlatProblem,
    solver: InnerSolver,
    hparams: Mapping[str, Tensor],
    batches: StepBatches,
) -> None:
    """Warn of hyperparameters whose hypergradient is zero at a solution, for a method that reaches the solver's options.

    Those are the options that a solution does not depend on, unless they stand in the problem as well.
    """
    found = find_paths(problem, solver, hparams, batches)
    names = [name for name, paths in found.items() if "solver" in paths and not paths & {"direct", "inner"}]
    if not names:
        return
    listed = ", ".join(f"'{name}'{_option(solver, name)}" for name in names)
    moving = f", or tune {' or '.join(solver.moves_solution)}, which moves it" if solver.moves_solution else ""
    warnings.warn(
        f"the hypergradient of {listed} from {type(method).__name__} is zero by theory, but for what the inner solve left "
        "over: it converged, and a solution does not depend on how it was found; use hypergradient=unrolled or "
        f"hypergradient=forward, or an inner solve of few steps with atol=0 (a biased one-pass derivative){moving}.",
        stacklevel=3,
    )


def _option(solver: InnerSolver, name: str) -> str:
    """Which option of the solver a hyperparameter is, in brackets; nothing for an option of one of its parts."""
    options = [
        option for option, value in vars(solver).items()
        if value == name or (isinstance(value, Spread) and name in value.names)
    ]  # fmt: skip
    return f" ({' and '.join(options)} of {type(solver).__name__})" if options else ""


def check_not_all_zero(result: Hypergradient, method: HypergradientMethod) -> None:
    """Warn of a first hypergradient of which a whole tensor is exactly zero (single zeros are common).

    No reason to refuse: a lasso whose solution is zero has it, and so has a stationary point. Nor is a zero after a
    linear solve that failed worth a word, since the receipt tells.
    """
    linear = result.receipt.linear_result
    if method.begins_at_zero:
        return
    if linear is not None and not Result[linear].successful:
        return
    zero = [name for name, value in result.gradient.items() if value.numel() and not bool(value.any())]
    if zero:
        names = ", ".join(f"'{name}'" for name in zero)
        warnings.warn(
            f"the whole hypergradient of {names} is exactly zero in the first step, so that {type(method).__name__} does not "
            "move it yet: right where the solution does not react to it (a lasso that is all zero), but look whether it is "
            "multiplied by zero on its way to the outer loss.",
            stacklevel=3,
        )
