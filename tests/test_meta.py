"""Meta-gradients against closed forms and finite differences, tasks at once against tasks in a loop, and runs that go on."""

from __future__ import annotations

import functools
import itertools
import json
from dataclasses import replace

import pytest
import torch
from torch.autograd import grad

from bilevel import Positive, Problem, hypergradient_at
from bilevel.data import ClassEpisodes, Examples, Sinusoid
from bilevel.errors import UsageError
from bilevel.hypergradient import ForwardMode, Implicit, Unrolled
from bilevel.hypergradient.negative_curvature import Truncate
from bilevel.linalg import ConjugateGradient, HessianOperator, as_matrix
from bilevel.meta import (
    FewShot,
    FewShotEvaluation,
    FirstOrder,
    HeadFewShot,
    LearnedRateFewShot,
    ProximalFewShot,
    Regression,
    Reptile,
    RidgeFewShot,
    evaluate,
)
from bilevel.models import MLP, Conv4, FeatureNetwork, ModuleNetwork
from bilevel.solvers import LBFGS, GradientDescent, NewtonCG
from bilevel.trainer import Trainer, fit, run
from bilevel.trainer.setup import set_up
from bilevel.tree import flatten_names

pytestmark = pytest.mark.usefixtures("float64")
ADAM = functools.partial(torch.optim.Adam, lr=0.01)
EXACT = Implicit(warm_start=False, linear_solver=ConjugateGradient(rtol=1e-12), error_estimate=None)


def images(num_classes=10, side=8, seed=0):
    draw = torch.Generator().manual_seed(seed)
    prototypes = torch.randint(0, 256, (num_classes, 1, side, side, 1), generator=draw)
    noise = torch.randint(-40, 40, (num_classes, 8, side, side, 1), generator=draw)
    return (prototypes + noise).clamp(0, 255).to(torch.uint8)


def characters(way=3, **sizes):
    parts = {"train": range(6), "validation": range(6, 8) if way < 3 else [], "test": range(7, 10)}
    return ClassEpisodes(images(), {**parts, "validation": []}, way=way, num_query=2, **sizes)


def conv(way=3, activation="softplus"):
    return Conv4(way, num_filters=3, image_size=8, num_layers=2, activation=activation)


# --- the quadratic tasks of the theory --------------------------------------------------------------------------------


class Spelled(Problem):
    """`x^T A_t x / 2 - b_t^T x + strength ‖x - init‖² / 2` and `‖x - c_t‖² / 2`, five tasks of six unknowns."""

    constraints = {"strength": Positive()}
    num_tasks = 5

    def __init__(self, seed, per_tensor=False):
        draw = torch.Generator().manual_seed(seed)
        self.init = {name: torch.randn(3, generator=draw) for name in ("u", "v")}
        self.strengths = {"strength.u": torch.tensor(0.7), "strength.v": torch.tensor(1.9)}
        self.per_tensor = per_tensor

    def episodes(self, step):
        draw = torch.Generator().manual_seed(step)
        root = torch.randn(5, 6, 6, generator=draw)
        inner = {"A": root @ root.mT / 6, "b": torch.randn(5, 6, generator=draw)}
        return inner, {"c": torch.randn(5, 6, generator=draw)}

    def init_hparams(self):
        return {"init": self.init, **(self.strengths if self.per_tensor else {"strength": torch.tensor(1.3)})}

    def init_params(self, hparams):
        return {name: hparams[f"init.{name}"] for name in ("u", "v")}

    def support_loss(self, params, batch):
        x = torch.cat([params["u"], params["v"]])
        return x @ batch["A"] @ x / 2 - batch["b"] @ x

    def inner_loss(self, params, hparams, batch):
        strengths = {name: hparams[f"strength.{name}" if self.per_tensor else "strength"] for name in params}
        term = sum(strengths[n] * (params[n] - hparams[f"init.{n}"]).square().sum() for n in params)
        return self.support_loss(params, batch) + term / 2

    def outer_loss(self, params, hparams, batch):
        return (torch.cat([params["u"], params["v"]]) - batch["c"]).square().sum() / 2

    def closed_form(self, hparams, step):
        inner, outer = self.episodes(step)
        strength = (
            torch.cat([hparams[f"strength.{name}"].expand(3) for name in ("u", "v")])
            if self.per_tensor
            else hparams["strength"].expand(6)
        )
        init = torch.cat([hparams["init.u"], hparams["init.v"]])
        x = torch.linalg.solve(inner["A"] + strength.diag(), inner["b"] + strength * init)
        return (x - outer["c"]).square().sum(-1).mean() / 2


