"""Methods that know the inner optimiser: SAMA, the implicit update map, and options of solvers as hyperparameters.

Each derivative is held against its formula in dense matrices, made from update rules that are written out here once more,
and against finite differences of the re-solved or re-run problem.
"""

import warnings
from dataclasses import fields, replace
from functools import partial

import pytest
import torch
from torch.func import grad, jacrev

from bilevel import Problem, UsageError, fit, hypergradient_at
from bilevel.batches import StepBatches
from bilevel.broadcast import Broadcast
from bilevel.constraints import Positive, UnitInterval
from bilevel.flat import FlatProblem, natural_hparams
from bilevel.hypergradient import (
    SAMA,
    FixedAccuracy,
    ForwardMode,
    Implicit,
    ImplicitUpdate,
    OneStep,
    Unrolled,
    check_paths,
    find_paths,
)
from bilevel.linalg import GMRES, LSMR, MINRES, BiCGStab, ConjugateGradient, DenseLU, IdentitySolver, NeumannSeries
from bilevel.solvers import (
    LBFGS,
    Adam,
    AndersonAcceleration,
    GradientDescent,
    Objective,
    ProximalGradient,
    SoftThreshold,
    TorchOptimizer,
    run,
)
from bilevel.tree import flatten_names, to

N = 4
TIGHT = {"rtol": 1e-13, "max_steps": 5000}
GENERAL = [GMRES(restart=100, **TIGHT), BiCGStab(**TIGHT), LSMR(**TIGHT), DenseLU()]
SYMMETRIC = [MINRES(**TIGHT), ConjugateGradient(**TIGHT), NeumannSeries(rtol=1e-13, max_steps=100_000)]


pytestmark = pytest.mark.usefixtures("float64")


def name_of(value):
    return type(value).__name__


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Quadratic(Problem):
    """Ridge regression, with whatever options of the solver are to be learned beside the penalty and a shift."""

    def __init__(self, **options):
        known = {"penalty": Positive(), "rate": Positive(), "decay": Positive(), "momentum": UnitInterval()}
        self.constraints = {name: kind for name, kind in known.items() if name in ("penalty", *options)}
        self.x, self.y = normal(20, N, seed=1) / 4, normal(20, seed=2)
        self.x_val, self.y_val = normal(15, N, seed=3), normal(15, seed=4)
        self.options = options

    def init_hparams(self):
        options = {name: torch.as_tensor(value, dtype=torch.float64) for name, value in self.options.items()}
        return {"penalty": torch.linspace(0.2, 0.8, N), "shift": torch.tensor(0.3), **options}

    def init_params(self, hparams):
        return {"w": torch.linspace(-1.0, 1.0, N)}

    def inner_loss(self, params, hparams, batch):
        residual = self.x @ params["w"] - self.y - hparams["shift"]
        return residual.square().sum() / 2 + (hparams["penalty"] * params["w"].square()).sum() / 2

    def outer_loss(self, params, hparams, batch):
        return (self.x_val @ params["w"] - self.y_val).square().mean() + 0.01 * hparams["shift"] ** 2


class Curved(Quadratic):
    """A loss that is not quadratic in its parameters, nor linear in the hyperparameters, and not convex."""

    def inner_loss(self, params, hparams, batch):
        residual = torch.tanh(self.x @ params["w"]) * (1 + hparams["shift"] ** 2) - self.y
        return residual.square().sum() / 2 + (hparams["penalty"] * params["w"].cosh()).sum() / 2


class Tasks(Curved):
    """Three of them at once."""

    num_tasks = 3

    def __init__(self, **options):
        super().__init__(**options)
        data = {"x": normal(3, 20, N, seed=5) / 4, "y": normal(3, 20, seed=6)}
        self.inner_batches = lambda *_: data

    def inner_loss(self, params, hparams, batch):
        residual = torch.tanh(batch["x"] @ params["w"]) * (1 + hparams["shift"] ** 2) - batch["y"]
        return residual.square().sum() / 2 + (hparams["penalty"] * params["w"].cosh()).sum() / 2

    def single(self, task):
        alone, data = Curved(**self.options), self.inner_batches(0, 0)
        alone.x, alone.y = data["x"][task], data["y"][task]
        return alone


def compute(problem, method, solver, state=None):
    hparams = problem.init_hparams()
    flat = FlatProblem.of(problem, hparams)
    return method.compute(flat, solver, flat.start(hparams), hparams, StepBatches(problem, 0), state or {})


def functions(problem):
    """Inner and outer loss between vectors."""
    flat = FlatProblem.of(problem, problem.init_hparams())
    return flat.objective(None).loss, lambda x, h: flat.outer_loss(x, h, None)


def close(got, want, rtol, names=None):
    for name in want if names is None else names:
        scale = float(want[name].norm())
        assert float((got[name] - want[name]).norm()) <= rtol * scale + 1e-13, name


# The update rules once more: from `x`, the memory, the number of the step, the gradient and the options to new `x`, memory.


def heavy_ball(x, memory, number, g, rate, momentum, decay):
    velocity = momentum * memory[0] + g + decay * x
    return x - rate * velocity, (velocity,)


def adamw(x, memory, number, g, rate, beta1, beta2, epsilon, decay):
    first, second = beta1 * memory[0] + (1 - beta1) * g, beta2 * memory[1] + (1 - beta2) * g * g
    unbiased = second / (1 - beta2**number)
    root = torch.where(unbiased > 0, unbiased, 1.0).sqrt() * (unbiased > 0)
    return x - rate * (first / (1 - beta1**number) / (root + epsilon) + decay * x), (first, second)


# Each rule with values of its options; in the problem of the same row they are hyperparameters of those names.
RULES = {
    "descent": (heavy_ball, 1, {"rate": 0.1, "momentum": 0.0, "decay": 0.0}),
    "heavy ball": (heavy_ball, 1, {"rate": 0.1, "momentum": 0.6, "decay": 0.3}),
    "a rate for each weight": (heavy_ball, 1, {"rate": torch.linspace(0.05, 0.2, N, dtype=torch.float64), "momentum": 0.5, "decay": 0.0}),
    "adam": (adamw, 2, {"rate": 0.05, "beta1": 0.9, "beta2": 0.99, "epsilon": 1e-8, "decay": 0.0}),
    "adamw": (adamw, 2, {"rate": 0.05, "beta1": 0.7, "beta2": 0.9, "epsilon": 0.5, "decay": 0.2}),
}  # fmt: skip
FIELDS = {"rate": "learning_rate", "decay": "weight_decay"}
CLASSES = {heavy_ball: GradientDescent, adamw: Adam}


