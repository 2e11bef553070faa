"""How well tasks adapt: scores on fixed tasks that were not trained on, with intervals, beside a floor."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bilevel.batches import take
from bilevel.data import Episode, Examples
from bilevel.errors import UsageError
from bilevel.flat import FlatProblem
from bilevel.hypergradient.trial import first_look, given_hparams
from bilevel.meta.few_shot import FewShot
from bilevel.meta.first_order import FirstOrder
from bilevel.problem import Problem
from bilevel.solvers import InnerSolver, run

Z95 = 1.959964  # half the width of a normal distribution's central 95 %, in standard deviations


@dataclass(frozen=True)
class Mean:
    """A mean over independent tasks with its 95 % interval.

    Attributes:
        value: the mean.
        half_width: of the interval, by the normal approximation.

    Example:
        >>> print(Mean.of(torch.tensor([0.8, 1.0, 0.9, 0.9])))
        0.9000 ± 0.0800
    """

    value: float
    half_width: float

    @classmethod
    def of(cls, scores: Tensor) -> Mean:
        """Of one score a task, `(T,)`."""
        spread = float(scores.double().std()) if len(scores) > 1 else math.nan
        return cls(float(scores.double().mean()), Z95 * spread / math.sqrt(len(scores)))

    def __str__(self) -> str:
        return f"{self.value:.4f} ± {self.half_width:.4f}"


@dataclass(frozen=True)
class Adaptation:
    """Scores of tasks on their query sets along the inner solve.

    Attributes:
        steps: inner steps made, ascending, 0 first.
        scores: after each of these numbers of steps, `(len(steps), T)`.
        floor: of something that learns nothing from other tasks, `(T,)`.
        num_steps: those of the inner solver, one of `steps`, after which tasks count as adapted.
        num_diverged: tasks whose inner solve diverged; they are scored where it stopped.
    """

    steps: tuple[int, ...]
    scores: Tensor
    floor: Tensor
    num_steps: int
    num_diverged: int = 0

    @property
    def each(self) -> Tensor:
        """Scores of the adapted tasks, `(T,)`."""
        return self.scores[self.steps.index(self.num_steps)]

    @property
    def final(self) -> Mean:
        """Their mean."""
        return Mean.of(self.each)


def evaluate(
    problem: FewShot | FlatProblem,
    solver: InnerSolver,
    hparams: Mapping[str, Any] | None = None,
    *,
    part: str = "test",
    num_tasks: int = 1000,
    seed: int = 0,
    steps: Sequence[int] = (),
) -> Adaptation:
    """Let tasks adapt, and score them.

    The tasks are fixed: each is drawn by itself, a function of `part`, `seed` and its own number. As many adapt at a time as
    an outer step has, with its compiled programs where the solver compiles; the rest, a smaller number, is not worth another
    program, and is eager.

    Args:
        problem: a few-shot problem, or one between vectors.
        solver: adapts, in `max_steps` steps.
        hparams: natural units, nested or with dotted names; None for those that the problem starts with.
        part: of the tasks.
        num_tasks: how many.
        seed: of the tasks.
        steps: numbers of inner steps to score besides 0 and the solver's own, also larger ones.

    Raises:
        UsageError: the problem is no few-shot problem, the hyperparameters are not those of the problem, or a number is below
            what it counts from.
    """
    user = few_shot(problem)
    if num_tasks < 1 or any(step < 0 for step in steps):
        raise UsageError(
            f"evaluate needs num_tasks of at least 1 and steps of at least 0, but got {num_tasks} and {list(steps)}."
        )
    hparams, flat = given_hparams(user, hparams), problem
    if isinstance(flat, Problem):
        flat, solver, *_ = first_look(flat, solver, FirstOrder(), hparams)
    marks = sorted({0, solver.max_steps, *steps})
    scores, floors, diverged = [], [], 0
    for group, episode in _groups(flat, part, num_tasks, seed):
        adapted = adapt(group, solver if group is flat else eager(solver), hparams, episode, marks)
        floors.append(user.objective.floor(episode))
        scores.append(torch.stack([user.objective.score(one, episode.query.targets) for one in adapted.outputs]))
        diverged += adapted.num_diverged
    joined = torch.cat(scores, -1).cpu()
    return Adaptation(tuple(marks), joined, torch.cat(floors).cpu(), solver.max_steps, diverged)


class Adapted(NamedTuple):
    """Tasks on the way to their solutions.

    Attributes:
        outputs: for the query inputs, after each of some numbers of steps, `(T, N, O)`.
        num_diverged: tasks whose inner solve diverged.
    """

    outputs: list[Tensor]
    num_diverged: int


def adapt(
    problem: FlatProblem, solver: InnerSolver, hparams: Mapping[str, Tensor], episode: Episode, marks: Sequence[int]
) -> Adapted:
    """Let tasks adapt; `marks` are the numbers of inner steps, ascending, after which outputs are wanted.

    Random numbers of the problem are the same ones in each call, and are not missed by anyone afterwards. Where a task
    diverges, which ends the solve of all, each is solved by itself.
    """
    with torch.no_grad(), problem.purity.rehearsal():
        outputs, usable = _solve(problem, solver, hparams, episode, marks)
        number = len(outputs[0])
        if usable or number == 1:
            return Adapted(outputs, 0 if usable else 1)
        alone = problem.with_tasks(1)
        each = [_solve(alone, eager(solver), hparams, take(episode, slice(i, i + 1)), marks) for i in range(number)]
    joined = [torch.cat(parts) for parts in zip(*(outputs for outputs, _ in each), strict=True)]
    return Adapted(joined, sum(not usable for _, usable in each))


def _solve(
    problem: FlatProblem, solver: InnerSolver, hparams: Mapping[str, Tensor], episode: Episode, marks: Sequence[int]
) -> tuple[list[Tensor], bool]:
    """Outputs after each of the numbers of steps, and whether the inner solve has not diverged."""
    objective_of = problem.compiled_objective if solver.compile else problem.objective
    objective = objective_of(episode.support)
    x, state, made, usable = problem.start(hparams).detach(), None, 0, True
    outputs = []
    for mark in marks:
        if mark > made and usable:
            solution = run(solver, objective, x, hparams, state=state, max_steps=mark - made)
            x, state, made, usable = solution.params, solution.state, mark, solution.result.usable
        outputs.append(_predict(problem, x, hparams, episode))
    return outputs, usable


def eager(solver: InnerSolver) -> InnerSolver:
    """The solver without compiled gradients: for tasks in a number of which there are too few to pay for a program."""
    return replace(solver, compile=False)


def few_shot(problem: Problem | FlatProblem) -> FewShot:
    """The user's problem, if it is one of few-shot learning."""
    user = problem.problem if isinstance(problem, FlatProblem) else problem
    if not isinstance(user, FewShot):
        raise UsageError(
            f"few-shot evaluation needs a FewShot problem, but this is a {type(user).__name__}: leave the callback out."
        )
    return user


