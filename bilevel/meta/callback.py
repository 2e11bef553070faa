"""Evaluation of a run on fixed tasks: now and then on validation tasks, at the end on test tasks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from bilevel.data import Examples
from bilevel.errors import UsageError
from bilevel.meta.evaluation import Adaptation, Mean, adapt, eager, evaluate, few_shot, fixed_tasks
from bilevel.trainer import Callback, RunStart

PICTURES = "episodes.safetensors"


class FewShotEvaluation(Callback):
    """Scores tasks that were not trained on, and keeps what the report shows of them.

    Records get `metrics.validation_SCORE` and its 95 % interval, and `metrics.validation_diverged` where inner solves diverged;
    the summary gets `validation` (by which settings can be compared: nothing should be chosen by test tasks), `evaluation` (the
    score of test tasks after each number of inner steps) and a table beside the floor.

    Args:
        num_tasks: test tasks at the end of the run; always the same ones for a `seed`.
        every: outer steps between evaluations on validation tasks; None makes none.
        num_validation_tasks: validation tasks each time; always the same ones.
        steps: numbers of inner steps to score at the end, besides 0 and those of the inner solver; also larger ones.
        max_steps: inner steps of test and validation tasks; None takes the inner solver's.
        num_pictures: test tasks that the report shows.
        seed: of the tasks.
    """

    def __init__(
        self,
        num_tasks: int = 1000,
        every: int | None = 100,
        num_validation_tasks: int = 200,
        steps: Sequence[int] = (1, 2, 4, 8),
        max_steps: int | None = None,
        num_pictures: int = 3,
        seed: int = 0,
    ) -> None:
        """Check the numbers."""
        least = {"num_tasks": 1, "num_validation_tasks": 1, "every": 1, "max_steps": 1, "num_pictures": 0, "seed": 0}
        given = vars()
        if not isinstance(steps, Sequence):
            raise UsageError(f"FewShotEvaluation needs steps to be a list of integers, but got {steps!r}.")
        for name, value in [*((name, given[name]) for name in least), *(("steps", step) for step in steps)]:
            if value is None and name in ("every", "max_steps"):
                continue
            if not isinstance(value, int) or value < least.get(name, 0):
                raise UsageError(
                    f"FewShotEvaluation needs {name} >= {least.get(name, 0)}, an integer, but got {value!r}."
                )
        self.num_tasks, self.every, self.num_validation_tasks = num_tasks, every, num_validation_tasks
        self.steps, self.max_steps, self.num_pictures, self.seed = tuple(steps), max_steps, num_pictures, seed

    def on_start(self, run: RunStart) -> None:
        """Keep what tasks adapt by."""
        self.run = run
        self.problem, self.score = run.setup.problem, few_shot(run.setup.problem).objective.score_name
        solver = run.setup.solver
        self.solver = solver if self.max_steps is None else replace(solver, max_steps=self.max_steps)
        tasks = few_shot(self.problem).tasks
        self.has_validation = tasks.has_part("validation")
        if not tasks.has_part("test"):
            raise UsageError(
                "FewShotEvaluation scores test tasks at the end of a run, but there are no classes for the test part of these "
                "tasks: give them some, or leave the callback out."
            )

    def on_step(self, record: dict[str, Any], hparams: dict[str, Tensor]) -> None:
        """Add the validation score to some records."""
        if self.every is None or not self.has_validation or (record["step"] + 1) % self.every:
            return
        found = self._validated(hparams)
        record[f"metrics.validation_{self.score}"] = found.final.value
        record[f"metrics.validation_{self.score}_half_width"] = found.final.half_width
        if found.num_diverged:
            record["metrics.validation_diverged"] = found.num_diverged

    def on_end(self, summary: dict[str, Any]) -> None:
        """Score validation and test tasks with the last hyperparameters; not where a run was cut short, which will go on."""
        if summary["num_steps"] == 0 or not summary["finished"]:
            return
        started = time.perf_counter()
        hparams = self.run.latest()
        if self.has_validation:
            final = self._validated(hparams).final
            summary["validation"] = {
                "score": self.score,
                "higher_is_better": few_shot(self.problem).objective.higher_is_better,
                "num_tasks": self.num_validation_tasks,
                "mean": final.value,
                "half_width": final.half_width,
            }
        found = evaluate(self.problem, self.solver, hparams, num_tasks=self.num_tasks, seed=self.seed, steps=self.steps)
        summary["evaluation"] = self._figures(found, time.perf_counter() - started)
        summary["baseline"] = self._table(found)
        if self.run.directory is not None and self.num_pictures:
            save_file(self._pictures(hparams), Path(self.run.directory) / PICTURES)

    def _validated(self, hparams: dict[str, Tensor]) -> Adaptation:
        return evaluate(
            self.problem, self.solver, hparams, part="validation", num_tasks=self.num_validation_tasks, seed=self.seed
        )

    def _figures(self, found: Adaptation, seconds: float) -> dict[str, Any]:
        curve = [Mean.of(scores) for scores in found.scores]
        return {
            "score": self.score,
            "higher_is_better": few_shot(self.problem).objective.higher_is_better,
            "num_tasks": self.num_tasks,
            "seed": self.seed,
            "inner_steps": list(found.steps),
            "mean": [one.value for one in curve],
            "half_width": [one.half_width for one in curve],
            "floor": Mean.of(found.floor).value,
            "num_steps": found.num_steps,
            "num_diverged": found.num_diverged,
            "each": found.each.tolist(),  # for differences of two runs on the same tasks
            "seconds": seconds,
        }

    def _table(self, found: Adaptation) -> dict[str, Any]:
        objective = few_shot(self.problem).objective
        rows = [[objective.floor_name, str(Mean.of(found.floor))]]
        rows += [
            [f"after {steps} inner steps", str(Mean.of(scores))]
            for steps, scores in zip(found.steps, found.scores, strict=True)
        ]
        if found.num_diverged:
            rows.append(["tasks that diverged, scored where they stopped", str(found.num_diverged)])
        return {
            "name": f"{objective.score_name} of {self.num_tasks} test tasks, 95 % interval",
            "columns": ["learner", objective.score_name],
            "rows": rows,
        }

    def _pictures(self, hparams: dict[str, Tensor]) -> dict[str, Tensor]:
        """A few test tasks: their sets, and outputs for the query inputs before and after adaptation."""
        group = self.problem.with_tasks(self.num_pictures)
        episode = fixed_tasks(few_shot(group), "test", range(self.num_pictures), self.seed)
        before, after = adapt(group, eager(self.solver), hparams, episode, (0, self.solver.max_steps)).outputs
        parts: dict[str, Examples] = {"support": episode.support, "query": episode.query}
        tensors = {f"{name}.{key}": value for name, part in parts.items() for key, value in part._asdict().items()}
        tensors |= {"outputs.before": before, "outputs.after": after}
        return {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
