"""The planner: prices on made-up unit costs, counts and memory against what really happens, recommendations, the command."""

import dataclasses
import functools
import json
import math
import re
import time
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from bilevel import Positive, Problem, fit, plan
from bilevel.batches import StepBatches
from bilevel.cli.main import main
from bilevel.data import Sinusoid
from bilevel.diagnostics import Budget, Forecast, cost
from bilevel.diagnostics.bench import Bench, Candidate, reach
from bilevel.diagnostics.cost import Cost, Line, Recorded, Units, Work, forecast
from bilevel.diagnostics.forecast import recommend
from bilevel.diagnostics.meter import held_bytes, peak_bytes, seconds_of
from bilevel.diagnostics.pilot import Made, Pilot
from bilevel.diagnostics.planner import _steps_seconds
from bilevel.diagnostics.trials import InnerTrial, Site, try_inner, try_linear, try_recorded
from bilevel.errors import UsageError
from bilevel.flat import FlatProblem, natural_hparams
from bilevel.hypergradient import (
    AdaptiveAccuracy,
    ForwardMode,
    Implicit,
    Unrolled,
    differentiate,
    hypergradient_at,
)
from bilevel.linalg import GMRES, MINRES, AutoSolver, ConjugateGradient, NeumannSeries
from bilevel.meta import ProximalFewShot, Regression
from bilevel.models import MLP
from bilevel.preconditioner import Nystrom
from bilevel.solvers import LBFGS, AndersonAcceleration, GradientDescent, InnerResult, NewtonCG
from bilevel.trainer import Trainer
from bilevel.trainer.nonfinite import Raise, Skip

CPU = torch.device("cpu")
SHORT = Trainer(num_steps=3)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Ridge(Problem):
    """A penalty for each feature; the inner Hessian has as many distinct eigenvalues."""

    constraints = {"penalty": Positive()}

    def __init__(self, features=6):
        self.x, self.y, self.x_val, self.y_val = (
            normal(30, features),
            normal(30, seed=1),
            normal(20, features, seed=2),
            normal(20, seed=3),
        )
        self.to(dtype=torch.float64)

    def init_hparams(self):
        return {"penalty": torch.linspace(0.5, 2.0, self.x.shape[1])}

    def init_params(self, hparams):
        return {"w": self.x.new_zeros(self.x.shape[1])}

    def inner_loss(self, params, hparams, batch):
        x, y = (self.x, self.y) if batch is None else (self.x[batch], self.y[batch])
        return (x @ params["w"] - y).square().mean() + (hparams["penalty"] * params["w"].square()).sum()

    def outer_loss(self, params, hparams, batch):
        return (self.x_val @ params["w"] - self.y_val).square().mean()


class Wanderer(Ridge):
    """Tunes the learning rate and the starting point besides, which a solution does not depend on."""

    def init_hparams(self):
        return {**super().init_hparams(), "rate": torch.tensor(0.05), "origin": torch.tensor(1.0)}

    def init_params(self, hparams):
        return {"w": hparams["origin"].expand(self.x.shape[1]).clone()}


class Minibatches(Ridge):
    def inner_batches(self, step, inner_step):
        return torch.arange(10) + 10 * ((step + inner_step) % 3)


class Tasks(Ridge):
    num_tasks = 3


class Swirl(Ridge):
    """No minimiser: a root whose Jacobian is not symmetric."""

    def optimality(self, params, hparams, batch):
        w = params["w"]
        return {"w": (1 + hparams["penalty"]) * w + torch.roll(w, 1) - 1}


class Saddle(Ridge):
    """Convex but for one direction, in which the starting point is stationary."""

    def inner_loss(self, params, hparams, batch):
        w = params["w"]
        return super().inner_loss({"w": w * (torch.arange(6) > 0)}, hparams, batch) - 4 * w[0].square()

    def outer_loss(self, params, hparams, batch):
        return super().outer_loss({"w": params["w"] + 0.1}, hparams, batch)


def site_of(problem, allowance=5.0):
    hparams = natural_hparams(problem)
    flat = FlatProblem.of(problem, hparams)
    return Site(flat, hparams, StepBatches(problem, 0), flat.start(hparams), allowance)


def row_of(found, name):
    return next(row for row in found.rows[1:] if row.name.startswith(name))


# --- the cost model ---------------------------------------------------------------------------------------------------