def fixed_tasks(problem: FewShot, part: str, numbers: Sequence[int], seed: int) -> Episode:
    """Tasks of an evaluation by their numbers."""
    drawn = [problem.tasks.draw(part, 1, seed, number) for number in numbers]

    def joined(name: str) -> Examples:
        sets = [getattr(one, name) for one in drawn]
        return Examples(torch.cat([one.inputs for one in sets]), torch.cat([one.targets for one in sets]))

    episode: Episode = problem.place(Episode(joined("support"), joined("query")))
    return episode


def _groups(problem: FlatProblem, part: str, num_tasks: int, seed: int) -> Iterator[tuple[FlatProblem, Episode]]:
    """As many tasks at a time as an outer step has, by the problem itself; then the rest."""
    size = problem.problem.num_tasks or 1
    for begin in range(0, num_tasks, size):
        numbers = range(begin, min(begin + size, num_tasks))
        group = problem if len(numbers) == size else problem.with_tasks(len(numbers))
        yield group, fixed_tasks(few_shot(problem), part, numbers, seed)


def _predict(problem: FlatProblem, params: Tensor, hparams: Mapping[str, Tensor], episode: Episode) -> Tensor:
    """Outputs of all tasks for their query inputs, of as many at a time as the problem's `tasks_at_once` says."""

    def single(x: Tensor, hparams: Mapping[str, Tensor], task: Episode) -> Tensor:
        return few_shot(problem).predict(problem.layout.unravel(x), hparams, task.support, task.query.inputs)

    parts = problem.in_parts(params, episode)
    return torch.cat([part.over_tasks(single, "predict", "episodes", task)(x, hparams) for part, x, task in parts])
