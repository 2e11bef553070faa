"""The error estimate of an implicit hypergradient: exact where everything is known, above the error elsewhere, honest flags."""

import dataclasses
import math
import statistics

import pytest
import torch

from bilevel.batches import StepBatches
from bilevel.errors import UsageError
from bilevel.flat import FlatProblem
from bilevel.hypergradient import error_estimate
from bilevel.hypergradient.error_estimate import CORRECTION, ErrorEstimator, Solved
from bilevel.hypergradient.outer import outer_gradients
from bilevel.linalg import (
    GMRES,
    MINRES,
    ConjugateGradient,
    DenseCholesky,
    IdentitySolver,
    MatrixOperator,
    NeumannSeries,
    as_matrix,
)
from bilevel.linalg.operator import SYMMETRIC
from bilevel.linalg.recycling import Subspace, WatchedOperator
from bilevel.linearisation import linearise
from bilevel.problem import Problem
from bilevel.solvers import LBFGS, GradientDescent, NewtonCG, run

DTYPE = torch.float64


class Quadratic(Problem):
    """A regression whose spectrum is given, and gradients with variance in proportion to it; everything in closed form."""

    def __init__(self, size=30, kappa=100.0, shared=False, seed=0, tasks=None):
        draw = torch.Generator().manual_seed(seed)
        lead = () if tasks is None else (tasks,)
        axes = torch.linalg.qr(torch.randn(*lead, size, size, generator=draw, dtype=DTYPE))[0]
        values = kappa ** -torch.rand(*lead, size, generator=draw, dtype=DTYPE)
        self.matrix = axes @ torch.diag_embed(values) @ axes.mT
        noise = torch.randn(2, *lead, size, generator=draw, dtype=DTYPE)
        self.target, self.goal = (axes @ (values.sqrt() * noise).unsqueeze(-1)).squeeze(-1)
        self.lower, self.size, self.num_tasks = 1 / kappa, size, tasks
        self.penalty = torch.tensor(1 / kappa, dtype=DTYPE) if shared else torch.full((size,), 1 / kappa, dtype=DTYPE)
        if tasks is not None:
            self.inner_batches = lambda step, inner: {"a": self.matrix, "t": self.target}
            self.outer_batches = lambda step, inner: {"a": self.matrix, "g": self.goal}

    def init_hparams(self):
        return {"penalty": self.penalty}

    def init_params(self, hparams):
        return {"w": torch.zeros(self.size, dtype=DTYPE)}

    def inner_loss(self, params, hparams, batch):
        w, a, t = params["w"], *((self.matrix, self.target) if batch is None else (batch["a"], batch["t"]))
        return 0.5 * w @ a @ w - t @ w + 0.5 * (hparams["penalty"] * w.square()).sum()

    def outer_loss(self, params, hparams, batch):
        w, a, g = params["w"], *((self.matrix, self.goal) if batch is None else (batch["a"], batch["g"]))
        return 0.5 * w @ a @ w - g @ w

    def exact(self):
        """The hypergradient by dense solves."""
        hessian = self.matrix + torch.eye(self.size, dtype=DTYPE) * self.lower
        w = torch.linalg.solve(hessian, self.target)
        y = torch.linalg.solve(hessian, (self.matrix @ w.unsqueeze(-1)).squeeze(-1) - self.goal)
        parts = -(w * y) if self.num_tasks is None else -(w * y).mean(0)
        return w, parts.sum() if self.penalty.ndim == 0 else parts


class Quartic(Quadratic):
    """The same with a term that bends the Hessian."""

    bend = 0.05

    def inner_loss(self, params, hparams, batch):
        return super().inner_loss(params, hparams, batch) + self.bend * params["w"].pow(4).sum()

    def exact(self):
        hparams = self.init_hparams()
        flat, w = FlatProblem.of(self, hparams), torch.zeros(self.size, dtype=DTYPE)
        for _ in range(60):
            at = linearise(flat, LBFGS(), w, hparams)
            w = w - torch.linalg.solve(as_matrix(at.operator), at.optimality.detach())
        at = linearise(flat, LBFGS(), w, hparams)
        _, rhs, _ = outer_gradients(flat, w, hparams, StepBatches(self, 0))
        return w, -at.mixed(torch.linalg.solve(as_matrix(at.operator), rhs))["penalty"]


