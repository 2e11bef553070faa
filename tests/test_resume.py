"""Killed at random steps, stopped by an exception at any line, and resumed: bitwise the run that was never interrupted."""

import functools
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from processes import Command
from safetensors.numpy import load_file

import bilevel.trainer
from bilevel import rng
from bilevel.constraints import Positive
from bilevel.hypergradient import Implicit
from bilevel.problem import Problem
from bilevel.solvers import NewtonCG
from bilevel.tracking import JsonlTracker
from bilevel.trainer import Callback, Trainer, run
from bilevel.trainer.checkpoint import load_checkpoint

NUM_STEPS = 60
COMMON = {
    "experiment": "digits", "callbacks": "none", "tracking": "none", "threads": 1, "trainer.num_steps": NUM_STEPS,
    "trainer.checkpoint_every": 1, "outer_optimizer.lr": 0.05,
}  # fmt: skip
RUNS = {
    "full_batch": {**COMMON, "solver.atol": 1e-4, "hypergradient.warm_start_linear": "true"},
    "minibatch": {
        **COMMON, "problem.batch_size": 32, "problem.penalty": "per_feature", "solver": "gradient_descent",
        "solver.max_steps": 20, "solver.atol": 0.0, "solver.momentum": 0.5, "trainer.checkpoint_every": 2,
        "outer_scheduler": "cosine", "linear_solver.max_steps": 10,
    },
    "few_shot": {  # a new episode in each step, drawn ahead by a thread of its own; scores of validation tasks
        "experiment": "imaml_sinusoid", "tracking": "none", "threads": 1, "trainer.num_steps": NUM_STEPS,
        "trainer.checkpoint_every": 2, "problem.learned": "per_layer", "callbacks.evaluation.num_tasks": 20,
        "callbacks.evaluation.every": 5, "callbacks.evaluation.num_validation_tasks": 10,
    },
    "omniglot": {  # images that are turned and moved, convolutions, a learning rate that falls
        "experiment": "imaml_omniglot", "tracking": "none", "threads": 1, "trainer.num_steps": NUM_STEPS,
        "trainer.checkpoint_every": 2, "problem.num_tasks": 2, "model.num_filters": 4, "data.num_query": 1,
        "callbacks.evaluation.num_tasks": 4, "callbacks.evaluation.every": "null",
    },
}  # fmt: skip
KILLS = {"full_batch": 10, "minibatch": 10, "few_shot": 3, "omniglot": 3}
TIMES = {"seconds", "eta_seconds"}


def words_of(settings):
    return ["train", *(f"{key}={value}" for key, value in settings.items())]


def folder_of(status, output):
    assert status == 0, output
    last = output.strip().splitlines()[-1]
    assert last.startswith("summary: ")
    return Path(last.removeprefix("summary: ")).parent


def finished(settings, output):
    """The folder of a run that nothing disturbs."""
    return folder_of(*Command(words_of(settings), output).wait())


def finished_in_a_new_process(settings):
    """The same as a user starts it."""
    command = [sys.executable, "-m", "bilevel", *words_of(settings)]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300, check=False
    )
    return folder_of(done.returncode, done.stdout)


def records(directory):
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMES} for line in lines]


def count_lines(root):
    files = list(root.glob("*/*/metrics.jsonl"))
    return files[0].read_bytes().count(b"\n") if files else 0


