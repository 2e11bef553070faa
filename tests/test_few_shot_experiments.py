"""Every few-shot experiment runs from its configuration, small, and leaves what a user looks at; methods swap by a word."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from bilevel.cli.main import main

ROOT = Path(__file__).parents[1]
TEXTS = {file.stem: file.read_text() for file in (ROOT / "conf" / "experiment").glob("*.yaml")}
EXPERIMENTS = sorted(name for name, text in TEXTS.items() if "few_shot" in text)
SMALL = [
    *("tracking=none", "trainer.num_steps=3", "problem.num_tasks=2", "callbacks.evaluation.num_tasks=3"),
    *(
        "callbacks.evaluation.every=2",
        "callbacks.evaluation.num_validation_tasks=2",
        "callbacks.evaluation.num_pictures=1",
    ),
]
SMALLER = {"omniglot": ["model.num_filters=4", "data.num_query=1"], "sinusoid": ["model.hidden=[6]"]}


def trained(tmp_path, name, *words):
    """The summary and the folder of a small run."""
    small = next(words for kind, words in SMALLER.items() if name.endswith(kind))
    assert main(["train", f"experiment={name}", f"output_dir={tmp_path}", *SMALL, *small, *words]) == 0
    (path,) = tmp_path.glob("*/*/summary.json")
    return json.loads(path.read_text()), path.parent


def test_the_whole_family_is_there():
    assert {name.rpartition("_")[0] for name in EXPERIMENTS if name.endswith("omniglot")} == {
        *("imaml", "imaml_newton", "maml", "fomaml", "reptile", "anil", "meta_sgd", "r2d2"),
    }
    assert {name for name in EXPERIMENTS if not name.endswith("omniglot")} == {"imaml_sinusoid", "maml_sinusoid"}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_it_runs_and_leaves_scores_pictures_and_a_report(name, tmp_path, request):
    if name.endswith("omniglot"):
        request.getfixturevalue("omniglot_root")
    summary, folder = trained(tmp_path, name)
    found = summary["evaluation"]
    assert summary["num_steps"] == 3 and len(found["each"]) == 3 and found["inner_steps"][0] == 0
    assert summary["validation"]["num_tasks"] == 2
    assert summary["baseline"]["rows"][0][0].startswith(("nearest", "mean"))
    shown = {file.stem for file in (folder / "figures").glob("*.png")}
    assert {"losses", "adaptation"} <= shown and shown & {"task_0", "tasks"}
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    validated = [any(key.startswith("metrics.validation_") for key in step) for step in steps if "step" in step]
    assert validated == [False, True, False]


@pytest.mark.usefixtures("omniglot_root", "without_report")
@pytest.mark.parametrize("method", ["first_order", "reptile", "unrolled", "implicit_neumann", "implicit_identity"])
def test_the_method_of_implicit_maml_is_one_word_on_the_command_line(method, tmp_path):
    summary, _ = trained(tmp_path, "imaml_omniglot", f"hypergradient={method}")
    assert summary["num_steps"] == 3


@pytest.mark.usefixtures("omniglot_root", "without_report")
@pytest.mark.parametrize(
    "words",
    [
        ["data.way=3"],
        ["data.split=random", "data.rotated_parts=[train,validation,test]"],
        ["data.shot=2"],
        ["problem.learned=per_layer"],
        ["problem.strengths={head:0.1}"],
    ],
)
def test_the_variants_of_the_documentation_run(words, tmp_path):
    summary, _ = trained(tmp_path, "imaml_omniglot", *words)
    assert summary["num_steps"] == 3


@pytest.mark.usefixtures("omniglot_root", "without_report")
def test_another_network_is_one_word(tmp_path):
    words = ["experiment=imaml_omniglot", "model=resnet12", "model.widths=[4,4]", "data.num_query=1"]
    assert main(["train", f"output_dir={tmp_path}", *SMALL, *words]) == 0


def test_the_documentation_names_what_exists():
    text = (ROOT / "docs" / "meta_learning.md").read_text()
    assert set(re.findall(r"experiment=(\w+)", text)) | set(re.findall(r"`(\w+_(?:omniglot|sinusoid))`", text)) == set(
        EXPERIMENTS
    )
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / "docs" / target).exists(), target


def test_the_example_of_the_documentation_learns(capsys):
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "meta_learning.md").read_text(), re.DOTALL)
    exec(compile(block, "meta_learning.md", "exec"), {"__name__": "documentation"})
    before, after = re.search(r"^([\d.]+) ± [\d.]+ -> ([\d.]+) ±", capsys.readouterr().out, re.MULTILINE).groups()
    assert float(after) > float(before) + 0.1