@dataclasses.dataclass
class Outcome:
    """A hypergradient, its estimate and its error."""

    estimate: error_estimate.ErrorEstimate
    error: float
    num_mv: int

    @property
    def ratio(self):
        return self.estimate.value / self.error


def outcomes(problem, estimators, offset=0.0, solver=None, truth=None, stop=None):
    """One for each pair of an estimator and a declared bound, all from the same hypergradient.

    It is taken at the solution moved by `offset` in a random direction, or where Newton-CG stops at the relative gradient
    `stop`.
    """
    solver = solver or ConjugateGradient(rtol=1e-3)
    hparams, batches = problem.init_hparams(), StepBatches(problem, 0)
    flat = FlatProblem.of(problem, hparams)
    solution, exact = truth or problem.exact()
    params = solution + offset * torch.randn(solution.shape, generator=torch.Generator().manual_seed(1), dtype=DTYPE)
    if stop is not None:
        inner = NewtonCG(max_steps=60, atol=0.0, rtol=stop)
        with torch.no_grad():
            params = run(inner, flat.objective(batches.curvature), torch.zeros_like(solution), hparams).params
    at = linearise(flat, LBFGS(), params, hparams, batches.curvature)
    watched = WatchedOperator(at.operator, estimators[0][0].memory)
    _, rhs, direct = outer_gradients(flat, params, hparams, batches)
    adjoint = solver.compute(solver.init(watched), rhs).value
    gradient = {"penalty": direct["penalty"] - at.mixed(adjoint)["penalty"]}
    error, solved = float((gradient["penalty"] - exact).norm()), Solved(watched, rhs, adjoint, gradient)
    return [
        Outcome(estimator.estimate(at, LBFGS(), batches, solved, lower), error, watched.num_mv)
        for estimator, lower in estimators
    ]


def measure(problem, offset=0.0, solver=None, estimator=None, lower="declared", truth=None, stop=None):
    """One outcome, with the problem's own bound unless another is given."""
    bound = problem.lower if lower == "declared" else lower
    return outcomes(problem, [(estimator or ErrorEstimator(), bound)], offset, solver, truth, stop)[0]


# --- exact where the span holds everything ----------------------------------------------------------------------------

EXACT = ErrorEstimator(trust=1.0, doubt=0.0)


@pytest.mark.parametrize(
    "options", [{}, {"shared": True}, {"tasks": 3}, {"kappa": 1e5}, {"kappa": 1e5, "shared": True}]
)
def test_both_parts_are_exact_once_the_span_is_full(options):
    found = measure(Quadratic(size=12, **options), offset=1e-2, solver=ConjugateGradient(rtol=1e-9), estimator=EXACT)
    assert found.error > 0 and found.estimate.certified
    assert found.estimate.value == pytest.approx(found.error, rel=1e-5)


def test_the_linear_part_alone_is_exact_once_the_span_is_full():
    problem = Quadratic(size=12, kappa=30.0)
    hparams, batches = problem.init_hparams(), StepBatches(problem, 0)
    flat, (solution, exact) = FlatProblem.of(problem, hparams), problem.exact()
    at = linearise(flat, LBFGS(), solution, hparams)
    watched = WatchedOperator(at.operator, EXACT.memory)
    at = dataclasses.replace(at, operator=watched)  # then everything that solves with it is watched
    _, rhs, _ = outer_gradients(flat, solution, hparams, batches)
    adjoint = ConjugateGradient(rtol=1e-12).compute(watched, rhs).value
    adjoint = adjoint + 0.1 * torch.linspace(-1, 1, 12, dtype=DTYPE)  # an adjoint that is wrong in every direction
    gradient = {"penalty": -at.mixed(adjoint)["penalty"]}
    estimate = EXACT.estimate(at, LBFGS(), batches, Solved(watched, rhs, adjoint, gradient), problem.lower)
    error = float((gradient["penalty"] - exact).norm())
    assert estimate.value == pytest.approx(error, rel=1e-6) and estimate.linear == pytest.approx(error, rel=1e-6)
    assert estimate.inner < 1e-6 * error