@pytest.mark.parametrize("kind", RUNS)
def test_killed_again_and_again_and_resumed_is_bitwise_the_uninterrupted_run(kind, tmp_path, request):
    if kind == "omniglot":
        request.getfixturevalue("omniglot_root")
    whole = finished_in_a_new_process({**RUNS[kind], "output_dir": tmp_path / "whole"})
    points = sorted(random.Random(kind).sample(range(2, NUM_STEPS - 3), KILLS[kind]))
    root, output = tmp_path / "killed", tmp_path / "output"
    settings = {**RUNS[kind], "output_dir": root}
    killed = 0
    for point in points:
        process = Command(words_of(settings), output)
        while count_lines(root) < point and process.is_alive():
            time.sleep(0.01)  # a process that looks without pause takes the time of the one it looks at
        killed += process.is_alive()
        process.kill()
        (directory,) = [path.parent for path in root.glob("*/*/config.yaml")]
        settings = {"resume": directory}
    assert killed == KILLS[kind]
    assert finished(settings, output) == directory
    assert records(directory) == records(whole)
    ours, theirs = (load_file(path / "hparams_last.safetensors") for path in (directory, whole))
    assert ours.keys() == theirs.keys() and all((ours[name] == theirs[name]).all() for name in ours)
    if kind in ("few_shot", "omniglot"):
        summaries = [json.loads((path / "summary.json").read_text()) for path in (directory, whole)]
        once, again = ({**one["evaluation"], "seconds": None} for one in summaries)
        assert once == again


def test_a_resumed_run_goes_on_to_more_steps_and_refuses_other_changes(tmp_path):
    settings, output = {**RUNS["full_batch"], "trainer.num_steps": 4, "output_dir": tmp_path}, tmp_path / "output"
    directory = finished(settings, output)
    status, said = Command(words_of({"resume": directory, "outer_optimizer.lr": 0.1}), tmp_path / "refused").wait()
    assert status == 2 and "outer_optimizer.lr" in said and "Traceback" not in said
    assert finished({"resume": directory, "trainer.num_steps": 6}, output) == directory
    scheduled = finished({**settings, "outer_scheduler": "cosine", "output_dir": tmp_path / "scheduled"}, output)
    status, said = Command(words_of({"resume": scheduled, "trainer.num_steps": 6}), tmp_path / "refused").wait()
    assert status == 2 and "ends with its last step (outer_scheduler.T_max was 4 and is now 6)" in said
    longer = finished({**settings, "trainer.num_steps": 6, "output_dir": tmp_path / "longer"}, output)
    drop = {"num_steps"}
    ours, theirs = ([{k: v for k, v in r.items() if k not in drop} for r in records(d)] for d in (directory, longer))
    assert ours == theirs


def test_a_corrupt_checkpoint_falls_back_to_the_one_before_and_says_so(tmp_path):
    output = tmp_path / "output"
    directory = finished({**RUNS["full_batch"], "trainer.num_steps": 6, "output_dir": tmp_path}, output)
    expected = records(directory)
    newest = sorted((directory / "checkpoints").iterdir())[-1]
    damaged = newest / "tensors.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x55")
    status, said = Command(words_of({"resume": directory}), tmp_path / "resumed").wait()
    assert status == 0 and newest.name in said
    assert records(directory) == expected


# ---------------------------------------------------------------------------------------------------------------------
# In this process: an exception, or Ctrl-C, at any line


class Noisy(Problem):
    """Drawn metrics, so that the random generators are part of the state; `fail` raises at chosen calls."""

    constraints = {"penalty": Positive()}

    def __init__(self, fail=None):
        self.fail = dict(fail or {})

    def count(self, name):
        if name in self.fail:
            self.fail[name] -= 1
            if self.fail[name] == 0:
                raise RuntimeError(f"{name} fails")

    def init_hparams(self):
        return {"penalty": torch.tensor([5.0, 0.2], dtype=torch.float64)}

    def init_params(self, hparams):
        return {"w": torch.zeros(2, dtype=torch.float64)}

    def inner_loss(self, params, hparams, batch):
        self.count("inner_loss")
        w = params["w"]
        return ((w - 3).square() + (w**4) / 10 + hparams["penalty"] * w.square()).sum()

    def outer_loss(self, params, hparams, batch):
        self.count("outer_loss")
        return (params["w"] - 1).square().sum()

    def metrics(self, params, hparams):
        noise = torch.rand(())
        self.count("metrics")
        return {"noise": float(noise)}


