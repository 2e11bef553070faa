"""Accuracies of outer steps, reuse of preconditioners, and what the receipt of an automatic run says."""

import math
from dataclasses import replace

import pytest
import torch

from bilevel import Positive, Problem, fit
from bilevel.errors import UsageError
from bilevel.flat import FlatProblem, StepBatches
from bilevel.hypergradient import AdaptiveAccuracy, FixedAccuracy, Implicit, Unrolled, differentiate, start_method
from bilevel.hypergradient.accuracy import INNER, LINEAR
from bilevel.linalg import ConjugateGradient, DenseCholesky
from bilevel.linearisation import linearise
from bilevel.preconditioner import AutoPreconditioner, Jacobi, NoPreconditioner, Nystrom
from bilevel.preconditioner.reuse import note, prepare
from bilevel.solvers import LBFGS, AndersonAcceleration, GradientDescent


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Logistic(Problem):
    """Logistic regression with a penalty for each of many features of very different sizes."""

    constraints = {"penalty": Positive()}

    def __init__(self, features=300, seed=0):
        draw = torch.Generator().manual_seed(seed)
        scale = torch.logspace(0, -2, features)
        self.x, self.x_val = torch.randn(2, 200, features, generator=draw).unbind()
        self.x, self.x_val = self.x * scale, self.x_val * scale
        truth = torch.randn(features, generator=draw)
        self.y, self.y_val = torch.sign(self.x @ truth), torch.sign(self.x_val @ truth)

    def init_hparams(self):
        return {"penalty": torch.full((self.x.shape[1],), 1e-2)}

    def init_params(self, hparams):
        return {"w": torch.zeros(self.x.shape[1])}

    def outputs(self, params, hparams, batch):
        return self.x @ params["w"]

    def output_loss(self, outputs, hparams, batch):
        return torch.nn.functional.softplus(-self.y * outputs)

    def penalty(self, params, hparams):
        return (hparams["penalty"] * params["w"].square()).sum() / 2

    def outer_loss(self, params, hparams, batch):
        return torch.nn.functional.softplus(-self.y_val * (self.x_val @ params["w"])).mean()

    def lower_curvature(self, hparams):
        return float(hparams["penalty"].min())


AUTO = Implicit.auto()
SOLVER = LBFGS(max_steps=3000)


def steps(problem, method, count, solver=SOLVER):
    """Hypergradients at one setting, each step going on from the one before."""
    hparams = problem.init_hparams()
    flat = FlatProblem.of(problem, hparams)
    params = flat.start(hparams)
    state, found = start_method(method, flat, solver, params, hparams), []
    for number in range(count):
        result = differentiate(method, flat, solver, params, hparams, StepBatches(problem, number), state)
        params, state = result.params, result.state
        found.append(result)
    return found


def exact(problem):
    (result,) = steps(
        problem, Implicit(linear_solver=DenseCholesky(), error_estimate=None), 1, LBFGS(atol=1e-11, max_steps=9999)
    )
    return result.gradient["penalty"]


@pytest.mark.parametrize("goal", [0.3, 0.1, 0.01])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_few_steps_at_one_place_reach_the_accuracy_that_was_asked_for(goal, seed):
    problem = Logistic(seed=seed)
    reference = exact(problem)
    results = steps(problem, replace(AUTO, accuracy=AdaptiveAccuracy(relative_error=goal)), 6)
    errors = [float((result.gradient["penalty"] - reference).norm() / reference.norm()) for result in results]
    assert errors[-1] <= goal
    assert results[-1].receipt.error_certified is True
    assert results[-1].receipt.error_estimate <= 3 * goal * float(reference.norm())


