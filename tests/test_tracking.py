"""Trackers: the primary record is strict and survives a kill; no other tracker can touch a run."""

import errno
import io
import json
import math
import os
import random
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bilevel import Problem, fit
from bilevel.errors import UsageError
from bilevel.result import Result
from bilevel.solvers import GradientDescent
from bilevel.solvers.loop import InnerResult
from bilevel.tracking import ConsoleTracker, GuardedTracker, JsonlTracker, WandbTracker, read_metrics
from bilevel.tracking.format import baseline_table, duration, number


def start(directory: Path | None = None, step: int = 0, num_steps: int = 100) -> Any:
    hparams = {"penalty": torch.ones(3)}
    return SimpleNamespace(
        config={"name": "digits"}, directory=directory, step=step, num_steps=num_steps, hparams=hparams
    )


def record(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "num_steps": 100, "outer_loss": 1.0 / (step + 1), "receipt.products": 12, **more}


def strict(line: str) -> dict[str, Any]:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return json.loads(line, parse_constant=refuse)


# -- metrics.jsonl ----------------------------------------------------------------------------------------------


def write(path: Path, first: int, stop: int) -> None:
    tracker = JsonlTracker(path)
    tracker.on_start(start(step=first))
    for step in range(first, stop):
        tracker.on_step(record(step), {})
    tracker.on_end({})


def test_each_record_is_on_disk_when_its_step_returns(tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path / "new" / "metrics.jsonl")
    tracker.on_start(start())
    for step in range(3):
        tracker.on_step(record(step), {})
        assert [r["step"] for r in read_metrics(tracker.path)] == list(range(step + 1))


def test_lines_are_strict_json_and_non_finite_numbers_come_back(tmp_path: Path) -> None:
    values = {"a": math.nan, "b": math.inf, "c": -math.inf, "d": [1.0, math.nan], "e": None, "f": "word", "g": True}
    tracker = JsonlTracker(tmp_path / "metrics.jsonl")
    tracker.on_start(start())
    tracker.on_step(record(0, **values), {})
    (line,) = tracker.path.read_text().splitlines()
    assert strict(line)["a"] == "NaN" and strict(line)["c"] == "-Infinity"
    (loaded,) = read_metrics(tracker.path)
    assert math.isnan(loaded["a"]) and loaded["b"] == math.inf and loaded["c"] == -math.inf
    assert math.isnan(loaded["d"][1]) and (loaded["e"], loaded["f"], loaded["g"]) == (None, "word", True)


@pytest.mark.parametrize("cut", [1, 20, None])
def test_a_resumed_run_drops_later_records_and_a_torn_line(tmp_path: Path, cut: int | None) -> None:
    path, whole = tmp_path / "metrics.jsonl", tmp_path / "whole.jsonl"
    write(whole, 0, 8)
    write(path, 0, 6)
    torn = json.dumps(record(6))[:cut]
    path.write_text(path.read_text() + torn)  # killed while it wrote: no newline
    write(path, 4, 8)
    assert path.read_bytes() == whole.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "whole.jsonl"]


def test_a_fresh_run_starts_an_empty_file(tmp_path: Path) -> None:
    write(tmp_path / "metrics.jsonl", 0, 5)
    write(tmp_path / "metrics.jsonl", 0, 2)
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2


def test_damage_before_the_last_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": \n{"step": 2}\n')
    with pytest.raises(UsageError, match=r"metrics\.jsonl, but line 2 is"):
        read_metrics(path)
    assert read_metrics(tmp_path / "missing.jsonl") == []


def test_a_full_disk_stops_the_run_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = JsonlTracker(tmp_path / "metrics.jsonl")
    tracker.on_start(start())

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"Could not write step 0 .*resume=RUN_DIRECTORY") as caught:
        tracker.on_step(record(0), {})
    assert caught.value.errno == errno.ENOSPC
    tracker.on_end({})  # the trainer still ends its trackers: no second complaint


# -- the guard --------------------------------------------------------------------------------------------------


