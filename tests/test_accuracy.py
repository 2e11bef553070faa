"""Accuracies of outer steps, reuse of preconditioners, and what the receipt of an automatic run says."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from stepping import along

from bilevel import Positive, Problem, fit
from bilevel.batches import StepBatches
from bilevel.errors import UsageError
from bilevel.flat import FlatProblem, natural_hparams
from bilevel.hypergradient import (
    SAMA,
    AdaptiveAccuracy,
    DecreasingAccuracy,
    FiniteDifference,
    FixedAccuracy,
    ForwardMode,
    Implicit,
    ImplicitUpdate,
    OneStep,
    Unrolled,
    differentiate,
)
from bilevel.hypergradient.accuracy import INNER, LINEAR
from bilevel.hypergradient.method import start_method
from bilevel.linalg import POSITIVE_DEFINITE, ConjugateGradient, DenseCholesky, DiagonalOperator, MatrixOperator
from bilevel.linearisation import linearise
from bilevel.preconditioner import KFAC, AutoPreconditioner, Jacobi, LBFGSPairs, NoPreconditioner, Nystrom
from bilevel.preconditioner.recycled import corrected, learnt
from bilevel.preconditioner.reuse import note, prepare
from bilevel.solvers import LBFGS, Adam, AndersonAcceleration, GradientDescent, run

pytestmark = pytest.mark.usefixtures("float64")


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


class Root(Logistic):
    """The same solution as that of an optimality, which no error estimate is known for."""

    def optimality(self, params, hparams, batch):
        w = params["w"]
        slope = -self.y * torch.sigmoid(-self.y * (self.x @ w))
        return {"w": self.x.T @ slope / len(self.x) + hparams["penalty"] * w}


AUTO = Implicit.auto()
SOLVER = LBFGS(max_steps=3000)


def steps(problem, method, count, solver=SOLVER):
    """Hypergradients at one setting, each step going on from the one before."""
    return along(problem, method, solver, [problem.init_hparams()] * count)


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


def test_a_curvature_bound_may_be_a_tensor():
    class Declared(Logistic):
        def lower_curvature(self, hparams):
            return hparams["penalty"].min() * self.factor

    problem = Declared()
    for problem.factor, certified in ((1.0, True), (1e6, False)):
        (result,) = steps(problem, AUTO, 1)
        assert result.receipt.error_certified is certified


class Attribute(Logistic):
    lower_curvature = 0.1


class Vector(Logistic):
    def lower_curvature(self, hparams):
        return hparams["penalty"]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            Attribute,
            r"Attribute.lower_curvature was expected to be a method of hyperparameters, but is 0.1: write `def lower_",
        ),
        (
            Vector,
            r"Vector.lower_curvature was expected to return one number or None, but returned a tensor of shape \(300,\)",
        ),
    ],
)
def test_a_curvature_bound_that_is_none(make, said):
    with pytest.raises(UsageError, match=said):
        steps(make(), AUTO, 1)


@pytest.mark.parametrize("method", [Unrolled, OneStep, ForwardMode, SAMA, FiniteDifference, ImplicitUpdate])
def test_accuracies_that_go_by_the_error_estimate_are_refused_where_there_is_none(method):
    with pytest.raises(
        UsageError, match=rf"AdaptiveAccuracy goes by the error estimate .* {method.__name__} has none: use Decr"
    ):
        method(accuracy=AdaptiveAccuracy()).check(Adam())
    method(accuracy=DecreasingAccuracy()).check(GradientDescent())


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


def test_any_method_can_have_tolerances_that_decrease_to_the_solvers_own():
    accuracy = DecreasingAccuracy(first_inner=0.5, first_linear=0.2, decay=0.1, last_linear=1e-4)
    solver = GradientDescent(learning_rate=1.0, atol=1e-6, max_steps=20_000)
    for method in (
        Unrolled(accuracy=accuracy, last=2),
        Implicit(linear_solver=ConjugateGradient(rtol=1e-9), accuracy=accuracy),
    ):
        results = steps(Logistic(20), method, 8, solver)
        first, *rest = (result.receipt for result in results)
        assert first.inner_result == "converged" and first.stationarity > 1e-3
        for number, receipt in enumerate(rest, start=1):
            asked = max(0.1**number * first.stationarity, 1e-6)
            assert receipt.stationarity <= asked and receipt.inner_result == "converged"
        if first.linear_result is not None:
            asked = [0.2, 0.02, 0.002, 0.0002, 1e-9, 1e-9]
            for limit, receipt in zip(asked, (first, *rest), strict=False):
                assert receipt.linear_residual <= limit * 1.001
            assert first.linear_residual > 1e-9


@pytest.mark.parametrize(
    ("problem", "method"),
    [
        (lambda: Logistic(20), Unrolled(accuracy=AdaptiveAccuracy(first_inner=0.5), last=2)),
        (lambda: Logistic(300), Implicit.auto(error_estimate=None)),
        (lambda: Logistic(300), ImplicitUpdate(accuracy=AdaptiveAccuracy())),
        (lambda: Root(300), Implicit.auto()),
    ],
    ids=["unrolled", "no estimate", "implicit update", "optimality"],
)
def test_where_there_is_no_estimate_the_solvers_own_tolerances_hold(problem, method):
    solver = GradientDescent(learning_rate=1.0, atol=1e-8, max_steps=50_000)
    for result in steps(problem(), method, 3, solver):
        receipt = result.receipt
        assert math.isnan(receipt.error_estimate)
        assert receipt.stationarity <= 1e-8 and not receipt.linear_residual > 1e-5


def test_a_step_without_an_estimate_ends_the_adapting():
    (result,) = steps(Logistic(), AUTO, 1)
    state = AUTO.accuracy.init(result.params)
    assert AUTO.accuracy.linear_rtol(AUTO.accuracy.update(state, result)) is not None
    lost = replace(result, receipt=replace(result.receipt, error_estimate=math.nan))
    assert AUTO.accuracy.update(state, lost) == {}
    assert AUTO.accuracy.linear_rtol({}) is None and AUTO.accuracy.tighten(LBFGS(atol=1e-7), {}).atol == 1e-7


def test_a_budget_of_inner_steps_is_spent_whatever_the_accuracy():
    solver = GradientDescent(learning_rate=0.1, max_steps=16, atol=0.0)
    for accuracy in (AdaptiveAccuracy(), DecreasingAccuracy()):
        results = steps(Logistic(), Implicit.auto(accuracy=accuracy), 3, solver)
        assert [(one.receipt.inner_result, one.receipt.inner_steps) for one in results] == [("budget_spent", 16)] * 3


def test_the_gradient_of_a_batch_is_no_measure_of_how_far_a_solve_is():
    class Batches(Logistic):
        def inner_batches(self, step, inner_step):
            return inner_step

    problem, solver = Batches(), GradientDescent(learning_rate=0.1)
    hparams = natural_hparams(problem)
    flat = FlatProblem.of(problem, hparams)
    assert not any(
        name.startswith("accuracy.")
        for name in start_method(Implicit.auto(), flat, solver, flat.start(hparams), hparams)
    )


@pytest.mark.parametrize(
    "options", [{"first_inner": 0.0}, {"first_linear": 1.0}, {"decay": 1.0}, {"last_linear": -1.0}]
)
def test_decreasing_needs_numbers_between_zero_and_one(options):
    with pytest.raises(UsageError, match=f"DecreasingAccuracy needs {next(iter(options))} between 0 and 1"):
        DecreasingAccuracy(**options)


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
    auto = AutoPreconditioner([Nystrom(rank=50)])
    prepared = prepared_after(auto, linearised(Logistic(features)), products)
    assert prepared.num_mv == 50 * built and (prepared.operator is not None) is bool(built)


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
        for chosen in (NoPreconditioner(), AutoPreconditioner([]))
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


class Network(Problem):
    """Two layers with as many outputs as asked for; `table` adds parameters that are in no linear map."""

    constraints = {"penalty": Positive()}

    def __init__(self, num_outputs=4, table=0):
        draw = torch.Generator().manual_seed(0)
        self.x, self.y = torch.randn(30, 12, generator=draw), torch.randn(30, num_outputs, generator=draw)
        self.num_outputs, self.table = num_outputs, table

    def init_hparams(self):
        return {"penalty": torch.tensor(1e-2)}

    def init_params(self, hparams):
        draw = torch.Generator().manual_seed(1)
        shapes = {"first": (12, 20), "second": (20, self.num_outputs), "table": (self.table,)}
        return {name: 0.3 * torch.randn(shape, generator=draw) for name, shape in shapes.items() if shape[0]}

    def outputs(self, params, hparams, batch):
        outputs = torch.tanh(self.x @ params["first"]) @ params["second"]
        return outputs + params["table"].sin().sum() if self.table else outputs

    def output_loss(self, outputs, hparams, batch):
        return (outputs - self.y).square().sum(-1)

    def penalty(self, params, hparams):
        return hparams["penalty"] * sum(value.square().sum() for value in params.values())

    def outer_loss(self, params, hparams, batch):
        return self.output_loss(torch.tanh(self.x.flip(0) @ params["first"]) @ params["second"], hparams, None).mean()


class OneLoss(Network):
    """The same in one piece."""

    def inner_loss(self, params, hparams, batch):
        outputs = self.outputs(params, hparams, batch)
        return self.output_loss(outputs, hparams, batch).mean() + self.penalty(params, hparams)


@pytest.mark.parametrize(
    ("problem", "chosen"),
    [
        (Network, KFAC()),
        (partial(Network, table=10), KFAC()),  # ten of 330 with a diagonal
        (partial(Network, table=100), Nystrom()),
        (partial(Network, num_outputs=60), Nystrom()),  # sixty backward passes
        (OneLoss, Nystrom()),
    ],
    ids=["network", "a few parameters beside it", "many beside it", "many outputs", "a loss in one piece"],
)
def test_the_automatic_preconditioner_takes_the_cheapest_that_serves(problem, chosen):
    at, auto = linearised(problem()), AutoPreconditioner()
    price = chosen.price(at)
    assert auto.price(at) == price and not auto.pays(at, int(price) - 1) and auto.pays(at, int(price))
    built, expected = auto.build(at, None), chosen.build(at, None)
    probe = torch.linspace(-1, 1, at.operator.shape[0])
    torch.testing.assert_close(built.operator.mv(probe), expected.operator.mv(probe))
    torch.testing.assert_close(auto.restore(at, built.state).mv(probe), expected.operator.mv(probe))


def test_the_automatic_preconditioner_has_nothing_to_build_without_candidates():
    assert not AutoPreconditioner([]).pays(linearised(Logistic()), 10**9)


def test_the_inner_solvers_pairs_correct_it_and_are_those_of_the_latest_solves():
    problem, auto = Network(), AutoPreconditioner()
    flat, hparams = FlatProblem.of(problem, problem.init_hparams()), problem.init_hparams()
    objective, start = flat.objective(None), flat.start(hparams)

    def solved(steps, params):
        solution = run(LBFGS(max_steps=steps, atol=1e-12, history=6), objective, params, hparams)
        return solution, linearise(flat, SOLVER, solution.params, hparams)

    (first, at), probe = solved(30, start), torch.linspace(-1, 1, flat.layout.size)
    built = auto.build(at, first)
    torch.testing.assert_close(built.operator.mv(probe), LBFGSPairs(KFAC()).build(at, first).operator.mv(probe))
    assert not torch.allclose(built.operator.mv(probe), KFAC().build(at, first).operator.mv(probe))
    later, at = solved(2, first.params + 0.01)
    state = auto.refresh(built.state, later)
    torch.testing.assert_close(state["steps"], torch.cat([first.state["s"][2:], later.state["s"]]))
    torch.testing.assert_close(state["changes"], torch.cat([first.state["y"][2:], later.state["y"]]))
    newest, change = later.state["s"][-1], later.state["y"][-1]
    torch.testing.assert_close(auto.restore(at, state).mv(change), newest)  # the secant equation of the latest pair
    unmoved = replace(first, state={**first.state, "s": first.state["s"][:0], "y": first.state["y"][:0]})
    for kept in (auto.refresh(built.state, unmoved), auto.refresh(built.state, None)):
        torch.testing.assert_close(kept["steps"], first.state["s"])
    empty = auto.build(at, unmoved)
    torch.testing.assert_close(empty.operator.mv(probe), KFAC().build(at, None).operator.mv(probe))


# --- what solves leave to later ones ----------------------------------------------------------------------------------


class Turning(Problem):
    """`x = D^-1 b` with one small curvature, along which the outer gradient changes its sign in every outer step."""

    curvature = 1e-3

    def __init__(self, n=300):
        self.diagonal = torch.ones(n).index_fill(0, torch.tensor([n - 1]), self.curvature)

    def init_hparams(self):
        return {"b": torch.ones_like(self.diagonal)}

    def init_params(self, hparams):
        return {"x": torch.zeros_like(self.diagonal)}

    def outer_batches(self, step, inner_step):
        return 0.02 * torch.tensor(float((-1) ** step))

    def inner_loss(self, params, hparams, batch):
        return (self.diagonal * params["x"].square() / 2 - hparams["b"] * params["x"]).sum()

    def outer_loss(self, params, hparams, batch):
        return params["x"][:-1].sum() + batch * params["x"][-1]

    def hypergradient(self, step):
        slope = torch.ones_like(self.diagonal)
        slope[-1] = self.outer_batches(step, 0)
        return slope / self.diagonal


@pytest.mark.parametrize(
    ("keeps", "wrong"),
    [({"recycle": 2}, (0.0, 1e-4)), ({"warm_start_linear": True}, (1.0, 2.0)), ({}, (0.5, 1.0))],
    ids=["directions", "the adjoint", "nothing"],
)
def test_what_earlier_solves_know_does_not_become_their_error(keeps, wrong):
    """Starting from the old adjoint keeps its wrong sign within the tolerance; its direction does no harm."""
    problem = Turning()
    method = Implicit(linear_solver=ConjugateGradient(rtol=1e-3), error_estimate=None, **keeps)
    (first,) = steps(problem, method, 1, LBFGS(atol=1e-10))
    loose = replace(method, linear_solver=ConjugateGradient(rtol=0.05))
    flat, hparams = FlatProblem.of(problem, problem.init_hparams()), problem.init_hparams()
    result = differentiate(loose, flat, SOLVER, first.params, hparams, StepBatches(problem, 1), first.state)
    exact = problem.hypergradient(1)
    error = float((result.gradient["b"] - exact).norm() / exact.norm())
    assert wrong[0] <= error <= wrong[1]


def test_recycled_directions_shorten_the_solves_of_a_moving_run_and_leave_its_numbers():
    def run_with(recycle):
        linear = ConjugateGradient(rtol=1e-8, max_steps=5000)
        method = Implicit(linear_solver=linear, recycle=recycle, error_estimate=None)
        return fit(Logistic(), solver=LBFGS(max_steps=3000, atol=1e-9), hypergradient=method, num_steps=8).history

    plain, recycled = run_with(0), run_with(50)
    for one, other in zip(plain, recycled, strict=True):
        assert other["hypergradient_norm"] == pytest.approx(one["hypergradient_norm"], rel=1e-5)
    assert recycled[0]["receipt.num_mv"] == plain[0]["receipt.num_mv"]
    assert sum(r["receipt.num_mv"] for r in recycled[1:]) < 0.75 * sum(r["receipt.num_mv"] for r in plain[1:])


def test_the_latest_directions_are_kept_and_solved_exactly():
    vectors = torch.randn(2, 5, 40, generator=torch.Generator().manual_seed(0))  # two tasks
    diagonal = torch.logspace(-3, 0, 40)
    state = learnt({}, vectors[:, :3], vectors[:, :3] * diagonal, 4)
    state = learnt(state, vectors[:, 3:], vectors[:, 3:] * diagonal, 4)
    assert state["recycled.steps"].shape == (4, 2, 40)
    torch.testing.assert_close(state["recycled.steps"], vectors[:, 1:].movedim(1, 0))
    like = DiagonalOperator(diagonal.expand(2, 40), POSITIVE_DEFINITE)
    for initial in (None, DiagonalOperator(torch.full((2, 40), 0.1), POSITIVE_DEFINITE)):
        latest = corrected(initial, like, state).mv(vectors[:, 4] * diagonal)
        torch.testing.assert_close(latest, vectors[:, 4])
    assert corrected(None, like, {}) is None
    assert corrected(None, MatrixOperator(torch.eye(40)), state) is None  # not known to be symmetric


def test_a_product_that_is_not_finite_spoils_no_later_solve():
    like, vectors = DiagonalOperator(torch.logspace(-3, 0, 40), POSITIVE_DEFINITE), torch.eye(40)[:3]
    products = like.mv(vectors)
    products[1, 7] = torch.nan
    operator = corrected(None, like, learnt({}, vectors, products, 50))
    torch.testing.assert_close(operator.mv(products[2]), vectors[2])
    assert operator.mv(torch.ones(40)).isfinite().all()


def test_a_span_that_is_everything_is_not_recycled():
    everything = torch.eye(7)
    assert learnt({}, everything, everything, 50) == {}


@pytest.mark.parametrize("recycle", [-1, 1.5])
def test_a_number_of_directions_that_makes_no_sense_is_refused(recycle):
    with pytest.raises(UsageError, match="Implicit needs recycle to be an integer of at least 0"):
        Implicit(recycle=recycle)
