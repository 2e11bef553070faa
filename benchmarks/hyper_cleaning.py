"""Hyper-cleaning as shipped: the share of the gap from floor to ceiling that it closes, wrong labels it finds, minutes.

    python -m benchmarks.hyper_cleaning --folder outputs/hyper_cleaning     (ten seeds; goes on where it was cut short)

Each seed is the command `python -m experiments.train experiment=hyper_cleaning`, with a split and wrong labels of its own. The
floor is training on validation examples and all training examples as they are labelled, the ceiling on those that are labelled
rightly, each with its best penalty of a grid. The share is that of the means over the seeds, `mean(cleaned - floor) /
mean(ceiling - floor)`: a single gap is as small as its noise. Its interval is the delta method's, from the spread of
`(cleaned - floor) - share (ceiling - floor)` over the seeds, with Student's quantile.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import t as student

from benchmarks.commands import Keys, completed, of_this_code
from benchmarks.common import Claim, Row, finish, parse, table
from benchmarks.kept import fingerprint

SEEDS = 10
QUICK: Keys = {
    **{"problem.num_train": 60, "problem.num_validation": 40, "trainer.num_steps": 2, "solver.atol": 1e-3},
    **{"callbacks.comparison.num_points": 2, "callbacks.comparison.num_folds": 2},
}


class Share(NamedTuple):
    """A ratio of means and the half width of its 95 % interval."""

    value: float
    half_width: float


def share_of(gained: np.ndarray, gap: np.ndarray) -> Share:
    """The ratio of the means of paired numbers.

    Args:
        gained: numerators `(S,)`.
        gap: denominators `(S,)`.

    Example:
        >>> share_of(np.array([1.0, 2.0]), np.array([2.0, 4.0]))
        Share(value=0.5, half_width=0.0)
    """
    value = gained.mean() / gap.mean()
    number = len(gap)
    if number < 2:
        return Share(float(value), float("nan"))
    error = (gained - value * gap).std(ddof=1) / number**0.5 / abs(gap.mean())
    return Share(float(value), float(student.ppf(0.975, number - 1) * error))


def row_of(seed: int, summary: dict[str, Any]) -> Row:
    """What a run came to."""
    found = summary["cleaning"]
    return {
        "seed": seed,
        **{name: found[name] for name in ("floor", "cleaned", "ceiling", "f1")},
        "outer steps": summary["num_steps"],
        "seconds of cleaning": summary["step_seconds"],
        "minutes": (summary["wall_seconds"] + found["seconds"]) / 60,
        "GB": summary["peak_memory_mib"] / 2**10,
    }


def main(argv: list[str] | None = None) -> int:
    """Clean, and compare."""
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--seeds", type=int, nargs="+", default=list(range(SEEDS)), help="(default: 0 to 9)")
    own.add_argument(
        "--folder", type=Path, default=Path("outputs/hyper_cleaning"), help="where the runs are, or will be"
    )
    options = parse(str(__doc__).splitlines()[0], argv, device=False, parents=[own])
    seeds, small = (options.seeds[:2], QUICK) if options.quick else (options.seeds, {})
    rows: list[Row] = []
    with TemporaryDirectory() as scratch:
        folder = of_this_code(Path(scratch) if options.quick else options.folder)
        for seed in seeds:
            keys: Keys = {"experiment": "hyper_cleaning", "problem.split_seed": seed, "tracking": "none", **small}
            rows.append(row_of(seed, completed(folder / str(seed), partial(dict, keys), "cleaning")))
            print(json.dumps(rows[-1]), flush=True)
    print(table(rows))
    floor, cleaned, ceiling, f1 = (
        np.array([row[name] for row in rows]) for name in ("floor", "cleaned", "ceiling", "f1")
    )
    share = share_of(cleaned - floor, ceiling - floor)
    print(f"\nshare of the gap that is closed, pooled: {share.value:.3f} ± {share.half_width:.3f}")
    claims = [
        Claim("share of the gap that is closed", share.value, 0.85, at_least=True),
        Claim("F1 of the wrong labels, mean", float(f1.mean()), 0.92, at_least=True),
        Claim("minutes of a seed, at most", max(row["minutes"] for row in rows), 2.0),
    ]
    return finish(options, rows, claims, {"share": list(share), "code": fingerprint([])})


if __name__ == "__main__":
    sys.exit(main())