def solver_of(row, learned=True, **settings):
    """The solver of a row, its options named after hyperparameters or given as numbers."""
    rule, _, options = RULES[row]
    given = {FIELDS.get(name, name): name if learned else value for name, value in options.items()}
    return CLASSES[rule](**given, **settings)


def iterate(row, problem, num_steps, hparams):
    """Iterate and memory after some steps of a rule, as functions of the hyperparameters."""
    rule, size, options = RULES[row]
    loss, _ = functions(problem)
    x = torch.linspace(-1.0, 1.0, N)
    memory = tuple(torch.zeros(N) for _ in range(size))
    for number in range(1, num_steps + 1):
        g = grad(lambda z: loss(z, hparams))(x)
        x, memory = rule(x, memory, number, g, **{name: hparams[name] for name in options})
    return x, memory


every_rule = pytest.mark.parametrize("row", RULES)


# --- The solvers and their options ------------------------------------------------------------------------------------

TORCH = {
    "Adam": (partial(torch.optim.Adam, lr=0.02), {"learning_rate": 0.02}),
    "Adam, own betas": (partial(torch.optim.Adam, lr=0.02, betas=(0.5, 0.9), eps=0.1), {"learning_rate": 0.02, "beta1": 0.5, "beta2": 0.9, "epsilon": 0.1}),
    "AdamW": (partial(torch.optim.AdamW, lr=0.02, weight_decay=0.3), {"learning_rate": 0.02, "weight_decay": 0.3}),
    "SGD": (partial(torch.optim.SGD, lr=1e-4), {"learning_rate": 1e-4}),
    "SGD, momentum and decay": (partial(torch.optim.SGD, lr=1e-4, momentum=0.9, weight_decay=2.0), {"learning_rate": 1e-4, "momentum": 0.9, "weight_decay": 2.0}),
}  # fmt: skip
every_torch = pytest.mark.parametrize(("make", "options"), TORCH.values(), ids=TORCH)


def rosenbrock(x, hparams):
    return (100 * (x[..., 1:] - x[..., :-1].square()).square() + (1 - x[..., :-1]).square()).sum(-1)


@every_torch
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_steps_are_those_of_torch_optim(make, options, dtype):
    """And the rule that is read off an optimiser goes on from its state as it would itself."""
    objective, start = Objective(rosenbrock), torch.tensor([-1.2, 1.0, 0.5], dtype=dtype)
    torch_solver = TorchOptimizer(100, 0.0, optimizer=make)
    ours = {True: GradientDescent, False: Adam}["SGD" in str(make.func)](100, 0.0, **options)
    with torch.no_grad():
        theirs = run(torch_solver, objective, start, {}, max_steps=15)
        tolerance = {"rtol": 20 * torch.finfo(dtype).eps, "atol": 20 * torch.finfo(dtype).eps}
        torch.testing.assert_close(run(ours, objective, start, {}, max_steps=15).params, theirs.params, **tolerance)
        rule = torch_solver.update_rule()
        assert rule.solver == replace(ours, max_steps=rule.solver.max_steps, atol=rule.solver.atol)
        for solved in (theirs, replace(theirs, params=start, state=torch_solver.init(start, objective, {}))):
            state = rule.translate(solved.state, solved.params)
            assert all(state[name].shape == start.shape for name in rule.memory) and "optimizer" not in state
            step, _ = rule.solver.step(solved.params, state, objective, {})
            expected, _ = torch_solver.step(solved.params, solved.state, objective, {})
            torch.testing.assert_close(step, expected, **tolerance)


@every_rule
@pytest.mark.parametrize("method", [Unrolled(), Unrolled(checkpoint_every=4), ForwardMode()], ids=str)
def test_every_option_is_learned_through_the_steps(row, method):
    problem, num_steps = Curved(**RULES[row][2]), 9
    hparams = problem.init_hparams()
    _, outer = functions(problem)

    def rerun(h):
        return outer(iterate(row, problem, num_steps, h)[0], h)

    got = compute(problem, method, solver_of(row, max_steps=num_steps, atol=0.0))
    close(got.gradient, grad(rerun)(hparams), 1e-10)
    for name in RULES[row][2]:  # and by central differences along a direction of the option
        direction = torch.ones_like(hparams[name]) * (1e-10 if name == "epsilon" and row == "adam" else 1e-6)
        ahead, behind = (rerun({**hparams, name: hparams[name] + sign * direction}) for sign in (1, -1))
        change = float((got.gradient[name] * direction).sum())
        assert change == pytest.approx(float(ahead - behind) / 2, rel=1e-5, abs=1e-14), name


def test_a_weight_whose_gradients_are_all_zero_has_finite_derivatives():
    """As an input that is never on: the root of a second moment that is zero has no slope of its own."""
    problem = Quadratic(**RULES["adam"][2])
    problem.x[:, 1] = 0.0
    problem.init_hparams = lambda: {
        "shift": torch.tensor(0.3),
        **{k: torch.tensor(v) for k, v in RULES["adam"][2].items()},
    }
    problem.inner_loss = lambda p, h, _: (problem.x @ p["w"] - problem.y - h["shift"]).square().sum() / 2
    for method in (Unrolled(), ForwardMode(), OneStep(), SAMA(), ImplicitUpdate(linear_solver=LSMR())):
        result = compute(problem, method, solver_of("adam", max_steps=8, atol=0.0))
        assert all(bool(part.isfinite().all()) for part in result.gradient.values()), name_of(method)
        assert float(result.gradient["shift"].abs()) > 1e-4


