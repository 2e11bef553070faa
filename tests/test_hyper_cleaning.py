"""Hyper-cleaning: the derivative of a weight, what is compared with, and the experiment from its configuration."""

import json

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch.nn.functional import cross_entropy

from bilevel import hypergradient_at
from bilevel.cli.main import main
from bilevel.data import FashionMNIST
from bilevel.errors import UsageError
from bilevel.flat import FlatProblem
from bilevel.hypergradient import Implicit
from bilevel.linalg import ConjugateGradient, DenseCholesky
from bilevel.models import MLP, ModuleNetwork, SoftmaxRegression
from bilevel.problems import CleaningComparison, HyperCleaning, fashion
from bilevel.problems.hyper_cleaning import detection
from bilevel.solvers import NewtonCG, run

pytestmark = pytest.mark.usefixtures("float64")
SIDE = 3  # pixels of the small images
SMALL = {"num_train": 30, "num_validation": 20, "penalty": 0.1}


def small_images(monkeypatch, num=80, noise=60):
    """Images of ten classes in place of the real ones, small enough for dense matrices."""
    draw = torch.Generator().manual_seed(0)
    prototypes = torch.randint(0, 256, (10, SIDE, SIDE, 1), generator=draw)

    def part(num):
        labels = torch.randint(0, 10, (num,), generator=draw)
        blurred = prototypes[labels] + torch.randint(-noise, noise + 1, (num, SIDE, SIDE, 1), generator=draw)
        return blurred.clamp(0, 255).to(torch.uint8), labels

    data = FashionMNIST(*part(num), *part(num))
    monkeypatch.setattr(fashion, "load_fashion_mnist", lambda root: data)


def network():
    return SoftmaxRegression(num_inputs=SIDE * SIDE)


def cleaning(model=None, **words):
    return HyperCleaning(model or network(), **{**SMALL, **words}).to(dtype=torch.float64)


def test_the_hypergradient_is_that_of_finite_differences_and_of_a_dense_solve(monkeypatch):
    small_images(monkeypatch)
    problem = cleaning()
    solver = NewtonCG(atol=1e-12, max_steps=100)
    found = hypergradient_at(
        problem, solver=solver, method=Implicit(linear_solver=ConjugateGradient(rtol=1e-10))
    ).gradient["weight"]
    dense = hypergradient_at(problem, solver=solver, method=Implicit(linear_solver=DenseCholesky()))
    torch.testing.assert_close(found, dense.gradient["weight"], rtol=1e-6, atol=1e-9)

    def outer(weight):
        hparams = {"weight": weight}
        flat = FlatProblem.of(problem, hparams)
        with torch.no_grad():
            params = run(solver, flat.objective(None), flat.start(hparams), hparams).params
            return problem.outer_loss(flat.unravel(params), hparams, None)

    weight, step = problem.init_hparams()["weight"], 1e-4
    for index in (0, 7, 29):
        side = step * torch.eye(30)[index]
        difference = (outer(weight + side) - outer(weight - side)) / (2 * step)
        assert abs(float(found[index] - difference)) < 1e-7 * float(found.abs().max()) + 1e-9


def test_wrong_labels_have_the_larger_hypergradients(monkeypatch):
    """What lowers the weight of an example is a positive derivative: most wrong labels have one, most right ones not."""
    small_images(monkeypatch)
    problem = cleaning()
    gradient = hypergradient_at(problem).gradient["weight"]
    assert gradient[problem.corrupted].mean() > 0 > gradient[~problem.corrupted].mean()


def test_the_splits_are_disjoint_and_as_large_as_asked_for(monkeypatch):
    small_images(monkeypatch, noise=0)
    data = fashion.load_fashion_mnist(None)
    marked = torch.arange(80, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, SIDE, SIDE, 1)
    monkeypatch.setattr(fashion, "load_fashion_mnist", lambda root: data._replace(train_images=marked))
    problem = cleaning(num_train=50, num_validation=30, holdout=0.3, corruption=0.2)
    parts = [problem.x, problem.x_validation, problem.x_holdout]
    seen = torch.cat([(part[:, 0, 0, 0] * 255).round().long() for part in parts])
    assert [len(part) for part in parts] == [50, 21, 9] and sorted(seen.tolist()) == list(range(80))
    assert int(problem.corrupted.sum()) == 10
    other = cleaning(num_train=50, num_validation=30, split_seed=1)
    assert not torch.equal(other.x, problem.x)
    assert "holdout_loss" not in cleaning(holdout=0.0).metrics(problem.origin, {"weight": torch.ones(30)})


