"""Inside a solve a loss is one fixed function; after it everything is as before; what cannot be frozen is named."""

import itertools
import os
import random
import time
import warnings
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from bilevel import Problem, fit
from bilevel.purity import Fault, Purity, disturbances, findings, randomness
from bilevel.purity.holdings import Holdings
from bilevel.purity.sources import same
from bilevel.rng import generator, get_state, normal, seed_everything
from bilevel.solvers import GradientDescent

N = 6


@pytest.fixture(autouse=True)
def _settings():
    torch.set_default_dtype(torch.float64)
    seed_everything(1)
    yield
    torch.set_default_dtype(torch.float32)


class Base:
    """`loss(x)` of `x` of shape `(6,)`, not quadratic; the features are `(8, 6)`."""

    def __init__(self):
        self.data = normal((8, N), generator(3), torch.float64)

    def loss(self, x):
        return torch.tanh(self.noisy(self.data * x)).square().sum() + x.square().sum()

    def noisy(self, features):
        return features


class Module(Base):
    """A network whose first layer's weights are the variable."""

    def __init__(self, *layers):
        super().__init__()
        self.model = nn.Sequential(*layers)

    def noisy(self, features):
        return self.model(features)


class Functional(Base):
    def noisy(self, features):
        return F.dropout(features, 0.5)


class Attention(Base):
    def __init__(self, p=0.3):
        super().__init__()
        self.p = p

    def noisy(self, features):
        q = features.reshape(1, 2, 4, N)
        return F.scaled_dot_product_attention(q, q, q, dropout_p=self.p)


class SelfAttention(Base):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(N, 2, dropout=0.3)

    def noisy(self, features):
        return self.attention(features, features, features, need_weights=False)[0]


class Noise(Base):
    """Additive noise from any function of a shape."""

    def __init__(self, draw, **held):
        super().__init__()
        self.draw = draw
        vars(self).update(held)

    def noisy(self, features):
        drawn = self.draw(self, features.shape)
        return features * (1 + 0.5 * (drawn if isinstance(drawn, torch.Tensor) else torch.as_tensor(drawn)))


def _from_python(source, shape):
    return np.array([source.gauss(0, 1) for _ in range(int(np.prod(shape)))]).reshape(shape)


def _closure():
    hidden = torch.Generator().manual_seed(1)
    return Noise(lambda self, shape: torch.randn(shape, generator=hidden))


class Augmentation:
    __slots__ = ("rng",)

    def __init__(self):
        self.rng = torch.Generator().manual_seed(4)

    def __call__(self, problem, shape):
        return torch.randn(shape, generator=self.rng)


class ClassLevel(Base):
    shared = torch.Generator().manual_seed(2)

    def noisy(self, features):
        return features + torch.randn(features.shape, generator=self.shared)


@dataclass(frozen=True)
class Row:
    """A problem that is random; `held` when its numbers come from a generator of its own."""

    make: object
    fault: Fault
    place: str
    held: bool = False


ROWS = {
    "nn.Dropout": Row(lambda: Module(nn.Linear(N, N), nn.Dropout(0.4)), Fault.dropout, "problem.model.1 (Dropout(p=0.4, inplace=False)) in loss"),
    "nn.AlphaDropout": Row(lambda: Module(nn.AlphaDropout(0.4)), Fault.dropout, "problem.model.0 (AlphaDropout"),
    "F.dropout": Row(Functional, Fault.dropout, "dropout at test_purity.py:"),
    "attention": Row(Attention, Fault.dropout, "scaled_dot_product_attention at test_purity.py:"),
    "self-attention": Row(SelfAttention, Fault.dropout, "problem.attention (MultiheadAttention) in loss"),
    "lstm": Row(lambda: Module(nn.LSTM(N, N, 2, dropout=0.5), Take()), Fault.dropout, "problem.model.0 (LSTM(6, 6, num_layers=2, dropout=0.5)) in loss"),
    "nn.RReLU": Row(lambda: Module(nn.RReLU()), Fault.noise, "problem.model.0 (RReLU"),
    "torch.randn": Row(lambda: Noise(lambda self, shape: torch.randn(shape)), Fault.noise, "randn at test_purity.py:"),
    "normal_": Row(lambda: Noise(lambda self, shape: torch.empty(shape).normal_()), Fault.noise, "normal_ at test_purity.py:"),
    "numpy": Row(lambda: Noise(lambda self, shape: np.random.randn(*shape)), Fault.noise, "loss (from NumPy's global generator) draws"),
    "python": Row(lambda: Noise(lambda self, shape: _from_python(random, shape)), Fault.noise, "loss (from Python's random module) draws"),
    "own torch.Generator": Row(lambda: Noise(lambda self, shape: torch.randn(shape, generator=self.own), own=torch.Generator()), Fault.noise, "(from problem.own)", held=True),
    "own numpy Generator": Row(lambda: Noise(lambda self, shape: self.own.normal(size=shape), own=np.random.default_rng(0)), Fault.noise, "(from problem.own)", held=True),
    "own Mersenne twister": Row(lambda: Noise(lambda self, shape: self.own.normal(size=shape), own=np.random.Generator(np.random.MT19937(0))), Fault.noise, "(from problem.own)", held=True),
    "own RandomState": Row(lambda: Noise(lambda self, shape: self.own.randn(*shape), own=np.random.RandomState(0)), Fault.noise, "(from problem.own)", held=True),
    "own random.Random": Row(lambda: Noise(lambda self, shape: _from_python(self.own, shape), own=random.Random(0)), Fault.noise, "(from problem.own)", held=True),
    "generator in a closure": Row(_closure, Fault.noise, "(from problem.draw.hidden)", held=True),
    "generator in a partial": Row(lambda: Noise(lambda self, shape: self.inner(shape), inner=partial(torch.randn, generator=torch.Generator())), Fault.noise, "(from problem.inner['generator'])", held=True),
    "generator in slots": Row(lambda: Noise(Augmentation()), Fault.noise, "(from problem.draw.rng)", held=True),
    "generator of the class": Row(ClassLevel, Fault.noise, "(from problem.shared)", held=True),
    "generator in a list": Row(lambda: Noise(lambda self, shape: torch.randn(shape, generator=self.all[1]["g"]), all=[1, {"g": torch.Generator()}]), Fault.noise, "(from problem.all[1]['g'])", held=True),
    "spectral norm": Row(lambda: Module(spectral_norm(nn.Linear(N, N))), Fault.changing_buffer, "problem.model.0.parametrizations.weight.0._u in loss", held=True),
}  # fmt: skip


