"""A run with a directory: callbacks, checkpoints, exact resume, and a summary."""

from __future__ import annotations

import json
import os
import platform
import resource
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from bilevel.hypergradient import HypergradientMethod
from bilevel.problem import Problem
from bilevel.solvers import InnerSolver
from bilevel.trainer.callbacks import Callback, RunStart
from bilevel.trainer.checkpoint import load_checkpoint, save_checkpoint
from bilevel.trainer.state import OptimizerFactory, SchedulerFactory, Setup, TrainState, set_up
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
    setup, state = set_up(problem, solver, hypergradient, optimizer, scheduler)
    checkpoints = directory / "checkpoints"
    if resume:
        _restore(state, checkpoints)
    with torch.no_grad():
        start = RunStart(config or {}, directory, state.step, trainer.num_steps, setup.natural(state.raw))
    for callback in callbacks:
        callback.on_start(start)
    started = time.perf_counter()
    stopped, made_steps = "an error", False
    try:
        steps = trainer.steps(setup, state)
        while True:
            try:
                record, hparams = next(steps)
            except StopIteration as end:
                stopped = end.value
                break
            made_steps = True
            for callback in callbacks:  # the record first: a checkpoint without its record could not be resumed exactly
                callback.on_step(record, hparams)
            if state.step % trainer.checkpoint_every == 0:
                save_checkpoint(checkpoints, state.step, state.save(), keep=trainer.keep_checkpoints)
    except KeyboardInterrupt:
        stopped = "interrupted"
        raise
    except Exception as error:
        stopped = f"{type(error).__name__}: {error}"
        raise
    finally:
        if made_steps:
            if stopped != "interrupted" and state.step % trainer.checkpoint_every:
                save_checkpoint(checkpoints, state.step, state.save(), keep=trainer.keep_checkpoints)
            _save_hparams(directory, setup, state)
        summary = summarise(config or {}, setup, state, stopped, time.perf_counter() - started)
        for callback in callbacks:
            callback.on_end(summary)
        if made_steps or resume:
            _write_json(directory / "summary.json", summary)
    return summary


def _restore(state: TrainState, checkpoints: Path) -> None:
    """Load the newest valid checkpoint; a run that was stopped before its first one starts again."""
    if not checkpoints.is_dir() or not any(checkpoints.iterdir()):
        print(f"no checkpoint in {checkpoints} yet: the run starts again from step 0.", file=sys.stderr)
        return
    saved, _, complaints = load_checkpoint(checkpoints)
    for sentence in complaints:
        print(sentence, file=sys.stderr)
    state.load(saved)


def summarise(config: dict[str, Any], setup: Setup, state: TrainState, stopped: str, wall: float) -> dict[str, Any]:
    """The final figures of a run."""
    best = {"step": state.best.step, "outer_loss": state.best.outer_loss} if state.best.step >= 0 else {}
    if best:
        flat = setup.problem
        metrics = flat.problem.metrics(flat.unravel(state.best.params), state.best.hparams)
        best.update({f"metrics.{name}": float(value) for name, value in metrics.items()})
    return {
        "name": config.get("name", type(setup.problem.problem).__name__),
        "stopped_because": stopped,
        "num_steps": state.step,
        "num_hparams": sum(value.numel() for value in state.best.hparams.values()),
        "best": best,
        "final": state.record,
        "work": dict(state.work),
        "wall_seconds": wall,
        "step_seconds": state.seconds,
        "peak_memory_mib": peak_memory_mib(),
        "num_threads": torch.get_num_threads(),
        "device": str(state.params.device),
        "dtype": str(state.params.dtype).removeprefix("torch."),
        "versions": versions(),
    }


def peak_memory_mib() -> float:
    """Largest resident size of this process so far, MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def versions() -> dict[str, str]:
    """Versions of what a run's numbers depend on."""
    found = {"python": platform.python_version()}
    for package in ("bilevel", "torch", "numpy", "hydra-core", "omegaconf", "scikit-learn"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _save_hparams(directory: Path, setup: Setup, state: TrainState) -> None:
    """Natural hyperparameters: the best ones, which a user wants, and those that the next step would use."""
    with torch.no_grad():
        final = setup.natural(state.raw)
    for name, values in (("hparams", state.best.hparams), ("hparams_last", final)):
        tensors = {key: value.detach().cpu().contiguous().clone() for key, value in detach(values).items()}
        partial = directory / f"{name}.safetensors.tmp"
        save_file(tensors, partial)
        os.replace(partial, directory / f"{name}.safetensors")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(_strict(content), indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _strict(value: Any) -> Any:
    """NaN and infinities as null: JSON has none."""
    if isinstance(value, dict):
        return {str(key): _strict(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(entry) for entry in value]
    if isinstance(value, float) and not abs(value) < float("inf"):
        return None
    return value
