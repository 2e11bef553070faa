"""A penalty for each word and class beside one penalty: cost of an outer step, and scikit-learn's grid on the same split.

    python -m benchmarks.text_penalties --folder outputs/text_penalties     (13 minutes; goes on where it was cut short)

Three things, one after the other. Outer steps with one penalty, with one for each word and with one for each word and class,
all at the same values, so that the inner problem is the same: from the same starting point, in turns. The command
`python -m experiments.train experiment=text_penalties`. And scikit-learn's `LogisticRegression` for 20 penalties on the same
training texts, as it comes but for `max_iter`, of which its default of 100 stops all of them short; the grid's loss is the
least one on all validation texts, and its accuracy the largest on the test texts, whichever penalty has it.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array

from benchmarks.commands import Keys, completed, of_this_code
from benchmarks.common import Claim, Row, finish, parse, table
from benchmarks.granularity import outer_steps
from benchmarks.kept import fingerprint
from bilevel.problems import TextPenalties
from bilevel.problems.digits_grid import sklearn_c
from bilevel.sparse import SparseMatrix

GRANULARITIES = ("shared", "per_feature", "per_weight")
QUICK: Keys = {"problem.num_texts": 1500, "trainer.num_steps": 2, "threads": 1}


def grid(problem: TextPenalties, penalties: np.ndarray) -> list[Row]:
    """Loss and accuracy of scikit-learn's model for each penalty, and the seconds that its training takes."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss

    x, held_out, left_out, test = (
        _scipy(part) for part in (problem.x, problem.x_validation, problem.x_holdout, problem.x_test)
    )
    y = problem.y.numpy()
    rows: list[Row] = []
    for penalty in penalties:
        model = LogisticRegression(C=sklearn_c(float(penalty), len(y)), max_iter=1000)
        started = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.fit(x, y)
        seconds = time.perf_counter() - started
        losses = [
            log_loss(labels.numpy(), model.predict_proba(inputs), labels=model.classes_, normalize=False)
            for inputs, labels in ((held_out, problem.y_validation), (left_out, problem.y_holdout))
        ]
        sizes = len(problem.y_validation), len(problem.y_holdout)
        rows.append(
            {
                "what": "scikit-learn",
                "hyperparameters": 1,
                "penalty": float(penalty),
                "seconds": seconds,
                "validation loss": sum(losses) / sum(sizes),
                "left out": losses[1] / sizes[1],
                "test accuracy": float(model.score(test, problem.y_test.numpy())),
            }
        )
        print(table(rows[-1:]).splitlines()[1], flush=True)
    return rows


def _scipy(matrix: SparseMatrix) -> csr_array:
    rows = matrix.rows
    return csr_array(
        (rows.values().numpy(), rows.col_indices().numpy(), rows.crow_indices().numpy()), shape=tuple(rows.shape)
    )


def ours(summary: dict[str, Any], problem: TextPenalties) -> Row:
    """What the command came to."""
    best, sizes = summary["best"], (len(problem.y_validation), len(problem.y_holdout))
    losses = best["outer_loss"], best["metrics.holdout_loss"]
    return {
        "what": f"experiment=text_penalties, step {best['step']} of {summary['num_steps']}",
        "hyperparameters": summary["num_hparams"],
        "seconds": summary["wall_seconds"],
        "validation loss": float(np.average(losses, weights=sizes)),
        "left out": losses[1],
        "test accuracy": best["metrics.test_accuracy"],
        "GB": summary["peak_memory_mib"] / 2**10,
    }


def main(argv: list[str] | None = None) -> int:
    """Measure, train, compare."""
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--split-seed", type=int, default=0, help="of the split of the texts (default: 0)")
    own.add_argument("--folder", type=Path, default=Path("outputs/text_penalties"), help="where the run is, or will be")
    options = parse(str(__doc__).splitlines()[0], argv, device=False, parents=[own])
    keys: Keys = {"problem.split_seed": options.split_seed, **(QUICK if options.quick else {})}
    penalties = np.geomspace(1e-4, 1e-7, 3 if options.quick else 20)
    rows = outer_steps("text_penalties", "problem.penalty", GRANULARITIES, keys, rounds=1 if options.quick else 3)
    print(table(rows), flush=True)
    settings = {name.removeprefix("problem."): value for name, value in keys.items() if name.startswith("problem.")}
    problem = TextPenalties(**settings)  # type: ignore[arg-type]  # the keys are its arguments
    with TemporaryDirectory() as scratch:
        folder = of_this_code(Path(scratch) if options.quick else options.folder)
        command: Keys = {"experiment": "text_penalties", "tracking": "none", **keys}
        trained = ours(completed(folder / str(options.split_seed), lambda: command, "words"), problem)
    fitted = grid(problem.to(dtype=torch.float64), penalties)
    print(table([*rows, trained, *fitted]))
    claims = [
        Claim("step with a penalty for each word and class over that with one", rows[-1]["over one"], 1.2),
        Claim("peak memory of the run, GB", trained["GB"], 4.0),
        Claim(
            "test accuracy over the largest of the grid",
            trained["test accuracy"] / max(row["test accuracy"] for row in fitted),
            1.0,
            at_least=True,
        ),
        *(
            Claim(f"{what} over the least of the grid", trained[what] / min(row[what] for row in fitted), 0.999)
            for what in ("validation loss", "left out")
        ),
        Claim("wall time over the grid's", trained["seconds"] / sum(row["seconds"] for row in fitted), 1.0),
    ]
    return finish(options, [*rows, trained, *fitted], claims, {"code": fingerprint([])})


if __name__ == "__main__":
    sys.exit(main())
