"""Sparse linear models: scikit-learn's own solutions, its LassoCV, the designs, and what only the support costs."""

import json
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array, random_array

from bilevel import Trainer, fit, hypergradient_at
from bilevel.cli.main import main
from bilevel.data import load_khan
from bilevel.data.khan import FOLDER, WHEEL
from bilevel.errors import UsageError
from bilevel.hypergradient import Implicit
from bilevel.linalg import DenseCholesky
from bilevel.problems import (
    GlossDesign,
    KhanDesign,
    LeastSquares,
    Logistic,
    RandomDesign,
    SparsePenalties,
    SupportVectors,
)
from bilevel.problems.sparse_designs import Design, Source
from bilevel.solvers import Project, ProximalGradient, ProximalNewton, SoftThreshold
from bilevel.sparse import SparseMatrix

pytestmark = pytest.mark.usefixtures("float64")
SMALL = RandomDesign(num_examples=60, num_features=90, num_relevant=5)
LASSO = ProximalNewton(200, 1e-12, proximal=SoftThreshold("penalty"))
BOX = ProximalNewton(200, 1e-12, proximal=Project(0.0, "cost"))
EXACT = Implicit(linear_solver=DenseCholesky())


class Signs(Source):
    """The random design with targets 1 and -1."""

    def load(self):
        x, y, names = SMALL.load()
        return Design(x, torch.where(y > 0, 1.0, -1.0), names)


class Sparse(Source):
    """A sparse matrix, or the same one dense."""

    def __init__(self, dense):
        self.dense = dense

    def load(self):
        matrix = random_array((50, 70), density=0.2, rng=np.random.default_rng(3)).tocsr()
        y = torch.from_numpy(matrix @ np.r_[np.ones(8), np.zeros(62)]) + 0.05 * torch.randn(
            50, generator=torch.Generator().manual_seed(1)
        )
        return Design(torch.from_numpy(matrix.toarray()) if self.dense else SparseMatrix.of(matrix, torch.float64), y)


def fold_of(problem, fold):
    """Training and validation rows of a fold, as arrays that are not centred."""
    x, y = (part.numpy() for part in problem.design_of)
    train, validation = (part[fold].numpy() > 0 for part in (problem.train, problem.validation))
    return x[train], y[train], x[validation], y[validation]


def by_sklearn(problem, make, penalties, judge):
    """The outer loss by scikit-learn's models, fold by fold."""
    total = 0.0
    for fold in range(problem.num_tasks):
        x, y, x_val, y_val = fold_of(problem, fold)
        model = make(penalties, len(y)).fit(x, y)
        total += judge(model, x_val, y_val)
    return total / problem.num_tasks


def squared(model, x, y):
    return float(((model.predict(x) - y) ** 2).mean())


def logistic(model, x, y):
    return float(np.logaddexp(0, -y * (x @ model.coef_.ravel())).mean())


def lasso(penalties, number):
    from sklearn.linear_model import Lasso

    return Lasso(alpha=penalties["penalty"], tol=1e-14, max_iter=10**6)


def elastic_net(penalties, number):
    from sklearn.linear_model import ElasticNet

    alpha = penalties["penalty"] + penalties["ridge"]
    return ElasticNet(alpha=alpha, l1_ratio=penalties["penalty"] / alpha, tol=1e-14, max_iter=10**6)


def sparse_logistic(penalties, number):
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(
        l1_ratio=1.0,
        C=1 / (number * penalties["penalty"]),
        solver="saga",
        fit_intercept=False,
        tol=1e-13,
        max_iter=10**6,
    )


MODELS = {
    "lasso": (SMALL, LeastSquares(), None, lasso, squared, 3),
    "elastic net": (SMALL, LeastSquares(), 0.2, elastic_net, squared, 3),
    "logistic": (Signs(), Logistic(), None, sparse_logistic, logistic, 2),
    "lasso, one split": (SMALL, LeastSquares(), None, lasso, squared, 1),
}


@pytest.mark.parametrize("case", MODELS)
def test_the_hypergradient_is_that_of_scikit_learns_own_solutions(case):
    design, model, ridge, make, judge, num_folds = MODELS[case]
    problem = SparsePenalties(design, model, num_folds=num_folds, start=0.3, ridge=ridge)
    problem.design_of = design.load()[:2]
    found = hypergradient_at(problem, solver=LASSO, method=EXACT)
    at = {name: float(value) for name, value in problem.init_hparams().items()}
    assert found.outer_loss == pytest.approx(by_sklearn(problem, make, at, judge), rel=1e-7)
    for name, value in at.items():
        step = 1e-4 * value
        sides = [by_sklearn(problem, make, {**at, name: value + sign * step}, judge) for sign in (2, 1, -1, -2)]
        want = (-sides[0] + 8 * sides[1] - 8 * sides[2] + sides[3]) / (12 * step)
        assert float(found.gradient[name]) == pytest.approx(want, rel=1e-6), name