class Quadratics(Spelled):
    """The same with the term as an anchor."""

    def inner_loss(self, params, hparams, batch):
        return self.support_loss(params, batch)

    def anchor(self, hparams):
        strengths = (
            {name: hparams[f"strength.{name}"] for name in ("u", "v")} if self.per_tensor else hparams["strength"]
        )
        return strengths, self.init_params(hparams)


@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize("step", [0, 7])
@pytest.mark.parametrize(
    "solver",
    [GradientDescent(max_steps=20_000, learning_rate=0.2, atol=1e-11), NewtonCG(atol=1e-11), LBFGS(atol=1e-11)],
)
def test_the_meta_gradient_of_quadratic_tasks_is_the_closed_form(solver, step, per_tensor):
    problem = Quadratics(3, per_tensor)
    found = hypergradient_at(problem, method=EXACT, solver=solver, step=step)
    hparams = {name: value.clone().requires_grad_() for name, value in start_of(problem).items()}
    expected = grad(problem.closed_form(hparams, step), list(hparams.values()))
    assert found.outer_loss == pytest.approx(float(problem.closed_form(hparams, step)), rel=1e-9)
    for name, value in zip(hparams, expected, strict=True):
        torch.testing.assert_close(found.gradient[name], value, rtol=1e-8, atol=1e-9)


def start_of(problem):
    return problem.place(flatten_names(problem.init_hparams()))


def test_strengths_by_patterns_are_those_of_their_tensors_and_the_first_that_fits_counts():
    fixed = proximal(strength=11.0, strengths={"head": 6.0, "*.bias": 3.0}, learned=None)
    strengths, _ = fixed.anchor(start_of(fixed))
    assert {name: float(value) for name, value in strengths.items()} == {
        name: 6.0 if name.startswith("head") else 3.0 if name.endswith("bias") else 11.0 for name in fixed.start
    }
    learned = proximal(strength=11.0, strengths={"head": 6.0}).init_hparams()
    assert {name: float(value) for name, value in learned.items() if name != "init"} == {
        "strength.conv0": 11.0,
        "strength.conv1": 11.0,
        "strength.head": 6.0,
    }


def test_a_wrong_anchor_is_told():
    class Wrong(Quadratics):
        def anchor(self, hparams):
            return 1.0, {"u": hparams["init.u"]}

    with pytest.raises(UsageError, match=r"Wrong.anchor was expected to return a pair of strength .* missing \['v'\]"):
        hypergradient_at(Wrong(0), method=EXACT, solver=NewtonCG())


def test_an_anchor_beside_an_optimality_is_refused():
    class Both(Quadratics):
        def optimality(self, params, hparams, batch):
            return params

    with pytest.raises(UsageError, match="Both has an optimality and an anchor"):
        hypergradient_at(Both(0), method=EXACT, solver=NewtonCG())


def test_an_anchor_is_the_same_as_its_term_in_the_loss():
    solver = GradientDescent(max_steps=7, atol=0.0)
    for method, per_tensor in itertools.product((EXACT, Unrolled(), ForwardMode()), (False, True)):
        ours, theirs = (
            hypergradient_at(one(2, per_tensor), method=method, solver=solver) for one in (Quadratics, Spelled)
        )
        assert ours.inner_loss == pytest.approx(theirs.inner_loss, rel=1e-12)
        for name in ours.gradient:
            torch.testing.assert_close(ours.gradient[name], theirs.gradient[name], rtol=1e-9, atol=1e-11)


# --- networks ---------------------------------------------------------------------------------------------------------


