"""One hypergradient of a problem, without an outer loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from bilevel.hypergradient.implicit import Implicit
from bilevel.hypergradient.method import HypergradientMethod, differentiate, start_method
from bilevel.hypergradient.paths import check_not_all_zero, check_paths
from bilevel.hypergradient.trial import check_arguments, first_look, given_hparams, report_impurities
from bilevel.problem import Problem
from bilevel.receipt import Receipt
from bilevel.solvers import LBFGS, GradientDescent, InnerSolver
from bilevel.tree import TensorDict


@dataclass(frozen=True)
class Evaluation:
    """A hypergradient by names.

    Attributes:
        gradient: `d outer_loss / d hparams`, natural units, one tensor a hyperparameter.
        receipt: what it is worth.
        params: the inner solution, with a leading task dimension if there are tasks.
        outer_loss: there, the mean over tasks.
        inner_loss: there, the mean over tasks; NaN for a problem without one.
    """

    gradient: TensorDict
    receipt: Receipt
    params: TensorDict
    outer_loss: float
    inner_loss: float


def default_solver(problem: Problem) -> InnerSolver:
    """L-BFGS, or gradient descent for a problem with inner minibatches, whose losses cannot be compared."""
    return LBFGS() if problem.inner_batches is None else GradientDescent()


def hypergradient_at(
    problem: Problem,
    hparams: Mapping[str, Tensor] | None = None,
    *,
    method: HypergradientMethod | None = None,
    solver: InnerSolver | None = None,
    step: int = 0,
) -> Evaluation:
    r"""Solve the inner problem and differentiate the outer loss: `d/dθ outer_loss(params*(θ), θ)`.

    Warns of a hyperparameter whose whole hypergradient is exactly zero, as the first step of `fit` does.

    Args:
        problem: the problem.
        hparams: where, in natural units, nested or with dotted names; `init_hparams()` by default.
        method: implicit with conjugate gradient at its own tolerance by default: `Implicit.auto()`, the default of `fit`,
            starts loosely and learns from step to step, of which there is one here.
        solver: the inner solver; L-BFGS by default, gradient descent for problems with minibatches.
        step: number of the outer step, which minibatches are a function of.

    Raises:
        UsageError: `hparams` are not those of the problem or outside their constraints, one is out of the method's reach,
            or the parts do not fit each other.

    Example:
        >>> import torch
        >>> from bilevel import Problem, hypergradient_at
        >>> class Shrink(Problem):
        ...     def init_hparams(self):
        ...         return {"penalty": torch.tensor(3.0)}
        ...     def init_params(self, hparams):
        ...         return {"w": torch.zeros(1)}
        ...     def inner_loss(self, params, hparams, batch):  # solution: w = 2 / (1 + penalty)
        ...         return (params["w"] - 2).square().sum() + hparams["penalty"] * params["w"].square().sum()
        ...     def outer_loss(self, params, hparams, batch):  # derivative: 2 (w - 1) * (-2 / (1 + penalty)²)
        ...         return (params["w"] - 1).square().sum()
        >>> found = hypergradient_at(Shrink())
        >>> round(float(found.gradient["penalty"]), 4), found.receipt.linear_result
        (0.125, 'converged')
    """
    method = Implicit() if method is None else method
    solver = default_solver(problem) if solver is None else solver
    check_arguments(problem, solver, method)
    at = given_hparams(problem, hparams)
    flat, solver, start, batches, paths = first_look(problem, solver, method, at, step)
    check_paths(method, solver, paths)
    report_impurities(flat, start, at, batches)
    result = differentiate(method, flat, solver, start, at, batches, start_method(method, flat, solver, start, at))
    if all(bool(value.isfinite().all()) for value in result.gradient.values()):
        check_not_all_zero(result, method)
    return Evaluation(
        result.gradient, result.receipt, flat.unravel(result.params), result.outer_loss, result.inner_loss
    )
