"""Matrix products of traced graphs: each way gives the product, and each is taken where it should be."""

import pytest
import torch
from torch._inductor import mkldnn_ir
from torch._inductor.utils import fresh_cache

import bilevel.linalg.matmul as module
from bilevel.linalg.compiled import CompiledDerivatives
from bilevel.linalg.differentiate import differentiate
from bilevel.linalg.matmul import arrange_products, prefers_onednn
from bilevel.linalg.tracing import trace

has_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
ZEN4 = {"cpu_name": "AMD EPYC", "avx512_f": True}


def randn(*shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).to(dtype)


def single(*shape):
    return randn(*shape, dtype=torch.float32)


def arranged(function, *example):
    """The graph of a function after the rewriting, and the names of its operations."""
    graph = trace(lambda *tensors: [function(*tensors)], example)
    arrange_products(graph)
    return graph, [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]


@pytest.fixture
def onednn(monkeypatch):
    """All products of float32 are large, on a processor where oneDNN is faster."""
    monkeypatch.setattr(module, "prefers_onednn", lambda: True)
    monkeypatch.setattr(module, "LARGE", 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("rows", "columns", "turned"),
    [
        (40, 3, (True, True)),
        (40, 16, (False, True)),  # a full tile of float32
        (40, 24, (False, False)),  # a full tile of float64
        (40, 32, (False, True)),
        (40, 33, (False, False)),
        (3, 3, (False, False)),
        (2, 5, (False, False)),
    ],
)
def test_narrow_products_are_computed_as_transposes(rows, columns, turned, dtype):
    turned = turned[dtype == torch.float64]
    left, right = randn(rows, 7, dtype=dtype), randn(7, columns, dtype=dtype)
    graph, names = arranged(torch.mm, left, right)
    shapes = [
        node.meta["val"].shape for node in graph.graph.find_nodes(op="call_function", target=module.aten.mm.default)
    ]
    assert shapes == [(columns, rows) if turned else (rows, columns)]
    assert names.count("aten.t.default") == (3 if turned else 0)
    (found,) = graph(left, right)
    torch.testing.assert_close(found, left @ right)


def test_a_view_of_a_turned_product_stays_possible():
    left, right = randn(90, 48), randn(48, 10)
    graph, _ = arranged(lambda a, b: (a @ b).view(-1), left, right)
    torch.testing.assert_close(graph(left, right)[0], (left @ right).view(-1), rtol=1e-13, atol=1e-13)


@has_onednn
@pytest.mark.parametrize(
    ("left", "right", "taken"),
    [
        (single(40, 20), single(30, 20).T, True),
        (single(40, 20), single(20, 30), False),  # a copy would cost too much
        (single(520, 20), single(20, 30), True),
        (single(20, 40).T, single(30, 20).T, False),
        (single(20, 40).T, single(520, 20).T, True),
        (single(20, 600).T, single(20, 520), True),
        (single(40, 20), single(3, 20).T, True),
        (single(600, 20), single(20, 3), True),
        (randn(40, 20), randn(30, 20).T, False),  # oneDNN has no float64
    ],
    ids=["as wanted", "right by rows", "right by rows, many rows", "left by columns", "left by columns, many columns",
         "both", "narrow", "narrow, right by rows", "float64"],
)  # fmt: skip
def test_large_products_are_those_of_onednn(left, right, taken, onednn):
    graph, names = arranged(torch.mm, left, right)
    assert ("bilevel.linear.default" in names) is taken
    (found,) = graph(left, right)
    torch.testing.assert_close(found, left @ right, rtol=1e-5, atol=1e-5)


@has_onednn
@pytest.mark.parametrize(
    ("function", "bias", "right", "taken"),
    [
        (torch.addmm, single(30), single(30, 20).T, True),
        (torch.addmm, single(60)[::2], single(30, 20).T, True),
        (torch.addmm, single(1).expand(30), single(30, 20).T, True),
        (torch.addmm, single(1), single(30, 20).T, False),
        (torch.addmm, single(40, 30), single(30, 20).T, False),
        (torch.addmm, single(3), single(3, 20).T, True),
        (torch.addmm, single(3), single(20, 3), False),
        (lambda bias, *factors: torch.addmm(bias, *factors, beta=2.0), single(30), single(30, 20).T, False),
    ],
    ids=["vector", "every second number", "one number, spread", "one number", "matrix", "narrow", "narrow, by rows",
         "scaled"],
)  # fmt: skip
def test_large_layers_are_those_of_onednn(function, bias, right, taken, onednn):
    left = single(40, 20)
    graph, names = arranged(function, bias, left, right)
    assert ("bilevel.linear.default" in names) is taken
    torch.testing.assert_close(graph(bias, left, right)[0], function(bias, left, right), rtol=1e-5, atol=1e-5)


def test_small_products_are_left_alone(monkeypatch):
    monkeypatch.setattr(module, "prefers_onednn", lambda: True)
    assert arranged(torch.mm, single(40, 40), single(40, 40))[1] == ["aten.mm.default"]


@has_onednn
def test_the_operation_is_known_to_the_compiler():
    inputs, bias = randn(4, 5, dtype=torch.float32), randn(6, dtype=torch.float32)
    for weight in (randn(6, 5, dtype=torch.float32), randn(5, 6, dtype=torch.float32).T):
        torch.library.opcheck(torch.ops.bilevel.linear.default, (inputs, weight))
        torch.library.opcheck(torch.ops.bilevel.linear.default, (inputs, weight, bias))


@has_onednn
@pytest.mark.parametrize("known", [True, False], ids=["compiler as known", "another compiler"])
def test_compiled_products_of_onednn_are_the_eager_ones(known, onednn, monkeypatch):
    asked, create = [], mkldnn_ir.LinearUnary.create

    def counted(*args):
        asked.append(args)
        return create(*args) if known else create(*args, "an argument more")

    monkeypatch.setattr(mkldnn_ir.LinearUnary, "create", counted)
    inputs, labels = randn(50, 24, dtype=torch.float32), torch.arange(50) % 3

    def loss(x, args, data):
        hidden = torch.tanh(inputs @ x[: 24 * 40].reshape(24, 40))
        hidden = torch.tanh(hidden @ x[24 * 40 : 24 * 40 + 40 * 20].reshape(40, 20))
        out = hidden @ x[-20 * 3 :].reshape(20, 3)
        return torch.nn.functional.cross_entropy(out, labels) + (args["decay"] * x**2).sum()

    point = 0.3 * randn(24 * 40 + 40 * 20 + 20 * 3, dtype=torch.float32)
    args, vector = {"decay": torch.tensor(0.1)}, randn(len(point), dtype=torch.float32)
    with fresh_cache():
        found, expected = CompiledDerivatives().at(loss, point, args), differentiate(loss, point, args)
    assert found.fallback is None and asked
    torch.testing.assert_close(found.operator.mv(vector), expected.operator.mv(vector), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.mixed(vector), expected.mixed(vector), rtol=1e-4, atol=1e-5)


@has_onednn
@pytest.mark.parametrize(
    ("capabilities", "preferred"),
    [
        (ZEN4, True),
        ({**ZEN4, "avx512_f": False}, False),
        ({**ZEN4, "cpu_name": "Intel Xeon"}, False),
        ({"cpu_name": "Apple M4"}, False),
        ({}, False),
    ],
    ids=["Zen 4", "without AVX-512", "Intel", "Apple", "unknown"],
)
def test_it_goes_by_the_processor(capabilities, preferred, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert prefers_onednn() is preferred
    with torch.backends.mkldnn.flags(enabled=False):
        assert prefers_onednn() is False
