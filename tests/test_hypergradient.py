"""Every hypergradient method against closed forms, finite differences of the re-solved problem, and its own formula."""

import math

import pytest
import torch
from torch.func import grad, hessian

from bilevel.batches import StepBatches
from bilevel.constraints import Positive
from bilevel.errors import UsageError
from bilevel.flat import FlatProblem
from bilevel.hypergradient import (
    SAMA,
    FiniteDifference,
    ForwardMode,
    Implicit,
    ImplicitUpdate,
    OneStep,
    Unrolled,
    check_paths,
    find_paths,
    hypergradient_at,
)
from bilevel.linalg import (
    GMRES,
    LSMR,
    MINRES,
    BiCGStab,
    ConjugateGradient,
    DenseCholesky,
    DenseLU,
    HessianOperator,
    IdentitySolver,
    NeumannSeries,
    lanczos,
)
from bilevel.problem import Problem
from bilevel.solvers import (
    LBFGS,
    Adam,
    AndersonAcceleration,
    GradientDescent,
    NewtonCG,
    Project,
    Proximal,
    ProximalGradient,
    SoftThreshold,
    run,
)

TIGHT = {"rtol": 1e-13, "max_steps": 5000}
LINEAR = [
    ConjugateGradient(**TIGHT), MINRES(**TIGHT), GMRES(restart=100, **TIGHT), BiCGStab(**TIGHT), LSMR(**TIGHT),
    NeumannSeries(rtol=1e-13, max_steps=100_000), DenseCholesky(), DenseLU(),
]  # fmt: skip


pytestmark = pytest.mark.usefixtures("float64")


def name_of(value):
    return type(value).__name__


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Ridge(Problem):
    """Penalty for each feature and a shift of the targets; the solution and its derivative are known in closed form."""

    constraints = {"penalty": Positive()}

    def __init__(self, seed=0, features=5):
        self.x, self.y = normal(20, features, seed=seed), normal(20, seed=seed + 1)
        self.x_val, self.y_val = normal(15, features, seed=seed + 2), normal(15, seed=seed + 3)

    def init_hparams(self):
        return {"penalty": torch.linspace(0.5, 2.0, self.x.shape[1]), "shift": torch.tensor(0.3)}

    def init_params(self, hparams):
        return {"w": torch.zeros(self.x.shape[1])}

    def inner_loss(self, params, hparams, batch):
        residual = self.x @ params["w"] - self.y - hparams["shift"]
        return residual.square().sum() / 2 + (hparams["penalty"] * params["w"].square()).sum() / 2

    def outer_loss(self, params, hparams, batch):
        return (self.x_val @ params["w"] - self.y_val).square().mean() + 0.01 * hparams["shift"] ** 2

    def closed_form(self, hparams):
        def loss(penalty, shift):
            w = torch.linalg.solve(self.x.T @ self.x + torch.diag(penalty), self.x.T @ (self.y + shift))
            return self.outer_loss({"w": w}, {"penalty": penalty, "shift": shift}, None)

        return dict(
            zip(("penalty", "shift"), grad(loss, argnums=(0, 1))(hparams["penalty"], hparams["shift"]), strict=True)
        )


class Logistic(Ridge):
    """Logistic regression: smooth, strictly convex, no closed form."""

    def inner_loss(self, params, hparams, batch):
        margin = (self.x @ params["w"] + hparams["shift"]) * torch.sign(self.y)
        return torch.nn.functional.softplus(-margin).mean() + (hparams["penalty"] * params["w"].square()).sum() / 2


class Network(Ridge):
    """A small tanh network with a penalty for each feature: not convex."""

    constraints = {"penalty": Positive()}

    def init_params(self, hparams):
        return {"w1": 0.5 * normal(3, self.x.shape[1], seed=7), "b": torch.zeros(3), "w2": 0.5 * normal(3, seed=8)}

    def predict(self, params, x):
        return torch.tanh(x @ params["w1"].mT + params["b"]) @ params["w2"]

    def inner_loss(self, params, hparams, batch):
        residual = self.predict(params, self.x) - self.y - hparams["shift"]
        decay = (
            (hparams["penalty"] * params["w1"].square()).sum()
            + params["w2"].square().sum()
            + params["b"].square().sum()
        )
        return residual.square().mean() + 0.1 * decay

    def outer_loss(self, params, hparams, batch):
        return (self.predict(params, self.x_val) - self.y_val).square().mean()


