"""The main job: the same objective as scikit-learn's, below its grid within ten steps, honest about the test loss."""

import functools
import json
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from bilevel.cli import main
from bilevel.cli.composer import composer, resolve
from bilevel.cli.job import assemble
from bilevel.data import load_digits
from bilevel.errors import UsageError
from bilevel.flat import FlatProblem, natural_hparams
from bilevel.hypergradient import Implicit
from bilevel.linalg import MINRES
from bilevel.problems import DigitsGrid, DigitsMLP, DigitsSoftmax
from bilevel.problems.digits_grid import sklearn_c
from bilevel.solvers import LBFGS, NewtonCG, run
from bilevel.trainer import fit

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize("penalty", [1e-4, 1e-2, 1.0])
def test_the_mapping_to_scikit_learns_c_gives_equal_coefficients(penalty):
    problem = DigitsSoftmax()
    hparams = {"penalty": torch.tensor(penalty)}
    flat = FlatProblem.of(problem, hparams)
    with torch.no_grad():
        solution = run(NewtonCG(atol=1e-10, max_steps=200), flat.objective(None), flat.start(hparams), hparams)
    ours = flat.unravel(solution.params)
    model = LogisticRegression(solver="newton-cg", tol=1e-10, max_iter=10_000, C=sklearn_c(penalty, len(problem.x)))
    model.fit(problem.x.numpy(), problem.y.numpy())
    np.testing.assert_allclose(ours["weight"], model.coef_, atol=1e-5 * np.abs(model.coef_).max())
    bias = np.concatenate([[0.0], ours["bias"].numpy()])
    theirs = model.intercept_ - model.intercept_[0]
    np.testing.assert_allclose(bias, theirs, atol=1e-5 * np.abs(theirs).max())


@pytest.fixture(scope="module")
def grids():
    torch.set_default_dtype(torch.float64)
    return {seed: DigitsGrid(split_seed=seed).search() for seed in (0, 5)}


def committed(*overrides):
    """The objects of `experiment=digits` as conf/ has them, and the configuration."""
    with composer() as compose:
        config = resolve(compose.compose(["experiment=digits", "tracking=none", *overrides]))
    return assemble(config, torch.device("cpu"), torch.float64), config


def test_the_main_job_is_the_comparison_that_is_claimed():
    parts, config = committed()
    (grid,) = parts.callbacks
    assert parts.trainer.num_steps <= 10 and config["dtype"] == "float64"
    assert isinstance(parts.problem, DigitsSoftmax) and parts.problem.init_hparams()["penalty"].numel() == 1
    assert (len(grid.penalties), min(grid.penalties), max(grid.penalties)) == (100, 1e-6, 1e4)
    assert grid.tolerance == 1e-10 and grid.split_seed == config["problem"]["split_seed"]


@pytest.mark.parametrize("penalty", [1e-4, 1e-2])
def test_the_grids_solver_reaches_the_tolerance_that_it_is_given(penalty):
    """scikit-learn stops at a largest entry of the gradient of its own mean objective below tol, 1e-10."""
    (grid,) = committed()[0].callbacks
    train = load_digits(grid.split_seed)[0]
    x, y = train.x.double().numpy(), train.y.numpy()
    model = LogisticRegression(solver="newton-cg", tol=grid.tolerance, max_iter=10_000, C=sklearn_c(penalty, len(x)))
    with warnings.catch_warnings(record=True):  # its line search gives up where rounding leaves nothing to gain
        warnings.simplefilter("always")
        model.fit(x, y)
    errors = model.predict_proba(x) - np.eye(10)[y]
    gradient = np.concatenate([(errors.T @ x / len(x) + penalty * model.coef_).ravel(), errors.mean(0)])
    assert np.abs(gradient).max() <= 2 * grid.tolerance


@pytest.mark.parametrize("factor", [100.0, 0.01])
@pytest.mark.parametrize("seed", [0, 5])
def test_ten_steps_reach_the_grids_best_from_two_decades_away(factor, seed, grids):
    best = grids[seed]
    parts, _ = committed(f"problem.start={factor * best['penalty']}", f"problem.split_seed={seed}")
    result = fit(parts.problem, **parts.keywords)
    assert len(result.history) <= 10
    assert result.summary["best"]["outer_loss"] <= best["validation_loss"] * (1 + 1e-4)
    assert result.summary["work"]["inner_gradients"] > 0 and result.summary["work"]["products"] > 0


