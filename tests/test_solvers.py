"""Inner solvers: known minima single and batched, their own formulas, purity of steps, and how the loop ends."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bilevel.errors import UsageError
from bilevel.solvers import (
    LBFGS,
    AndersonAcceleration,
    GradientDescent,
    InnerResult,
    NewtonCG,
    Objective,
    Project,
    ProximalGradient,
    SoftThreshold,
    TorchOptimizer,
    run,
)

N = 6


pytestmark = pytest.mark.usefixtures("float64")


def name_of(value):
    return type(value).__name__


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def solve(solver, objective, start, hparams=None, **options):
    with torch.no_grad():
        return run(solver, objective, start, hparams or {}, **options)


def convex(batch=(), seed=0):
    """A smooth, strictly convex loss `(*batch, N) -> (*batch,)` and its minimiser, one quadratic for each system."""
    basis = torch.linalg.qr(normal(*batch, N, N, seed=seed))[0]
    matrix = basis @ torch.diag(torch.linspace(1, 8, N)) @ basis.mT
    minimiser = normal(*batch, N, seed=seed + 1)

    def loss(x, hparams):
        d = x - minimiser
        return torch.linalg.vecdot(d, (matrix @ d.unsqueeze(-1)).squeeze(-1)) / 2

    return Objective(loss), minimiser, matrix


MOST = {"max_steps": 3000, "atol": 1e-9}
SOLVERS = {
    "gradient descent": GradientDescent(learning_rate=0.1, **MOST),
    "heavy ball": GradientDescent(learning_rate=0.1, momentum=0.6, **MOST),
    "L-BFGS": LBFGS(**MOST),
    "Newton-CG": NewtonCG(**MOST),
    "proximal gradient": ProximalGradient(proximal=Project(low=-1e9), learning_rate=0.12, **MOST),
    "Anderson": AndersonAcceleration(learning_rate=0.2, **MOST),
    "torch SGD": TorchOptimizer(optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.5), **MOST),
    "torch Adam": TorchOptimizer(optimizer=partial(torch.optim.Adam, lr=0.05), max_steps=3000, atol=1e-6),
    "torch L-BFGS": TorchOptimizer(optimizer=partial(torch.optim.LBFGS, tolerance_grad=0, tolerance_change=0), **MOST),
}
every_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)


@every_solver
@pytest.mark.parametrize("batch", [(), (4,), (2, 3)], ids=str)
def test_every_solver_reaches_the_known_minimum(solver, batch):
    objective, minimiser, _ = convex(batch)
    start = torch.zeros(*batch, N)
    solution = solve(solver, objective, start)
    assert solution.result is InnerResult.converged and solution.stationarity <= solver.atol
    torch.testing.assert_close(solution.params, minimiser, rtol=0, atol=2 * solver.atol)
    assert torch.equal(start, torch.zeros(*batch, N))
    assert solution.num_steps <= solution.num_gradients and not solution.params.requires_grad


COUPLED = {"torch L-BFGS"}  # one step length for all systems: the path differs


@pytest.mark.parametrize("name", SOLVERS)
def test_a_batch_gives_each_system_the_answer_it_has_alone(name):
    solver = SOLVERS[name]
    losses, minimisers, matrices = convex((3,))
    together = solve(solver, losses, torch.zeros(3, N))
    for index in range(3):

        def alone(x, hparams, index=index):
            d = x - minimisers[index]
            return d @ matrices[index] @ d / 2

        steps = None if name in COUPLED else together.num_steps
        exact = type(solver)(**{**vars(solver), "atol": 0.0}) if steps else solver  # as many steps as the batch made
        single = solve(exact, Objective(alone), torch.zeros(N), max_steps=steps)
        torch.testing.assert_close(together.params[index], single.params, rtol=0, atol=1e-8)


@every_solver
def test_steps_are_pure(solver):
    """The same inputs give the same outputs twice, in the middle of a solve too, and stay as they were."""
    objective, _, _ = convex((2,))
    with torch.no_grad():
        params = normal(2, N, seed=5)
        state = solver.init(params, objective, {})
        for _ in range(3):
            kept = params.clone()
            copies = {key: value.clone() for key, value in state.items() if isinstance(value, torch.Tensor)}
            first, new_state = solver.step(params, state, objective, {})
            assert torch.equal(params, kept)
            for key, value in copies.items():
                assert torch.equal(state[key], value), f"the step wrote into state['{key}']"
            again, again_state = solver.step(params, state, objective, {})
            assert torch.equal(first, again)
            assert torch.equal(new_state["stationarity"], again_state["stationarity"])
            params, state = first, new_state


@settings(max_examples=25, deadline=None, derandomize=True)
@given(rate=st.floats(0.01, 0.4), momentum=st.floats(0, 0.99), num_steps=st.integers(1, 8))
def test_gradient_descent_is_the_heavy_ball_formula(rate, momentum, num_steps):
    objective, minimiser, matrix = convex()
    solver = GradientDescent(learning_rate=rate, momentum=momentum, max_steps=num_steps, atol=0.0)
    solution = solve(solver, objective, torch.zeros(N))
    x, velocity = torch.zeros(N), torch.zeros(N)
    for _ in range(num_steps):
        velocity = momentum * velocity + matrix @ (x - minimiser)
        x = x - rate * velocity
    torch.testing.assert_close(solution.params, x, rtol=1e-12, atol=1e-12)
    assert solution.result is InnerResult.budget_spent
    assert solution.num_steps == solution.num_gradients == num_steps


def rosenbrock(x, hparams):
    return (100 * (x[..., 1:] - x[..., :-1].square()).square() + (1 - x[..., :-1]).square()).sum(-1)


OPTIMIZERS = {
    "SGD": partial(torch.optim.SGD, lr=1e-4, momentum=0.9, nesterov=True),
    "Adam": partial(torch.optim.Adam, lr=1e-2),
    "LBFGS": partial(torch.optim.LBFGS, lr=1.0, max_iter=3, line_search_fn="strong_wolfe"),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_the_adapter_equals_torch_optim_run_directly(optimizer):
    start = torch.tensor([-1.2, 1.0, 0.5])
    solution = solve(TorchOptimizer(optimizer=optimizer, max_steps=12, atol=0.0), Objective(rosenbrock), start)
    leaf = start.clone().requires_grad_()
    direct, evaluations = optimizer([leaf]), []

    def closure():
        direct.zero_grad()
        value = rosenbrock(leaf, {})
        value.backward()
        evaluations.append(value)
        return value

    for _ in range(12):
        direct.step(closure)
    assert torch.equal(solution.params, leaf.detach())
    assert solution.num_gradients == len(evaluations)


def test_lbfgs_and_newton_solve_rosenbrock_in_few_steps():
    start = torch.tensor([[-1.2, 1.0], [3.0, -2.0]])
    for solver, most in ((LBFGS(max_steps=200, atol=1e-9), 80), (NewtonCG(max_steps=100, atol=1e-9), 40)):
        solution = solve(solver, Objective(rosenbrock), start)
        assert solution.result is InnerResult.converged and solution.num_steps <= most
        torch.testing.assert_close(solution.params, torch.ones(2, 2), rtol=0, atol=1e-8)


def test_newton_cg_converges_superlinearly_and_counts_its_products():
    def loss(x, hparams):
        return (torch.cosh(x - 1) + 0.1 * (x - 1) ** 2).sum(-1) + (x.sum(-1) - 3).square() / 20

    objective, norms = Objective(loss), []
    with torch.no_grad():
        params = torch.zeros(3) + torch.tensor([0.2, 0.5, 1.9])
        solver = NewtonCG(atol=0.0)
        state = solver.init(params, objective, {})
        for _ in range(8):
            params, state = solver.step(params, state, objective, {})
            norms.append(float(state["stationarity"]))
    small = [norm for norm in norms if 1e-12 < norm < 0.1]
    assert norms[-1] < 1e-12 and len(small) >= 2
    for before, after in zip([0.1, *small], small, strict=False):
        assert after <= max(3 * before**1.5, 1e-13)  # the forcing term's order
    assert int(state["num_mv"]) > 0


def test_newton_cg_leaves_a_saddle():
    solver = NewtonCG(max_steps=50, atol=1e-8)
    double_well = Objective(lambda x, h: ((x**2 - 1) ** 2).sum(-1))
    solution = solve(solver, double_well, torch.tensor([0.1, -0.2, 1.5]))
    assert solution.result is InnerResult.converged
    torch.testing.assert_close(solution.params.abs(), torch.ones(3), rtol=0, atol=1e-7)


def lasso(strength=1.0, seed=0):
    """A design of 30 x 8, the smooth part's objective, its Lipschitz constant, and a KKT check."""
    design, target = normal(30, 8, seed=seed), normal(30, seed=seed + 1)
    objective = Objective(lambda x, h: (x @ design.T - target).square().sum(-1) / 2)
    lipschitz = float(torch.linalg.eigvalsh(design.T @ design)[-1])

    def violation(x):
        slope = design.T @ (design @ x - target)
        active = x != 0
        zero = (slope[~active].abs() - strength).clamp(min=0)
        return float(torch.cat([(slope + strength * x.sign())[active].abs(), zero, torch.zeros(1)]).max())

    return objective, lipschitz, violation


