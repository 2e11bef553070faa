"""The command line: help, mistakes, jobs, sweeps, resumed runs, and configurations that try to run code."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from bilevel.cli import main
from bilevel.cli.allow import check_targets
from bilevel.cli.arguments import read_arguments
from bilevel.cli.build import build
from bilevel.cli.completion import BASH
from bilevel.cli.directories import Record, new_run_directory
from bilevel.cli.resume import check_unchanged
from bilevel.cli.settings import Settings
from bilevel.errors import UsageError

ROOT = Path(__file__).resolve().parents[1]

PACKAGE = """
from dataclasses import dataclass
from typing import Any

import os as hidden

import torch

import bilevel
from bilevel.errors import UsageError


class Problem:
    def __init__(self, scale: float = 1.0, num_rows: int = 3, label: str = "a", tags: tuple[str, ...] = (),
                 noise: float | None = None, shuffle: bool = False):
        if scale < 0:
            raise UsageError(f"scale must not be negative, and got {scale}.")
        self.scale, self.label = scale, label

    def to(self, device, dtype):
        self.device, self.dtype = device, dtype
        return self


@dataclass
class Solver:
    num_steps: int = 10
    rtol: float = 1e-6


@dataclass
class Linear:
    damping: float = 0.0


@dataclass
class Implicit:
    linear_solver: Any
    rtol: float = 1e-6


@dataclass
class Trainer:
    num_steps: int = 5
    patience: int | None = None


class Broken(Exception):
    pass


class Given(bilevel.Problem):
    # a real problem whose code raises in one place, or in the second outer step

    def __init__(self, raises_in: str = ""):
        self.raises_in, self.step = raises_in, 0
        self.inner_batches = self.count

    def count(self, step, inner_step):
        self.step = step
        return torch.zeros(())

    def reach(self, place):
        if self.raises_in == place or (self.raises_in == "later" and place == "inner_loss" and self.step == 1):
            raise Broken(f"no luck in {place}")

    def init_hparams(self):
        self.reach("init_hparams")
        return {"target": torch.tensor(1.0)}

    def init_params(self, hparams):
        self.reach("init_params")
        return {"x": torch.zeros(())}

    def inner_loss(self, params, hparams, batch):
        self.reach("inner_loss")
        return (params["x"] - hparams["target"]).square() + batch

    def outer_loss(self, params, hparams, batch):
        self.reach("outer_loss")
        return params["x"].square()

    def metrics(self, params, hparams):
        if self.raises_in == "exit":
            raise SystemExit(7)
        self.reach("metrics")
        return {}


def crash():
    raise RuntimeError("a mistake of ours")
"""

CONF = {
    "problem/tiny": {
        "_target_": "tiny_pkg.Problem",
        "scale": 1.0,
        "num_rows": 3,
        "label": "a",
        "tags": [],
        "noise": None,
        "shuffle": False,
    },
    "problem/given": {"_target_": "tiny_pkg.Given", "raises_in": ""},
    "solver/tiny": {"_target_": "tiny_pkg.Solver", "num_steps": 10, "rtol": 1.0e-6},
    "linear_solver/tiny_cg": {"_target_": "tiny_pkg.Linear", "damping": 0.0},
    "linear_solver/tiny_minres": {"_target_": "tiny_pkg.Linear", "damping": 1.0},
    "hypergradient/tiny_bare": {"_target_": "tiny_pkg.Implicit", "linear_solver": "???", "rtol": 1.0e-6},
    "hypergradient/tiny_cg": {"defaults": ["tiny_bare", {"/linear_solver@linear_solver": "tiny_cg"}, "_self_"]},
    "hypergradient/tiny_one_step": {"_target_": "tiny_pkg.Linear", "damping": 0.0},
    "outer_optimizer/tiny": {"_target_": "torch.optim.SGD", "_partial_": True, "lr": 0.1, "momentum": 0.0},
    "outer_scheduler/tiny": {"_target_": "torch.optim.lr_scheduler.StepLR", "_partial_": True, "step_size": 3},
    "trainer/tiny": {"_target_": "tiny_pkg.Trainer", "num_steps": 5, "patience": None},
}

EXPERIMENT = """\
# @package _global_
defaults:
  - override /problem: tiny
  - override /solver: tiny
  - override /hypergradient: tiny_cg
  - override /outer_optimizer: tiny
  - override /trainer: tiny
  - override /tracking: none
name: tiny
problem:
  scale: 2.0