UNITS = Units(
    gradient=1.0, product=2.0, linearise=3.0, mixed=4.0, outer=5.0, side=6.0, graph_bytes=1000.0,
    side_bytes=200.0, flops=9.0, num_params=3, num_unknowns=3, itemsize=8,
)  # fmt: skip
INNER = Cost(7.0, 300.0)
RECORDED = Recorded(Line(10.0, 0.5), Line(100.0, 40.0))

PRICES = {
    "implicit": (cost.implicit(UNITS, INNER, 10, 2.5), Cost(7 + 12 + 25, 1000)),
    "implicit, large inner": (cost.implicit(UNITS, Cost(7.0, 5e3), 10, 2.5), Cost(44, 5000)),
    "dense": (cost.dense(UNITS, INNER), Cost(7 + 12 + 3 * 2 + 27 / 3 / 9, 1000 + 24 * 9)),
    "dense, two tasks": (
        cost.dense(dataclasses.replace(UNITS, num_params=6), INNER),
        Cost(7 + 12 + 3 * 2 + 2 * 27 / 3 / 9, 1000 + 2 * 24 * 9),
    ),
    "dense, float32": (cost.dense(dataclasses.replace(UNITS, itemsize=4), INNER), Cost(26, 1000 + 16 * 9)),
    "unrolled": (cost.unrolled(RECORDED, 20), Cost(20, 900)),
    "checkpointed": (cost.checkpointed(UNITS, RECORDED, 20, 4, 0.25), Cost(20 + 5, 260 + 5 * 2 * 3 * 8)),
    "checkpointed, one long segment": (cost.checkpointed(UNITS, RECORDED, 20, 50, 0.25), Cost(25, 900 + 2 * 3 * 8)),
    "forward": (cost.forward(Recorded(Line(1.0, 3.0), Line(500.0, 0.0)), 20), Cost(61, 500)),
    "one step": (cost.one_step(RECORDED, 7.0), Cost(7 + 10.5, 140)),
    "finite differences": (cost.finite_difference(UNITS, INNER), Cost(7 + 1 + 5 + 12, 300)),
}


@pytest.mark.parametrize("name", PRICES)
def test_prices_on_made_up_unit_costs(name):
    found, expected = PRICES[name]
    assert found.seconds == pytest.approx(expected.seconds, rel=1e-12)
    assert found.bytes == pytest.approx(expected.bytes, rel=1e-12)


MORE = {
    "products": lambda n: cost.implicit(UNITS, INNER, n, 2.5),
    "unknowns": lambda n: cost.dense(dataclasses.replace(UNITS, num_params=n, num_unknowns=n), INNER),
    "unrolled steps": lambda n: cost.unrolled(RECORDED, n),
    "checkpointed steps": lambda n: cost.checkpointed(UNITS, RECORDED, n, 4, 0.25),
    "forward steps": lambda n: cost.forward(RECORDED, n),
    "inner seconds": lambda n: cost.finite_difference(UNITS, Cost(float(n), 300.0)),
}


@pytest.mark.parametrize("name", MORE)
def test_more_work_takes_more_time_and_no_less_memory(name):
    prices = [MORE[name](n) for n in (1, 2, 5, 20, 100)]
    assert all(one.seconds < other.seconds for one, other in pairwise(prices))
    assert all(one.bytes <= other.bytes for one, other in pairwise(prices))


def test_checkpointing_trades_time_for_memory():
    plain, segments = cost.unrolled(RECORDED, 400), cost.checkpointed(UNITS, RECORDED, 400, 20, 0.25)
    assert segments.seconds > plain.seconds and segments.bytes < 0.2 * plain.bytes


@pytest.mark.parametrize(
    ("few", "many", "expected"),
    [((2, 5.0), (6, 13.0), (1.0, 2.0)), ((2, 5.0), (6, 4.0), (5.0, 0.0)), ((2, 1.0), (6, 9.0), (0.0, 2.0))],
)
def test_a_line_never_falls_nor_begins_below_zero(few, many, expected):
    assert Line.through(*few, *many) == Line(*expected)


