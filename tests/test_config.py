"""conf/ against the code: every option composes, and every file lists what its class takes, with its defaults."""

from __future__ import annotations

import functools
import importlib
import inspect
import itertools
import re
import typing
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from omegaconf import OmegaConf

from bilevel.cli.allow import check_hydra, check_targets
from bilevel.cli.arguments import read_arguments
from bilevel.cli.build import build, find_target
from bilevel.cli.composer import composer, resolve
from bilevel.cli.help import train_help
from bilevel.cli.paths import conf_directory, config_groups
from bilevel.cli.preflight import preflight
from bilevel.cli.settings import Settings
from bilevel.cli.values import NAMING, may_name
from bilevel.errors import UsageError
from bilevel.solvers.options import Option

CONF = conf_directory()
SPECIAL = {"_target_", "_partial_", "_args_", "_convert_", "_recursive_"}
SUPPLIED_LATER = {"params", "optimizer"}  # what the trainer gives a torch.optim optimiser and its scheduler
# Where a file departs from torch's default on purpose: raw hyperparameters want larger steps than weights, and an outer
# step has the loss at one point only.
OWN_VALUES = {
    "torch.optim.Adam": {"lr"},
    "torch.optim.SGD": {"lr"},
    "torch.optim.Rprop": {"lr"},
    "torch.optim.LBFGS": {"max_iter", "history_size"},
}


def options(conf: Path) -> list[tuple[str, str]]:
    """(group, option) for every file of every group."""
    return [(group, option) for group, names in config_groups(conf).items() for option in names]


def described(conf: Path, group: str, option: str) -> list[tuple[str, dict[str, Any]]]:
    """The nodes with a `_target_` that a file itself holds, with their places; presets hold none."""
    return list(_nodes(_read(conf / group, option), f"{group}/{option}"))


def _read(folder: Path, option: str) -> Any:
    """A file with the keys of those of its group that it is based on, if it is a node itself."""
    content = OmegaConf.to_container(OmegaConf.load(folder / f"{option}.yaml"), resolve=False)
    if isinstance(content, Mapping) and "_target_" in content:
        for base in (entry for entry in content.get("defaults", []) if isinstance(entry, str) and entry != "_self_"):
            content = {**_read(folder, base), **content}
    return content


def _nodes(content: Any, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(content, Mapping):
        if "_target_" in content:
            own = {key: value for key, value in content.items() if key != "defaults"}
            yield where, {**_composed(content.get("defaults", [])), **own}
        for key, value in content.items():
            yield from _nodes(value, f"{where}.{key}")
    elif isinstance(content, list):
        for number, value in enumerate(content):
            yield from _nodes(value, f"{where}.{number}")


def _composed(defaults: Any) -> dict[str, str]:
    """The keys that a defaults list fills from other groups, such as `/linear_solver@linear_solver: cg`.

    An override chooses for another node, such as the inner solver, and fills none of this one; nor does a node at the
    top, which is referred to by `${...}`.
    """
    names = [str(key) for entry in defaults if isinstance(entry, Mapping) for key in entry]
    return {
        name.partition("@")[2]: "${composed}"
        for name in names
        if "@" in name and not name.startswith("override ") and "@_global_" not in name
    }


def differences(where: str, node: Mapping[str, Any]) -> list[str]:
    """How a node differs from the signature of the class it names; empty when it does not.

    Every argument is listed with its default, so that it can be overridden without a `+` and is checked before torch is
    imported; the exceptions are in `OWN_VALUES`.
    """
    target = find_target(node["_target_"], where)
    supplied = SUPPLIED_LATER if node.get("_partial_") or not node["_target_"].startswith("bilevel.") else set()
    own = OWN_VALUES.get(node["_target_"], set())
    taken = {
        name: one
        for name, one in inspect.signature(target).parameters.items()
        if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD) and name not in supplied
    }
    given = {key: value for key, value in node.items() if key not in SPECIAL}
    said = [f"{where}.{key} is no argument of {node['_target_']}" for key in given if key not in taken]
    for name, one in taken.items():
        required = one.default is inspect.Parameter.empty
        if name not in given:
            said.append(f"{where} lacks {name}, an argument of {node['_target_']}")
        elif not required and name not in own and not _agrees(given[name], _default(target, name, one.default)):
            said.append(f"{where}.{name} is {given[name]!r}, and the default of {node['_target_']} is {one.default!r}")
    return said


def _default(target: Any, name: str, default: Any) -> Any:
    """A field's default, made by its factory where it has one."""
    made = {field.name: field.default_factory for field in fields(target)} if is_dataclass(target) else {}
    factory = made.get(name, MISSING)
    return default if factory is MISSING else factory()