"""


class Tiny:
    """A user's own package and configurations, and what the stand-in for the trainer saw."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.conf = folder, folder / "my_conf"
        self.calls: list[dict[str, Any]] = []
        (folder / "tiny_pkg.py").write_text(PACKAGE)
        for name, content in CONF.items():
            self.write(name, yaml.safe_dump(content))
        self.write("experiment/tiny", EXPERIMENT)

    def write(self, name: str, text: str) -> None:
        file = self.conf / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def words(self, *words: str) -> list[str]:
        has_experiment = any(word.startswith("experiment=") for word in words)
        return ["train", "--config-dir", str(self.conf), *([] if has_experiment else ["experiment=tiny"]), *words]

    def environment(self, **more: str) -> dict[str, str]:
        paths = os.pathsep.join([str(self.folder), str(ROOT)])
        return {**os.environ, "PYTHONPATH": paths, "BILEVEL_ALLOW": "tiny_pkg.", **more}

    @property
    def runs(self) -> list[Path]:
        return sorted(path.parent for path in self.folder.glob("outputs/**/config.yaml"))

    def run_trainer(self, parts: Any, config: Any, directory: Path, *, resume: bool) -> dict[str, Any]:
        """Stands in for the outer loop; the problem's label says how the run ends."""
        self.calls.append({"parts": parts, "config": config, "directory": directory, "resume": resume})
        if parts.problem.label == "wrong":
            raise UsageError("the problem has no hyperparameters: give it some.")
        if parts.problem.label == "crash":
            raise RuntimeError("a mistake of ours")
        if parts.problem.label == "interrupted":
            raise KeyboardInterrupt
        (directory / "metrics.jsonl").write_text('{"step": 0}\n')
        if parts.problem.label == "interrupted later":
            (directory / "checkpoints").mkdir()
            (directory / "checkpoints" / "step-0").mkdir()
            raise KeyboardInterrupt
        (directory / "summary.json").write_text("{}")
        return {"best": {"step": 0, "outer_loss": 0.5}}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tiny]:
    """The user's folder, as the working directory."""
    project = Tiny(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("BILEVEL_ALLOW", "tiny_pkg.")
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    dtype, num_threads = torch.get_default_dtype(), torch.get_num_threads()
    yield project
    torch.set_default_dtype(dtype)
    torch.set_num_threads(num_threads)
    sys.modules.pop("tiny_pkg", None)


@pytest.fixture
def tiny(project: Tiny, monkeypatch: pytest.MonkeyPatch) -> Tiny:
    """The same with a stand-in for the trainer."""
    monkeypatch.setattr("bilevel.cli.job.run_trainer", project.run_trainer)
    monkeypatch.setattr("bilevel.report.write_report", lambda directory: None, raising=False)
    return project


def sentence(captured: Any) -> str:
    """What stderr says, which must be one line without a traceback."""
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("bilevel: ")
    return lines[0].removeprefix("bilevel: ")


# --- help and speed ---------------------------------------------------------------------------------------------------


HEAVY = {"torch", "wandb", "matplotlib", "sklearn", "numpy"}


def at_once(words: list[str], tiny: Tiny) -> tuple[int, str, str]:
    """Runs `python -m bilevel ...` as a user does; fails when it takes a second or imports a heavy package.

    On a slow or busy machine the second is that of a usual one, on which to import Hydra takes a quarter of it.
    """
    front, wall, limits = ["-m", "bilevel"], [], [1.0]
    while not wall or (min(wall) >= max(limits) and len(wall) < 3):
        start = time.perf_counter()
        done = run_front(front, words, tiny)
        wall.append(time.perf_counter() - start)
        if wall[-1] >= 1.0:
            start = time.perf_counter()
            run_front(["-c", "import hydra.compose, hydra.utils"], [], tiny)
            limits.append(4 * (time.perf_counter() - start))
    assert min(wall) < max(limits), (wall, limits)
    told = run_front(["-X", "importtime", *front], words, tiny).stderr
    imported = {line.rpartition("|")[2].strip() for line in told.splitlines() if line.startswith("import time:")}
    assert "bilevel.cli.main" in imported
    assert not HEAVY & imported
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["report", "--help"], ["--version"], []])
def test_help_answers_at_once_without_torch(words, tiny):
    status, out, err = at_once(words, tiny)
    assert (status, err) == (0, "")
    assert "bilevel" in out


def test_a_command_that_imports_torch_is_found(tiny):
    (tiny.folder / "sitecustomize.py").write_text("import sys, types\nimport numpy\n")
    with pytest.raises(AssertionError, match="numpy"):
        at_once(["--version"], tiny)


def test_help_lists_commands_groups_and_keys(capsys, tiny):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for word in ("train", "report", "tracking", "console", "wandb*", "device=cpu", "seed=0", "resume=null", "-m "):
        assert word in text, word
    assert main(["train", "--help", "--config-dir", str(tiny.conf)]) == 0
    text = capsys.readouterr().out
    assert "tiny_one_step" in text
    assert "--config-dir" in text


def test_mistake_answers_at_once_without_torch_and_leaves_nothing(tiny):
    words = tiny.words("-m", "seed=1,2", "trainer.num_stps=3")
    status, out, err = at_once(words, tiny)
    assert (status, out) == (2, "")
    assert err == (
        "bilevel: there is no key 'trainer.num_stps' with experiment=tiny; did you mean 'trainer.num_steps'?\n"
    )
    assert not (tiny.folder / "outputs").exists()


# --- mistakes ---------------------------------------------------------------------------------------------------------

