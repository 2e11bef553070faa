"""Weights by the loss: what one step of training does to the validation loss, the long tail, and the experiment."""

import json
from dataclasses import replace

import pytest
import torch
from test_hyper_cleaning import SIDE, small_images
from torch.nn.functional import cross_entropy

from bilevel import Trainer, fit, hypergradient_at
from bilevel.cli.main import main
from bilevel.errors import UsageError
from bilevel.flat import FlatProblem
from bilevel.hypergradient import Implicit, OneStep, Unrolled
from bilevel.linalg import DenseLU
from bilevel.models import MLP, SoftmaxRegression
from bilevel.problems import Reweighting, WeightingComparison
from bilevel.solvers import GradientDescent

pytestmark = pytest.mark.usefixtures("float64")
SMALL = {"num_most": 20, "imbalance": 4, "num_validation": 3, "hidden": 5, "batch_size": None}
NETWORK = MLP(SIDE * SIDE, 10, (4,), "tanh")
STEP = GradientDescent(learning_rate=0.5, max_steps=1, atol=0.0)
SOLVE = GradientDescent(learning_rate=0.5, max_steps=3000, atol=1e-9)


@pytest.fixture
def images(monkeypatch):
    small_images(monkeypatch, num=600)


def reweighting(**words):
    return Reweighting(**{"network": NETWORK, **SMALL, **words}).to(dtype=torch.float64)


def validation_loss_after_a_step(problem, params, hparams, batch=None):
    """The published algorithm's virtual step, written out: the weights are numbers, and the step is along their mean."""
    at = {name: value.detach().clone().requires_grad_() for name, value in params.items()}
    x, y = (problem.x, problem.y) if batch is None else (problem.x[batch], problem.y[batch])
    losses = cross_entropy(problem.network(at, x), y, reduction="none")
    weights = problem.weights(losses.detach(), hparams).detach()
    gradient = torch.autograd.grad((weights * losses).sum() / weights.sum(), list(at.values()))
    stepped = {name: at[name].detach() - 0.5 * part for name, part in zip(at, gradient, strict=True)}
    return float(problem.outer_loss(stepped, hparams, None)), stepped


@pytest.mark.parametrize("batch_size", [None, 16])
def test_the_hypergradient_is_what_one_step_of_training_does_to_the_validation_loss(images, batch_size):
    problem = reweighting(batch_size=batch_size)
    hparams = {name: value.double() for name, value in problem.init_hparams().items()}
    found = hypergradient_at(problem, solver=STEP, method=OneStep())
    batches = (lambda number: None) if batch_size is None else (lambda number: problem.inner_batches(0, number))
    _, before = validation_loss_after_a_step(problem, problem.init_params({}), hparams, batches(0))
    draw = torch.Generator().manual_seed(1)
    for name, value in hparams.items():
        way = torch.randn(value.shape, generator=draw, dtype=torch.float64)
        sides = [
            validation_loss_after_a_step(problem, before, {**hparams, name: value + sign * way}, batches(-1))[0]
            for sign in (1e-5, -1e-5)
        ]
        difference = (sides[0] - sides[1]) / 2e-5
        assert float((found.gradient[name] * way).sum()) == pytest.approx(difference, rel=1e-5, abs=1e-10), name


@pytest.mark.parametrize(
    ("method", "solver"),
    [
        (Unrolled(), GradientDescent(learning_rate=0.5, max_steps=5, atol=0.0)),
        (Implicit(linear_solver=DenseLU()), SOLVE),
    ],
    ids=["unrolled", "implicit"],
)
def test_several_steps_and_solutions_are_differentiated_through_the_weights_too(images, method, solver):
    """What the weights change along the way is a part of the derivative: the training is along the gradient of no loss."""
    problem = reweighting(network=SoftmaxRegression(SIDE * SIDE), num_most=10)
    hparams = {name: value.double() for name, value in problem.init_hparams().items()}
    if solver is SOLVE:  # a decay, without which there is no solution
        solver = replace(solver, weight_decay=0.1)
    found = hypergradient_at(problem, solver=solver, method=method)

    def outer(hparams):
        flat = FlatProblem.of(problem, hparams)
        objective = solver.conditions(flat.objective(None))
        with torch.no_grad():
            params = flat.start(hparams)
            for _ in range(solver.max_steps):
                params = params - 0.5 * objective.gradient(params, hparams)
            return float(problem.outer_loss(flat.unravel(params), hparams, None))

    draw = torch.Generator().manual_seed(1)
    way = torch.randn(hparams["weighting.head.weight"].shape, generator=draw, dtype=torch.float64)
    name = "weighting.head.weight"
    sides = [outer({**hparams, name: hparams[name] + sign * way}) for sign in (1e-4, -1e-4)]
    assert float((found.gradient[name] * way).sum()) == pytest.approx((sides[0] - sides[1]) / 2e-4, rel=1e-4)