def compute(problem, method, solver, hparams=None, step=0, params=None):
    hparams = problem.init_hparams() if hparams is None else hparams
    flat = FlatProblem.of(problem, hparams)
    params = flat.start(hparams) if params is None else params
    state = method.init(flat, solver, params, hparams)
    return method.compute(flat, solver, params, hparams, StepBatches(problem, step), state)


def close(got, want, rtol):
    for name, value in want.items():
        scale = float(value.norm())
        assert float((got[name] - value).norm()) <= rtol * scale + 1e-14, name


NEWTON = NewtonCG(atol=1e-11, max_steps=200)
DESCENT = GradientDescent(learning_rate=0.02, momentum=0.7, atol=1e-13, max_steps=5000)
ADAM = Adam(learning_rate=0.05, beta2=0.9, epsilon=1.0, atol=1e-13, max_steps=20_000)
EXACT = [
    *((Implicit(linear_solver=linear), NEWTON) for linear in LINEAR),
    *((ImplicitUpdate(linear_solver=linear), solver) for linear in LINEAR for solver in (DESCENT, ADAM)),
    (Unrolled(), ADAM),
    (Unrolled(), DESCENT),
    (Unrolled(checkpoint_every=37), DESCENT),
    (ForwardMode(), DESCENT),
]


@pytest.mark.parametrize(("method", "solver"), EXACT, ids=lambda v: getattr(v, "linear_solver", v).__class__.__name__)
@pytest.mark.parametrize("seed", [0, 40])
def test_methods_agree_with_the_closed_form_on_ridge(method, solver, seed):
    problem = Ridge(seed)
    result = compute(problem, method, solver)
    close(result.gradient, problem.closed_form(problem.init_hparams()), 1e-8)
    assert not result.receipt.biased and result.receipt.stationarity < 1e-8


def smallest_ritz_value(problem, params, hparams):
    flat = FlatProblem.of(problem, hparams)
    loss = flat.objective(None).loss
    return float(lanczos(HessianOperator(lambda x: loss(x, hparams), params), num_steps=50).smallest)


def differences(problem, solver, params, hparams, step=1e-5):
    """Central differences of the outer loss, each perturbed problem re-solved from the solution."""
    flat, found = FlatProblem.of(problem, hparams), {}
    for name, value in hparams.items():
        entries = []
        for index in range(value.numel()):
            losses = []
            for sign in (1, -1):
                moved = {key: entry.clone() for key, entry in hparams.items()}
                moved[name].view(-1)[index] += sign * step
                with torch.no_grad():
                    solution = run(solver, flat.objective(None), params, moved)
                assert solution.stationarity <= 1e-10
                losses.append(flat.outer_loss(solution.params, moved, None))
            entries.append((losses[0] - losses[1]) / (2 * step))
        found[name] = torch.stack(entries).reshape(value.shape).detach()
    return found


@pytest.mark.parametrize("make", [Logistic, Network], ids=["logistic", "mlp"])
def test_methods_agree_with_differences_of_the_resolved_problem(make):
    problem, solver = make(seed=10), NewtonCG(atol=1e-11, max_steps=300)
    hparams = problem.init_hparams()
    slow = GradientDescent(learning_rate=0.15, momentum=0.8, atol=1e-11, max_steps=4000)
    flat = FlatProblem.of(problem, hparams)
    with torch.no_grad():  # a network has many minima: all methods are to differentiate the one that descent finds
        minimum = run(slow, flat.objective(None), flat.start(hparams), hparams).params
    reference = compute(problem, Implicit(linear_solver=DenseCholesky()), solver, params=minimum)
    assert reference.receipt.stationarity <= 1e-10
    assert smallest_ritz_value(problem, reference.params, hparams) > 0
    expected = differences(problem, solver, reference.params, hparams)
    for method, inner in [
        *((Implicit(linear_solver=linear), solver) for linear in LINEAR),
        *((ImplicitUpdate(linear_solver=linear), slow) for linear in LINEAR),
        (Unrolled(), slow), (Unrolled(checkpoint_every=50), slow), (ForwardMode(), slow),
    ]:  # fmt: skip
        result = compute(problem, method, inner, params=minimum)
        torch.testing.assert_close(result.params, reference.params, rtol=1e-6, atol=1e-7)  # the same minimum
        close(result.gradient, expected, 1e-5)