class Failing(Callback):
    """Raises at one step, before or after the records are written."""

    def __init__(self, step=None):
        self.step = step

    def on_step(self, record, hparams):
        torch.rand(())
        if record["step"] == self.step:
            raise RuntimeError("the callback fails")


ADAM = functools.partial(torch.optim.Adam, lr=0.3)
COSINE = functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=6)


def go(directory, problem=None, callbacks=(), *, resume=False, compile=False, **trainer):
    """Run as the command line does: seeded, the records first."""
    rng.seed_everything(3)
    settings = Trainer(**{"num_steps": 5, "checkpoint_every": 2, **trainer})
    solver, method = NewtonCG(compile=compile), Implicit(warm_start_linear=True, compile=compile)
    records = JsonlTracker(directory / "metrics.jsonl")
    return run(
        problem or Noisy(), solver, method, ADAM, settings, directory, scheduler=COSINE,
        callbacks=[records, *(callbacks or [Failing()])], resume=resume,
    )  # fmt: skip


def outcome(directory):
    """All that a run leaves, but for its times."""
    state, step, skipped = load_checkpoint(directory / "checkpoints")
    for timed in (state, state["record"]):
        for name in (*TIMES, "wall_seconds"):
            timed.pop(name, None)
    files = [load_file(directory / f"{name}.safetensors") for name in ("hparams", "hparams_last")]
    summary = json.loads((directory / "summary.json").read_text())
    return repr((state, step, skipped, records(directory), files, summary["best"], summary["stopped_because"]))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    torch.set_printoptions(precision=17)  # `outcome` compares texts
    directory = tmp_path_factory.mktemp("whole")
    go(directory)
    yield outcome(directory)
    torch.set_printoptions(profile="default")


FAILURES = {
    "metrics": lambda: (Noisy({"metrics": 4}), []),
    "inner loss": lambda: (Noisy({"inner_loss": 40}), []),
    "outer loss": lambda: (Noisy({"outer_loss": 8}), []),
    "a callback": lambda: (Noisy(), [Failing(2)]),
    "the first step's callback": lambda: (Noisy(), [Failing(0)]),
    "the last step's callback": lambda: (Noisy(), [Failing(4)]),
}


@pytest.mark.parametrize("make", FAILURES.values(), ids=FAILURES)
def test_what_the_user_wrote_may_fail_in_mid_step(make, tmp_path, uninterrupted):
    problem, callbacks = make()
    with pytest.raises(RuntimeError, match="fails"):
        go(tmp_path, problem, callbacks)
    if (tmp_path / "checkpoints").exists():  # no step was lost: the newest checkpoint is that of the step that failed
        assert len(records(tmp_path)) - load_checkpoint(tmp_path / "checkpoints")[1] == len(callbacks)
    go(tmp_path, resume=True)
    assert outcome(tmp_path) == uninterrupted


class Curved(Noisy):
    """Machine code rounds the loss of a network in float32 otherwise than eager operations do."""

    def init_params(self, hparams):
        return {"w": torch.linspace(-1, 1, 64)}

    def init_hparams(self):
        return {"penalty": torch.tensor([0.1, 0.2])}

    def inner_loss(self, params, hparams, batch):
        first, second = params["w"].unflatten(0, (2, 4, 8))
        hidden = (torch.linspace(-2, 2, 4000).unflatten(0, (1000, 4)).sin() @ first).tanh()
        return (hidden @ second.mT).exp().mean() + hparams["penalty"].sum() * params["w"].square().sum()

    def outer_loss(self, params, hparams, batch):
        return (torch.linspace(0, 1, 1000).unsqueeze(1) * params["w"].tanh() - 0.1).square().mean().exp()


@pytest.mark.parametrize("step", [1, 3])
def test_a_compiled_run_goes_on_with_the_programs_numbers(step, tmp_path):
    go(tmp_path / "whole", Curved(), compile=True)
    go(tmp_path / "eager", Curved())
    with pytest.raises(RuntimeError, match="fails"):
        go(tmp_path / "cut", Curved(), [Failing(step)], compile=True)
    go(tmp_path / "cut", Curved(), resume=True, compile=True)
    whole, eager, cut = (records(tmp_path / name) for name in ("whole", "eager", "cut"))
    assert cut == whole != eager
    assert [record["receipt.fallback"] for record in whole] == [None] * 5


