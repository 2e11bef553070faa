"""One job: a composed configuration becomes objects, a run folder, and a run. The only module here that needs torch.

The order matters: everything that a configuration describes is built before the folder is made. What only the problem's
first step can show (an exception in the user's losses, say) comes later, and takes the folder away again: whatever went
wrong, there is a folder if and only if a step was recorded in it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from bilevel.cli.allow import check_hydra, check_targets
from bilevel.cli.build import build
from bilevel.cli.composer import resolve
from bilevel.cli.directories import RunDirectory, new_run_directory, read_record, sweep_job_directory, write_record
from bilevel.cli.main import Fruitless, Interrupted, say
from bilevel.cli.resume import check_unchanged
from bilevel.cli.settings import Settings
from bilevel.errors import ConvergenceWarning


@dataclass(frozen=True)
class Parts:
    """The objects that a configuration describes.

    Attributes:
        problem: on the job's device and in its dtype.
        solver: the inner solver.
        hypergradient: the hypergradient method.
        optimizer: makes the outer optimiser from a list of tensors.
        scheduler: makes its scheduler from the optimiser; None when there is none.
        trainer: the settings of the outer loop.
        callbacks: the user's callbacks.
        trackers: all but metrics.jsonl.
    """

    problem: Any
    solver: Any
    hypergradient: Any
    optimizer: Callable[..., torch.optim.Optimizer]
    scheduler: Callable[..., Any] | None
    trainer: Any
    callbacks: tuple[Any, ...]
    trackers: tuple[Any, ...]

    @property
    def keywords(self) -> dict[str, Any]:
        """What `fit`, `run` and `plan` take beside the problem, by their names for it."""
        names = ("solver", "hypergradient", "optimizer", "scheduler", "trainer")
        return {name: getattr(self, name) for name in names}


def run_job(config: DictConfig) -> float:
    """Runs one job of `train`.

    Args:
        config: the composed configuration, without Hydra's own.

    Returns:
        What sweepers minimise, see `minimised`.

    Raises:
        UsageError: something in the configuration is wrong.
        Interrupted: Ctrl-C; its message says how to continue.
        Fruitless: no hypergradient of the run could be applied.
        Exception: whatever the problem's own code or a callback raises. No folder is left behind unless it holds a step.
    """
    plain, hydra = resolve(config), HydraConfig.get()
    settings = Settings.of(plain)
    check_targets(plain)
    check_hydra(hydra)
    if settings.resume is not None:
        check_unchanged(read_record(settings.resume), plain, settings.resume)
    parts = assemble(plain, *settings.apply())
    directory = _open_directory(settings)
    warnings.simplefilter("ignore", ConvergenceWarning)  # the trackers tell the same, once and in their place
    try:
        if settings.resume is None:
            _write_record(directory.path, plain)
        summary = run_trainer(parts, plain, directory.path, resume=settings.resume is not None)
    except KeyboardInterrupt as stop:
        raise Interrupted(_after_interruption(directory)) from stop
    except BaseException:  # also what is no Exception, such as the SystemExit of a problem that gives up
        directory.discard_if_unused()
        raise
    _write_report(directory.path)
    print(f"summary: {directory.path / 'summary.json'}", flush=True)
    value = minimised(summary)
    if value is None:
        raise Fruitless(f"no hypergradient was applied in {directory.path}: {summary.get('stopped_because')}.")
    return value


def minimised(summary: Mapping[str, Any]) -> float | None:
    """The figure by which runs of a sweep compare, the smaller the better.

    Outer losses of tasks drawn anew in each step do not compare: there it is the score of the validation tasks.

    Args:
        summary: of the run.

    Returns:
        The validation score, negated where a higher one is better, or the best outer loss or monitored metric; None where
        nothing was applied.

    Example:
        >>> minimised({"best": {"outer_loss": 0.25}})
        0.25
        >>> minimised({"best": {"outer_loss": 0.25}, "validation": {"mean": 0.9, "higher_is_better": True}})
        -0.9
        >>> minimised({"best": {"outer_loss": 0.25, "metrics.holdout_loss": 0.3}, "monitor": "holdout_loss"})
        0.3
    """
    monitor = summary.get("monitor")
    best = (summary.get("best") or {}).get(f"metrics.{monitor}" if monitor else "outer_loss")
    validation = summary.get("validation")
    if best is None or validation is None:
        return None if best is None else float(best)
    return -float(validation["mean"]) if validation["higher_is_better"] else float(validation["mean"])


def run_trainer(parts: Parts, config: Mapping[str, Any], directory: Path, *, resume: bool) -> Mapping[str, Any]:
    """Hands a job to the outer loop: the one place where the command line meets the trainer.

    Args:
        parts: the objects.
        config: the resolved configuration, for the trackers and the checkpoints.
        directory: the run folder.
        resume: whether to go on from the newest checkpoint in it.

    Returns:
        The summary of the run.
    """
    from bilevel.tracking import JsonlTracker
    from bilevel.trainer import run

    summary: Mapping[str, Any] = run(
        problem=parts.problem,
        **parts.keywords,
        # Callbacks first: what they add to records and summary is for the trackers to keep and to show.
        callbacks=[*parts.callbacks, JsonlTracker(directory / "metrics.jsonl"), *parts.trackers],
        config=dict(config),
        directory=directory,
        resume=resume,
    )
    return summary


def assemble(config: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> Parts:
    """Builds the objects of a job, node by node.

    Args:
        config: the resolved configuration.
        device: where the problem goes.
        dtype: the dtype it takes.

    Raises:
        UsageError: a node is wrong.
    """
    # Built in torch's own dtype and moved then: generators draw other numbers in another dtype, and the data must not
    # change with it. What the problem makes later is made in its dtype at once.
    torch.set_default_dtype(torch.float32)  # a job of a sweep may have left another
    problem = build(config["problem"], "problem").to(device=device, dtype=dtype)
    torch.set_default_dtype(dtype)
    return Parts(
        problem=problem,
        solver=build(config["solver"], "solver"),
        hypergradient=build(config["hypergradient"], "hypergradient"),
        optimizer=_factory(config["outer_optimizer"], "outer_optimizer"),
        scheduler=_factory(config.get("outer_scheduler"), "outer_scheduler"),
        trainer=build(config["trainer"], "trainer"),
        callbacks=tuple(_callbacks(config.get("callbacks") or {})),
        trackers=tuple(_trackers(config.get("tracking") or {})),
    )


def _factory(node: Mapping[str, Any] | None, where: str) -> Any:
    """What makes the object later: the outer optimiser wants tensors that only the trainer has."""
    return None if node is None else build({**node, "_partial_": True}, where)


def _trackers(nodes: Mapping[str, Any]) -> list[Any]:
    """The trackers of the configuration; one whose mode is `disabled` is not even imported."""
    named = {name: node for name, node in nodes.items() if isinstance(node, Mapping)}
    return [build(node, f"tracking.{name}") for name, node in named.items() if node.get("mode") != "disabled"]


def _callbacks(nodes: Mapping[str, Any]) -> list[Any]:
    return [build(node, f"callbacks.{name}") for name, node in nodes.items() if node is not None]


def _open_directory(settings: Settings) -> RunDirectory:
    hydra = HydraConfig.get()
    if settings.resume is not None:
        return RunDirectory(Path(settings.resume).expanduser())
    if hydra.mode == RunMode.MULTIRUN:
        return sweep_job_directory(hydra.runtime.output_dir)
    return new_run_directory(settings.output_dir, settings.name)


def _write_record(path: Path, config: Mapping[str, Any]) -> None:
    """Writes the command and its configuration into a new folder, for people and for `resume=DIR`."""
    hydra = HydraConfig.get()
    searched = [text for text in hydra.overrides.hydra if text.startswith("hydra.searchpath=")]
    extra = [source.path for source in hydra.runtime.config_sources if source.provider == "command-line"]
    overrides = OmegaConf.to_container(hydra.overrides.task)
    assert isinstance(overrides, list)
    write_record(path, config, [*searched, *overrides], Path(extra[0]) if extra else None)


def _after_interruption(directory: RunDirectory) -> str:
    if directory.has_checkpoint:
        return f"interrupted: go on with python -m bilevel train resume={directory.path}"
    if directory.discard_if_unused():
        return "interrupted before the first step, so nothing was written."
    return f"interrupted before the first checkpoint, so {directory.path} cannot be continued: start again."


def _write_report(directory: Path) -> None:
    """Writes the report; a failure of it must not lose the run."""
    try:
        from bilevel.report import write_report

        write_report(directory)
    except Exception as error:  # whatever matplotlib or a full disk may say
        say(f"no report: {error}; the run is complete, try python -m bilevel report {directory}.")