class Take(nn.Module):
    """The outputs of a recurrent network."""

    def forward(self, pair):
        return pair[0]


def made(name):
    seed_everything(1)
    problem = ROWS[name].make()
    purity = Purity.of(problem)
    return problem, purity, purity.freeze(problem.loss, "loss")


def point(seed=5):
    return normal((N,), generator(seed), torch.float64)


def product(loss, x, v):
    """`H v` with a graph of its own, as a method without a retained graph would."""
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(x), x, create_graph=True)
    return torch.autograd.grad(gradient, x, v)[0]


def everything(problem):
    """All states: global generators, own ones, and every tensor of every module."""
    held = Holdings.of(problem)
    own = [source.read() for source in held.sources]
    return [get_state(), own, [buffer.tensor.clone() for buffer in held.buffers], list(held.tensors.values())]


def rows(test):
    return pytest.mark.parametrize("name", list(ROWS))(test)


# ---------------------------------------------------------------------------------------------------------------------
# One function inside a solve


@rows
def test_losses_and_products_are_those_of_one_function_inside_a_solve_and_not_outside(name):
    _, purity, loss = made(name)
    x, u, v = point(), point(6), point(7)
    with purity.solve():
        values = [loss(x) for _ in range(3)]
        first, again, other = product(loss, x, v), product(loss, x, v), product(loss, x, u)
        step = 1e-5
        slopes = [product(loss, x + sign * step * v, v) for sign in (1, -1)]  # the same function at other points
    assert values[0] == values[1] == values[2]
    assert torch.equal(first, again)
    assert float(u @ first) == pytest.approx(float(v @ other), rel=1e-9)
    assert all(bool(slope.isfinite().all()) for slope in slopes)
    if name == "spectral norm":
        return  # converges outside, so its products differ ever less
    assert loss(x) != loss(x)
    free, cross = product(loss, x, v), product(loss, x, u)
    assert abs(float(u @ free - v @ cross)) > 1e-6 * abs(float(u @ free))


@rows
def test_products_agree_with_finite_differences_of_gradients(name):
    _, purity, loss = made(name)
    x, v = point(), point(7)
    with purity.solve():
        exact = product(loss, x, v)

        def gradient(at):
            at = at.clone().requires_grad_()
            return torch.autograd.grad(loss(at), at)[0]

        difference = (gradient(x + 1e-6 * v) - gradient(x - 1e-6 * v)) / 2e-6
    assert torch.allclose(exact, difference, rtol=1e-5, atol=1e-6)


@rows
def test_a_solve_moves_the_global_generators_by_one_evaluation_and_puts_back_all_else(name):
    problem, purity, loss = made(name)
    seed_everything(11)
    problem.loss(point())
    expected = get_state()
    problem, purity, loss = made(name)
    seed_everything(11)
    before = everything(problem)
    with purity.solve():
        for _ in range(4):
            product(loss, point(), point(7))
    after = everything(problem)
    assert same(after[0], expected)
    assert same(after[1:], before[1:])


