"""The certificate: every planted fault is caught under its own name, and no sound problem is accused."""

import math
import re
from collections import OrderedDict

import numpy as np
import pytest
import torch
from few_shot import characters, conv
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, softplus

from bilevel import Box, Positive, Problem, Simplex, check, hypergradient_at
from bilevel.data import Sinusoid
from bilevel.diagnostics import Flaw, Verdict
from bilevel.diagnostics.curvature import spectrum
from bilevel.diagnostics.finding import Limits
from bilevel.diagnostics.resolved import Measured, discrepancy
from bilevel.diagnostics.subject import Subject, solve
from bilevel.errors import UsageError
from bilevel.hypergradient import AdaptiveAccuracy, ForwardMode, Implicit, OneStep, Unrolled
from bilevel.hypergradient.unconverged import Raise as StopUnconverged
from bilevel.linalg import (
    GMRES,
    MINRES,
    BiCGStab,
    ConjugateGradient,
    DenseCholesky,
    DenseLU,
    IdentitySolver,
    MatrixOperator,
)
from bilevel.meta import ProximalFewShot, Regression, RidgeFewShot
from bilevel.models import MLP
from bilevel.solvers import (
    LBFGS,
    AndersonAcceleration,
    GradientDescent,
    NewtonCG,
    Project,
    ProximalGradient,
    SoftThreshold,
)

CG = Implicit(linear_solver=ConjugateGradient(rtol=1e-9))
SOLVED = LBFGS(max_steps=2000, atol=1e-8)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Ridge(Problem):
    """The base of most cases: a penalty for each of four features."""

    constraints = {"penalty": Positive()}

    def __init__(self, features=4, seed=0):
        self.x, self.y = normal(30, features, seed=seed), normal(30, seed=seed + 1)
        self.x_val, self.y_val = normal(20, features, seed=seed + 2), normal(20, seed=seed + 3)

    def init_hparams(self):
        return {"penalty": torch.linspace(0.5, 2.0, self.x.shape[1]).to(self.x)}

    def init_params(self, hparams):
        return {"w": self.x.new_zeros(self.x.shape[1])}

    def data(self, batch):
        return self.x, self.y

    def inner_loss(self, params, hparams, batch):
        x, y = self.data(batch)
        return (x @ params["w"] - y).square().mean() + (hparams["penalty"] * params["w"].square()).sum()

    def outer_loss(self, params, hparams, batch):
        return (self.x_val @ params["w"] - self.y_val).square().mean()


class Net(Ridge):
    """A small network given as a module; `layer` is put between its two linear maps."""

    def __init__(self, *layers):
        super().__init__()
        torch.manual_seed(0)
        parts = [("first", torch.nn.Linear(4, 3)), *layers, ("last", torch.nn.Linear(3, 1))]
        self.model = torch.nn.Sequential(OrderedDict(parts))
        self.start = {name: value.detach().clone() for name, value in self.model.named_parameters()}

    def init_hparams(self):
        return {"penalty": torch.tensor(0.1)}

    def init_params(self, hparams):
        return dict(self.start)

    def predict(self, params, x):
        return torch.func.functional_call(self.model, params, (x,)).squeeze(-1)

    def inner_loss(self, params, hparams, batch):
        decay = sum(value.square().sum() for value in params.values())
        return (self.predict(params, self.x) - self.y).square().mean() + hparams["penalty"] * decay

    def outer_loss(self, params, hparams, batch):
        hidden = self.x_val @ params["first.weight"].mT + params["first.bias"]
        return (
            (torch.tanh(hidden) @ params["last.weight"].mT + params["last.bias"] - self.y_val[:, None]).square().mean()
        )


# --- planted faults ---------------------------------------------------------------------------------------------------


class FreshMinibatch(Ridge):
    def data(self, batch):
        index = torch.randint(len(self.x), (20,))
        return self.x[index], self.y[index]


class ImpureBatches(Ridge):
    def __init__(self):
        super().__init__()
        self.calls = 0
        self.inner_batches = self.draw

    def draw(self, step, inner_step):
        self.calls += 1
        return torch.randperm(len(self.x), generator=torch.Generator().manual_seed(self.calls))[:25]

    def data(self, batch):
        return self.x[batch], self.y[batch]


class Augmented(Ridge):
    def data(self, batch):
        return self.x + 0.1 * torch.randn_like(self.x), self.y


class AugmentedByNumpy(Ridge):
    def data(self, batch):
        return self.x + torch.as_tensor(np.random.randn(*self.x.shape)).to(self.x), self.y


_SHIFTS = np.random.default_rng(0)


class HiddenNoise(Ridge):
    def data(self, batch):
        return self.x + float(_SHIFTS.normal()), self.y


class InPlace(Ridge):
    def data(self, batch):
        return self.x.mul_(1.01), self.y


class Saddle(Ridge):
    """The second parameter stands on a ridge from which no gradient leads away."""

    def inner_loss(self, params, hparams, batch):
        w = params["w"]
        return super().inner_loss({"w": w * torch.tensor([1.0, 0.0, 1.0, 1.0])}, hparams, batch) - w[1].square()


class Disconnected(Ridge):
    def init_hparams(self):
        return {**super().init_hparams(), "momentum": torch.tensor(0.9)}


class OnlyTheStart(Ridge):
    def init_hparams(self):
        return {**super().init_hparams(), "start": torch.tensor(0.3)}

    def init_params(self, hparams):
        return {"w": hparams["start"].to(self.x) * torch.ones(4).to(self.x)}


