"""Graphs of plain tensor operations: traced from a function, derivatives included, and cut by what depends on what."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

BY_VALUE = "the function goes by the values of tensors (an `if`, a mask, `.item()` or `float()`)"


class Untraceable(Exception):
    """A function whose graph would not be the function; the message is the end of a sentence: because ..."""


def trace(function: Callable[..., Any], example: Sequence[Tensor]) -> fx.GraphModule:
    """The operations of a function of tensors, all different ones, to nested tuples and lists of tensors.

    It is run with fake tensors, which have shapes and no values: whatever would look at a value raises, instead of being
    fixed as it comes out here. Tensors that the function reads by itself become attributes of the graph, uncopied.

    Raises:
        Untraceable: the operations depend on values, draw random numbers, or change tensors from outside.
    """
    try:
        graph = _traced(function, example)
        if any(op._schema.is_mutable for op in _operations(graph)):  # what is written to later cannot be kept or shared
            graph = _traced(torch.func.functionalize(graph), example)
    except (DataDependentOutputException, GuardOnDataDependentSymNode) as error:
        raise Untraceable(BY_VALUE) from error
    for op in _operations(graph):
        if torch.Tag.nondeterministic_seeded in op.tags:
            raise Untraceable(f"the function draws random numbers ({op})")
        if op._schema.is_mutable:
            raise Untraceable(f"the function changes a tensor that it is given or holds ({op})")
        if op is torch.ops.aten._local_scalar_dense.default:
            raise Untraceable(BY_VALUE)
    # A view goes by strides, which compiled code chooses anew for what lies in between; a reshape takes any.
    for node in graph.graph.find_nodes(op="call_function", target=torch.ops.aten.view.default):
        node.target = torch.ops.aten.reshape.default
    graph.recompile()
    shapes = [value.shape for node in graph.graph.nodes if isinstance(value := node.meta.get("val"), Tensor)]
    if not all(isinstance(size, int) for shape in shapes for size in shape):
        raise Untraceable(BY_VALUE)
    return graph


def _traced(function: Callable[..., Any], example: Sequence[Tensor]) -> fx.GraphModule:
    # Without the last option, a function that reads tensors of its own could not be traced with fake ones.
    graph: fx.GraphModule = make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(*example)
    return graph


def _operations(graph: fx.GraphModule) -> list[torch._ops.OpOverload]:
    return [node.target for node in graph.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]


def share(graph: fx.GraphModule) -> None:
    """Compute everything once: of operations with the same arguments the first one serves all.

    Derivatives of derivatives come with many, and each result that is kept twice is memory that the products read.
    """
    first: dict[Any, fx.Node] = {}
    for node in graph.graph.nodes:
        if node.op not in ("call_function", "get_attr"):
            continue
        # Written out, `1`, `1.0` and `True` differ, and so do the zeros; names of nodes are unique in a graph.
        same = first.setdefault((node.target, repr(node.args), repr(node.kwargs)), node)
        same = node.args[0] if node.target is torch.ops.aten.detach.default else same
        if same is not node:
            node.replace_all_uses_with(same)
            graph.graph.erase_node(node)
    graph.recompile()


class Part(NamedTuple):
    """What of a graph depends on one vector.

    Attributes:
        graph: from the kept tensors that it reads, and the vector.
        reads: the places of these among the kept tensors.
    """

    graph: fx.GraphModule
    reads: list[int]


def split(graph: fx.GraphModule) -> tuple[fx.GraphModule, list[Part]]:
    """Cut a graph `(*inputs, *vectors) -> (*values, *lists)`, with a list of results for each vector, by the vectors.

    Returns:
        The *setup*, from the inputs to the values and then everything that the parts read, and a part for each vector.
    """
    nodes = list(graph.graph.nodes)
    results = nodes[-1].args[0]
    values, lists = [r for r in results if isinstance(r, fx.Node)], [r for r in results if not isinstance(r, fx.Node)]
    inputs = [node for node in nodes if node.op == "placeholder"]
    kept: dict[fx.Node, int] = {}
    parts = []
    for vector, result in zip(inputs[-len(lists) :], lists, strict=True):
        moving = {vector}
        for node in nodes[:-1]:
            if not moving.isdisjoint(node.all_input_nodes):
                moving.add(node)
        read = [source for node in nodes if node in moving for source in node.all_input_nodes] + list(result)
        still = list(dict.fromkeys(_origin(source) for source in read if source not in moving))
        reads = [kept.setdefault(node, len(kept)) for node in still]
        parts.append(Part(_between(graph, [*still, vector], result), reads))
    return _between(graph, inputs[: -len(lists)], [*values, *kept]), parts


def _origin(node: fx.Node) -> fx.Node:
    """The tensor that a node is a view of: a view is made again for nothing, and a tensor more costs at every call."""
    while _is_view(node):
        (node,) = node.all_input_nodes
    return node


def _is_view(node: fx.Node) -> bool:
    if node.target is operator.getitem:
        return _is_view(node.all_input_nodes[0])
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    return any(value.alias_info is not None for value in node.target._schema.returns)


def _between(graph: fx.GraphModule, inputs: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> fx.GraphModule:
    """The operations that lead from some nodes of a graph to others."""
    part = fx.Graph()
    copies = {node: part.placeholder(node.name) for node in inputs}
    for node in graph.graph.nodes:
        known = node in copies or node.op in ("placeholder", "output")
        if not known and all(source in copies for source in node.all_input_nodes):
            copies[node] = part.node_copy(node, copies.__getitem__)
    part.output(tuple(copies[node] for node in outputs))
    part.eliminate_dead_code()
    return fx.GraphModule(graph, part)