WRONG = [
    (Adam, {"learning_rate": 0.0}, "Adam needs learning_rate > 0, but got 0.0"),
    (Adam, {"epsilon": -1.0}, "Adam needs epsilon > 0"),
    (Adam, {"beta1": 1.0}, r"Adam needs beta1 in \[0, 1\), but got 1.0"),
    (Adam, {"beta2": -0.1}, r"Adam needs beta2 in \[0, 1\)"),
    (Adam, {"weight_decay": -1.0}, "Adam needs weight_decay >= 0"),
    (Adam, {"weight_decay": float("nan")}, "Adam needs weight_decay >= 0"),
    (GradientDescent, {"weight_decay": -1.0}, "GradientDescent needs weight_decay >= 0, but got -1.0"),
    (SAMA, {"radius": 0.0}, "SAMA needs radius > 0, but got 0.0"),
]


@pytest.mark.parametrize(("make", "options", "message"), WRONG)
def test_bad_numbers_are_refused(make, options, message):
    with pytest.raises(UsageError, match=message):
        make(**options)


# --- Decay moves the solution: the theorem gives its derivative -------------------------------------------------------

DECAY = {
    "descent": GradientDescent(4000, 1e-13, learning_rate=0.1, weight_decay="decay"),
    "heavy ball": GradientDescent(4000, 1e-13, learning_rate=0.05, momentum=0.8, weight_decay="decay"),
    "adamw": Adam(8000, 1e-13, learning_rate=0.1, beta2=0.9, epsilon=0.5, weight_decay="decay"),
    "adamw, epsilon as well": Adam(8000, 1e-13, learning_rate=0.1, beta2=0.9, epsilon="epsilon", weight_decay="decay"),
}


def solution_of(problem, solver, hparams):
    """The decayed solution from its own equations: linear for descent, by Newton's method for AdamW."""
    matrix, right = (
        problem.x.T @ problem.x + torch.diag(hparams["penalty"]),
        problem.x.T @ (problem.y + hparams["shift"]),
    )
    if isinstance(solver, GradientDescent):  # (A + w I) x = b
        return torch.linalg.solve(matrix + hparams["decay"] * torch.eye(N), right)
    epsilon = hparams.get("epsilon", 0.5)

    def update(x):  # of the normalised step, which is zero
        g = matrix @ x - right
        return g / (g.abs() + epsilon) + hparams["decay"] * x

    x = torch.linalg.solve(matrix, right)
    for _ in range(30):
        x = x - torch.linalg.solve(jacrev(update)(x), update(x))
    return x


@pytest.mark.parametrize("row", DECAY)
def test_the_derivative_by_a_decay_is_exact(row):
    """Closed form, differences of the re-solved problem, and every method that can."""
    solver = DECAY[row]
    problem = Quadratic(**({"decay": 0.4, "epsilon": 0.5} if row.endswith("well") else {"decay": 0.4}))
    hparams, (_, outer) = problem.init_hparams(), functions(problem)
    expected = grad(lambda h: outer(solution_of(problem, solver, h), h))(hparams)
    assert float(expected["decay"].abs()) > 1e-2
    flat = FlatProblem.of(problem, hparams)
    for name in hparams:
        losses, direction = [], torch.ones_like(hparams[name]) * 1e-5
        for sign in (1, -1):
            moved = {**hparams, name: hparams[name] + sign * direction}
            with torch.no_grad():
                found = run(solver, flat.objective(None), flat.start(hparams), moved)
            assert found.result.name == "converged"
            losses.append(float(outer(found.params, moved)))
        change = float((expected[name] * direction).sum())
        assert change == pytest.approx((losses[0] - losses[1]) / 2, rel=1e-6, abs=1e-14)
    own = [Implicit(linear_solver=linear) for linear in GENERAL]
    if isinstance(solver, GradientDescent):
        own.append(Implicit(linear_solver=ConjugateGradient(**TIGHT)))
    maps = [ImplicitUpdate(linear_solver=one) for one in (*GENERAL, *SYMMETRIC)]
    for method in (*own, *maps, Unrolled(), ForwardMode()):
        result = compute(problem, method, solver)
        close(result.gradient, expected, 1e-8)
        assert not result.receipt.biased and result.receipt.inner_result == "converged", name_of(method)
        torch.testing.assert_close(result.params, solution_of(problem, solver, hparams), rtol=1e-9, atol=1e-10)


def test_adamw_holds_its_weights_below_the_inverse_of_the_decay():
    """What the docstring says: an entry wanted outside sits at the bound and follows it, another hardly feels the decay."""
    target = torch.tensor([10.0, 1.0])

    class Pull(Quadratic):
        def init_hparams(self):
            return {"decay": torch.tensor(0.5)}

        def init_params(self, hparams):
            return {"w": torch.zeros(2)}

        def inner_loss(self, params, hparams, batch):
            return (params["w"] - target).square().sum() / 2

        def outer_loss(self, params, hparams, batch):
            return params["w"][0] + 100 * params["w"][1]

    solver = Adam(5000, 1e-12, learning_rate=0.02, beta2=0.9, epsilon=1e-3, weight_decay="decay")
    result = compute(Pull(), ImplicitUpdate(linear_solver=DenseLU()), solver)
    assert result.receipt.inner_result == "converged"
    assert 1.99 < float(result.params[0]) < 2.0 and float(result.params[1]) == pytest.approx(1.0, abs=2e-3)
    assert float(result.gradient["decay"]) == pytest.approx(-1 / 0.5**2 - 100 * 1e-3 / (1 - 0.5) ** 2, rel=1e-2)


def test_a_decay_is_a_penalty_for_an_optimality_too():
    """`x - tanh(W x + b) + w x = 0`, which is no gradient of a loss."""

    class Equilibrium(Problem):
        def init_hparams(self):
            return {"b": torch.tensor([0.5, -0.2, 0.1]), "decay": torch.tensor(0.3)}

        def init_params(self, hparams):
            return {"x": torch.zeros(3)}

        def optimality(self, params, hparams, batch):
            return {"x": params["x"] - torch.tanh(0.4 * normal(3, 3, seed=3) @ params["x"] + hparams["b"])}

        def outer_loss(self, params, hparams, batch):
            return (params["x"] - 1).square().sum()

    problem = Equilibrium()

    def outer(h):
        x = torch.zeros(3)
        for _ in range(400):
            x = (1 - 0.5 * h["decay"]) * x - 0.5 * (x - torch.tanh(0.4 * normal(3, 3, seed=3) @ x + h["b"]))
        return (x - 1).square().sum()

    solver = GradientDescent(2000, 1e-13, learning_rate=0.5, momentum=0.2, weight_decay="decay")
    for method in (Implicit(linear_solver=DenseLU()), ImplicitUpdate(linear_solver=DenseLU()), Unrolled()):
        close(compute(problem, method, solver).gradient, grad(outer)(problem.init_hparams()), 1e-9)
    with pytest.raises(UsageError, match="SAMA needs inner_loss, but the problem defines only optimality"):
        compute(problem, SAMA(), solver)