MISTAKES: dict[str, tuple[list[str], str]] = {
    "misspelt key": (["trainer.num_stps=3"], "did you mean 'trainer.num_steps'?"),
    "key without its group": (["patience=3"], "did you mean 'trainer.patience'?"),
    "ambiguous key": (["num_steps=3"], "did you mean 'solver.num_steps' or 'trainer.num_steps'?"),
    "unknown key": (["trainer.zebra=3"], "the keys of trainer are trainer.num_steps, trainer.patience."),
    "key of a group not chosen": (["outer_scheduler.step_size=4"], "first choose outer_scheduler="),
    "misspelt group": (["solvr=tiny"], "did you mean 'solver'?"),
    "misspelt option": (["hypergradient=tiny_gc"], "did you mean 'tiny_cg'?"),
    "unknown option": (
        ["hypergradient=zebra"],
        "its options are amigo, bome, f2sa, finite_difference, first_order, forward",
    ),
    "misspelt word for an experiment": (["experment=tiny"], "did you mean 'experiment'?"),
    "misspelt experiment": (["experiment=tinny"], "did you mean 'tiny'?"),
    "null option": (["outer_scheduler=null"], "not null"),
    "group of another place": (
        ["linear_solver=tiny_minres"],
        "write linear_solver@hypergradient.linear_solver=tiny_minres.",
    ),
    "group without a place": (
        ["hypergradient=tiny_one_step", "linear_solver=tiny_cg"],
        "nothing in this configuration",
    ),
    "no equals sign": (["seed"], "an override is written key=value"),
    "no key": (["=3"], "a key is missing"),
    "open bracket": (["problem.label=[a"], "quote a text"),
    "text for an integer": (["trainer.num_steps=abc"], "takes an integer (its default is 5), and got 'abc'"),
    "fraction for an integer": (["trainer.num_steps=3.5"], "takes an integer"),
    "truth for an integer": (["trainer.num_steps=true"], "takes an integer"),
    "text for a number": (["solver.rtol=tiny"], "takes a number"),
    "integer for a truth": (["problem.shuffle=1"], "takes true or false"),
    "integer for a text": (["problem.label=3"], """quote it: problem.label="'3'\""""),
    "text for a list": (["problem.tags=a"], "takes a list"),
    "value for a branch": (["problem=3"], "problem has no option '3'"),
    "wrong value inside a branch": (["problem={scale:x}"], "problem.scale takes a number"),
    "misspelt key inside a branch": (["problem={scal:3}"], "did you mean 'problem.scale'?"),
    "given twice": (["seed=1", "seed=2"], "seed is given twice, as seed=1 and as seed=2"),
    "needless plus": (["+seed=3"], "leave the + out"),
    "misspelt key with a plus": (["+sead=3"], "did you mean seed=3, without the +?"),
    "removed": (["~trainer"], "a job needs trainer"),
    "mandatory": (["hypergradient=tiny_bare"], "hypergradient.linear_solver has no default"),
    "interpolation to nowhere": (["problem.label=${nope}"], "does not resolve at problem.label"),
    "sweep without -m": (["seed=1,2"], "add -m to make them all, or write seed=[1,2] for a list"),
    "range without -m": (["seed=range(1,3)"], "add -m to make them all."),
    "misspelt member of a sweep": (["-m", "hypergradient=tiny_cg,tiny_one_stp"], "did you mean 'tiny_one_step'?"),
    "wrong member of a sweep": (["-m", "seed=1,a"], "seed takes an integer"),
    "key of one member only": (
        ["-m", "hypergradient=tiny_cg,tiny_one_step", "hypergradient.rtol=0.1"],
        "no key 'hypergradient.rtol' with experiment=tiny hypergradient=tiny_one_step",
    ),
    "resumed sweep": (["-m", "resume=."], "has no config.yaml"),
    "resume without a folder": (["resume="], "resume= takes the folder of a run, and "),
    "unknown key of Hydra": (["hydra.sweeper.foo=1"], "there is no key 'hydra.sweeper.foo'"),
    "Hydra's run folder": (["hydra.run.dir=foo"], "give output_dir=DIR"),
    "unknown launcher": (["hydra/launcher=zebra"], "hydra/launcher has no option 'zebra'"),
    "flag for a setting": (["--seed=3"], "write seed=3."),
    "misspelt flag": (["--multrun"], "did you mean '--multirun'?"),
    "two actions": (["-m", "--cfg", "job"], "not allowed with argument"),
    "pickle": (["--experimental-rerun", "x.pickle"], "it reads a pickle"),
    "config path": (["--config-path=x"], "add a folder of your own with --config-dir DIR"),
    "seed": (["seed=-1"], "seed takes an integer from 0"),
    "device": (["device=gpu"], "device takes cpu, cuda, cuda:N or mps"),
    "dtype": (["dtype=float46"], "did you mean 'float64'?"),
    "threads": (["threads=0"], "threads takes an integer of at least 1"),
    "dtype of mps": (["device=mps", "dtype=float64"], "mps has no float64"),
    "name": (["name=a/../b"], "cannot be one"),
    "absolute name": (["name=/tmp/x"], "cannot be one"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_gets_one_sentence_and_exit_status_2(mistake, capsys, tiny):
    words, expected = MISTAKES[mistake]
    assert main(tiny.words(*words)) == 2
    assert expected in sentence(capsys.readouterr())
    assert not tiny.calls
    assert not (tiny.folder / "outputs").exists()


def test_mistake_shows_its_traceback_when_asked(monkeypatch, tiny):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(UsageError, match="sead"):
        main(tiny.words("+sead=3"))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["trian"], "did you mean 'train'?"),
        (["zebra"], "the commands are check, plan, report, train."),
        (["seed=1"], "train seed=1"),
    ],
)
def test_unknown_command(words, expected, capsys):
    assert main(words) == 2
    assert expected in sentence(capsys.readouterr())


