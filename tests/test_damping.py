"""Damping of the inner Hessian by the tolerance of the linear solve: what it leaves, and what the receipt says of it."""

import math
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from stepping import along

from bilevel import Positive, Problem
from bilevel.errors import NumericalError
from bilevel.hypergradient import (
    AdaptiveAccuracy,
    AdaptiveDamping,
    Damping,
    DecreasingAccuracy,
    FixedAccuracy,
    Implicit,
    NoDamping,
)
from bilevel.hypergradient.damping import SLACK
from bilevel.hypergradient.negative_curvature import Raise, SwitchToMINRES
from bilevel.linalg import GMRES, MINRES, AutoSolver, ConjugateGradient, DenseCholesky, NeumannSeries
from bilevel.preconditioner import NoPreconditioner, Nystrom
from bilevel.result import Result, Solution
from bilevel.solvers import GradientDescent

pytestmark = pytest.mark.usefixtures("float64")


class Quadratic(Problem):
    """`x' H x / 2 + penalty' x² / 2 - c' x` with curvatures over four decades, judged at another point."""

    constraints = {"penalty": Positive()}

    def __init__(self, seed=0, n=60, shift=0.0):
        draw = torch.Generator().manual_seed(seed)
        basis = torch.linalg.qr(torch.randn(n, n, generator=draw)).Q
        values = torch.logspace(0, -4, n)
        values[-1] -= shift
        self.hessian = basis * values @ basis.T
        self.slope, self.wanted = torch.randn(2, n, generator=draw).unbind()

    def full(self, penalty):
        """The inner Hessian."""
        return self.hessian + torch.diag(penalty)

    def init_hparams(self):
        return {"penalty": torch.full((len(self.slope),), 1e-6)}

    def init_params(self, hparams):
        return {"x": torch.linalg.solve(self.full(hparams["penalty"]), self.slope)}

    def inner_loss(self, params, hparams, batch):
        x = params["x"]
        return x @ self.hessian @ x / 2 + (hparams["penalty"] * x.square()).sum() / 2 - self.slope @ x

    def outer_loss(self, params, hparams, batch):
        return (params["x"] - self.wanted).square().sum() / 2


CONTENT = GradientDescent(max_steps=1, atol=1e9)  # with what it is given: the problem starts at the solution


def made(problem, method, count=2):
    """Hypergradients at the solution, each step with the state of the one before."""
    return along(problem, method, CONTENT, [problem.init_hparams()] * count)


def theory(problem, x, damping=0.0):
    """The hypergradient by a dense solve: `-x ∘ (H + c I)^{-1} (x - wanted)`."""
    matrix = problem.full(problem.init_hparams()["penalty"]) + damping * torch.eye(len(x))
    return -x * torch.linalg.solve(matrix, x - problem.wanted)


ITERATIVE = AutoSolver(dense_size=0)


@dataclass(frozen=True)
class Fixed(Damping):
    """A number."""

    damping: float

    def value(self, state, rtol):
        return torch.tensor(self.damping)