# --- The implicit update map ------------------------------------------------------------------------------------------


def dense_update_map(row, problem, num_steps):
    """`∂L/∂θ + (∂T/∂θ)^T [I - ∂T/∂z]^{-T} (∂L/∂x, 0)` in dense matrices, with `T` written out."""
    rule, size, options = RULES[row]
    (loss, outer), hparams = functions(problem), problem.init_hparams()
    x, memory = iterate(row, problem, num_steps, hparams)

    def step(z, h):
        here, *kept = z.split(N)
        g = grad(lambda w: loss(w, h))(here)
        new, after = rule(here, kept, num_steps + 1, g, **{name: h[name] for name in options})
        return torch.cat([new, *after])

    z = torch.cat([x, *memory])
    by_z, by_hparams = jacrev(step, argnums=(0, 1))(z, hparams)
    cotangent = torch.cat([grad(lambda w: outer(w, hparams))(x), torch.zeros(size * N)])
    adjoint = torch.linalg.solve((torch.eye(len(z)) - by_z).T, cotangent)
    direct = grad(lambda h: outer(x, h))(hparams)
    return {name: direct[name] + torch.tensordot(adjoint, by_hparams[name], 1) for name in hparams}


@every_rule
@pytest.mark.parametrize("make", [Quadratic, Curved], ids=["quadratic", "curved"])
def test_the_update_map_away_from_a_solution_is_its_dense_formula(row, make):
    problem, num_steps = make(**RULES[row][2]), 12
    for linear in GENERAL:
        solver = solver_of(row, max_steps=num_steps, atol=0.0)
        result = compute(problem, ImplicitUpdate(linear_solver=linear), solver)
        close(result.gradient, dense_update_map(row, problem, num_steps), 1e-8)
        assert result.receipt.biased == ("one step, differentiated where the inner solver stopped short of a fixed point, stands for all",)  # fmt: skip
        assert result.receipt.linear_residual < 1e-9 and result.receipt.num_mv > 0


def test_without_learned_options_the_update_map_is_the_theorem_at_an_unsolved_problem():
    """As `Implicit` is: the stationarity tells what it is worth, and nothing is biased."""
    for solver in (GradientDescent(5, 0.0), Adam(5, 0.0, epsilon=0.1), TorchOptimizer(5, 0.0)):
        receipt = compute(Quadratic(), ImplicitUpdate(), solver).receipt
        assert not receipt.biased and receipt.stationarity > 0.1