class WrongOptimality(Ridge):
    """Forgets the factor two of the penalty, as one does by hand."""

    def optimality(self, params, hparams, batch):
        residual = self.x @ params["w"] - self.y
        return {"w": 2 * self.x.mT @ residual / len(self.y) + hparams["penalty"] * params["w"]}


class DetachedOptimality(Problem):
    """Right values, but one of its terms is cut from the graph."""

    def init_hparams(self):
        return {"a": torch.tensor([0.3, 0.6])}

    def init_params(self, hparams):
        return {"x": torch.zeros(2)}

    def optimality(self, params, hparams, batch):
        return {"x": params["x"] - 0.5 * torch.tanh(params["x"].detach()) - hparams["a"]}

    def outer_loss(self, params, hparams, batch):
        return params["x"].square().sum()


class Circle(Problem):
    """`x² + th² = 1` at x = 0, where x stops being a function of th."""

    def init_hparams(self):
        return {"th": torch.tensor(1.0)}

    def init_params(self, hparams):
        return {"x": torch.zeros(1)}

    def optimality(self, params, hparams, batch):
        return {"x": params["x"].square() + hparams["th"] ** 2 - 1.0}

    def outer_loss(self, params, hparams, batch):
        return (params["x"] - 2.0).square().sum()


class FlatDirection(Ridge):
    def inner_loss(self, params, hparams, batch):
        w = params["w"] * torch.tensor([1.0, 1.0, 0.0, 1.0]).to(self.x)
        return super().inner_loss({"w": w}, hparams, batch)


class Kink(Problem):
    """A ReLU whose argument is zero at the minimum."""

    def init_hparams(self):
        return {"th": torch.tensor([0.5, -1.0])}

    def init_params(self, hparams):
        return {"x": torch.zeros(2)}

    def inner_loss(self, params, hparams, batch):
        gap = params["x"] - hparams["th"]
        return torch.relu(gap).sum() + gap.square().sum() / 2

    def outer_loss(self, params, hparams, batch):
        return (params["x"] - 1.0).square().sum()


class Corner(Kink):
    """An absolute value whose minimum is its corner: `sign(0) = 0` makes both sides look alike."""

    def inner_loss(self, params, hparams, batch):
        x, th = params["x"], hparams["th"]
        return x[0].abs() + x[0].square() / 2 + (x[1] - th[1]).square() + (th[0] * x[1]).square()