def proximal(network=None, **changes):
    return ProximalFewShot(
        characters(), network or conv(), num_tasks=3, **{"strength": 8.0, "learned": "per_layer", **changes}
    )


def resolved(problem, hparams, solver):
    """The outer loss of the problem solved anew."""
    return hypergradient_at(problem, hparams, method=EXACT, solver=solver).outer_loss


SOLVED = {
    "iMAML": (lambda: proximal(), NewtonCG(atol=1e-11, max_steps=100)),
    "iMAML, a strength for each pattern": (
        lambda: proximal(strength=11.0, strengths={"head": 6.0}, learned=None),
        NewtonCG(atol=1e-11, max_steps=100),
    ),
    "iMAML, these learned": (
        lambda: proximal(strength=11.0, strengths={"head": 6.0}),
        NewtonCG(atol=1e-11, max_steps=100),
    ),
    "iMAML, a head from zero": (lambda: proximal(zero_head=True), NewtonCG(atol=1e-11, max_steps=100)),
    "ridge": (lambda: RidgeFewShot(characters(), conv(), num_tasks=3), NewtonCG(atol=1e-12, max_steps=100)),
    "sinusoid": (
        lambda: ProximalFewShot(
            Sinusoid(), MLP(hidden=(6,), activation="tanh"), Regression(), num_tasks=3, strength=3.0
        ),
        NewtonCG(atol=1e-11, max_steps=100),
    ),
}


@pytest.mark.parametrize("name", SOLVED)
def test_the_meta_gradient_is_that_of_the_problem_solved_anew(name):
    make, solver = SOLVED[name]
    problem = make().to(dtype=torch.float64)
    found = hypergradient_at(problem, method=EXACT, solver=solver)
    assert found.receipt.inner_result == "converged" and not found.receipt.biased
    start = start_of(problem)
    draw = torch.Generator().manual_seed(1)
    for _ in range(3):
        direction = {key: torch.randn(value.shape, generator=draw) for key, value in start.items()}
        size = 1e-5
        ends = [
            resolved(problem, {key: value + sign * size * direction[key] for key, value in start.items()}, solver)
            for sign in (1, -1)
        ]
        slope = sum(float((found.gradient[key] * direction[key]).sum()) for key in start)
        assert (ends[0] - ends[1]) / (2 * size) == pytest.approx(slope, rel=1e-5, abs=1e-7)


KINDS = {
    "iMAML": (lambda network: proximal(network), EXACT, GradientDescent(max_steps=5, atol=0.0)),
    "MAML": (
        lambda network: FewShot(characters(), network, num_tasks=3),
        Unrolled(),
        GradientDescent(max_steps=3, atol=0.0),
    ),
    "MAML, a head from zero": (
        lambda network: FewShot(characters(), network, num_tasks=3, zero_head=True),
        Unrolled(),
        GradientDescent(max_steps=3, atol=0.0),
    ),
    "first order": (
        lambda network: FewShot(characters(), network, num_tasks=3),
        FirstOrder(),
        GradientDescent(max_steps=3, atol=0.0),
    ),
    "Reptile": (
        lambda network: FewShot(characters(), network, num_tasks=3),
        Reptile(),
        GradientDescent(max_steps=3, atol=0.0),
    ),
    "ANIL": (
        lambda network: HeadFewShot(characters(), network, num_tasks=3),
        Unrolled(),
        GradientDescent(max_steps=3, atol=0.0),
    ),
    "Meta-SGD": (
        lambda network: LearnedRateFewShot(characters(), network, num_tasks=3),
        Unrolled(),
        GradientDescent(max_steps=3, atol=0.0, learning_rate="rate"),
    ),
    "ridge": (lambda network: RidgeFewShot(characters(), network, num_tasks=3), EXACT, NewtonCG(atol=1e-10)),
}