@pytest.mark.parametrize(
    ("made", "steps", "expected"),
    [
        ({2: 10.0, 6: 30.0, 8: 20.0}, [3, 4, 5, 7, 9], [15, 20, 25, 25, 20]),
        ({1.5: 10.0, 6: 30.0}, [0, 2, 3], [10, 10 + 20 / 9, 10 + 60 / 9]),  # the mean of steps 1 and 2
        ({1: 7.0}, [2, 30], [7, 7]),  # nothing further on is known
        ({1: 7.0}, [], []),
    ],
)
def test_the_work_of_steps_that_were_not_made(made, steps, expected):
    assert forecast(made, steps) == pytest.approx(expected)


def pilot_of(**changes):
    values = {
        "num_steps": 5, "num_checkpoints": 2, "warm_start": True, "set_up_seconds": 10.0,
        "first": (Made(0, 50.0, Work(9, 0, 2)), Made(1, 60.0, Work(4, 1, 1))), "later": (Made(4, 80.0, Work(1, 1, 4)),),
        "beside_seconds": 0.5, "checkpoint_seconds": 0.25, "held_bytes": 1e6, "peak_before": 1.5e6, "peak_bytes": 2e6,
    }  # fmt: skip
    return Pilot(**{**values, **changes})


def test_a_run_is_what_was_made_and_what_is_forecast():
    pilot = pilot_of()
    # modelled: 12 + 9 + 4 = 25, 12 + 4 + 4 = 20 and 12 + 1 + 10 = 23; the median of 50 / 25, 60 / 20 and 80 / 23 is 3
    assert [vars(one) for one in pilot.work()] == [
        vars(Work(9, 0, 2)), vars(Work(4, 1, 1)), vars(Work(3, 1, 2)), vars(Work(2, 1, 3)), vars(Work(1, 1, 4)),
    ]  # fmt: skip
    steps = 110 + 3 * (3 * 12 + (3 + 2 + 1) + 2 * (3 + 2 + 3 + 4))
    assert pilot.around_seconds == 10 + 5 * 0.5 + 2 * 0.25
    assert pilot.run_seconds(UNITS) == pytest.approx(13 + steps, rel=1e-12)


def test_a_cold_start_is_typical_only_where_every_start_is_cold():
    first = (Made(0, 50.0, Work(9, 0, 2)), Made(1, 60.0, Work(4, 1, 1)))
    warm, cold = (pilot_of(first=first, later=(), warm_start=warm).future() for warm in (True, False))
    assert warm == [Work(4, 1, 1)] * 3 and cold == [Work(6.5, 0.5, 1.5)] * 3


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # inner: twice its units, 2 (19 + 8); products: 12 in 5 steps that began with 2
        ({"grows": True}, 54 + 5 * (12 + 1.2 * 20)),
        ({"grows": False}, 54 + 5 * (12 + 20)),
        ({"inner_seconds": None}, 5 * 50),
    ],
)
def test_a_run_with_another_method(changes, expected):
    price = Cost(18.0 + UNITS.fixed + 20.0, 0.0)
    own = InnerTrial(LBFGS(), torch.zeros(1), 18.0, 8, 9, 0, 8, 0.0, InnerResult.converged, 0.0)
    bench = Bench(None, UNITS, True, own, own, Implicit())
    one = Candidate("other", Implicit(), LBFGS(), "", price, **{"inner_seconds": 18.0, **changes})
    assert _steps_seconds(one, price, pilot_of(), bench) == pytest.approx(expected, rel=1e-12)


def test_memory_counts_what_was_held_before():
    assert pilot_of().memory(0.1e6) == 1.5e6 and pilot_of().memory(3e6) == 4e6


# --- recommendations --------------------------------------------------------------------------------------------------


def forecast_row(name, seconds, gigabytes, **changes):
    return Forecast(name, f"hypergradient={name}", 1.0, seconds, gigabytes * 1e9, 1e6, **changes)


OWN = forecast_row("own", 100.0, 1.0)
SLIM = forecast_row("slim", 300.0, 0.2)
QUICK = forecast_row("quick", 10.0, 4.0)
BIASED = forecast_row("biased", 3.0, 0.1, biased="one step stands for all")
LOOSE = forecast_row("loose", 6.0, 0.5, short="it ends at 0.1", further=True)
BLIND = forecast_row("blind", 1.0, 0.01, unusable="'rate' gets no gradient")
ROWS = (OWN, SLIM, QUICK, BIASED, LOOSE, BLIND)


