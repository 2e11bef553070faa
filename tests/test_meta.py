"""Meta-gradients against closed forms and finite differences, and tasks at once against tasks in a loop."""

from __future__ import annotations

import itertools

import pytest
import torch
from few_shot import ADAM, EXACT, OneTask, Quadratics, Spelled, characters, conv, start_of
from torch.autograd import grad
from torch.nn.functional import cross_entropy, one_hot

from bilevel import hypergradient_at
from bilevel.data import Examples, Prefetched, Sinusoid
from bilevel.errors import UsageError
from bilevel.hypergradient import ForwardMode, Implicit, Unrolled
from bilevel.hypergradient.negative_curvature import Truncate
from bilevel.linalg import ConjugateGradient, HessianOperator, as_matrix
from bilevel.meta import (
    FewShot,
    FirstOrder,
    HeadFewShot,
    LearnedRateFewShot,
    ProximalFewShot,
    Regression,
    Reptile,
    RidgeFewShot,
)
from bilevel.models import MLP
from bilevel.solvers import LBFGS, GradientDescent, NewtonCG
from bilevel.trainer.setup import set_up

pytestmark = pytest.mark.usefixtures("float64")


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


def proximal(network=None, **changes):
    return ProximalFewShot(
        characters(), network or conv(), num_tasks=3, **{"strength": 8.0, "learned": "per_layer", **changes}
    )


def resolved(problem, hparams, solver):
    """The outer loss of the problem solved anew."""
    return hypergradient_at(problem, hparams, method=EXACT, solver=solver).outer_loss


SOLVED = {
    "iMAML": (lambda: proximal(), NewtonCG(atol=1e-11, max_steps=100)),
    "iMAML, one strength": (lambda: proximal(learned="shared"), NewtonCG(atol=1e-11, max_steps=100)),
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


@pytest.mark.parametrize("penalty", [0.3, 5.0])
def test_the_ridge_head_and_its_meta_gradient_are_those_of_the_closed_form(penalty):
    network = conv()
    problem = RidgeFewShot(characters(), network, num_tasks=3, penalty=penalty, scale=1.7).to(dtype=torch.float64)
    found = hypergradient_at(problem, method=EXACT, solver=NewtonCG(atol=1e-12, max_steps=100))
    hparams = {name: value.clone().requires_grad_() for name, value in start_of(problem).items()}
    body = {name.removeprefix("body."): value for name, value in hparams.items()}
    (x, y), (new, labels) = characters().draw("train", 3, 0, 0)
    loss = torch.zeros(())
    for task in range(3):
        support, query = network.features(body, x[task]), network.features(body, new[task])
        gram = support @ support.mT + hparams["penalty"] * torch.eye(len(support))
        dual = torch.linalg.solve(gram, one_hot(y[task], 3).double())
        loss = loss + cross_entropy(hparams["scale"] * query @ support.mT @ dual, labels[task]) / 3
    assert found.outer_loss == pytest.approx(float(loss), rel=1e-9)
    for name, value in zip(hparams, grad(loss, list(hparams.values())), strict=True):
        torch.testing.assert_close(found.gradient[name], value, rtol=1e-7, atol=1e-10)


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
        ours, theirs = (torch.cat([one.gradient[key].flatten() for key in looped.gradient]) for one in (found, looped))
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-10


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("tasks_at_once", [None, 1])
def test_parts_of_the_tasks_add_up(name, tasks_at_once):
    make, method, solver = KINDS[name]
    whole, parts = (make(conv()).to(dtype=torch.float64) for _ in range(2))
    whole.tasks_at_once, parts.tasks_at_once = 2, tasks_at_once
    one, other = (hypergradient_at(problem, method=method, solver=solver) for problem in (whole, parts))
    for key, value in one.gradient.items():
        torch.testing.assert_close(other.gradient[key], value, rtol=1e-10, atol=1e-12)


def test_query_losses_of_no_more_tasks_than_asked_for_are_recorded_at_a_time():
    problem, seen = proximal(tasks_at_once=2).to(dtype=torch.float64), set()
    loss = problem.outer_loss

    def watched(params, hparams, batch):
        if any(value.requires_grad for value in params.values()):
            seen.add(len(batch.query.inputs))
        return loss(params, hparams, batch)

    problem.outer_loss = watched
    hypergradient_at(problem, method=EXACT, solver=GradientDescent(max_steps=2, atol=0.0))
    assert seen == {1, 2}  # of three tasks


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

    targets = problem.episodes(0)[1].query.targets
    problem.tasks.draw = relabelled
    problem.episodes = Prefetched(problem.episodes.function)  # forgets what it has drawn
    assert not problem.episodes(0)[1].query.targets.equal(targets)
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