def test_config_dir_that_is_no_folder(capsys, tiny):
    assert main(["train", "--config-dir", "nowhere"]) == 2
    assert "'nowhere' is not a folder" in sentence(capsys.readouterr())


def test_flags_and_overrides_in_any_order():
    arguments = read_arguments(["a=1", "-m", "b=2", "--config-dir", "/", "c=3"])
    assert arguments.overrides == ("a=1", "b=2", "c=3")
    assert arguments.for_hydra() == ["--config-dir", "/", "--multirun", "a=1", "b=2", "c=3"]


def test_values_that_fit(capsys, tiny):
    words = ["trainer.patience=3", "solver.rtol=1", "problem.noise=null", "problem.tags=[a,b]", "problem.label=a b:c"]
    assert main(tiny.words(*words, "+mine=3", "problem.scale=${solver.rtol}", "++seed=4")) == 0
    config = tiny.calls[0]["config"]
    assert config["problem"]["scale"] == 1
    assert config["problem"]["tags"] == ["a", "b"]
    assert (config["mine"], config["seed"], config["trainer"]["patience"]) == (3, 4, 3)


# --- a job ------------------------------------------------------------------------------------------------------------


def test_job_builds_the_parts_and_leaves_one_folder(capsys, tiny):
    words = ["dtype=float64", "seed=3", "outer_scheduler=tiny", "linear_solver@hypergradient.linear_solver=tiny_minres"]
    assert main(tiny.words(*words)) == 0
    call = tiny.calls[0]
    parts, directory = call["parts"], call["directory"]
    assert parts.problem.dtype == torch.float64
    assert parts.problem.device == torch.device("cpu")
    assert parts.problem.scale == 2.0
    assert parts.hypergradient.linear_solver.damping == 1.0
    assert type(parts.solver).__name__ == "Solver"
    optimizer = parts.optimizer([torch.zeros(1, requires_grad=True)])
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert parts.scheduler(optimizer).step_size == 3
    assert torch.initial_seed() == 3
    assert not call["resume"]
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-1] == f"summary: {directory / 'summary.json'}"
    assert captured.err == ""
    assert tiny.runs == [tiny.folder / directory]
    assert directory.parent == Path("outputs/tiny")
    assert yaml.safe_load((directory / "config.yaml").read_text())["seed"] == 3
    record = yaml.safe_load((directory / "overrides.yaml").read_text())
    assert record == {"overrides": ["experiment=tiny", *words], "config_dir": str(tiny.conf)}
    assert sorted(path.name for path in tiny.folder.iterdir() if not path.name.startswith("__")) == [
        "my_conf",
        "outputs",
        "tiny_pkg.py",
    ]


def test_mistakes_found_while_building_leave_nothing(capsys, tiny):
    for words, expected in [
        (["problem.scale=-1"], "scale must not be negative, and got -1."),
        (["problem.num_rows=null"], "problem.num_rows cannot be null: tiny_pkg.Problem takes int."),
        (["+problem.foo=1"], "problem: tiny_pkg.Problem takes no argument 'foo'; its arguments are"),
        (
            ["+problem.foo=1", "+problem.bar=2"],
            "where an experiment sets it, add ~problem.foo ~problem.bar.",
        ),
        (
            ["problem._target_=tiny_pkg.Problm"],
            "names tiny_pkg.Problm, but tiny_pkg has no 'Problm'; did you mean 'Problem'?",
        ),
        (["outer_scheduler=tiny", "outer_scheduler.step_size=null"], "outer_scheduler.step_size cannot be null"),
        (["device=cuda:99"], "device=cuda:99 was asked for, and torch sees"),
    ]:
        assert main(tiny.words(*words)) == 2, words
        assert expected in sentence(capsys.readouterr())
    assert not tiny.calls
    assert not (tiny.folder / "outputs").exists()


def test_mistake_that_the_trainer_finds_leaves_nothing(capsys, tiny):
    assert main(tiny.words("problem.label=wrong")) == 2
    assert sentence(capsys.readouterr()) == "the problem has no hyperparameters: give it some."
    assert not (tiny.folder / "outputs").exists()


def test_failure_that_is_ours_keeps_its_traceback_and_leaves_nothing(tiny):
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        main(tiny.words("problem.label=crash"))
    assert tiny.calls and not (tiny.folder / "outputs").exists()


def test_a_record_that_cannot_be_written_leaves_nothing(tiny, monkeypatch):
    def full(self: Path, text: str, encoding: str) -> int:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="no space left"):
            main(tiny.words())
    assert not tiny.calls and not (tiny.folder / "outputs").exists()


def really(project: Tiny, raises_in: str) -> list[str]:
    """The command that runs `tiny_pkg.Given` with the real trainer."""
    words = ["problem=given", "hypergradient=one_step", "tracking=none", "trainer.num_steps=2", "solver.max_steps=5"]
    return ["train", "--config-dir", str(project.conf), *words, f"problem.raises_in={raises_in}"]