def test_identity_one_step_and_darts_equal_their_formulas():
    problem = Network(seed=20)
    hparams = problem.init_hparams()
    flat = FlatProblem.of(problem, hparams)
    rate = 0.05
    solver = GradientDescent(learning_rate=rate, atol=0.0, max_steps=40)
    with torch.no_grad():
        x = run(solver, flat.objective(None), flat.start(hparams), hparams).params
    loss, outer = flat.objective(None).loss, lambda z, h: flat.outer_loss(z, h, None)

    def mixed(vector, at):
        return grad(lambda h: (grad(lambda z: loss(z, h))(at) * vector).sum())(hparams)

    direct = grad(lambda h: outer(x, h))(hparams)
    cross = mixed(grad(lambda z: outer(z, hparams))(x), x)
    identity = compute(problem, Implicit(warm_start=False, linear_solver=IdentitySolver(0.3)), solver)
    close(identity.gradient, {k: direct[k] - 0.3 * cross[k] for k in hparams}, 1e-12)

    def stepped(h):
        return x - rate * grad(lambda z: loss(z, h))(x)

    one = compute(problem, OneStep(warm_start=False), solver)
    close(
        one.gradient, grad(lambda h: outer(stepped(h), h) - outer(stepped(hparams).detach(), hparams))(hparams), 1e-12
    )

    xi, radius = 0.07, 0.02
    virtual = x - xi * grad(lambda z: loss(z, hparams))(x)
    v = grad(lambda z: outer(z, hparams))(virtual)
    eps = radius / v.norm()
    plus, minus = (grad(lambda h, at=x + s * eps * v: loss(at, h))(hparams) for s in (1, -1))
    darts = compute(problem, FiniteDifference(warm_start=False, virtual_step=xi, radius=radius), solver)
    direct = grad(lambda h: outer(virtual, h))(hparams)
    close(darts.gradient, {k: direct[k] - xi * (plus[k] - minus[k]) / (2 * eps) for k in hparams}, 1e-12)
    for result in (identity, one, darts):
        assert result.receipt.biased


@pytest.mark.parametrize("last", [1, 5])
def test_truncated_unrolling_is_the_derivative_of_the_last_steps(last):
    problem, total = Network(seed=30), 30
    hparams = problem.init_hparams()
    flat = FlatProblem.of(problem, hparams)
    solver = GradientDescent(learning_rate=0.05, momentum=0.5, atol=0.0, max_steps=total)
    loss = flat.objective(None).loss
    x, velocity = flat.start(hparams), 0.0
    for _ in range(total - last):
        velocity = 0.5 * velocity + grad(lambda z: loss(z, hparams))(x)
        x = x - 0.05 * velocity
    start = (x, velocity)

    def tail(h):
        z, v = start
        for _ in range(last):
            v = 0.5 * v + grad(lambda y: loss(y, h))(z)
            z = z - 0.05 * v
        return flat.outer_loss(z, h, None)

    for method in (Unrolled(last=last), Unrolled(last=last, checkpoint_every=2)):
        result = compute(problem, method, solver)
        close(result.gradient, grad(tail)(hparams), 1e-10)
        assert result.receipt.biased and result.receipt.inner_steps == total