class Cube(torch.autograd.Function):
    """`x³` whose second derivative is wrong."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * 3 * x.detach() * x  # its own derivative is 3 x instead of 6 x


class WrongBackward(Ridge):
    def inner_loss(self, params, hparams, batch):
        return super().inner_loss(params, hparams, batch) + Cube.apply(params["w"].square() + 1.0).sum() / 10


class DetachedPenalty(Ridge):
    def inner_loss(self, params, hparams, batch):
        scaled = hparams["penalty"] * hparams["penalty"].detach()
        x, y = self.data(batch)
        return (x @ params["w"] - y).square().mean() + (scaled * params["w"].square()).sum()


class NotFinite(Ridge):
    """One part of the problem that is finite at the starting point (zero), but not at the solution."""

    def __init__(self, part):
        super().__init__()
        self.part = part

    def inner_loss(self, params, hparams, batch):
        loss = super().inner_loss(params, hparams, batch)
        if self.part == "a Hessian product":
            loss = loss + (params["w"] * 0.0).abs().pow(1.5).sum()  # slope 0, curvature 0 * inf
        return loss

    def outer_loss(self, params, hparams, batch):
        w, loss = params["w"], super().outer_loss(params, hparams, batch)
        if self.part == "the outer loss":
            loss = loss + (1e-4 - w.square().sum()).log()
        if self.part == "its gradient":
            loss = loss + (w * 0.0).square().sum().sqrt()
        return loss


class NotFiniteBeside(Ridge):
    """A part of the outer loss that is defined up to the hyperparameters given."""

    def outer_loss(self, params, hparams, batch):
        total = self.init_hparams()["penalty"].sum() * (1 + 1e-12) - hparams["penalty"].sum()
        return super().outer_loss(params, hparams, batch) + torch.where(total >= 0, 0.0, torch.nan)


class Autocast(Ridge):
    """Rounds float32 to bfloat16; the certificate works in float64, which autocast leaves alone."""

    def inner_loss(self, params, hparams, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            fitted = self.x @ params["w"]
        return (fitted - self.y).square().mean() + (hparams["penalty"] * params["w"].square()).sum()


FAULTS = {
    "autocast in the loss": (Autocast, {}, Flaw.autocast, "matmul at test_certificate.py"),
    "outer loss not finite": (lambda: NotFinite("the outer loss"), {}, Flaw.nonfinite, "^outer_loss is not finite where"),
    "outer gradient not finite": (lambda: NotFinite("its gradient"), {}, Flaw.nonfinite, "^the gradient of outer_loss is not"),
    "Hessian not finite": (lambda: NotFinite("a Hessian product"), {}, Flaw.nonfinite, "^a product with the Hessian is not"),
    "not finite beside": (NotFiniteBeside, {}, Flaw.nonfinite, "hyperparameters beside those given"),
    "dropout on": (lambda: Net(("drop", torch.nn.Dropout(0.5))), {}, Flaw.dropout, "drop"),
    "tracked BatchNorm": (lambda: Net(("norm", torch.nn.BatchNorm1d(3))), {}, Flaw.tracked_batch_norm, "norm"),
    "fresh minibatch per product": (FreshMinibatch, {}, Flaw.fresh_minibatch, "randint"),
    "impure batches": (ImpureBatches, {"solver": GradientDescent()}, Flaw.fresh_minibatch, "inner_batches"),
    "augmentation noise": (Augmented, {}, Flaw.noise, "randn_like"),
    "augmentation by NumPy": (AugmentedByNumpy, {}, Flaw.noise, "NumPy"),
    "hidden noise": (HiddenNoise, {}, Flaw.hidden_randomness, "inner_loss"),
    "data changed in place": (InPlace, {}, Flaw.changed_in_place, "x"),
    "indefinite Hessian": (Saddle, {}, Flaw.indefinite_hessian, "-2"),
    "unconverged inner solve": (Ridge, {"solver": GradientDescent(max_steps=3)}, Flaw.unconverged_inner_solve, "max_steps"),
    "a budget too small": (Ridge, {"solver": GradientDescent(max_steps=3, atol=0.0)}, Flaw.unconverged_inner_solve, "3 steps"),
    "disconnected hyperparameter": (Disconnected, {}, Flaw.disconnected_hyperparameter, "'momentum'"),
    "only in the starting point": (OnlyTheStart, {}, Flaw.disconnected_hyperparameter, "'start'.*initial"),
    "wrong custom optimality": (
        WrongOptimality,
        {"solver": AndersonAcceleration(learning_rate=0.1, atol=1e-10), "hypergradient": Implicit(linear_solver=DenseLU())},
        Flaw.wrong_optimality, "gradient of inner_loss",
    ),
    "optimality cut from its graph": (
        DetachedOptimality,
        {"solver": AndersonAcceleration(learning_rate=0.5, atol=1e-10), "hypergradient": Implicit(linear_solver=DenseLU())},
        Flaw.wrong_optimality, "",
    ),
    "singular Hessian": (
        Circle, {"solver": GradientDescent(), "hypergradient": Implicit(linear_solver=DenseLU())}, Flaw.singular_hessian, "",
    ),
    "flat direction": (FlatDirection, {}, Flaw.singular_hessian, "least eigenvalue"),
    "kink": (Kink, {"solver": GradientDescent(learning_rate=0.5, max_steps=500)}, Flaw.kink, "one side"),
    "corner": (Corner, {}, Flaw.kink, "jumps"),
    "policy that stops": (
        Ridge,
        {"solver": GradientDescent(max_steps=60, atol=1e-12), "hypergradient": Implicit(unconverged=StopUnconverged())},
        Flaw.stopped_by_policy, "ended with max_steps after 60 steps",
    ),
    "wrong backward": (WrongBackward, {}, Flaw.wrong_derivative, "finite differences"),
    "detached hyperparameter": (DetachedPenalty, {}, Flaw.wrong_mixed_product, "mixed product"),
    "linear solve too loose": (
        lambda: Ridge(12), {"hypergradient": Implicit(linear_solver=ConjugateGradient(rtol=None, max_steps=1))},
        Flaw.unsolved_linear_system, "budget_spent",
    ),
    "biased method": (Ridge, {"hypergradient": Implicit(linear_solver=IdentitySolver(0.1))}, Flaw.biased_method, "Identity"),
    "one step": (Ridge, {"solver": GradientDescent(max_steps=2000), "hypergradient": OneStep()}, Flaw.biased_method, "one inner"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_caught_under_its_own_name(name):
    make, options, flaw, place = FAULTS[name]
    torch.manual_seed(0)
    certificate = check(make(), **{"solver": SOLVED, "hypergradient": CG, **options})
    assert certificate.verdict is Verdict.fault
    assert list(certificate.found) == [flaw], certificate.found
    assert re.search(place, certificate.found[flaw])


def test_what_an_earlier_flaw_makes_meaningless_is_neither_passed_nor_failed():
    rows = {row.check: row for row in check(WrongBackward(), solver=SOLVED, hypergradient=CG).rows}
    sound = [row.check for row in check(Ridge(), solver=SOLVED, hypergradient=CG).rows]
    assert list(rows) == sound  # the keys of certificate.json do not depend on what was found
    method = rows["the method"]
    assert method.passed is None and "not judged: wrong_derivative" in method.figure
    assert method.as_json()["passed"] is None and rows["products repeat"].as_json()["passed"] is True


def test_where_a_part_is_not_finite_nothing_that_needs_it_is_judged():
    rows = {row.check: row for row in check(NotFinite("the outer loss"), solver=SOLVED, hypergradient=CG).rows}
    assert [name for name, row in rows.items() if row.judged] == [
        "losses are fixed functions", "hyperparameters reached", "finite at the solution",
    ]  # fmt: skip
    assert rows["finite at the solution"].passed is False


def test_extreme_eigenvalues_that_overflow_are_a_finding_and_no_traceback(monkeypatch):
    class Huge(Ridge):
        def inner_loss(self, params, hparams, batch):
            return 1e160 * super().inner_loss(params, hparams, batch)

    monkeypatch.setattr("bilevel.diagnostics.subject.MATRIX_LIMIT", 2)
    found = check(Huge(), solver=SOLVED, hypergradient=CG).found
    assert "extreme eigenvalues" in found[Flaw.nonfinite]


class Diagonal(Problem):
    """So many parameters, with the curvatures that it is given."""

    def __init__(self, curvatures):
        self.curvatures = curvatures

    def init_hparams(self):
        return {"target": torch.tensor(1.0)}

    def init_params(self, hparams):
        return {"w": torch.ones(len(self.curvatures))}  # solved

    def inner_loss(self, params, hparams, batch):
        return 0.5 * (self.curvatures * (params["w"] - hparams["target"]).square()).sum()

    def outer_loss(self, params, hparams, batch):
        return (params["w"] - 2.0).square().mean()


class Coupled(Diagonal):
    """No Hessian: each equation has the next unknown, too."""

    def optimality(self, params, hparams, batch):
        w = params["w"] - hparams["target"]
        return {"w": self.curvatures * (w + 0.3 * w.roll(-1))}


def subject(problem, seed):
    return Subject.of(problem, GradientDescent(learning_rate=0.5), CG, None, seed)


LOGSPACED = torch.logspace(-3, 0, 900, dtype=torch.float64)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("least", "flaw"),
    [
        (-1e-1, Flaw.indefinite_hessian),
        (-1e-4, Flaw.indefinite_hessian),
        (-1e-5, Flaw.indefinite_hessian),
        (-1e-6, Flaw.indefinite_hessian),
        (1e-5, None),
        (1e-13, Flaw.singular_hessian),
        (0.0, Flaw.singular_hessian),
    ],
)
def test_curvature_of_problems_too_large_for_a_matrix(least, flaw, seed, monkeypatch):
    monkeypatch.setattr("bilevel.diagnostics.subject.MATRIX_LIMIT", 800)
    curvatures = LOGSPACED.clone()
    curvatures[7] = least
    row = spectrum(subject(Diagonal(curvatures), seed), Limits(0.01))
    assert [one for one, _ in row.flaws] == ([flaw] if flaw else [])
    if flaw is Flaw.indefinite_hessian:
        said = float(row.flaws[0][1].split("eigenvalue ")[1].split(",")[0])
        assert said == pytest.approx(least, rel=1e-2)
    if flaw is None:
        assert "condition 1e+05" in row.figure


def test_singular_values_of_problems_too_large_for_a_matrix(monkeypatch):
    monkeypatch.setattr("bilevel.diagnostics.subject.MATRIX_LIMIT", 800)
    curvatures = torch.linspace(0.1, 1, 900, dtype=torch.float64)
    curvatures[7] = 1e-4
    matrix = curvatures.unsqueeze(1) * (torch.eye(900) + 0.3 * torch.eye(900).roll(1, 1))
    row = spectrum(subject(Coupled(curvatures), 0), Limits(0.01))
    condition = float(row.figure.split("condition ")[1])
    assert "singular values" in row.figure and row.flaws == ()
    assert condition == pytest.approx(float(torch.linalg.cond(matrix)), rel=0.05)  # printed to two digits


def test_a_condition_that_no_solve_has_confirmed_is_a_lower_bound(monkeypatch):
    monkeypatch.setattr("bilevel.diagnostics.subject.MATRIX_LIMIT", 800)
    monkeypatch.setattr("bilevel.diagnostics.subject.MINRES", lambda **kinds: MINRES(rtol=1e-11, max_steps=5))
    row = spectrum(subject(Diagonal(LOGSPACED), 0), Limits(0.01))
    assert "condition at least " in row.figure and row.flaws == ()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("inverse", ["of this matrix", "of one nearby", "of another", "of nothing"])
def test_an_inverse_saves_work_and_decides_nothing(inverse, transposed):
    curvatures = torch.linspace(0.1, 1, 900, dtype=torch.float64)
    identity = torch.eye(900, dtype=torch.float64)
    matrix = curvatures.unsqueeze(1) * (identity + 0.3 * identity.roll(1, 1))
    noise = torch.randn(900, 900, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    given = {
        "of this matrix": torch.linalg.inv(matrix),
        "of one nearby": torch.linalg.inv(matrix + 1e-4 * noise / 30),
        "of another": noise,
        "of nothing": torch.zeros_like(matrix),
    }[inverse]
    vector = torch.linspace(-1, 1, 900, dtype=torch.float64)
    of_coupled = subject(Coupled(curvatures), 0)
    at = of_coupled.linearise(torch.zeros(900, dtype=torch.float64), of_coupled.hparams)
    found = solve(at, vector, transposed=transposed, inverse=MatrixOperator(given))
    wanted = torch.linalg.solve(matrix.mT if transposed else matrix, vector)
    torch.testing.assert_close(found.value, wanted, rtol=1e-9, atol=1e-9)
    assert (int(found.num_mv) < 10) == inverse.endswith(("this matrix", "nearby"))


def test_a_number_that_is_not_finite_is_no_small_discrepancy():
    class At:
        raw_floor = 0.0

    measured = [Measured(torch.tensor([1.0, 0.0]), 1.0), Measured(torch.tensor([0.0, 1.0]), math.nan)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bilevel.diagnostics.resolved.pull_to_raw", lambda subject, gradient: gradient)
        assert math.isnan(discrepancy(At(), measured, torch.ones(2)))
        assert discrepancy(At(), [Measured(torch.tensor([1.0, 0.0]), 0.0)], torch.zeros(2)) == 0.0


def test_the_method_is_compared_with_finite_differences_too():
    def figure(method):
        row = next(row for row in check(Ridge(), solver=SOLVED, hypergradient=method).rows if row.check == "the method")
        return [float(number) for number in re.findall(r"[\d.]+(?:e-?\d+)?(?= from finite|,)", row.figure)]

    exact, from_differences = figure(CG)
    assert exact < 1e-6 and from_differences < 1e-6
    exact, from_differences = figure(Implicit(linear_solver=IdentitySolver(0.1)))
    assert exact > 0.1 and from_differences > 0.1


@pytest.mark.parametrize("share", [1e-2, 1e-3, 1e-4])
def test_a_wrong_derivative_shows_however_small_beside_the_others(share):
    class TwoScales(Ridge):
        def __init__(self, cut):
            super().__init__()
            self.cut = cut

        def init_hparams(self):
            return {**super().init_hparams(), "small": self.x.new_tensor(1.0)}

        def inner_loss(self, params, hparams, batch):
            small = hparams["small"].detach() + 0 * hparams["small"] if self.cut else hparams["small"]
            return super().inner_loss(params, hparams, batch) + share * small * params["w"].square().sum()

    found = check(TwoScales(cut=True), solver=SOLVED, hypergradient=CG).found
    assert "finite differences of F in 'small' differ" in found[Flaw.wrong_mixed_product]
    assert check(TwoScales(cut=False), solver=SOLVED, hypergradient=CG).verdict is Verdict.sound


def test_where_tolerances_adapt_the_first_steps_of_a_run_are_told():
    def told(method):
        return next(
            row.figure for row in check(Ridge(300), hypergradient=method).rows if row.check == "the first outer steps"
        )

    loose = told(Implicit.auto(accuracy=AdaptiveAccuracy(first_linear=0.9, first_inner=0.9)))
    pattern = r"relative errors ([\d.e-]+) and ([\d.e-]+), .*; their receipts say ([\d.e+-]+) and ([\d.e+-]+)"
    first, second, said_first, said_second = map(float, re.search(pattern, loose).groups())
    assert said_first > first > 1e-4
    assert said_second > second > 1e-4
    assert told(CG) == "at the solvers' own tolerances, as above"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"hparams": {"pen": torch.ones(4)}}, r"hparams were expected to be \['penalty'\], but are \['pen'\]"),
        ({"hparams": {"penalty": torch.ones(3)}}, r"shape \(4,\)"),
        ({"hypergradient": Implicit}, r"is the class itself: write Implicit\(\)"),
        ({"solver": "lbfgs"}, "solver was expected to be an inner solver"),
        ({"tolerance": 0}, "tolerance above 0"),
        ({"tolerance": float("nan")}, "tolerance above 0"),
        ({"seconds": 0}, "seconds above 0"),
        ({"solver": GradientDescent(learning_rate="rate")}, "is 'rate'"),
    ],
)
def test_check_refuses_what_it_cannot_look_at(options, said):
    with pytest.raises(UsageError, match=said):
        check(Ridge(), **options)


def test_a_certificate_that_takes_too_long_is_given_up_wherever_it_is(monkeypatch):
    class Clock:
        """A second passes with each look at it."""

        now = 0.0

        def perf_counter(self):
            self.now += 1.0
            return self.now

    whole = Clock()
    monkeypatch.setattr("bilevel.diagnostics.deadline.time", whole)
    assert check(Logistic(), seconds=1e9).verdict is Verdict.sound
    places = set()
    for looks in (*range(8), whole.now - 2):
        monkeypatch.setattr("bilevel.diagnostics.deadline.time", Clock())
        with pytest.raises(UsageError, match="not done after .* seconds, while .*fewer tasks") as told:
            check(Logistic(), seconds=looks + 0.5)
        places.add(re.search("while ([a-z]+)", str(told.value))[1])
    assert places == {"refining", "solving", "comparing"}


# --- sound problems ---------------------------------------------------------------------------------------------------


class Logistic(Ridge):
    def inner_loss(self, params, hparams, batch):
        margin = torch.sign(self.y) * (self.x @ params["w"])
        return softplus(-margin).mean() + (hparams["penalty"] * params["w"].square()).sum()


class Softmax(Ridge):
    def init_params(self, hparams):
        return {"w": self.x.new_zeros(3, 4), "b": self.x.new_zeros(3)}

    def init_hparams(self):
        return {"penalty": {"w": torch.tensor(0.1), "b": torch.tensor(0.2)}}

    def inner_loss(self, params, hparams, batch):
        label = (self.y > 0).long() + (self.y > 1).long()
        decay = hparams["penalty.w"] * params["w"].square().sum() + hparams["penalty.b"] * params["b"].square().sum()
        return cross_entropy(self.x @ params["w"].mT + params["b"], label) + decay

    def outer_loss(self, params, hparams, batch):
        return cross_entropy(self.x_val @ params["w"].mT + params["b"], (self.y_val > 0).long())


class Poisson(Ridge):
    def inner_loss(self, params, hparams, batch):
        rate = self.x @ params["w"]
        return (rate.exp() - self.y.abs() * rate).mean() + (hparams["penalty"] * params["w"].square()).sum()


class Weights(Ridge):
    """A weight for each example, as in data cleaning."""

    constraints = {"weight": Box(0.0, 1.0)}

    def init_hparams(self):
        return {"weight": torch.full((30,), 0.5)}

    def inner_loss(self, params, hparams, batch):
        loss = (self.x @ params["w"] - self.y).square()
        return (hparams["weight"] * loss).mean() + 0.1 * params["w"].square().sum()


class Mixture(Ridge):
    constraints = {"mix": Simplex()}

    def init_hparams(self):
        return {"mix": torch.tensor([0.2, 0.3, 0.5])}

    def inner_loss(self, params, hparams, batch):
        losses = (self.x @ params["w"] - self.y).square().reshape(3, 10).mean(-1)
        return hparams["mix"] @ losses + 0.1 * params["w"].square().sum()


class Targets(Ridge):
    constraints = {}

    def init_hparams(self):
        return {"shift": torch.tensor(0.3), "scale": torch.ones(4)}

    def inner_loss(self, params, hparams, batch):
        return (self.x @ params["w"] - self.y - hparams["shift"]).square().mean() + 0.1 * (
            hparams["scale"].exp() * params["w"].square()
        ).sum()

    def outer_loss(self, params, hparams, batch):
        return super().outer_loss(params, hparams, batch) + 0.01 * hparams["shift"] ** 2


class IllConditioned(Ridge):
    def __init__(self):
        super().__init__(features=8)
        self.x = self.x * torch.logspace(0, -3, 8)

    def init_hparams(self):
        return {"penalty": torch.full((8,), 1e-6)}


class Tuned(Ridge):
    """Stands at its own outer optimum, where the hypergradient is rounding; `way` says what makes it zero."""

    def __init__(self, way):
        super().__init__()
        x, y = self.x.double(), self.y.double()
        gram = x.mT @ x / len(y) + torch.diag(self.init_hparams()["penalty"].double().expand(4))
        self.way, self.w = way, torch.linalg.solve(gram, x.mT @ y / len(y))
        self.slope = -torch.linalg.solve(gram, self.w)  # dw / d penalty, of a penalty that all weights share
        residual = torch.tensor([1.0, -2.0, 0.5, 1.5]).double()
        self.target = self.w - residual
        if way == "orthogonal":
            self.target = self.w - residual + (residual @ self.slope) / (self.slope @ self.slope) * self.slope
        if way == "dL/dx = 0":
            self.target = self.w

    def init_hparams(self):
        return {"penalty": torch.tensor(0.5)}

    def outer_loss(self, params, hparams, batch):
        loss = (params["w"] - self.target).square().sum()
        if self.way == "terms cancel":
            loss = loss - 2 * (self.w - self.target) @ self.slope * hparams["penalty"]
        return loss


class Ineffective(Ridge):
    """The hypergradient is exactly zero, and so are both of its terms."""

    def outer_loss(self, params, hparams, batch):
        return 0.0 * super().outer_loss(params, hparams, batch)


class AtTheEdge(Ridge):
    """Losses that are undefined outside the constraints, and hyperparameters that are nearly there."""

    constraints = {"small": Positive(), "weight": Box(0.0, 1.0)}

    def init_hparams(self):
        return {"small": torch.tensor(1e-7), "weight": torch.tensor([1e-6, 1.0 - 1e-6]).double()}

    def inner_loss(self, params, hparams, batch):
        w, weight = params["w"], hparams["weight"]
        pull = weight.sqrt().sum() * w[0] + (1.0 - weight).sqrt().sum() * w[1] + 1e3 * hparams["small"].sqrt() * w[2]
        return (self.x @ w - self.y).square().mean() + 0.1 * w.square().sum() + 0.1 * pull


class Equilibrium(Problem):
    """A deep equilibrium layer: an unsymmetric Jacobian, no loss."""

    def __init__(self):
        self.matrix = 0.3 * normal(5, 5, seed=4)

    def init_hparams(self):
        return {"input": torch.linspace(-1, 1, 5)}

    def init_params(self, hparams):
        return {"z": torch.zeros(5)}

    def optimality(self, params, hparams, batch):
        return {"z": params["z"] - torch.tanh(self.matrix @ params["z"] + hparams["input"])}

    def outer_loss(self, params, hparams, batch):
        return params["z"].square().sum() + hparams["input"].sum()


class BothGiven(Ridge):
    def optimality(self, params, hparams, batch):
        residual = self.x @ params["w"] - self.y
        return {"w": self.x.mT @ residual / len(self.y) + hparams["penalty"] * params["w"]}  # half the gradient


class Tasks(Ridge):
    num_tasks = 3

    def __init__(self):
        super().__init__()
        self.xs, self.ys = normal(3, 12, 4, seed=9), normal(3, 12, seed=10)

    def inner_batches(self, step, inner_step):
        return {"x": self.xs, "y": self.ys}

    def inner_loss(self, params, hparams, batch):
        residual = batch["x"] @ params["w"] - batch["y"]
        return residual.square().mean() + (hparams["penalty"] * params["w"].square()).sum()


class Plain(Ridge):
    """The inner problem of a lasso or a box, without its non-smooth term."""

    def init_hparams(self):
        return {"strength": torch.tensor(0.05)}

    constraints = {"strength": Positive()}

    def inner_loss(self, params, hparams, batch):
        return (self.x @ params["w"] - self.y).square().mean() + hparams["strength"] * params["w"].square().sum()


class Learned(Ridge):
    """A learning rate reaches only the iterate: its derivative at the solution is zero, and that is right."""

    def init_hparams(self):
        return {**super().init_hparams(), "rate": torch.tensor(0.1)}


class Attention(Ridge):
    def init_hparams(self):
        return {"penalty": torch.tensor(0.2)}

    def init_params(self, hparams):
        return {"q": 0.3 * normal(2, 2, seed=1).to(self.x), "v": normal(2, seed=2).to(self.x)}

    def predict(self, params, x):
        tokens = x.reshape(1, -1, 2, 2).transpose(1, 2)[0]
        mixed = torch.nn.functional.scaled_dot_product_attention(tokens @ params["q"], tokens, tokens)
        return (mixed @ params["v"]).sum(0)

    def inner_loss(self, params, hparams, batch):
        decay = sum(value.square().sum() for value in params.values())
        return (self.predict(params, self.x) - self.y).square().mean() + hparams["penalty"] * decay

    def outer_loss(self, params, hparams, batch):
        return (self.predict(params, self.x_val) - self.y_val).square().mean()


class Classifier(Ridge):
    def inner_loss(self, params, hparams, batch):
        logits = self.x @ params["w"]
        return (
            binary_cross_entropy_with_logits(logits, (self.y > 0).to(logits))
            + (hparams["penalty"] * params["w"].square()).sum()
        )


DESCENT = GradientDescent(learning_rate=0.1, momentum=0.5, max_steps=5000, atol=1e-10)
ANDERSON = AndersonAcceleration(learning_rate=0.2, atol=1e-11, max_steps=500)
GENERAL = Implicit(linear_solver=GMRES(rtol=1e-9))
SOUND = {
    "ridge": (Ridge, {}),
    "ridge, another seed": (lambda: Ridge(6, seed=50), {}),
    "logistic": (Logistic, {}),
    "softmax": (Softmax, {}),
    "Poisson": (Poisson, {"solver": NewtonCG(atol=1e-9)}),
    "example weights": (Weights, {}),
    "mixture on a simplex": (Mixture, {}),
    "shifted targets": (Targets, {}),
    "ill-conditioned": (IllConditioned, {"hypergradient": Implicit(linear_solver=DenseCholesky())}),
    "tuned, flat outer loss": (lambda: Tuned("dL/dx = 0"), {}),
    "tuned, orthogonal": (lambda: Tuned("orthogonal"), {}),
    "tuned, terms that cancel": (lambda: Tuned("terms cancel"), {}),
    "tuned, as a run begins": (lambda: Tuned("dL/dx = 0"), {"solver": LBFGS(), "hypergradient": Implicit.auto()}),
    "no effect at all": (Ineffective, {}),
    "at the edge of the constraints": (AtTheEdge, {}),
    "equilibrium": (Equilibrium, {"solver": ANDERSON, "hypergradient": GENERAL}),
    "equilibrium, BiCGStab": (Equilibrium, {"solver": ANDERSON, "hypergradient": Implicit(linear_solver=BiCGStab(rtol=1e-9))}),
    "optimality and loss": (BothGiven, {"solver": ANDERSON, "hypergradient": GENERAL}),
    "tasks": (Tasks, {"solver": DESCENT}),
    "lasso": (
        Plain, {"solver": ProximalGradient(proximal=SoftThreshold(0.05), learning_rate=0.1, max_steps=5000, atol=1e-11),
                "hypergradient": GENERAL},
    ),
    "box": (
        Plain, {"solver": ProximalGradient(proximal=Project(0.0, 0.2), learning_rate=0.1, max_steps=5000, atol=1e-11),
                "hypergradient": GENERAL},
    ),
    "unrolled to the end": (Ridge, {"solver": DESCENT, "hypergradient": Unrolled()}),
    "forward to the end": (Ridge, {"solver": DESCENT, "hypergradient": ForwardMode()}),
    "learning rate, unrolled": (
        Learned, {"solver": GradientDescent(learning_rate="rate", max_steps=3000, atol=1e-12), "hypergradient": Unrolled()},
    ),
    "tanh network": (lambda: Net(("act", torch.nn.Tanh())), {}),
    "layer normalisation": (lambda: Net(("norm", torch.nn.LayerNorm(3)), ("act", torch.nn.Tanh())), {}),
    "dropout switched off": (lambda: Net(("act", torch.nn.Tanh()), ("drop", torch.nn.Dropout(0.5).eval())), {}),
    "frozen BatchNorm": (lambda: Net(("norm", torch.nn.BatchNorm1d(3).eval()), ("act", torch.nn.Tanh())), {}),
    "attention": (Attention, {}),
    "classifier": (Classifier, {"solver": DESCENT}),
}  # fmt: skip


@pytest.mark.parametrize("name", SOUND)
@pytest.mark.parametrize("seed", [0, 1])
def test_no_sound_problem_is_accused(name, seed):
    make, options = SOUND[name]
    certificate = check(make(), **{"solver": SOLVED, "hypergradient": CG, "seed": seed, **options})
    assert certificate.found == {} and certificate.verdict is Verdict.sound


# --- verdicts and the command -----------------------------------------------------------------------------------------

UNSOLVED = {"solver": GradientDescent(max_steps=3), "hypergradient": CG}


def test_declared_findings_are_approximate_and_pass():
    certificate = check(Ridge(), **UNSOLVED, declared={"unconverged_inner_solve": "three steps on purpose"})
    assert certificate.verdict is Verdict.approximate and certificate.undeclared == [] == certificate.absent


def test_the_verdict_says_what_a_declared_finding_kept_from_being_judged():
    options = {"solver": GradientDescent(learning_rate=0.5, max_steps=500), "declared": {"kink": "a ReLU"}}
    certificate = check(Kink(), hypergradient=CG, **options)
    assert certificate.verdict is Verdict.approximate
    assert certificate.sentence == (
        "approximate as declared: what was found is what was declared; not judged for that reason: adjoint of the mixed "
        "product, inner problem solved, finite differences of the re-solved problem, the method, the first outer steps, "
        "all methods at the solution"
    )
    assert certificate.as_json()["not judged"] == certificate.not_judged and len(certificate.not_judged) == 6
    judged = check(Ridge(), **UNSOLVED, declared={"unconverged_inner_solve": "three steps on purpose"})
    assert judged.sentence.endswith("what was found is what was declared, and nothing else") and not judged.not_judged
    assert check(Ridge(), hypergradient=CG).sentence == "sound: every check passed"


def test_a_fault_near_an_outer_optimum_is_still_a_fault():
    """What counts as zero is a hundredth of the terms: a bias as large as one of them is no rounding."""
    biased = Implicit(linear_solver=IdentitySolver(0.1))
    found = check(Tuned("terms cancel"), solver=SOLVED, hypergradient=biased).found
    assert list(found) == [Flaw.biased_method]
    assert list(check(Tuned("orthogonal"), solver=SOLVED, hypergradient=biased).found) == [Flaw.biased_method]


def test_a_declared_finding_that_is_absent_fails():
    certificate = check(Ridge(), hypergradient=CG, declared={"kink": "there was a ReLU once"})
    assert certificate.verdict is Verdict.fault and certificate.absent == ["kink"] and not certificate.found


def test_a_declaration_of_something_else_does_not_cover_a_finding():
    certificate = check(Ridge(), **UNSOLVED, declared={"kink": "there was a ReLU once"})
    assert [flaw.name for flaw in certificate.undeclared] == ["unconverged_inner_solve"] and certificate.absent == [
        "kink"
    ]


def test_an_unknown_declaration_is_refused_by_name():
    with pytest.raises(UsageError, match="is 'unconverged_inner_solv': did you mean 'unconverged_inner_solve'"):
        check(Ridge(), declared={"unconverged_inner_solv": "typed wrongly"})


def test_the_problem_is_left_as_it_was():
    torch.manual_seed(3)
    problem = Net(("drop", torch.nn.Dropout(0.5)))
    expected = {name: value.clone() for name, value in problem.start.items()}
    check(problem, hypergradient=CG)
    assert problem.model.first.weight.dtype == torch.float32 and problem.x.dtype == torch.float32
    assert all(torch.equal(problem.start[name], value) for name, value in expected.items())
    assert problem.model.training


HESSIAN_METHODS = {
    "implicit_auto", "implicit_cg", "implicit_minres", "implicit_neumann", "implicit_update", "implicit_identity", "unrolled",
    "forward", "one_step", "finite_difference", "sama",
}  # fmt: skip


def test_errors_of_all_methods_fall_as_products_are_spent():
    certificate = check(Ridge(12), hypergradient=CG)
    assert set(certificate.methods) == HESSIAN_METHODS
    for name, points in certificate.methods.items():
        products, errors, measured = zip(*points, strict=True)
        assert list(products) == sorted(products), name
        assert all(0.03 * one - 1e-6 < other < 3 * one + 1e-6 for one, other in zip(errors, measured, strict=True)), (
            name
        )
        if len(points) > 1:
            assert errors[-1] < 1e-6 * errors[0], name
    neumann = {
        point.products - 8: point.error for point in certificate.methods["implicit_neumann"]
    }  # 8: for the step size
    assert all(
        neumann[one.products] == pytest.approx(one.error, rel=0.1) for one in certificate.methods["unrolled"][:-1]
    )
    assert certificate.rows[-1].passed and certificate.rows[-1].figure.startswith("11; ")


def test_methods_of_an_optimality_and_of_few_hyperparameters_are_shown():
    methods = check(Equilibrium(), solver=ANDERSON, hypergradient=GENERAL).methods
    assert {"implicit_gmres", "implicit_bicgstab", "implicit_lsmr", "forward", "one_step"} <= set(methods)
    assert not {"implicit_cg", "sama", "finite_difference"} & set(methods)
    assert min(point.error for point in methods["implicit_gmres"]) < 1e-9


EPISODES = {
    "ridge": lambda: RidgeFewShot(characters(), conv(), num_tasks=3),
    "proximal": lambda: ProximalFewShot(
        Sinusoid(), MLP(hidden=(6,), activation="tanh"), Regression(), num_tasks=3, strength=3.0
    ),
}


@pytest.mark.parametrize("name", EPISODES)
def test_methods_for_episodes_are_compared_at_the_solution_too(name):
    problem = EPISODES[name]().to(dtype=torch.float64)
    certificate = check(problem, solver=NewtonCG(atol=1e-11, max_steps=100), hypergradient=CG)
    assert certificate.verdict is Verdict.sound
    for name in ("implicit_auto", "implicit_cg", "implicit_minres", "implicit_update"):
        assert min(point.error for point in certificate.methods[name]) < 1e-5, name
    errors = [point.error for point in certificate.methods["unrolled"]]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.05


def test_one_hypergradient_that_is_exactly_zero_is_told_as_in_a_run(recwarn):
    found = hypergradient_at(Ridge(), method=CG)
    assert found.gradient["penalty"].any() and not recwarn.list
    with pytest.warns(
        UserWarning, match="whole hypergradient of 'penalty' is exactly zero.*multiplied by zero on its way"
    ):
        found = hypergradient_at(Ineffective(), method=CG)
    assert not found.gradient["penalty"].any()