class Fragile(GuardedTracker):
    name = "a fragile tracker"

    def __init__(self, fails_in: str) -> None:
        self.fails_in, self.calls = fails_in, []

    def call(self, name: str) -> None:
        self.calls.append(name)
        if name == self.fails_in:
            raise RuntimeError("the disk\nis on fire.")

    def start(self, run: Any) -> None:
        self.call("start")

    def step(self, record: Any, hparams: Any) -> None:
        self.call("step")

    def end(self, summary: Any) -> None:
        self.call("end")

    def abandon(self) -> None:
        self.calls.append("abandon")
        raise RuntimeError("and so is its extinguisher")


@pytest.mark.parametrize(
    ("fails_in", "calls"),
    [
        ("start", ["start", "abandon"]),
        ("step", ["start", "step", "abandon"]),
        ("end", ["start", "step", "step", "end", "abandon"]),
    ],
)
def test_the_first_failure_silences_a_tracker(
    fails_in: str, calls: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = Fragile(fails_in)
    tracker.on_start(start())
    tracker.on_step(record(0), {})
    tracker.on_step(record(1), {})
    tracker.on_end({})
    assert tracker.calls == calls
    sentence = (
        "Tracking by a fragile tracker stopped, the run goes on without it (RuntimeError: the disk is on fire).\n"
    )
    assert capsys.readouterr() == ("", sentence)


def test_an_interrupt_is_not_a_failure() -> None:
    class Interrupted(Fragile):
        def call(self, name: str) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Interrupted("start").on_start(start())


# -- the console ------------------------------------------------------------------------------------------------


def play(num_steps: int, stop: int | None = None, first: int = 0, **summary: Any) -> None:
    tracker = ConsoleTracker()
    tracker.on_start(start(step=first, num_steps=num_steps))
    for step in range(first, num_steps if stop is None else stop):
        tracker.on_step(record(step, num_steps=num_steps, seconds=0.5, eta_seconds=1.0, skipped=step == 7), {})
    tracker.on_end({"best": {"step": 1, "outer_loss": 0.5}, "wall_seconds": 75.0, **summary})


@pytest.mark.parametrize("num_steps", [1, 2, 19, 20, 21, 100, 1234])
def test_a_pipe_gets_about_twenty_aligned_lines(num_steps: int, capsys: pytest.CaptureFixture[str]) -> None:
    play(num_steps)
    captured = capsys.readouterr()
    header, *lines, verdict = captured.out.splitlines()
    lines = [line for line in lines if "skipped, for" not in line]  # the skipped step is told besides
    steps = [int(line.split()[0]) for line in lines]
    assert steps[0] == 0 and steps[-1] == num_steps - 1 and steps == sorted(set(steps))
    assert min(num_steps, 10) <= len(steps) <= 21 and captured.err == ""
    assert {len(line.split("  (")[0]) for line in lines} == {len(header)}
    assert verdict.startswith("best outer loss 0.500000 at step 1") and "1:15" in verdict


def test_an_early_stop_prints_its_last_step_and_a_skipped_one_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    play(10, stop=8, stopped_because="the loss was not finite.")
    *_, last, news, count, verdict = capsys.readouterr().out.splitlines()
    assert news == "step 7: skipped, for the hypergradient was not finite or a solve diverged"
    assert last.split()[0] == "7" and last.endswith("(skipped)")
    assert count == "1 of 8 steps: skipped, for the hypergradient was not finite or a solve diverged"
    assert verdict.endswith("stopped: the loss was not finite")


def test_a_shrunk_hypergradient_is_marked_told_once_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    tracker = ConsoleTracker()
    tracker.on_start(start(num_steps=3))
    for step in range(3):
        said = {"shrunk": step > 0, "hypergradient_error": 16.4}
        tracker.on_step(record(step, num_steps=3, seconds=0.5, eta_seconds=1.0, **said), {})
    tracker.on_end({"best": {"step": 1, "outer_loss": 0.5}, "wall_seconds": 75.0})
    out = capsys.readouterr().out
    assert out.count("(shrunk)") == 2
    assert out.count("step 1: the hypergradient was shrunk: its estimated error is 16.4 times its norm") == 1
    assert "2 of 3 steps: the hypergradient was shrunk" in out


def test_a_resumed_run_continues_its_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    play(100, first=41)
    assert capsys.readouterr().out.splitlines()[1].split()[0] == "41"


def test_missing_and_non_finite_figures_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    tracker = ConsoleTracker()
    tracker.on_start(start())
    tracker.on_step({"step": 0, "outer_loss": math.nan, "seconds": None}, {})
    tracker.on_end({})
    captured = capsys.readouterr()
    assert captured.out.splitlines()[1].split() == ["0", "nan", *"-------"]
    assert "best outer loss -" in captured.out and captured.err == ""


WORTH = {
    "hypergradient_norm": 123456.7, "hypergradient_error": 4.5e-6, "hypergradient_cosine": -0.25, "receipt.products": 123456,
    "receipt.stationarity": 1.2e-7, "receipt.linear_residual": 6.6e-7, "receipt.error_certified": False,
    "receipt.curvature_min": 5.6e-4, "receipt.curvature_max": 1234.5,
}  # fmt: skip
LACKING = dict.fromkeys(WORTH, math.nan) | {
    "hypergradient_norm": 1.0,
    "receipt.products": 0,
    "receipt.error_certified": None,
}
FOOTNOTE = "* the error estimate is not certified: no lower bound of the curvature was declared"


def shown(*records: dict[str, Any]) -> None:
    tracker = ConsoleTracker()
    tracker.on_start(start(num_steps=len(records)))
    for step, more in enumerate(records):
        tracker.on_step(record(step, num_steps=len(records), seconds=0.5, eta_seconds=1e5, **more), {})
    tracker.on_end({})


def test_a_line_says_all_that_a_hypergradient_is_worth(capsys: pytest.CaptureFixture[str]) -> None:
    shown({**WORTH, "skipped": True, "receipt.biased": True}, WORTH)
    header, line, beneath, footnote, *_ = lines = capsys.readouterr().out.splitlines()
    assert [word for word in line.split() if word in ("4.5e-06*", "-0.25", "123,456")] == line.split()[4:7]
    assert header.index("error") + len("error") == line.index("*") and header.index("ETA") + 3 == line.index("  (")
    named = re.split(r"\s{2,}", beneath.strip())
    assert named == ["stationarity 1.2e-07", "linear residual 6.6e-07", "curvature 5.6e-04 to 1,234"]
    assert footnote == FOOTNOTE and lines.count(FOOTNOTE) == 1
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize(
    ("change", "beneath"),
    [
        ({"receipt.error_certified": True}, "stationarity 1.2e-07   linear residual 6.6e-07   curvature 5.6e-04 to 1,234"),
        ({"hypergradient_error": math.nan, "receipt.linear_residual": math.nan}, "stationarity 1.2e-07   curvature 5.6e-04 to 1,234"),
        (LACKING, None),
        (LACKING | {"receipt.stationarity": math.inf}, "stationarity inf"),
        ({"receipt.error_certified": True, "receipt.curvature_min": math.nan}, "stationarity 1.2e-07   linear residual 6.6e-07   curvature - to 1,234"),
    ],
    ids=["certified", "no residual", "nothing", "infinite", "half a range"],
)  # fmt: skip
def test_figures_that_a_method_lacks_are_left_out(
    change: dict[str, Any], beneath: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    shown({**WORTH, **change})
    _, line, *below, _ = capsys.readouterr().out.splitlines()
    assert [one.strip() for one in below] == ([] if beneath is None else [beneath])  # and no footnote
    assert "nan" not in line and "*" not in line


def test_a_terminal_shows_all_of_it_below_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for name in ("stderr", "stdout"):
        monkeypatch.setattr(sys, name, Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    terminal = sys.stderr
    shown(WORTH)
    assert isinstance(terminal, Terminal)
    drawn = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    below = "error 4.5e-06 (not certified), cosine -0.25, stationarity 1.2e-07, linear residual 6.6e-07, curvature 5.6e-04 to 1,234"
    assert below in drawn.replace("\n", " ") and "products 123,456" in drawn and "hypergradient 123,457" in drawn


def test_a_terminal_gets_a_bar_on_stderr(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    play(30)
    bar = terminal.getvalue()
    assert "digits" in bar and "30/30" in bar and "products 12" in bar and "ETA 1.0 s" in bar
    assert len(capsys.readouterr().out.splitlines()) > 10  # stdout is a pipe here: the log file has its lines


def troubled(results: list[dict[str, Any]], num_lines: int = 2) -> None:
    tracker = ConsoleTracker(num_lines)
    tracker.on_start(start(num_steps=len(results)))
    for step, result in enumerate(results):
        more = {f"receipt.{key}": value for key, value in result.items()}
        tracker.on_step(record(step, num_steps=len(results), **more), {})
    tracker.on_end({})


@pytest.mark.parametrize("result", [result for result in Result if not result.successful])
def test_a_linear_solve_that_failed_is_told_once_and_counted(
    result: Result, capsys: pytest.CaptureFixture[str]
) -> None:
    fine, bad = {"linear_result": "converged", "inner_result": "converged"}, {"linear_result": result.name}
    troubled([fine, fine, bad, fine, bad, bad, fine])
    *lines, count, verdict = capsys.readouterr().out.splitlines()
    told = f"step 2: the linear solve ended with {result.name}: {result.value}"
    assert [line for line in lines if "solve" in line] == [told]
    assert lines.index(told) == 2, "told at its step, though no line was due there"
    assert count == f"3 of 7 steps: the linear solve ended with {result.name}"
    assert verdict.startswith("best outer loss")


@pytest.mark.parametrize("name", [result.name for result in InnerResult if not result.successful])
def test_an_inner_solve_that_failed_is_told_with_its_gradient(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    both = {"inner_result": name, "stationarity": 0.25, "linear_result": "singular"}
    troubled([both, {"inner_result": name, "stationarity": 7.0}, both])
    lines = [line for line in capsys.readouterr().out.splitlines() if "solve" in line]
    hint = " (no lower loss in this precision: try dtype=float64, or a larger atol)" if name == "stagnated" else ""
    assert lines == [
        f"step 0: the inner solve ended with {name}{hint}, and the norm of its gradient is 0.2500",
        f"step 0: the linear solve ended with singular: {Result.singular.value}",
        f"3 of 3 steps: the inner solve ended with {name}{hint}",
        "2 of 3 steps: the linear solve ended with singular",
    ]


def test_solves_that_succeeded_are_not_talked_about(capsys: pytest.CaptureFixture[str]) -> None:
    successes = [result.name for result in Result if result.successful]
    troubled([{"linear_result": name, "inner_result": "converged"} for name in successes] + [{"linear_result": None}])
    assert "solve" not in capsys.readouterr().out


def test_an_indefinite_inner_problem_is_told_by_the_console(capsys: pytest.CaptureFixture[str]) -> None:
    class Saddle(Problem):
        def init_hparams(self) -> Any:
            return {"target": torch.tensor(1.0)}

        def init_params(self, hparams: Any) -> Any:
            return {"x": torch.zeros(2)}

        def inner_loss(self, params: Any, hparams: Any, batch: Any) -> Any:  # no minimum: the second entry runs away
            return (params["x"] * torch.tensor([1.0, -0.1]) * params["x"]).sum() + hparams["target"] * params["x"].sum()

        def outer_loss(self, params: Any, hparams: Any, batch: Any) -> Any:
            return params["x"].square().sum()

    solver = GradientDescent(learning_rate=0.1, max_steps=5)
    fit(Saddle(), solver=solver, num_steps=2, callbacks=[ConsoleTracker()])
    out = capsys.readouterr().out
    assert "step 0: the inner Hessian has negative curvature (least seen -0" in out and "is no minimum" in out
    assert "step 0: the inner solve ended with max_steps" in out
    assert "2 of 2 steps: the inner Hessian has negative curvature" in out


BASELINE = {
    "name": "a grid of 100",
    "columns": ["outer loss", "test accuracy", "fits"],
    "rows": [["best [shared]", 0.5, None, 100], ["no penalty", math.nan, 0.25, 1]],
}
FINAL = {"step": 9, "outer_loss": 0.125, "metrics.test_accuracy": 0.75}


def test_the_baseline_stands_beside_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    play(10, name="digits", baseline=BASELINE, final=FINAL)
    out = capsys.readouterr().out
    assert "a grid of 100" in out and "best [shared]" in out
    (own,) = [line for line in out.splitlines() if "digits (this run)" in line]
    assert own.split("│")[2:5] == ["     0.1250 ", "        0.7500 ", "    - "]


def test_a_baseline_whose_columns_the_run_does_not_know_stands_alone() -> None:
    table = baseline_table({"final": FINAL, "baseline": {**BASELINE, "columns": ["set-up", "x", "y", "z"]}})
    assert table is not None and table.own is None and table.columns == ("set-up", "x", "y", "z")
    assert table.rows[0] == ("best [shared]", "0.5000", "-", "100") and len(table.rows) == 2
    assert baseline_table({}) is None and baseline_table({"baseline": {"name": "x", "rows": []}}) is None


def test_figures_are_written_for_people() -> None:
    assert [number(v) for v in (0, -0.5, 123456.7, 1e-3, 9.99999, 1e30, True, "word", -math.inf)] == [
        *("0", "-0.5000", "123,457", "0.001000", "10.00", "1.000e+30", "yes", "word", "-inf")
    ]
    assert [duration(v) for v in (59.97, 0.0996, 3599.6, math.nan, "x", True)] == ["1:00", "100 ms", "1:00:00", *"---"]


def test_too_few_lines_are_refused() -> None:
    with pytest.raises(UsageError, match="num_lines >= 2"):
        ConsoleTracker(num_lines=1)


# -- wandb ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "of-line"}, "did you mean 'offline'"),
        ({"mode": "xyz"}, "'offline' needs no network"),
        ({"histograms_every": -1}, "histograms_every >= 0"),
    ],
)
def test_bad_wandb_options_are_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        WandbTracker(**options)


def test_disabled_wandb_is_not_even_imported(tmp_path: Path) -> None:
    code = (
        "import sys, types; from bilevel.tracking import WandbTracker; t = WandbTracker(mode='disabled');"
        "t.on_start(types.SimpleNamespace(step=0)); t.on_step({}, {}); t.on_end({}); assert 'wandb' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=_environment())


# A training run in whose record there are draws from the global random states, so that a tracker that touches them is
# found out; wandb's service process is killed after one of its steps.
TRAIN = """
import os, random, signal, sys, time
from functools import partial
from pathlib import Path
import numpy, torch
from bilevel import Positive, Problem
from bilevel.hypergradient import Implicit
from bilevel.rng import generator, seed_everything
from bilevel.solvers import GradientDescent
from bilevel.tracking import JsonlTracker, WandbTracker
from bilevel.trainer import Trainer, run

class Ridge(Problem):
    constraints = {"penalty": Positive()}
    def __init__(self):
        draw = generator(0)
        self.x, self.y = torch.randn(2, 40, 5, generator=draw).unbind(), torch.randn(2, 40, generator=draw)
    def init_hparams(self):
        return {"penalty": torch.full((5,), 0.1)}
    def init_params(self, hparams):
        return {"w": torch.randn(5)}
    def inner_loss(self, params, hparams, batch):
        residual = self.x[0][batch] @ params["w"] - self.y[0][batch]
        return residual.square().mean() + (hparams["penalty"] * params["w"].square()).sum()
    def inner_batches(self, step, inner_step):
        return torch.randint(40, (20,), generator=generator(step, max(inner_step, 0)))
    def outer_loss(self, params, hparams, batch):
        return (self.x[1] @ params["w"] - self.y[1]).square().mean()
    def metrics(self, params, hparams):
        return {"torch": torch.rand(()), "numpy": numpy.random.rand(), "python": random.random()}

def is_service(folder):
    try:
        ours = f"PPid:\\t{os.getpid()}\\n" in (folder / "status").read_text()
        return ours and "wandb-core" in (folder / "cmdline").read_text()
    except OSError:  # a process that ended meanwhile
        return False

class Killer:
    def on_start(self, start):
        pass
    def on_step(self, record, hparams):
        if record["step"] == killed:
            services = [int(folder.name) for folder in Path("/proc").glob("[0-9]*") if is_service(folder)]
            assert services, "wandb's service process was not found"
            for service in services:
                os.kill(service, signal.SIGKILL)
            time.sleep(0.2)
    def on_end(self, summary):
        pass

directory, mode, killed = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
seed_everything(0)
trackers = [JsonlTracker(directory / "metrics.jsonl"), WandbTracker(mode=mode, histograms_every=2), Killer()]
run(Ridge(), GradientDescent(max_steps=20), Implicit(), partial(torch.optim.Adam, lr=0.1), Trainer(num_steps=8),
    directory, callbacks=trackers, config={"name": "ridge"})
print("the run ended")
"""

# Records from first to stop, without training.
RUN = """
import random, sys
from pathlib import Path
from types import SimpleNamespace
import numpy, torch
from bilevel.tracking import JsonlTracker, WandbTracker

directory, mode, first, stop = Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:5])
random.seed(0), numpy.random.seed(0), torch.manual_seed(0)
hparams = {"penalty.weight": torch.rand(8) + 0.1, "mix": torch.tensor([-1.0, float("nan")]), "one": torch.ones(())}
wandb_tracker = WandbTracker(mode=mode, group="g", tags=["t"], histograms_every=2)
trackers = [JsonlTracker(directory / "metrics.jsonl"), wandb_tracker]
config = {"name": "x", "a": {"b": 1}}
start = SimpleNamespace(config=config, directory=directory, step=first, num_steps=8, hparams=hparams)
for tracker in trackers:
    tracker.on_start(start)
for step in range(first, stop):
    drawn = random.random() + numpy.random.rand() + torch.rand(()).item()
    record = {"step": step, "num_steps": 8, "outer_loss": drawn, "inner_loss": float("nan"), "x": None}
    for tracker in trackers:
        tracker.on_step(record, hparams)
summary = {"best": {"step": 3, "outer_loss": 0.5}, "final": {}, "baseline": {"name": "b", "rows": [["a", 1]]}}
for tracker in trackers:
    tracker.on_end(summary)
print("the run ended")
"""


def _environment() -> dict[str, str]:
    root = str(Path(__file__).parents[1])
    return {key: value for key, value in os.environ.items() if not key.startswith("WANDB")} | {"PYTHONPATH": root}


def run(script: str, directory: Path, mode: str, *numbers: int) -> Any:
    directory.mkdir(exist_ok=True)
    command = [sys.executable, "-c", script, str(directory), mode, *map(str, numbers)]
    return subprocess.run(
        command, cwd=directory, env=_environment(), capture_output=True, text=True, timeout=120, check=True
    )


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="finds the service process through /proc")
def test_wandb_dies_and_the_run_does_not_notice(tmp_path: Path) -> None:
    plain = run(TRAIN, tmp_path / "plain", "disabled", -1)
    killed = run(TRAIN, tmp_path / "killed", "offline", 3)
    assert killed.stdout == plain.stdout == "the run ended\n"
    (sentence,) = killed.stderr.splitlines()
    assert sentence.startswith("Tracking by wandb stopped, the run goes on without it (")
    left, right = (_numbers(tmp_path / name) for name in ("plain", "killed"))
    assert len(left["steps"]) == 8 and left == right
    assert len({step["outer_loss"] for step in left["steps"]}) == 8, "the run has trained"
    (folder,) = (tmp_path / "killed" / "wandb").glob("offline-run-*")
    assert _would_sync(folder) == 1, "what wandb had written before it died can be synced"


def _numbers(directory: Path) -> dict[str, Any]:
    """Everything that a training run computed, as text and bytes; its clock is left out."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    steps = [{key: repr(value) for key, value in line.items() if "seconds" not in key} for line in lines]
    return {"steps": steps, **{file.name: file.read_bytes() for file in directory.glob("*.safetensors")}}


def _would_sync(folder: Path) -> int:
    """The number of runs that `wandb sync` finds in a folder; it opens no connection."""
    command = [sys.executable, "-m", "wandb", "sync", "--dry-run", str(folder)]
    done = subprocess.run(command, cwd=folder, env=_environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found = re.search(r"Would sync (\d+) run", done.stdout + done.stderr)
    return int(found[1]) if found else 0


def test_wandb_offline_leaves_syncable_folders_under_one_id(tmp_path: Path) -> None:
    first = run(RUN, tmp_path, "offline", 0, 4)
    assert (first.stdout, first.stderr) == ("the run ended\n", "")  # and not a word of wandb's own
    run(RUN, tmp_path, "offline", 4, 8)
    folders = sorted((tmp_path / "wandb").glob("offline-run-*"))
    identity = (tmp_path / "wandb" / "run_id.txt").read_text().strip()
    assert len(folders) == 2 and all(folder.name.endswith(identity) for folder in folders)
    assert _would_sync(tmp_path / "wandb") == 2 and _would_sync(tmp_path) == 0
    opening = _history(folders[0] / f"run-{identity}.wandb", "run")
    assert [(entry.run.run_id, entry.run.project, entry.run.run_group) for entry in opening[:1]] == [
        (identity, "bilevel", "g")
    ]
    rows = [row for folder in folders for row in _history(folder / f"run-{identity}.wandb")]
    rows = [row for row in rows if "outer_loss" in row]  # the last one is the baseline's
    assert [row["step"] for row in rows] == list(range(8))
    sixth, seventh = rows[6:]
    assert {"hparams/penalty/weight", "hparams_log10/penalty/weight", "outer_loss", "inner_loss"} <= set(sixth)
    assert not {"x", "hparams/mix", "hparams/one"} & set(sixth)
    assert "hparams/penalty/weight" in seventh, "the last step has its histograms"
    metrics = _history(folders[-1] / f"run-{identity}.wandb", "metric")
    assert any(entry.metric.glob_name == "*" and entry.metric.step_metric == "step" for entry in metrics)


def _history(path: Path, kind: str = "history") -> list[Any]:
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for data in _entries(path.read_bytes()):
        entry = Record()
        entry.ParseFromString(data)
        if entry.WhichOneof("record_type") == kind == "history":
            found.append({i.key or i.nested_key[0]: json.loads(i.value_json) for i in entry.history.item})
        elif entry.WhichOneof("record_type") == kind:
            found.append(entry)
    return found


def _entries(data: bytes) -> Iterator[bytes]:
    """A LevelDB log after seven bytes of wandb's: chunks of (checksum, length, type), none across a 32 KiB block."""
    place, parts = 7, []
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        parts.append(data[place + 7 : place + 7 + length])
        place += 7 + length
        if kind in (1, 4):  # a whole entry, or the last part of one
            yield b"".join(parts)
            parts = []


def test_a_service_that_hangs_is_left_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    from bilevel.tracking import wandb as module

    hang = module.threading.Event()
    with pytest.raises(TimeoutError, match="did not answer within 1 seconds"):
        module._within(0.05, hang.wait)
    hang.set()
    with pytest.raises(ZeroDivisionError):
        module._within(5, lambda: 1 / 0)


def test_trackers_leave_the_random_states_alone(tmp_path: Path) -> None:
    random.seed(1)
    torch.manual_seed(1)
    before = random.getstate(), torch.get_rng_state()
    write(tmp_path / "metrics.jsonl", 0, 3)
    play(5)
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])