@pytest.mark.parametrize("last", [1, 9, 40, 10_000])
@pytest.mark.parametrize("slack", [0, 4])  # converges within the head, or within the recorded steps
@pytest.mark.parametrize("checkpoint_every", [None, 7])
def test_truncated_unrolling_records_the_last_steps_of_a_loop_that_converges(last, slack, checkpoint_every):
    problem = Ridge(seed=35)
    hparams = problem.init_hparams()
    free = GradientDescent(learning_rate=0.02, momentum=0.5, atol=1e-5, max_steps=2000)
    total = compute(problem, Unrolled(), free).receipt.inner_steps
    assert 40 < total < 500
    exactly = GradientDescent(learning_rate=0.02, momentum=0.5, atol=0.0, max_steps=total)
    solver = (
        free if not slack else GradientDescent(learning_rate=0.02, momentum=0.5, atol=1e-5, max_steps=total + slack)
    )
    result = compute(problem, Unrolled(last=last, checkpoint_every=checkpoint_every), solver, hparams)
    close(result.gradient, compute(problem, Unrolled(last=last), exactly, hparams).gradient, 1e-12)
    assert result.receipt.inner_steps == total and result.receipt.inner_result == "converged"
    expected = f"only the last {last} of {total} steps are recorded"
    assert result.receipt.biased == (() if last >= total else (expected,))


class Lasso(Problem):
    """A learned strength, for all weights or for each, targets and starting point; the optimal weights are sparse."""

    constraints = {"strength": Positive()}

    def __init__(self, strength, seed=70):
        self.x, self.x_val = normal(30, 6, seed=seed), normal(15, 6, seed=seed + 1)
        truth = torch.tensor([2.0, -1.5, 0.0, 0.0, 1.0, 0.0])
        self.y, self.y_val = self.x @ truth, self.x_val @ truth + 0.1 * normal(15, seed=seed + 2)
        self.strength = strength

    def init_hparams(self):
        return {"strength": self.strength, "shift": torch.tensor(0.3), "init": {"w": torch.full((6,), 0.5)}}

    def init_params(self, hparams):
        return {"w": hparams["init.w"] * 1.0}

    def inner_loss(self, params, hparams, batch):
        return (self.x @ params["w"] - self.y - hparams["shift"]).square().sum() / 2

    def outer_loss(self, params, hparams, batch):
        return (self.x_val @ params["w"] - self.y_val).square().mean()


class OwnTerm(Proximal):
    """A lasso of which only the proximal map is known."""

    def prox(self, params, step, hparams):
        return SoftThreshold("strength").prox(params, step, hparams)


DOUBLE = torch.float64
PROXIMAL = {
    "lasso": (torch.tensor(3.0, dtype=DOUBLE), ProximalGradient(5000, 1e-12, SoftThreshold("strength"), 0.015)),
    "weighted lasso": (
        torch.linspace(1.0, 4.0, 6, dtype=DOUBLE),
        ProximalGradient(5000, 1e-12, SoftThreshold("strength"), 0.015),
    ),
    "box": (torch.tensor(3.0, dtype=DOUBLE), ProximalGradient(5000, 1e-12, Project(-1.0, 1.2), 0.015)),
    "own term": (torch.tensor(3.0, dtype=DOUBLE), ProximalGradient(5000, 1e-12, OwnTerm(), 0.015)),
}


@pytest.mark.parametrize("kind", PROXIMAL)
def test_methods_agree_on_problems_with_a_proximal_term(kind):
    """The implicit function theorem at the fixed point, three ways through the iteration, and finite differences."""
    strength, solver = PROXIMAL[kind]
    problem = Lasso(strength)
    hparams = {"strength": strength, "shift": torch.tensor(0.3), "init.w": torch.full((6,), 0.5)}
    symmetric = solver.polyhedral is not None  # on the free entries alone
    general = [one for one in LINEAR if (symmetric or not one.requires) and not isinstance(one, NeumannSeries)]
    methods = [Implicit(linear_solver=linear, warm_start=False) for linear in general]
    methods += [Unrolled(), Unrolled(checkpoint_every=11), ForwardMode()]
    results = [compute(problem, method, solver, hparams) for method in methods]
    params = results[0].params
    active = (params.abs() > 1e-6) if kind != "box" else (params > -1.0) & (params < 1.2)
    assert 0 < int(active.sum()) < 6
    want = differences(problem, solver, params, hparams)
    for result in results:
        assert result.receipt.inner_result == "converged" and not result.receipt.biased
        close({"shift": result.gradient["shift"]}, {"shift": want["shift"]}, 1e-6)
        assert float((result.gradient["strength"] - want["strength"]).norm()) <= 1e-6 * max(1, want["strength"].norm())
        assert float(result.gradient["init.w"].norm()) < 1e-9
    if kind == "lasso":  # x_A = (X_A' X_A)^-1 (X_A' y - strength sign), and nothing else moves
        x, sign = problem.x[:, active], params[active].sign()
        moved = -torch.linalg.solve(x.T @ x, sign)
        slope = grad(lambda w: problem.outer_loss({"w": w}, hparams, None))(params)[active]
        assert float(results[0].gradient["strength"]) == pytest.approx(float(slope @ moved), rel=1e-8)


