"""The linear solve behind an implicit hypergradient: made, looked at, handed to the policy, and put into words."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bilevel.errors import ConvergenceWarning
from bilevel.hypergradient.damping import Damping
from bilevel.hypergradient.negative_curvature import Handled, NegativeCurvature, System, met
from bilevel.linalg import Tag
from bilevel.result import Result, Solution

MAX_ROUNDS = 10  # of less damping; each comes closer to what was asked for


def solve_adjoint(
    system: System, policy: NegativeCurvature, x0: Tensor | None = None, damping: Damping | None = None
) -> Handled:
    """The solution and why it is biased; a `ConvergenceWarning` where it is none.

    Args:
        system: what is to be solved.
        policy: for negative curvature.
        x0: where to start.
        damping: what has chosen the system's damping; it may choose less. At negative curvature there is none: an eigenvalue
            that is as far below zero as the damping would become zero.
    """
    solution = system.solve(system.operator, x0)
    if damping is not None:
        system, solution = _with_less(system, solution, damping, x0)
    biased = (f"{type(system.solver).__name__} replaces the inverse Hessian",) * system.solver.biased
    if damping is not None and damping.biased and system.damping is not None:
        biased += (f"the Hessian is damped by {float(system.damping.max()):.3g}",)
    if Tag.symmetric in system.operator.tags and bool((negative := met(solution)).any()):
        solution, reasons, used = policy.handle(system, solution, negative)
        biased += reasons
        system = system._replace(damping=used)
    if not _worst(solution).successful:
        warnings.warn(_sentence(solution, system.vector), ConvergenceWarning, stacklevel=3)
    return Handled(solution, biased, system.damping)


def _with_less(system: System, solution: Solution, damping: Damping, x0: Tensor | None) -> tuple[System, Solution]:
    """The solve continued with less damping while the solution shows that it was too much; anew where it has to be none."""
    for _ in range(MAX_ROUNDS):
        if system.damping is None:
            break
        indefinite = bool(met(solution).any())
        less = None if indefinite else damping.revised(system.damping, system.rtol, system.vector, solution.value)
        if less is None and not indefinite:
            break
        system = system._replace(damping=less)
        again = system.solve(system.operator, x0 if indefinite else solution.value)
        everyone = torch.ones_like(solution.result, dtype=torch.bool)
        solution = replace(solution.continued_by(again, everyone), method=again.method)
    return system, solution


def describe_linear(solution: Solution, rhs: Tensor) -> dict[str, Any]:
    """The linear solve's part of a receipt."""
    return {
        "linear_residual": _relative_residual(solution, rhs),
        "num_mv": int(solution.num_mv.max()),
        "linear_method": solution.method,
        "linear_result": _worst(solution).name,
        "curvature_min": float(solution.curvature_min.min()),
        "curvature_max": float(solution.curvature_max.max()),
    }


def _worst(solution: Solution) -> Result:
    """The worst of the batch; a square system with no better than a least-squares solution is singular."""
    return Result.singular if solution.worst is Result.least_squares else solution.worst


def _relative_residual(solution: Solution, rhs: Tensor) -> float:
    size = rhs.norm(dim=-1)
    return float(torch.where(size > 0, solution.residual_norm / torch.where(size > 0, size, 1.0), 0.0).max())


def _sentence(solution: Solution, rhs: Tensor) -> str:
    worst = _worst(solution)
    does = "may be far off" if worst.usable else "is not applied"
    return (
        f"the linear solve of the hypergradient was expected to reach its tolerance, but ended with {worst.name} after "
        f"{int(solution.num_mv.max())} products at a relative residual of {_relative_residual(solution, rhs):.3g} "
        f"({worst.value}), so the hypergradient {does}."
    )
