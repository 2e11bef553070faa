"""Reports: a run or a sweep as one self-contained HTML page, from nothing but the files in its directory."""

from __future__ import annotations

import os
from pathlib import Path

from bilevel.report.load import find_runs, is_run, load_run, load_sweep

__all__ = ["report", "write_report", "write_sweep_report"]


def report(directory: str | os.PathLike[str]) -> Path:
    """Write the report of a run directory, or of a folder that holds some (a sweep).

    Returns:
        The path of `report.html`.

    Raises:
        UsageError: `directory` is neither.
    """
    path = Path(directory)
    return write_sweep_report(path) if not is_run(path) and find_runs(path) else write_report(path)


def write_report(directory: str | os.PathLike[str]) -> Path:
    """Write `report.html` and `figures/*.png` into a run directory.

    Reads `metrics.jsonl`, `summary.json`, `config.yaml` and `hparams.safetensors`, and does with what there is:
    a run that was killed or has taken one step has a report too.

    Returns:
        The path of `report.html`.

    Raises:
        UsageError: `directory` is not a run directory, or one of its files is damaged.
    """
    run = load_run(Path(directory))
    from bilevel.report.html import run_page  # matplotlib, which takes a second to import, comes with it

    return run_page(run)


def write_sweep_report(directory: str | os.PathLike[str]) -> Path:
    """Write `report.html` and `figures/*.png` into a sweep's folder: a leaderboard and the runs' curves in one plot.

    Returns:
        The path of `report.html`.

    Raises:
        UsageError: `directory` holds no run directory.
    """
    sweep = load_sweep(Path(directory))
    from bilevel.report.sweep import sweep_page

    return sweep_page(sweep)
