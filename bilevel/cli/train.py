"""`train`: checks the command line, then lets `hydra.main` run the job or the sweep.

`hydra.main` does the running, so that sweepers, launchers, `--cfg` and completion work as everywhere; what it would
print about a mistake is said before, in one sentence.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bilevel.cli.arguments import Arguments, read_arguments
from bilevel.errors import NumericalError, UsageError

if TYPE_CHECKING:
    from omegaconf import DictConfig


def main(words: Sequence[str]) -> int:
    """Runs `train`.

    Args:
        words: what follows `train` on the command line.

    Returns:
        The exit status; see `bilevel.cli.main`.

    Raises:
        UsageError: a mistake in the command line or in a configuration.
    """
    arguments = read_arguments(words)
    if arguments.help:
        from bilevel.cli.help import train_help

        print(train_help(arguments.config_dir))
        return 0
    if arguments.show == ("--shell-completion",) and "install=bash" in arguments.overrides:
        from bilevel.cli.completion import BASH

        print(BASH)
        return 0
    return _run(_checked(arguments) if arguments.checked else arguments)


def _checked(arguments: Arguments) -> Arguments:
    """The full command line, after every check that needs no torch."""
    from bilevel.cli.preflight import preflight
    from bilevel.cli.resume import check_unchanged, with_recorded_overrides

    full, record = with_recorded_overrides(arguments)
    configs = preflight(full)
    if record is not None:
        check_unchanged(record, configs[0], configs[0]["resume"])
    return full


@dataclass
class _Outcome:
    """How the jobs that ran in this process ended."""

    num_jobs: int = 0
    sweep: Path | None = None  # the folder of the sweep, if it is one
    failures: list[Exception] = field(default_factory=list)


def _run(arguments: Arguments) -> int:
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from bilevel.cli.composer import HYDRA_VERSION_BASE, in_one_sentence
    from bilevel.cli.paths import CONFIG_NAME, conf_directory

    outcome = _Outcome()
    front = hydra.main(config_path=str(conf_directory()), config_name=CONFIG_NAME, version_base=HYDRA_VERSION_BASE)(
        _task(outcome)
    )
    with _as_hydra_wants_it(arguments), _termination_as_interruption():
        try:
            front()
        except Exception as error:
            if outcome.failures:  # a sweep, whose failures were told one by one
                return _after_sweep(outcome)
            if isinstance(error, HydraException | OmegaConfBaseException):
                raise UsageError(in_one_sentence(error)) from error
            raise
    if outcome.failures:
        raise outcome.failures[0]
    _report_sweep(outcome)
    return 0


def _task(outcome: _Outcome) -> Callable[[DictConfig], Any]:
    """The function that Hydra runs for each job.

    Hydra prints a line of its own about a job that raises. A single job therefore keeps its failure for `_run` to
    raise; a job of a sweep tells it at once and raises, which sweepers and launchers rely on, and the others go on.
    """

    def train(config: DictConfig) -> Any:
        from hydra.core.hydra_config import HydraConfig
        from hydra.types import RunMode

        from bilevel.cli.job import run_job
        from bilevel.cli.main import Fruitless, say

        outcome.num_jobs += 1
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            outcome.sweep = Path(HydraConfig.get().sweep.dir)
        try:
            return run_job(config)
        except Exception as failure:
            outcome.failures.append(failure)
            if HydraConfig.get().mode != RunMode.MULTIRUN:
                return None
            with contextlib.suppress(
                OSError
            ):  # the job's folder, which Hydra makes before the job: only if it is empty
                Path(HydraConfig.get().runtime.output_dir).rmdir()
            if isinstance(failure, UsageError | NumericalError | Fruitless):
                say(f"job {HydraConfig.get().job.num}: {failure}")
            else:
                traceback.print_exc()
            raise

    return train


def _after_sweep(outcome: _Outcome) -> int:
    from bilevel.cli.main import say

    _report_sweep(outcome)
    say(f"{len(outcome.failures)} of {outcome.num_jobs} jobs failed; the others are complete.")
    return 2 if all(isinstance(failure, UsageError) for failure in outcome.failures) else 1


def _report_sweep(outcome: _Outcome) -> None:
    """Writes the sweep's report and says where; a failure of it must not lose the sweep."""
    if outcome.sweep is None:
        return
    try:
        from bilevel.report import report

        print(f"report: {report(outcome.sweep)}", flush=True)
    except Exception as error:  # no job left a run, or whatever matplotlib or a full disk may say
        from bilevel.cli.main import say

        say(f"no report of the sweep: {error}.")


@contextmanager
def _termination_as_interruption() -> Iterator[None]:
    """SIGTERM, which schedulers send before they take a machine away, ends a run as Ctrl-C does: with a checkpoint."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _as_hydra_wants_it(arguments: Arguments) -> Iterator[None]:
    """Hydra reads `sys.argv`, and raises what went wrong to us only under `HYDRA_FULL_ERROR=1`."""
    words, full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = ["bilevel", *arguments.for_hydra()]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        sys.argv = words
        if full_error is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = full_error