def test_the_hypergradient_is_that_of_scikit_learns_support_vector_machine():
    from sklearn.svm import LinearSVC

    problem = SupportVectors(
        RandomDesign(num_examples=120, num_features=8, num_relevant=3, signal_to_noise=1.0), start=0.02
    )
    found = hypergradient_at(problem, solver=BOX, method=EXACT)
    alpha = found.params["alpha"]
    assert 0 < int(((alpha > 0) & (alpha < 0.02)).sum()) and int((alpha >= 0.02).sum()) > 10

    def loss(cost):
        model = LinearSVC(loss="hinge", C=cost, fit_intercept=False, tol=1e-13, max_iter=10**7, random_state=0)
        weight = model.fit(problem.x.numpy(), problem.y.numpy()).coef_[0]
        return float(np.logaddexp(0, -problem.y_validation.numpy() * (problem.x_validation.numpy() @ weight)).mean())

    assert found.outer_loss == pytest.approx(loss(0.02), rel=1e-8)
    assert float(found.gradient["cost"]) == pytest.approx((loss(0.02 + 1e-6) - loss(0.02 - 1e-6)) / 2e-6, rel=1e-6)


def test_a_penalty_for_each_feature_is_differentiated_on_the_support():
    problem = SparsePenalties(SMALL, num_folds=2, penalty="per_feature", start=0.3)
    found = hypergradient_at(problem, solver=LASSO, method=EXACT)
    ever = (found.params["weight"] != 0).any(0)
    assert bool((found.gradient["penalty"] != 0).equal(ever)) and 0 < int(ever.sum()) < 60
    penalty, place = problem.init_hparams()["penalty"], int(ever.nonzero()[0])
    sides = []
    for sign in (1e-6, -1e-6):
        moved = penalty.clone()
        moved[place] += sign
        sides.append(hypergradient_at(problem, {"penalty": moved}, solver=LASSO, method=EXACT).outer_loss)
    assert float(found.gradient["penalty"][place]) == pytest.approx((sides[0] - sides[1]) / 2e-6, rel=1e-6)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_optimum_of_lasso_cv_is_found_in_ten_steps(seed):
    from sklearn.linear_model import LassoCV

    design = RandomDesign(num_examples=100 + 30 * seed, num_features=150, seed=seed)
    x, y, _ = design.load()
    best = LassoCV(cv=5, tol=1e-8, max_iter=10**5).fit(x.numpy(), y.numpy()).mse_path_.mean(1).min()
    fitted = fit(
        SparsePenalties(design), solver=LASSO, hypergradient=EXACT, trainer=Trainer(num_steps=10),
        optimizer=lambda raw: torch.optim.LBFGS(raw, lr=1.0, max_iter=1),
    )  # fmt: skip
    assert min(record["outer_loss"] for record in fitted.history) <= best * (1 + 1e-4)


@pytest.mark.parametrize(
    "solver",
    [LASSO, ProximalGradient(100_000, 1e-10, SoftThreshold("penalty"), 2.0)],
    ids=lambda one: type(one).__name__,
)
def test_sparse_features_give_what_dense_ones_do(solver):
    dense, sparse = (SparsePenalties(Sparse(kind), num_folds=3) for kind in (True, False))
    one, other = (hypergradient_at(problem, solver=solver, method=EXACT) for problem in (dense, sparse))
    assert float(one.gradient["penalty"]) == pytest.approx(float(other.gradient["penalty"]), rel=1e-7)
    assert one.outer_loss == pytest.approx(other.outer_loss, rel=1e-10)
    assert 0 < int((other.params["weight"] != 0).sum()) < 210


def test_the_work_after_the_inner_solve_is_that_of_the_support():
    """Features that stay at zero are not touched: they may as well not be numbers."""
    problem = SparsePenalties(SMALL, num_folds=2, start=0.3)
    found = hypergradient_at(problem, solver=LASSO, method=EXACT)
    used = (found.params["weight"] != 0).any(0)
    smaller = problem.restricted({"weight": used})
    assert smaller.x.shape[1] == int(used.sum()) < 40 and smaller.means.shape[1] == smaller.x.shape[1]
    at = {"weight": found.params["weight"][:, used]}
    hparams = problem.init_hparams()
    assert torch.allclose(
        smaller.inner_loss(at, hparams, None), problem.inner_loss(found.params, hparams, None), rtol=1e-12
    )
    assert torch.allclose(
        smaller.outer_loss(at, hparams, None), problem.outer_loss(found.params, hparams, None), rtol=1e-12
    )
    assert found.receipt.num_mv == int((found.params["weight"] != 0).sum())  # a column of the matrix each


