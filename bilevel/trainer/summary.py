"""The final figures of a run, and what its numbers depend on."""

from __future__ import annotations

import platform
import resource
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from bilevel.trainer.setup import Setup
from bilevel.trainer.state import TrainState


def summarise(
    config: dict[str, Any],
    setup: Setup,
    state: TrainState,
    stopped: str,
    *,
    monitor: str | None = None,
    finished: bool = True,
) -> dict[str, Any]:
    """The final figures of a run; times and work are those of all the processes that made its steps.

    Args:
        config: resolved.
        setup: what the loop works with.
        state: after the last step.
        stopped: why there was no further one.
        monitor: the metric that the best step is the best by; None for the outer loss.
        finished: whether the run ended as it was meant to, not by an exception or an interruption.
    """
    best: dict[str, Any] = {}
    if state.best.step >= 0:
        metrics = {f"metrics.{name}": value for name, value in state.best.metrics.items()}
        best = {"step": state.best.step, "outer_loss": state.best.outer_loss, **metrics}
    return {
        "name": config.get("name", type(setup.problem.problem).__name__),
        "stopped_because": stopped,
        "finished": finished,
        "num_steps": state.step,
        "num_hparams": sum(value.numel() for value in state.best.hparams.values()),
        "best": best,  # the latest step where the outer losses of steps cannot be compared
        "monitor": monitor,
        "comparable": setup.problem.is_comparable,
        "final": state.record,
        "work": dict(state.work),
        "wall_seconds": state.wall_seconds,
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
