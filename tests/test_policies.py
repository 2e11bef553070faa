"""Policies: negative curvature, inner solves that end early, numbers that are not finite, and numbers that are all error."""

import math
from dataclasses import replace

import pytest
import torch

from bilevel import Positive, Problem, fit, hypergradient_at
from bilevel.errors import ConvergenceWarning, NumericalError, UsageError
from bilevel.hypergradient import Implicit, ImplicitUpdate, Unrolled, unconverged
from bilevel.hypergradient import negative_curvature as curvature
from bilevel.hypergradient.negative_curvature import SwitchToMINRES
from bilevel.linalg import (
    GMRES,
    LSMR,
    MINRES,
    AutoSolver,
    BiCGStab,
    ConjugateGradient,
    DenseCholesky,
    DenseLU,
    NeumannSeries,
)
from bilevel.preconditioner import LBFGSPairs
from bilevel.solvers import LBFGS, Adam, GradientDescent
from bilevel.trainer import Trainer
from bilevel.trainer.nonfinite import Raise, Skip
from bilevel.trainer.worthless import Apply, Shrink, Worthless

DIAGONAL = torch.tensor([3.0, 1.0, -0.5, 2.0], dtype=torch.float64)


pytestmark = pytest.mark.usefixtures("float64")


class Saddle(Problem):
    """`x'Dx/2 - th'x` with an indefinite `D`: the stationary point is `D^-1 th`; the solver starts there."""

    diagonal = DIAGONAL

    def init_hparams(self):
        return {"th": torch.tensor([1.0, -2.0, 0.5, 0.25])}

    def init_params(self, hparams):
        return {"x": hparams["th"] / self.diagonal}

    def inner_loss(self, params, hparams, batch):
        return (self.diagonal * params["x"].square()).sum() / 2 - (hparams["th"] * params["x"]).sum()

    def outer_loss(self, params, hparams, batch):
        return (params["x"] - 1.0).square().sum() / 2

    def closed_form(self, damping=0.0):
        x = self.init_hparams()["th"] / self.diagonal
        return (x - 1.0) / (self.diagonal + damping)


class Tasks(Saddle):
    """Two systems, of which only the first is indefinite."""

    num_tasks = 2

    def __init__(self):
        self.diagonals = torch.stack([DIAGONAL, DIAGONAL.abs()])

    def inner_batches(self, step, inner_step):
        return self.diagonals

    def outer_batches(self, step, inner_step):
        return self.diagonals

    def init_params(self, hparams):
        return {"x": torch.zeros(4)}

    def inner_loss(self, params, hparams, batch):
        return (batch * params["x"].square()).sum() / 2 - (hparams["th"] * params["x"]).sum()


class Net(Problem):
    """A tanh unit at a point of negative curvature, made of outputs, their loss and a penalty."""

    def __init__(self):
        draw = torch.Generator().manual_seed(3)
        self.x, self.y = torch.randn(12, 3, generator=draw), torch.randn(12, generator=draw)

    def init_hparams(self):
        return {"penalty": torch.full((4,), 0.01)}

    def init_params(self, hparams):
        return {"w": torch.tensor([1.5, -1.0, 0.5]), "a": torch.tensor(2.0)}

    def outputs(self, params, hparams, batch):
        return params["a"] * torch.tanh(self.x @ params["w"])

    def output_loss(self, outputs, hparams, batch):
        return (outputs - self.y).square() / 2

    def penalty(self, params, hparams):
        return (hparams["penalty"] * torch.cat([params["w"], params["a"].reshape(1)]).square()).sum() / 2

    def outer_loss(self, params, hparams, batch):
        return (params["w"] - 1.0).square().sum() + params["a"].square()

    def gauss_newton(self):
        hparams = self.init_hparams()
        start = self.init_params(hparams)
        flat = torch.cat([start["w"], start["a"].reshape(1)])

        def outputs(x):
            return self.outputs({"w": x[:3], "a": x[3]}, hparams, None)

        jacobian = torch.func.jacrev(outputs)(flat)
        return flat, jacobian.T @ jacobian / len(self.x) + torch.diag(hparams["penalty"])


STAY = GradientDescent(max_steps=1, learning_rate=1e-300, atol=0.0)  # the point is the problem's own


