"""`python -m bilevel check`: shipped experiments, exit status, certificate and picture, mistakes."""

import json
from pathlib import Path

import pytest

from bilevel.cli.main import main


def run(tmp_path, capsys, *words):
    status = main(["check", f"output_dir={tmp_path}", *words])
    out = capsys.readouterr().out
    path = out.strip().splitlines()[-1].removeprefix("certificate: ")
    return status, out, json.loads(open(path).read()), path


PROMISE_NO_SOLUTION = {"hyper_cleaning_stochastic", "reweighting"}  # single steps of everything
# The theorem speaks of solutions, and few-shot experiments make a fixed number of inner steps, which promise none; the one that
# solves, r2d2_omniglot, has a network of ReLUs outside: kinks along its weights leave finite differences wrong by 1e-3.
EXPERIMENTS = sorted(
    file.stem
    for file in (Path(__file__).parent.parent / "conf" / "experiment").glob("*.yaml")
    if "few_shot" not in file.read_text() and file.stem not in PROMISE_NO_SOLUTION
)


def test_the_experiments_that_promise_solutions_are_known():
    assert EXPERIMENTS == [
        "digits",
        "digits_mlp",
        "digits_per_weight",
        "distillation",
        "hyper_cleaning",
        "sparse_penalties",
        "support_vectors",
        "text_penalties",
        "weight_decay_million",
    ]


SMALLER = {  # at full size they take minutes
    "hyper_cleaning": ["problem.num_train=300", "problem.num_validation=200"],
    "distillation": ["problem.num_train=300"],
    "weight_decay_million": [
        "problem.num_train=60",
        "problem.num_validation=60",
        "problem.network={_target_: bilevel.models.MLP, num_inputs: 784, num_outputs: 10, hidden: [8], activation: tanh}",
    ],
    "text_penalties": ["problem.num_texts=40", "problem.start=1e-2"],
    "sparse_penalties": ["design.num_examples=40", "design.num_features=30"],
}
NON_SMOOTH = ("sparse_penalties", "support_vectors")  # judged by the residual of a proximal step, which is unsymmetric


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_shipped_experiment_is_sound(name, tmp_path, capsys, request):
    if name in ("hyper_cleaning", "distillation", "weight_decay_million"):
        request.getfixturevalue("fashion_mnist")
    if name == "text_penalties":
        request.getfixturevalue("wordnet")
    status, out, content, path = run(tmp_path, capsys, f"experiment={name}", *SMALLER.get(name, ()))
    assert status == 0 and content["verdict"] == "sound" and "sound: every check passed" in out
    krylov = "implicit_gmres" if name in NON_SMOOTH else "implicit_cg"
    assert all(row["passed"] for row in content["checks"])
    assert set(content["methods"]) >= {"implicit_auto", krylov, "unrolled"}
    picture = path.replace(".json", ".png")
    assert open(picture, "rb").read(8) == b"\x89PNG\r\n\x1a\n"


def test_the_command_fails_on_a_finding_and_passes_it_when_declared(tmp_path, capsys):
    short = ["experiment=digits", "solver.max_steps=1"]
    status, out, content, _ = run(tmp_path, capsys, *short)
    assert status == 1 and content["verdict"] == "fault" and content["undeclared"] == ["unconverged_inner_solve"]
    assert "what to do: allow more inner steps" in out
    declared = ["+check.declared.unconverged_inner_solve='one step, to see what happens'"]
    status, out, content, _ = run(tmp_path, capsys, *short, *declared)
    assert status == 0 and content["verdict"] == "approximate" and "declared: one step, to see what happens" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["-m", "experiment=digits"], "check looks at one configuration"),
        (["resume=outputs"], "resume"),
        (["experiment=digit"], "did you mean 'digits'"),
        (["experiment=digits", "+check.declared.kinks=yes"], "did you mean 'kink'"),
    ],
)
def test_mistakes_of_the_command_line_are_one_sentence(words, said, capsys, tmp_path):
    assert main(["check", f"output_dir={tmp_path}", *words]) == 2
    assert said in capsys.readouterr().err and not list(tmp_path.iterdir())