@pytest.mark.parametrize(
    ("rows", "budget", "chosen", "words"),
    [
        (ROWS, Budget(), QUICK, "the fastest among the soundest (exact)"),
        (ROWS, Budget(seconds=50), QUICK, "among the soundest that fit 50 s"),
        (ROWS, Budget(memory_gb=2), OWN, "fits 2 GB"),
        (ROWS, Budget(memory_gb=0.3), SLIM, "that fit 0.3 GB"),
        (ROWS, Budget(seconds=50, memory_gb=2), LOOSE, "biased would take"),
        ((OWN, BIASED), Budget(seconds=50), BIASED, "(biased)"),
        ((OWN, forecast_row("alike", 90.0, 1.0)), Budget(), OWN, "no method as sound is faster by more than a forecast may err"),
        ((OWN, SLIM, QUICK), Budget(seconds=1), None, "nothing fits 1 s: the nearest is quick with 10 s and 4 GB, 10 times"),
        ((OWN, SLIM, QUICK), Budget(memory_gb=0.1), None, "nothing fits 0.1 GB: the nearest is slim with 300 s and 0.2 GB, 2 times"),
        ((OWN, QUICK), Budget(seconds=50, memory_gb=0.5), None, "nothing fits 50 s and 0.5 GB: the nearest is own"),
        ((BLIND,), Budget(), None, "no method gives every hyperparameter a gradient"),
    ],
)  # fmt: skip
def test_recommendations(rows, budget, chosen, words):
    found, sentence = recommend(rows, budget)
    assert found is chosen
    assert words in sentence and sentence.endswith(".") and "\n" not in sentence


@pytest.mark.parametrize("value", [0, -1, "many", True, math.nan])
@pytest.mark.parametrize("name", ["seconds", "memory_gb"])
def test_a_budget_is_a_number_above_zero(name, value):
    with pytest.raises(UsageError, match=f"plan.{name} is a budget and must be above 0"):
        Budget(**{name: value})


# --- what is measured -------------------------------------------------------------------------------------------------


def test_the_clock_takes_the_median_within_its_allowance():
    calls = []

    def nap():
        calls.append(0)
        time.sleep(0.1 if len(calls) == 2 else 0.01)

    assert 0.009 < seconds_of(nap, CPU, repeats=5) < 0.08 and len(calls) == 6
    calls.clear()
    seconds_of(nap, CPU, allowance=1e-9)
    assert len(calls) == 2


def test_the_scale_sees_the_peak_and_not_the_sum():
    def two_one_after_the_other():
        for _ in range(2):
            torch.zeros(1000, dtype=torch.float64)

    assert peak_bytes(two_one_after_the_other, CPU) == 8000
    assert peak_bytes(lambda: (torch.zeros(1000), torch.zeros(1000)), CPU) == 8000
    assert held_bytes(CPU) > 50e6


@pytest.mark.parametrize("solver", [LBFGS(), NewtonCG(), GradientDescent(max_steps=40)])
def test_an_inner_trial_is_the_solve_itself(solver):
    problem = Ridge()
    trial, real = try_inner(site_of(problem), solver), hypergradient_at(problem, solver=solver).receipt
    assert not trial.extrapolated
    assert (trial.num_steps, trial.num_gradients, trial.num_products) == (
        real.inner_steps,
        real.inner_gradients,
        real.inner_products,
    )


def test_a_trial_that_is_cut_short_counts_all_steps():
    trial = try_inner(site_of(Ridge(), allowance=1e-9), GradientDescent(max_steps=40, atol=0.0))
    assert trial.extrapolated and (trial.num_made, trial.num_steps, trial.num_gradients) == (1, 40, 40)
    whole = try_inner(site_of(Ridge()), GradientDescent(max_steps=40, atol=0.0))
    assert not whole.extrapolated and whole.num_gradients == 40


def test_compiling_is_no_part_of_a_solve(monkeypatch):
    def slow(graph, example):
        time.sleep(1.0)
        return graph

    monkeypatch.setattr("bilevel.solvers.compiled.compile_graph", slow)
    trial = try_inner(site_of(Ridge(), allowance=0.5), GradientDescent(max_steps=40, atol=0.0, compile=True))
    assert trial.num_made == 40  # no second of the half that is allowed goes to the compiler


def linear_trial(solver, problem=None, allowance=5.0, product=1e-5):
    site = site_of(problem or Ridge(), allowance)
    params = try_inner(site, LBFGS()).params
    units = dataclasses.replace(UNITS, product=product)
    return try_linear(site, units, LBFGS(), params, Implicit(linear_solver=solver))