def test_tolerances_follow_their_parts_of_the_estimate():
    accuracy = AdaptiveAccuracy(relative_error=0.2, first_linear=0.01, tighten_by=8.0, loosen_by=4.0)
    (result,) = steps(Logistic(), AUTO, 1)
    gradient = {"penalty": torch.tensor([3.0, 4.0])}  # norm 5: each part is to be 0.5
    receipt = replace(result.receipt, stationarity=1e-4, error_inner=1.0, error_linear=0.125)
    state = accuracy.update(accuracy.init(result.params), replace(result, gradient=gradient, receipt=receipt))
    inner, linear = 1e-4 * math.sqrt(0.5 / 1.0), 0.01 * math.sqrt(0.5 / 0.125)
    assert float(state[INNER]) == pytest.approx(inner) and float(state[LINEAR]) == pytest.approx(linear)
    far = replace(receipt, error_inner=1e9, error_linear=1e-9)
    state = accuracy.update(state, replace(result, gradient=gradient, receipt=far))
    inner /= 8
    assert float(state[INNER]) == pytest.approx(inner) and float(state[LINEAR]) == pytest.approx(linear)  # not linear's
    looser = replace(receipt, error_inner=1e-9, error_linear=0.5 / 1.5)
    state = accuracy.update(state, replace(result, gradient=gradient, receipt=looser))
    linear *= math.sqrt(1.5)
    assert float(state[INNER]) == pytest.approx(inner) and float(state[LINEAR]) == pytest.approx(
        linear
    )  # no looser again
    assert result.receipt.error_certified is True
    guess = replace(receipt, error_inner=0.0, error_linear=2.0, error_certified=False)
    assert float(accuracy.update(state, replace(result, gradient=gradient, receipt=guess))[LINEAR]) == pytest.approx(
        linear * math.sqrt(2 * 0.5 / 2.0)  # twice as much is allowed
    )
    unknown = replace(receipt, error_inner=math.nan, error_linear=math.nan)
    assert accuracy.update(state, replace(result, receipt=unknown)) == state


def test_negative_curvature_tightens_the_inner_solve_for_good_but_not_beyond_sense():
    accuracy = AdaptiveAccuracy(first_linear=0.01)
    (result,) = steps(Logistic(), AUTO, 1)
    seen = replace(result.receipt, stationarity=1e-4, curvature_min=-1e-3, error_inner=0.0, error_linear=1e9)
    state, inner = accuracy.init(result.params), []
    for _ in range(9):
        state = accuracy.update(state, replace(result, receipt=replace(seen, stationarity=min(1e-4, *inner, 1.0))))
        inner.append(float(state[INNER]))
    assert inner[:3] == pytest.approx([1e-5, 1e-6, 1e-7]) and inner[-2:] == pytest.approx([1e-10, 1e-10])
    assert float(state[LINEAR]) == 0.01
    calm = replace(result.receipt, error_inner=0.0)
    assert float(accuracy.update(state, replace(result, receipt=calm))[INNER]) == inner[-1]


def test_the_first_solves_are_relative_and_the_next_ones_absolute():
    accuracy, solver = AdaptiveAccuracy(first_inner=1e-2), LBFGS(atol=1e-9)
    state = accuracy.init(torch.zeros(3))
    assert accuracy.tighten(solver, state) == replace(solver, rtol=1e-2)
    state[INNER] = torch.tensor(1e-5)
    assert accuracy.tighten(solver, state) == replace(solver, atol=1e-5, rtol=0.0)
    assert FixedAccuracy().tighten(solver, {}) is solver and FixedAccuracy().linear_rtol({}) is None


