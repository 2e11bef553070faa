"""Networks of many tasks at once: the same numbers as one by one, and as torch's own layers, with their derivatives."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.nn import functional

from bilevel.errors import UsageError
from bilevel.linalg import HessianOperator
from bilevel.models import (
    MLP,
    Conv4,
    ModuleNetwork,
    ResNet12,
    SoftmaxRegression,
    conv4,
    convolution,
    convolve,
    grouped,
    layers,
    normalise,
    patches,
    resnet12,
)
from bilevel.models.geometry import Geometry
from bilevel.models.layers import normalised_convolution
from bilevel.models.network import activation_of
from bilevel.tree import Layout

GEOMETRIES = [(3, 1, 0), (3, 2, 1), (3, 1, 1), (1, 1, 0), (2, 3, 1)]  # kernel, stride, padding
WAYS = {
    "one product": (convolution, "groups_are_fast", lambda like: False),
    "in parts": (patches, "CACHE", 1),
    "grouped": (convolution, "groups_are_fast", lambda like: True),
}


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    monkeypatch.setattr(*WAYS[request.param])
    return request.param


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize(("kernel", "stride", "padding"), GEOMETRIES)
def test_convolutions_of_tasks_are_torchs_with_both_derivatives(way, kernel, stride, padding):
    x, w = draw(3, 2, 7, 6, 2), draw(3, 4, kernel, kernel, 2, seed=1)
    ours = convolve(x, w, stride, padding)
    theirs = torch.stack(
        [
            functional.conv2d(a.permute(0, 3, 1, 2), b.permute(0, 3, 1, 2), None, stride, padding)
            for a, b in zip(x, w, strict=True)
        ]
    )
    torch.testing.assert_close(ours, theirs.permute(0, 1, 3, 4, 2), rtol=1e-12, atol=1e-12)
    small, few = x[:2, :1, :5, :5].detach().requires_grad_(), w[:2, :2].detach().requires_grad_()
    assert gradcheck(lambda a, b: convolve(a, b, stride, padding), (small, few))
    assert gradgradcheck(lambda a, b: convolve(a, b, stride, padding), (small, few))


@pytest.mark.parametrize(
    ("module", "network", "side"), [(conv4, Conv4(3, 4, 8, 1, 2, "softplus"), 8), (resnet12, ResNet12(3, (2, 3)), 8)]
)
def test_tasks_of_many_images_are_taken_one_by_one_with_the_same_numbers(module, network, side, monkeypatch):
    start = network.init(0)
    layout = Layout.of(start)
    x = layout.ravel(start).double().expand(3, -1) + 0.1 * draw(3, layout.size).detach()
    images, vector = draw(3, 5, side, side, 1, seed=1).detach(), draw(3, layout.size, seed=2).detach()

    def numbers():
        operator = HessianOperator(lambda flat: network(layout.unravel(flat), images).square().sum((-2, -1)), x)
        return operator.gradient.detach(), operator.mv(vector)

    together, calls = numbers(), []
    monkeypatch.setattr(module, "are_many", lambda inputs, weight: inputs.ndim == 5)
    monkeypatch.setattr(layers.torch, "batch_norm", lambda *args, f=torch.batch_norm: calls.append(1) or f(*args))
    for ours, theirs in zip(numbers(), together, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    assert calls


@pytest.mark.parametrize(
    ("inputs", "weight", "many"),
    [
        (torch.zeros(2, 75, 28, 28, 1), torch.zeros(2, 4, 3, 3, 1), True),
        (torch.zeros(2, 5, 28, 28, 1), torch.zeros(2, 4, 3, 3, 1), False),  # few
        (torch.zeros(2, 75, 28, 28, 1).double(), torch.zeros(2, 4, 3, 3, 1), False),  # torch has no fast kernels
        (torch.zeros(2, 75, 28, 28, 1), torch.zeros(4, 3, 3, 1), False),  # one network for all
        (torch.zeros(75, 28, 28, 1), torch.zeros(4, 3, 3, 1), False),  # one task
    ],
)
def test_which_tasks_are_taken_one_by_one(inputs, weight, many):
    assert layers.are_many(inputs, weight) is many


def test_shared_weights_serve_all_tasks():
    x, w = draw(3, 2, 6, 6, 2), draw(4, 3, 3, 2, seed=1)
    torch.testing.assert_close(
        convolve(x, w, 2, 1), convolve(x, w.expand(3, -1, -1, -1, -1), 2, 1), rtol=1e-12, atol=1e-12
    )
    assert convolve(x[0], w, 2, 1).shape == (2, 3, 3, 4)


def test_normalisation_is_torchs_with_three_derivatives():
    x, gain, bias = draw(3, 10, 4), draw(3, 4, seed=1), draw(3, 4, seed=2)
    ours = normalise(x, gain, bias)
    theirs = [
        functional.batch_norm(*one[:1], None, None, *one[1:], training=True) for one in zip(x, gain, bias, strict=True)
    ]
    torch.testing.assert_close(ours, torch.stack(theirs), rtol=1e-12, atol=1e-12)
    assert gradcheck(normalise, (x, gain, bias)) and gradgradcheck(normalise, (x, gain, bias))

    def slope(*args):
        (by_x,) = grad(normalise(*args).pow(3).sum(), args[0], create_graph=True)
        return by_x.square().sum()

    assert gradgradcheck(
        slope, (x[:2, :5].detach().requires_grad_(), *(one[:2].detach().requires_grad_() for one in (gain, bias)))
    )


def test_normalisation_with_shared_gain_is_still_by_task():
    x, gain, bias = draw(3, 10, 4), draw(4, seed=1), draw(4, seed=2)
    torch.testing.assert_close(normalise(x, gain, bias)[1], normalise(x[1], gain, bias), rtol=1e-12, atol=1e-12)
    assert gradcheck(normalise, (x, gain, bias))


@pytest.mark.parametrize("shared", [False, True])
def test_statistics_from_patches_are_those_of_the_outputs(monkeypatch, shared):
    x = draw(3, 2, 7, 7, 1).detach()
    params = {"a.weight": draw(3, 5, 3, 3, 1, seed=1), "a.gain": draw(3, 5, seed=2), "a.bias": draw(3, 5, seed=3)}
    if shared:
        params = {name: value[0].detach().requires_grad_() for name, value in params.items()}
    results = []
    for few in (layers.SMALL_PATCH, 0):
        monkeypatch.setattr(layers, "SMALL_PATCH", few)
        y = normalised_convolution(params, "a", x, stride=2, padding=1)
        first = grad(y.pow(3).sum(), list(params.values()), create_graph=True)
        second = grad(sum(one.square().sum() for one in first), list(params.values()))
        results.append([y, *first, *second])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


NETWORKS = {
    "conv4": (Conv4(3, num_filters=4, image_size=9, activation="softplus"), (4, 9, 9, 1)),
    "conv4 relu": (Conv4(3, num_filters=4, image_size=9), (4, 9, 9, 1)),
    "conv4 colour": (Conv4(3, num_filters=4, image_size=8, num_channels=3, num_layers=2), (4, 8, 8, 3)),
    "resnet12": (ResNet12(3, widths=(3, 4)), (4, 6, 7, 1)),
    "mlp": (MLP(2, 3, hidden=(5, 4), activation="tanh"), (6, 2)),
    "mlp linear": (MLP(2, 3, hidden=()), (6, 2)),
}


def task_params(network, num_tasks):
    one = network.init(0)
    return {
        name: value.double() + 0.1 * draw(num_tasks, *value.shape, seed=index).detach()
        for index, (name, value) in enumerate(one.items())
    }


@pytest.mark.parametrize("name", NETWORKS)
def test_tasks_at_once_are_the_tasks_one_by_one_with_products_of_their_hessians(name):
    network, shape = NETWORKS[name]
    params, inputs = task_params(network, 3), draw(3, *shape).detach()
    layout = Layout.of(params, 1)
    x, vector = layout.ravel(params, 1), draw(3, layout.size, seed=9).detach()
    together = HessianOperator(lambda v: network(layout.unravel(v), inputs).tanh().pow(2).sum((-2, -1)), x)
    assert network(params, inputs).shape[:2] == (3, shape[0])
    product = together.mv(vector)
    for task in range(3):
        alone = HessianOperator(lambda v, t=task: network(layout.unravel(v), inputs[t]).tanh().pow(2).sum(), x[task])
        torch.testing.assert_close(together.gradient[task], alone.gradient, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(product[task], alone.mv(vector[task]), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", NETWORKS)
def test_weights_of_one_task_are_shared_by_all(name):
    network, shape = NETWORKS[name]
    params, inputs = {key: value[0] for key, value in task_params(network, 1).items()}, draw(3, *shape).detach()
    torch.testing.assert_close(network(params, inputs)[2], network(params, inputs[2]), rtol=1e-10, atol=1e-10)


def test_conv4_is_the_network_of_the_papers():
    network = Conv4(5)
    params = {name: value.double() for name, value in network.init(3).items()}
    blocks = []
    for layer, channels in enumerate((1, 64, 64, 64)):
        conv = torch.nn.Conv2d(channels, 64, 3, stride=2, padding=1, bias=False).double()
        conv.weight.data = params[f"conv{layer}.weight"].permute(0, 3, 1, 2)
        norm = torch.nn.BatchNorm2d(64, track_running_stats=False).double()
        norm.weight.data, norm.bias.data = params[f"conv{layer}.gain"], params[f"conv{layer}.bias"]
        blocks += [conv, norm, torch.nn.ReLU()]
    features = torch.nn.Sequential(*blocks)
    images = draw(10, 28, 28, 1).detach()
    theirs = features(images.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).flatten(1)
    torch.testing.assert_close(network.features(params, images), theirs, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        network(params, images),
        functional.linear(theirs, params["head.weight"], params["head.bias"]),
        rtol=1e-9,
        atol=1e-9,
    )
    assert sum(value.numel() for value in params.values()) == 9 * 64 + 3 * 9 * 64**2 + 8 * 64 + 257 * 5


def test_starting_weights_follow_from_the_seed():
    for network, _ in NETWORKS.values():
        first, again, other = network.init(0), network.init(0), network.init(1)
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert any(not torch.equal(first[name], other[name]) for name in first)
        assert all(value.dtype == torch.float32 for value in first.values())


def test_a_module_is_a_network_of_one_task():
    module = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.Flatten(), torch.nn.Linear(3 * 16, 4))
    network = ModuleNetwork(module)
    images = torch.rand(5, 6, 6, 2)
    torch.testing.assert_close(network(network.init(0), images), module(images.permute(0, 3, 1, 2)))
    assert not network.handles_tasks and set(network.init(0)) == {name for name, _ in module.named_parameters()}


def test_a_perceptron_takes_images_as_vectors():
    network, images = MLP(12, 3, (5,)), torch.rand(7, 2, 2, 3)
    params = network.init(0)
    torch.testing.assert_close(network(params, images), network(params, images.flatten(1)), rtol=0, atol=0)
    many = {name: torch.stack([value, 2 * value]) for name, value in params.items()}
    both = network(many, images.expand(2, -1, -1, -1, -1))
    assert both.shape == (2, 7, 3)
    torch.testing.assert_close(both[0], network(params, images))


MISTAKES = [
    (lambda: Conv4(0), r"Conv4 needs num_outputs >= 1, an integer, but got 0\."),
    (lambda: Conv4(5, num_filters=2.5), "Conv4 needs num_filters >= 1, an integer, but got 2.5"),
    (lambda: ResNet12(widths=()), r"ResNet12 needs widths of at least 1, but got \[\]"),
    (
        lambda: MLP()(
            {name: value.expand(3, *value.shape) for name, value in MLP().init(0).items()}, torch.rand(3, 5, 8, 8, 1)
        ),
        r"takes inputs of 1 numbers \(model.num_inputs\), .* but they have shape \(3, 5, 8, 8, 1\)",
    ),
    (lambda: MLP()(MLP().init(0), torch.rand(5, 2)), r"but they have shape \(5, 2\)"),
    (
        lambda: convolve(torch.zeros(3, 2, 7, 7, 1), torch.zeros(6, 4, 3, 3, 1)),
        r"images of tasks \(3,\) were expected to come with weights of as many tasks, .* have shape \(6, 4, 3, 3, 1\)",
    ),
    (lambda: MLP(hidden=40), "MLP needs hidden to be a list of widths, but got 40"),
    (lambda: ResNet12(widths=64), "ResNet12 needs widths to be a list, but got 64"),
    (lambda: MLP(hidden=(0,)), r"MLP needs widths of at least 1, but got \[1, 0, 1\]"),
    (lambda: activation_of("rely"), "activation was expected to be a function of torch.nn.functional .* but is 'rely'"),
    (lambda: ModuleNetwork(torch.nn.Linear), "ModuleNetwork was expected to get a torch.nn.Module, but got <class"),
]


@pytest.mark.parametrize(("mistake", "sentence"), MISTAKES)
def test_a_mistake_is_told_in_one_sentence(mistake, sentence):
    with pytest.raises(UsageError, match=sentence):
        mistake()


def test_patches_and_their_transpose_are_adjoint():
    for kernel, stride, padding in [*GEOMETRIES, (1, 3, 2), (5, 1, 3), (2, 3, 0)]:
        geometry = Geometry(kernel, stride, padding, 7, 6)
        x = draw(2, 3, 7, 6, 2).detach()
        rows = patches.unfold(x, geometry)
        other = torch.randn(rows.shape, dtype=torch.float64)
        back = torch.zeros_like(x)
        patches.fold(other, geometry, back)
        torch.testing.assert_close((rows * other).sum(), (x * back).sum(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_grouped_convolutions_leave_tasks_side_by_side_and_so_do_the_operations_between_them(dtype, monkeypatch):
    monkeypatch.setattr(convolution, "groups_are_fast", lambda like: True)
    monkeypatch.setattr(convolution, "FEW_PLACES", 0)
    shapes = [(3, 2, 7, 6, 2), (3, 4, 3, 3, 2), (3, 4), (3, 4)]
    x, w, gain, bias = (
        draw(*shape, seed=seed).detach().to(dtype).requires_grad_() for seed, shape in enumerate(shapes)
    )
    outputs = normalised_convolution({"a.weight": w, "a.gain": gain, "a.bias": bias}, "a", x, torch.relu, 2, 1)
    (by_outputs,) = grad(outputs.square().sum(), outputs, retain_graph=True)
    for value in (convolve(x, w, 2, 1), outputs, by_outputs):
        assert value.permute(1, 2, 3, 0, 4).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tasks_are_convolved_by_groups_only_where_onednn_does_it(dtype, monkeypatch):
    calls = []
    monkeypatch.setattr(grouped, "convolve", lambda *args, f=grouped.convolve: calls.append(1) or f(*args))
    x, w = draw(3, 3, 7, 6, 2).detach().to(dtype), draw(3, 4, 3, 3, 2, seed=1).detach().to(dtype)
    found = convolve(x, w, 2, 1)  # 36 places of the kernel, 24 of two images
    assert bool(calls) is (dtype == torch.float32 and torch.backends.mkldnn.is_available())
    calls.clear()
    torch.testing.assert_close(convolve(x[:, :2], w, 2, 1), found[:, :2], rtol=1e-4, atol=1e-5)
    assert not calls
    calls.clear()
    with torch.backends.mkldnn.flags(enabled=False):
        torch.testing.assert_close(convolve(x, w, 2, 1), found, rtol=1e-4, atol=1e-5)
    assert not calls
    assert convolve(x[:0], w[:0], 2, 1).shape == (0, 3, 4, 3, 4)


@pytest.mark.parametrize("num_tasks", [1, 3])
@pytest.mark.parametrize("number", [5, 75])
def test_values_gradients_and_products_in_float32_are_those_in_float64(num_tasks, number):
    """Whichever implementation takes them; softplus has no kinks that rounding could put a unit on the other side of."""
    network = Conv4(5, 16, activation="softplus")
    start = network.init(0)
    layout = Layout.of(start)
    x = layout.ravel(start).double().expand(num_tasks, -1) + 0.02 * draw(num_tasks, layout.size).detach()
    images, vector = torch.rand(num_tasks, number, 28, 28, 1, dtype=torch.float64), draw(num_tasks, layout.size, seed=2)
    numbers = []
    for dtype in (torch.float32, torch.float64):
        at, seen = x.to(dtype), images.to(dtype)
        operator = HessianOperator(
            lambda flat, seen=seen: network(layout.unravel(flat), seen).square().sum((-2, -1)), at
        )
        values = network(layout.unravel(at), seen)
        numbers.append([values, operator.gradient.detach(), operator.mv(vector.detach().to(dtype))])
    for single, double in zip(*numbers, strict=True):
        assert float((single.double() - double).norm() / double.norm()) < 1e-3


@pytest.mark.parametrize("shape", [(12,), (2, 3, 2)])
def test_softmax_regression_gives_shared_and_own_inputs_the_same_scores(shape):
    network = SoftmaxRegression(num_inputs=12, num_outputs=3)
    x, params = draw(5, *shape), {"weight": draw(4, 3, 12, seed=1), "bias": draw(4, 3, seed=2)}
    each = [functional.linear(x.flatten(1), params["weight"][i], params["bias"][i]) for i in range(4)]
    expected = torch.stack(each)
    torch.testing.assert_close(network(params, x), expected, rtol=1e-12, atol=1e-12)
    own = network(params, x.expand(4, *x.shape))
    torch.testing.assert_close(own, expected, rtol=1e-12, atol=1e-12)
    one = network({name: value[1] for name, value in params.items()}, x)
    torch.testing.assert_close(one, expected[1], rtol=1e-12, atol=1e-12)


def test_softmax_regression_refuses_other_sizes():
    with pytest.raises(UsageError, match=r"sizes of at least 1, but got num_inputs=0 and num_outputs=10"):
        SoftmaxRegression(num_inputs=0)
    network = SoftmaxRegression(num_inputs=12)
    with pytest.raises(
        UsageError, match=r"inputs of 12 numbers \(model.num_inputs\), but they have shape \(5, 3, 3, 1\)"
    ):
        network(network.init(0), torch.zeros(5, 3, 3, 1))
