"""A decay for each of a million weights beside one for all: cost of an outer step, and what either is worth.

    python -m benchmarks.weight_decay --folder outputs/weight_decay     (half an hour; goes on where it was cut short)

Outer steps with one decay and with one for each weight, all at the same value, so that the inner problem is the same: from the
same starting point, in turns. Then the command `python -m experiments.train experiment=weight_decay_million`, and the same with
`problem.decay=shared`, each to its best step by the loss of the images that the outer loss leaves out.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.commands import Keys, completed, of_this_code
from benchmarks.common import Claim, Row, finish, parse, table
from benchmarks.granularity import outer_steps
from benchmarks.kept import fingerprint

EXPERIMENT, KEY, KINDS = "weight_decay_million", "problem.decay", ("shared", "per_weight")
NETWORK = "{_target_: bilevel.models.MLP, num_inputs: 784, num_outputs: 10, hidden: [8]}"
QUICK: Keys = {
    **{"problem.num_train": 60, "problem.num_validation": 40, "problem.network": NETWORK, "threads": 1},
    **{"trainer.num_steps": 2, "solver.max_steps": 10},
}


def row_of(summary: dict[str, Any]) -> Row:
    """What a run came to."""
    best = summary["best"]
    return {
        "what": f"run, step {best['step']} of {summary['num_steps']}",
        "hyperparameters": summary["num_hparams"],
        "seconds": summary["wall_seconds"],
        "outer loss": best["outer_loss"],
        "left out": best["metrics.holdout_loss"],
        "test accuracy": best["metrics.test_accuracy"],
        "GB": summary["peak_memory_mib"] / 2**10,
    }


def main(argv: list[str] | None = None) -> int:
    """Time, train, compare."""
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--split-seed", type=int, default=0, help="of the split of the images (default: 0)")
    own.add_argument("--folder", type=Path, default=Path("outputs/weight_decay"), help="where the runs are, or will be")
    options = parse(str(__doc__).splitlines()[0], argv, device=False, parents=[own])
    keys: Keys = {"problem.split_seed": options.split_seed, **(QUICK if options.quick else {})}
    rows = outer_steps(EXPERIMENT, KEY, KINDS, keys, rounds=1 if options.quick else 3)
    print(table(rows), flush=True)
    with TemporaryDirectory() as scratch:
        folder = of_this_code(Path(scratch) if options.quick else options.folder)
        for kind in KINDS:
            command: Keys = {"experiment": EXPERIMENT, "tracking": "none", KEY: kind, **keys}
            where = folder / f"{kind}-{options.split_seed}"
            rows.append(row_of(completed(where, partial(dict, command), "holdout")))
            print(json.dumps(rows[-1]), flush=True)
    print(table(rows))
    claims = [
        Claim("step with a decay for each weight over that with one", rows[1]["over one"], 1.25),
        Claim("loss of the images left out, over that with one decay", rows[3]["left out"] / rows[2]["left out"], 1.0),
    ]
    return finish(options, rows, claims, {"code": fingerprint([])})


if __name__ == "__main__":
    sys.exit(main())