def evaluate(problem, solver=STAY, **options):
    return hypergradient_at(problem, solver=solver, method=Implicit(**options))


def test_minres_goes_on_where_conjugate_gradient_stops_and_is_exact():
    found = evaluate(Saddle(), negative_curvature=SwitchToMINRES())
    torch.testing.assert_close(found.gradient["th"], Saddle().closed_form(), rtol=1e-6, atol=1e-8)
    assert found.receipt.linear_result == "converged" and found.receipt.curvature_min < 0 and not found.receipt.biased
    alone = evaluate(Saddle(), linear_solver=MINRES())
    assert found.receipt.num_mv > alone.receipt.num_mv  # those of conjugate gradient count


SOLVERS = [
    ConjugateGradient(rtol=1e-12), DenseCholesky(), MINRES(rtol=1e-12), DenseLU(), GMRES(rtol=1e-12), BiCGStab(rtol=1e-12),
    LSMR(rtol=1e-12), AutoSolver(rtol=1e-12), AutoSolver(rtol=1e-12, dense_size=0),
]  # fmt: skip


@pytest.mark.parametrize("method", [Implicit, ImplicitUpdate], ids=lambda m: m.__name__)
@pytest.mark.parametrize("estimate", [True, False], ids=["watched", "not watched"])
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_raise_stops_whatever_the_linear_solver(solver, estimate, method):
    options = {} if estimate or method is ImplicitUpdate else {"error_estimate": None}
    policy = method(linear_solver=solver, negative_curvature=curvature.Raise(), **options)
    with pytest.raises(NumericalError, match=r"expected to be positive definite.*has negative curvature.*minres"):
        hypergradient_at(Saddle(), solver=STAY, method=policy)
    sound = Saddle()
    sound.diagonal = DIAGONAL.abs()
    found = hypergradient_at(sound, solver=STAY, method=policy)
    torch.testing.assert_close(found.gradient["th"], sound.closed_form(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_whoever_meets_it_is_exact_after_minres(solver):
    found = evaluate(Saddle(), linear_solver=solver)
    torch.testing.assert_close(found.gradient["th"], Saddle().closed_form(), rtol=1e-6, atol=1e-8)
    assert found.receipt.linear_result == "converged" and found.receipt.curvature_min < 0


def test_the_implicit_update_has_the_policies_too():
    damped = hypergradient_at(Saddle(), solver=STAY, method=ImplicitUpdate(negative_curvature=curvature.Damp()))
    (reason,) = damped.receipt.biased
    damping = float(reason.rpartition(" ")[2])
    torch.testing.assert_close(damped.gradient["th"], Saddle().closed_form(damping), rtol=2e-2, atol=0)
    net = Net()
    swap = ImplicitUpdate(linear_solver=ConjugateGradient(rtol=1e-12), negative_curvature=curvature.GaussNewton())
    expected = evaluate(net, linear_solver=ConjugateGradient(rtol=1e-12), negative_curvature=curvature.GaussNewton())
    found = hypergradient_at(net, solver=STAY, method=swap)
    torch.testing.assert_close(found.gradient, expected.gradient, rtol=1e-8, atol=1e-10)
    with pytest.raises(NumericalError, match="ended with max_steps after 5 steps"):
        hypergradient_at(Bowl(), solver=SHORT, method=ImplicitUpdate(unconverged=unconverged.Raise()))
    with pytest.warns(ConvergenceWarning, match="ended with max_steps after 5 steps"):
        hypergradient_at(Bowl(), solver=SHORT, method=ImplicitUpdate())
    more = hypergradient_at(
        Bowl(), solver=SHORT, method=ImplicitUpdate(unconverged=unconverged.MoreSteps(max_rounds=99))
    )
    assert more.receipt.inner_result == "converged"


def test_damping_that_runs_out_says_that_it_is_not_positive_definite_yet():
    problem = Saddle()
    problem.diagonal = torch.tensor([3.0, 1.0, -1e3, -2e3])
    with pytest.warns(ConvergenceWarning, match="ended with negative_curvature"):
        found = evaluate(problem, linear_solver=Blunt(), negative_curvature=curvature.Damp(max_rounds=1))
    assert found.receipt.linear_result == "negative_curvature"


class Blunt(DenseLU):
    """Reports a thousandth of the curvature."""

    def compute(self, state, vector, **options):
        solution = super().compute(state, vector, **options)
        return replace(solution, curvature_min=solution.curvature_min / 1000)


@pytest.mark.parametrize(
    "solver", [ConjugateGradient(rtol=1e-12), DenseCholesky(), GMRES(rtol=1e-12)], ids=lambda s: type(s).__name__
)
def test_damping_solves_the_damped_system_and_says_so(solver):
    found = evaluate(Saddle(), linear_solver=solver, negative_curvature=curvature.Damp(factor=1.5))
    (reason,) = found.receipt.biased
    damping = float(reason.rpartition(" ")[2])
    assert reason.startswith("negative curvature: the Hessian is damped by") and 0.5 < damping < 2.5
    expected = Saddle().closed_form(damping)
    torch.testing.assert_close(found.gradient["th"], expected, rtol=5e-3 / 0.25, atol=0)  # the reason has three digits
    assert found.receipt.linear_result == "converged" and found.receipt.curvature_min < 0
    assert found.receipt.damping == pytest.approx(damping, rel=5e-3)
    left = damping * expected.norm() / (DIAGONAL * expected + damping * expected).norm()  # c ‖y‖ / ‖(D + c) y‖
    assert found.receipt.linear_residual == pytest.approx(float(left), rel=2e-2)


def test_only_the_indefinite_systems_of_a_batch_are_damped():
    problem, hparams = Tasks(), Tasks().init_hparams()["th"]
    start = {"x": hparams / DIAGONAL}
    problem.init_params = lambda hparams: start
    found = evaluate(problem, linear_solver=ConjugateGradient(rtol=1e-12), negative_curvature=curvature.Damp())
    plain = evaluate(problem, linear_solver=MINRES(rtol=1e-12))
    alone = (start["x"] - 1) / DIAGONAL.abs() / 2
    first = plain.gradient["th"] - alone  # the part of the indefinite system, undamped
    assert not torch.allclose(found.gradient["th"] - alone, first, rtol=1e-2)
    damping = float(found.receipt.biased[0].rpartition(" ")[2]) if len(found.receipt.biased) == 1 else None
    reasons = [reason for reason in found.receipt.biased if "damped" in reason]
    damping = float(reasons[0].rpartition(" ")[2])
    torch.testing.assert_close(
        found.gradient["th"] - alone, (start["x"] - 1) / (DIAGONAL + damping) / 2, rtol=2e-2, atol=0
    )


def test_gauss_newton_takes_the_hessians_place():
    problem = Net()
    flat, matrix = problem.gauss_newton()
    found = evaluate(problem, linear_solver=ConjugateGradient(rtol=1e-12), negative_curvature=curvature.GaussNewton())
    assert found.receipt.biased == ("negative curvature: the Gauss-Newton matrix stands for the Hessian",)
    outer = torch.cat([2 * (flat[:3] - 1), 2 * flat[3:]])
    expected = -flat * torch.linalg.solve(matrix, outer)  # the mixed derivative of the penalty is diag(x)
    torch.testing.assert_close(found.gradient["penalty"], expected, rtol=1e-8, atol=1e-10)


def test_gauss_newton_needs_outputs():
    with pytest.raises(UsageError, match=r"outputs and output_loss.*Saddle defines inner_loss as a whole"):
        evaluate(Saddle(), negative_curvature=curvature.GaussNewton())


@pytest.mark.parametrize("policy", [curvature.Raise(), curvature.Damp(), curvature.GaussNewton(), SwitchToMINRES()])
def test_no_policy_is_asked_without_negative_curvature(policy):
    problem = Saddle()
    problem.diagonal = DIAGONAL.abs()
    found = evaluate(problem, negative_curvature=policy)
    torch.testing.assert_close(found.gradient["th"], problem.closed_form(), rtol=1e-6, atol=1e-8)
    assert not found.receipt.biased


@pytest.mark.parametrize("options", [{"factor": 1.0}, {"factor": math.nan}, {"max_rounds": 0}])
def test_damping_that_cannot_grow_is_refused(options):
    with pytest.raises(UsageError, match="Damp needs factor > 1 and max_rounds >= 1"):
        curvature.Damp(**options)


# --- what is no part ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda: Implicit(linear_solver="cg"),
            "Implicit needs linear_solver to be a LinearSolver, but got 'cg': give an object.*linear_solver=cg",
        ),
        (lambda: Implicit(linear_solver=MINRES), r"but got the class MINRES: write MINRES\(\)"),
        (lambda: Implicit(negative_curvature="raise"), "negative_curvature to be a NegativeCurvature"),
        (lambda: Implicit(unconverged=None), "unconverged to be an Unconverged, but got None"),
        (lambda: Implicit(compile="yes"), "compile to be true or false, but got 'yes'"),
        (lambda: Implicit(error_estimate=0.1), "error_estimate to be an ErrorEstimator"),
        (lambda: Implicit(accuracy="adaptive"), "accuracy to be an Accuracy"),
        (lambda: ImplicitUpdate(linear_solver="cg"), "ImplicitUpdate needs linear_solver"),
        (lambda: LBFGSPairs(base="nystrom"), "LBFGSPairs needs base to be a Preconditioner"),
        (lambda: Trainer(nonfinite="skip"), "Trainer needs nonfinite to be a Nonfinite"),
        (lambda: Trainer(worthless=Shrink), r"but got the class Shrink: write Shrink\(\)"),
    ],
)
def test_a_text_or_a_class_in_the_place_of_a_part_is_refused(make, said):
    with pytest.raises(UsageError, match=said):
        make()