@pytest.mark.parametrize("solver", [ConjugateGradient(), MINRES(), NeumannSeries(max_steps=50)])
def test_a_linear_trial_makes_the_products_of_the_hypergradient(solver):
    trial = linear_trial(solver)
    real = hypergradient_at(Ridge(), method=Implicit(linear_solver=solver)).receipt
    assert trial.products == trial.made == real.products and trial.bytes > 0


def test_a_linear_trial_of_an_episode_is_made_at_the_point_that_is_given():
    torch.manual_seed(0)
    problem = ProximalFewShot(Sinusoid(), MLP(hidden=(6,)), Regression(), num_tasks=2, strength=3.0).to(
        dtype=torch.float64
    )
    site, asked = site_of(problem), []

    class Watched(LBFGS):
        def init(self, params, loss, hparams):
            asked.append(params)
            return super().init(params, loss, hparams)

    at = torch.randn_like(site.start)
    try_linear(site, UNITS, Watched(), at, Implicit(linear_solver=ConjugateGradient(rtol=None, max_steps=2)))
    assert asked and all(torch.equal(one, at) for one in asked)


def test_a_linear_trial_that_is_cut_short_goes_on_at_its_rate():
    solver = ConjugateGradient(rtol=1e-12, max_steps=1000)
    whole = linear_trial(solver, Ridge(features=40))
    short = linear_trial(solver, Ridge(features=40), allowance=1.0, product=0.1)
    assert whole.made == whole.products and short.made < 0.6 * whole.made
    assert short.products == pytest.approx(whole.products, rel=0.5)


@pytest.mark.parametrize("method", [Unrolled(), ForwardMode()])
def test_memory_of_recorded_steps_is_a_line(method):
    """Predicted from 2 and 6 steps, weighed at 30."""
    site, solver = site_of(Ridge()), GradientDescent(max_steps=30, atol=0.0)
    predicted = try_recorded(site, method, solver).bytes(30)
    real = peak_bytes(lambda: differentiate(method, site.flat, solver, site.start, site.hparams, site.batches, {}), CPU)
    assert predicted == pytest.approx(real, rel=0.02)


# --- plans ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ridge():
    return plan(
        Ridge(),
        solver=NewtonCG(),
        hypergradient=Implicit(linear_solver=ConjugateGradient()),
        trainer=SHORT,
        pilot_steps=2,
    )


def test_a_plan_has_every_method_with_its_price(ridge):
    names = [row.name for row in ridge.rows]
    assert names[0] == "as configured: Implicit, ConjugateGradient"
    for name in ("ConjugateGradient", "MINRES", "NeumannSeries", "DenseCholesky"):
        assert f"implicit, {name}" in names
    for name in (
        "implicit, automatic", "implicit, IdentitySolver", "implicit update", "unrolled", "one step", "forward mode",
        "finite differences", "SAMA",
    ):  # fmt: skip
        assert name in names
    assert any("checkpointed" in name for name in names)
    for row in ridge.rows:
        assert 0 < row.seconds < row.run_seconds and 50e6 < row.memory_bytes < 1e11, row
        assert not row.unusable


def test_a_plan_knows_what_a_number_is_worth(ridge):
    assert row_of(ridge, "implicit, Conj").worth == row_of(ridge, "implicit, Dense").worth == "exact"
    for name in ("one step", "finite differences"):
        assert row_of(ridge, name).worth == "biased" and row_of(ridge, name).rank == 3
    assert ridge.chosen.worth == "exact"


class Uneven(Ridge):
    """Features of very different sizes."""

    def __init__(self):
        super().__init__(300)
        self.x = self.x * torch.logspace(0, -3, 300).to(self.x)


def test_what_is_priced_is_what_the_keys_compose():
    found = plan(Uneven(), trainer=SHORT, pilot_steps=1, allowance=1.0)
    plain = Implicit(linear_solver=ConjugateGradient())  # hypergradient=implicit_cg
    (made,) = [one for one in found.candidates if one.keys == "hypergradient=implicit_cg"]
    assert made.method == plain
    real = hypergradient_at(Uneven(), method=plain, solver=made.solver).receipt.products
    assert made.counts.endswith(f" {real} products")
    own = Implicit(linear_solver=MINRES(rtol=1e-3), preconditioner=Nystrom())
    found = plan(Uneven(), trainer=SHORT, pilot_steps=1, allowance=1.0, hypergradient=own)
    (made,) = [one for one in found.candidates if one.keys == "hypergradient=implicit_cg"]
    assert made.method == replace(own, linear_solver=ConjugateGradient(rtol=1e-3))  # what was chosen stays chosen


