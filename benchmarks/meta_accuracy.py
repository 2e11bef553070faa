"""Implicit MAML beside first-order MAML on Omniglot: accuracy of the same 1,000 test tasks after the same time of training.

    python -m benchmarks.meta_accuracy --folder outputs/meta_accuracy          (an hour; goes on where it was cut short)

Every run is a process of its own, `python -m experiments.train experiment=NAME seed=S trainer.max_seconds=600`, one after the
other on all cores, with as many outer steps as a pilot of 100 says that fit (the column `planned`; one pilot for all seeds of
an experiment): learning rates fall along a cosine, to zero at the last of these. The interval is that of the paired difference:
the tasks are the same for all runs, and each counts with the mean over the seeds. Differences of single seeds stand beside it,
for three seeds say little of the spread over seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from omegaconf import OmegaConf

from benchmarks.commands import QUICK, UNSCORED, Keys, begun, completed, each, of_this_code, train
from benchmarks.common import Claim, Row, finish, parse, table
from benchmarks.kept import fingerprint
from bilevel.meta import Mean

OURS, OTHER = "imaml_omniglot", "fomaml_omniglot"
PILOT = 100  # outer steps
SLACK = 0.03  # of a step's time, so that a run comes to the end of its schedule


def trained(experiment: str, seed: int, seconds: float, folder: Path, keys: Keys) -> tuple[dict[str, Any], int]:
    """The summary of a run and the outer steps that it was to have."""
    kept = of_this_code(folder)
    where, plan = kept / f"{experiment}_{seed}_{seconds:g}s", kept / f"{experiment}_{seconds:g}s.txt"
    chosen: Keys = {"experiment": experiment, "tracking": "none", **keys}
    limits = {"trainer.max_seconds": seconds, "seed": seed}
    summary = completed(where, lambda: {**chosen, **limits, "trainer.num_steps": fitting(plan, chosen, seconds)})
    print(f"{experiment}, seed {seed}: {Mean.of(each(summary))} after {summary['num_steps']} outer steps", flush=True)
    return summary, OmegaConf.load(begun(where)[-1] / "config.yaml").trainer.num_steps


def fitting(plan: Path, keys: Keys, seconds: float) -> int:
    """As many outer steps as a pilot says that fit; kept in a file, so that they are the same for all seeds."""
    if not plan.exists():
        with TemporaryDirectory() as scratch:
            train({**keys, **UNSCORED, "output_dir": scratch, "trainer.num_steps": PILOT})
            lines = (begun(Path(scratch))[-1] / "metrics.jsonl").read_text().splitlines()
        steps = [record["seconds"] for record in map(json.loads, lines) if "step" in record]
        plan.parent.mkdir(parents=True, exist_ok=True)
        plan.write_text(str(int(seconds / ((1 + SLACK) * statistics.fmean(steps[len(steps) // 10 :])))))
    return int(plan.read_text())


def differences(ours: list[dict[str, Any]], others: list[dict[str, Any]]) -> tuple[list[Mean], Mean]:
    """Of the scores, paired by task: of each seed, and of the means over the seeds.

    Raises:
        RuntimeError: the runs have scored other tasks.
    """
    if len({summary["evaluation"]["floor"] for summary in [*ours, *others]}) > 1:
        raise RuntimeError("the runs have scored other tasks: what learns nothing has got another score in one.")
    gaps = torch.stack([each(one) - each(other) for one, other in zip(ours, others, strict=True)])  # (S, T)
    return [Mean.of(gap) for gap in gaps], Mean.of(gaps.mean(0))


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
    seeds = options.seeds[:1] if options.quick else options.seeds
    with TemporaryDirectory() as scratch:
        folder = Path(scratch) if options.quick else options.folder
        runs = {(name, seed): trained(name, seed, seconds, folder, keys) for seed in seeds for name in (OURS, OTHER)}
    rows: list[Row] = []
    for (name, seed), (summary, planned) in runs.items():
        score = Mean.of(each(summary))
        rows.append(
            {
                "experiment": name,
                "seed": seed,
                "outer steps": summary["num_steps"],
                "planned": planned,
                "ended": summary["stopped_because"],
                "accuracy": score.value,
                "95 %": score.half_width,
                "floor": summary["evaluation"]["floor"],
            }
        )
    by_seed, pooled = differences(*([runs[name, seed][0] for seed in seeds] for name in (OURS, OTHER)))
    print(table(rows))
    print(f"\n{OURS} minus {OTHER}, by seed: {', '.join(map(str, by_seed))}")
    print(f"all seeds, paired by task: {pooled}")
    claims = [
        Claim(
            "not significantly worse: upper end of the paired 95 % interval",
            pooled.value + pooled.half_width,
            0.0,
            at_least=True,
        ),
    ]
    facts = {
        "difference": [pooled.value, pooled.half_width],
        "difference by seed": [[one.value, one.half_width] for one in by_seed],
        "code": fingerprint([]),
    }
    return finish(options, rows, claims, facts)


if __name__ == "__main__":
    sys.exit(main())