def test_annotations_for_type_checkers_only_do_no_harm():
    class Mine(Implicit):
        extra: "OnlyForMypy" = 3  # noqa: F821

    assert Mine().extra == 3


# --- unconverged inner solves -----------------------------------------------------------------------------------------


class Bowl(Problem):
    """`(1 + penalty) x² / 2 - x`; gradient descent with rate 0.1 shrinks the error by a known factor a step."""

    constraints = {"penalty": Positive()}

    def init_hparams(self):
        return {"penalty": torch.tensor(1.0)}

    def init_params(self, hparams):
        return {"x": torch.zeros(1)}

    def inner_loss(self, params, hparams, batch):
        return ((1 + hparams["penalty"]) * params["x"].square() / 2 - params["x"]).sum()

    def outer_loss(self, params, hparams, batch):
        return (params["x"] - 2).square().sum()


SHORT = GradientDescent(max_steps=5, learning_rate=0.1, atol=1e-9)


def test_warn_goes_on_and_tells_the_figures():
    with pytest.warns(
        ConvergenceWarning, match=r"expected to reach atol=1e-09.*max_steps after 5 steps at a gradient norm"
    ):
        found = evaluate(Bowl(), solver=SHORT, unconverged=unconverged.Warn())
    assert found.receipt.inner_result == "max_steps" and found.receipt.inner_steps == 5 and not found.receipt.biased