@pytest.mark.parametrize("strength", [0.5, 3.0, 8.0])
def test_proximal_gradient_satisfies_the_conditions_of_the_lasso(strength):
    objective, lipschitz, violation = lasso(strength)
    rate = 1 / lipschitz
    solver = ProximalGradient(proximal=SoftThreshold(strength), learning_rate=rate, max_steps=3000, atol=1e-10)
    solution = solve(solver, objective, torch.zeros(8))
    assert solution.result is InnerResult.converged
    assert violation(solution.params) <= 1e-8
    assert 0 < int((solution.params == 0).sum()) or strength == 0.5  # exact zeros, not small numbers


def test_proximal_gradient_equals_the_closed_form_of_an_orthogonal_design():
    target = torch.tensor([3.0, -0.4, 0.9, -2.0])
    objective = Objective(lambda x, h: (x - target).square().sum(-1) / 2)
    hparams = {"strength": torch.tensor([1.0, 1.0, 0.5, 3.0])}
    solver = ProximalGradient(proximal=SoftThreshold("strength"), learning_rate=0.7, atol=1e-12)
    solution = solve(solver, objective, torch.zeros(4), hparams)
    torch.testing.assert_close(solution.params, torch.tensor([2.0, 0.0, 0.4, 0.0]), rtol=0, atol=1e-11)
    solver = ProximalGradient(proximal=Project(low=0.0, high=1.0), learning_rate=0.7, atol=1e-12)
    solution = solve(solver, objective, torch.full((4,), 0.5))
    torch.testing.assert_close(solution.params, torch.tensor([1.0, 0.0, 0.9, 0.0]), rtol=0, atol=1e-11)


