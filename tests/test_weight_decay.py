"""A decay for each weight: its derivative, what is refused, and the experiment from its configuration."""

import json

import pytest
import torch
from test_hyper_cleaning import SIDE, small_images

from bilevel import hypergradient_at
from bilevel.cli.main import main
from bilevel.errors import UsageError
from bilevel.flat import FlatProblem
from bilevel.hypergradient import Implicit
from bilevel.linalg import ConjugateGradient, DenseCholesky
from bilevel.models import MLP
from bilevel.problems import WeightDecay
from bilevel.solvers import NewtonCG, run

pytestmark = pytest.mark.usefixtures("float64")
SMALL = {"num_train": 30, "num_validation": 20, "start": 0.1}
NETWORK = MLP(SIDE * SIDE, 10, (4,), "tanh")


def decaying(**words):
    return WeightDecay(**{"network": NETWORK, **SMALL, **words}).to(dtype=torch.float64)


@pytest.mark.parametrize(
    ("decay", "number"),
    [("shared", 1), ("per_layer", 2), ("per_weight", 90), ({"weights": "*.weight", "biases": "*.bias"}, 2)],
    ids=str,
)
def test_the_hypergradient_is_that_of_finite_differences_and_of_a_dense_solve(monkeypatch, decay, number):
    small_images(monkeypatch)
    problem, solver = decaying(decay=decay), NewtonCG(atol=1e-12, max_steps=200)
    start = problem.init_hparams()
    assert sum(value.numel() for value in start.values()) == number
    assert all(bool((value == 0.1).all()) for value in start.values())
    found = hypergradient_at(
        problem, solver=solver, method=Implicit(linear_solver=ConjugateGradient(rtol=1e-10))
    ).gradient
    dense = hypergradient_at(problem, solver=solver, method=Implicit(linear_solver=DenseCholesky())).gradient

    def outer(hparams):
        flat = FlatProblem.of(problem, hparams)
        with torch.no_grad():
            params = run(solver, flat.objective(None), flat.start(hparams), hparams).params
            return problem.outer_loss(flat.unravel(params), hparams, None)

    draw = torch.Generator().manual_seed(3)
    for name, value in start.items():
        torch.testing.assert_close(found[name], dense[name], rtol=1e-6, atol=1e-10)
        way = torch.randn(value.shape, generator=draw, dtype=torch.float64)
        sides = [outer({**start, name: value + sign * 1e-4 * way}) for sign in (1, -1)]
        difference = float(sides[0] - sides[1]) / 2e-4
        assert float((found[name] * way).sum()) == pytest.approx(difference, rel=1e-5, abs=1e-9)


def test_weights_do_not_leave_their_start_where_the_decay_is_strong(monkeypatch):
    small_images(monkeypatch)
    problem = decaying(start=1e8)
    flat = FlatProblem.of(problem, problem.init_hparams())
    hparams = problem.init_hparams()
    params = run(NewtonCG(atol=1e-10), flat.objective(None), flat.start(hparams), hparams).params
    torch.testing.assert_close(flat.unravel(params), dict(problem.origin), rtol=0, atol=1e-7)


def test_the_default_network_has_over_a_million_weights(monkeypatch):
    small_images(monkeypatch)
    assert sum(value.numel() for value in WeightDecay(**SMALL).init_hparams().values()) == 1_068_810


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"start": 0.0}, "problem.start is the starting decay and must be above 0, but is 0.0"),
        ({"decay": "per_wieght"}, "'decay' was expected to be shared, per_layer, .* did you mean 'per_weight'"),
        ({"num_train": 70}, "at least 1, and 80 together at most, but are 70 and 20"),
    ],
)
def test_bad_settings_are_refused_in_a_sentence(monkeypatch, words, said):
    small_images(monkeypatch)
    with pytest.raises(UsageError, match=said):
        decaying(**words)


@pytest.mark.usefixtures("fashion_mnist")
def test_the_experiment_runs(tmp_path, capsys):
    small = [
        "problem.num_train=60",
        "problem.num_validation=40",
        "problem.network={_target_: bilevel.models.MLP, num_inputs: 784, num_outputs: 10, hidden: [8]}",
        "trainer.num_steps=2",
        "tracking=none",
    ]
    assert main(["train", "experiment=weight_decay_million", f"output_dir={tmp_path}", *small]) == 0, (
        capsys.readouterr().err
    )
    (summary,) = tmp_path.rglob("summary.json")
    content = json.loads(summary.read_text())
    assert content["num_hparams"] == 784 * 8 + 8 + 8 * 10 + 10
    assert {"metrics.holdout_loss", "metrics.test_accuracy"} <= content["final"].keys() and "holdout" in content