def test_raise_stops_at_an_unconverged_solve():
    with pytest.raises(NumericalError, match="ended with max_steps after 5 steps.*unconverged=more_steps"):
        evaluate(Bowl(), solver=SHORT, unconverged=unconverged.Raise())


def test_more_steps_is_one_long_solve():
    solver = replace(SHORT, momentum=0.5)
    found = evaluate(Bowl(), solver=solver, unconverged=unconverged.MoreSteps(max_rounds=30))
    whole = evaluate(Bowl(), solver=replace(solver, max_steps=1000))
    assert found.receipt == whole.receipt and found.receipt.inner_result == "converged"
    assert torch.equal(found.params["x"], whole.params["x"])


def test_more_steps_ends_after_its_rounds_and_says_so():
    with pytest.warns(ConvergenceWarning, match="max_steps after 15 steps.*or more rounds"):
        found = evaluate(Bowl(), solver=SHORT, unconverged=unconverged.MoreSteps(max_rounds=2))
    assert (
        found.receipt.inner_steps == found.receipt.inner_gradients == 15 and found.receipt.inner_result == "max_steps"
    )


@pytest.mark.parametrize(
    "solver", [SHORT, replace(SHORT, momentum=0.5), Adam(max_steps=5, atol=1e-9)], ids=["plain", "momentum", "Adam"]
)
@pytest.mark.parametrize("last", [3, 7], ids="{} steps".format)
def test_truncated_unrolling_goes_on_from_the_solvers_own_state(solver, last):
    found = evaluate(Bowl(), solver=solver, unconverged=unconverged.TruncatedUnroll(last=last))
    expected = hypergradient_at(Bowl(), solver=replace(solver, max_steps=5 + last), method=Unrolled(last=last))
    torch.testing.assert_close(found.gradient, expected.gradient, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.params, expected.params, rtol=1e-12, atol=0)
    assert found.receipt.inner_steps == found.receipt.inner_gradients == 5 + last
    assert any(f"its last {last} steps are unrolled" in reason for reason in found.receipt.biased)