def test_acceleration_pays():
    """On a badly conditioned quadratic FISTA needs far fewer steps than plain proximal steps would."""
    curvature = torch.logspace(-3, 0, 20)
    objective = Objective(lambda x, h: (curvature * (x - 1).square()).sum(-1) / 2)
    common = {"learning_rate": 1.0, "max_steps": 20_000, "atol": 1e-6}
    accelerated = solve(ProximalGradient(proximal=Project(low=-9.0), **common), objective, torch.zeros(20))
    plain = solve(GradientDescent(**common), objective, torch.zeros(20))
    assert accelerated.result is plain.result is InnerResult.converged
    assert accelerated.num_steps < 0.25 * plain.num_steps


def linear_fixed_point(n=6):
    matrix = 0.95 * torch.linalg.qr(normal(n, n))[0]
    offset = normal(n, seed=1)
    return Objective(optimality=lambda x, h: x - (matrix @ x + offset)), torch.linalg.solve(
        torch.eye(n) - matrix, offset
    )


def test_anderson_solves_a_linear_fixed_point_in_about_n_steps():
    objective, exact = linear_fixed_point()
    common = {"learning_rate": 1.0, "max_steps": 1000, "atol": 1e-8}
    accelerated = solve(AndersonAcceleration(history=8, ridge=1e-14, **common), objective, torch.zeros(6))
    plain = solve(GradientDescent(**common), objective, torch.zeros(6))
    torch.testing.assert_close(accelerated.params, exact, rtol=0, atol=1e-7)
    torch.testing.assert_close(plain.params, exact, rtol=0, atol=1e-6)
    assert accelerated.num_steps <= 6 + 3 < plain.num_steps / 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_anderson_acceleration_survives_changes_that_depend_on_each_other(dtype):
    """In one dimension all of them do, and what rounding makes of their Gram matrix may be singular."""
    objective, solver = Objective(optimality=lambda x, h: x - torch.cos(x)), AndersonAcceleration(learning_rate=1.0)
    for start in torch.linspace(-2.0, 2.0, 300, dtype=dtype).unsqueeze(-1):
        assert float(solve(solver, objective, start).params) == pytest.approx(0.7390851, abs=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# The loop

QUADRATIC = Objective(lambda x, h: x.square().sum(-1) / 2)


def test_the_loop_stops_when_all_systems_are_stationary():
    def loss(x, hparams):
        return torch.tensor([1.0, 0.1]) * x.square().sum(-1) / 2

    solution = solve(GradientDescent(learning_rate=0.5, atol=1e-6, max_steps=1000), Objective(loss), torch.ones(2, 3))
    assert solution.result is InnerResult.converged
    assert solution.stationarity == float(solution.state["stationarity"].max()) <= 1e-6
    assert solution.num_steps > 200  # the slow system decides


def test_the_loop_reports_its_budget_and_goes_on_from_a_state():
    solver = GradientDescent(learning_rate=0.1, momentum=0.5, max_steps=40, atol=0.0)
    whole = solve(solver, QUADRATIC, torch.ones(3))
    assert whole.result is InnerResult.budget_spent and whole.num_steps == 40
    first = solve(solver, QUADRATIC, torch.ones(3), max_steps=15)
    second = solve(solver, QUADRATIC, first.params, state=first.state, max_steps=25)
    assert torch.equal(second.params, whole.params) and second.num_gradients == 40


def test_a_non_finite_gradient_ends_the_loop_at_the_last_finite_iterate():
    objective = Objective(lambda x, h: torch.sqrt(x - 1).sum(-1) * 2)  # NaN below 1
    solution = solve(GradientDescent(learning_rate=0.4, atol=0.0, max_steps=100), objective, torch.full((2,), 2.0))
    assert solution.result is InnerResult.nonfinite and solution.num_steps < 100
    assert bool(solution.params.isfinite().all())


@pytest.mark.parametrize("learning_rate", [0.7, 3.0, 1e5])
@pytest.mark.parametrize("max_steps", [200, 5000])
def test_divergence_is_called_so_long_before_numbers_overflow(learning_rate, max_steps):
    start = torch.tensor([[1.0, 1.0], [0.0, 0.0]])  # one system diverges, one stands at its solution
    solver = GradientDescent(learning_rate=learning_rate, max_steps=max_steps)
    exploding = solve(solver, Objective(lambda x, h: 2 * x.square().sum(-1)), start)
    assert exploding.result is InnerResult.diverged and not exploding.result.usable
    assert bool(exploding.params.isfinite().all()) and exploding.num_steps < 200


@every_solver
def test_a_relative_tolerance_counts_from_the_starting_point(solver):
    objective, _, _ = convex()
    start = 50.0 * torch.ones(N)
    first = float(objective.gradient(start, {}).norm())
    tight = solve(replace(solver, atol=0.0, rtol=1e-3), objective, start)
    assert tight.result is InnerResult.converged and tight.stationarity <= 1e-3 * first
    loose = solve(replace(solver, atol=0.0, rtol=0.9), objective, start)
    assert (
        loose.stationarity <= 0.9 * first and loose.num_gradients <= tight.num_gradients
    )  # torch's L-BFGS solves in one step


def test_steps_that_end_above_a_tolerance_are_no_budget():
    solver = GradientDescent(learning_rate=0.01, max_steps=2)
    assert solve(solver, QUADRATIC, torch.ones(3)).result is InnerResult.max_steps
    assert solve(replace(solver, atol=0.0, rtol=1e-9), QUADRATIC, torch.ones(3)).result is InnerResult.max_steps


@pytest.mark.parametrize("rtol", [-0.1, 1.0, math.nan])
def test_a_relative_tolerance_lies_between_0_and_1(rtol):
    with pytest.raises(UsageError, match=r"GradientDescent needs rtol in \[0, 1\)"):
        GradientDescent(rtol=rtol)


def test_growth_from_a_vanishing_gradient_is_no_divergence():
    """A first batch without gradient, a start at rounding level: the growth is relative to one, then."""
    slopes = [1e-100, 1e-12, 5.0, 1.0, 0.1]
    solver = GradientDescent(learning_rate=0.1, atol=0.0, max_steps=5)
    solution = run(solver, lambda k: Objective(lambda x, h: slopes[k] * x.sum(-1)), torch.ones(3), {})
    assert solution.result is InnerResult.budget_spent


def test_the_first_step_of_lbfgs_is_along_the_gradient_and_no_longer_than_asked_for():
    steep = Objective(lambda x, h: 500 * (x**2).sum(-1))
    start = torch.tensor([0.06, 0.08], dtype=torch.float64)  # 0.1 from the minimum: a step of length 1 is halved thrice
    short, long = (run(LBFGS(max_steps=1, atol=0.0, first_length=length), steep, start, {}) for length in (0.05, 1.0))
    torch.testing.assert_close(short.params, start / 2, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(long.params, -start / 4, rtol=1e-12, atol=0.0)
    assert (short.num_gradients, long.num_gradients) == (2, 5)


@pytest.mark.parametrize("solver", [LBFGS(atol=1e-30), NewtonCG(atol=1e-30)], ids=name_of)
def test_a_tolerance_below_rounding_ends_in_stagnation_not_in_an_endless_loop(solver):
    design, shift = normal(7, 3), normal(7, seed=1)
    objective = Objective(lambda x, h: torch.cosh(x @ design.T - shift).sum(-1))
    solution = solve(solver, objective, torch.zeros(3))
    assert solution.result is InnerResult.stagnated and solution.num_steps < 50
    assert solution.stationarity <= 1e-7


def logistic(*penalties):
    """Penalised logistic regressions in float32, one for each penalty: near a minimum the loss no longer tells two steps apart."""
    x = (normal(200, 30) * torch.logspace(0, -1.5, 30)).float()
    signs = 2 * (normal(200, seed=2) > 0).float() - 1
    strength = torch.tensor(penalties, dtype=torch.float32)

    def loss(w, hparams):
        return torch.nn.functional.softplus(-signs * (w @ x.T)).mean(-1) + strength * w.square().sum(-1)

    return Objective(loss), torch.zeros(len(penalties), 30, dtype=torch.float32)


@pytest.mark.parametrize("atol", [1e-5, 1e-6])
def test_the_gradient_decides_where_the_loss_is_too_coarse(atol):
    solution = solve(LBFGS(atol=atol, max_steps=200), *logistic(5e-4))
    assert solution.result is InnerResult.converged
    assert solution.num_gradients <= 1.25 * solution.num_steps  # and not by trials of ever shorter steps


@pytest.mark.parametrize("atol", [1e-2, 0.0])
def test_systems_of_lbfgs_that_are_done_or_stuck_cost_the_others_nothing(atol):
    """The first one is done soon; with a tolerance of zero it comes to where no step takes it further."""
    solver = LBFGS(atol=atol, max_steps=100)
    alone, both = solve(solver, *logistic(5e-4)), solve(solver, *logistic(1.0, 5e-4))
    assert both.num_gradients - both.num_steps <= alone.num_gradients - alone.num_steps + 20
    assert both.stationarity == pytest.approx(alone.stationarity, rel=1.0, abs=1e-7)


def test_systems_of_lbfgs_that_are_done_stay_where_they_are():
    loss, start = logistic(1.0, 5e-4)
    few, many = (solve(LBFGS(atol=1e-2, max_steps=steps), loss, start).params for steps in (5, 8))
    assert torch.equal(few[0], many[0]) and not torch.equal(few[1], many[1])


@pytest.mark.parametrize("solver", [LBFGS(), NewtonCG()], ids=name_of)
def test_full_batch_solvers_refuse_minibatches(solver):
    assert solver.full_batch and not solver.differentiable
    with pytest.raises(
        UsageError, match=rf"{name_of(solver)} .*needs the full batch, .*GradientDescent or TorchOptimizer"
    ):
        solve(solver, lambda number: QUADRATIC, torch.ones(2))


def test_minibatch_objectives_are_asked_for_by_the_number_of_the_step():
    asked = []

    def at(number):
        asked.append(number)
        return Objective(lambda x, h: (x - number).square().sum(-1) / 2)

    solution = solve(GradientDescent(learning_rate=1.0, max_steps=3, atol=0.0), at, torch.full((1,), 5.0))
    assert asked == [0, 0, 1, 2] and float(solution.params) == 2.0  # the first 0 makes the state


def test_options_may_be_named_after_hyperparameters_and_are_differentiated():
    hparams = {"rate": torch.tensor(0.3, requires_grad=True), "momentum": torch.tensor(0.2, requires_grad=True)}
    solver = GradientDescent(learning_rate="rate", momentum="momentum", max_steps=2, atol=0.0)
    assert solver.hparam_names == ("rate", "momentum")
    x = run(solver, QUADRATIC, torch.ones(1), hparams).params
    (by_rate, by_momentum) = torch.autograd.grad(x.sum(), list(hparams.values()))
    # x1 = 1 - r; v2 = m + x1; x2 = x1 - r (m + x1) = (1 - r)^2 - r m
    assert float(x.detach()) == pytest.approx(0.7**2 - 0.3 * 0.2)
    assert float(by_rate) == pytest.approx(-2 * 0.7 - 0.2) and float(by_momentum) == pytest.approx(-0.3)
    proximal = ProximalGradient(proximal=SoftThreshold("strength"), learning_rate="rate")
    assert set(proximal.hparam_names) == {"rate", "strength"}


def test_an_unknown_hyperparameter_is_refused_by_name():
    with pytest.raises(UsageError, match=r"names the hyperparameter 'speed', but there are only \['rate'\]"):
        solve(GradientDescent(learning_rate="speed"), QUADRATIC, torch.ones(1), {"rate": torch.tensor(0.1)})


@pytest.mark.parametrize("solver", [LBFGS(), NewtonCG(), GradientDescent()], ids=name_of)
def test_a_loss_that_sums_over_systems_is_refused(solver):
    with pytest.raises(
        UsageError, match=r"of shape \(3, 2\) was expected to have shape \(3,\), a value .* but has \(\)"
    ):
        solve(solver, Objective(lambda x, h: x.square().sum()), torch.ones(3, 2))


@pytest.mark.parametrize("solver", [LBFGS(), NewtonCG()], ids=name_of)
def test_solvers_that_compare_losses_refuse_a_bare_optimality(solver):
    objective, _ = linear_fixed_point()
    with pytest.raises(UsageError, match="needs inner_loss, but the problem defines only optimality"):
        solve(solver, objective, torch.zeros(6))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GradientDescent(max_steps=0), "GradientDescent needs max_steps >= 1, an integer, but got 0"),
        (lambda: TorchOptimizer(torch.optim.SGD), "TorchOptimizer needs max_steps >= 1, an integer, but got <class"),
        (lambda: LBFGS(atol="1e-3"), r"LBFGS needs atol >= 0, but got .1e-3."),
        (lambda: LBFGS(atol=-1.0), r"LBFGS needs atol >= 0, but got -1\.0"),
        (lambda: NewtonCG(atol=float("nan")), "NewtonCG needs atol >= 0, but got nan"),
        (lambda: GradientDescent(learning_rate=0.0), r"GradientDescent needs learning_rate > 0, but got 0\.0"),
        (lambda: GradientDescent(momentum=1.0), r"GradientDescent needs momentum in \[0, 1\), but got 1\.0"),
        (lambda: ProximalGradient(learning_rate=-1.0), r"ProximalGradient needs learning_rate > 0, but got -1\.0"),
        (lambda: LBFGS(history=0), "LBFGS needs history >= 1, but got 0"),
        (lambda: LBFGS(first_length=0.0), r"LBFGS needs first_length > 0, but got 0\.0"),
        (lambda: AndersonAcceleration(history=0), "AndersonAcceleration needs history >= 1, but got 0"),
    ],
)
def test_bad_options_are_refused_in_a_sentence(make, message):
    with pytest.raises(UsageError, match=message):
        make()


