"""What an outer step of an experiment costs with one hyperparameter, and with many that have the same values."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from benchmarks.commands import Keys
from benchmarks.common import Row, experiment_parts, interleaved
from bilevel.trainer.setup import set_up


def outer_steps(experiment: str, key: str, kinds: Sequence[str], keys: Keys, rounds: int) -> list[Row]:
    """Time of a whole outer step at the starting values, from the starting weights, in turns: the inner problem is the same.

    Args:
        experiment: its name.
        key: that says how many hyperparameters there are.
        kinds: its values; the first one is what others are compared with.
        keys: other changes of the experiment.
        rounds: timed steps of each.
    """
    steps, numbers = {}, {}
    for kind in kinds:
        words = [f"{name}={value}" for name, value in {**keys, key: kind}.items()]
        parts = experiment_parts(experiment, *words)
        setup, state = set_up(parts.problem, parts.solver, parts.hypergradient, parts.optimizer, parts.scheduler)
        numbers[kind] = sum(value.numel() for value in state.raw.values())
        steps[kind] = partial(_step, parts, setup, state, state.save())
    seconds = interleaved(steps, rounds)
    return [
        {
            "what": "outer step",
            "hyperparameters": numbers[kind],
            "seconds": taken,
            "over one": taken / seconds[kinds[0]],
        }
        for kind, taken in seconds.items()
    ]


def _step(parts: Any, setup: Any, state: Any, saved: Any) -> None:
    state.load(saved)
    parts.trainer.step(setup, state)