@pytest.mark.parametrize("place", ["init_hparams", "init_params", "inner_loss", "outer_loss", "metrics"])
def test_a_problem_that_raises_before_its_first_step_leaves_nothing(place, project):
    with pytest.raises(Exception, match=f"no luck in {place}"):
        main(really(project, place))
    assert list(project.folder.glob("outputs*")) == []


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["outer_optimizer.lr=-1.0"], "the outer optimizer cannot be made: Invalid learning rate: -1.0."),
        (
            ["outer_optimizer=adam", "outer_optimizer.capturable=true"],
            "Adam cannot step on .*: If capturable=True, params",
        ),
        (
            ["outer_optimizer=lbfgs", "outer_optimizer.line_search_fn=strong_wolfe"],
            "leave line_search_fn out and set lr",
        ),
        (
            ["outer_scheduler=cosine", "outer_scheduler.last_epoch=3"],
            "the outer scheduler cannot be made: param 'initial_lr' is not specified",
        ),
    ],
    ids=lambda value: value[-1].partition("=")[0] if isinstance(value, list) else "",
)
def test_an_optimizer_that_torch_refuses_leaves_nothing(words, expected, capsys, project):
    assert main([*really(project, "nowhere"), *words]) == 2
    assert re.search(expected, sentence(capsys.readouterr()))
    assert list(project.folder.glob("outputs*")) == []


def test_a_problem_that_exits_before_its_first_step_leaves_nothing(project):
    with pytest.raises(SystemExit, match="7"):
        main(really(project, "exit"))
    assert list(project.folder.glob("outputs*")) == []


def test_a_problem_that_raises_later_keeps_what_it_has(project):
    with pytest.raises(Exception, match="no luck in inner_loss"):
        main(really(project, "later"))
    (folder,) = project.runs
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 1
    assert (folder / "summary.json").exists()


def test_interrupted_before_the_first_step_leaves_nothing(capsys, tiny):
    assert main(tiny.words("problem.label=interrupted")) == 130
    assert "nothing was written" in sentence(capsys.readouterr())
    assert not (tiny.folder / "outputs").exists()


def test_interrupted_later_says_how_to_go_on(capsys, tiny):
    assert main(tiny.words("problem.label=interrupted later")) == 130
    assert sentence(capsys.readouterr()) == f"interrupted: go on with python -m bilevel train resume={_latest(tiny)}"


def test_report_that_fails_does_not_lose_the_run(capsys, monkeypatch, tiny):
    def fail(directory: Path) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr("bilevel.report.write_report", fail, raising=False)
    assert main(tiny.words()) == 0
    captured = capsys.readouterr()
    assert "no report: the disk is full; the run is complete" in sentence(captured)
    assert captured.out.splitlines()[-1].startswith("summary: ")