def test_detection_counts():
    weight, corrupted = torch.tensor([0.1, 0.49, 0.5, 0.9]), torch.tensor([True, False, True, True])
    assert detection(weight, corrupted) == {"precision": 0.5, "recall": 1 / 3, "f1": 0.4}
    assert detection(torch.ones(2), torch.zeros(2, dtype=torch.bool)) == {"precision": 0.0, "recall": 0.0, "f1": 0.0}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"penalty": 0.0}, "problem.penalty was expected to be above 0, but is 0.0"),
        ({"holdout": 1.0}, "problem.holdout was expected to be a share from 0 to below 1, but is 1.0"),
        ({"holdout": 0.99}, "problem.holdout=0.99 leaves none of 20 examples to the outer loss"),
        ({"corruption": -0.1}, "share of wrong labels was expected to be from 0 to 1, but is -0.1"),
        ({"num_train": 70}, "at least 1, and 80 together at most, but are 70 and 20"),
    ],
)
def test_bad_settings_are_refused_in_a_sentence(monkeypatch, words, said):
    small_images(monkeypatch)
    with pytest.raises(UsageError, match=said):
        cleaning(**words)


@pytest.mark.parametrize(
    "words", [{"num_points": 0}, {"low": 0.1, "high": 0.01}, {"num_folds": 1}, {"num_pictures": -1}], ids=str
)
def test_bad_settings_of_the_comparison_are_refused(words):
    with pytest.raises(UsageError, match="CleaningComparison needs"):
        CleaningComparison(**words)


class TestComparison:
    def comparison(self, problem, **words):
        found = CleaningComparison(atol=1e-9, **words)
        found.problem = problem
        return found

    def test_learners_are_scikit_learns(self, monkeypatch):
        """Several at once, each with weights of the examples and a penalty of its own, are what it fits one by one."""
        small_images(monkeypatch)
        problem = cleaning(num_train=70, num_validation=10)
        members = (torch.rand(3, 70, generator=torch.Generator().manual_seed(1)) - 0.2).clamp(min=0.0)
        members[0] = (members[0] > 0).double()
        penalties = torch.tensor([0.1, 0.01, 0.03])
        found = self.comparison(problem)._trained(problem.x, problem.y, members, penalties)
        for member, penalty, weight, bias in zip(members, penalties, found["weight"], found["bias"], strict=True):
            chosen = member > 0
            x = torch.cat([problem.x.flatten(1), torch.ones(70, 1)], 1)[chosen]  # the intercept is penalised, too
            model = LogisticRegression(
                C=1 / float(member.sum() * penalty),
                fit_intercept=False,
                solver="newton-cg",
                tol=1e-10,
                max_iter=1000,
            )
            model.fit(x.numpy(), problem.y[chosen].numpy(), sample_weight=member[chosen].numpy())
            ours = torch.cat([weight, bias.unsqueeze(-1)], 1).numpy()[model.classes_]
            expected = model.coef_
            np.testing.assert_allclose(ours, expected, atol=1e-5)

    def test_a_network_that_is_no_batch_of_networks_is_mapped(self, monkeypatch):
        small_images(monkeypatch)
        one, other = (
            network(),
            ModuleNetwork(torch.nn.Sequential(torch.nn.Flatten(-3), torch.nn.Linear(SIDE * SIDE, 10))),
        )
        torch.nn.init.zeros_(other.module[1].weight), torch.nn.init.zeros_(other.module[1].bias)
        results = [
            self.comparison(cleaning(each), num_points=2, num_folds=2).learners(torch.linspace(0, 1, 30))
            for each in (one, other)
        ]
        assert results[0] == results[1]
        perceptron = cleaning(MLP(SIDE * SIDE, 10, (4,), "tanh"))  # takes batches of weights, but no inputs they share
        assert len(self.comparison(perceptron, num_points=2, num_folds=2).learners(torch.linspace(0, 1, 30))) == 6

    def test_floor_and_ceiling_are_what_they_are_called(self, monkeypatch):
        small_images(monkeypatch)
        problem = cleaning()
        perfect = (~problem.corrupted).double()
        found = self.comparison(problem, num_points=2, num_folds=2).learners(perfect)
        assert [(one.size, one.num_wrong) for one in found] == [
            (30, 15), (20, 0), (35, 7.5), (50, 15), (35, 0), (35, 0)
        ]  # fmt: skip
        assert found[4].accuracy == found[5].accuracy and found[4].penalty == found[5].penalty
        halved = self.comparison(problem, num_points=2, num_folds=2).learners(perfect / 2 + 0.25)
        assert (halved[4].size, halved[4].num_wrong) == (20 + 15 * 0.75 + 15 * 0.25, 15 * 0.25)

    def test_the_penalty_is_the_one_by_which_most_of_a_learners_own_examples_are_right(self, monkeypatch):
        """Each judged by the learner of the other fold, and counted by its weight."""
        small_images(monkeypatch)
        problem = cleaning()
        comparison = self.comparison(problem, num_points=3, low=1e-3, high=10.0, num_folds=2)
        weight = torch.linspace(0.05, 1, 30)
        members = torch.cat([weight, torch.ones(20)])
        x, y = (
            torch.cat([getattr(problem, f"{name}{part}") for part in ("", "_validation", "_holdout")]) for name in "xy"
        )
        scores = []
        for penalty in comparison.penalties.tolist():
            right = 0.0
            for fold in range(2):
                out = torch.arange(50) % 2 == fold
                params = comparison._trained(x, y, (members * ~out).unsqueeze(0), torch.tensor([penalty]))
                right += float(((problem.network(params, x[out]).argmax(-1) == y[out]) * members[out]).sum())
            scores.append(right)
        best = comparison.penalties[int(np.argmax(scores))]
        assert len(set(scores)) == 3
        assert comparison.learners(weight)[4].penalty == pytest.approx(float(best))

    def test_another_problem_is_refused(self):
        class Run:
            class setup:
                class problem:
                    problem = object()

        with pytest.raises(UsageError, match="CleaningComparison belongs to HyperCleaning, but the problem is object"):
            CleaningComparison().on_start(Run)