@given(rows=st.integers(1, 8), columns=st.integers(1, 8), density=st.floats(0, 1), seed=st.integers(0, 10**6))
@settings(max_examples=50, deadline=None)
def test_columns_of_a_sparse_matrix_are_selected(rows, columns, density, seed):
    rng = np.random.default_rng(seed)
    matrix = csr_array(random_array((rows, columns), density=density, rng=rng))
    chosen = rng.permutation(columns)[: rng.integers(0, columns + 1)]
    found = SparseMatrix.of(matrix, torch.float64).select(torch.from_numpy(chosen))
    want = torch.from_numpy(matrix.toarray()[:, chosen])
    assert found.shape == want.shape
    assert torch.equal(found @ torch.eye(len(chosen), dtype=torch.float64), want)
    assert torch.equal(found.mT @ torch.eye(rows, dtype=torch.float64), want.mT)


def test_khan_has_its_samples():
    expressions, kinds = load_khan()
    assert expressions.shape == (83, 2308) and kinds.bincount().tolist() == [11, 29, 18, 25]
    x, y, _ = KhanDesign("neuroblastoma").load()
    assert torch.allclose(x.mean(0), torch.zeros(2308), atol=1e-12) and int((y > 0).sum()) == 18


def test_glosses_are_sparse():
    x, y, names = GlossDesign(num_texts=300).load()
    assert x.shape == (300, len(names)) and 0 < int((y > 0).sum()) < 150


def damaged(tmp_path, content):
    (tmp_path / FOLDER).mkdir()
    with zipfile.ZipFile(tmp_path / FOLDER / WHEEL, "w") as archive:
        for name in ("xtrain", "xtest", "ytrain", "ytest"):
            archive.writestr(f"ISLP/data/Khan_{name}.csv", content)
    return tmp_path


def test_khan_that_is_missing_or_damaged_is_told(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match=r"were expected to be 83 samples of 2,308 genes.*get islp 0\.6\.0 anew"):
        load_khan(damaged(tmp_path, '"a","b"\n1,2\n3,4\n'))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        UsageError, match=r"does not exist, and islp is not installed: pip download --no-deps islp==0\.6\.0"
    ):
        load_khan(tmp_path / "nowhere")


def test_khan_that_is_no_table_is_told(tmp_path):
    with pytest.raises(UsageError, match="cannot be read"):
        load_khan(damaged(tmp_path, '"a"\nx\n'))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SparsePenalties(SMALL, num_folds=31), r"num_folds was expected to be from 1 to 30, but is 31"),
        (lambda: SparsePenalties(SMALL, start=1.0), r"problem\.start was expected to be between 0 and 1"),
        (lambda: SparsePenalties(SMALL, ridge=0.0), r"problem\.ridge above 0 or null"),
        (lambda: SupportVectors(SMALL, start=0.0), r"problem\.start was expected to be above 0"),
        (lambda: KhanDesign("Ewing").load(), r"was expected to be a class of the data, but is 'Ewing'"),
        (lambda: GlossDesign(num_texts=1).load(), r"num_texts was expected to be from 2 to 82,064, but is 1"),
        (lambda: RandomDesign(correlation=1.0).load(), r"correlation from 0 to below 1"),
    ],
)
def test_numbers_out_of_range_are_named(make, words):
    with pytest.raises(UsageError, match=words):
        make()


COMMANDS = {
    "lasso": (),
    "elastic net": ("problem.ridge=0.1",),
    "genes": ("design=khan", "linear_model=logistic"),
    "words": ("design=glosses", "design.num_texts=400", "linear_model=logistic"),
    "support vectors": ("experiment=support_vectors",),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_the_experiment_runs(case, tmp_path):
    keys = (
        "trainer.num_steps=3",
        "tracking=none",
        f"output_dir={tmp_path}",
        "threads=1",
    )
    chosen = COMMANDS[case] if case == "support vectors" else ("experiment=sparse_penalties", *COMMANDS[case])
    assert main(["train", *chosen, *keys]) == 0
    (summary,) = (json.loads(path.read_text()) for path in tmp_path.rglob("summary.json"))
    (records,) = (path.read_text().splitlines() for path in tmp_path.rglob("metrics.jsonl"))
    assert summary["num_steps"] == 3 and summary["best"]["outer_loss"] < json.loads(records[0])["outer_loss"]