def test_folders_of_the_same_second_differ(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    directories = [new_run_directory("out", "a") for _ in range(3)]
    assert len({directory.path for directory in directories}) == 3
    assert directories[1].discard_if_unused()
    assert not directories[1].path.exists()
    assert directories[0].path.exists()


def test_output_dir_that_cannot_be_made(capsys, tiny):
    (tiny.folder / "file").write_text("")
    assert main(tiny.words("output_dir=file")) == 2
    assert "no folder can be made under file/tiny" in sentence(capsys.readouterr())


def test_device_that_is_there():
    device, dtype = Settings(name="a", seed=1).apply()
    assert (device.type, dtype) == ("cpu", torch.float32)


def test_hydras_own_logging_can_be_chosen(tiny):
    assert main(tiny.words("hydra/job_logging=stdout")) == 0
    assert main(tiny.words("hydra/job_logging=default", "--cfg", "job")) == 0


# --- sweeps -----------------------------------------------------------------------------------------------------------


def test_sweep_makes_one_numbered_folder_a_job(capsys, tiny):
    assert main(tiny.words("-m", "hypergradient=tiny_cg,tiny_one_step", "seed=1,2")) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.count("summary: ") == 4
    assert [run.name for run in tiny.runs] == ["0", "1", "2", "3"]
    sweep = tiny.runs[0].parent
    assert sweep.parent == tiny.folder / "outputs" / "tiny"
    assert sweep.name.startswith("sweep_2")
    assert [call["config"]["seed"] for call in tiny.calls] == [1, 2, 1, 2]
    record = yaml.safe_load((tiny.runs[3] / "overrides.yaml").read_text())
    assert record["overrides"] == ["experiment=tiny", "hypergradient=tiny_one_step", "seed=2"]


def test_sweep_goes_on_after_a_mistake(capsys, tiny):
    assert main(tiny.words("-m", "problem.scale=1,-1,2")) == 2
    err = capsys.readouterr().err
    assert "bilevel: job 1: scale must not be negative, and got -1." in err
    assert "bilevel: 1 of 3 jobs failed; the others are complete." in err
    assert "Traceback" not in err
    assert [call["config"]["problem"]["scale"] for call in tiny.calls] == [1, 2]
    assert sorted(path.name for path in tiny.runs[0].parent.iterdir() if path.is_dir()) == ["0", "2"]


def test_sweep_goes_on_after_a_failure_of_ours(capsys, tiny):
    assert main(tiny.words("-m", "problem.label=crash,a")) == 1
    err = capsys.readouterr().err
    assert err.count("Traceback") == 1
    assert "1 of 2 jobs failed" in err
    assert len(tiny.calls) == 2


def test_interrupted_sweep_stops(capsys, tiny):
    assert main(tiny.words("-m", "problem.label=interrupted later,a")) == 130
    assert f"resume={tiny.folder}/outputs/tiny/sweep_" in sentence(capsys.readouterr())
    assert len(tiny.calls) == 1


def test_sweep_written_in_a_file(capsys, tiny):
    sweep = "# @package hydra\nmode: MULTIRUN\nsweeper:\n  params:\n    seed: 5,6\n    "
    tiny.write("sweep/good", sweep + "problem.scale: 3\n")
    tiny.write("sweep/bad", sweep + "problem.scal: 3\n")
    assert main(tiny.words("+sweep=good")) == 0
    assert [call["config"]["seed"] for call in tiny.calls] == [5, 6]
    capsys.readouterr()
    assert main(tiny.words("+sweep=bad")) == 2
    assert "did you mean 'problem.scale'?" in sentence(capsys.readouterr())


# --- resumed runs -----------------------------------------------------------------------------------------------------


def _latest(tiny: Tiny) -> Path:
    return tiny.runs[-1].relative_to(tiny.folder)


def test_resume_composes_the_recorded_command_again(capsys, tiny):
    assert main(tiny.words("seed=7", "problem.scale=1e-06")) == 0
    folder = _latest(tiny)
    assert main(["train", f"resume={folder}"]) == 0
    first, second = tiny.calls
    assert second["resume"]
    assert second["directory"] == first["directory"]
    assert second["config"] == {**first["config"], "resume": str(folder)}
    assert tiny.runs == [tiny.folder / folder]
    assert capsys.readouterr().out.splitlines()[-1] == f"summary: {folder / 'summary.json'}"


def test_resume_may_change_the_number_of_steps_and_the_tracking(tiny):
    assert main(tiny.words("trainer.num_steps=3", "problem.noise=nan")) == 0  # NaN has not changed either
    assert main(["train", f"resume={_latest(tiny)}", "trainer.num_steps=9", "tracking=console"]) == 0
    assert tiny.calls[-1]["parts"].trainer.num_steps == 9
    assert len(tiny.calls[-1]["parts"].trackers) == 1


def test_resume_of_a_job_of_a_sweep(tiny):
    assert main(tiny.words("-m", "seed=1,2")) == 0
    assert main(["train", f"resume={tiny.runs[1].relative_to(tiny.folder)}"]) == 0
    assert tiny.calls[-1]["config"]["seed"] == 2


def test_resume_refuses_other_changes_and_shows_them(capsys, tiny):
    assert main(tiny.words("seed=7")) == 0
    folder = _latest(tiny)
    capsys.readouterr()
    assert main(["train", f"resume={folder}", "seed=8"]) == 2
    assert f"{folder} continues only as it was, and seed was 7 and is now 8:" in sentence(capsys.readouterr())
    tiny.write("solver/tiny", "_target_: tiny_pkg.Solver\nnum_steps: 11\n")
    assert main(["train", f"resume={folder}"]) == 2
    said = sentence(capsys.readouterr())
    assert "solver.num_steps was 10 and is now 11" in said
    assert "solver.rtol was 1e-06 and is now 'absent'" in said
    assert len(tiny.calls) == 1


@pytest.mark.parametrize(
    ("before", "now", "same"),
    [
        ([1, math.nan], [1, math.nan], True),
        ({}, {}, True),
        ([1], [1.0], False),
        (1, True, False),
        ([{"a": 1}], [{"a": 2}], False),
        ({}, {"b": None}, False),
    ],
)
def test_what_resume_takes_for_a_change(before, now, same):
    record = Record({"key": before}, (), None)
    if same:
        check_unchanged(record, {"key": now}, "folder")
    else:
        with pytest.raises(UsageError, match="folder continues only as it was, and key"):
            check_unchanged(record, {"key": now}, "folder")


def test_resume_never_builds_what_config_yaml_says(capsys, tiny):
    assert main(tiny.words()) == 0
    file = _latest(tiny) / "config.yaml"
    file.write_text(file.read_text().replace("tiny_pkg.Problem", "os.system"))
    capsys.readouterr()
    assert main(["train", f"resume={_latest(tiny)}"]) == 2
    assert "problem._target_ was 'os.system' and is now 'tiny_pkg.Problem'" in sentence(capsys.readouterr())


def test_resume_under_another_allow_list(capsys, monkeypatch, tiny):
    assert main(tiny.words()) == 0
    monkeypatch.delenv("BILEVEL_ALLOW")
    capsys.readouterr()
    assert main(["train", f"resume={_latest(tiny)}"]) == 2
    assert "set BILEVEL_ALLOW=tiny_pkg. in the environment" in sentence(capsys.readouterr())


def _break(folder: Path, how: str) -> None:
    config, overrides = folder / "config.yaml", folder / "overrides.yaml"
    if how == "no config":
        config.unlink()
    elif how == "no overrides":
        overrides.unlink()
    elif how == "broken config":
        config.write_text("a: [1,")
    elif how == "no keys":
        config.write_text("- 1\n")
    elif how == "broken overrides":
        overrides.write_text("a: b: c")
    elif how == "no list":
        overrides.write_text("overrides: 3\n")
    elif how == "config-dir gone":
        overrides.write_text("overrides: []\nconfig_dir: /nowhere\n")
    elif how == "bytes":
        config.write_bytes(b"\xff\xfe\x00\x01")
    else:
        (folder / "multirun.yaml").write_text("")


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("no config", "has no config.yaml"),
        ("no overrides", "has no overrides.yaml"),
        ("broken config", "config.yaml is broken"),
        ("no keys", "it holds no keys"),
        ("broken overrides", "overrides.yaml is broken"),
        ("no list", "its overrides are no list of texts"),
        ("config-dir gone", "--config-dir /nowhere, which is gone"),
        ("bytes", "config.yaml is broken"),
        ("a sweep", "is a sweep: continue one of its runs"),
    ],
)
def test_resume_of_a_broken_folder(how, expected, capsys, tiny):
    assert main(tiny.words()) == 0
    _break(_latest(tiny), how)
    folder = next((tiny.folder / "outputs" / "tiny").iterdir()).relative_to(tiny.folder)
    capsys.readouterr()
    assert main(["train", f"resume={folder}"]) == 2
    assert expected in sentence(capsys.readouterr())
    assert len(tiny.calls) == 1