def test_a_bent_hessian_is_followed_to_second_order():
    problem = Quartic(size=12)
    truth = problem.exact()
    gaps = []
    for offset in (1e-2, 1e-3):
        found = measure(problem, offset, ConjugateGradient(rtol=1e-11), EXACT, truth=truth)
        gaps.append(abs(found.estimate.value / found.error - 1))
    assert gaps[0] < 0.1 and gaps[1] < 0.2 * gaps[0]


def test_without_the_move_the_inner_error_is_missed(monkeypatch):
    def stay(self, shift):
        return original(self, torch.zeros_like(shift))

    original = error_estimate._Estimation._move
    monkeypatch.setattr(error_estimate._Estimation, "_move", stay)
    found = measure(Quadratic(size=12), offset=1e-2, solver=ConjugateGradient(rtol=1e-9), estimator=EXACT)
    assert found.estimate.value < 0.1 * found.error


# --- above the error elsewhere ----------------------------------------------------------------------------------------

CELLS = [
    (kappa, rtol, stop) for kappa in (30.0, 1e3, 1e4) for rtol in (1e-1, 1e-3, 1e-6) for stop in (1e-2, 1e-4, 1e-7)
]
DEFECTS = {"none": 1.0, "a quarter": 0.25, "no doubt": 1.0, "a bound far too high": 1.0}


@pytest.fixture(scope="module")
def ratios():
    """Estimate over error on many problems, as it is and with planted defects."""
    found = {name: [] for name in DEFECTS}
    for number, (kappa, rtol, stop) in enumerate(CELLS):
        for kind in (Quadratic, Quartic):
            problem = kind(size=30, kappa=kappa, shared=number % 2 == 1, seed=number)
            problem.bend = problem.lower**2  # the bound stays near the smallest curvature
            sound, low = (ErrorEstimator(), problem.lower), (ErrorEstimator(), 100 * problem.lower)
            estimators = [sound, sound, (ErrorEstimator(trust=1.0, doubt=0.0), problem.lower), low]
            results = outcomes(problem, estimators, solver=ConjugateGradient(rtol=rtol), stop=stop)
            for (name, scale), result in zip(DEFECTS.items(), results, strict=True):
                found[name].append(scale * result.ratio)
    return found


def coverage(found):
    return sum(ratio >= 1 for ratio in found) / len(found)


def test_nearly_all_errors_are_covered_and_few_are_overrated_much(ratios):
    assert coverage(ratios["none"]) >= 0.95
    assert statistics.median(ratios["none"]) <= 10


@pytest.mark.parametrize("defect", list(DEFECTS)[1:])
def test_a_planted_defect_shows_in_the_coverage(ratios, defect):
    assert coverage(ratios[defect]) < 0.95


@pytest.mark.parametrize(
    "solver",
    [
        MINRES(rtol=1e-3),
        NeumannSeries(rtol=1e-2, max_steps=2000),
        ConjugateGradient(rtol=None, max_steps=3),
        DenseCholesky(),
        IdentitySolver(),
    ],
    ids=lambda solver: type(solver).__name__,
)
@pytest.mark.parametrize("stop", [1e-6, 1e-2])
def test_any_symmetric_solver_will_do(solver, stop):
    for seed in range(4):
        found = measure(Quadratic(kappa=50.0, seed=seed), solver=solver, stop=stop)
        assert found.estimate.certified and 1 <= found.estimate.value / found.error <= 100


def test_with_tasks_it_is_the_error_of_the_mean():
    for seed in range(6):
        found = measure(Quadratic(tasks=4, seed=seed), solver=ConjugateGradient(rtol=1e-2), stop=1e-3)
        assert 1 <= found.estimate.value / found.error <= 30


# --- flags and messages -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lower", "certified"),
    [("declared", True), (None, False), (1e-9, True), (0.5, False)],
    ids=["declared", "none", "low", "high"],
)
def test_only_a_bound_that_nothing_contradicts_certifies(lower, certified):
    found = measure(Quadratic(), 1e-4, ConjugateGradient(rtol=1e-8), lower=lower)
    assert found.estimate.certified is certified and found.estimate.value >= found.error
    assert ("not certified" in str(found.estimate)) is not certified


