"""Methods of single steps: unbiased on minibatches, right where everything rests, refused where they cannot work."""

import functools
import itertools
from dataclasses import replace

import pytest
import torch

from bilevel import fit
from bilevel.batches import StepBatches
from bilevel.constraints import Positive, UnitInterval
from bilevel.data import Minibatches, Partition
from bilevel.errors import UsageError
from bilevel.flat import FlatProblem
from bilevel.hypergradient import (
    BOME,
    F2SA,
    MASOBA,
    SABA,
    SOBA,
    TTSA,
    AmIGO,
    Implicit,
    PBGDFree,
    StocBiO,
    find_paths,
    hypergradient_at,
)
from bilevel.hypergradient.paths import check_paths
from bilevel.linalg import ConjugateGradient
from bilevel.problem import Problem
from bilevel.solvers import Adam, GradientDescent, NewtonCG
from bilevel.trainer import Trainer, power_decay

pytestmark = pytest.mark.usefixtures("float64")
N, M, D = 12, 8, 3
STEP = GradientDescent(learning_rate=0.2, max_steps=1, atol=0.0)


class Weighted(Problem):
    """Least squares with a weight for each example and a penalty, of which the outer loss holds a part."""

    constraints = {"penalty": Positive(), "weight": UnitInterval()}

    def __init__(self, batch_size=None, outer_batch_size=None, num_tasks=None):
        draw = torch.Generator().manual_seed(3)
        self.x, self.y, self.u, self.z = (
            torch.randn(shape, generator=draw, dtype=torch.float64) for shape in ((N, D), (N,), (M, D), (M,))
        )
        if batch_size:
            self.inner_batches = Partition(N, batch_size, 0)
        if outer_batch_size:
            self.outer_batches = Partition(M, outer_batch_size, 1)
        self.num_tasks = num_tasks  # all alike: their mean is each one's

    def init_hparams(self):
        return {"weight": torch.linspace(0.3, 0.9, N), "penalty": torch.tensor(0.4)}

    def init_params(self, hparams):
        return {"w": torch.zeros(D)}

    def inner_loss(self, params, hparams, batch):
        chosen = slice(None) if batch is None else batch
        errors = (self.x[chosen] @ params["w"] - self.y[chosen]).square()
        return 0.5 * (hparams["weight"][chosen] * errors).mean() + 0.5 * hparams["penalty"] * params["w"].square().sum()

    def outer_loss(self, params, hparams, batch):
        chosen = slice(None) if batch is None else batch
        return 0.5 * (self.u[chosen] @ params["w"] - self.z[chosen]).square().mean() + 0.1 * hparams["penalty"].square()


class At(StepBatches):
    """The batches of a step, chosen."""

    def __init__(self, problem, inner=None, outer=None, step=0):
        super().__init__(problem, step)
        object.__setattr__(self, "_inner", inner)
        object.__setattr__(self, "_outer", outer)

    def inner(self, inner_step):
        return self._inner

    @property
    def outer(self):
        return self._outer


def setting(**words):
    problem = Weighted(**words)
    hparams = {name: value.double() for name, value in problem.init_hparams().items()}
    return problem, FlatProblem.of(problem, hparams), hparams


def exact(problem):
    method = Implicit(linear_solver=ConjugateGradient(rtol=1e-13))
    return hypergradient_at(problem, solver=NewtonCG(atol=1e-13), method=method).gradient


def at_rest(method, solver=STEP, steps=400, **words):
    """The method's hypergradient after many steps at hyperparameters that do not move."""
    problem, flat, hparams = setting(**words)
    params = flat.start(hparams)
    state = method.init(flat, solver, params, hparams)
    for step in range(steps):
        found = method.compute(flat, solver, params, hparams, StepBatches(problem, step), state)
        params, state = found.params, found.state
    return found


def close(found, expected, **tolerance):
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **{"rtol": 1e-8, "atol": 1e-10, **tolerance})


