"""Runs of `python -m experiments.train` for benchmarks: kept in a folder, and gone on with where a benchmark was cut short."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.kept import fingerprint

Keys = Mapping[str, object]
# Changes of a few-shot experiment for a run whose scores nobody reads, and for one that takes seconds.
UNSCORED: Keys = {f"callbacks.evaluation.{key}": value for key, value in (("num_tasks", 2), ("every", "null"))}
QUICK: Keys = {**UNSCORED, "threads": 1, "problem.num_tasks": 2, "model.num_filters": 8, "data.num_query": 1}


def of_this_code(folder: Path) -> Path:
    """The folder's part for runs of the present code."""
    return folder / fingerprint([])[:8]


def begun(where: Path) -> list[Path]:
    """The folders of runs below a folder, oldest first."""
    return [path.parent for path in sorted(where.glob("*/*/config.yaml"))]


def summary_of(where: Path, entry: str = "evaluation") -> dict[str, Any] | None:
    """The summary of the run below a folder; None where there is none with the entry that is made at the end of a run."""
    for file in where.glob("*/*/summary.json"):
        summary: dict[str, Any] = json.loads(file.read_text())
        if entry in summary:
            return summary
    return None


def completed(where: Path, keys: Callable[[], Keys], entry: str = "evaluation") -> dict[str, Any]:
    """The same; a run that was cut short goes on first, and one is made where there is none.

    Args:
        where: the folder of one run.
        keys: of a new run; asked for where one is made.
        entry: of the summary, that is made at the end of a run.

    Raises:
        RuntimeError: the command failed, or left no such entry.
    """
    summary = summary_of(where, entry)
    if summary is None:
        runs = begun(where)
        train({"resume": runs[-1]} if runs else {**keys(), "output_dir": where})
        summary = summary_of(where, entry)
    if summary is None:
        raise RuntimeError(f"the run below {where} ended without its {entry}.")
    return summary


def train(keys: Keys) -> None:
    """The command, with these keys.

    Raises:
        RuntimeError: it failed; what it said is in the message.
    """
    words = [f"{key}={value}" for key, value in keys.items()]
    command = [sys.executable, "-m", "experiments.train", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} failed:\n{done.stderr}")


def each(summary: dict[str, Any]) -> Tensor:
    """Scores of the test tasks of a few-shot run, `(T,)`."""
    return torch.tensor(summary["evaluation"]["each"], dtype=torch.float64)
