"""Killed at random steps and resumed: bitwise the run that was never interrupted; likewise with wandb killed."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.numpy import load_file

COMMON = {
    "experiment": "digits", "callbacks": "none", "tracking": "none", "threads": 1, "trainer.num_steps": 60,
    "trainer.checkpoint_every": 1, "outer_optimizer.lr": 0.05,
}  # fmt: skip
RUNS = {
    "full_batch": {**COMMON, "solver.atol": 1e-4, "hypergradient.warm_start_linear": "true"},
    "minibatch": {
        **COMMON, "problem.batch_size": 32, "problem.penalty": "per_feature", "solver": "gradient_descent",
        "solver.max_steps": 20, "solver.atol": 0.0, "solver.momentum": 0.5, "trainer.checkpoint_every": 2,
        "outer_scheduler": "cosine", "hypergradient.linear_solver.max_steps": 10,
    },
}  # fmt: skip
TIMES = {"seconds", "eta_seconds"}


def start(settings):
    command = [sys.executable, "-m", "bilevel", "train", *(f"{key}={value}" for key, value in settings.items())]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    last = output.strip().splitlines()[-1]
    assert last.startswith("summary: ")
    return Path(last.removeprefix("summary: ")).parent


def records(directory):
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMES} for line in lines]


def count_lines(root):
    files = list(root.glob("*/*/metrics.jsonl"))
    return files[0].read_bytes().count(b"\n") if files else 0


@pytest.mark.parametrize("kind", RUNS)
def test_killed_ten_times_and_resumed_is_bitwise_the_uninterrupted_run(kind, tmp_path):
    whole = finish(start({**RUNS[kind], "output_dir": tmp_path / "whole"}))
    points = sorted(random.Random(kind).sample(range(2, 57), 10))
    root = tmp_path / "killed"
    settings = {**RUNS[kind], "output_dir": root}
    killed = 0
    for point in points:
        process = start(settings)
        while count_lines(root) < point and process.poll() is None:
            time.sleep(0.001)
        killed += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.communicate()
        (directory,) = [path.parent for path in root.glob("*/*/config.yaml")]
        settings = {"resume": directory}
    assert killed == 10
    assert finish(start(settings)) == directory
    assert records(directory) == records(whole)
    ours, theirs = (load_file(path / "hparams_last.safetensors") for path in (directory, whole))
    assert ours.keys() == theirs.keys() and all((ours[name] == theirs[name]).all() for name in ours)


def test_a_resumed_run_goes_on_to_more_steps_and_refuses_other_changes(tmp_path):
    settings = {**RUNS["full_batch"], "trainer.num_steps": 4, "output_dir": tmp_path}
    directory = finish(start(settings))
    again = start({"resume": directory, "outer_optimizer.lr": 0.1})
    output, _ = again.communicate(timeout=120)
    assert again.returncode == 2 and "outer_optimizer.lr" in output and "Traceback" not in output
    assert finish(start({"resume": directory, "trainer.num_steps": 6})) == directory
    longer = finish(start({**RUNS["full_batch"], "trainer.num_steps": 6, "output_dir": tmp_path / "longer"}))
    drop = {"num_steps"}
    ours, theirs = ([{k: v for k, v in r.items() if k not in drop} for r in records(d)] for d in (directory, longer))
    assert ours == theirs


def test_a_corrupt_checkpoint_falls_back_to_the_one_before_and_says_so(tmp_path):
    directory = finish(start({**RUNS["full_batch"], "trainer.num_steps": 6, "output_dir": tmp_path}))
    expected = records(directory)
    newest = sorted((directory / "checkpoints").iterdir())[-1]
    damaged = newest / "tensors.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x55")
    process = start({"resume": directory})
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and newest.name in output
    assert records(directory) == expected