AT_REST = {
    "SOBA": (SOBA(linear_learning_rate=0.2, exponent=0.0), STEP),
    "MASOBA": (MASOBA(linear_learning_rate=0.2, exponent=0.0, averaging=0.3), STEP),
    "SABA": (SABA(linear_learning_rate=0.2), STEP),
    "AmIGO": (
        AmIGO(linear_learning_rate=0.2, num_products=3),
        GradientDescent(learning_rate=0.2, max_steps=4, atol=0.0),
    ),
    "StocBiO": (StocBiO(linear_learning_rate=0.2, num_products=300), STEP),
}


@pytest.mark.parametrize("num_tasks", [None, 2])
@pytest.mark.parametrize("name", AT_REST)
def test_with_full_batches_each_comes_to_rest_at_the_hypergradient(name, num_tasks):
    method, solver = AT_REST[name]
    found = at_rest(method, solver, num_tasks=num_tasks)
    close(found.gradient, exact(Weighted(num_tasks=num_tasks)))
    assert found.receipt.biased and found.receipt.inner_result == "budget_spent"


@pytest.mark.parametrize("num_tasks", [None, 2])
def test_the_penalty_of_f2sa_is_worth_its_inverse(num_tasks):
    expected = exact(Weighted(num_tasks=num_tasks))
    errors = []
    for multiplier in (1e2, 1e3, 1e4):
        found = at_rest(F2SA(multiplier=multiplier, growth=0.0, exponent=0.0), num_tasks=num_tasks, steps=600).gradient
        errors.append(sum(float((found[name] - expected[name]).square().sum()) for name in expected) ** 0.5)
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.1) and errors[1] / errors[2] == pytest.approx(10, rel=0.1)


@pytest.mark.parametrize(
    ("at", "strength", "counts"),
    [((0.5, -1.0, 2.0), 0.5, True), ((9.0, 9.0, 9.0), 1e-3, False), ((9.0, 9.0, 9.0), 50.0, True)],
)
def test_bome_descends_the_outer_loss_and_the_distance_together(at, strength, counts):
    problem, flat, hparams = setting()
    solver = GradientDescent(learning_rate=0.2, max_steps=5, atol=0.0)
    x = torch.tensor(at, dtype=torch.float64)
    found = BOME(strength=strength).compute(flat, solver, x, hparams, StepBatches(problem, 0), {})

    def inner(w, weight, penalty):
        errors = (problem.x @ w - problem.y).square()
        return (weight * errors).sum() / (2 * N) + penalty * (w @ w) / 2

    lower = x
    for _ in range(5):
        lower = lower - 0.2 * torch.func.grad(inner)(lower, **hparams)

    def distance(w, weight, penalty):
        return inner(w, weight, penalty) - inner(lower, weight, penalty)

    def outer(w, weight, penalty):
        return (problem.u @ w - problem.z).square().sum() / (2 * M) + penalty**2 / 10 + 0 * weight.sum()

    here = (x, hparams["weight"], hparams["penalty"])
    pull, push = (
        torch.cat([part.reshape(-1) for part in torch.func.grad(one, (0, 1, 2))(*here)]) for one in (outer, distance)
    )
    share = max(strength - float(pull @ push / push.square().sum()), 0.0)
    assert (share > 0) == counts
    step = torch.cat([((x - found.params) / 0.2), found.gradient["weight"], found.gradient["penalty"].reshape(1)])
    torch.testing.assert_close(step, pull + share * push, rtol=1e-10, atol=1e-12)
    assert float(step @ push) >= strength * float(push.square().sum()) * (
        1 - 1e-9
    )  # the distance falls so fast, at least