def test_truncated_unrolling_needs_a_recordable_solver():
    with pytest.raises(UsageError, match="TruncatedUnroll records inner steps, but LBFGS is not differentiable"):
        evaluate(Bowl(), solver=LBFGS(), unconverged=unconverged.TruncatedUnroll())


@pytest.mark.parametrize(
    "policy", [unconverged.Raise(), unconverged.Warn(), unconverged.MoreSteps(), unconverged.TruncatedUnroll()]
)
@pytest.mark.parametrize("solver", [replace(SHORT, atol=0.0), replace(SHORT, max_steps=1000)], ids=["budget", "solved"])
def test_no_policy_is_asked_of_a_solve_that_ended_as_asked_for(policy, solver, recwarn):
    found = evaluate(Bowl(), solver=solver, unconverged=policy)
    assert found.receipt.inner_result in ("budget_spent", "converged") and not found.receipt.biased
    assert not [one for one in recwarn if one.category is ConvergenceWarning]


@pytest.mark.parametrize(
    "make", [lambda: unconverged.MoreSteps(max_rounds=0), lambda: unconverged.TruncatedUnroll(last=0)]
)
def test_policies_refuse_no_steps(make):
    with pytest.raises(UsageError, match=">= 1, but got 0"):
        make()


# --- linear solves that fail --------------------------------------------------------------------------------------------


class Stiff(Saddle):
    """A minimum with many curvatures."""

    diagonal = torch.tensor([3.0, 1.0, 1e-3, 20.0], dtype=torch.float64)


@pytest.mark.parametrize("method", [Implicit, ImplicitUpdate], ids=lambda m: m.__name__)
def test_a_linear_solve_that_ends_short_is_announced(method):
    with pytest.warns(
        ConvergenceWarning, match=r"linear solve.*ended with max_steps after 2 products at a relative residual"
    ):
        found = hypergradient_at(Stiff(), solver=STAY, method=method(linear_solver=ConjugateGradient(max_steps=2)))
    assert found.receipt.linear_result == "max_steps"


def test_a_budget_is_as_asked_for(recwarn):
    evaluate(Stiff(), linear_solver=ConjugateGradient(rtol=None, max_steps=2))
    assert not [one for one in recwarn if one.category is ConvergenceWarning]


@pytest.mark.filterwarnings("ignore::bilevel.errors.ConvergenceWarning")
def test_a_linear_solve_that_diverges_is_not_applied():
    method = Implicit(linear_solver=NeumannSeries(step_size=1.0))
    result = fit(Stiff(), solver=STAY, hypergradient=method, trainer=Trainer(num_steps=9))
    assert [record["skipped"] for record in result.history] == [True] * 3
    assert result.history[0]["receipt.linear_result"] == "diverged"
    assert "none was applied (the linear solve: the iteration diverges" in result.summary["stopped_because"]
    with pytest.raises(NumericalError, match="but the linear solve ended with diverged"):
        fit(Stiff(), solver=STAY, hypergradient=method, trainer=Trainer(num_steps=9, nonfinite=Raise()))


# --- non-finite hypergradients ----------------------------------------------------------------------------------------


class Breaking(Bowl):
    """The outer loss is not finite from the third evaluation on, or the gradient is."""

    def __init__(self, what):
        self.what, self.calls = what, 0

    def outer_batches(self, step, inner_step):
        return torch.tensor(float(step))

    def outer_loss(self, params, hparams, batch):
        loss = (params["x"] - 2).square().sum()
        if self.what == "loss":
            return loss + torch.where(batch >= 2, torch.nan, 0.0)
        # The derivative of a root at zero is infinite, and zero times it is not a number.
        return loss + 0.0 * hparams["penalty"] * torch.where(batch >= 2, 0.0 * hparams["penalty"], 1.0).sqrt()