def test_negative_curvature_is_not_certified():
    problem = Quadratic(size=10)
    problem.matrix = problem.matrix - 0.5 * torch.eye(10, dtype=DTYPE)
    found = measure(problem, 0.0, MINRES(rtol=1e-8))
    assert not found.estimate.certified and math.isfinite(found.estimate.value)


class Flow(Problem):
    """An optimality that is no gradient."""

    def init_hparams(self):
        return {"penalty": torch.tensor(1.0, dtype=DTYPE)}

    def init_params(self, hparams):
        return {"w": torch.zeros(2, dtype=DTYPE)}

    def optimality(self, params, hparams, batch):
        turn = torch.tensor([[1.0, 2.0], [-2.0, 1.0]], dtype=DTYPE)
        return {"w": turn @ params["w"] - hparams["penalty"]}

    def outer_loss(self, params, hparams, batch):
        return params["w"].square().sum()


def test_an_unsymmetric_operator_has_no_estimate():
    problem = Flow()
    hparams, batches = problem.init_hparams(), StepBatches(problem, 0)
    flat, point = FlatProblem.of(problem, hparams), torch.ones(2, dtype=DTYPE)
    at = linearise(flat, GradientDescent(), point, hparams)
    _, rhs, _ = outer_gradients(flat, point, hparams, batches)
    watched = WatchedOperator(at.operator, ErrorEstimator().memory)
    adjoint = GMRES().compute(watched.transpose(), rhs).value
    solved = Solved(watched, rhs, adjoint, at.mixed(adjoint))
    estimate = ErrorEstimator().estimate(at, GradientDescent(), batches, solved, 1.0)
    assert math.isnan(estimate.value) and not estimate.certified and estimate.num_mv == 0


def test_what_is_not_finite_has_no_estimate():
    problem = Quadratic()
    problem.goal = torch.full_like(problem.goal, torch.nan)
    estimate = measure(problem, truth=(torch.zeros(30, dtype=DTYPE), torch.zeros(30, dtype=DTYPE))).estimate
    assert math.isnan(estimate.value) and not estimate.certified


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": -0.1}, r"ErrorEstimator needs fraction in \[0, 1\], but got -0.1"),
        ({"memory": 0}, "ErrorEstimator needs memory >= 1, but got 0"),
        ({"trust": 0.5}, "ErrorEstimator needs trust >= 1 and doubt >= 0, but got trust=0.5"),
        ({"doubt": -1.0}, "doubt=-1.0"),
    ],
)
def test_settings_that_cannot_be(options, message):
    with pytest.raises(UsageError, match=message):
        ErrorEstimator(**options)


@pytest.mark.parametrize("lower", [0.0, -1.0, math.inf, math.nan])
def test_a_bound_that_cannot_be(lower):
    with pytest.raises(UsageError, match=r"needs lower_curvature > 0, but got .*: pass None"):
        measure(Quadratic(), lower=lower)