def test_pbgd_free_follows_the_penalised_problem_and_differentiates_the_outer_loss_directly():
    found = at_rest(PBGDFree(multiplier=2.0), steps=600)
    _, flat, hparams = setting()
    total = torch.func.grad(lambda x: flat.objective(None).loss(x, hparams) + flat.outer_loss(x, hparams, None) / 2.0)(
        found.params
    )
    assert float(total.norm()) < 1e-10
    assert not bool(found.gradient["weight"].any())
    torch.testing.assert_close(found.gradient["penalty"], 0.2 * hparams["penalty"])


def mean(dictionaries):
    return {name: torch.stack([one[name] for one in dictionaries]).mean(0) for name in dictionaries[0]}


def directions(method, problem, flat, hparams, params, state, inner, outer):
    found, _ = method.directions(flat, STEP, params, hparams, At(problem, inner, outer), state)
    return {"params": found.params, "adjoint": found.adjoint, **found.hparams}


@pytest.fixture
def point():
    draw = torch.Generator().manual_seed(5)
    return torch.randn(D, generator=draw, dtype=torch.float64), torch.randn(D, generator=draw, dtype=torch.float64)


@pytest.mark.parametrize(("batch_size", "outer_batch_size"), [(4, 2), (1, 8), (12, 1)])
def test_the_directions_of_soba_are_unbiased(point, batch_size, outer_batch_size):
    problem, flat, hparams = setting(batch_size=batch_size, outer_batch_size=outer_batch_size)
    params, adjoint = point
    at = functools.partial(directions, SOBA(), problem, flat, hparams, params, {"adjoint": adjoint})
    inner, outer = problem.inner_batches, problem.outer_batches
    pairs = itertools.product(range(inner.count), range(outer.count))
    close(mean([at(inner.part(i), outer.part(j)) for i, j in pairs]), at(None, None), rtol=1e-12, atol=1e-13)


def test_the_directions_of_saba_are_unbiased_whatever_is_in_the_table(point, monkeypatch):
    problem, flat, hparams = setting(batch_size=3, outer_batch_size=2)
    params, adjoint = point
    method = SABA()
    _, first = method.directions(flat, STEP, params + 1, hparams, At(problem), {"adjoint": -adjoint})
    state = {"adjoint": adjoint, **first}
    chosen = {}
    monkeypatch.setattr(Partition, "number", lambda self, step, inner_step: chosen[self.num_examples])
    found = []
    for i, j in itertools.product(range(4), range(4)):
        chosen.update({N: i, M: j})
        found.append(directions(method, problem, flat, hparams, params, state, None, None))
    full = directions(SOBA(), problem, flat, hparams, params, state, None, None)
    close(mean(found), full, rtol=1e-12, atol=1e-13)
    spread = max(float((one["params"] - full["params"]).norm()) for one in found)
    assert spread > 1e-3  # a table of another point leaves noise
    _, here = method.directions(flat, STEP, params, hparams, At(problem), {"adjoint": adjoint})
    settled = directions(method, problem, flat, hparams, params, {"adjoint": adjoint, **here}, None, None)
    close(settled, full, rtol=1e-12, atol=1e-13)  # one of the same point leaves none


def test_saba_leaves_the_table_of_the_step_before_alone():
    problem, flat, hparams = setting(batch_size=3)
    method, params = SABA(), flat.start(hparams)
    state = method.init(flat, STEP, params, hparams)
    first = method.compute(flat, STEP, params, hparams, StepBatches(problem, 0), state)
    before = {name: value.clone() for name, value in first.state.items()}
    second = method.compute(flat, STEP, first.params, hparams, StepBatches(problem, 1), first.state)
    close(first.state, before, rtol=0, atol=0)
    assert not torch.equal(second.state["table.inner.gradient"], before["table.inner.gradient"])


