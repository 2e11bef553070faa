"""Distilled images as shipped: what ten and a hundred of them are worth, beside as many real ones.

    python -m benchmarks.distillation --folder outputs/distillation     (7 minutes; goes on where it was cut short)

Each run is the command `python -m experiments.train experiment=distillation`, which trains on random real images itself:
20 draws with equal shares of the classes, and the best penalty of a grid for them. Accuracies are those on the test images.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.commands import Keys, completed, of_this_code
from benchmarks.common import Claim, Row, finish, parse, table
from benchmarks.kept import fingerprint

QUICK: Keys = {
    **{"problem.num_train": 300, "trainer.num_steps": 3, "threads": 1},
    **{"callbacks.random.num_draws": 2, "callbacks.random.num_points": 2},
}


def row_of(seed: int, summary: dict[str, Any]) -> Row:
    """What a run came to."""
    found = summary["distilled"]
    return {
        "images": len(found["labels"]),
        "seed": seed,
        "distilled": found["accuracy"],
        "real": float(np.mean(found["random"])),
        "the largest of them": max(found["random"]),
        "minutes": (summary["wall_seconds"] + found["seconds"]) / 60,
    }


def main(argv: list[str] | None = None) -> int:
    """Distil, and compare."""
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the ten images (default: 0 1 2)")
    own.add_argument("--folder", type=Path, default=Path("outputs/distillation"), help="where the runs are, or will be")
    options = parse(str(__doc__).splitlines()[0], argv, device=False, parents=[own])
    runs = [(1, seed) for seed in options.seeds] + [(10, options.seeds[0])]
    small = QUICK if options.quick else {}
    rows: list[Row] = []
    with TemporaryDirectory() as scratch:
        folder = of_this_code(Path(scratch) if options.quick else options.folder)
        for per_class, seed in runs[:: len(runs) - 1] if options.quick else runs:
            draws: Keys = {"problem.num_per_class": per_class, "seed": seed, "problem.split_seed": seed}
            keys: Keys = {"experiment": "distillation", "tracking": "none", **draws, **small}
            rows.append(row_of(seed, completed(folder / f"{per_class}-{seed}", partial(dict, keys), "distilled")))
            print(json.dumps(rows[-1]), flush=True)
    print(table(rows))
    gains = [row["distilled"] - row["real"] for row in rows if row["images"] == 10]
    claims = [Claim("ten images above ten real ones, the least of the seeds", min(gains), 0.2, at_least=True)]
    return finish(options, rows, claims, {"code": fingerprint([])})


if __name__ == "__main__":
    sys.exit(main())