def _agrees(value: Any, default: Any) -> bool:
    if isinstance(value, str) and "${" in value:
        return True
    if isinstance(value, Mapping) and "_target_" in value:
        name = value["_target_"].rpartition(".")[2]
        if value.get("_partial_"):
            return callable(default)  # a factory; what it makes is its own node
        return default is None or type(default).__name__ == name  # its own arguments are compared as its own node
    if isinstance(value, list) and any(isinstance(one, Mapping) for one in value):
        return len(value) == len(default) and all(map(_agrees, value, default))
    value, default = _plain(value), _plain(default)
    # torch writes 0 where it takes any number: only a float in the file lets the command line give one
    same_kind = type(value) is type(default) or (type(value) is float and type(default) is int)
    return bool(value == default) and same_kind


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_plain(one) for one in value]
    return dict(value) if isinstance(value, Mapping) else value


def compose_option(conf: Path, group: str, option: str) -> dict[str, Any]:
    """Composes the job with one option chosen, and checks it as a job would."""
    with composer(conf=conf) as compose:
        base = compose.compose()
        places = [str(choice) for choice in base.hydra.runtime.choices if str(choice).partition("@")[0] == group]
        if places:
            config = compose.compose([f"{places[0]}={option}"])
        else:  # a group that only some configurations use, such as linear_solver without an iterative method
            config = compose.compose([f"+{group}@chosen={option}"])
        check_hydra(config.hydra)
        try:
            job = resolve(config)
        except UsageError as mistake:  # a bare class such as hypergradient=implicit leaves a part to choose
            if "has no default" not in str(mistake):
                raise
            return dict(config)
    Settings.of(job)
    check_targets(job)
    return job


# --- conf/ as it is ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("group", "option"), options(CONF))
def test_every_option_composes(group, option):
    assert compose_option(CONF, group, option)


@pytest.mark.parametrize(("group", "option"), [pair for pair in options(CONF) if described(CONF, *pair)])
def test_every_file_lists_what_its_class_takes(group, option):
    said = [line for where, node in described(CONF, group, option) for line in differences(where, node)]
    assert not said, "\n".join(said)


@pytest.mark.parametrize(("group", "option"), options(CONF))
def test_every_option_instantiates(group, option, request):
    import torch

    from bilevel.cli.job import assemble

    job = compose_option(CONF, group, option)
    if "bilevel.data.Omniglot" in str(job):
        request.getfixturevalue("omniglot_root")
    if "problem" in job:
        parts = assemble(job, torch.device("cpu"), torch.float32)
        assert parts.problem.init_hparams() and parts.hypergradient is not None
    else:
        assert build(OmegaConf.to_container(job["chosen"]), group) is not None


# Where an option of a group ends, and as what: the names here are the classes of `Implicit` and `Trainer`, not the files'.
POLICIES = {
    "negative_curvature": ("hypergradient", {
        "raise": "negative_curvature.Raise", "damp": "negative_curvature.Damp",
        "minres": "negative_curvature.SwitchToMINRES", "gauss_newton": "negative_curvature.GaussNewton",
        "truncate": "negative_curvature.Truncate",
    }),
    "unconverged": ("hypergradient", {
        "raise": "unconverged.Raise", "warn": "unconverged.Warn", "more_steps": "unconverged.MoreSteps",
        "truncated_unroll": "unconverged.TruncatedUnroll",
    }),
    "accuracy": ("hypergradient", {
        "fixed": "accuracy.FixedAccuracy", "decreasing": "accuracy.DecreasingAccuracy", "adaptive": "accuracy.AdaptiveAccuracy",
    }),
    "damping": ("hypergradient", {"none": "damping.NoDamping", "adaptive": "damping.AdaptiveDamping"}),
    "nonfinite": ("trainer", {"raise": "nonfinite.Raise", "skip": "nonfinite.Skip"}),
    "worthless": ("trainer", {"apply": "worthless.Apply", "shrink": "worthless.Shrink"}),
}  # fmt: skip
GROUPS_OF = {"implicit_auto": set(POLICIES), "implicit_update": set(POLICIES) - {"damping"}}  # which has no part for it
CASES = [
    (method, group, number)
    for method, groups in GROUPS_OF.items()
    for group, (_, classes) in POLICIES.items()
    if group in groups
    for number in range(len(classes))
]


@functools.cache
def assembled(method: str, number: int) -> Any:
    """The objects of a command line that chooses from every group the option of this number, counted around.

    So four compositions for each method serve all options.
    """
    from bilevel.cli.job import assemble

    options = {group: list(POLICIES[group][1]) for group in POLICIES if group in GROUPS_OF[method]}
    chosen = [f"{group}={names[number % len(names)]}" for group, names in options.items()]
    (job,) = preflight(read_arguments([f"hypergradient={method}", *chosen, "tracking=none"]))
    return assemble(job, *Settings.of(job).apply())