def test_a_number_that_is_as_accurate_as_a_step_needs_is_not_called_exact():
    loose = Implicit.auto(linear_solver=AutoSolver(dense_size=0), accuracy=AdaptiveAccuracy(first_linear=0.9))
    found = plan(Uneven(), trainer=SHORT, pilot_steps=1, allowance=1.0, hypergradient=loose)
    assert re.fullmatch(r"as needed: [\d.e+]+ %", found.configured.worth) and found.configured.rank == 0
    assert row_of(found, "implicit, Conj").worth == "exact"


def test_a_plan_says_what_was_measured_and_what_was_not(ridge):
    first, *others = ridge.basis
    assert "the first 2 of 3 outer steps" in first and "the other 1 are taken to do as much as these" in first
    assert any("gradient" in one and "product" in one and "ms" in one for one in others)
    assert any("NewtonCG" in one and "all made" in one for one in others)
    assert any("GradientDescent" in one for one in others)  # the methods that record steps need another solver
    assert "solver=gradient_descent" in row_of(ridge, "unrolled").keys


def test_the_recommendation_follows_the_budget():
    rows = plan(Ridge(), trainer=SHORT, pilot_steps=1, budget=Budget(seconds=1e-6))
    assert rows.chosen is None and "nothing fits 1e-06 s: the nearest is" in rows.sentence


def test_methods_that_leave_a_hyperparameter_out_are_not_recommended():
    found = plan(
        Wanderer(), solver=GradientDescent(learning_rate="rate", max_steps=30), hypergradient=Unrolled(), trainer=SHORT
    )
    implicit = row_of(found, "implicit, Conj")
    assert "'rate' gets no gradient: it is an option of the inner solver" in implicit.unusable
    assert "'origin' gets no gradient: it only enters the starting point" in implicit.unusable
    assert "'origin'" in row_of(found, "one step").unusable and "'rate'" not in row_of(found, "one step").unusable
    assert not found.configured.unusable and not row_of(found, "forward").unusable
    assert found.chosen.name in ("as configured: Unrolled", "forward mode") or "unrolled" in found.chosen.name


def test_a_warm_start_cuts_the_way_through_the_starting_point():
    site, solver = site_of(Wanderer()), GradientDescent(learning_rate="rate")
    assert reach(site, Unrolled(), solver) == {}
    assert list(reach(site, Unrolled(warm_start=True), solver)) == ["origin"]


def test_a_hyperparameter_that_the_configured_method_does_not_reach_is_refused_as_in_a_run():
    with pytest.raises(UsageError, match="'rate' gets no hypergradient from Implicit"):
        plan(Wanderer(), solver=GradientDescent(learning_rate="rate"), hypergradient=Implicit())


def test_forward_mode_refuses_too_many_directions():
    found = plan(Ridge(features=1001), solver=LBFGS(max_steps=5), trainer=Trainer(num_steps=1), allowance=0.2)
    row = row_of(found, "forward")
    assert (
        "1001 directions" in row.unusable
        and math.isnan(row.seconds)
        and math.isnan(row.memory_bytes)
        and row.worth == "-"
    )


def test_an_unsymmetric_root_is_planned_with_solvers_that_can():
    found = plan(Swirl(), solver=AndersonAcceleration(), hypergradient=Implicit(linear_solver=GMRES()), trainer=SHORT)
    names = [row.name for row in found.rows]
    assert {"implicit, GMRES", "implicit, BiCGStab", "implicit, DenseLU"} <= set(names)
    assert "implicit, ConjugateGradient" not in names
    assert "inner_loss" in row_of(found, "finite").unusable


@pytest.mark.parametrize("problem", [Minibatches, Tasks])
def test_minibatches_and_tasks(problem):
    found = plan(problem(), trainer=SHORT, pilot_steps=2, allowance=0.5)
    assert (
        found.configured.run_seconds > 0 and row_of(found, "unrolled").own_bytes > row_of(found, "one step").own_bytes
    )