def test_with_minibatches_saba_comes_to_rest_where_soba_does_not():
    expected = exact(Weighted())
    slow = GradientDescent(learning_rate=0.05, max_steps=1, atol=0.0)
    kept, drawn = (
        at_rest(kind(linear_learning_rate=0.05, exponent=0.0), slow, steps=3000, batch_size=3, outer_batch_size=2)
        for kind in (SABA, SOBA)
    )
    close(kept.gradient, expected, rtol=1e-6, atol=1e-8)
    assert float((drawn.gradient["weight"] - expected["weight"]).norm()) > 1e-2


HESSIANS = [torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)) + k for k in (0.0, 0.5, 1.0)]


def test_the_mean_of_stocbio_is_the_series_of_the_mean_hessian():
    vector, rate, method = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64), 0.2, StocBiO(num_products=3)
    found = []
    for chosen in itertools.product(HESSIANS, repeat=3):
        value, state = method.adjoint(lambda k, v, chosen=chosen: chosen[k] @ v, vector, At(None), {}, rate)
        found.append(value)
    assert state == {}
    step = torch.eye(3, dtype=torch.float64) - rate * torch.stack(HESSIANS).mean(0)
    series = rate * sum(torch.linalg.matrix_power(step, q) for q in range(4)) @ vector
    torch.testing.assert_close(torch.stack(found).mean(0), series, rtol=1e-12, atol=1e-13)


def test_ttsa_draws_each_number_of_factors_as_often_and_its_mean_is_that_series():
    vector, rate, method = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64), 0.2, TTSA(num_products=3)
    hessian = HESSIANS[1]
    step = torch.eye(3, dtype=torch.float64) - rate * hessian
    terms = [4 * rate * torch.linalg.matrix_power(step, q) @ vector for q in range(4)]
    counts = [0] * 4
    for number in range(2000):
        value, _ = method.adjoint(lambda k, v: hessian @ v, vector, At(None, step=number), {}, rate)
        (drawn,) = [q for q in range(4) if torch.allclose(value, terms[q], rtol=1e-12, atol=0)]
        counts[drawn] += 1
    assert sum((count - 500) ** 2 / 500 for count in counts) < 16.3  # the 0.999 quantile of chi-square with 3
    series = rate * sum(torch.linalg.matrix_power(step, q) for q in range(4)) @ vector
    torch.testing.assert_close(torch.stack(terms).mean(0), series)


def test_each_product_has_a_minibatch_of_its_own():
    problem, flat, hparams = setting(batch_size=3)
    asked = []

    class Watched(StepBatches):
        def inner(self, inner_step):
            asked.append(inner_step)
            return super().inner(inner_step)

    solver = GradientDescent(learning_rate=0.1, max_steps=2, atol=0.0)
    method = StocBiO(num_products=4)
    found = method.compute(flat, solver, flat.start(hparams), hparams, Watched(problem, 0), {})
    assert {0, 1, -1, -2, -3, -4, -5} <= set(asked)
    assert (found.receipt.inner_steps, found.receipt.num_mv) == (2, 4)


def test_parts_come_again_each_once_in_a_pass():
    batches = Partition(11, 3, 4)
    assert batches.count == 3
    for turn in range(3):
        assert sorted(batches.number(3 * turn + k, 0) for k in range(3)) == [0, 1, 2]
    together = torch.cat([batches.part(k) for k in range(3)])
    assert len(together.unique()) == 9 and int(together.max()) < 11
    assert any(batches.number(k, 0) != batches.number(k + 3, 0) for k in range(3))
    with pytest.raises(UsageError, match="batch_size must be between 1"):
        Partition(5, 6)