def test_an_adaptive_run_costs_less_than_a_tight_one_and_gets_as_far():
    tight = Implicit(linear_solver=ConjugateGradient(rtol=1e-8, max_steps=5000))
    runs = [
        fit(Logistic(), solver=LBFGS(max_steps=3000, atol=1e-8), hypergradient=method, num_steps=25)
        for method in (AUTO, tight)
    ]
    losses = [run.summary["best"]["outer_loss"] for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    assert runs[0].summary["work"]["products"] < 0.5 * runs[1].summary["work"]["products"]


def test_any_method_can_have_an_accuracy():
    method = Unrolled(accuracy=AdaptiveAccuracy(first_inner=0.5))
    (result,) = steps(Logistic(20), method, 1, GradientDescent(learning_rate=1.0, atol=0.0, max_steps=500))
    assert result.receipt.inner_result == "converged" and result.receipt.inner_steps < 500


@pytest.mark.parametrize(
    "options",
    [{"relative_error": 0.0}, {"first_inner": 1.0}, {"first_linear": -1.0}, {"tighten_by": 1.0}, {"loosen_by": 0.5}],
    ids=str,
)
def test_numbers_that_make_no_sense_are_refused(options):
    with pytest.raises(UsageError, match=f"AdaptiveAccuracy needs {next(iter(options))}"):
        AdaptiveAccuracy(**options)


def test_the_receipt_of_an_automatic_solve_names_the_solvers_and_all_products():
    (result,) = steps(Logistic(), AUTO, 1)
    receipt = result.receipt
    assert receipt.linear_method == "ConjugateGradient" and receipt.estimate_mv > 0
    assert receipt.products == receipt.num_mv + receipt.estimate_mv and receipt.space == "natural"
    (small,) = steps(Logistic(20), AUTO, 1)
    assert small.receipt.linear_method == "DenseCholesky"


# --- reuse of preconditioners -----------------------------------------------------------------------------------------


def prepared_after(preconditioner, at, products):
    """What is prepared after solves that took so many products, and the products that it took."""
    state = {}
    for count in products:
        state = note(prepare(preconditioner, at, None, state).state, count)
    return prepare(preconditioner, at, None, state)


def linearised(problem):
    hparams = problem.init_hparams()
    flat = FlatProblem.of(problem, hparams)
    return linearise(flat, SOLVER, flat.start(hparams), hparams)


@pytest.mark.parametrize(
    ("products", "built"),
    [
        ([], True),
        ([7, 7, 7, 7], False),
        ([7, 3, 3, 3, 7], False),
        ([7, 10, 8], False),
        ([7, 10, 9], True),
        ([7, 12], True),
        ([7, 12, 7, 11], False),
        ([7, 12, 7, 11, 8], True),
    ],
    ids=str,
)
def test_a_preconditioner_is_built_anew_once_what_that_would_have_saved_comes_to_its_price(products, built):
    prepared = prepared_after(Jacobi(num_probes=5), linearised(Logistic()), products)
    assert prepared.num_mv == (5 if built else 0) and prepared.operator is not None


def test_what_costs_nothing_is_kept_until_a_solve_takes_longer():
    class Free(Jacobi):
        def build(self, at, inner):
            return replace(super().build(at, inner), num_mv=0, state={"diagonal": at.params, "error": at.params})

    at = linearised(Logistic())
    assert "first" in prepared_after(Free(), at, [7, 7]).state
    assert "first" not in prepared_after(Free(), at, [7, 8]).state  # new


def test_the_receipts_tell_when_a_preconditioner_was_built():
    method = Implicit(linear_solver=ConjugateGradient(rtol=1e-8), preconditioner=Nystrom(rank=40))
    assert [result.receipt.setup_mv for result in steps(Logistic(), method, 5)] == [40, 0, 0, 0, 0]


@pytest.mark.parametrize("preconditioner", [Nystrom(rank=60), Jacobi()], ids=lambda p: type(p).__name__)
def test_a_preconditioned_hypergradient_is_the_same_number(preconditioner):
    problem = Logistic()
    method = Implicit(linear_solver=ConjugateGradient(rtol=1e-10, max_steps=5000), preconditioner=preconditioner)
    (result,) = steps(problem, method, 1, LBFGS(atol=1e-11, max_steps=9999))
    torch.testing.assert_close(result.gradient["penalty"], exact(problem), rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize(
    ("features", "products", "built"),
    [(300, [60], 1), (300, [30, 20], 1), (300, [30, 19], 0), (20, [60], 0)],
    ids=["after a long solve", "after two", "not yet", "not for a matrix that is factorised"],
)
def test_the_automatic_preconditioner_is_built_once_it_pays(features, products, built):
    prepared = prepared_after(AutoPreconditioner(Nystrom(rank=5)), linearised(Logistic(features)), products)
    assert prepared.num_mv == 5 * built and (prepared.operator is not None) is bool(built)


def test_until_then_it_is_the_penalty_where_that_has_more_than_one_value():
    problem, auto = Logistic(), AutoPreconditioner()
    assert prepared_after(auto, linearised(problem), []).operator is None  # one value
    penalty = torch.logspace(-4, 0, 300)
    problem.init_hparams = lambda: {"penalty": penalty}
    prepared = prepared_after(auto, linearised(problem), [])
    assert prepared.num_mv == 0
    torch.testing.assert_close(prepared.operator.mv(torch.ones(300)), 1.0 / penalty)
    plain, scaled = (
        steps(problem, Implicit(linear_solver=ConjugateGradient(rtol=1e-6), preconditioner=chosen), 1)[0].receipt.num_mv
        for chosen in (NoPreconditioner(), AutoPreconditioner(patience=10**6))
    )
    assert scaled < 0.5 * plain


def test_the_automatic_preconditioner_leaves_unsymmetric_systems_alone():
    class Rotated(Logistic):
        def optimality(self, params, hparams, batch):
            return {"w": params["w"] + 0.1 * params["w"].roll(1) - hparams["penalty"]}

        inner_loss = Problem.inner_loss

    problem = Rotated()
    hparams = problem.init_hparams()
    flat = FlatProblem.of(problem, hparams)
    at = linearise(flat, AndersonAcceleration(), flat.start(hparams), hparams)
    assert not AutoPreconditioner().pays(at, 10_000)
    (result,) = steps(problem, AUTO, 1, AndersonAcceleration(atol=1e-8))
    assert result.receipt.linear_method == "GMRES"


def test_patience_below_one_is_refused():
    with pytest.raises(UsageError, match="AutoPreconditioner needs patience >= 1, but got 0"):
        AutoPreconditioner(patience=0)