# --- cost -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rtol", [1e-1, 1e-4, 1e-9])
@pytest.mark.parametrize("offset", [0.0, 1e-1])
def test_the_cost_is_counted_and_kept_to(rtol, offset, monkeypatch):
    counts = {"linearise": 0, "outer": 0, "products": 0, "passes": 0}

    def counted(name, function):
        def call(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    for name, place, what in (
        ("linearise", error_estimate, "linearise"),
        ("outer", error_estimate, "outer_gradients"),
        ("passes", error_estimate, "grad"),
        ("passes", error_estimate.Linearisation, "mixed"),
        ("products", error_estimate._Estimation, "_product"),
        ("products", Subspace, "extend"),
    ):
        monkeypatch.setattr(place, what, counted(name, getattr(place, what)))
    found = measure(Quadratic(size=200, kappa=1e3), offset, ConjugateGradient(rtol=rtol))
    spent = (
        2 * counts["linearise"] + counts["outer"] + counts["products"] + counts["passes"] - 1
    )  # the hypergradient's own
    assert found.estimate.num_mv == spent
    assert spent <= max(CORRECTION, 0.22 * found.num_mv)
    if offset == 0 and rtol == 1e-1:
        assert spent < CORRECTION  # there is no inner error to speak of, and it is not paid for


def test_products_beyond_the_memory_are_forgotten():
    operator = WatchedOperator(MatrixOperator(torch.eye(3, dtype=DTYPE), SYMMETRIC), memory=2)
    assert operator.remembered()[0].shape == (0, 3)
    for number in range(4):
        operator.mv(torch.full((3,), float(number), dtype=DTYPE))
    assert operator.num_mv == 4 and operator.remembered()[0][:, 0].tolist() == [2, 3]
    as_matrix(operator)  # made at once: kept together
    assert operator.num_mv == 7 and torch.equal(operator.remembered()[1], torch.eye(3, dtype=DTYPE))


def test_a_short_memory_costs_sharpness_not_safety():
    problem = Quadratic(size=60, kappa=1e4)
    long, short = (
        measure(problem, 1e-3, ConjugateGradient(rtol=1e-6), ErrorEstimator(memory=m, fraction=0.2)) for m in (200, 10)
    )
    assert long.ratio >= 1 and short.ratio >= 1
    assert short.estimate.num_mv > long.estimate.num_mv


# --- the subspace -----------------------------------------------------------------------------------------------------


def symmetric(size=8, batch=(), seed=0, shift=3.0):
    draw = torch.Generator().manual_seed(seed)
    half = torch.randn(*batch, size, size, generator=draw, dtype=DTYPE)
    return half + half.mT + shift * size**0.5 * torch.eye(size, dtype=DTYPE)


@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize("shift", [3.0, 0.0], ids=["definite", "indefinite"])
def test_a_subspace_solves_by_projection(batch, shift):
    matrix = symmetric(batch=batch, shift=shift)
    draw = torch.Generator().manual_seed(1)
    vectors, rhs = (torch.randn(*batch, *shape, generator=draw, dtype=DTYPE) for shape in ((4, 8), (8,)))
    space = Subspace(
        torch.cat([vectors, 5 * vectors[..., :2, :]], -2), torch.cat([vectors, 5 * vectors[..., :2, :]], -2) @ matrix
    )
    assert space.vectors.shape[-2] == 4  # the dependent ones are left out
    basis = torch.linalg.qr(vectors.mT)[0]
    inner = torch.linalg.solve(basis.mT @ matrix @ basis, basis.mT @ rhs.unsqueeze(-1))
    solution, residual = space.solve(rhs)
    torch.testing.assert_close(solution, (basis @ inner).squeeze(-1))
    torch.testing.assert_close(residual, rhs - (matrix @ solution.unsqueeze(-1)).squeeze(-1))
    values = torch.linalg.eigvalsh(basis.mT @ matrix @ basis)
    assert space.definite == bool((values > 0).all())
    torch.testing.assert_close(space.smallest, values.abs().amin(-1))


def test_a_subspace_grows_until_it_holds_everything():
    matrix = symmetric()
    operator = MatrixOperator(matrix, SYMMETRIC)
    rhs = torch.linspace(-1, 2, 8, dtype=DTYPE)
    space = Subspace(rhs.unsqueeze(0), (matrix @ rhs).unsqueeze(0))
    before = math.inf
    for _ in range(7):
        solution, residual = space.solve(rhs)
        gap = solution - torch.linalg.solve(matrix, rhs)
        assert float(gap @ matrix @ gap) < before and not space.full
        before = float(gap @ matrix @ gap)
        space.extend(operator, residual)
    assert space.full
    torch.testing.assert_close(space.solve(rhs)[0], torch.linalg.solve(matrix, rhs))
    torch.testing.assert_close(space.smallest, torch.linalg.eigvalsh(matrix)[0])


def test_directions_that_rounding_makes_dependent_do_no_harm():
    matrix = torch.diag(torch.logspace(-7, 0, 20, dtype=DTYPE))
    watched = WatchedOperator(MatrixOperator(matrix, SYMMETRIC), memory=1000)
    rhs = torch.ones(20, dtype=DTYPE)
    ConjugateGradient(rtol=1e-10).compute(watched, rhs)
    assert watched.num_mv > 40  # more than the space has dimensions: rounding has spoilt the conjugacy
    other = torch.linspace(-1, 1, 20, dtype=DTYPE)
    torch.testing.assert_close(
        Subspace(*watched.remembered()).solve(other)[0], other / matrix.diagonal(), rtol=1e-4, atol=0
    )