METHODS = [SOBA(), MASOBA(averaging=0.9), SABA(), AmIGO(), StocBiO(), TTSA(), F2SA(), BOME()]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_each_lowers_the_outer_loss_on_minibatches(method):
    if hasattr(method, "linear_learning_rate"):
        method = replace(method, linear_learning_rate=0.3)
    result = fit(
        Weighted(batch_size=3, outer_batch_size=4),
        solver=STEP,
        hypergradient=method,
        optimizer=functools.partial(torch.optim.Adam, lr=0.05),
        scheduler=functools.partial(power_decay, exponent=0.5),
        trainer=Trainer(num_steps=400),
    )
    assert result.summary["best"]["step"] == 399  # the losses of minibatches do not compare: the latest step counts
    before, after = (
        hypergradient_at(Weighted(), hparams, solver=NewtonCG(atol=1e-9)).outer_loss
        for hparams in (Weighted().init_hparams(), result.hparams)
    )
    assert after < 0.96 * before


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
@pytest.mark.parametrize(
    ("solver", "said"),
    [
        (Adam(atol=0.0), "but Adam does more: use solver=gradient_descent"),
        (GradientDescent(momentum=0.9, max_steps=1, atol=0.0), "solver.momentum=0"),
        (GradientDescent(max_steps=1), "solver.atol=0"),
        (GradientDescent(learning_rate="penalty", max_steps=1, atol=0.0), "needs a number for solver.learning_rate"),
    ],
)
def test_a_solver_whose_steps_they_cannot_share_is_refused(method, solver, said):
    with pytest.raises(UsageError, match=f"{type(method).__name__}.*{said}"):
        method.check(solver)


@pytest.mark.parametrize("method", [SOBA(), MASOBA(), SABA(), TTSA()], ids=lambda method: type(method).__name__)
def test_those_of_one_step_refuse_more(method):
    with pytest.raises(UsageError, match="moves params by one step in each outer step, but solver.max_steps is 3"):
        method.check(GradientDescent(max_steps=3, atol=0.0))


def test_minibatches_that_do_not_come_again_are_refused_by_saba():
    problem, flat, hparams = setting()
    problem.inner_batches = Minibatches(N, 3)
    with pytest.raises(UsageError, match="those of inner_batches are drawn anew: use bilevel.data.Partition"):
        SABA().init(flat, STEP, flat.start(hparams), hparams)


def test_a_hyperparameter_that_only_shapes_the_inner_problem_is_refused_by_pbgd_free():
    problem, flat, hparams = setting()
    paths = find_paths(flat, STEP, hparams, StepBatches(problem, 0))
    with pytest.raises(UsageError, match="'weight' gets no hypergradient from PBGDFree: it shapes the inner problem"):
        check_paths(PBGDFree(), STEP, paths)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: SOBA(linear_learning_rate=0.0), "linear_learning_rate > 0"),
        (lambda: SOBA(exponent=-1.0), "exponent >= 0"),
        (lambda: SOBA(warm_start=False), "warm_start must be true"),
        (lambda: MASOBA(averaging=0.0), "averaging above 0"),
        (lambda: AmIGO(num_products=0), "num_products"),
        (lambda: StocBiO(linear_learning_rate=float("nan")), "linear_learning_rate > 0"),
        (lambda: TTSA(exponent=-0.1), "exponent >= 0"),
        (lambda: F2SA(multiplier=0.0), "multiplier > 0"),
        (lambda: F2SA(growth=-1.0), "growth >= 0"),
        (lambda: BOME(strength=0.0), "strength > 0"),
        (lambda: PBGDFree(multiplier=-1.0), "multiplier > 0"),
    ],
)
def test_numbers_out_of_their_ranges_are_told(make, said):
    with pytest.raises(UsageError, match=said):
        make()


def test_the_outer_learning_rate_falls_with_a_power():
    decay = functools.partial(power_decay, exponent=0.6)
    result = fit(Weighted(), optimizer=functools.partial(torch.optim.SGD, lr=0.1), scheduler=decay, num_steps=4)
    expected = [0.1 * (step + 1) ** -0.6 for step in range(4)]
    assert [record["learning_rate"] for record in result.history] == pytest.approx(expected)
    with pytest.raises(UsageError, match="power_decay needs exponent >= 0|cannot be made"):
        fit(Weighted(), scheduler=functools.partial(power_decay, exponent=-1.0), num_steps=1)