@pytest.mark.parametrize(
    ("what", "said"), [("loss", "the outer loss is nan"), ("gradient", "that of 'penalty' is not")]
)
def test_raise_stops_at_the_first_hypergradient_that_is_not_finite(what, said):
    with pytest.raises(NumericalError, match=f"hypergradient of step 2 was expected to be finite, but {said}"):
        fit(Breaking(what), trainer=Trainer(num_steps=9, nonfinite=Raise()))


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_skip_leaves_steps_out_and_ends_after_its_number_in_a_row(what):
    result = fit(Breaking(what), trainer=Trainer(num_steps=9, nonfinite=Skip(max_in_a_row=4)))
    assert [record["skipped"] for record in result.history] == [False, False, True, True, True, True]
    assert result.history[3]["hparams.penalty"] == result.history[5]["hparams.penalty"]
    assert "4 non-finite hypergradients in a row" in result.summary["stopped_because"]


@pytest.mark.parametrize("number", [0, 1.5])
def test_skip_needs_a_count(number):
    with pytest.raises(UsageError, match="Skip needs max_in_a_row"):
        Skip(max_in_a_row=number)


# --- hypergradients that are all error --------------------------------------------------------------------------------


class Erring(Implicit):
    """At outer step 3 the hypergradient is a thousand times what it is elsewhere, and its estimated error is `error` times that."""

    error = 1000.0

    def compute(self, problem, solver, params, hparams, batches, state):
        result = super().compute(problem, solver, params, hparams, batches, state)
        grown = 1000.0 if batches.step == 3 else 1.0
        gradient = {name: grown * part for name, part in result.gradient.items()}
        norm = torch.cat([part.flatten() for part in gradient.values()]).norm()
        error = self.error if batches.step == 3 else 0.1
        return replace(result, gradient=gradient, receipt=replace(result.receipt, error_estimate=float(error * norm)))


def penalties(worthless, method=None, num_steps=40):
    run = fit(
        Bowl(),
        solver=LBFGS(atol=1e-10),
        hypergradient=Erring() if method is None else method,
        optimizer=lambda raw: torch.optim.Adam(raw, lr=0.05),
        trainer=Trainer(num_steps=num_steps, worthless=worthless),
    )
    return run, torch.tensor([record["hparams.penalty"] for record in run.history])


def test_a_worthless_hypergradient_does_not_halt_adam():
    _, usual = penalties(Apply(), Implicit())
    run, shrunk = penalties(Shrink())
    _, applied = penalties(Apply())
    assert [record["step"] for record in run.history if record["shrunk"]] == [3]
    whole, kept, halted = (float((values[-1] - values[4]).abs()) for values in (usual, shrunk, applied))
    assert kept > 0.9 * whole and halted < 0.3 * whole


def test_shrinking_multiplies_by_the_square_of_the_limit_over_the_relative_error():
    shrink = Shrink(beyond=10.0)
    assert [shrink.scale(error) for error in (0.0, 10.0, 40.0, math.inf, math.nan)] == [1.0, 1.0, 0.0625, 0.0, 1.0]
    assert Apply().scale(1e9) == 1.0


def test_the_outer_optimiser_gets_what_the_policy_left(monkeypatch):
    class Third(Worthless):
        def scale(self, relative_error):
            return 1 / 3 if relative_error > 500 else 1.0

    def given(worthless):
        seen = []

        def optimizer(raw):
            made = torch.optim.SGD(raw, lr=1e-5)
            step = made.step
            made.step = lambda *args, **kwargs: (seen.append(float(raw[0].grad)), step(*args, **kwargs))[1]
            return made

        fit(Bowl(), solver=LBFGS(atol=1e-10), hypergradient=Erring(), optimizer=optimizer,
            trainer=Trainer(num_steps=4, worthless=worthless))  # fmt: skip
        return seen

    whole, third = given(Apply()), given(Third())
    assert whole[:-1] == third[:-1] and third[-1] == pytest.approx(whole[-1] / 3, rel=1e-12)


@pytest.mark.parametrize("beyond", [0.0, -1.0, math.inf, math.nan])
def test_shrink_needs_a_limit(beyond):
    with pytest.raises(UsageError, match="Shrink needs beyond > 0"):
        Shrink(beyond=beyond)