class Injector:
    """Raises at the n-th line that the trainer's modules and the problem above execute; counts them otherwise."""

    FILES = {*(str(path) for path in Path(bilevel.trainer.__file__).parent.glob("*.py")), __file__}

    def __init__(self, error, at):
        self.error, self.at, self.lines = error, at, 0

    def __call__(self, frame, event, arg):
        if frame.f_code.co_filename not in self.FILES:
            return None
        if event == "line":
            self.lines += 1
            if self.lines == self.at:
                raise self.error
        return self


def go_traced(directory, injector):
    before = sys.gettrace()
    sys.settrace(injector)
    try:
        go(directory)
    finally:
        sys.settrace(before)


class Planted(Exception):
    """An error that nobody knows, or makes another one of."""


@pytest.mark.parametrize("error", [KeyboardInterrupt, Planted])
def test_an_exception_at_any_line_leaves_a_run_that_goes_on_exactly(error, tmp_path, uninterrupted):
    counter = Injector(error, at=0)
    go_traced(tmp_path / "counted", counter)
    assert counter.lines > 1000
    source = random.Random(0)
    for point in sorted(source.sample(range(1, counter.lines), 60)):
        directory = tmp_path / str(point)
        with pytest.raises(error):
            go_traced(directory, Injector(error, point))
        go(directory, resume=True)
        assert outcome(directory) == uninterrupted, f"line {point} of {counter.lines}"


def test_a_run_that_had_stopped_early_makes_no_further_step(tmp_path):
    class Worse(Noisy):
        def outer_loss(self, params, hparams, batch):
            return super().outer_loss(params, hparams, batch) + batch

        def outer_batches(self, step, inner_step):
            return torch.tensor(float("nan") if self.kind == "nonfinite" and step >= 3 else float(step))

        def metrics(self, params, hparams):
            start = self.init_hparams()["penalty"]
            return {**super().metrics(params, hparams), "away": float((hparams["penalty"] - start).abs().sum())}

    for kind, reason, steps in (
        ("patience", "no better away in 2 steps", 3),
        ("nonfinite", "3 non-finite hypergradients in a row; none was applied", 6),
    ):
        problem, directory = Worse(), tmp_path / kind
        problem.kind = kind
        stops = {"patience": 2, "monitor": "away"} if kind == "patience" else {}
        settings = {"num_steps": 9, **stops}
        first = go(directory, problem, **settings)
        assert (first["stopped_because"], first["num_steps"]) == (reason, steps)
        before = records(directory)
        again = go(directory, problem, resume=True, **settings)
        assert (again["stopped_because"], again["num_steps"]) == (reason, steps) and records(directory) == before


def test_the_wall_time_of_a_resumed_run_is_that_of_all_its_processes(tmp_path):
    class Slow(Failing):
        def on_step(self, record, hparams):
            time.sleep(0.1)

    first = go(tmp_path, callbacks=[Slow()], num_steps=4)
    assert 0.4 < first["wall_seconds"]
    second = go(tmp_path, num_steps=5, resume=True)
    assert first["wall_seconds"] <= second["wall_seconds"] < first["wall_seconds"] + 0.3
    assert second["step_seconds"] < second["wall_seconds"]


def test_a_callback_that_fails_at_the_end_leaves_the_summary_and_the_checkpoint(tmp_path):
    class Fragile(Failing):
        def on_end(self, summary):
            raise RuntimeError("no network")

    with pytest.raises(RuntimeError, match="no network"):
        go(tmp_path, callbacks=[Fragile()])
    assert json.loads((tmp_path / "summary.json").read_text())["stopped_because"] == "all steps were made"
    assert load_checkpoint(tmp_path / "checkpoints")[1] == 5
