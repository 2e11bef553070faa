"""The planner against the clock: what `python -m bilevel plan` says of a run and of each method, and what they take.

    python -m benchmarks.planner

A round predicts the run of an experiment in a fresh process and then makes that run in another one; rounds of the
experiments alternate, so that drift of the machine hits all alike, and the median over rounds is judged. Time is the
run's `wall_seconds`, from its set-up to its summary, with checkpoints and trackers; memory is the peak of its process.

The other methods' forecasts are compared with hypergradients that are really made, right after the forecast and in the
same process; their memory is that of torch's tensors. Those rows are printed, and judged by their median.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Claim, Row, finish, parse, table
from bilevel.errors import ConvergenceWarning

EXPERIMENTS = ("digits", "digits_per_weight", "digits_mlp")
ROUNDS = 3
REPEATS = 3
ACCURACY = 0.25
LONGEST = 20.0  # seconds of a forecast above which a hypergradient is not made
MB = 1e6
QUICK = ("trainer.num_steps=3", "++plan.pilot_steps=2")


def run(command: Sequence[str]) -> Path:
    """The file that the last line of a command's output names."""
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}")
    return Path(done.stdout.strip().splitlines()[-1].partition(": ")[2])


def round_of(name: str, keys: Sequence[str], folder: str) -> Row:
    """Predict, then measure."""
    place = f"output_dir={folder}"
    planned = json.loads(run(["bilevel", "plan", f"experiment={name}", place, *keys]).read_text())["configured"]
    kept = [key for key in keys if "plan." not in key]
    made = json.loads(run(["experiments.train", f"experiment={name}", place, *kept]).read_text())
    return {
        "experiment": name,
        "predicted s": planned["run_seconds"],
        "measured s": made["wall_seconds"],
        "of it steps s": made["step_seconds"],
        "predicted MB": planned["memory_bytes"] / MB,
        "measured MB": made["peak_memory_mib"] * 2**20 / MB,
    }


def summary_of(name: str, rounds: Sequence[Row]) -> Row:
    """Medians over rounds; of ratios where both figures of a ratio were measured side by side."""
    mine = [row for row in rounds if row["experiment"] == name]

    def median(key: str) -> float:
        return statistics.median(row[key] for row in mine)

    def error(what: str) -> float:
        return statistics.median(row[f"predicted {what}"] / row[f"measured {what}"] for row in mine) - 1

    figures = {key: median(key) for key in mine[0] if key != "experiment"}
    return {"experiment": name, **figures, "error of s": error("s"), "error of MB": error("MB")}


def methods_of(name: str, keys: Sequence[str]) -> list[Row]:
    """Every method's forecast and its real hypergradient, in this process."""
    from bilevel.batches import StepBatches
    from bilevel.cli.arguments import read_arguments
    from bilevel.cli.job import assemble
    from bilevel.cli.preflight import preflight
    from bilevel.cli.settings import Settings
    from bilevel.diagnostics import plan
    from bilevel.diagnostics.meter import peak_bytes, seconds_of
    from bilevel.flat import FlatProblem, natural_hparams
    from bilevel.hypergradient import differentiate, start_method
    from bilevel.tree import detach

    config = preflight(read_arguments([f"experiment={name}", *keys]))[0]
    parts = assemble({**config, "callbacks": {}, "tracking": {}}, *Settings.of(config).apply())
    device = torch.device("cpu")
    found = plan(
        parts.problem,
        solver=parts.solver,
        hypergradient=parts.hypergradient,
        optimizer=parts.optimizer,
        trainer=replace(parts.trainer, num_steps=1),
    )
    problem = parts.problem
    hparams = detach(natural_hparams(problem))
    flat, batches = FlatProblem.of(problem, hparams), StepBatches(problem, 0)
    start = flat.start(hparams).detach()
    rows: list[Row] = []
    for one, forecast in zip(found.candidates, found.rows[1:], strict=True):
        if one.cost is None or forecast.seconds > LONGEST:
            why = one.refused[:60] if one.cost is None else f"forecast {forecast.seconds:.0f} s: not made"
            rows.append({"experiment": name, "method": one.name, "note": why})
            continue

        def hypergradient(one: Any = one) -> None:
            state = start_method(one.method, flat, one.solver, start, hparams)
            differentiate(one.method, flat, one.solver, start, hparams, batches, state)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            seconds = seconds_of(hypergradient, device, repeats=REPEATS, allowance=60.0)
            size = peak_bytes(hypergradient, device)
        rows.append(
            {
                "experiment": name,
                "method": one.name,
                "predicted ms": 1e3 * forecast.seconds,
                "measured ms": 1e3 * seconds,
                "error of ms": forecast.seconds / seconds - 1,
                "predicted MB": forecast.own_bytes / MB,
                "measured MB": size / MB,
                "error of MB": forecast.own_bytes / size - 1,
            }
        )
    return rows


def methods(name: str, keys: Sequence[str]) -> list[Row]:
    """The same in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.planner", "--methods", name, *keys]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the methods of {name} failed:\n{done.stderr}")
    rows: list[Row] = json.loads(done.stdout.splitlines()[-1])
    return rows


def claims_of(runs: Sequence[Row], others: Sequence[Row]) -> list[Claim]:
    """Runs one by one; methods by the median error of all of them."""
    claims = []
    for row in runs:
        claims.append(Claim(f"time of {row['experiment']}, relative error", abs(row["error of s"]), ACCURACY))
        claims.append(Claim(f"memory of {row['experiment']}, relative error", abs(row["error of MB"]), ACCURACY))
    for name in dict.fromkeys(row["experiment"] for row in others):
        errors = [abs(row["error of ms"]) for row in others if row["experiment"] == name and "error of ms" in row]
        claims.append(
            Claim(f"a hypergradient of {name}, median relative error over methods", statistics.median(errors), ACCURACY)
        )
    return claims


def measure(options: argparse.Namespace) -> tuple[list[Row], list[Row]]:
    """Rows of runs and of methods."""
    names, number = (EXPERIMENTS[:1], 1) if options.quick else (EXPERIMENTS, ROUNDS)
    keys = QUICK if options.quick else ()
    with tempfile.TemporaryDirectory() as folder:
        rounds = []
        for _ in range(number):
            for name in names:
                rounds.append(round_of(name, keys, folder))
                print(table(rounds[-1:]).splitlines()[-1], flush=True)
    runs = [summary_of(name, rounds) for name in names]
    print(f"\n{table(runs)}\n", flush=True)
    others = [row for name in names for row in methods(name, [key for key in keys if "plan." not in key])]
    print(table(others))
    return runs, others


def main(argv: list[str] | None = None) -> int:
    """Predict and measure."""
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] == ["--methods"]:
        print(json.dumps(methods_of(arguments[1], arguments[2:])))
        return 0
    options = parse(str(__doc__).splitlines()[0], arguments, device=False)
    print("experiment, predicted s, measured s, of it steps s, predicted MB, measured MB")
    runs, others = measure(options)
    return finish(options, [*runs, *others], claims_of(runs, others))


if __name__ == "__main__":
    sys.exit(main())
