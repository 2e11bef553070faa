"""Distilled images: their derivative, what random real ones are worth, and the experiment from its configuration."""

import json

import pytest
import torch
from test_hyper_cleaning import SIDE, network, small_images

from bilevel import fit, hypergradient_at
from bilevel.cli.main import main
from bilevel.errors import UsageError
from bilevel.flat import FlatProblem
from bilevel.hypergradient import Implicit
from bilevel.linalg import ConjugateGradient, DenseCholesky
from bilevel.problems import Distillation, RandomImages, distillation, fashion
from bilevel.solvers import LBFGS, NewtonCG, run

pytestmark = pytest.mark.usefixtures("float64")


@pytest.fixture
def small(monkeypatch):
    """Images of 3 x 3 in place of the real ones."""
    small_images(monkeypatch, num=200)
    monkeypatch.setattr(distillation, "load_fashion_mnist", lambda root: fashion.load_fashion_mnist(root))
    monkeypatch.setattr(distillation, "SIDE", SIDE)


def distilling(**words):
    return Distillation(network(), **{"penalty": 0.1, "num_train": 150, **words}).to(dtype=torch.float64)


@pytest.mark.parametrize("per_class", [1, 3])
def test_the_hypergradient_is_that_of_finite_differences_and_of_a_dense_solve(small, per_class):
    problem, solver = distilling(num_per_class=per_class), NewtonCG(atol=1e-12, max_steps=100)
    found = hypergradient_at(
        problem, solver=solver, method=Implicit(linear_solver=ConjugateGradient(rtol=1e-10))
    ).gradient
    dense = hypergradient_at(problem, solver=solver, method=Implicit(linear_solver=DenseCholesky())).gradient
    start = {name: value.double() for name, value in problem.init_hparams().items()}
    assert found["images"].shape == (10 * per_class, SIDE, SIDE, 1)

    def outer(hparams):
        flat = FlatProblem.of(problem, hparams)
        with torch.no_grad():
            return float(
                flat.outer_loss(run(solver, flat.objective(None), flat.start(hparams), hparams).params, hparams, None)
            )

    for name, value in start.items():
        torch.testing.assert_close(found[name], dense[name], rtol=1e-6, atol=1e-9)
        direction = torch.randn(value.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        step = 1e-5 * direction
        difference = (outer({**start, name: value + step}) - outer({**start, name: value - step})) / 2
        assert float((found[name] * step).sum()) == pytest.approx(difference, rel=1e-5)


def test_ten_distilled_images_are_worth_more_than_ten_real_ones(small):
    problem = distilling(holdout=0.2)
    result = fit(
        problem,
        solver=LBFGS(atol=1e-6),
        optimizer=lambda raw: torch.optim.Adam(raw, lr=0.1),
        num_steps=40,
        callbacks=[RandomImages(num_draws=4, num_points=3)],
    )
    told = result.summary["distilled"]
    assert told["labels"][:2] == ["T-shirt", "trouser"] and len(told["random"]) == 4
    assert told["above"] == pytest.approx(told["accuracy"] - sum(told["random"]) / 4)
    assert told["above"] > 0
    assert result.history[-1]["outer_loss"] < result.history[0]["outer_loss"]


def test_random_draws_have_as_many_images_of_each_class_and_the_penalty_is_the_best_of_the_grid(small):
    problem, callback = distilling(num_per_class=2), RandomImages(num_draws=3, num_points=3, atol=1e-8)
    callback.problem = problem
    draws = callback._draws()
    assert draws.shape == (3, 20) and bool((problem.y_train[draws] == problem.labels).all())
    assert all(len(draw.unique()) == 20 for draw in draws) and not bool((draws[0] == draws[1]).all())
    penalty, accuracy = callback.accuracies()
    by_hand = {}
    for one in callback.penalties.tolist():
        losses, rights = [], []
        for draw in draws:

            def loss(x, hparams, draw=draw, one=one):
                params = {"weight": x[:90].view(10, 9), "bias": x[90:]}
                scores = problem.network(params, problem.x_train[draw])
                return torch.nn.functional.cross_entropy(scores, problem.labels) + one * x.square().sum() / 2

            x = torch.zeros(100, dtype=torch.float64, requires_grad=True)
            optimizer = torch.optim.LBFGS([x], max_iter=500, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

            def closure(optimizer=optimizer, x=x, loss=loss):
                optimizer.zero_grad()
                value = loss(x, {})
                value.backward()
                return value

            optimizer.step(closure)
            params = {"weight": x.detach()[:90].view(10, 9), "bias": x.detach()[90:]}
            losses.append(float(problem.outer_loss(params, {}, None)))
            rights.append(float((problem.network(params, problem.x_test).argmax(-1) == problem.y_test).double().mean()))
        by_hand[one] = sum(losses) / 3, rights
    best = min(by_hand, key=lambda one: by_hand[one][0])
    assert penalty == pytest.approx(best) and accuracy.tolist() == pytest.approx(by_hand[best][1], abs=0.011)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"num_per_class": 0}, r"num_per_class was expected to be at least 1.*they are 0, 0.1 and 0.1"),
        ({"num_train": 201}, r"num_train was expected to be from 1 to 200.*but is 201"),
        ({"num_train": 1, "holdout": 0.9}, r"leave some to the outer loss"),
        ({"holdout": 1.0}, r"holdout was expected to be a share"),
    ],
)
def test_what_cannot_be_is_told_in_one_sentence(small, words, said):
    with pytest.raises(UsageError, match=said):
        distilling(**words)


def test_too_few_real_images_of_a_class_are_told(small):
    callback = RandomImages()
    callback.problem = distilling(num_per_class=30)
    with pytest.raises(UsageError, match="RandomImages needs 30 real images of each class"):
        callback.accuracies()
    with pytest.raises(UsageError, match="num_draws >= 1"):
        RandomImages(num_draws=0)


def test_the_experiment_runs_and_shows_its_images(fashion_mnist, tmp_path, capsys):
    words = ["experiment=distillation", "problem.num_train=300", "trainer.num_steps=3", "callbacks.random.num_draws=2"]
    words += ["callbacks.random.num_points=2", "tracking=none", f"output_dir={tmp_path}", "threads=1"]
    assert main(["train", *words]) == 0
    folder = next(tmp_path.glob("*/*/summary.json")).parent
    summary = json.loads((folder / "summary.json").read_text())
    assert len(summary["distilled"]["random"]) == 2 and summary["holdout"]["metric"] == "holdout_loss"
    assert {"distilled.png", "draws.png"} <= {file.name for file in (folder / "figures").iterdir()}