@rows
def test_the_next_solve_gets_other_numbers_from_global_generators_and_the_same_from_held_ones(name):
    _, purity, loss = made(name)
    values = []
    for _ in range(3):
        with purity.solve():
            values.append(float(loss(point()).detach()))
    assert len(set(values)) == (1 if ROWS[name].held else 3)


@rows
def test_a_solve_that_starts_from_the_same_state_is_repeated_to_the_bit(name):
    """What a run resumed from a checkpoint relies on."""
    found = []
    for _ in range(2):
        _, purity, loss = made(name)
        seed_everything(3)
        for _ in range(3):
            with purity.solve():
                found.append(product(loss, point(), point(7)) * loss(point(8)))
    assert torch.equal(torch.stack(found[:3]), torch.stack(found[3:]))


@rows
def test_an_exception_puts_back_everything(name):
    problem, purity, loss = made(name)
    before = everything(problem)
    with pytest.raises(ZeroDivisionError), purity.solve():
        loss(point()), loss(point())
        purity.freeze(lambda x: problem.loss(x) / (1 // 0), "outer")(point())
    assert same(everything(problem), before)
    with purity.solve():  # and the next solve is a new one
        assert loss(point()) == loss(point())


def test_an_interrupt_puts_back_everything_and_each_later_evaluation_gives_back_what_it_was_lent():
    problem, purity, loss = made("F.dropout")
    with purity.solve():
        loss(point())
        middle = get_state()
        with pytest.raises(RuntimeError):
            loss(torch.zeros(5))
        assert same(get_state(), middle)
    before = everything(problem)
    with pytest.raises(KeyboardInterrupt), purity.solve():
        loss(point())
        raise KeyboardInterrupt
    assert same(everything(problem), before)


@rows
def test_a_solve_inside_a_solve_is_part_of_it(name):
    _, purity, loss = made(name)
    with purity.solve():
        first = loss(point())
        with purity.solve():
            assert loss(point()) == first
        assert loss(point()) == first


def test_functions_of_one_problem_have_each_their_own_numbers_in_any_order():
    problem, purity, inner = made("torch.randn")
    outer = purity.freeze(problem.loss, "outer")
    with purity.solve():
        a, b = inner(point()), outer(point())
        assert a != b
        assert (inner(point()), outer(point()), inner(point())) == (a, b, a)


def test_draws_between_the_evaluations_go_on_as_if_nobody_had_evaluated():
    _, purity, loss = made("torch.randn")
    with purity.solve():
        loss(point())
        state = torch.get_rng_state()
        numbers = torch.rand(4)
        loss(point())
        following = torch.rand(4)
    torch.set_rng_state(state)
    assert torch.equal(torch.cat([numbers, following]), torch.rand(8))


def test_a_problem_without_randomness_leaves_the_generators_alone():
    problem = Base()
    purity, before = Purity.of(problem), get_state()
    loss = purity.freeze(problem.loss, "loss")
    with purity.solve():
        values = [loss(point()) for _ in range(3)]
    assert same(get_state(), before) and values == [problem.loss(point())] * 3


@pytest.mark.parametrize("transform", ["grad", "forward over reverse", "vmap"])
def test_the_first_evaluation_may_be_under_a_transform_and_the_next_outside(transform):
    _, purity, loss = made("F.dropout")
    first = {**TRANSFORMS, "vmap": lambda f, x, v: vmap(f, randomness="same")(x.expand(2, N))}[transform]
    with purity.solve():
        found = first(loss, point(), point(7))
        expected = {"grad": lambda: grad(loss)(point()), "vmap": lambda: loss(point()).expand(2)}
        second = expected.get(transform, lambda: product(loss, point(), point(7)))()
        assert torch.allclose(found, second, rtol=1e-12) and torch.equal(found, first(loss, point(), point(7)))


def test_two_problems_have_solves_of_their_own():
    _, outer, loss = made("F.dropout")
    _, inner, other = made("nn.Dropout")
    with outer.solve():
        first = loss(point())
        with inner.solve():
            assert other(point()) == other(point())
        assert loss(point()) == first


# ---------------------------------------------------------------------------------------------------------------------
# Transforms and compiled functions

TRANSFORMS = {
    "grad": lambda f, x, v: grad(f)(x),
    "vjp": lambda f, x, v: vjp(f, x)[1](torch.tensor(1.0))[0],
    "jvp": lambda f, x, v: jvp(f, (x,), (v,))[1],
    "forward over reverse": lambda f, x, v: jvp(grad(f), (x,), (v,))[1],
    "reverse over reverse": lambda f, x, v: grad(lambda y: grad(f)(y) @ v)(x),
    "jacrev": lambda f, x, v: jacrev(f)(x),
    "hessian": lambda f, x, v: jacrev(jacrev(f))(x),
}
IN_TRANSFORMS = ["nn.Dropout", "F.dropout", "torch.randn", "own torch.Generator", "generator in a closure"]


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", IN_TRANSFORMS)
def test_frozen_under_transforms(name, transform):
    _, purity, loss = made(name)
    x, v = point(), point(7)
    with purity.solve():
        value = loss(x)
        first, second = (TRANSFORMS[transform](loss, x, v) for _ in range(2))
        assert torch.equal(first, second) and loss(x) == value
        gradient, hvp = grad(loss)(x), product(loss, x, v)
    expected = {"jvp": gradient @ v, "forward over reverse": hvp, "reverse over reverse": hvp}
    if transform == "hessian":
        assert torch.allclose(first @ v, hvp, rtol=1e-10, atol=1e-12)
    else:
        assert torch.allclose(first, expected.get(transform, gradient), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", IN_TRANSFORMS)
def test_every_column_of_a_vmapped_jacobian_has_the_same_masks(name):
    _, purity, loss = made(name)
    x = point()
    with purity.solve():
        columns = vmap(lambda v: jvp(grad(loss), (x,), (v,))[1], randomness="same")(torch.eye(N))
        expected = torch.stack([product(loss, x, v) for v in torch.eye(N)])
    assert torch.allclose(columns, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", IN_TRANSFORMS)
def test_tasks_have_each_their_own_masks_and_keep_them_inside_a_solve(name):
    _, purity, loss = made(name)
    batched = vmap(loss, randomness="different")
    x = point().expand(3, N)
    with purity.solve():
        first, second = batched(x), batched(x)
        directions = vmap(lambda v: jvp(batched, (x,), (v,))[1], randomness="same")(
            torch.eye(N).unsqueeze(1).expand(N, 3, N)
        )
        gradients = vmap(grad(loss), randomness="different")(x)
    assert torch.equal(first, second) and len(set(first.tolist())) == 3
    assert torch.allclose(directions.mT.mT, gradients.mT, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_functions_are_frozen(backend):
    problem = Module(nn.Linear(N, N), nn.Dropout(0.5), nn.BatchNorm1d(N))
    problem.compiled = torch.compile(problem.model, backend=backend)
    problem.noisy = lambda features: problem.compiled(features)
    purity = Purity.of(problem)
    loss = purity.freeze(problem.loss, "loss")
    before = everything(problem)
    with purity.solve():
        assert loss(point()) == loss(point())
    assert same(everything(problem)[2:], before[2:])
    assert loss(point()) != loss(point())
    faults = {one.fault for one in randomness(purity, {"loss": lambda: problem.loss(point())})}
    assert faults == {Fault.dropout, Fault.tracked_batch_norm}


# ---------------------------------------------------------------------------------------------------------------------
# Buffers


def norm_problem(**options):
    return Module(nn.Linear(N, N), nn.BatchNorm1d(N, **options), nn.Tanh())


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_are_constants(momentum):
    problem = norm_problem(momentum=momentum)
    problem.model(problem.data)  # not the initial values
    purity = Purity.of(problem)
    loss = purity.freeze(problem.loss, "loss")
    before = everything(problem)
    tensors = dict(problem.model.named_buffers())
    with purity.solve():
        for _ in range(3):
            product(loss, point(), point(7))
            assert same(everything(problem), before)
    assert same(everything(problem), before)
    assert all(tensors[name] is buffer for name, buffer in problem.model.named_buffers())
    loss(point())
    assert not same(everything(problem), before)


def test_a_retained_graph_serves_products_after_later_evaluations():
    """Copying old statistics back over the new ones would make autograd refuse this product, and rightly."""
    problem = norm_problem()
    purity = Purity.of(problem)
    loss = purity.freeze(problem.loss, "loss")
    x, v = point().requires_grad_(), point(7)
    with purity.solve():
        (gradient,) = torch.autograd.grad(loss(x), x, create_graph=True)
        loss(point(9)), loss(point(10))
        retained = torch.autograd.grad(gradient, x, v)[0]
        assert torch.allclose(retained, product(loss, x.detach(), v), rtol=1e-12)


TRACKED = {
    "vmap": lambda f, xs: vmap(f)(xs),
    "vmap of grad": lambda f, xs: vmap(grad(f))(xs),
    "grad of vmap": lambda f, xs: grad(lambda y: vmap(f)(y).sum())(xs),
    "jvp of vmap": lambda f, xs: jvp(vmap(f), (xs,), (xs,))[1],
    "vmap of jvp of vmap": lambda f, xs: vmap(lambda t: jvp(vmap(f), (xs,), (t,))[1])(torch.stack([xs, -xs, 2 * xs])),
}


@pytest.mark.parametrize("transform", TRACKED)
def test_tracked_statistics_work_under_transforms_and_give_what_untracked_ones_give(transform):
    tracked, untracked = norm_problem(), norm_problem(track_running_stats=False)
    untracked.model.load_state_dict(dict(tracked.model.named_parameters()))
    xs = torch.stack([point(1), point(2), point(3)])
    with pytest.raises(RuntimeError):
        TRACKED[transform](tracked.loss, xs)
    before = everything(tracked)
    purity = Purity.of(tracked)
    loss = purity.freeze(tracked.loss, "loss")
    with purity.solve():
        found = [TRACKED[transform](loss, xs) for _ in range(2)]
    assert same(everything(tracked), before)
    expected = TRACKED[transform](untracked.loss, xs)
    assert torch.equal(found[0], found[1]) and torch.allclose(found[0], expected, rtol=1e-12, atol=1e-13)


def test_a_hessian_by_transforms_through_tracked_statistics():
    problem = norm_problem()
    purity = Purity.of(problem)
    loss = purity.freeze(problem.loss, "loss")
    with purity.solve():
        dense = jacrev(jacrev(loss))(point())
        assert torch.allclose(dense @ point(7), product(loss, point(), point(7)), rtol=1e-10)


def test_buffers_handed_to_functional_call_in_a_dictionary_of_the_problem_are_frozen_too():
    class Stateless(Base):
        def __init__(self):
            super().__init__()
            self.model = nn.BatchNorm1d(N)
            self.buffers = dict(self.model.named_buffers())
            self.weights = dict(self.model.named_parameters())

        def noisy(self, features):
            return functional_call(self.model, {**self.weights, **self.buffers}, (features,))

    problem = Stateless()
    purity = Purity.of(problem)
    loss = purity.freeze(problem.loss, "loss")
    before = [buffer.clone() for buffer in problem.buffers.values()]
    with purity.solve():
        loss(point()), loss(point())
        assert same(list(problem.buffers.values()), before)
    assert all(problem.buffers[name] is buffer for name, buffer in problem.model.named_buffers())
    problem.loss(point())
    assert not same(list(problem.buffers.values()), before)


def test_a_buffer_that_is_replaced_comes_back():
    class Average(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(N))

        def forward(self, x):
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
            return x - self.mean

    problem = Module(Average())
    purity = Purity.of(problem)
    loss, mean = purity.freeze(problem.loss, "loss"), problem.model[0].mean
    with purity.solve():
        assert loss(point()) == loss(point())
    assert problem.model[0].mean is mean and not mean.any()
    (found,) = randomness(purity, {"loss": lambda: problem.loss(point())})
    assert (found.fault, found.place) == (Fault.changing_buffer, "problem.model.0.mean in loss")


# ---------------------------------------------------------------------------------------------------------------------
# Kernels


def switches():
    flags = torch.backends.cuda
    return (
        flags.flash_sdp_enabled(),
        flags.mem_efficient_sdp_enabled(),
        flags.math_sdp_enabled(),
        torch.backends.mha.get_fastpath_enabled(),
        torch.is_autocast_enabled("cpu"),
    )


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_attention_and_autocast_are_set_for_the_solve_only(autocast, fails):
    purity = Purity.of(None)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        before = switches()
        try:
            with purity.solve():
                with purity.solve():
                    assert switches() == (False, False, True, False, False)
                assert switches() == (False, False, True, False, False)
                assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float64
                if fails:
                    raise ZeroDivisionError
        except ZeroDivisionError:
            pass
        assert switches() == before
        wide = (torch.ones(2, 2, dtype=torch.float32) @ torch.ones(2, 2, dtype=torch.float32)).dtype
        assert wide == (torch.bfloat16 if autocast else torch.float32)


def test_attention_has_second_derivatives_inside_a_solve():
    problem = Attention(p=0.0)
    purity = Purity.of(problem)
    loss = purity.freeze(problem.loss, "loss")
    with pytest.raises(RuntimeError, match="not implemented"):
        product(loss, point(), point(7))
    with purity.solve():
        x, v = point(), point(7)
        dense = hessian(loss)(x)
        assert torch.allclose(product(loss, x, v), dense @ v, rtol=1e-10)


def test_a_transformer_layer_has_the_same_values_with_and_without_gradients():
    class Layer(Base):
        def __init__(self):
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(N, 2, 8, dropout=0.0, batch_first=True).eval()

        def noisy(self, features):
            return self.layer(features[None])

    problem = Layer()
    purity = Purity.of(problem)
    loss = purity.freeze(problem.loss, "loss")
    with purity.solve():
        with torch.no_grad():
            without = loss(point())
        assert torch.equal(without, loss(point().requires_grad_()).detach())


# ---------------------------------------------------------------------------------------------------------------------
# What comes late


class Late(Base):
    """Begins to misbehave at its third evaluation."""

    def __init__(self, act):
        super().__init__()
        self.number = itertools.count(1)
        self.act = act
        self.model = nn.BatchNorm1d(N).eval()
        self.own = np.random.RandomState(3)

    def noisy(self, features):
        factor = self.act(self) if next(self.number) > 2 else 1.0
        return self.model(features) * factor


def _train(problem):
    problem.model.train()
    return 1.0


LATE = {
    "numpy": (lambda problem: np.random.rand(), "NumPy's global generator changed during a solve"),
    "python": (lambda problem: random.random(), "Python's random module changed during a solve"),
    "own twister": (lambda problem: problem.own.rand(), "problem.own changed during a solve"),
    "statistics": (_train, "problem.model.running_mean and problem.model.running_var and"),
}


@pytest.mark.parametrize("name", LATE)
def test_what_a_function_begins_late_is_told_once_and_frozen_from_the_next_solve_on(name):
    act, sentence = LATE[name]
    problem = Late(act)
    purity = Purity.of(problem)
    loss = purity.freeze(problem.loss, "loss")
    buffers = [buffer.clone() for buffer in problem.model.buffers()]
    with pytest.warns(UserWarning, match=sentence) as caught, purity.solve():
        for _ in range(5):
            loss(point())
    assert len(caught) == 1 and caught[0].filename == __file__
    assert same(list(problem.model.buffers()), buffers)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            with purity.solve():
                assert len({float(loss(point()).detach()) for _ in range(4)}) == 1


def test_torchs_own_generators_need_no_first_sight():
    problem = Late(lambda problem: torch.rand(()))
    purity = Purity.of(problem)
    loss = purity.freeze(problem.loss, "loss")
    with warnings.catch_warnings(), purity.solve():
        warnings.simplefilter("error")
        values = [float(loss(point()).detach()) for _ in range(6)]
    assert len(set(values[:2])) == 1 and len(set(values[2:])) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Findings


@rows
def test_randomness_names_what_would_change(name):
    problem, purity, loss = made(name)
    row, before = ROWS[name], everything(problem)
    for evaluate in (problem.loss, loss):  # plain, and as a problem between vectors has it
        found = randomness(purity, {"loss": lambda: evaluate(point())})
        assert row.fault in {one.fault for one in found} and all(one.fault.frozen for one in found)
        assert any(row.place in str(one) and str(one).endswith(".") for one in found), [str(one) for one in found]
        assert len(found) == (2 if name == "spectral norm" else 1)
    assert same(everything(problem), before)
    assert disturbances(purity, {"loss": lambda: problem.loss(point())}) == []


@pytest.mark.parametrize("level", ["plain", "vmap", "grad"])
def test_randomness_names_tracked_statistics(level):
    problem = norm_problem()
    purity = Purity.of(problem)
    loss = purity.freeze(problem.loss, "loss")
    evaluate = {
        "plain": lambda: loss(point()),
        "vmap": lambda: vmap(loss)(torch.eye(N)),
        "grad": lambda: grad(loss)(point()),
    }
    (found,) = randomness(purity, {"loss": evaluate[level]})
    assert found.fault is Fault.tracked_batch_norm
    assert (
        found.place.startswith("problem.model.1 (BatchNorm1d(6, eps=1e-05, momentum=0.1") and "in loss" in found.place
    )
    problem.model.eval()
    assert randomness(purity, {"loss": evaluate[level]}) == []


def test_randomness_tells_masks_under_vmap_and_of_which_function():
    _, purity, loss = made("nn.Dropout")
    functions = {
        "inner_loss": lambda: vmap(loss, randomness="different")(torch.eye(N)),
        "outer_loss": lambda: Base().loss(point()),
    }
    (found,) = randomness(purity, functions)
    assert (
        found.fault is Fault.dropout and found.place == "problem.model.1 (Dropout(p=0.4, inplace=False)) in inner_loss"
    )


QUIET = {
    "nothing": Base,
    "eval": lambda: _quiet(Module(nn.Dropout(0.5), nn.BatchNorm1d(N))),
    "p=0 and untracked": lambda: Module(nn.Dropout(0.0), nn.BatchNorm1d(N, track_running_stats=False), nn.LayerNorm(N)),
    "seeded anew": lambda: Noise(lambda self, shape: torch.randn(shape, generator=torch.Generator().manual_seed(3))),
}


def _quiet(problem):
    problem.model.eval()
    return problem


@pytest.mark.parametrize("name", QUIET)
def test_nothing_is_found_where_nothing_is(name):
    problem = QUIET[name]()
    purity = Purity.of(problem)
    functions = {"loss": lambda: problem.loss(point())}
    assert randomness(purity, functions) == [] and disturbances(purity, functions) == []


GLOBAL = torch.Generator().manual_seed(9)  # of this module, where no walk over a problem gets


def _iterator():
    numbers = itertools.cycle([0.1, 0.2])
    return Noise(lambda self, shape: np.full(shape, next(numbers)))


def _in_place(self, shape):
    self.data.mul_(1.01)
    return np.zeros(shape)


def _functional_norm(self, shape):
    F.batch_norm(self.data, self.mean, self.variance, training=True)  # autograd does not count this change
    return np.zeros(shape)


DISTURBED = {
    "generator of a module": (lambda: Noise(lambda self, shape: torch.randn(shape, generator=GLOBAL)), Fault.hidden_randomness, "loss returns another value"),
    "operating system": (lambda: Noise(lambda self, shape: np.full(shape, os.urandom(1)[0] + random.SystemRandom().random())), Fault.hidden_randomness, "loss returns"),
    "clock": (lambda: Noise(lambda self, shape: np.full(shape, time.perf_counter() % 1)), Fault.hidden_randomness, "loss returns"),
    "iterator": (_iterator, Fault.hidden_randomness, "loss returns"),
    "held SystemRandom": (lambda: Noise(lambda self, shape: _from_python(self.own, shape), own=random.SystemRandom()), Fault.hidden_randomness, "loss returns"),
    "seed that counts": (lambda: Noise(lambda self, shape: torch.randn(shape, generator=torch.Generator().manual_seed(next(self.n))), n=itertools.count()), Fault.hidden_randomness, "loss returns"),
    "data changed in place": (lambda: Noise(_in_place), Fault.changed_in_place, "problem.data in loss is changed in place"),
    "functional batch norm": (lambda: Noise(_functional_norm, mean=torch.zeros(N), variance=torch.ones(N)), Fault.changed_in_place, "problem.mean in loss is changed"),
}  # fmt: skip


@pytest.mark.parametrize("name", DISTURBED)
def test_disturbances_are_named(name):
    make, fault, sentence = DISTURBED[name]
    problem = make()
    purity, before = Purity.of(problem), get_state()
    found = disturbances(purity, {"fine": lambda: Base().loss(point()), "loss": lambda: problem.loss(point())})
    assert {one.fault for one in found} == {fault} and not fault.frozen
    assert str(found[0]).startswith(sentence)
    assert same(get_state(), before)


def test_a_loss_that_changes_its_arguments_in_place_is_found():
    def loss(x):
        x += 1e-3
        return x.square().sum()

    x, inputs = point(), {"hparams.penalty": torch.ones(())}
    (found,) = disturbances(Purity.of(None), {"loss": lambda: loss(x)}, inputs={"params": x, **inputs})
    assert str(found).startswith("params in loss is changed in place by an evaluation")


def _under(enabled, where):
    """A problem with a network of its own, evaluated under an autocast of the loss's own."""

    class Cast(Module):
        def noisy(self, features):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                return self.model(features) if where == "module" else features @ features.T

    return Cast(nn.Linear(N, N), nn.Linear(N, N))


@pytest.mark.parametrize(
    ("where", "place"), [("module", "problem.model.0 (Linear(in_features=6, "), ("line", "matmul at test_purity.py:")]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("level", ["plain", "vmap", "grad", "compiled"])
def test_an_autocast_inside_the_loss_is_named_once_for_each_function(level, dtype, where, place):
    torch.set_default_dtype(dtype)
    problem = _under(True, where)
    problem.data = problem.data.to(dtype)
    purity, x = Purity.of(problem), point().to(dtype)
    if level == "compiled":
        problem.noisy = torch.compile(problem.noisy, backend="eager")
    evaluate = {
        "plain": lambda: problem.loss(x),
        "vmap": lambda: vmap(problem.loss)(x.repeat(2, 1)),
        "grad": lambda: grad(problem.loss)(x),
        "compiled": lambda: problem.loss(x),
    }[level]
    (found,) = disturbances(purity, {"fine": lambda: Base().loss(point()), "loss": evaluate})
    assert found.fault is Fault.autocast and not found.fault.frozen
    assert str(found).startswith(place) and " in loss runs under an autocast" in str(found)


@pytest.mark.parametrize("where", ["module", "line"])
def test_an_autocast_that_is_off_or_around_the_solve_is_no_finding(where):
    torch.set_default_dtype(torch.float32)
    problem = _under(False, where)
    problem.data = problem.data.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert disturbances(Purity.of(problem), {"loss": lambda: problem.loss(point().float())}) == []


@pytest.mark.filterwarnings("ignore::bilevel.errors.ConvergenceWarning")
def test_a_run_warns_of_an_autocast_in_its_loss_and_its_steps_are_not_watched(monkeypatch):
    torch.set_default_dtype(torch.float32)
    watched = []
    enter = findings.CallWatch.__enter__
    monkeypatch.setattr(findings.CallWatch, "__enter__", lambda self: watched.append(1) or enter(self))

    class Cast(Problem):
        def init_hparams(self):
            return {"target": torch.ones(2)}

        def init_params(self, hparams):
            return {"x": torch.zeros(2)}

        def inner_loss(self, params, hparams, batch):
            matrix = torch.eye(2)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                product = params["x"] @ matrix
            return (product.float() - hparams["target"]).square().sum() + params["x"].square().sum()

        def outer_loss(self, params, hparams, batch):
            return params["x"].square().sum()

    with pytest.warns(UserWarning, match=r"matmul at test_purity.py:\d+ in inner_loss runs under an autocast"):
        fit(Cast(), solver=GradientDescent(learning_rate=0.1, max_steps=5), num_steps=3)
    assert len(watched) == 2  # once for each of the two losses, however many steps there are


def test_rounding_is_no_disturbance_and_more_is():
    errors = itertools.cycle([0.0, 1.0, -1.0])

    def evaluate(size):
        values = {"value": torch.tensor(3.0), "gradient": [torch.tensor([1.0, torch.nan, torch.inf])]}
        values["value"] = values["value"] * (1 + size * next(errors))
        return values

    purity = Purity.of(None)
    assert disturbances(purity, {"loss": lambda: evaluate(4 * torch.finfo(torch.float64).eps)}) == []
    (found,) = disturbances(purity, {"loss": lambda: evaluate(1e-12)})
    assert found.fault is Fault.hidden_randomness


BATCHES = {
    "pure": (lambda step, inner: torch.randperm(20, generator=generator(step, inner))[:4], True),
    "global generator": (lambda step, inner: torch.randperm(20)[:4], False),
    "own iterator": (lambda step, inner, order=itertools.count(): {"x": [next(order)]}, False),
    "numpy": (lambda step, inner: (np.random.rand(3), "train"), False),
    "no data": (lambda step, inner: object(), True),
}


@pytest.mark.parametrize("name", BATCHES)
def test_impure_batches_are_named(name):
    draw, pure = BATCHES[name]
    before = get_state()
    found = disturbances(Purity.of(None), {}, batches={"inner_batches": lambda: draw(2, 3)})
    assert [one.fault for one in found] == ([] if pure else [Fault.fresh_minibatch])
    assert pure or str(found[0]).startswith("inner_batches returns other data")
    assert same(get_state(), before)


def test_every_fault_has_a_key_and_a_sentence():
    assert [fault.name for fault in Fault if fault.frozen] == [
        "dropout",
        "noise",
        "tracked_batch_norm",
        "changing_buffer",
    ]
    assert len({fault.value for fault in Fault}) == len(Fault) == 8
    assert not any(fault.value.endswith(".") for fault in Fault)


# ---------------------------------------------------------------------------------------------------------------------
# The walk


@dataclass
class Inner:
    source: torch.Generator = field(default_factory=torch.Generator)
    numbers: tuple = (1, 2)

    def method(self):
        return self.source


def test_the_walk_finds_everything_once_and_ends_in_circles():
    problem = Base()
    problem.itself = problem
    problem.parts = [Inner(), (torch.ones(1), {"model": nn.Sequential(nn.BatchNorm1d(2))})]
    problem.same_model = problem.parts[1][1]["model"]
    problem.bound = Inner().method
    problem.default, problem.twister = torch.default_generator, np.random.mtrand._rand  # global, not the problem's
    held = Holdings.of(problem)
    assert [source.name for source in held.sources] == ["problem.parts[0].source", "problem.bound.source"]
    assert list(held.modules) == ["problem.parts[1][1]['model']", "problem.parts[1][1]['model'].0"]
    stem = "problem.parts[1][1]['model'].0"
    assert [b.name for b in held.buffers] == [
        f"{stem}.running_mean",
        f"{stem}.running_var",
        f"{stem}.num_batches_tracked",
    ]
    assert list(held.tensors) == ["problem.data", "problem.parts[1][0]", f"{stem}.weight", f"{stem}.bias"]


def test_a_forward_mode_jacobian_of_gradients_agrees_with_a_reverse_one():
    _, purity, loss = made("torch.randn")
    with purity.solve():
        forward = vmap(lambda v: jvp(grad(loss), (point(),), (v,))[1], randomness="same")(torch.eye(N))
        assert torch.allclose(forward, jacrev(jacrev(loss))(point()), rtol=1e-10, atol=1e-12)
        assert torch.allclose(jacfwd(loss, randomness="same")(point()), grad(loss)(point()), rtol=1e-10)


@pytest.mark.parametrize("layout", ["to_sparse_coo", "to_sparse_csr", "to_sparse_csc"])
def test_sparse_tensors_are_compared_by_what_they_are_made_of(layout):
    dense = torch.tensor([[0.0, 2.0], [torch.nan, 0.0]])
    first = getattr(dense, layout)()
    assert same(first, getattr(dense.clone(), layout)())
    assert not same(first, dense) and not same(first, getattr(2 * dense, layout)())
    assert not same(first, getattr(dense.flip(0), layout)())
