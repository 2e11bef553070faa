"""Matrix products of a traced graph, each computed in the way that is fastest on the processor.

`python -m benchmarks.compiled` prints what they cost, and what is left beside them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten

# Columns up to which MKL multiplies the transposes faster; and the columns of its kernels' tiles, whose multiples it multiplies
# as fast as they are. Measured on Zen 4 for 300 to 5,000 rows.
NARROW = {torch.float32: (16, 16), torch.float64: (32, 24)}
# What another library than MKL has to pay for: being called, in floating-point operations of the product, and copying a
# factor, in rows or columns of the other one.
LARGE = 15 * 10**6
WIDE = 512


def arrange_products(graph: fx.GraphModule) -> None:
    """Rewrite the products `A B` and `b + A B` of a traced graph for the CPU; those on other devices are left alone.

    Large ones of float32, with `b` for each column or without, become oneDNN's where they are faster than MKL's, see
    `prefers_onednn`. It wants both factors with the summed index last in memory. Copies that this takes are operations of
    the graph: those of factors that stay the same are made once for a point.

    Any other product of few columns and more rows becomes `(B^T A^T)^T`, all by views: rows of ten numbers, the classes of
    many a network, leave most of a tile of MKL's kernels empty; columns of a thousand fill it. In float32 a result of 900
    by 10 takes two to five times as long as its transpose, in float64 one of 900 by 10 or by 32 one and a half to two times.
    """
    onednn = prefers_onednn()
    for node in graph.graph.find_nodes(op="call_function", target=aten.mm.default) + _layers(graph):
        if node.meta["val"].device.type != "cpu":
            continue
        *bias, left, right = node.args
        factors = left.meta["val"], right.meta["val"]
        with graph.graph.inserting_before(node):
            if onednn and is_large(*factors):
                lower_linear()
                by_rows = (_by_rows(graph, value) for value in (left, _turn(graph, right), *bias))
                replacement = _call(graph, torch.ops.bilevel.linear.default, *by_rows)
            elif is_narrow(*factors) and not bias:
                replacement = _turn(graph, _call(graph, aten.mm.default, _turn(graph, right), _turn(graph, left)))
            else:
                continue
        node.replace_all_uses_with(replacement)
        graph.graph.erase_node(node)
    graph.recompile()


def _layers(graph: fx.GraphModule) -> list[fx.Node]:
    """The products `b + A B` with a number of `b` for each column."""
    nodes = graph.graph.find_nodes(op="call_function", target=aten.addmm.default)
    return [n for n in nodes if not n.kwargs and n.args[0].meta["val"].shape == n.meta["val"].shape[1:]]


def prefers_onednn() -> bool:
    """Whether oneDNN multiplies large matrices faster than MKL, from which torch takes its products.

    Known of AMD's processors with AVX-512: a sixth to a tenth less time on Zen 4, half as much for few columns. It goes by
    the processor, not by a measurement: every run on a machine has to compute the same numbers.
    """
    has: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.11 may be without it
    known = "AMD" in has.get("cpu_name", "") and bool(has.get("avx512_f"))
    return known and bool(torch.backends.mkldnn.enabled) and hasattr(torch.ops.mkldnn, "_linear_pointwise")


# As a plain kernel: `torch.library.custom_op` looks at every call for aliases, 0.15 ms where compiled code calls it.
_LIBRARY = torch.library.Library("bilevel", "DEF")
_LIBRARY.define("linear(Tensor inputs, Tensor weight, Tensor? bias=None) -> Tensor", tags=torch.Tag.pt2_compliant_tag)


@torch.library.impl(_LIBRARY, "linear", "CPU")
def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`inputs weight^T + bias`, `(n, k), (m, k), (m,) -> (n, m)`, by oneDNN.

    The compiler calls it by itself for constant weights only.
    """
    product: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")
    return product


@torch.library.register_fake("bilevel::linear", lib=_LIBRARY)
def _(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return inputs.new_empty(inputs.shape[0], weight.shape[0])


@cache
def lower_linear() -> None:
    """Let compiled code call oneDNN for `bilevel::linear` by itself, where torch's compiler is as known here.

    Otherwise it calls the kernel above, by way of Python: 0.1 ms a call, 1 or 2 % of a product of some 50 ms.
    """
    try:
        from torch._inductor import mkldnn_ir
        from torch._inductor.ir import TensorBox
        from torch._inductor.lowering import fallback_handler, register_lowering
    except ImportError:  # these names are torch's own affair, as is what they stand for
        return
    by_python = fallback_handler(torch.ops.bilevel.linear.default)

    @register_lowering(torch.ops.bilevel.linear.default, type_promotion_kind=None)
    def lower(inputs: Any, weight: Any, bias: Any = None) -> Any:
        try:
            return TensorBox.create(mkldnn_ir.LinearUnary.create(inputs, weight, bias, "none", [], ""))
        except Exception:
            return by_python(inputs, weight, bias)


def is_narrow(left: Tensor, right: Tensor) -> bool:
    """Whether the product has few columns and more rows."""
    rows, columns = left.shape[0], right.shape[1]
    most, tile = NARROW.get(left.dtype, (0, 1))
    return columns < rows and columns <= most and columns % tile != 0


def is_large(left: Tensor, right: Tensor) -> bool:
    """Whether another library than MKL may save more than it costs to call it, and to copy what is not laid out for it."""
    rows, columns = left.shape[0], right.shape[1]
    by_rows = left.is_contiguous() or columns >= WIDE
    by_columns = right.T.is_contiguous() or rows >= WIDE
    size = 2 * rows * left.shape[1] * columns
    return left.dtype == torch.float32 and size >= LARGE and by_rows and by_columns


def _call(graph: fx.GraphModule, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """A node with the shape of its result."""
    node = graph.graph.call_function(target, args, kwargs)
    node.meta["val"] = target(*(arg.meta["val"] if isinstance(arg, fx.Node) else arg for arg in args), **kwargs)
    return node


def _turn(graph: fx.GraphModule, matrix: fx.Node) -> fx.Node:
    return _call(graph, aten.t.default, matrix)


def _by_rows(graph: fx.GraphModule, matrix: fx.Node) -> fx.Node:
    """The matrix or vector, copied unless its rows or numbers are one after the other in memory."""
    if matrix.meta["val"].is_contiguous():
        return matrix
    return _call(graph, aten.clone.default, matrix, memory_format=torch.contiguous_format)