@pytest.mark.usefixtures("without_report")
def test_the_main_job_prints_the_grid_and_its_own_work(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["experiment=digits", "tracking=console", "trainer.num_steps=3", "callbacks.grid.num_points=3"]
    assert main(["train", *words, "callbacks.grid.low=1e-4", "callbacks.grid.high=1e-2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    summary = json.loads(Path(lines[-1].removeprefix("summary: ")).read_text())
    rows = {cells[1].strip(): [cell.strip() for cell in cells[2:-1]] for cells in (re.split("[│┃]", line) for line in lines) if len(cells) > 3}  # fmt: skip
    assert rows["method"] == [
        "validation",
        "test",
        "accuracy",
        "penalties",
        "fits",
        "gradients",
        "mat-vecs",
        "time (s)",
    ]
    grid, (ours,) = rows["grid of 3"], [cells for name, cells in rows.items() if name.startswith("hypergradient, step")]
    figures, best, work = summary["baseline_figures"], summary["best"], summary["work"]
    assert grid[:5] == [f"{figures['validation_loss']:.6f}", f"{figures['test_loss']:.6f}", f"{figures['test_accuracy']:.4f}", "1", "3"]  # fmt: skip
    assert ours[:5] == [f"{best['outer_loss']:.6f}", f"{best['metrics.test_loss']:.6f}", f"{best['metrics.test_accuracy']:.4f}", "1", "3"]  # fmt: skip
    assert ours[5:7] == [f"{work['inner_gradients']:,}", f"{work['inner_products'] + work['products']:,}"]
    assert work["inner_gradients"] > 3 and work["inner_products"] > 3 and work["products"] > 3


def test_640_penalties_beat_the_grid_on_the_validation_split(grids):
    problem = DigitsSoftmax(penalty="per_weight", start=1e-3)
    optimizer = functools.partial(torch.optim.Adam, lr=0.3)
    result = fit(problem, solver=NewtonCG(max_steps=100), optimizer=optimizer, num_steps=6)
    assert result.summary["best"]["outer_loss"] < grids[0]["validation_loss"]
    assert "metrics.test_loss" in result.summary["best"]


def test_the_grid_lands_in_the_summary(monkeypatch):
    grid = DigitsGrid(num_points=3, low=1e-4, high=1e-2)
    summary = {"best": {"step": 4, "outer_loss": 0.1, "metrics.test_loss": 0.2, "metrics.test_accuracy": 0.9},
               "work": {"inner_gradients": 3, "inner_products": 4, "products": 5}, "num_steps": 5, "num_hparams": 1, "step_seconds": 1.0}  # fmt: skip
    grid.on_end(summary)
    rows = summary["baseline"]["rows"]
    assert rows[0][0] == "grid of 3" and rows[1][-2] == 9
    assert float(rows[0][1]) == pytest.approx(summary["baseline_figures"]["validation_loss"], abs=1e-6)
    untouched = {"best": {}}
    grid.on_end(untouched)
    assert "baseline" not in untouched


def test_minibatch_losses_are_unbiased():
    problem = DigitsSoftmax(batch_size=100)
    params = {"weight": torch.randn(10, 64, generator=torch.Generator().manual_seed(0)), "bias": torch.zeros(9)}
    hparams = {"penalty": torch.tensor(0.1)}
    full = float(problem.inner_loss(params, hparams, None))
    parts = [float(problem.inner_loss(params, hparams, problem.inner_batches(0, k))) for k in range(300)]
    error = np.std(parts) / len(parts) ** 0.5
    assert abs(np.mean(parts) - full) < 4 * error


def test_the_mlp_improves_with_a_decay_for_each_weight():
    problem = DigitsMLP(hidden=(8,))
    method = Implicit(linear_solver=MINRES(rtol=1e-3, max_steps=100))
    optimizer = functools.partial(torch.optim.Adam, lr=0.3)
    result = fit(
        problem, solver=LBFGS(max_steps=400, atol=1e-4), hypergradient=method, optimizer=optimizer, num_steps=5
    )
    assert set(result.hparams) == {f"penalty.layer{index}.{name}" for index in (0, 1) for name in ("weight", "bias")}
    assert result.hparams["penalty.layer0.weight"].shape == (8, 64)
    assert result.summary["best"]["outer_loss"] < 0.9 * result.history[0]["outer_loss"]


def test_the_penalty_of_the_mlp_is_on_the_way_from_the_start():
    problem = DigitsMLP(hidden=(8,), penalty="per_weight", start=0.25, seed=3).to(dtype=torch.float64)
    hparams, start = natural_hparams(problem), problem.init_params({})
    assert float(problem.penalty(start, hparams)) == 0.0
    moved = {name: value + 2.0 for name, value in start.items()}
    count = sum(value.numel() for value in start.values())
    assert float(problem.penalty(moved, hparams)) == pytest.approx(0.25 * 2.0**2 / 2 * count)
    other = DigitsMLP(hidden=(8,), seed=4).init_params({})
    assert not torch.equal(other["layer0.weight"], start["layer0.weight"])


def test_splits_are_disjoint_stratified_and_seeded():
    first, again, other = load_digits(1), load_digits(1), load_digits(2)
    assert all(torch.equal(a.x, b.x) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0].x, other[0].x)
    assert sum(len(part.x) for part in first) == 1797
    for part in first:
        share = torch.bincount(part.y, minlength=10) / len(part.y)
        assert 0.08 < float(share.min()) <= float(share.max()) < 0.12


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: DigitsSoftmax(penalty="sharde"),
            "expected to be shared, per_layer, .* or groups, but is 'sharde': did you mean 'shared'",
        ),
        (lambda: DigitsSoftmax(start=0.0), "starting penalty and must be above 0, but is 0.0"),
        (lambda: DigitsSoftmax(batch_size=5000), r"between 1 and the number of examples \(898\), but is 5000"),
        (lambda: DigitsMLP(hidden=[0]), "widths of at least 1"),
        (lambda: load_digits(0, 0.5, 0.5), "sum to less than 1"),
    ],
)
def test_bad_settings_get_one_sentence(make, message):
    with pytest.raises(UsageError, match=message):
        make()