@pytest.mark.parametrize("solver", list(SOLVERS.values()), ids=SOLVERS)
def test_only_differentiable_solvers_record_their_steps(solver):
    objective, _, _ = convex()
    start = torch.zeros(N, requires_grad=True)
    params = run(solver, objective, start, {}, max_steps=3).params
    assert params.requires_grad is solver.differentiable
    if solver.differentiable:
        (pulled,) = torch.autograd.grad(params.sum(), start)
        step = 1e-6

        def moved(sign):
            return solve(solver, objective, torch.full((N,), sign * step), max_steps=3).params.sum()

        assert float(pulled.sum()) == pytest.approx(float((moved(1) - moved(-1)) / (2 * step)), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("solver", [LBFGS(), NewtonCG(), GradientDescent()], ids=name_of)
@pytest.mark.parametrize("target", [math.inf, math.nan])
def test_a_gradient_that_is_never_finite_is_not_called_stagnation(solver, target):
    solution = solve(solver, Objective(lambda x, h: (x - target).square().sum(-1)), torch.zeros(1))
    assert solution.result is InnerResult.nonfinite


@pytest.mark.parametrize("rate", [math.nan, math.inf, 0.0, -1.0])
@pytest.mark.parametrize("kind", [GradientDescent, ProximalGradient])
def test_learning_rates_are_positive_numbers(kind, rate):
    with pytest.raises(UsageError, match="needs learning_rate > 0, but got"):
        kind(learning_rate=rate)