class OneTask(FeatureNetwork):
    """The network as a user would write it: for one task, in torch's own operations."""

    handles_tasks = False
    num_outputs = 3

    def __init__(self, loops=False):
        self.network, self.loops = conv(), loops

    def init(self, seed):
        return self.network.init(seed)

    def features(self, params, inputs):
        x = inputs.permute(0, 3, 1, 2)
        if self.loops and float(inputs.sum()) < 0:  # what vmap cannot do
            return x
        for layer in range(2):
            weight, gain, bias = (params[f"conv{layer}.{part}"] for part in ("weight", "gain", "bias"))
            x = torch.nn.functional.conv2d(x, weight.permute(0, 3, 1, 2), None, 2, 1)
            mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True, unbiased=False)
            x = (x - mean) / (variance + 1e-5).sqrt() * gain.view(-1, 1, 1) + bias.view(-1, 1, 1)
            x = torch.nn.functional.softplus(x)
        return x.permute(0, 2, 3, 1).flatten(1)


@pytest.mark.parametrize("name", KINDS)
def test_tasks_at_once_by_vmap_and_in_a_loop_give_the_same_numbers(name):
    make, method, solver = KINDS[name]
    with pytest.warns(
        UserWarning, match=r"do not run under torch.vmap .* the 3 tasks are evaluated one after the other"
    ):
        looped = hypergradient_at(make(OneTask(loops=True)).to(dtype=torch.float64), method=method, solver=solver)
    for network in (conv(), OneTask()):
        found = hypergradient_at(make(network).to(dtype=torch.float64), method=method, solver=solver)
        assert found.outer_loss == pytest.approx(looped.outer_loss, rel=1e-10)
        for key, value in looped.gradient.items():
            torch.testing.assert_close(found.gradient[key], value, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("tasks_at_once", [None, 1])
def test_parts_of_the_tasks_add_up(name, tasks_at_once):
    make, method, solver = KINDS[name]
    whole, parts = (make(conv()).to(dtype=torch.float64) for _ in range(2))
    whole.tasks_at_once, parts.tasks_at_once = 2, tasks_at_once
    one, other = (hypergradient_at(problem, method=method, solver=solver) for problem in (whole, parts))
    for key, value in one.gradient.items():
        torch.testing.assert_close(other.gradient[key], value, rtol=1e-10, atol=1e-12)


def by_hand(problem, rate, num_steps, hparams):
    """Adaptation of each task as MAML's paper writes it; returns the adapted weights and the query loss."""
    support, episode = problem.episodes(0)
    init = {name.removeprefix("init."): value for name, value in hparams.items() if name.startswith("init.")}
    ends, total = [], 0.0
    for task in range(problem.num_tasks):
        params = dict(init)
        for _ in range(num_steps):
            outputs = problem.network(params, support.inputs[task].double())
            loss = torch.nn.functional.cross_entropy(outputs, support.targets[task])
            slopes = grad(loss, list(params.values()), create_graph=True)
            params = {
                name: value - rate(name) * slope for (name, value), slope in zip(params.items(), slopes, strict=True)
            }
        outputs = problem.network(params, episode.query.inputs[task].double())
        total = total + torch.nn.functional.cross_entropy(outputs, episode.query.targets[task]) / problem.num_tasks
        ends.append(params)
    return ends, total


@pytest.fixture
def maml():
    problem = FewShot(characters(), conv(), num_tasks=3).to(dtype=torch.float64)
    return problem, {name: value.requires_grad_() for name, value in start_of(problem).items()}


def test_maml_is_the_derivative_of_the_papers_loop(maml):
    problem, hparams = maml
    found = hypergradient_at(
        problem, method=Unrolled(), solver=GradientDescent(max_steps=3, atol=0.0, learning_rate=0.3)
    )
    _, loss = by_hand(problem, lambda _: 0.3, 3, hparams)
    assert found.outer_loss == pytest.approx(float(loss), rel=1e-10)
    for name, value in zip(hparams, grad(loss, list(hparams.values())), strict=True):
        torch.testing.assert_close(found.gradient[name], value, rtol=1e-8, atol=1e-10)


def test_first_order_and_reptile_are_what_their_papers_say(maml):
    problem, hparams = maml
    solver = GradientDescent(max_steps=3, atol=0.0, learning_rate=0.3)
    ends, loss = by_hand(problem, lambda _: 0.3, 3, hparams)
    first, reptile = (hypergradient_at(problem, method=method, solver=solver) for method in (FirstOrder(), Reptile()))
    assert first.receipt.biased and reptile.receipt.biased
    assert reptile.outer_loss == pytest.approx(float(loss), rel=1e-10)
    for name in ends[0]:
        slope = sum(grad(loss, one[name], retain_graph=True)[0] for one in ends)
        torch.testing.assert_close(first.gradient[f"init.{name}"], slope, rtol=1e-8, atol=1e-10)
        way_back = hparams[f"init.{name}"] - torch.stack([one[name] for one in ends]).mean(0)
        torch.testing.assert_close(reptile.gradient[f"init.{name}"], way_back.detach(), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", [FewShot, ProximalFewShot, HeadFewShot, LearnedRateFewShot])
def test_a_head_from_zero_is_not_learned_and_knows_no_order_of_the_classes(kind):
    problem, apart = (kind(characters(), conv(), num_tasks=3, zero_head=zero) for zero in (True, False))
    problem, apart = (one.to(dtype=torch.float64) for one in (problem, apart))
    rate = "rate" if kind is LearnedRateFewShot else 0.1
    solver = GradientDescent(max_steps=3, atol=0.0, learning_rate=rate)
    start, head = start_of(problem), ("init.head.weight", "init.head.bias")
    assert not set(head) & set(start)
    full = {**start_of(apart), **{name: torch.zeros_like(start_of(apart)[name]) for name in head}}
    found, expected = (
        hypergradient_at(one, at, method=Unrolled(), solver=solver) for one, at in ((problem, start), (apart, full))
    )
    for name, value in found.gradient.items():
        torch.testing.assert_close(value, expected.gradient[name], rtol=1e-8, atol=1e-10)
    plain = problem.tasks.draw

    def relabelled(*arguments):
        return type(plain(*arguments))(*(Examples(one.inputs, (one.targets + 1) % 3) for one in plain(*arguments)))

    problem.tasks.draw = relabelled
    again = hypergradient_at(problem, start, method=Unrolled(), solver=solver)
    assert again.outer_loss == pytest.approx(found.outer_loss, rel=1e-10)


def test_meta_sgd_learns_the_rates():
    problem = LearnedRateFewShot(characters(), conv(), num_tasks=3, rate=0.2).to(dtype=torch.float64)
    hparams = {name: value.requires_grad_() for name, value in start_of(problem).items()}
    found = hypergradient_at(
        problem, method=Unrolled(), solver=GradientDescent(max_steps=2, atol=0.0, learning_rate="rate")
    )
    _, loss = by_hand(problem, lambda name: hparams[f"rate.{name}"], 2, hparams)
    for name, value in zip(hparams, grad(loss, list(hparams.values())), strict=True):
        torch.testing.assert_close(found.gradient[name], value, rtol=1e-8, atol=1e-10)


def test_conjugate_gradient_keeps_to_its_bound_on_a_meta_hessian():
    problem = proximal(learned=None).to(dtype=torch.float64)
    found = hypergradient_at(problem, method=EXACT, solver=NewtonCG(atol=1e-10, max_steps=100))
    setup, _ = set_up(problem, NewtonCG(), EXACT, ADAM, None)
    flat, hparams = setup.problem, start_of(problem)
    x = flat.layout.ravel(found.params, 1)
    operator = HessianOperator(lambda v: flat.objective(problem.episodes(0)[0]).loss(v, hparams), x)
    matrix = as_matrix(operator)
    values = torch.linalg.eigvalsh(matrix)
    assert float(values.min()) > 0
    root = (values[:, -1] / values[:, 0]).sqrt()
    vector = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    exact = torch.linalg.solve(matrix, vector)

    def size(error):
        return torch.einsum("ti,tij,tj->t", error, matrix, error).sqrt()

    for steps in (1, 2, 5, 10, 20):
        solver = ConjugateGradient(rtol=None, max_steps=steps)
        error = solver.compute(solver.init(operator), vector).value - exact
        assert bool((size(error) <= 2 * ((root - 1) / (root + 1)) ** steps * size(exact) * (1 + 1e-9)).all())


def test_negative_curvature_of_some_tasks_ends_their_solve_and_is_told():
    problem = ProximalFewShot(characters(), conv(activation="relu"), num_tasks=4, strength=0.01).to(dtype=torch.float64)
    method = Implicit(
        warm_start=False,
        linear_solver=ConjugateGradient(rtol=None, max_steps=15),
        negative_curvature=Truncate(),
        error_estimate=None,
    )
    found = hypergradient_at(problem, method=method, solver=GradientDescent(max_steps=2, atol=0.0))
    assert found.receipt.curvature_min < 0
    assert any("tasks: the linear solve ends before it" in reason for reason in found.receipt.biased)
    assert all(bool(value.isfinite().all()) for value in found.gradient.values())


# --- mistakes ---------------------------------------------------------------------------------------------------------

MISTAKES = [
    (lambda: FewShot(characters(way=2), conv(3)), r"tasks have 2 classes \(data.way\), but the network has 3 outputs"),
    (lambda: FewShot(conv(), conv()), "FewShot.tasks was expected to be a TaskSource"),
    (lambda: FewShot(characters(), characters()), "FewShot.network was expected to be a Network"),
    (
        lambda: FewShot(characters(), conv(), tasks_at_once=0),
        "tasks_at_once was expected to be an integer of at least 1",
    ),
    (
        lambda: ProximalFewShot(characters(), conv(), strength=0.0),
        "strength of the proximal term was expected to be above 0",
    ),
    (
        lambda: ProximalFewShot(characters(), conv(), strengths={"head": "much"}),
        "strength of the proximal term was expected to be above 0, but is 'much'",
    ),
    (
        lambda: ProximalFewShot(characters(), conv(), strengths={"haed": 1.0}),
        "'haed' in strengths fits none of the tensors conv0.weight",
    ),
    (
        lambda: ProximalFewShot(characters(), conv(), strengths={"head": 1.0}, learned="shared"),
        r"learned strength 'strength' were expected to start with the same, but have \[1.0, 2.0\]",
    ),
    (lambda: RidgeFewShot(characters(), conv(), penalty=-1.0), "penalty and scale were expected to be above 0"),
    (
        lambda: HeadFewShot(characters(), ModuleNetwork(torch.nn.Linear(2, 3))).init_hparams(),
        "HeadFewShot needs a network of features and a head",
    ),
    (
        lambda: FewShot(characters(), ModuleNetwork(torch.nn.Linear(2, 3)), zero_head=True),
        "FewShot with zero_head needs a network of features and a head .* or leave zero_head out",
    ),
    (lambda: FewShotEvaluation(num_tasks=0), "FewShotEvaluation needs num_tasks >= 1"),
]


@pytest.mark.parametrize(("mistake", "sentence"), MISTAKES)
def test_a_mistake_is_told_in_one_sentence(mistake, sentence):
    with pytest.raises(UsageError, match=sentence):
        mistake()


def test_a_starting_point_is_out_of_reach_of_the_theorem_without_an_anchor():
    with pytest.raises(UsageError, match=r"'init\..*only enters the starting point"):
        hypergradient_at(FewShot(characters(), conv(), num_tasks=2).to(dtype=torch.float64), method=EXACT)


# --- runs -------------------------------------------------------------------------------------------------------------


def sinusoids():
    torch.set_default_dtype(torch.float64)
    return FewShot(Sinusoid(), MLP(hidden=(8,)), Regression(), num_tasks=4).to(dtype=torch.float64)


SOLVER = GradientDescent(max_steps=2, atol=0.0, learning_rate=0.01)


def test_a_run_in_pieces_is_the_run_in_one(tmp_path):
    def trained(folder, *lengths):
        for number, length in enumerate(lengths):
            trainer = Trainer(num_steps=length, checkpoint_every=2)
            run(sinusoids(), SOLVER, Unrolled(), ADAM, trainer, tmp_path / folder, resume=number > 0)
        return (tmp_path / folder / "hparams_last.safetensors").read_bytes()

    assert trained("one", 7) == trained("pieces", 3, 5, 7)
    assert trained("other", 6) != trained("one", 7)


def test_evaluation_is_on_fixed_tasks_however_many_at_a_time():
    setup, state = set_up(sinusoids(), SOLVER, Unrolled(), ADAM, None)
    hparams = setup.natural(state.raw)
    found = evaluate(setup.problem, setup.solver, hparams, num_tasks=10, seed=3, steps=(1, 7))
    again = evaluate(setup.problem.with_tasks(3), setup.solver, hparams, num_tasks=10, seed=3, steps=(1,))
    other = evaluate(setup.problem, setup.solver, hparams, num_tasks=10, seed=4, steps=(1,))
    assert found.steps == (0, 1, 2, 7) and found.scores.shape == (4, 10) and found.num_steps == 2
    assert torch.equal(found.each, found.scores[2]) and found.num_diverged == 0
    torch.testing.assert_close(found.scores[:3], again.scores, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(found.scores[:3], other.scores)
    params, hand = {name.removeprefix("init."): value for name, value in hparams.items()}, []
    for number in range(10):
        episode = setup.problem.problem.tasks.draw("test", 1, 3, number)
        outputs = setup.problem.problem.network(params, episode.query.inputs[0])
        hand.append((outputs - episode.query.targets[0]).square().mean())
    torch.testing.assert_close(found.scores[0], torch.stack(hand).detach(), rtol=1e-12, atol=1e-12)


def test_the_callback_records_validation_and_leaves_tables_and_pictures(tmp_path):
    from safetensors.torch import load_file

    evaluation = FewShotEvaluation(num_tasks=6, every=2, num_validation_tasks=5, steps=(1,), num_pictures=2)
    records = []

    class Keep:
        def on_start(self, start): ...
        def on_step(self, record, hparams):
            records.append(dict(record))

        def on_end(self, summary): ...

    trainer = Trainer(num_steps=4)
    run(sinusoids(), SOLVER, Unrolled(), ADAM, trainer, tmp_path, callbacks=[evaluation, Keep()])
    assert ["metrics.validation_mse" in record for record in records] == [False, True, False, True]
    summary = json.loads((tmp_path / "summary.json").read_text())
    figures = summary["evaluation"]
    assert figures["inner_steps"] == [0, 1, 2] and len(figures["each"]) == figures["num_tasks"] == 6
    assert figures["mean"][-1] == pytest.approx(sum(figures["each"]) / 6)
    assert [row[0] for row in summary["baseline"]["rows"]][1:] == [f"after {n} inner steps" for n in (0, 1, 2)]
    tensors = load_file(tmp_path / "episodes.safetensors")
    assert tensors["outputs.after"].shape == tensors["query.targets"].shape == (2, 50, 1)


def test_a_task_that_diverges_takes_no_other_with_it():
    wild = GradientDescent(max_steps=60, atol=0.0, learning_rate=0.2)
    together, alone = (
        evaluate(problem, wild, start_of(problem), num_tasks=8, steps=(5,))
        for problem in (
            FewShot(Sinusoid(), MLP(hidden=(8,)), Regression(), num_tasks=number).to(dtype=torch.float64)
            for number in (4, 1)
        )
    )
    assert 0 < together.num_diverged < 8 and together.num_diverged == alone.num_diverged
    torch.testing.assert_close(together.scores, alone.scores, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_evaluation_takes_what_the_outer_loop_takes():
    rates = LearnedRateFewShot(Sinusoid(), MLP(hidden=(6,)), Regression(), num_tasks=3, rate=0.01).to(
        dtype=torch.float64
    )
    named = evaluate(rates, replace(SOLVER, learning_rate="rate"), start_of(rates), num_tasks=4)
    plain = evaluate(rates, replace(SOLVER, learning_rate=0.01), start_of(rates), num_tasks=4)
    torch.testing.assert_close(named.scores, plain.scores)
    looped = FewShot(characters(), OneTask(loops=True), num_tasks=3).to(dtype=torch.float64)
    with pytest.warns(UserWarning, match="one after the other"):
        found = evaluate(looped, SOLVER, start_of(looped), num_tasks=4)
    together = FewShot(characters(), conv(), num_tasks=3).to(dtype=torch.float64)
    torch.testing.assert_close(found.scores, evaluate(together, SOLVER, start_of(together), num_tasks=4).scores)


def test_evaluation_draws_the_same_numbers_each_time_and_none_of_the_runs():
    module = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))
    problem = FewShot(Sinusoid(), ModuleNetwork(module), Regression(), num_tasks=3).to(dtype=torch.float64)
    before = torch.get_rng_state()
    one, again = (evaluate(problem, SOLVER, start_of(problem), num_tasks=4, steps=(1,)) for _ in range(2))
    torch.testing.assert_close(one.scores, again.scores, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_buffers_of_a_module_move_with_its_problem():
    module = torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1)).float().eval()
    problem = FewShot(Sinusoid(), ModuleNetwork(module), Regression(), num_tasks=2).to(dtype=torch.float64)
    assert evaluate(problem, SOLVER, start_of(problem), num_tasks=2).scores.dtype == torch.float64


def test_outputs_of_another_shape_than_their_targets_are_refused():
    with pytest.raises(UsageError, match=r"shape of the targets, \(2, 5, 1\), but have \(2, 5, 3\)"):
        Regression().loss(torch.zeros(2, 5, 3), torch.zeros(2, 5, 1))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"num_pictures": -1}, "num_pictures >= 0, an integer, but got -1"),
        ({"steps": (1, 0.5)}, "steps >= 0, an integer, but got 0.5"),
        ({"seed": "x"}, "seed >= 0, an integer, but got 'x'"),
        ({"max_steps": 0}, "max_steps >= 1"),
        ({"every": 0}, "every >= 1"),
    ],
)
def test_a_wrong_evaluation_is_refused_before_the_run(arguments, sentence):
    with pytest.raises(UsageError, match=sentence):
        FewShotEvaluation(**arguments)