@pytest.mark.parametrize(
    ("method", "group", "number"),
    CASES,
    ids=[f"{method}-{group}={list(POLICIES[group][1])[number]}" for method, group, number in CASES],
)
def test_a_policy_on_the_command_line_is_the_object_of_its_place(method, group, number):
    owner, classes = POLICIES[group]
    module, _, name = list(classes.values())[number].rpartition(".")
    expected = getattr(importlib.import_module(f"bilevel.{owner}.{module}"), name)
    assert type(getattr(getattr(assembled(method, number), owner), group)) is expected


def test_every_policy_file_is_expected_somewhere():
    groups = config_groups(CONF)
    assert {group: set(classes) for group, (_, classes) in POLICIES.items()} == {g: set(groups[g]) for g in POLICIES}


def test_the_main_job_composes():
    with composer() as compose:
        job = resolve(compose.compose())
    assert Settings.of(job).dtype in ("float32", "float64")
    check_targets(job)


def test_every_setting_is_a_key_of_train_yaml():
    other_commands = {"check", "plan"}  # keys of their own, which train leaves alone
    keys = yaml.safe_load((CONF / "train.yaml").read_text()).keys() - {"defaults", "hydra"} - other_commands
    assert keys == set(Settings.keys())


HEADER = ("question", "reference", "expected", "minutes", "command")


def header(text: str) -> dict[str, str]:
    """The entries of an experiment's header: `# KEY: TEXT`, gone on with in lines that are indented further."""
    first, *lines = text.splitlines()
    assert first == "# @package _global_"
    entries: dict[str, str] = {}
    for line in itertools.takewhile(lambda line: line.startswith("# "), lines):
        key, colon, value = line[2:].partition(": ")
        if not line.startswith("#  "):
            assert colon and key not in entries, line
            entries[key] = value.strip()
        else:
            entries[list(entries)[-1]] += f" {line[1:].strip()}"
    return entries


def check_header(option: str, text: str) -> None:
    entries = header(text)
    assert tuple(entries) == HEADER, option
    assert entries["question"].partition("(")[0].strip().endswith("?"), option
    assert len(entries["reference"].split()) >= 3, option
    assert re.search(r"\d", entries["expected"]), f"{option} expects no figure"
    assert 0 < float(entries["minutes"]) <= 60, option
    front, *words = entries["command"].split()[2:]
    assert entries["command"].startswith("python -m ") and front == "experiments.train", option
    assert f"experiment={option}" in words, option
    preflight(read_arguments(words))


@pytest.mark.parametrize("option", config_groups(CONF)["experiment"])
def test_every_experiment_says_what_it_is(option):
    check_header(option, (CONF / "experiment" / f"{option}.yaml").read_text())


@pytest.mark.parametrize(
    "change",
    [
        ("# @package _global_\n", ""),
        ("# question: how", "# queston: how"),
        ("penalised? (", "penalised. ("),
        ("# reference: scikit-learn's best of a 100-point grid, computed in the same run", "# reference: none"),
        ("# minutes: 0.2\n", ""),
        ("# minutes: 0.2", "# minutes: a few"),
        ("experiment=digits ", "experiment=digits_mlp "),
        ("problem.penalty=shared", "problem.penlty=shared"),
        ("# expected: ", "# expected: better\n# "),
    ],
)
def test_a_header_that_says_less_is_found(change):
    text = (CONF / "experiment" / "digits.yaml").read_text()
    assert change[0] in text
    with pytest.raises((AssertionError, ValueError)):
        check_header("digits", text.replace(*change, 1))


# --- the checks themselves --------------------------------------------------------------------------------------------

PACKAGE = """
class Linear:
    def __init__(self, rtol: float = 1e-6, max_steps: int | None = None, spans: tuple[int, ...] = (1, 2)):
        pass
class Method:
    def __init__(self, linear_solver, policy: str = "raise"):
        pass
"""


@pytest.fixture
def signatures(tmp_path, monkeypatch):
    """A module under an allowed prefix of bilevel's own, so that its files are held to its defaults."""
    (tmp_path / "for_config_test.py").write_text(PACKAGE)
    monkeypatch.setattr("bilevel.__path__", [*__import__("bilevel").__path__, str(tmp_path)])


