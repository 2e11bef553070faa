"""Non-smooth inner problems: solutions by working sets, and the theorem on the entries that are free there."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bilevel import Problem, Trainer, fit, hypergradient_at
from bilevel.constraints import Positive
from bilevel.errors import UsageError
from bilevel.hypergradient import Implicit
from bilevel.linalg import GMRES, ConjugateGradient, DenseCholesky
from bilevel.solvers import Objective, Project, Proximal, ProximalGradient, ProximalNewton, SoftThreshold, run
from bilevel.solvers.proximal import least_subgradient

pytestmark = pytest.mark.usefixtures("float64")
EXACT = ConjugateGradient(rtol=1e-13, max_steps=1000)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Fit(Problem):
    """Least squares of more weights than examples, with tasks or without; the strength, the bound or a shift is learned."""

    constraints = {"strength": Positive(), "bound": Positive()}

    def __init__(self, num_tasks=None, num_rows=12, num_columns=20, strength=0.3, bound=0.2):
        shape = (num_tasks or 1, num_rows, num_columns)
        self.x, self.x_val = normal(*shape, seed=1), normal(*shape, seed=2)
        truth = torch.zeros(num_columns)
        truth[:3] = torch.tensor([2.0, -1.5, 1.0])
        self.y, self.y_val = self.x @ truth + 0.3 * normal(*shape[:2], seed=3), self.x_val @ truth
        self.num_tasks, self.handles_tasks = num_tasks, num_tasks is not None
        self.given = {"strength": torch.as_tensor(strength), "bound": torch.tensor(bound), "shift": torch.tensor(0.1)}
        self.columns = []  # of the restricted problems that were asked for

    def init_hparams(self):
        return self.given

    def init_params(self, hparams):
        return {"w": torch.zeros(self.x.shape[-1])}

    def errors(self, x, y, w, hparams):
        found = ((x @ w.unsqueeze(-1)).squeeze(-1) - y - hparams["shift"]).square().mean(-1) / 2
        return found if self.handles_tasks else found[0]

    def inner_loss(self, params, hparams, batch):
        return self.errors(self.x, self.y, params["w"], hparams)

    def outer_loss(self, params, hparams, batch):
        direct = hparams["bound"].square() + hparams["strength"].square().sum()  # both count, whichever term there is
        return self.errors(self.x_val, self.y_val, params["w"], hparams) + direct


class Restricted(Fit):
    """With a way to leave weights out that are zero."""

    def restricted(self, kept):
        smaller = copy.copy(self)
        smaller.x, smaller.x_val = self.x[..., kept["w"]], self.x_val[..., kept["w"]]
        self.columns.append(smaller.x.shape[-1])
        return smaller


TERMS = {
    "lasso": SoftThreshold("strength"),
    "box": Project(-0.5, "bound"),
    "orthant": Project(0.0),
}
WEIGHTED = torch.linspace(0.1, 0.6, 20, dtype=torch.float64)
CASES = {
    "lasso": (Fit, {}, TERMS["lasso"]),
    "lasso, restricted": (Restricted, {}, TERMS["lasso"]),
    "weighted lasso": (Restricted, {"strength": WEIGHTED}, TERMS["lasso"]),
    "some without a penalty": (
        Restricted,
        {"strength": WEIGHTED * (torch.arange(20) > 1) + 0.0},
        SoftThreshold("strength"),
    ),
    "box with a learned bound": (Fit, {"num_rows": 40}, TERMS["box"]),
    "restricted, but not at zero": (Restricted, {"num_rows": 40}, TERMS["box"]),
    "orthant": (Restricted, {"num_rows": 40}, TERMS["orthant"]),
    "tasks": (Fit, {"num_tasks": 3}, TERMS["lasso"]),
    "tasks, restricted": (Restricted, {"num_tasks": 3}, TERMS["lasso"]),
    "tasks in a box": (Fit, {"num_tasks": 3, "num_rows": 40}, TERMS["box"]),
}


@pytest.mark.parametrize("case", CASES)
def test_the_hypergradient_on_the_free_entries_is_that_of_solving_again(case):
    kind, words, term = CASES[case]
    problem, solver = kind(**words), ProximalNewton(500, 1e-12, proximal=term)
    if case == "some without a penalty":
        problem.constraints = {"bound": Positive()}
    found = hypergradient_at(problem, solver=solver, method=Implicit(linear_solver=EXACT))
    assert found.receipt.inner_result == "converged" and not found.receipt.biased
    free = term.free(found.params["w"], problem.given)
    assert 0 < int(free.sum()) < free.numel()
    if "restricted" in case and "zero" not in case:
        assert problem.columns[-1] == int(free.reshape(-1, 20).any(0).sum())
    draw = torch.Generator().manual_seed(5)
    for name, value in problem.given.items():
        way = torch.rand(value.shape, generator=draw) * (value != 0)
        sides = []
        for sign in (1e-6, -1e-6):
            moved = {**problem.given, name: value + sign * way}
            sides.append(
                hypergradient_at(problem, moved, solver=solver, method=Implicit(linear_solver=EXACT)).outer_loss
            )
        want = (sides[0] - sides[1]) / 2e-6
        assert float((found.gradient[name] * way).sum()) == pytest.approx(want, rel=1e-6, abs=1e-8), name


@pytest.mark.parametrize("linear", [GMRES(), DenseCholesky(), ConjugateGradient()], ids=lambda one: type(one).__name__)
def test_the_lasso_has_its_closed_form(linear):
    problem = Restricted()
    found = hypergradient_at(
        problem, solver=ProximalNewton(500, 1e-12, proximal=TERMS["lasso"]), method=Implicit(linear_solver=linear)
    )
    w = found.params["w"]
    free = w != 0
    x = problem.x[0][:, free]
    moved = -torch.linalg.solve(x.T @ x / len(x), w[free].sign())
    slope = torch.func.grad(lambda w: problem.outer_loss({"w": w}, problem.given, None))(w)[free]
    assert float(found.gradient["strength"]) == pytest.approx(float(slope @ moved) + 2 * 0.3, rel=1e-8)


def test_a_kink_is_told():
    """The second entry is zero, and comes free as soon as the strength falls."""

    class Two(Problem):
        constraints = {"strength": Positive()}

        def init_hparams(self):
            return {"strength": torch.tensor(0.5)}

        def init_params(self, hparams):
            return {"w": torch.zeros(2)}

        def inner_loss(self, params, hparams, batch):
            return (params["w"] - torch.tensor([2.0, 0.5])).square().sum() / 2

        def outer_loss(self, params, hparams, batch):
            return params["w"].sum()

    solver = ProximalNewton(proximal=SoftThreshold("strength"))
    at_kink = hypergradient_at(Two(), solver=solver, method=Implicit())
    assert at_kink.receipt.biased == (
        "1 held entries of the inner solution are, within its accuracy, about to come free: it has a kink there",
    )
    aside = hypergradient_at(Two(), {"strength": torch.tensor(0.6)}, solver=solver, method=Implicit())
    assert not aside.receipt.biased and float(aside.gradient["strength"]) == pytest.approx(-1.0)


@pytest.mark.parametrize("method", [Implicit(), Implicit(linear_solver=DenseCholesky()), Implicit.auto()])
def test_a_solution_without_a_free_entry_does_not_move(method):
    problem = Restricted(strength=100.0)
    found = hypergradient_at(problem, solver=ProximalNewton(proximal=TERMS["lasso"]), method=method)
    assert not bool(found.params["w"].any()) and problem.columns[-1] == 0
    assert float(found.gradient["strength"]) == 200.0  # what it is in the outer loss itself
    assert float(found.gradient["shift"]) == pytest.approx(float((0.1 + problem.y_val).mean()))


@pytest.mark.parametrize(
    "method", [Implicit.auto(), Implicit(recycle=5, warm_start_linear=True), Implicit(compile=True)]
)
def test_an_outer_loop_goes_on_where_the_support_changes(method):
    problem, sizes = Restricted(strength=1.0), []

    class Sizes:
        def on_start(self, run):
            pass

        def on_step(self, record, hparams):
            sizes.append(problem.columns[-1])

        def on_end(self, summary):
            pass

    fitted = fit(
        problem, solver=ProximalNewton(500, 1e-10, proximal=TERMS["lasso"]), hypergradient=method,
        optimizer=lambda raw: torch.optim.Adam(raw, lr=0.3), trainer=Trainer(num_steps=12), callbacks=[Sizes()],
    )  # fmt: skip
    assert len(set(sizes)) > 2
    assert fitted.history[-1]["outer_loss"] < fitted.history[0]["outer_loss"]


@given(
    num_rows=st.integers(1, 12), num_columns=st.integers(1, 15), strength=st.floats(1e-3, 2.0), seed=st.integers(0, 10**6),
    growth=st.integers(1, 4),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_working_sets_end_where_proximal_gradient_does(num_rows, num_columns, strength, seed, growth):
    """Of any rank: the objective is the same where the solution is not unique."""
    x, y = normal(num_rows, num_columns, seed=seed), normal(num_rows, seed=seed + 1)
    objective, start = Objective(lambda w, h: ((w @ x.T - y).square()).sum(-1) / 2), torch.zeros(num_columns)
    for term in (SoftThreshold(strength), Project(-strength, strength)):
        found = run(ProximalNewton(500, 1e-9, proximal=term, growth=growth), objective, start, {})
        assert found.result.name == "converged"
        rate = 1 / float(torch.linalg.matrix_norm(x, 2)) ** 2
        slow = run(ProximalGradient(20_000, 1e-9, term, rate), objective, start, {})
        value, want = (float(objective.value(one.params, {}) + term.value(one.params, {})) for one in (found, slow))
        assert value <= want + 1e-9 * max(abs(want), 1.0)
        gradient = objective.gradient(found.params, {})
        assert float(least_subgradient(term, found.params, gradient, {}).norm()) <= 1e-9


def test_a_loss_that_is_not_quadratic_is_minimised_too():
    x, y = normal(30, 50, seed=7), normal(30, seed=8).sign()
    objective = Objective(lambda w, h: torch.nn.functional.softplus(-y * (w @ x.T)).mean(-1))
    for strength in (0.1, 0.01, 0.001):
        found = run(ProximalNewton(200, 1e-9, proximal=SoftThreshold(strength)), objective, torch.zeros(2, 50), {})
        assert found.result.name == "converged" and found.num_steps < 60
        assert torch.allclose(found.params[0], found.params[1])
        gradient = objective.gradient(found.params, {})
        zero = found.params == 0
        assert float((gradient + strength * found.params.sign())[~zero].abs().max()) <= 1e-9
        assert float(gradient[zero].abs().max()) <= strength


class Own(Proximal):
    def prox(self, params, step, hparams):
        return params


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: ProximalNewton(proximal=Own()),
            r"needs a piecewise linear term such as SoftThreshold, but got .*ProximalGradient",
        ),
        (lambda: ProximalNewton(growth=0), r"needs growth >= 1, an integer, but got 0"),
    ],
)
def test_what_proximal_newton_cannot_is_named(make, words):
    with pytest.raises(UsageError, match=words):
        make()