SOLVERS = {
    "cg": ConjugateGradient,
    "minres": MINRES,
    "neumann": NeumannSeries,
    "auto": partial(AutoSolver, dense_size=0),
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    ("solver", "preconditioner"),
    [
        *((name, NoPreconditioner()) for name in SOLVERS),
        *((name, Nystrom(rank=20)) for name in ("cg", "minres", "auto")),
    ],
)
def test_the_damped_system_is_the_one_that_is_solved(solver, preconditioner, compiled):
    problem, damping = Quadratic(), 3e-2
    linear = SOLVERS[solver](rtol=1e-11, max_steps=5000)
    method = Implicit(linear_solver=linear, preconditioner=preconditioner, damping=Fixed(damping), compile=compiled)
    (result,) = made(problem, method, 1)
    expected, undamped = theory(problem, result.params, damping), theory(problem, result.params)
    torch.testing.assert_close(result.gradient["penalty"], expected, rtol=1e-7, atol=1e-9 * float(expected.norm()))
    assert float((expected - undamped).norm()) > 0.5 * float(undamped.norm())
    assert result.receipt.damping == damping and result.receipt.biased == ("the Hessian is damped by 0.03",)
    adjoint = -result.gradient["penalty"] / result.params
    left = problem.full(problem.init_hparams()["penalty"]) @ adjoint - (result.params - problem.wanted)
    assert result.receipt.linear_residual * float((result.params - problem.wanted).norm()) == pytest.approx(
        float(left.norm())
    )


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_what_damping_leaves_is_the_tolerance(seed):
    problem = Quadratic(seed)
    accuracy = DecreasingAccuracy(first_linear=0.1, decay=0.5)
    first, second = made(problem, Implicit(accuracy=accuracy, damping=AdaptiveDamping()))
    assert first.receipt.damping == 0.0 and first.receipt.biased == second.receipt.biased == ()
    rhs = second.params - problem.wanted
    adjoints = [-one.gradient["penalty"] / one.params for one in (first, second)]
    damping = second.receipt.damping
    assert damping == pytest.approx(0.05 * float(rhs.norm() / adjoints[0].norm()), rel=1e-9)
    left = problem.full(problem.init_hparams()["penalty"]) @ adjoints[1] - rhs
    assert float(left.norm()) <= second.receipt.linear_residual * float(rhs.norm()) <= 3 * 0.05 * float(rhs.norm())


@pytest.mark.parametrize("seed", [0, 1])
def test_the_error_estimate_counts_what_damping_leaves(seed):
    problem = Quadratic(seed)
    method = Implicit.auto(linear_solver=ITERATIVE)
    for result in made(problem, method, 6)[1:]:
        error = float((result.gradient["penalty"] - theory(problem, result.params)).norm())
        assert result.receipt.damping > 0 and result.receipt.error_estimate >= error


@pytest.mark.parametrize("goal", [1.0, 0.1, 0.01])
def test_damping_vanishes_with_the_error_that_is_allowed(goal):
    problem = Quadratic()
    last = made(problem, Implicit.auto(linear_solver=ITERATIVE, accuracy=AdaptiveAccuracy(relative_error=goal)), 12)[-1]
    truth = theory(problem, last.params)
    assert float((last.gradient["penalty"] - truth).norm() / truth.norm()) <= goal
    assert last.receipt.damping < 1e-3 * goal


@pytest.mark.parametrize(
    "method",
    [
        Implicit.auto(linear_solver=DenseCholesky()),
        Implicit.auto(),  # small: by Cholesky's factors
        Implicit.auto(linear_solver=ITERATIVE, accuracy=FixedAccuracy()),
        Implicit.auto(linear_solver=ITERATIVE, damping=NoDamping()),
    ],
    ids=["direct", "automatic and small", "the solver's own tolerance", "none"],
)
def test_where_there_is_no_damping_the_number_is_the_theorems(method):
    problem = Quadratic()
    for result in made(problem, method, 3):
        assert result.receipt.damping == 0.0 and not result.receipt.biased
        truth = theory(problem, result.params)
        assert float((result.gradient["penalty"] - truth).norm()) <= 0.1 * float(truth.norm())


@pytest.mark.parametrize("seed", [0, 1, 3])
@pytest.mark.parametrize("solver", SOLVERS)
def test_where_the_hessian_is_indefinite_there_is_no_damping(solver, seed):
    problem = Quadratic(seed, n=24, shift=0.05)
    smallest = float(torch.linalg.eigvalsh(problem.full(problem.init_hparams()["penalty"]))[0])
    assert smallest < 0
    for damping in (-0.5 * smallest, -smallest, -1.5 * smallest):  # the second would make an eigenvalue zero
        linear = SOLVERS[solver](rtol=1e-10, max_steps=5000)
        method = Implicit(linear_solver=linear, damping=Fixed(damping), negative_curvature=Raise())
        with pytest.raises(NumericalError, match="has negative curvature"):
            made(problem, method, 1)
        (result,) = made(problem, replace(method, negative_curvature=SwitchToMINRES()), 1)
        assert result.receipt.damping == 0.0 and result.receipt.biased == ()
        assert smallest * 1.001 <= result.receipt.curvature_min < 0
        if solver != "neumann":  # which diverges, and leaves nothing to go on from
            expected = theory(problem, result.params)
            torch.testing.assert_close(
                result.gradient["penalty"], expected, rtol=1e-6, atol=1e-7 * float(expected.norm())
            )