def test_evaluation_of_another_problem_is_refused():
    with pytest.raises(UsageError, match="few-shot evaluation needs a FewShot problem, but this is a Quadratics"):
        fit(Quadratics(0), num_steps=1, callbacks=[FewShotEvaluation()], hypergradient=EXACT, solver=NewtonCG())


def test_a_run_stops_when_its_seconds_are_used():
    result = fit(
        sinusoids(), solver=SOLVER, hypergradient=Unrolled(), trainer=Trainer(num_steps=10**6, max_seconds=0.05)
    )
    assert "of 0.05 seconds were used" in result.summary["stopped_because"]
    assert 0 < result.summary["num_steps"] < 10**6
    with pytest.raises(UsageError, match="trainer.max_seconds must be above 0"):
        Trainer(max_seconds=0.0)


def test_the_latest_step_is_the_best_of_a_run_of_episodes_and_patience_is_refused():
    result = fit(sinusoids(), solver=SOLVER, hypergradient=Unrolled(), num_steps=5)
    assert result.summary["best"]["step"] == 4
    with pytest.raises(UsageError, match=r"trainer.patience=2 .* each step of this problem has an episode of its own"):
        fit(sinusoids(), solver=SOLVER, hypergradient=Unrolled(), trainer=Trainer(patience=2))


def test_training_lowers_the_error_of_new_tasks():
    problem = ProximalFewShot(Sinusoid(), MLP(hidden=(20, 20)), Regression(), num_tasks=10, strength=0.5).to(
        dtype=torch.float64
    )
    budget = ConjugateGradient(rtol=None, max_steps=5)
    method = Implicit(warm_start=False, linear_solver=budget, negative_curvature=Truncate(), error_estimate=None)
    solver = GradientDescent(max_steps=10, atol=0.0, learning_rate=0.05)
    trained = fit(problem, solver=solver, hypergradient=method, num_steps=200, optimizer=ADAM)
    setup, state = set_up(problem, solver, EXACT, ADAM, None)
    before, after = (
        evaluate(setup.problem, solver, hparams, num_tasks=100).final.value
        for hparams in (setup.natural(state.raw), trained.hparams)
    )
    assert after < 0.8 * before
