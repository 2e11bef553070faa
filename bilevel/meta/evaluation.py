"""How well tasks adapt: scores on fixed tasks that were not trained on, with intervals, beside a floor."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.data import Episode, Examples
from bilevel.errors import UsageError
from bilevel.flat import FlatProblem
from bilevel.meta.few_shot import FewShot
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
    """

    steps: tuple[int, ...]
    scores: Tensor
    floor: Tensor

    @property
    def final(self) -> Mean:
        """After the last step."""
        return Mean.of(self.scores[-1])


def evaluate(
    problem: FewShot | FlatProblem,
    solver: InnerSolver,
    hparams: Mapping[str, Tensor],
    *,
    part: str = "test",
    num_tasks: int = 1000,
    seed: int = 0,
    steps: Sequence[int] = (),
) -> Adaptation:
    """Let tasks adapt, and score them.

    The tasks are fixed: each is drawn by itself, a function of `part`, `seed` and its own number.

    Args:
        problem: a few-shot problem, or one between vectors.
        solver: adapts; its `max_steps` are the last number of steps.
        hparams: natural units.
        part: of the tasks.
        num_tasks: how many.
        seed: of the tasks.
        steps: numbers of inner steps to score besides 0 and the last one.

    Raises:
        UsageError: the problem is no few-shot problem.
    """
    flat = problem if isinstance(problem, FlatProblem) else FlatProblem.of(problem, hparams)
    few_shot(flat)
    marks = sorted({0, solver.max_steps, *(step for step in steps if 0 <= step < solver.max_steps)})
    scores, floors = [], []
    for group, episode in _groups(flat, part, num_tasks, seed):
        user = few_shot(group)
        floors.append(user.objective.floor(episode))
        scores.append(
            torch.stack(
                [
                    user.objective.score(outputs, episode.query.targets)
                    for outputs in adapt(group, solver, hparams, episode, marks)
                ]
            )
        )
    return Adaptation(tuple(marks), torch.cat(scores, -1).cpu(), torch.cat(floors).cpu())


def adapt(
    problem: FlatProblem, solver: InnerSolver, hparams: Mapping[str, Tensor], episode: Episode, marks: Sequence[int]
) -> Iterator[Tensor]:
    """Outputs for the query inputs after each of some numbers of inner steps, ascending; `(T, N, O)`."""
    user, objective = few_shot(problem), problem.objective(episode.support)
    with torch.no_grad(), problem.purity.solve():
        x, state, made = problem.start(hparams).detach(), None, 0
        for mark in marks:
            if mark > made:
                solution = run(solver, objective, x, hparams, state=state, max_steps=mark - made)
                x, state, made = solution.params, solution.state, mark
            yield torch.cat([_predict(user, problem, x, hparams, episode, i) for i in range(0, len(x), _size(user))])


def few_shot(problem: FlatProblem) -> FewShot:
    """The user's problem, if it is one of few-shot learning."""
    if not isinstance(problem.problem, FewShot):
        raise UsageError(
            f"few-shot evaluation needs a FewShot problem, but this is a {type(problem.problem).__name__}: "
            "leave the callback out."
        )
    return problem.problem


def fixed_tasks(problem: FewShot, part: str, numbers: Sequence[int], seed: int) -> Episode:
    """Tasks of an evaluation by their numbers."""
    drawn = [problem.tasks.draw(part, 1, seed, number) for number in numbers]

    def joined(name: str) -> Examples:
        sets = [getattr(one, name) for one in drawn]
        return Examples(torch.cat([one.inputs for one in sets]), torch.cat([one.targets for one in sets]))

    episode: Episode = problem.place(Episode(joined("support"), joined("query")))
    return episode


def _groups(problem: FlatProblem, part: str, num_tasks: int, seed: int) -> Iterator[tuple[FlatProblem, Episode]]:
    """As many tasks at a time as an outer step has."""
    size = problem.problem.num_tasks or 1
    for begin in range(0, num_tasks, size):
        numbers = range(begin, min(begin + size, num_tasks))
        yield problem.with_tasks(len(numbers)), fixed_tasks(few_shot(problem), part, numbers, seed)


def _size(user: FewShot) -> int:
    return user.tasks_at_once or user.num_tasks or 1


def _predict(
    user: FewShot, problem: FlatProblem, x: Tensor, hparams: Mapping[str, Tensor], episode: Episode, begin: int
) -> Tensor:
    """Outputs of some of the tasks."""
    tasks = slice(begin, begin + _size(user))
    support = Examples(episode.support.inputs[tasks], episode.support.targets[tasks])
    inputs, params = episode.query.inputs[tasks], problem.layout.unravel(x[tasks])
    if user.handles_tasks:
        return user.predict(params, hparams, support, inputs)
    each = [
        user.predict(
            {name: value[i] for name, value in params.items()},
            hparams,
            Examples(support.inputs[i], support.targets[i]),
            inputs[i],
        )
        for i in range(len(inputs))
    ]
    return torch.stack(each)