@pytest.mark.usefixtures("fashion_mnist")
def test_the_experiment_leaves_a_table_and_pictures(tmp_path):
    small = ("problem.num_train=60", "problem.num_validation=40", "trainer.num_steps=3", "solver.atol=1e-4")
    small += ("callbacks.comparison.num_points=2", "callbacks.comparison.num_folds=2", "tracking=none")
    assert main(["train", "experiment=hyper_cleaning", f"output_dir={tmp_path}", *small]) == 0
    (path,) = tmp_path.glob("*/*/summary.json")
    summary = json.loads(path.read_text())
    assert len(summary["baseline"]["rows"]) == 6 and summary["num_hparams"] == 60
    assert {"floor", "cleaned", "ceiling", "f1", "gap_closed"} <= summary["cleaning"].keys()
    shown = {file.stem for file in (path.parent / "figures").glob("*.png")}
    assert {"losses", "weights", "least_trusted", "metrics"} <= shown and not any(
        name.startswith("image_") for name in shown
    )


def test_the_loss_is_the_one_that_is_documented(monkeypatch):
    small_images(monkeypatch)
    mlp = MLP(num_inputs=SIDE * SIDE, num_outputs=10, hidden=(4,))

    class Flat(SoftmaxRegression):  # images as vectors, for a network of vectors
        def init(self, seed):
            return mlp.init(seed)

        def __call__(self, params, inputs):
            return mlp(params, inputs.flatten(1))

    problem = cleaning(Flat(), start=0.3)
    hparams = problem.init_hparams()
    flat = FlatProblem.of(problem, hparams)
    params = {name: value + 0.1 for name, value in problem.origin.items()}
    each = cross_entropy(mlp(params, problem.x.flatten(1)), problem.y, reduction="none")
    way = sum(0.01 * value.numel() for value in params.values())
    expected = 0.3 * each.mean() + 0.5 * 0.1 * way
    found = flat.objective(None).value_and_gradient(flat.layout.ravel(params), hparams)[0]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0.0)


def test_losses_of_minibatches_are_unbiased(monkeypatch):
    small_images(monkeypatch)
    whole, parts = cleaning(holdout=0.2), cleaning(holdout=0.2, batch_size=6, outer_batch_size=4)
    hparams = {"weight": torch.linspace(0.1, 0.9, 30)}
    params = {
        name: torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
        for name, value in whole.origin.items()
    }
    for name, batches in (("inner_loss", parts.inner_batches), ("outer_loss", parts.outer_batches)):
        values = [getattr(parts, name)(params, hparams, batches.part(number)) for number in range(batches.count)]
        assert batches.count == {"inner_loss": 5, "outer_loss": 4}[name]
        torch.testing.assert_close(torch.stack(values).mean(), getattr(whole, name)(params, hparams, None))