def test_a_series_of_k_terms_is_the_last_k_steps_of_plain_descent():
    """On a quadratic, by `shift`, which enters every step by the same constant."""
    problem, solver = Quadratic(), GradientDescent(30, 0.0, learning_rate=0.1)
    for terms in (1, 2, 7, 30):
        series = ImplicitUpdate(linear_solver=NeumannSeries(step_size=0.1, rtol=None, max_steps=terms))
        result = compute(problem, series, solver)
        assert result.receipt.linear_result == "budget_spent" and result.receipt.num_mv == terms
        close(result.gradient, compute(problem, Unrolled(last=terms), solver).gradient, 1e-11, ["shift"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    "solver", [GradientDescent(40, 0.0, momentum=0.6), Adam(40, 0.0), Adam(600, 0.0, learning_rate=0.05)], ids=str
)
def test_without_decay_the_system_is_that_of_the_hessian(solver, dtype):
    """However small Adam's second moments are; the memory is eliminated exactly."""
    problem = Curved().to(dtype=dtype)
    hparams = {name: value.to(dtype) for name, value in problem.init_hparams().items()}
    flat, batches = FlatProblem.of(problem, hparams), StepBatches(problem, 0)
    one, other = (
        method.compute(flat, solver, flat.start(hparams), hparams, batches, {})
        for method in (ImplicitUpdate(), Implicit(linear_solver=MINRES()))
    )
    assert one.receipt.linear_result == "converged" and one.receipt.num_mv == other.receipt.num_mv
    assert one.receipt.curvature_min == other.receipt.curvature_min
    close(one.gradient, other.gradient, 1e-6)


def test_without_momentum_the_one_pass_derivative_by_the_learning_rate_is_a_newton_step():
    """`T = x - a g`: `∂T/∂a = -g` and `[a H]^{-1}`, so `-g^T H^{-1} c / a`."""
    problem = Quadratic(rate=0.1)
    (loss, outer), hparams = functions(problem), problem.init_hparams()
    solver = GradientDescent(5, 0.0, learning_rate="rate")
    result = compute(problem, ImplicitUpdate(linear_solver=DenseLU()), solver)
    g = grad(lambda x: loss(x, hparams))(result.params)
    hessian, c = (
        problem.x.T @ problem.x + torch.diag(hparams["penalty"]),
        grad(lambda x: outer(x, hparams))(result.params),
    )
    assert float(result.gradient["rate"]) == pytest.approx(float(-g @ torch.linalg.solve(hessian, c) / 0.1), rel=1e-10)
    assert float(result.gradient["rate"].abs()) > 1e-2 and result.receipt.stationarity == pytest.approx(float(g.norm()))


ZERO = ("rate", "momentum", "beta1", "beta2")


@every_rule
def test_at_a_solution_options_that_do_not_move_it_have_derivative_zero_and_that_is_said_once(row):
    problem = Quadratic(**{**RULES[row][2], **({"epsilon": 0.5} if "epsilon" in RULES[row][2] else {})})
    method = ImplicitUpdate(linear_solver=DenseLU())
    learned = [name for name in ZERO if name in problem.options]
    for atol in (1e-4, 1e-8):
        with pytest.warns(UserWarning, match="is zero by theory, but for what the inner solve left over") as caught:
            result = compute(problem, method, solver_of(row, max_steps=20_000, atol=atol))
        assert result.receipt.inner_result == "converged" and not result.receipt.biased
        assert all(float(result.gradient[name].norm()) <= 3e3 * atol for name in learned)
        assert float(result.gradient["penalty"].norm()) > 1e-2
    (text,) = {str(one.message) for one in caught}
    assert "'rate' (learning_rate of " in text and "'penalty'" not in text and "'decay'" not in text
    assert all(f"'{name}'" in text for name in learned) and text.endswith("or tune weight_decay, which moves it.")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compute(problem, method, solver_of(row, max_steps=20_000, atol=1e-4), result.state)  # the next outer step
        compute(problem, method, solver_of(row, max_steps=9, atol=0.0))  # a one-pass derivative is none of those zeros
        compute(Quadratic(), method, GradientDescent())


def test_at_an_exactly_stationary_point_the_derivative_by_a_learning_rate_is_exactly_zero():
    class Settled(Quadratic):
        def inner_loss(self, params, hparams, batch):
            return (hparams["penalty"] * (params["w"] - torch.linspace(-1.0, 1.0, N)).square()).sum() / 2

        def outer_loss(self, params, hparams, batch):
            return params["w"].sum()

    problem = Settled(rate=0.1, momentum=0.5)
    with pytest.warns(UserWarning, match=r"'rate' \(learning_rate of GradientDescent\), 'momentum' \(momentum of"):
        result = compute(problem, ImplicitUpdate(), GradientDescent(learning_rate="rate", momentum="momentum"))
    assert result.params.tolist() == torch.linspace(-1.0, 1.0, N).tolist()
    assert float(result.gradient["rate"]) == float(result.gradient["momentum"]) == 0.0


# --- SAMA -------------------------------------------------------------------------------------------------------------


def dense_sama(rule, num_memory, options, problem, x, memory, number, radius=None):
    """Its formula with the whole matrix `∂u/∂g`, and the mixed product differenced or (None) exact."""
    (loss, outer), hparams = functions(problem), problem.init_hparams()

    def update(g, h):
        return x - rule(x, memory, number, g, **{name: h.get(name, value) for name, value in options.items()})[0]

    g, c = grad(lambda z: loss(z, hparams))(x), grad(lambda z: outer(z, hparams))(x)
    scale = jacrev(update)(g, hparams)
    torch.testing.assert_close(scale, torch.diag(torch.diagonal(scale)))
    v = scale.T @ c
    if radius is None:
        mixed = grad(lambda h: grad(lambda z: loss(z, h))(x) @ v)(hparams)
    else:
        eps = radius / v.norm()
        plus, minus = (grad(lambda h, at=x + sign * eps * v: loss(at, h))(hparams) for sign in (1, -1))
        mixed = {name: (plus[name] - minus[name]) / (2 * eps) for name in hparams}
    by_options, direct = grad(lambda h: update(g, h) @ c)(hparams), grad(lambda h: outer(x, h))(hparams)
    return {name: direct[name] - by_options[name] - mixed[name] for name in hparams}


@every_rule
@pytest.mark.parametrize("num_steps", [1, 25])
def test_sama_is_its_dense_formula(row, num_steps):
    rule, size, options = RULES[row]
    problem, radius = Curved(**options), 0.3
    x, memory = iterate(row, problem, num_steps, problem.init_hparams())
    for learned in (True, False)[: 1 if "each weight" in row else 2]:
        result = compute(problem, SAMA(radius=radius), solver_of(row, learned, max_steps=num_steps, atol=0.0))
        torch.testing.assert_close(result.params, x, rtol=1e-10, atol=1e-12)
        want = dense_sama(rule, size, options, problem, x, memory, num_steps + 1, radius)
        close(result.gradient, want, 1e-8, None if learned else ("penalty", "shift"))
        assert result.receipt.biased and result.receipt.inner_gradients == num_steps + 3
    fine = compute(problem, SAMA(radius=1e-4), solver_of(row, max_steps=num_steps, atol=0.0))
    close(fine.gradient, dense_sama(rule, size, options, problem, x, memory, num_steps + 1), 1e-6)


@every_torch
def test_sama_reads_the_moments_of_torch_optim(make, options):
    problem = Curved()
    solver = TorchOptimizer(20, 0.0, optimizer=make)
    x, own = compute(problem, SAMA(), solver).params, solver.update_rule().solver
    twin = compute(problem, SAMA(), replace(own, max_steps=20, atol=0.0))
    torch.testing.assert_close(x, twin.params)
    close(compute(problem, SAMA(), solver).gradient, twin.gradient, 1e-9)
    maps = [compute(problem, ImplicitUpdate(linear_solver=DenseLU()), one) for one in (solver, replace(own, max_steps=20, atol=0.0))]  # fmt: skip
    close(maps[0].gradient, maps[1].gradient, 1e-7)


def test_sama_with_adam_has_the_scale_of_the_docstring():
    """`∂u/∂g` as it is written there, by numbers."""
    problem, options = Quadratic(), {"learning_rate": 0.05, "beta1": 0.8, "beta2": 0.95, "epsilon": 0.01}
    (loss, outer), hparams = functions(problem), problem.init_hparams()
    solver = Adam(10, 0.0, **options)
    with torch.no_grad():
        solved = run(solver, Objective(loss), torch.linspace(-1.0, 1.0, N), hparams)
    g, c = grad(lambda z: loss(z, hparams))(solved.params), grad(lambda z: outer(z, hparams))(solved.params)
    corrected = {1: 1 - 0.8**11, 2: 1 - 0.95**11}
    m = (0.8 * solved.state["first_moment"] + 0.2 * g) / corrected[1]
    root = ((0.95 * solved.state["second_moment"] + 0.05 * g * g) / corrected[2]).sqrt()
    scale = 0.05 * (0.2 / corrected[1] - m / (root + 0.01) * 0.05 * g / (corrected[2] * root)) / (root + 0.01)
    mixed = grad(lambda h: grad(lambda z: loss(z, h))(solved.params) @ (scale * c))(hparams)
    direct = grad(lambda h: outer(solved.params, h))(hparams)
    close(compute(problem, SAMA(), solver).gradient, {name: direct[name] - mixed[name] for name in hparams}, 1e-9)


LIMITS = {
    "descent": (GradientDescent(7, 0.0, learning_rate=0.1), 0.1),
    "heavy ball": (GradientDescent(7, 0.0, learning_rate=0.1, momentum=0.5), 0.1),  # of this step's gradient
    "Adam that divides by a constant": (Adam(7, 0.0, learning_rate=0.1 * 1e9, beta1=0.0, epsilon=1e9), 0.1),
    "and has a momentum": (Adam(7, 0.0, learning_rate=0.1 * 1e9, beta1=0.6, epsilon=1e9), 0.1 * 0.4 / (1 - 0.6**8)),
    "Adam that takes signs": (Adam(7, 0.0, learning_rate=0.1, beta1=0.0, beta2=0.0, epsilon=1e-14), 0.0),
}


@pytest.mark.parametrize(("solver", "factor"), LIMITS.values(), ids=LIMITS)
def test_sama_has_the_identity_as_its_limit(solver, factor):
    problem = Quadratic()
    got = compute(problem, SAMA(), solver).gradient
    if factor:
        close(got, compute(problem, Implicit(linear_solver=IdentitySolver(factor)), solver).gradient, 1e-7)
    else:  # the sign of a gradient does not react: only the direct part is left
        close({"shift": got["shift"]}, {"shift": 0.01 * 2 * torch.tensor(0.3)}, 1e-7)
        assert float(got["penalty"].norm()) < 1e-9


@pytest.mark.parametrize("row", ["descent", "adamw"])
def test_sama_gives_options_the_derivative_of_one_step(row):
    """As `OneStep`, whose step begins with no memory: they agree where there is none."""
    options = {**RULES[row][2], **({"beta1": 0.0, "beta2": 0.0} if row == "adamw" else {})}
    problem = Quadratic(**options)
    solver = replace(solver_of(row), max_steps=6, atol=0.0)
    learned = {"rate", "decay", "epsilon"} & set(options)
    result, step = compute(problem, SAMA(), solver), compute(problem, OneStep(), solver)
    x = result.params  # OneStep takes the outer gradient after its step, SAMA before
    (loss, outer), hparams = functions(problem), problem.init_hparams()
    assert not torch.equal(step.params, x)

    def stepped(h):
        g = grad(lambda z: loss(z, h))(x)
        return RULES[row][0](x, (torch.zeros(N),) * 2, 1, g, **{name: h[name] for name in options})[0]

    c = grad(lambda z: outer(z, hparams))(x)
    if row == "descent":
        c_after = grad(lambda z: outer(z, hparams))(step.params)
        close(step.gradient, grad(lambda h: stepped(h) @ c_after)(hparams), 1e-10, learned)
    close(result.gradient, grad(lambda h: stepped(h) @ c)(hparams), 1e-9, learned)
    assert all(float(result.gradient[name].norm()) > 1e-6 for name in learned)


# --- Both methods: tasks, refusals, explanations, the outer loop ------------------------------------------------------


@every_rule
@pytest.mark.parametrize(
    "method", [SAMA(radius=0.3), ImplicitUpdate(linear_solver=GMRES(restart=100, **TIGHT))], ids=name_of
)
def test_a_batch_of_tasks_averages_the_tasks(row, method):
    problem, solver = Tasks(**RULES[row][2]), solver_of(row, max_steps=10, atol=0.0)
    result = compute(problem, method, solver)
    parts = [compute(problem.single(task), method, solver).gradient for task in range(3)]
    assert result.params.shape == (3, N)
    close(result.gradient, {name: sum(part[name] for part in parts) / 3 for name in parts[0]}, 1e-8)


def torch_solver(make, **options):
    return TorchOptimizer(optimizer=partial(make, **options))


REFUSED = {
    "L-BFGS": (LBFGS(), "LBFGS has none"),
    "proximal": (ProximalGradient(proximal=SoftThreshold(0.1)), "ProximalGradient has none"),
    "Anderson": (AndersonAcceleration(), "AndersonAcceleration has none"),
    "RMSprop": (torch_solver(torch.optim.RMSprop), "torch.optim's RMSprop has none that is known"),
    "Nesterov": (torch_solver(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True), "torch.optim.SGD with nesterov=True"),
    "dampening": (torch_solver(torch.optim.SGD, lr=0.1, momentum=0.9, dampening=0.5), "torch.optim.SGD with dampening=0.5"),
    "AMSGrad": (torch_solver(torch.optim.Adam, amsgrad=True), "torch.optim.Adam with amsgrad=True"),
    "maximisation": (torch_solver(torch.optim.AdamW, maximize=True), "torch.optim.AdamW with maximize=True"),
    "coupled decay": (torch_solver(torch.optim.Adam, weight_decay=0.1), "torch.optim.Adam with weight_decay=0.1 .*use Adam, .*AdamW or SGD"),
}  # fmt: skip


@pytest.mark.parametrize(("solver", "message"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("method", [SAMA(), ImplicitUpdate()], ids=name_of)
def test_solvers_without_an_update_rule_are_refused_by_name(method, solver, message):
    with pytest.raises(UsageError, match=f"an elementwise rule that they can differentiate, but {message}"):
        hypergradient_at(Quadratic(), method=method, solver=solver)


def test_a_decay_that_couples_only_in_name_is_known():
    """`decoupled_weight_decay=True` makes torch's Adam AdamW."""
    rule = torch_solver(torch.optim.Adam, weight_decay=0.1, decoupled_weight_decay=True).update_rule()
    assert rule.solver.weight_decay == 0.1


def named_options(solver):
    return [one.name for one in fields(solver) if one.type == "Option" and isinstance(getattr(solver, one.name), float)]


@pytest.mark.parametrize("solver", [GradientDescent(), Adam(), AndersonAcceleration(), ProximalGradient()], ids=name_of)
def test_which_options_move_the_solution_is_what_their_solver_declares(solver):
    """Declared for the messages, and read off the graph of what vanishes at a solution."""
    options = named_options(solver)
    assert set(solver.moves_solution) <= set(options) and "learning_rate" in options
    for option in options:
        problem = Quadratic(rate=0.1)
        hparams = problem.init_hparams()
        flat, named = FlatProblem.of(problem, hparams), replace(solver, **{option: "rate"})
        moves = option in solver.moves_solution
        paths = find_paths(flat, named, hparams, StepBatches(problem, 0))["rate"]
        assert paths == ({"inner", "solver"} if moves else {"solver"}), option
        if moves:
            check_paths(Implicit(), named, find_paths(flat, named, hparams, StepBatches(problem, 0)))
            continue
        with pytest.raises(UsageError, match="'rate' gets no hypergradient from Implicit") as refused:
            check_paths(Implicit(), named, find_paths(flat, named, hparams, StepBatches(problem, 0)))
        said = (
            f"it is an option of the inner solver ({option} of {name_of(solver)}), which changes the way to a solution"
        )
        assert said in str(refused.value) and "hypergradient=unrolled or hypergradient=forward" in str(refused.value)


def test_epsilon_moves_the_solution_only_with_a_decay():
    problem = Quadratic(epsilon=0.5)
    hparams = problem.init_hparams()
    for decay, paths in ((0.0, {"solver"}), (0.1, {"inner", "solver"})):
        solver = Adam(epsilon="epsilon", weight_decay=decay)
        assert (
            find_paths(FlatProblem.of(problem, hparams), solver, hparams, StepBatches(problem, 0))["epsilon"] == paths
        )


@pytest.mark.parametrize(
    ("method", "solver", "options"),
    [
        (ImplicitUpdate(), GradientDescent(500, 1e-8, weight_decay="decay"), {"decay": 0.5}),
        (ImplicitUpdate(), Adam(3000, 1e-8, learning_rate=0.1, beta2=0.9, epsilon=0.5, weight_decay="decay"), {"decay": 0.5}),
        (SAMA(), Adam(30, 0.0, learning_rate="rate", weight_decay="decay"), {"rate": 0.01, "decay": 0.5}),
        (ImplicitUpdate(), GradientDescent(3, 0.0, learning_rate="rate", momentum="momentum"), {"rate": 0.02, "momentum": 0.1}),
        (Unrolled(), Adam(20, 0.0, learning_rate="rate", beta1="momentum"), {"rate": 0.005, "momentum": 0.5}),
    ],
    ids=lambda value: name_of(value) if not isinstance(value, dict) else " ".join(value),
)  # fmt: skip
def test_options_are_tuned_by_name_under_their_constraints_in_the_outer_loop(method, solver, options):
    result = fit(Quadratic(**options), hypergradient=method, solver=solver, num_steps=12)
    losses = [record["outer_loss"] for record in result.history]
    assert min(losses[6:]) < 0.99 * losses[0]
    for name, value in options.items():
        assert float(result.hparams[name]) > 0 and abs(float(result.hparams[name]) - value) > 1e-4, name


class Loose(FixedAccuracy):
    def linear_rtol(self, state):
        return 0.9


def test_the_linear_solve_is_as_accurate_as_the_step_asks_for():
    exact, loose = (
        compute(Quadratic(), ImplicitUpdate(accuracy=one), GradientDescent()) for one in (FixedAccuracy(), Loose())
    )
    assert loose.receipt.num_mv < exact.receipt.num_mv and loose.receipt.linear_result == "converged"


def test_minibatches_and_replaced_inverses_are_said_on_the_receipt():
    problem = Quadratic(rate=0.1)
    problem.inner_batches = lambda step, inner_step: torch.arange(5)
    solver = GradientDescent(5, 0.0, learning_rate="rate")
    reasons = compute(problem, ImplicitUpdate(linear_solver=IdentitySolver(1.0)), solver).receipt.biased
    assert (
        reasons[0] == "IdentitySolver replaces the inverse Hessian"
        and reasons[2] == "the step is that of one minibatch"
    )
    assert len(reasons) == 3


# --- one option, several hyperparameters ------------------------------------------------------------------------------


class Layers(Problem):
    """Three tensors in two layers; `options` are further hyperparameters, nested."""

    constraints = {"penalty": Positive()}

    def __init__(self, tasks=None, **options):
        self.x, self.y = normal(12, 3, seed=1), normal(12, seed=2)
        self.num_tasks, self.options = tasks, to(options, dtype=torch.float64)
        if tasks is not None:
            self.inner_batches = lambda *_: normal(tasks, 12, seed=3)

    def init_hparams(self):
        return {"penalty": torch.tensor(0.05), **self.options}

    def init_params(self, hparams):
        return {
            "a": {"weight": 0.3 * normal(2, 3, seed=4), "bias": 0.1 * torch.ones(2)},
            "b": torch.tensor([0.5, -0.4]),
        }

    def inner_loss(self, params, hparams, batch):
        outputs = torch.tanh(self.x @ params["a.weight"].mT + params["a.bias"]) @ params["b"]
        size = sum(value.square().sum() for value in params.values())
        return (outputs - (self.y if batch is None else batch)).square().mean() + hparams["penalty"] * size

    def outer_loss(self, params, hparams, batch):
        return sum((value - 0.2).square().sum() for value in params.values())


SPREADS = {
    "per layer": {"a": torch.tensor(0.05), "b": torch.tensor(0.2)},
    "per tensor": {"a": {"weight": torch.tensor(0.1), "bias": torch.tensor(0.02)}, "b": torch.tensor(0.2)},
    "per feature": {
        "a": {"weight": torch.tensor([[0.1, 0.05, 0.02]]), "bias": torch.tensor(0.02)},
        "b": torch.tensor(0.2),
    },
    "per weight": {
        "a": {"weight": 0.05 + 0.1 * normal(2, 3, seed=7).abs(), "bias": torch.tensor([0.1, 0.2])},
        "b": torch.tensor([0.1, 0.05]),
    },
}


def smaller(values):
    return {name: smaller(value) if isinstance(value, dict) else 0.3 * value for name, value in values.items()}


@pytest.mark.parametrize("tasks", [None, 2], ids=["alone", "tasks"])
@pytest.mark.parametrize("spread", SPREADS)
def test_a_rate_for_each_layer_tensor_feature_or_weight_has_its_hypergradient(spread, tasks):
    problem = Layers(tasks, rate=SPREADS[spread])
    solver = GradientDescent(max_steps=7, atol=0.0, learning_rate="rate", momentum=0.3)
    found = hypergradient_at(problem, method=Unrolled(), solver=solver)
    forward = hypergradient_at(problem, method=ForwardMode(), solver=solver)
    close(found.gradient, forward.gradient, 1e-9)
    own = natural_hparams(problem)
    for name, value in own.items():
        draw, length = normal(value.numel(), seed=8).reshape(value.shape), 1e-6
        losses = [
            hypergradient_at(
                problem, {**own, name: value + sign * length * draw}, method=Unrolled(), solver=solver
            ).outer_loss
            for sign in (1, -1)
        ]
        expected = (losses[0] - losses[1]) / (2 * length)
        assert float((found.gradient[name] * draw).sum()) == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("spread", SPREADS)
def test_a_decay_for_each_layer_is_a_penalty_for_each_layer(spread):
    """Of gradient descent; by the theorem for the loss, and for the step."""
    problem = Layers(decay=smaller(SPREADS[spread]))
    solver = GradientDescent(max_steps=20_000, atol=1e-10, learning_rate=0.2, weight_decay="decay")
    found = hypergradient_at(problem, method=Implicit(linear_solver=DenseLU()), solver=solver)
    step = hypergradient_at(problem, method=ImplicitUpdate(linear_solver=DenseLU()), solver=solver)
    close(found.gradient, step.gradient, 1e-6)
    unrolled = hypergradient_at(problem, method=Unrolled(last=2000), solver=solver)
    close(found.gradient, unrolled.gradient, 1e-5)


def test_a_spread_option_is_tuned_by_fit_and_named_in_messages():
    problem = Layers(rate=SPREADS["per layer"])
    solver = GradientDescent(max_steps=5, atol=0.0, learning_rate="rate")
    result = fit(problem, solver=solver, hypergradient=Unrolled(), num_steps=3)
    assert {"hparams.rate.a", "hparams.rate.b"} <= set(result.history[-1])
    with pytest.raises(
        UsageError, match=r"'rate.a' gets no hypergradient from Implicit: .*\(learning_rate of GradientDescent\)"
    ):
        fit(problem, solver=solver, num_steps=3)


def test_a_broadcast_hyperparameter_serves_as_an_option():
    params = Layers().init_params({})
    shared = Broadcast.of("rate", "per_layer", flatten_names(params))
    problem = Layers(**shared.start(0.1))
    solver = GradientDescent(max_steps=5, atol=0.0, learning_rate="rate")
    found = hypergradient_at(problem, method=Unrolled(), solver=solver)
    alone = hypergradient_at(Layers(rate=torch.tensor(0.1)), method=Unrolled(), solver=solver)
    total = sum(found.gradient[name] for name in shared.shapes)
    torch.testing.assert_close(total, alone.gradient["rate"])


GROUPS = {"matrices": "*.weight", "rest": "*"}


def grouped(**more):
    shared = Broadcast.of("rate", GROUPS, flatten_names(Layers().init_params({})))
    problem = Layers(**{**shared.start(0.1), **more})
    problem.broadcasts = (Broadcast.of("other", "per_tensor", {"a.weight": torch.ones(2, 3)}), shared)
    return problem


def test_groups_serve_as_an_option_once_they_are_declared():
    solver = GradientDescent(max_steps=5, atol=0.0, learning_rate="rate")
    problem = grouped()
    found = hypergradient_at(problem, method=Unrolled(), solver=solver).gradient
    forward = hypergradient_at(problem, method=ForwardMode(), solver=solver).gradient
    close(found, forward, 1e-9)
    by_tensor = hypergradient_at(
        Layers(**Broadcast.of("rate", "per_tensor", flatten_names(problem.init_params({}))).start(0.1)),
        method=Unrolled(),
        solver=solver,
    ).gradient
    torch.testing.assert_close(found["rate.matrices"], by_tensor["rate.a.weight"])
    torch.testing.assert_close(found["rate.rest"], by_tensor["rate.a.bias"] + by_tensor["rate.b"])
    result = fit(grouped(), solver=solver, hypergradient=Unrolled(), num_steps=3)
    assert {"hparams.rate.matrices", "hparams.rate.rest"} <= set(result.history[-1])


def test_groups_that_are_not_declared_or_not_there_are_refused():
    solver = GradientDescent(max_steps=5, atol=0.0, learning_rate="rate")
    problem = grouped()
    problem.broadcasts = ()
    with pytest.raises(UsageError, match="none fits the parameter 'a.weight': .*or declare the groups"):
        hypergradient_at(problem, method=Unrolled(), solver=solver)
    problem = grouped()
    del problem.options["rate.rest"]
    with pytest.raises(UsageError, match="whose 'rate.rest' is declared, but not among the hyperparameters"):
        hypergradient_at(problem, method=Unrolled(), solver=solver)
    problem = grouped()
    problem.broadcasts = ("rate",)
    with pytest.raises(UsageError, match=r"Layers.broadcasts was expected to hold Broadcast\(s\), but holds 'rate'"):
        hypergradient_at(problem, method=Unrolled(), solver=solver)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rate": {"a": torch.tensor(0.1)}}, "of 'rate.a' none fits the parameter 'b'"),
        (
            {"rate": {"a": torch.tensor(0.1), "b": torch.tensor(0.1), "c": torch.tensor(0.1)}},
            "'rate.c' fits none of the parameters",
        ),
        (
            {"rate": {"a": torch.ones(3), "b": torch.tensor(0.1)}},
            r"'rate.a' of shape \(3,\), .*'a.bias' of shape \(2,\)",
        ),
        (
            {"rate": torch.ones(3)},
            r"one for each of the 10 entries .*\('rate.a.weight', ...\), but 'rate' has shape \(3,\)",
        ),
    ],
)
def test_an_option_that_does_not_fit_the_parameters_is_refused(options, said):
    with pytest.raises(UsageError, match=said):
        hypergradient_at(Layers(**options), method=Unrolled(), solver=GradientDescent(learning_rate="rate"))


def test_a_vector_over_all_parameters_is_an_option_too():
    rates = 0.05 + 0.01 * torch.arange(10.0)
    solver = GradientDescent(max_steps=5, atol=0.0, learning_rate="rate")
    found = hypergradient_at(Layers(rate=rates), method=Unrolled(), solver=solver).gradient["rate"]
    parts = {"a": {"weight": rates[:6].reshape(2, 3), "bias": rates[6:8]}, "b": rates[8:]}
    named = hypergradient_at(Layers(rate=parts), method=Unrolled(), solver=solver).gradient
    torch.testing.assert_close(
        found, torch.cat([named[f"rate.{name}"].flatten() for name in ("a.weight", "a.bias", "b")])
    )