@pytest.mark.parametrize("method", [Unrolled(checkpoint_every=2), ForwardMode()], ids=name_of)
def test_a_starting_point_that_the_solver_keeps_in_its_state_is_learned(method):
    """Accelerated proximal gradient extrapolates from its first point: a second path from `init_params`."""
    problem = Lasso(torch.tensor(3.0))
    hparams = {"strength": torch.tensor(3.0), "shift": torch.tensor(0.3), "init.w": torch.full((6,), 0.5)}
    solver = ProximalGradient(5, 0.0, SoftThreshold("strength"), 0.01)
    whole = compute(problem, Unrolled(), solver, hparams)
    assert float(whole.gradient["init.w"].norm()) > 1e-2
    close(compute(problem, method, solver, hparams).gradient, whole.gradient, 1e-12)


def test_what_a_proximal_term_needs_is_named():
    problem = Lasso(torch.tensor(3.0))
    hparams = {"strength": torch.tensor(3.0), "shift": torch.tensor(0.3), "init.w": torch.full((6,), 0.5)}
    solver = ProximalGradient(50, 1e-6, SoftThreshold("strength"), "rate")
    with pytest.raises(UsageError, match=r"ConjugateGradient needs an operator that is symmetric.*use GMRES"):
        compute(problem, Implicit(warm_start=False), PROXIMAL["own term"][1], hparams)
    with pytest.raises(UsageError, match=r"ProximalGradient adds a non-smooth term: use Unrolled.*or Implicit"):
        FiniteDifference().check(solver)
    hparams["rate"] = torch.tensor(0.01)
    found = find_paths(FlatProblem.of(problem, hparams), solver, hparams, StepBatches(problem, 0))
    assert found["strength"] == {"inner", "solver"} and found["rate"] == {"solver"}


def test_a_singular_system_is_called_so_by_every_linear_solver():
    """Two equal columns without a penalty: no derivative, and the least-squares answer is none."""
    problem = LearnedSolver(seed=50)
    problem.x[:, 1] = problem.x[:, 0]
    problem.init_hparams = lambda: {"shift": torch.tensor(0.5)}
    problem.inner_loss = lambda p, h, _: (problem.x @ p["w"] - problem.y * h["shift"]).square().sum() / 2
    problem.init_params = lambda h: {"w": torch.zeros(5)}
    for linear in (LSMR(**TIGHT), MINRES(**TIGHT), GMRES(**TIGHT), DenseLU(), DenseCholesky()):
        result = compute(problem, Implicit(linear_solver=linear), LBFGS(max_steps=100, atol=1e-9))
        assert result.receipt.linear_result in ("singular", "negative_curvature"), name_of(linear)


class Sampled(Ridge):
    """Minibatches, and for Hessian products (inner step -1) a minibatch or everything."""

    def __init__(self, whole):
        super().__init__()
        self.inner_batches = lambda step, inner: None if whole and inner == -1 else torch.arange(5) + (inner % 3) * 5


@pytest.mark.parametrize("whole", [True, False])
def test_the_inverse_of_a_minibatch_hessian_is_marked_as_biased(whole):
    result = compute(Sampled(whole), Implicit(), GradientDescent(learning_rate=0.01, max_steps=5))
    assert result.receipt.biased == (() if whole else ("the Hessian is that of one minibatch",))


