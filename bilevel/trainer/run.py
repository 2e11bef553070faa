"""A run with a directory: callbacks, checkpoints, exact resume, and a summary."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from bilevel import jsonable
from bilevel.hypergradient import HypergradientMethod
from bilevel.problem import Problem
from bilevel.solvers import InnerSolver
from bilevel.trainer.callbacks import Callback, RunStart
from bilevel.trainer.checkpoint import load_checkpoint, save_checkpoint
from bilevel.trainer.optimizer import OptimizerFactory, SchedulerFactory
from bilevel.trainer.setup import Setup, set_up
from bilevel.trainer.state import TrainState
from bilevel.trainer.summary import summarise
from bilevel.trainer.trainer import Trainer
from bilevel.tree import detach


def run(
    problem: Problem,
    solver: InnerSolver,
    hypergradient: HypergradientMethod,
    optimizer: OptimizerFactory,
    trainer: Trainer,
    directory: Path,
    *,
    scheduler: SchedulerFactory | None = None,
    callbacks: Sequence[Callback] = (),
    config: dict[str, Any] | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Run the outer loop in a directory, from its newest checkpoint when resumed.

    Whatever ends the run, an exception or Ctrl-C in the middle of a step included, its last checkpoint is the state after
    the latest step that all callbacks have seen, so that a resumed run makes bitwise the rest of the same trajectory.

    Args:
        problem: the problem, on its device.
        solver: the inner solver.
        hypergradient: the method.
        optimizer: makes the outer optimiser from the raw hyperparameters.
        trainer: settings of the loop.
        directory: the run directory.
        scheduler: makes the learning-rate scheduler from the optimiser.
        callbacks: trackers and the user's own.
        config: the resolved configuration, for the trackers.
        resume: go on from the newest valid checkpoint.

    Returns:
        The summary, which is also written to `summary.json`.

    Raises:
        UsageError: the parts do not fit each other, or there is no valid checkpoint to resume from.
    """
    started = time.perf_counter()
    setup, state = set_up(problem, solver, hypergradient, optimizer, scheduler)
    if resume:
        _restore(state, directory / "checkpoints")
    start = RunStart.of(setup, state, trainer.num_steps, config, directory)
    for callback in callbacks:
        callback.on_start(start)
    log = _Log(directory, setup, state, trainer, callbacks, config or {}, started - state.wall_seconds)
    log.note()
    try:
        for _ in trainer.steps(setup, state, callbacks):
            log.note()
            if state.step % trainer.checkpoint_every == 0:
                log.save()
    except BaseException as error:
        log.rewind()
        reason = "interrupted" if isinstance(error, KeyboardInterrupt) else f"{type(error).__name__}: {error}"
        log.close(reason, finished=False)
        raise
    stopped = trainer.reason_to_stop(state)
    assert stopped is not None
    return log.close(stopped)


def _restore(state: TrainState, checkpoints: Path) -> None:
    """Load the newest valid checkpoint; a run that was stopped before its first one starts again."""
    if not checkpoints.is_dir() or not any(checkpoints.iterdir()):
        print(f"no checkpoint in {checkpoints} yet: the run starts again from step 0.", file=sys.stderr)
        return
    saved, _, complaints = load_checkpoint(checkpoints)
    for sentence in complaints:
        print(sentence, file=sys.stderr)
    state.load(saved)


@dataclass
class _Log:
    """What a run leaves in its directory, all of it about a state between two steps.

    Attributes:
        epoch: when the run would have begun, on this process's clock, had it never been stopped.
        noted: the state after the latest step that every callback has seen.
        saved: step of the newest checkpoint.
    """

    directory: Path
    setup: Setup
    state: TrainState
    trainer: Trainer
    callbacks: Sequence[Callback]
    config: dict[str, Any]
    epoch: float

    def __post_init__(self) -> None:
        self.saved = self.state.step

    def note(self) -> None:
        """The state is whole: remember it."""
        self.state.wall_seconds = time.perf_counter() - self.epoch
        self.noted = self.state.save()

    def rewind(self) -> None:
        """Undo a step that was cut short."""
        self.state.load(self.noted)

    def save(self) -> None:
        """Write the remembered state as a checkpoint."""
        checkpoints = self.directory / "checkpoints"
        save_checkpoint(checkpoints, self.noted["step"], self.noted, keep=self.trainer.keep_checkpoints)
        self.saved = self.noted["step"]

    def close(self, stopped: str, *, finished: bool = True) -> dict[str, Any]:
        """The last checkpoint, the hyperparameters and the summary, which the callbacks see and may add to."""
        if self.state.step > self.saved:
            self.save()
        if self.state.step > 0:  # also in a resumed run that has nothing left to do: the one before may have died here
            self._save_hparams()
        self.state.wall_seconds = time.perf_counter() - self.epoch
        summary = summarise(
            self.config, self.setup, self.state, stopped, monitor=self.trainer.monitor, finished=finished
        )
        try:
            for callback in self.callbacks:
                callback.on_end(summary)
        finally:
            if self.state.step > 0:
                _write_json(self.directory / "summary.json", summary)
        return summary

    def _save_hparams(self) -> None:
        """Natural hyperparameters: the best ones, which a user wants, and those that the next step would use."""
        with torch.no_grad():
            final = self.setup.natural(self.state.raw)
        for name, values in (("hparams", self.state.best.hparams), ("hparams_last", final)):
            tensors = {key: value.detach().cpu().contiguous().clone() for key, value in detach(values).items()}
            partial = self.directory / f"{name}.safetensors.tmp"
            save_file(tensors, partial)
            os.replace(partial, self.directory / f"{name}.safetensors")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(jsonable.encode(content), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(partial, path)