@pytest.mark.parametrize("accuracy", [AdaptiveAccuracy(), DecreasingAccuracy()], ids=["adaptive", "decreasing"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_more_is_damped_than_the_tolerance_allows_when_the_hessian_changes(seed, accuracy):
    problem = Quadratic(seed)
    method = Implicit.auto(linear_solver=ITERATIVE, accuracy=accuracy)
    penalties = [torch.full_like(problem.slope, value) for value in (10.0, 10.0, 1.0, 0.1, 1e-2, 1e-3)]
    results = along(problem, method, CONTENT, [{"penalty": penalty} for penalty in penalties], warm=False)
    for penalty, result in zip(penalties[1:], results[1:], strict=True):
        truth = -result.params * torch.linalg.solve(problem.full(penalty), result.params - problem.wanted)
        assert result.receipt.linear_residual <= (SLACK + 1.0) * 0.1 + 1e-9
        assert float((result.gradient["penalty"] - truth).norm()) <= 0.5 * float(truth.norm())
    assert any(result.receipt.damping > 0 for result in results)


class Tasks(Problem):
    """Two diagonal quadratics, the curvature of the second one a thousandth of the first's."""

    num_tasks = 2

    def init_hparams(self):
        return {"shift": torch.zeros(40)}

    def init_params(self, hparams):
        return {"x": torch.ones(40)}

    def inner_batches(self, step, inner_step):
        return {"curvature": torch.stack([torch.logspace(0, -1, 40), torch.logspace(-3, -4, 40)])}

    outer_batches = inner_batches

    def inner_loss(self, params, hparams, batch):
        return (batch["curvature"] * (params["x"] - 1.0 - hparams["shift"]).square()).sum() / 2

    def outer_loss(self, params, hparams, batch):
        return (batch["curvature"][0] * (params["x"] - torch.arange(40.0)).square()).sum()


def test_each_task_has_its_own_damping():
    method = Implicit.auto(linear_solver=ITERATIVE, accuracy=DecreasingAccuracy(first_linear=0.1, decay=0.999))
    last = made(Tasks(), method, 4)[-1]
    assert 0 < last.receipt.linear_residual <= 0.3
    assert last.state["damping.size"].shape == (2,)
    ratio = last.state["damping.size"]
    assert float(ratio[1] / ratio[0]) == pytest.approx(1e-3, rel=0.1)


class Skew(Quadratic):
    """The same solution as that of an unsymmetric optimality."""

    def optimality(self, params, hparams, batch):
        return {"x": self.full(hparams["penalty"]) @ params["x"] + 0.0 * params["x"].roll(1) - self.slope}


def test_an_unsymmetric_system_is_not_damped():
    (result,) = made(Skew(n=20), Implicit(linear_solver=GMRES(rtol=1e-10), damping=Fixed(0.1)), 1)
    assert result.receipt.damping == 0.0 and result.receipt.biased == ()
    expected = theory(Skew(n=20), result.params)
    torch.testing.assert_close(result.gradient["penalty"], expected, rtol=1e-6, atol=1e-8 * float(expected.norm()))


def test_the_first_step_and_one_after_a_failure_have_nothing_to_go_by():
    damping = AdaptiveDamping()
    assert damping.value({}, 0.1) is None
    state = damping.learnt(torch.tensor([3.0, 4.0]), solved([0.0, 10.0]))
    assert float(damping.value(state, 0.1)) == pytest.approx(0.05) and damping.value(state, None) is None
    for value in ([0.0, 0.0], [math.nan, 1.0]):
        assert damping.value(damping.learnt(torch.ones(2), solved(value)), 0.1) is None
    assert damping.learnt(torch.ones(2), solved([1.0, 1.0], Result.max_steps)) == {}


def solved(value, result=Result.converged):
    """A solution."""
    zero = torch.zeros(())
    return Solution(torch.tensor(value), torch.tensor(result.code), torch.tensor(1), zero, zero, zero)
