"""Penalties of words: splits, the derivative of a penalty, what the run says of words, and what is refused."""

import types

import pytest
import torch

from bilevel import fit, hypergradient_at
from bilevel.data import Glosses
from bilevel.data.wordnet import CLASSES
from bilevel.errors import UsageError
from bilevel.flat import FlatProblem
from bilevel.hypergradient import Implicit
from bilevel.linalg import ConjugateGradient, DenseCholesky
from bilevel.preconditioner import KFAC, AutoPreconditioner, Jacobi
from bilevel.problems import TextPenalties, TextWords, text_penalties
from bilevel.solvers import NewtonCG, run

WORDS = "river bank money horse wind coin stone leaf hour song war bread".split()
SOLVER = NewtonCG(atol=1e-11, max_steps=200)


@pytest.fixture(autouse=True)
def few_texts(monkeypatch):
    """Sixty texts of a few words each in place of the real ones: a word says something of the class."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 5
    texts = []
    for number, label in enumerate(labels.tolist()):
        chosen = torch.randint(0, len(WORDS), (4,), generator=draw).tolist()
        texts.append(" ".join([WORDS[label], *(WORDS[one] for one in chosen), f"only{number}"]))
    glosses = Glosses(tuple(texts), labels)
    monkeypatch.setattr(text_penalties, "load_wordnet_nouns", lambda root: glosses)
    return glosses


def texts(penalty="shared", **words):
    return TextPenalties(penalty, **{"start": 1e-2, "holdout": 0.25, **words}).to(dtype=torch.float64)


def test_each_text_is_in_one_split_and_words_are_those_of_the_training_texts(few_texts):
    parts = text_penalties._split(60, 40, 0.25, 0.2, 0.3, 7)
    assert [len(part) for part in parts] == [22, 7, 3, 8]
    assert len(torch.cat(parts).unique()) == 40
    problem = texts()
    train = text_penalties._split(60, None, 0.2, 0.2, 0.25, 0)[0].tolist()
    assert set(problem.words) == {word for number in train for word in few_texts.texts[number].split()}
    assert problem.x.shape == (36, len(problem.words)) and problem.x_holdout.shape[0] == 3
    assert bool((few_texts.labels[train] == problem.y).all())


def test_other_split_seeds_split_otherwise_and_the_same_one_does_not():
    same = [text_penalties._split(60, None, 0.2, 0.2, 0.1, seed)[0].tolist() for seed in (3, 3, 4)]
    assert same[0] == same[1] != same[2]


@pytest.mark.parametrize(("kind", "number"), [("shared", 1), ("per_feature", 1), ("per_weight", 25)])
def test_the_hypergradient_is_that_of_finite_differences_and_of_a_dense_solve(kind, number):
    problem = texts(kind)
    name = "penalty"
    found = hypergradient_at(
        problem, solver=SOLVER, method=Implicit(linear_solver=ConjugateGradient(rtol=1e-10), preconditioner=Jacobi())
    ).gradient[name]
    assert found.numel() == number * (1 if kind == "shared" else len(problem.words))
    dense = hypergradient_at(problem, solver=SOLVER, method=Implicit(linear_solver=DenseCholesky())).gradient[name]
    torch.testing.assert_close(found, dense, rtol=1e-6, atol=1e-8)

    def outer(penalty):
        flat = FlatProblem.of(problem, {name: penalty})
        with torch.no_grad():
            solved = run(SOLVER, flat.objective(None), flat.start({name: penalty}), {name: penalty})
            assert solved.stationarity <= 1e-11
            return float(flat.outer_loss(solved.params, {name: penalty}, None))

    start = problem.init_hparams()[name].double()
    for seed in (1, 2):
        direction = torch.randn(start.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        step = 1e-5 * direction / direction.abs().max()
        difference = (outer(start + step) - outer(start - step)) / 2
        assert float((found * step).sum()) == pytest.approx(difference, rel=1e-5)


def test_the_inner_solution_is_that_of_scikit_learn():
    from sklearn.linear_model import LogisticRegression

    problem = texts(start=1e-2)
    flat = FlatProblem.of(problem, problem.init_hparams())
    hparams = {"penalty": torch.tensor(1e-2, dtype=torch.float64)}
    ours = flat.unravel(run(SOLVER, flat.objective(None), flat.start(hparams), hparams).params)
    dense = problem.x @ torch.eye(len(problem.words), dtype=torch.float64)
    theirs = LogisticRegression(C=1 / (1e-2 * len(dense)), tol=1e-10, max_iter=5000, solver="newton-cg")
    theirs.fit(dense.numpy(), problem.y.numpy())
    ours_log = problem.scores(ours, problem.x).log_softmax(-1)[:, :5]
    rest = problem.scores(ours, problem.x).log_softmax(-1)[:, 5:].exp().sum()
    assert float(rest) < 1e-2  # classes that no text has: their intercepts go to minus infinity
    torch.testing.assert_close(ours_log, torch.from_numpy(theirs.predict_log_proba(dense.numpy())), rtol=0, atol=4e-3)


def test_nothing_is_left_out_where_nothing_is_asked_to_be():
    problem = texts(holdout=0.0)
    params = problem.place(problem.init_params({}))
    assert set(problem.metrics(params, {})) == {"validation_loss", "validation_accuracy", "test_loss", "test_accuracy"}
    assert set(texts().metrics(params, {})) - set(problem.metrics(params, {})) == {"holdout_loss", "holdout_accuracy"}


def test_kronecker_factors_find_nothing_in_sparse_inputs_and_the_automatic_choice_does_without():
    problem = texts()
    with pytest.warns(UserWarning, match="KFAC was expected to find linear maps .* but found none"):
        hypergradient_at(problem, solver=SOLVER, method=Implicit(preconditioner=KFAC()))
    found = hypergradient_at(problem, solver=SOLVER, method=Implicit(preconditioner=AutoPreconditioner()))
    assert found.receipt.linear_result == "converged"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"start": 0.0}, r"problem.start is the starting penalty and must be above 0, but is 0.0"),
        ({"num_texts": 61}, r"problem.num_texts was expected to be from 1 to 60, or null, but is 61"),
        ({"num_texts": 2}, r"problem.num_texts=2 is too few for all splits"),
        ({"validation_fraction": 0.7, "test_fraction": 0.3}, r"with a sum below 1.*they are 0.7, 0.3 and 0.25"),
        ({"holdout": 1.0}, r"problem.holdout a share from 0 to below 1"),
        ({"penalty": "per_word"}, r"was expected to be shared, per_layer.*but is 'per_word'"),
    ],
)
def test_what_cannot_be_is_told_in_one_sentence(words, said):
    with pytest.raises(UsageError, match=said):
        texts(**words)


def test_words_are_told_at_the_best_step():
    callback = TextWords(num_words=2)
    problem = texts("per_weight")
    result = fit(problem, solver=NewtonCG(atol=1e-6), num_steps=2, callbacks=[callback])
    told = result.summary["words"]
    assert list(told["classes"]) == list(CLASSES)
    for label in range(5):  # the word that each text of the class has
        first = told["classes"][CLASSES[label]][0]
        assert first["word"] == WORDS[label]
        column = problem.words.index(WORDS[label])
        assert first["weight"] == pytest.approx(float(result.params["weight"][label, column]))
        assert first["penalty"] == pytest.approx(float(result.hparams["penalty"][label, column]))
    groups = told["by_frequency"]
    assert sum(group["words"] for group in groups) == len(problem.words)
    assert groups[0]["texts"] == 1 and all(group["low"] <= group["median"] <= group["high"] for group in groups)
    rare = (problem.x.columns.crow_indices().diff() == 1).sum()
    assert groups[0]["words"] == int(rare)


def test_words_belong_to_texts():
    with pytest.raises(UsageError, match=r"TextWords belongs to TextPenalties, but the problem is int"):
        TextWords().on_start(
            types.SimpleNamespace(setup=types.SimpleNamespace(problem=types.SimpleNamespace(problem=1)))
        )
    with pytest.raises(UsageError, match="num_words >= 1"):
        TextWords(num_words=0)