def test_negative_curvature_costs_the_products_of_both_solvers():
    method = Implicit(linear_solver=ConjugateGradient())
    found = plan(Saddle(), solver=LBFGS(), hypergradient=method, trainer=Trainer(num_steps=1))
    real = hypergradient_at(Saddle(), method=method, solver=LBFGS()).receipt
    predicted = int(row_of(found, "implicit, Conj").counts.split(", ")[1].split()[0])
    assert predicted == pytest.approx(real.products, abs=4) and real.products > 4
    assert any(row.name == "implicit, DenseLU" for row in found.rows)  # Cholesky would fail


def test_a_solver_that_diverges_carries_no_method():
    problem = Ridge()
    problem.x = 100 * problem.x
    found = plan(problem, solver=NewtonCG(), trainer=SHORT, pilot_steps=1, allowance=0.5)
    for name in ("unrolled", "one step", "forward"):
        assert (
            "GradientDescent fails" in row_of(found, name).unusable and "learning rate" in row_of(found, name).unusable
        )
    assert not row_of(found, "implicit, MINRES").unusable and found.chosen.worth == "exact"


class Steep(Ridge):
    """So ill-conditioned that gradient descent crawls."""

    def __init__(self):
        super().__init__()
        self.x = self.x * torch.tensor([1.0, 1.0, 0.02, 0.02, 0.02, 0.02])

    def init_hparams(self):
        return {"penalty": torch.full((6,), 1e-4)}


def test_a_solver_that_gets_less_far_is_second_choice():
    found = plan(Steep(), solver=NewtonCG(), trainer=SHORT, pilot_steps=1, allowance=0.5)
    row = row_of(found, "unrolled")
    assert row.further and row.rank == 2 and row.worth == "as far as solved" and "GradientDescent ends at" in row.short
    assert found.configured.rank == 0


def test_an_unfinished_inner_solve_is_no_exact_number():
    found = plan(Ridge(), solver=LBFGS(max_steps=3), trainer=SHORT, pilot_steps=1, allowance=0.5)
    assert found.configured.short == "the inner solve ends with max_steps" and found.configured.rank == 1


class Hardening(Ridge):
    """Ill-conditioned without its penalties, which the outer loss wants small: solves take longer and longer."""

    def __init__(self):
        super().__init__()
        self.x = self.x * torch.tensor([1.0, 1.0, 1.0, 0.1, 0.1, 0.1])

    def init_hparams(self):
        return {"penalty": torch.full((6,), 1.0)}

    def outer_loss(self, params, hparams, batch):
        return (self.x @ params["w"] - self.y).square().mean()


@pytest.mark.parametrize(("optimizer", "rate"), [(torch.optim.Adam, 0.06), (torch.optim.NAdam, 0.06)])
def test_later_steps_tell_of_work_that_changes_along_the_run(optimizer, rate):
    parts = {
        "solver": GradientDescent(max_steps=5000, atol=1e-9), "hypergradient": Implicit(linear_solver=ConjugateGradient()),
        "optimizer": functools.partial(optimizer, lr=rate), "trainer": Trainer(num_steps=40),
    }  # fmt: skip
    real = sum(record["receipt.inner_gradients"] for record in fit(Hardening(), **parts).history)
    pilot = plan(Hardening(), **parts, allowance=60.0).pilot
    predicted = sum(one.gradients for one in pilot.work())
    as_at_first = 40 * sum(one.work.gradients for one in pilot.first) / len(pilot.first)
    assert [one.step for one in pilot.first] == [0, 1, 2, 3] and pilot.later[-1].step == 39 and len(pilot.later) == 8
    assert predicted == pytest.approx(real, rel=0.1) and as_at_first < 0.6 * real


def test_patience_does_not_end_the_later_steps():
    pilot = plan(Hardening(), trainer=Trainer(num_steps=40, patience=2), allowance=60.0).pilot
    assert len(pilot.later) == 8


def test_later_steps_are_made_only_while_there_is_time():
    pilot = plan(Hardening(), trainer=Trainer(num_steps=40), allowance=1e-3, pilot_steps=2).pilot
    assert len(pilot.first) == 1 and pilot.later == () and pilot.num_future == 39


@pytest.mark.parametrize("nonfinite", [Skip(), Raise()])
def test_a_point_further_on_without_a_hypergradient_ends_the_later_steps(nonfinite):
    class Cliff(Hardening):
        def outer_loss(self, params, hparams, batch):
            return super().outer_loss(params, hparams, batch) / (hparams["penalty"].amin() > 0.2)

    pilot = plan(Cliff(), trainer=Trainer(num_steps=40, nonfinite=nonfinite), allowance=60.0).pilot
    assert 0 < len(pilot.later) < 8 and len(pilot.work()) == 40


