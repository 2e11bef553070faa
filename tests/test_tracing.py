"""Traced graphs: what is shared between results, and what is not."""

import pytest
import torch

from bilevel.linalg.tracing import share, trace


def shared(function, *example):
    """The graph after sharing, and the names of its operations."""
    graph = trace(lambda *tensors: list(function(*tensors)), example)
    share(graph)
    return graph, [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]


def randn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


HELD = randn(4)


@pytest.mark.parametrize(
    ("function", "operation", "times"),
    [
        (lambda x: (x.sin() + 1, x.sin() + 1), "add", 1),
        (lambda x: (x.sin() * x.sin().detach(),), "sin", 1),
        (lambda x: (x.t().clone(), x.t().clone()), "clone", 1),
        (lambda x: (x[0] * HELD, x[0] * HELD), "mul", 1),
        (lambda x: (x.sum(0), x.sum(0), x.sum(1)), "sum", 2),
        (lambda x: (torch.cat([x, x]), torch.cat([x, x]), torch.cat([x, x], 1)), "cat", 2),
        (lambda x: (x * 2, x * 2.0, x * True), "mul", 3),
        (lambda x: (x * 0.0, x * -0.0), "mul", 2),
        (lambda x: (x.to(torch.float32), x.to(torch.float16)), "_to_copy", 2),
        (lambda x: (x.var(correction=0), x.var(correction=1)), "var", 2),
    ],
    ids=["chain", "detached", "copies", "held", "dimensions", "lists", "types", "zeros", "dtypes", "keywords"],
)
def test_the_same_operation_is_made_once(function, operation, times):
    x = randn(4, 4)
    graph, names = shared(function, x)
    assert sum(name.split(".")[1] == operation for name in names) == times
    for found, expected in zip(graph(x), function(x), strict=True):
        torch.testing.assert_close(found, expected, rtol=0.0, atol=0.0)
        assert torch.equal(found.signbit(), expected.signbit())


def test_derivatives_share_the_forward_pass():
    def derivatives(x):
        leaf = x.detach().requires_grad_()
        with torch.enable_grad():
            value = (leaf.tanh() @ HELD).tanh().sum()
            (gradient,) = torch.autograd.grad(value, leaf, create_graph=True)
            (product,) = torch.autograd.grad(gradient, leaf, x)
        return value, gradient, product, (x.tanh() @ HELD).tanh().sum()

    graph, names = shared(derivatives, randn(3, 4))
    assert names.count("aten.tanh.default") == 2
    for found, expected in zip(graph(randn(3, 4)), derivatives(randn(3, 4)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)
