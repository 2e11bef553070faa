"""Few-shot experiments on Omniglot as shipped: accuracy of 1,000 test tasks, the floor, and the minutes that each took.

    python -m benchmarks.meta_omniglot                                  imaml_omniglot alone, 11 to 30 minutes on two cores
    python -m benchmarks.meta_omniglot --runs imaml 20-way r2d2         some of them, one after the other; `all` takes hours
    python -m benchmarks.meta_omniglot --runs paper --device cuda       the columns of the paper on implicit MAML, its split

Each is the command that stands in its row. Runs are kept in a folder: a benchmark that was cut short goes on where it was, and
rows of the same code and device made earlier stand in the table too. `fresh` is `imaml` with a seed and with test tasks that no
choice of a setting has seen. Minutes are those of training and evaluation; starting Python and drawing the report take half of
one more.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.commands import QUICK, Keys, completed, each, of_this_code, summary_of
from benchmarks.common import Claim, Row, finish, parse, table
from benchmarks.kept import fingerprint
from bilevel.meta import Mean

TWENTY_WAY: Keys = {  # of imaml_omniglot: curvature is larger there
    **{"data.num_query": 5, "solver.learning_rate": 0.015, "outer_optimizer.lr": 1e-3},
    "callbacks.evaluation.max_steps": 20,
}
RUNS: dict[str, Keys] = {
    "imaml": {"experiment": "imaml_omniglot"},
    "fresh": {"experiment": "imaml_omniglot", "seed": 21, "callbacks.evaluation.seed": 21},
    "20-way": {"experiment": "imaml_omniglot", "data.way": 20, **TWENTY_WAY},
    "random": {"experiment": "imaml_omniglot", "data.split": "random"},
    **{
        name: {"experiment": f"{name}_omniglot"}
        for name in ("imaml_newton", "fomaml", "reptile", "maml", "anil", "meta_sgd", "r2d2")
    },
}
# The protocol of Rajeswaran et al. (2019): characters mixed over alphabets, those of tests turned, too.
PAPER: dict[str, Keys] = {
    f"{name}, {way}-way {shot}-shot": {
        **{"experiment": name, "data.way": way, "data.shot": shot, "data.split": "random"},
        **{"data.rotated_parts": "[train,validation,test]", **steps[way]},
    }
    for name, steps in (
        ("imaml_omniglot", {5: {}, 20: TWENTY_WAY}),
        ("imaml_newton_omniglot", {5: {}, 20: {}}),
    )
    for way in (5, 20)
    for shot in (1, 5)
}
GROUPS = {"all": RUNS, "paper": PAPER}


def row_of(keys: Keys, summary: dict[str, Any]) -> Row:
    """What a run came to."""
    score = Mean.of(each(summary))
    return {
        "run": " ".join(f"{key}={value}" for key, value in keys.items()),
        "accuracy": score.value,
        "95 %": score.half_width,
        "floor": summary["evaluation"]["floor"],
        "outer steps": summary["num_steps"],
        "minutes": (summary["wall_seconds"] + summary["evaluation"]["seconds"]) / 60,
    }


def main(argv: list[str] | None = None) -> int:
    """Train what was asked for, and tell."""
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--runs", nargs="+", choices=[*RUNS, *GROUPS], default=["imaml"], help="(default: imaml)")
    own.add_argument(
        "--folder", type=Path, default=Path("outputs/meta_omniglot"), help="where the runs are, or will be"
    )
    options = parse(str(__doc__).splitlines()[0], argv, parents=[own])
    runs = {**RUNS, **PAPER}
    wanted = {name for word in options.runs for name in GROUPS.get(word, [word])}
    small: Keys = {**QUICK, "trainer.num_steps": 2} if options.quick else {}
    found: dict[str, dict[str, Any]] = {}
    with TemporaryDirectory() as scratch:
        folder = of_this_code(Path(scratch) if options.quick else options.folder) / options.device.replace(":", "_")
        for name, keys in runs.items():
            new: Keys = {**keys, **small, "tracking": "none", "device": options.device}
            where = folder / name
            summary = completed(where, partial(dict, new)) if name in wanted else summary_of(where)
            if summary is not None:
                found[name] = summary
                print(f"{name}: {Mean.of(each(summary))}", flush=True)
    rows: list[Row] = [row_of(runs[name], summary) for name, summary in found.items()]
    print(table(rows))
    made = {name: row for name, row in zip(found, rows, strict=True)}
    claims = [
        claim
        for name in ("imaml", "fresh")
        if name in made
        for claim in (
            Claim(f"accuracy of {name}", made[name]["accuracy"], 0.96, at_least=True),
            Claim(f"minutes of {name}", made[name]["minutes"], 30.0),
        )
    ]
    return finish(options, rows, claims, {"code": fingerprint([])})


if __name__ == "__main__":
    sys.exit(main())
