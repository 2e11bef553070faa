"""What damping within the tolerance is worth: outer runs of digits_mlp with it, without it, and with exact hypergradients.

    python -m benchmarks.damping            (half an hour on two cores: losses scatter from start to start)

The experiment as it is (`damping=adaptive`, a part of `implicit_auto`), with `damping=none`, and with `accuracy=fixed`, where
every linear solve is made to a residual of 1e-6 and there is nothing to damp; inner solves are to the experiment's tolerance
there, and at first in the others. Each start is a pair; the figures are the geometric mean of the ratios of the validation
losses and its 95 % interval.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from benchmarks.common import Claim, Row, finish, parse, table
from benchmarks.tuning import AUTO, Mean, Pairs, Setting, outer_run

DAMPED, PLAIN, EXACT = "implicit_auto", "damping=none", "accuracy=fixed"
WAYS: dict[str, tuple[str, ...]] = {DAMPED: (), PLAIN: (PLAIN,), EXACT: (EXACT,)}
STARTS = range(500, 524)  # nothing was chosen by them


def measure(starts: Iterable[int], keys: tuple[str, ...], processes: int) -> dict[str, Mean]:
    """The runs of each way."""
    starts = list(starts)
    tasks = [(Setting(AUTO), seed, (*keys, *more)) for seed in starts for more in WAYS.values()]
    rows: dict[str, list[Row]] = {name: [] for name in WAYS}
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for number, row in enumerate(pool.map(outer_run, tasks)):
            rows[list(WAYS)[number % len(WAYS)]].append(row)
            print(f"run {number + 1} of {len(tasks)}", end="\r", file=sys.stderr, flush=True)
    return {name: Mean(Setting(AUTO), tuple(found)) for name, found in rows.items()}


def main(argv: list[str] | None = None) -> int:
    """Run, pair, judge."""
    options = parse(str(__doc__).splitlines()[0], argv, device=False)
    quick = ("trainer.num_steps=3",) if options.quick else ()
    found = measure(STARTS[:2] if options.quick else STARTS, quick, 1 if options.quick else 2)
    rows: list[Row] = []
    for name, mean in found.items():
        row = {key: value for key, value in mean.row.items() if key not in ("method", "K", "alpha")}
        rows.append({"way": name, **row})
    print(table(rows))
    highs = {}
    for name in (PLAIN, EXACT):
        ratio, low, highs[name] = Pairs(found[DAMPED], found[name]).interval
        pair = f"{DAMPED} over {name}"
        print(f"\n{pair}: validation loss {ratio:.3f}, from {low:.3f} to {highs[name]:.3f}")
        rows.append({"way": pair, "loss ratio": ratio, "from": low, "to": highs[name]})
    claims = [
        Claim(f"{DAMPED} over {PLAIN}: validation loss, upper end of the 95 % interval", highs[PLAIN], 1.0),
        Claim(f"{DAMPED} over {EXACT}: validation loss, upper end", highs[EXACT], 1.0),
    ]
    return finish(options, rows, claims)


if __name__ == "__main__":
    sys.exit(main())
