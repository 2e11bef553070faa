"""The first look at what the user wrote: names, shapes and dtypes that do not fit become one sentence."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bilevel.batches import StepBatches, named_parts
from bilevel.broadcast import Broadcast
from bilevel.constraints import Bijections
from bilevel.errors import UsageError
from bilevel.flat import FlatProblem, natural_hparams
from bilevel.hypergradient.method import HypergradientMethod
from bilevel.hypergradient.paths import find_paths
from bilevel.problem import Problem
from bilevel.purity import disturbances
from bilevel.solvers import InnerSolver
from bilevel.solvers.options import bind
from bilevel.tree import TensorDict, detach, flatten_names

_MISTAKES = (RuntimeError, ValueError, LookupError, TypeError, AttributeError)
_TORCH = Path(torch.__file__).parent


@contextmanager
def blaming(problem: Problem, function: str, **given: Any) -> Iterator[None]:
    """What the user's function raises, as one sentence that names it, its cause and what it was given.

    Args:
        problem: the user's.
        function: the name of the function.
        given: its arguments; tensors in them are described, the rest left out.

    Raises:
        UsageError: the code inside raised; the original is the `__cause__`, for a debugger.
    """
    try:
        yield
    except (UsageError, torch.OutOfMemoryError):  # a sentence already, and no mistake of the function's
        raise
    except _MISTAKES as error:
        described = [f"{name} {_describe(value)}" for name, value in given.items() if value is not None]
        was_given = f", given {' and '.join(described)}" if described else ""
        raise UsageError(
            f"{type(problem).__name__}.{function} raised {_cause(error)}{was_given}: "
            "make the names, shapes, dtypes and devices fit each other."
        ) from error


class FirstLook(NamedTuple):
    """A problem between vectors, all of whose functions have been called once and differentiated."""

    flat: FlatProblem
    solver: InnerSolver  # its options fitted to the problem
    start: Tensor
    batches: StepBatches
    paths: dict[str, set[str]]  # from each hyperparameter to the outer loss


def first_look(
    problem: Problem, solver: InnerSolver, method: HypergradientMethod, hparams: Mapping[str, Tensor], step: int = 0
) -> FirstLook:
    """Call the problem's functions once, differentiate them, and fit the parts to the problem.

    Args:
        problem: the user's.
        solver: the inner solver.
        method: that the solver has to serve.
        hparams: where, natural units, as from `starting_hparams`.
        step: number of the outer step, which batches are a function of.

    Raises:
        UsageError: a function of the problem fails or does not return what it should, batches do not fit the tasks, or the
            parts do not fit each other.
    """
    _check_num_tasks(problem)
    with blaming(problem, "init_params", hparams=hparams):
        flat = FlatProblem.of(problem, hparams)
        with torch.no_grad():
            start = flat.start(hparams).detach()
    if not start.numel() or not start.is_floating_point():
        came = f"are {start.dtype}" if start.numel() else "have no entry"
        raise UsageError(f"{type(problem).__name__}.init_params was expected to return real numbers, but they {came}.")
    method.check(solver)
    solver, batches = bind_solver(solver, flat, hparams), StepBatches(problem, step)
    flat = _batched(flat, start, hparams, batches)
    with flat.purity.rehearsal():
        try_losses(flat, start, hparams, batches)
    given = {"params": flat.unravel(start), "hparams": hparams}
    with flat.purity.rehearsal(), blaming(problem, "inner_loss or outer_loss, differentiated,", **given):
        paths = find_paths(flat, solver, hparams, batches)
    return FirstLook(flat, solver, start, batches, paths)


def _batched(problem: FlatProblem, start: Tensor, hparams: Mapping[str, Tensor], batches: StepBatches) -> FlatProblem:
    """The problem as it is, or with its tasks in a loop where its functions can do without `vmap`, but not under it."""
    if problem.problem.num_tasks is None or problem.problem.handles_tasks:
        return problem
    try:
        with problem.purity.rehearsal():
            try_losses(problem, start, hparams, batches)
        return problem
    except UsageError as error:
        looped = replace(problem, looped=True)
        try:
            with problem.purity.rehearsal():
                try_losses(looped, start, hparams, batches)
        except UsageError:
            return problem  # no matter of vmap
        cause = error.__cause__ or error
        warnings.warn(
            f"the functions of {type(problem.problem).__name__} do not run under torch.vmap ({_cause(cause)}), so that the "
            f"{problem.problem.num_tasks} tasks are evaluated one after the other, which takes longer.",
            stacklevel=3,
        )
        return looped


def starting_hparams(problem: Problem) -> TensorDict:
    """The problem's own hyperparameters in natural units.

    Raises:
        UsageError: `init_hparams` fails, or returns none, or one that is not floating-point.
    """
    with blaming(problem, "init_hparams"):
        natural = detach(natural_hparams(problem))
    if not natural:
        raise UsageError(
            f"{type(problem).__name__}.init_hparams() returned no hyperparameter: there is nothing to tune."
        )
    for name, value in natural.items():
        if not value.is_floating_point():
            raise UsageError(f"hyperparameter '{name}' was expected to be floating-point, but is {value.dtype}.")
    return natural


def given_hparams(problem: Problem, hparams: Mapping[str, Any] | None) -> TensorDict:
    """Hyperparameters that a user gives, nested or with dotted names, where the problem is; None for the starting ones.

    Raises:
        UsageError: they are not those of the problem, or outside their constraints; or its own are none, see
            `starting_hparams`.
    """
    declared = starting_hparams(problem)
    if hparams is None:
        at = declared
    else:
        given = problem.place(flatten_names(hparams))
        if set(given) != set(declared):
            raise UsageError(f"hparams were expected to be {sorted(declared)}, but are {sorted(given)}.")
        for name, value in given.items():
            own = declared[name]
            if value.shape != own.shape or value.dtype != own.dtype:
                raise UsageError(
                    f"hyperparameter '{name}' was expected to have shape {tuple(own.shape)} and dtype {own.dtype}, but has "
                    f"{tuple(value.shape)} and {value.dtype}."
                )
        at = {name: given[name] for name in declared}
    Bijections.of(problem.constraints, list(at)).to_raw(at)  # raises where a value is outside its set
    return detach(at)


def _check_num_tasks(problem: Problem) -> None:
    number = problem.num_tasks
    if number is not None and (not isinstance(number, int) or number < 1):
        raise UsageError(
            f"{type(problem).__name__}.num_tasks must be an integer of at least 1, or None for a single system, "
            f"but is {number!r}."
        )


def try_losses(problem: FlatProblem, start: Tensor, hparams: Mapping[str, Tensor], batches: StepBatches) -> None:
    """Evaluate the inner problem and the outer loss once at the starting point.

    Raises:
        UsageError: one of them fails, does not return a scalar, or gets a batch that does not fit the tasks.
    """
    user = problem.problem
    with blaming(user, "inner_batches" if user.episodes is None else "episodes"):
        inner = batches.curvature
    with blaming(user, "outer_batches" if user.episodes is None else "episodes"):
        outer = batches.outer
    params = problem.layout.unravel(start if user.num_tasks is None else start[0])
    optimality = hasattr(user, "optimality")
    with blaming(user, "optimality" if optimality else "inner_loss", params=params, hparams=hparams, batch=inner):
        objective = problem.objective(inner)
        if objective.loss is None:
            with torch.no_grad():
                objective.gradient(start, hparams)
        else:
            objective.loss(start, hparams)
    with blaming(user, "outer_loss", params=params, hparams=hparams, batch=outer):
        problem.outer_loss(start, hparams, outer)


def declared_curvature(problem: Problem, hparams: Mapping[str, Tensor]) -> float | None:
    """What the problem says of the least curvature of its inner loss; None: nothing.

    Raises:
        UsageError: it is no method, fails, or returns no number.
    """
    declared: Any = problem.lower_curvature
    if not callable(declared):
        raise UsageError(
            f"{type(problem).__name__}.lower_curvature was expected to be a method of hyperparameters, but is {declared!r}: "
            f"write `def lower_curvature(self, hparams): return {declared!r}`."
        )
    with blaming(problem, "lower_curvature", hparams=hparams):
        bound = declared(hparams)
    if isinstance(bound, Tensor) and bound.numel() == 1:
        bound = bound.item()
    if bound is not None and not isinstance(bound, Real):
        came = f"a tensor of shape {tuple(bound.shape)}" if isinstance(bound, Tensor) else repr(bound)
        raise UsageError(
            f"{type(problem).__name__}.lower_curvature was expected to return one number or None, but returned {came}."
        )
    return None if bound is None else float(bound)


def check_arguments(problem: Any, solver: Any, method: Any) -> None:
    """Refuse what is no problem, no inner solver or no hypergradient method, a class instead of an object above all."""
    expected = (
        ("problem", problem, Problem, "an instance of your Problem"),
        ("solver", solver, InnerSolver, "an inner solver such as LBFGS()"),
        ("hypergradient", method, HypergradientMethod, "a method such as Implicit(linear_solver=ConjugateGradient())"),
    )
    for name, value, kind, example in expected:
        if isinstance(value, kind):
            continue
        if isinstance(value, type):
            raise UsageError(f"{name} was expected to be {example}, but is the class itself: write {value.__name__}().")
        raise UsageError(f"{name} was expected to be {example}, but is {value!r}.")


def bind_solver(solver: InnerSolver, problem: FlatProblem, hparams: Mapping[str, Tensor]) -> InnerSolver:
    """The solver with its options fitted to the problem's hyperparameters and parameters.

    Raises:
        UsageError: it needs the full batch where there are minibatches, an option names nothing that fits, or the problem's
            `broadcasts` hold something else.
    """
    if solver.full_batch and problem.problem.inner_batches is not None:
        raise UsageError(
            f"{type(solver).__name__} needs the full batch, but this problem has inner minibatches: "
            "use GradientDescent or TorchOptimizer."
        )
    held = problem.problem.broadcasts
    declared = held if isinstance(held, tuple | list) else (held,)
    for one in declared:
        if not isinstance(one, Broadcast):
            name = type(problem.problem).__name__
            raise UsageError(f"{name}.broadcasts was expected to hold Broadcast(s), but holds {one!r}.")
    return bind(solver, problem.layout, hparams, [one.owners for one in declared])


def report_impurities(problem: FlatProblem, start: Tensor, hparams: Mapping[str, Tensor], batches: StepBatches) -> None:
    """Warn of what makes the problem's functions change between evaluations and cannot be frozen, each by name."""
    objective, outer = problem.objective(batches.curvature), batches.outer
    name, inner = ("inner_loss", objective.loss) if objective.loss else ("optimality", objective.optimality)
    assert inner is not None
    found = disturbances(
        problem.purity,
        {name: lambda: inner(start, hparams), "outer_loss": lambda: problem.outer_loss(start, hparams, outer)},
        batches={"inner_batches": lambda: batches.curvature, "outer_batches": lambda: batches.outer},
        inputs={"params": start, **{f"hparams.{key}": value for key, value in hparams.items()}},
    )
    for finding in found:
        warnings.warn(str(finding), stacklevel=3)


def _cause(error: BaseException) -> str:
    """Type, words and place of an error, in one line."""
    words = " ".join(str(error).split()).rstrip(".")
    words = words if len(words) <= 300 else f"{words[:297]}..."
    frames = [one for one in traceback.extract_tb(error.__traceback__) if _TORCH not in Path(one.filename).parents]
    return f"{type(error).__name__} ({words}) at {Path(frames[-1].filename).name}:{frames[-1].lineno}"


def _describe(value: Any) -> str:
    """Names, shapes and dtypes of tensors, at most eight of them."""
    tensors = ((name, part) for name, part in _named(value) if isinstance(part, Tensor))
    shown = [f"{name}{tuple(part.shape)} {str(part.dtype).removeprefix('torch.')}" for name, part in islice(tensors, 9)]
    return "[" + ", ".join([*shown[:8], *(["..."] if len(shown) > 8 else [])]) + "]"


def _named(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, part in value.items():
            yield from named_parts(part, str(name))
    else:
        yield from named_parts(value, "")