def test_classes_get_rarer_and_validation_has_as_many_of_each(images):
    problem = reweighting(imbalance=10)
    assert problem.counts.tolist() == [20, 15, 11, 9, 7, 5, 4, 3, 2, 2]
    assert torch.bincount(problem.y_validation).tolist() == [3] * 10
    assert reweighting(imbalance=1).counts.tolist() == [20] * 10
    rows = {tuple(row.tolist()) for row in problem.x.flatten(1)}
    assert not rows & {tuple(row.tolist()) for row in problem.x_validation.flatten(1)}
    held_out = reweighting(holdout=0.5)
    assert len(held_out.x_validation) == len(held_out.x_holdout) == 15
    assert set(torch.bincount(held_out.y_holdout).tolist()) == {1, 2}
    assert reweighting(num_most=49, imbalance=49).counts[-1] == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"imbalance": 0.5}, "problem.imbalance was expected to be from 1 to problem.num_most, .* are 0.5, 20 and 3"),
        ({"imbalance": 21}, "problem.imbalance was expected to be from 1 to problem.num_most"),
        ({"num_validation": 0}, "problem.num_validation at least 1"),
        ({"num_most": 500}, "class 0 has .* images, but problem.num_most=500 and problem.num_validation=3 want 503"),
        ({"hidden": 0}, "problem.hidden was expected to be an integer of at least 1, but is 0"),
    ],
)
def test_bad_settings_are_refused_in_a_sentence(images, words, said):
    with pytest.raises(UsageError, match=said):
        reweighting(**words)


@pytest.mark.filterwarnings("ignore:the whole hypergradient of")
@pytest.mark.parametrize("monitor", [None, "holdout_loss"])
@pytest.mark.parametrize("outer_batch_size", [None, 5])
def test_the_comparison_is_the_same_training_with_equal_weights(images, monitor, outer_batch_size):
    """Where the learned weighting is the same for all losses, and is not moved, both are one."""
    problem = reweighting(batch_size=16, holdout=0.5, outer_batch_size=outer_batch_size)
    problem.start = {name: torch.zeros_like(value) for name, value in problem.start.items()}
    found = fit(
        problem,
        solver=STEP,
        hypergradient=OneStep(),
        optimizer=lambda raw: torch.optim.SGD(raw, lr=0.0),
        trainer=Trainer(num_steps=7, monitor=monitor),
        callbacks=[WeightingComparison(num_points=3)],
    )
    learned, equal = found.summary["baseline"]["rows"]
    assert learned[1:] == equal[1:]
    assert found.summary["best"]["step"] < 6 or monitor is None  # the steps are too long: the best is not the last
    assert found.summary["weighting"]["weights"] == [0.5] * 3
    assert all(one["weight"] == 0.5 and one["learned"] == one["equal"] for one in found.summary["weighting"]["classes"])


def test_the_comparison_belongs_to_its_problem():
    class Run:
        class setup:
            class problem:
                problem = object()

    with pytest.raises(UsageError, match="WeightingComparison belongs to Reweighting, but the problem is object"):
        WeightingComparison().on_start(Run)
    with pytest.raises(UsageError, match="needs num_points >= 2, but got 1"):
        WeightingComparison(num_points=1)


@pytest.mark.usefixtures("fashion_mnist")
def test_the_experiment_runs_and_shows_its_weights(tmp_path, capsys):
    small = [
        "problem.num_most=40",
        "problem.imbalance=4",
        "problem.network={_target_: bilevel.models.MLP, num_inputs: 784, num_outputs: 10, hidden: [8]}",
        "trainer.num_steps=3",
        "tracking=none",
    ]
    assert main(["train", "experiment=reweighting", f"output_dir={tmp_path}", *small]) == 0, capsys.readouterr().err
    (summary,) = tmp_path.rglob("summary.json")
    assert len(json.loads(summary.read_text())["weighting"]["classes"]) == 10
    (page,) = tmp_path.rglob("report.html")
    assert "Weights of training images" in page.read_text()
