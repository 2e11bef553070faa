"""Implicit MAML beside first-order MAML on Omniglot: accuracy of the same 1,000 test tasks after the same time of training.

    python -m benchmarks.meta_accuracy --folder outputs/meta_accuracy          (an hour; goes on where it was cut short)

Every run is a process of its own, `python -m experiments.train experiment=NAME seed=S trainer.max_seconds=600`, one after the
other on all cores, with as many outer steps as a pilot of 40 says that fit: learning rates fall along a cosine, to zero at the
last one. The interval is that of the paired difference: the tasks are the same for all runs, and each counts with the
mean over the seeds. Differences of single seeds stand beside it, for three seeds say little of the spread over seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import Claim, Row, finish, parse, table
from benchmarks.kept import fingerprint
from bilevel.meta import Mean

OURS, OTHER = "imaml_omniglot", "fomaml_omniglot"
PILOT = 40  # outer steps
Keys = dict[str, object]
UNSCORED: Keys = {f"callbacks.evaluation.{key}": value for key, value in (("num_tasks", 2), ("every", "null"))}
QUICK: Keys = {**UNSCORED, "problem.num_tasks": 2, "model.num_filters": 8, "data.num_query": 1}


def trained(experiment: str, seed: int, seconds: float, folder: Path, keys: Keys) -> dict[str, Any]:
    """The summary of a run: that of an earlier command with the same code and seconds, gone on with where it was cut short."""
    where = folder / f"{experiment}_{seed}_{seconds:g}s_{fingerprint([])[:8]}"
    begun = sorted(where.glob("*/*/config.yaml"))
    found = [path for path in where.glob("*/*/summary.json") if "evaluation" in json.loads(path.read_text())]
    if begun and not found:
        found = [run(where, {"resume": begun[-1].parent})]
    if not found:
        with TemporaryDirectory() as scratch:
            chosen: Keys = {"experiment": experiment, "tracking": "none", **keys}
            pilot = run(Path(scratch), {**chosen, **UNSCORED, "output_dir": scratch, "trainer.num_steps": PILOT})
            records = [json.loads(line) for line in (pilot.parent / "metrics.jsonl").read_text().splitlines()]
        each_step = statistics.median(record["seconds"] for record in records if "step" in record)
        budget: Keys = {"trainer.max_seconds": seconds, "trainer.num_steps": int(seconds / each_step)}
        found = [run(where, {**chosen, **budget, "output_dir": where, "seed": seed})]
    summary: dict[str, Any] = json.loads(found[-1].read_text())
    print(f"{experiment}, seed {seed}: {Mean.of(each(summary))} after {summary['num_steps']} outer steps", flush=True)
    return summary


def run(where: Path, keys: Keys) -> Path:
    """The summary that a run leaves below a folder."""
    words = [f"{key}={value}" for key, value in keys.items()]
    command = [sys.executable, "-m", "experiments.train", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} failed:\n{done.stderr}")
    return sorted(where.glob("**/summary.json"))[-1]


def each(summary: dict[str, Any]) -> Tensor:
    """Scores of the test tasks, `(T,)`."""
    return torch.tensor(summary["evaluation"]["each"], dtype=torch.float64)


def main(argv: list[str] | None = None) -> int:
    """Train, and compare."""
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the runs (default: 0 1 2)")
    own.add_argument("--seconds", type=float, default=600.0, help="of training, each run (default: 600)")
    own.add_argument(
        "--folder", type=Path, default=Path("outputs/meta_accuracy"), help="where the runs are, or will be"
    )
    options = parse(str(__doc__).splitlines()[0], argv, device=False, parents=[own])
    seconds, keys = (3.0, QUICK) if options.quick else (options.seconds, {})
    with TemporaryDirectory() as scratch:
        folder = Path(scratch) if options.quick else options.folder
        runs = {
            (name, seed): trained(name, seed, seconds, folder, keys) for seed in options.seeds for name in (OURS, OTHER)
        }
    rows: list[Row] = []
    for (name, seed), summary in runs.items():
        score = Mean.of(each(summary))
        rows.append(
            {
                "experiment": name,
                "seed": seed,
                "outer steps": summary["num_steps"],
                "ended": summary["stopped_because"],
                "accuracy": score.value,
                "95 %": score.half_width,
                "floor": summary["evaluation"]["floor"],
            }
        )
    gaps = torch.stack([each(runs[OURS, seed]) - each(runs[OTHER, seed]) for seed in options.seeds])  # (S, T)
    print(table(rows))
    print(f"\n{OURS} minus {OTHER}, by seed: {', '.join(str(Mean.of(gap)) for gap in gaps)}")
    pooled = Mean.of(gaps.mean(0))
    print(f"all seeds, paired by task: {pooled}")
    claims = [
        Claim(
            "not significantly worse: upper end of the paired 95 % interval",
            pooled.value + pooled.half_width,
            0.0,
            at_least=True,
        ),
    ]
    return finish(options, rows, [] if options.quick else claims, {"difference": [pooled.value, pooled.half_width]})


if __name__ == "__main__":
    sys.exit(main())