def test_a_plan_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    problem = Ridge()
    before = problem.init_hparams()["penalty"].clone()
    plan(problem, trainer=SHORT, pilot_steps=2, allowance=0.2)
    assert list(tmp_path.iterdir()) == [] and torch.equal(problem.init_hparams()["penalty"], before)


def test_trackers_are_started_fed_and_ended(tmp_path):
    class Spy:
        heard = []

        def on_start(self, run):
            self.heard.append(("start", run.num_steps))

        def on_step(self, record, hparams):
            time.sleep(0.05)
            self.heard.append(("step", record["step"]))

        def on_end(self, summary):
            self.heard.append(("end", summary["num_steps"]))

    found = plan(Ridge(), trainer=SHORT, pilot_steps=2, allowance=2.0, callbacks=[Spy()], directory=tmp_path)
    assert Spy.heard == [("start", 3), ("step", 0), ("step", 1), ("end", 2)]
    assert (
        found.pilot.beside_seconds >= 0.05 and found.pilot.checkpoint_seconds > 0 and found.pilot.num_checkpoints == 1
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pilot_steps": 0}, "plan.pilot_steps must be an integer of at least 1, but is 0"),
        ({"pilot_steps": 1.5}, "plan.pilot_steps must be an integer"),
        ({"allowance": 0}, "plan.allowance must be a number of seconds above 0"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(UsageError, match=message):
        plan(Ridge(), **options)


# --- the command ------------------------------------------------------------------------------------------------------

DIGITS = [
    "plan",
    "experiment=digits",
    "tracking=console",
    "trainer.num_steps=3",
    "++plan.pilot_steps=1",
    "++plan.allowance=0.2",
]


def test_the_command_prints_a_table_and_writes_json(tmp_path, capsys):
    assert main([*DIGITS, f"output_dir={tmp_path}", "++plan.seconds=1000"]) == 0
    out, err = capsys.readouterr()
    content = json.loads((folder := next((tmp_path / "plans" / "digits").iterdir()) / "plan.json").read_text())
    assert out.strip().splitlines()[-1] == f"plan: {folder}"
    assert "plan of digits: 3 outer steps" in out and "recommended: " in out and "1 of 3 outer steps" in out
    assert "step time" not in out + err  # the trackers of a rehearsal are not heard
    assert [path.name for path in tmp_path.iterdir()] == ["plans"]
    assert content["name"] == "digits" and content["budget"] == {"seconds": 1000, "memory_gb": None}
    assert content["configured"]["run_seconds"] > content["configured"]["seconds"] > 0
    names = [row["name"] for row in content["methods"]]
    assert (
        content["recommended"] in [content["configured"]["name"], *names] and content["recommended"] in content["why"]
    )
    assert len(content["steps made"]) == 1 and len(content["steps forecast"]) == 2
    assert content["unit costs"]["product"] > 0 and content["config"]["name"] == "digits"
    assert content["around the steps"]["checkpoints"] == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["experiment=digits", "-m"], "plan looks at one configuration"),
        (["experiment=digits", "--cfg", "job"], "plan looks at one configuration"),
        (["experiment=digits", "+plan.second=3"], "there is no key 'plan.second'; did you mean"),
        (["experiment=digits", "++plan.seconds=-3"], "plan.seconds is a budget and must be above 0"),
        (["experiment=digitz"], "digitz"),
    ],
)
def test_mistakes_on_the_command_line(words, message, capsys):
    assert main(["plan", *words]) == 2
    err = capsys.readouterr().err
    assert message in err and len(err.splitlines()) == 1


def test_help(capsys):
    assert main(["plan", "--help"]) == 0
    out = capsys.readouterr().out
    assert "plan.seconds" in out and "plan.memory_gb" in out and "python -m bilevel plan" in out


def test_a_rehearsal_sends_nothing():
    from bilevel.cli.plan import _offline

    nodes = {
        "mode": "online",
        "wandb": {"mode": "online", "a": 1},
        "off": {"mode": "disabled"},
        "console": {"num_lines": 3},
    }
    assert _offline(nodes) == {**nodes, "wandb": {"mode": "offline", "a": 1}}