def test_resume_of_no_folder(capsys, tiny):
    assert main(["train", "resume=nowhere"]) == 2
    assert "there is no such folder" in sentence(capsys.readouterr())


# --- configurations that try to run code ------------------------------------------------------------------------------

ATTACKS: dict[str, Any] = {
    "os.system": {"_target_": "os.system", "command": "touch hacked"},
    "eval": {"_target_": "builtins.eval", "_args_": ["open('hacked', 'w')"]},
    "bare eval": {"_target_": "eval", "_args_": ["open('hacked', 'w')"]},
    "subprocess": {"_target_": "subprocess.run", "args": ["touch", "hacked"]},
    "torch.load": {"_target_": "torch.load", "f": "payload.pt", "weights_only": False},
    "torch by its optimiser": {"_target_": "torch.optim.optimizer.torch.load", "f": "payload.pt"},
    "a module of ours": {"_target_": "tiny_pkg.hidden.system", "command": "touch hacked"},
    "the command line": {"_target_": "bilevel.cli.train.os.system", "command": "touch hacked"},
    "partial": {"_target_": "functools.partial", "_args_": [{"_target_": "os.system"}], "_partial_": True},
    "nested": {"_target_": "tiny_pkg.Implicit", "linear_solver": {"_target_": "os.system", "command": "touch hacked"}},
    "in a list": {"_target_": "tiny_pkg.Implicit", "linear_solver": [[{"_target_": "os.system", "command": "x"}]]},
    "in the arguments": {"_target_": "tiny_pkg.Implicit", "_args_": [{"_target_": "os.system", "command": "x"}]},
    "not recursive": {
        "_target_": "tiny_pkg.Implicit",
        "_recursive_": False,
        "linear_solver": {"_target_": "os.system"},
    },
    "dunder": {"_target_": "tiny_pkg.Problem.__init__.__globals__"},
    "prefix without its dot": {"_target_": "tiny_pkg_evil.Problem"},
    "relative": {"_target_": "tiny_pkg..hidden.system"},
    "no text": {"_target_": ["os.system"]},
    "null": {"_target_": None},
    "interpolation kept for later": {"_target_": "tiny_pkg.Problem", "label": "${oc.create:'{_target_: os.system}'}"},
    "no class": {"_target_": "tiny_pkg.hidden"},
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_build_refuses_what_is_not_allowed(attack, tiny):
    with pytest.raises(UsageError, match=r"_target_|allow-list|neither a class|interpolation"):
        build(ATTACKS[attack], "problem")
    assert not (tiny.folder / "hacked").exists()


@pytest.mark.parametrize("attack", sorted(ATTACKS.keys() - {"interpolation kept for later"}))
def test_job_refuses_what_is_not_allowed(attack, capsys, tiny):
    tiny.write("problem/evil", yaml.safe_dump(ATTACKS[attack]))
    assert main(tiny.words("problem=evil")) == 2
    sentence(capsys.readouterr())
    assert not tiny.calls
    assert not (tiny.folder / "hacked").exists()
    assert not (tiny.folder / "outputs").exists()


def test_escaped_interpolation_is_not_filled_in_a_second_time(capsys, tiny):
    evil = r"\${oc.create:'{_target_: os.system, command: touch hacked}'}"
    tiny.write("problem/evil", yaml.safe_dump({"_target_": "tiny_pkg.Problem", "label": evil}))
    assert main(tiny.words("problem=evil")) == 2
    assert "an interpolation that is not resolved" in sentence(capsys.readouterr())


HYDRA_ATTACKS = {
    "launcher": "launcher:\n  _target_: os.system\n",
    "callbacks": "callbacks:\n  a:\n    _target_: os.system\n    command: touch hacked\n",
    "callbacks by hydra.utils": "callbacks:\n  a:\n    _target_: hydra.utils.get_method\n    path: os.system\n",
    "sweeper": "sweeper:\n  _target_: os.system\n",
    "logging factory": "job_logging:\n  handlers:\n    a:\n      (): os.system\n      command: touch hacked\n",
    "logging class": "hydra_logging:\n  handlers:\n    console:\n      class: subprocess.Popen\n",
    "logging import": "hydra_logging:\n  handlers:\n    console:\n      stream: ext://antigravity.fly\n",
    "allow-list from a file": "job:\n  env_set:\n    BILEVEL_ALLOW: os.\n",
    "policy from a file": "job:\n  env_set:\n    HYDRA_INSTANTIATE_ALLOWLIST_OVERRIDE: os.system\n",
}


@pytest.mark.parametrize("attack", HYDRA_ATTACKS)
@pytest.mark.parametrize("mode", [[], ["-m", "seed=1,2"]])
def test_hydra_itself_is_not_led_astray(attack, mode, capsys, tiny):
    body = "".join(f"  {line}\n" for line in HYDRA_ATTACKS[attack].splitlines())
    tiny.write("experiment/evil", EXPERIMENT + "hydra:\n" + body)
    assert main(tiny.words("experiment=evil", *mode)) == 2
    assert "hydra." in sentence(capsys.readouterr())
    assert not tiny.calls
    assert not (tiny.folder / "hacked").exists()


def test_only_the_environment_widens_the_allow_list(monkeypatch):
    node = {"_target_": "tiny_pkg.Problem"}
    monkeypatch.delenv("BILEVEL_ALLOW", raising=False)
    with pytest.raises(UsageError, match=r"set BILEVEL_ALLOW=tiny_pkg\. in the environment"):
        check_targets(node, "problem")
    for value in ("tiny_pkg.", "tiny_pkg", " other. , tiny_pkg ,,"):
        monkeypatch.setenv("BILEVEL_ALLOW", value)
        check_targets(node, "problem")
        with pytest.raises(UsageError):
            check_targets({"a": [{"_target_": "tiny_pkgs.Problem"}]})
        with pytest.raises(UsageError):
            check_targets({"_target_": "os.system"})


def test_build_keeps_plain_values_plain(tiny):
    made = build({"_target_": "tiny_pkg.Implicit", "linear_solver": {"a": [1, {"b": 2}]}}, "hypergradient")
    assert type(made.linear_solver) is dict
    assert type(made.linear_solver["a"]) is list
    nested = build({"_target_": "tiny_pkg.Implicit", "linear_solver": [{"_target_": "tiny_pkg.Linear"}]}, "x")
    assert type(nested.linear_solver[0]).__name__ == "Linear"
    assert build(None, "x") is None


def test_build_names_the_missing_argument_and_keeps_our_failures(tiny):
    with pytest.raises(UsageError, match=r"hypergradient: tiny_pkg\.Implicit needs the argument 'linear_solver'"):
        build({"_target_": "tiny_pkg.Implicit"}, "hypergradient")
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        build({"_target_": "tiny_pkg.crash"}, "problem")
    with pytest.raises(UsageError, match="solver describes no object"):
        build({"num_steps": 3}, "solver")


# --- the fronts -------------------------------------------------------------------------------------------------------


def run_front(front: list[str], words: list[str], tiny: Tiny, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *front, *words],
        capture_output=True,
        text=True,
        env=tiny.environment(**more),
        cwd=tiny.folder,
        timeout=60,
    )