LINEAR = {"_target_": "bilevel.for_config_test.Linear", "rtol": 1e-6, "max_steps": None, "spans": [1, 2]}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, []),
        ({"rtol": "${other.rtol}"}, []),
        ({"rtol": 1e-5}, ["a.rtol is 1e-05, and the default"]),
        ({"max_steps": 3}, ["a.max_steps is 3, and the default"]),
        ({"spans": [1]}, ["a.spans is [1], and the default"]),
        ({"zebra": 1}, ["a.zebra is no argument of"]),
        ({"rtol": None, "spans": (1.0, 2)}, ["a.rtol is None"]),
    ],
)
def test_differences_are_found(change, expected, signatures):
    said = differences("a", {**LINEAR, **change})
    assert len(said) == len(expected), said
    for line, start in zip(said, expected, strict=True):
        assert line.startswith(start)


def test_missing_arguments_are_found(signatures):
    node = {"_target_": "bilevel.for_config_test.Method", "linear_solver": "???", "policy": "raise"}
    assert differences("a", node) == []
    assert differences("a", {**node, "linear_solver": LINEAR}) == []
    del node["policy"]
    assert differences("a", node) == ["a lacks policy, an argument of bilevel.for_config_test.Method"]


def test_classes_of_torch_are_listed_in_full_as_well():
    sgd = yaml.safe_load((CONF / "outer_optimizer" / "sgd.yaml").read_text())
    assert differences("a", {**sgd, "lr": 0.3}) == []  # a value of our own
    assert differences("a", {**sgd, "lrr": 0.3}) == ["a.lrr is no argument of torch.optim.SGD"]
    assert differences("a", {**sgd, "momentum": 0.9}) == ["a.momentum is 0.9, and the default of torch.optim.SGD is 0"]
    del sgd["nesterov"]
    assert differences("a", sgd) == ["a lacks nesterov, an argument of torch.optim.SGD"]


def test_every_choice_of_train_yaml_is_a_group():
    chosen = yaml.safe_load((CONF / "train.yaml").read_text())["defaults"]
    groups = {name.partition("@")[0] for entry in chosen if isinstance(entry, dict) for name in entry}
    assert {name for name in groups if not name.startswith("override ")} <= config_groups(CONF).keys()


def test_nested_nodes_are_found(tmp_path):
    (tmp_path / "g").mkdir()
    (tmp_path / "g" / "o.yaml").write_text("a:\n  - _target_: x.Y\n    b:\n      _target_: x.Z\n")
    assert [where for where, _ in described(tmp_path, "g", "o")] == ["g/o.a.0", "g/o.a.0.b"]


def test_an_option_that_does_not_compose_is_found(tmp_path):
    (tmp_path / "g").mkdir()
    (tmp_path / "hydra").mkdir()
    (tmp_path / "train.yaml").write_text(
        "defaults:\n  - g: good\n  - _self_\nname: a\noutput_dir: b\nhydra:\n  output_subdir: null\n"
    )
    (tmp_path / "g" / "good.yaml").write_text("_target_: bilevel.A\n")
    (tmp_path / "g" / "bad.yaml").write_text("_target_: os.system\n")
    assert compose_option(tmp_path, "g", "good")["g"] == {"_target_": "bilevel.A"}
    with pytest.raises(UsageError, match=r"g has the _target_ os\.system"):
        compose_option(tmp_path, "g", "bad")


def test_the_options_that_may_name_a_hyperparameter_are_those_of_the_inner_solvers():
    found = set()
    for group in ("solver", "proximal"):
        for option in config_groups(CONF)[group]:
            for where, node in described(CONF, group, option):
                hints = typing.get_type_hints(find_target(node["_target_"], where))
                found |= {name for name, kind in hints.items() if kind in (Option, Option | torch.Tensor)}
    assert found == NAMING
    assert not may_name("solver.optimizer.weight_decay", "rate") and not may_name("outer_optimizer.momentum", "rate")


def test_a_hyperparameter_is_named_on_the_command_line():
    (job,) = preflight(read_arguments(["solver=gradient_descent", "solver.learning_rate=rate"]))
    assert job["solver"]["learning_rate"] == "rate"
    with pytest.raises(UsageError, match="solver.atol takes a number"):
        preflight(read_arguments(["solver=gradient_descent", "solver.atol=rate"]))


def test_the_stars_of_the_help_are_what_a_run_composes():
    with composer() as compose:
        chosen = {str(key).partition("@")[0]: value for key, value in compose.compose().hydra.runtime.choices.items()}
    starred = dict(re.findall(r"^  (\w+) .*?(\w+)\*", re.sub(r"\n {10,}", " ", train_help()), re.MULTILINE))
    assert starred == {group: chosen[group] for group in starred}
    composed = {group for group in config_groups(CONF) if chosen.get(group) is not None}
    assert set(starred) == composed