class LearnedSolver(Ridge):
    """A learned learning rate and a learned starting point: hyperparameters that a solution does not depend on."""

    constraints = {"rate": Positive()}

    def init_hparams(self):
        return {"rate": torch.tensor(0.01), "init": {"w": 0.1 * torch.ones(self.x.shape[1])}}

    def init_params(self, hparams):
        return {"w": hparams["init.w"] * 1.0}

    def inner_loss(self, params, hparams, batch):
        return (self.x @ params["w"] - self.y).square().sum() / 2

    def outer_loss(self, params, hparams, batch):
        return (self.x_val @ params["w"] - self.y_val).square().mean()


def test_solver_options_and_starting_points_are_learned_by_unrolled_and_forward():
    problem = LearnedSolver(seed=50)
    hparams = {"rate": torch.tensor(0.01), "init.w": 0.1 * torch.ones(5)}
    solver = GradientDescent(learning_rate="rate", momentum=0.3, atol=0.0, max_steps=7)

    def outer(h):
        w, v = h["init.w"], 0.0
        for _ in range(7):
            v = 0.3 * v + problem.x.T @ (problem.x @ w - problem.y)
            w = w - h["rate"] * v
        return problem.outer_loss({"w": w}, h, None)

    for method in (Unrolled(), Unrolled(checkpoint_every=3), ForwardMode()):
        close(compute(problem, method, solver, hparams).gradient, grad(outer)(hparams), 1e-10)


@pytest.mark.parametrize(
    ("method", "solver", "message"),
    [
        (
            Implicit(),
            GradientDescent(learning_rate="rate"),
            "'rate' gets no hypergradient.*option of the inner solver.*unrolled",
        ),
        (
            Unrolled(warm_start=True),
            GradientDescent(learning_rate="rate"),
            "'init.w'.*starting point.*warm_start=false",
        ),
        (Implicit(), GradientDescent(), "'rate' is used nowhere"),
        (
            OneStep(),
            GradientDescent(learning_rate="rate"),
            "'init.w'.*starting point.*unrolled or hypergradient=forward",
        ),
    ],
)
def test_hyperparameters_out_of_reach_are_named_with_a_method_that_reaches_them(method, solver, message):
    problem = LearnedSolver(seed=50)
    hparams = {"rate": torch.tensor(0.01), "init.w": 0.1 * torch.ones(5)}
    with pytest.raises(UsageError, match=message):
        check_paths(
            method, solver, find_paths(FlatProblem.of(problem, hparams), solver, hparams, StepBatches(problem, 0))
        )


def test_paths_are_found_by_use_not_by_size():
    problem = Ridge()
    hparams = problem.init_hparams()
    flat = FlatProblem.of(problem, hparams)
    paths = find_paths(flat, NEWTON, hparams, StepBatches(problem, 0))  # at w = 0, where the penalty's gradient is zero
    assert paths == {"penalty": {"inner"}, "shift": {"direct", "inner"}}


class Tasks(Ridge):
    """Four ridge problems at once: one is written, the batch has a leading task dimension."""

    num_tasks = 4

    def __init__(self, seed=60):
        super().__init__(seed)
        data = {"x": normal(4, 20, 5, seed=seed), "y": normal(4, 20, seed=seed + 1)}
        query = {"x": normal(4, 15, 5, seed=seed + 2), "y": normal(4, 15, seed=seed + 3)}
        self.inner_batches, self.outer_batches = (lambda *_: data), (lambda *_: query)

    def inner_loss(self, params, hparams, batch):
        residual = batch["x"] @ params["w"] - batch["y"] - hparams["shift"]
        return residual.square().sum() / 2 + (hparams["penalty"] * params["w"].square()).sum() / 2

    def outer_loss(self, params, hparams, batch):
        return (batch["x"] @ params["w"] - batch["y"]).square().mean() + 0.01 * hparams["shift"] ** 2

    def single(self, task):
        """One of the tasks as a problem of its own."""
        problem = Ridge()
        inner, outer = self.inner_batches(0, 0), self.outer_batches(0, 0)
        problem.x, problem.y = inner["x"][task], inner["y"][task]
        problem.x_val, problem.y_val = outer["x"][task], outer["y"][task]
        return problem