@pytest.mark.parametrize("front", [["-m", "bilevel", "train"], ["-m", "experiments.train"]])
def test_both_fronts_show_the_configuration(front, tiny):
    done = run_front(front, [*tiny.words("problem.scale=4")[1:], "--cfg", "job", "--resolve"], tiny)
    assert (done.returncode, done.stderr) == (0, "")
    config = yaml.safe_load(done.stdout)
    assert config["problem"]["scale"] == 4
    assert config["name"] == "tiny"
    assert list(tiny.folder.glob("outputs")) == []


def test_tab_completion(capsys, tiny):
    assert main(["train", "-sc", "install=bash"]) == 0
    assert capsys.readouterr().out.strip() == BASH
    assert subprocess.run(["bash", "-n"], input=BASH, text=True, check=False).returncode == 0
    line = "train experiment=tiny hypergradient=tiny"
    words = ["--config-dir", str(tiny.conf), "-sc", "query=bash"]
    done = run_front(["-m", "bilevel", "train"], words, tiny, COMP_LINE=line)
    assert done.stdout.split() == ["hypergradient=tiny_bare", "hypergradient=tiny_cg", "hypergradient=tiny_one_step"]
    done = run_front(["-m", "bilevel", "train"], words, tiny, COMP_LINE="train experiment=tiny trainer.pat")
    assert done.stdout.split() == ["trainer.patience="]


def test_bash_completes_the_fronts(tiny):
    script = (
        BASH + '\nCOMP_LINE="python -m bilevel train --zebra experiment=ti"; COMP_POINT=${#COMP_LINE}; '
        'python() { echo "$COMP_LINE|$*" >&2; echo experiment=tiny experiment=other; }; '
        '_bilevel_complete; echo "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "experiment=tiny"


# --- report -----------------------------------------------------------------------------------------------------------


def test_report_of_a_run(capsys, tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 0, "outer_loss": 1.0}) + "\n")
    assert main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"report: {tmp_path / 'report.html'}\n"
    assert (tmp_path / "report.html").is_file()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "report takes one folder"),
        (["a", "b"], "report takes one folder"),
        (["nowhere"], "there is no folder 'nowhere'"),
        (["."], "Expected a run directory"),
    ],
)
def test_report_of_something_else(words, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["report", *words]) == 2
    assert expected in sentence(capsys.readouterr())
