"""Meta-weight-net on Fashion-MNIST with a long tail: test accuracy with learned weights, beside the same steps with equal ones.

    python -m benchmarks.reweighting --folder outputs/reweighting     (15 minutes; goes on where it was cut short)

Each run is the command `python -m experiments.train experiment=reweighting`, with a draw of images of its own, for the paper's
imbalances. The difference is that of the means over the seeds, with its 95 % interval by Student's quantile: runs are pairs, of
the same images, minibatches and starting weights.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from scipy.stats import t as student

from benchmarks.commands import Keys, completed, of_this_code
from benchmarks.common import Claim, Row, finish, parse, table
from benchmarks.kept import fingerprint

IMBALANCES = (200, 100, 50)
NETWORK = "{_target_: bilevel.models.MLP, num_inputs: 784, num_outputs: 10, hidden: [8]}"
QUICK: Keys = {"problem.num_most": 400, "problem.network": NETWORK, "trainer.num_steps": 3, "threads": 1}


def main(argv: list[str] | None = None) -> int:
    """Train, and compare."""
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--seeds", type=int, nargs="+", default=list(range(5)), help="(default: 0 to 4)")
    own.add_argument("--folder", type=Path, default=Path("outputs/reweighting"), help="where the runs are, or will be")
    options = parse(str(__doc__).splitlines()[0], argv, device=False, parents=[own])
    seeds, small = (options.seeds[:2], QUICK) if options.quick else (options.seeds, {})
    rows: list[Row] = []
    with TemporaryDirectory() as scratch:
        folder = of_this_code(Path(scratch) if options.quick else options.folder)
        for imbalance in IMBALANCES[:1] if options.quick else IMBALANCES:
            pairs = []
            for seed in seeds:
                draws: Keys = {"problem.imbalance": imbalance, "problem.split_seed": seed, "seed": seed}
                keys: Keys = {"experiment": "reweighting", "tracking": "none", **draws, **small}
                summary = completed(folder / f"{imbalance}-{seed}", partial(dict, keys), "weighting")
                classes = summary["weighting"]["classes"]
                pairs.append([float(np.mean([one[name] for one in classes])) for name in ("learned", "equal")])
                print(json.dumps({"imbalance": imbalance, "seed": seed, "learned, equal": pairs[-1]}), flush=True)
            each = np.array(pairs)
            gain = each[:, 0] - each[:, 1]
            spread = gain.std(ddof=1) / len(gain) ** 0.5 if len(gain) > 1 else float("nan")
            rows.append(
                {
                    "imbalance": imbalance,
                    "learned": float(each[:, 0].mean()),
                    "equal": float(each[:, 1].mean()),
                    "difference": float(gain.mean()),
                    "95 %": float(student.ppf(0.975, max(len(gain) - 1, 1)) * spread),
                }
            )
    print(table(rows))
    claims = [
        Claim(
            f"accuracy over that of equal weights, imbalance {row['imbalance']}", row["difference"], 0.0, at_least=True
        )
        for row in rows
    ]
    return finish(options, rows, claims, {"code": fingerprint([])})


if __name__ == "__main__":
    sys.exit(main())