@pytest.mark.parametrize(
    ("method", "solver"),
    [
        *((Implicit(linear_solver=linear), DESCENT) for linear in LINEAR),
        *((ImplicitUpdate(linear_solver=linear), DESCENT) for linear in LINEAR),
        (Unrolled(), DESCENT), (Unrolled(checkpoint_every=100), DESCENT), (ForwardMode(), DESCENT),
        (Implicit(linear_solver=DenseLU()), AndersonAcceleration(learning_rate=0.01, atol=1e-12)),
    ],
    ids=lambda v: getattr(v, "linear_solver", v).__class__.__name__,
)  # fmt: skip
def test_a_batch_of_tasks_averages_the_tasks_hypergradients(method, solver):
    problem = Tasks()
    result = compute(problem, method, solver)
    assert result.params.shape == (4, 5)
    parts = [problem.single(task).closed_form(problem.init_hparams()) for task in range(4)]
    close(result.gradient, {name: torch.stack([p[name] for p in parts]).mean(0) for name in parts[0]}, 1e-8)


class Equilibrium(Problem):
    """An inner problem that is no minimisation: `x = tanh(W x + b)`, with `b` as hyperparameter."""

    def init_hparams(self):
        return {"b": torch.tensor([0.5, -0.2, 0.1])}

    def init_params(self, hparams):
        return {"x": torch.zeros(3)}

    def optimality(self, params, hparams, batch):
        return {"x": params["x"] - torch.tanh(0.4 * normal(3, 3, seed=3) @ params["x"] + hparams["b"])}

    def outer_loss(self, params, hparams, batch):
        return (params["x"] - 1).square().sum()


@pytest.mark.parametrize(
    "linear",
    [GMRES(**TIGHT), BiCGStab(**TIGHT), LSMR(**TIGHT), DenseLU(), NeumannSeries(1e-13, 0.0, 5000, 1.0)],
    ids=name_of,
)
def test_an_optimality_that_is_no_gradient(linear):
    problem = Equilibrium()

    def outer(b):
        x = torch.zeros(3)
        for _ in range(300):
            x = torch.tanh(0.4 * normal(3, 3, seed=3) @ x + b)
        return (x - 1).square().sum()

    result = compute(problem, Implicit(linear_solver=linear), AndersonAcceleration(learning_rate=1.0, atol=1e-13))
    close(result.gradient, {"b": grad(outer)(problem.init_hparams()["b"])}, 1e-8)
    with pytest.raises(UsageError, match="ConjugateGradient needs an operator that is symmetric"):
        compute(problem, Implicit(), AndersonAcceleration(learning_rate=1.0))
    with pytest.raises(UsageError, match="needs inner_loss, but the problem defines only optimality"):
        compute(problem, Implicit(linear_solver=linear), LBFGS())


def test_receipts_tell_what_was_done():
    problem = Ridge()
    exact = compute(problem, Implicit(linear_solver=ConjugateGradient(rtol=1e-10)), NEWTON).receipt
    assert exact.linear_residual <= 1e-10 and exact.linear_result == "converged" and 1 <= exact.num_mv <= 7
    spectrum = torch.linalg.eigvalsh(problem.x.T @ problem.x + torch.diag(problem.init_hparams()["penalty"]))
    assert spectrum[0] <= exact.curvature_min <= exact.curvature_max <= spectrum[-1] * (1 + 1e-12)
    budget = compute(problem, Implicit(linear_solver=ConjugateGradient(rtol=None, max_steps=2)), NEWTON).receipt
    assert budget.linear_result == "budget_spent" and budget.num_mv == 2 and budget.linear_residual > 1e-6
    unsolved = compute(problem, Implicit(), GradientDescent(learning_rate=1e-3, max_steps=3)).receipt
    assert unsolved.inner_result == "max_steps" and unsolved.inner_steps == 3 and unsolved.stationarity > 0.1


def test_warm_started_linear_solves_take_fewer_products():
    problem, method = Logistic(), Implicit(linear_solver=ConjugateGradient(rtol=1e-8), warm_start_linear=True)
    hparams = problem.init_hparams()
    flat = FlatProblem.of(problem, hparams)
    start = flat.start(hparams)
    first = method.compute(
        flat, NEWTON, start, hparams, StepBatches(problem, 0), method.init(flat, NEWTON, start, hparams)
    )
    second = method.compute(flat, NEWTON, first.params, hparams, StepBatches(problem, 1), first.state)
    assert second.receipt.num_mv <= 2 < first.receipt.num_mv
    close(second.gradient, first.gradient, 1e-7)


@pytest.mark.parametrize("method", [Unrolled(), ForwardMode(), OneStep()], ids=name_of)
def test_methods_that_record_steps_refuse_solvers_that_cannot(method):
    with pytest.raises(UsageError, match=f"{name_of(method)} records the inner steps, but LBFGS is not differentiable"):
        method.check(LBFGS())


def test_bad_numbers_are_refused():
    with pytest.raises(UsageError, match="Unrolled needs last >= 1"):
        Unrolled(last=0)
    with pytest.raises(UsageError, match="carry 6 directions"):
        compute(Ridge(), ForwardMode(max_directions=3), DESCENT)
    with pytest.raises(UsageError, match="radius > 0"):
        FiniteDifference(radius=0.0)
    assert math.isnan(compute(Ridge(), OneStep(), DESCENT).receipt.linear_residual)


def test_hessian_of_the_ridge_is_what_the_methods_use():
    problem = Ridge()
    hparams = problem.init_hparams()
    flat = FlatProblem.of(problem, hparams)
    loss = flat.objective(None).loss
    dense = hessian(lambda x: loss(x, hparams))(flat.start(hparams))
    torch.testing.assert_close(dense, problem.x.T @ problem.x + torch.diag(hparams["penalty"]))


def test_one_hypergradient_is_one_call():
    problem = Ridge()
    found = hypergradient_at(problem, solver=LBFGS(atol=1e-11), method=Implicit(linear_solver=DenseCholesky()))
    close(found.gradient, problem.closed_form(problem.init_hparams()), 1e-8)
    assert found.receipt.linear_result == "converged" and set(found.params) == {"w"}
    moved = {name: value * 1.5 for name, value in problem.init_hparams().items()}
    close(hypergradient_at(problem, moved, solver=NEWTON).gradient, problem.closed_form(moved), 1e-4)
    for wrong, message in (
        ({"penalty": moved["penalty"]}, r"hparams were expected to be \['penalty', 'shift'\], but are \['penalty'\]"),
        ({**moved, "shift": torch.ones(7)}, r"'shift' was expected to have shape .*, but has \(7,\)"),
        ({**moved, "penalty": moved["penalty"].float()}, "dtype torch.float64, but has .*torch.float32"),
        ({**moved, "penalty": -moved["penalty"]}, "'penalty' was expected to be above 0"),
    ):
        with pytest.raises(UsageError, match=message):
            hypergradient_at(problem, wrong)
    with pytest.raises(UsageError, match=r"'rate' is used nowhere"):
        hypergradient_at(LearnedSolver(), {"rate": torch.tensor(0.1), "init": {"w": torch.ones(5)}})


@pytest.mark.parametrize(
    "method",
    [Unrolled(), Unrolled(last=5), Unrolled(checkpoint_every=5), ForwardMode(), SAMA(), ImplicitUpdate()],
    ids=str,
)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_every_way_through_the_loop_calls_a_divergence_by_its_name(method, momentum):
    """Also in pieces: growth counts from the first step of the whole loop."""
    solver = GradientDescent(max_steps=60, learning_rate=3.0, momentum=momentum)
    receipt = compute(Ridge(), method, solver).receipt
    whole = compute(Ridge(), Unrolled(), solver).receipt
    assert receipt.inner_result == whole.inner_result == "diverged" and receipt.inner_steps == whole.inner_steps < 60
