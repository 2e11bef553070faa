"""Vector arithmetic of solvers, compiled into one call: what is left of a small problem once its products are compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from bilevel.linalg.tracing import trace

Arithmetic = Callable[..., tuple[Tensor, ...]]  # (inner, *tensors) -> tensors

# The graph is traced already, so `torch._inductor.compile` serves; `torch.compile` would put guards before every call,
# a fifth of a small product. What it would guard is known: sizes and strides are part of a program's key. Without the
# pattern matcher, sums of matrix products join the elementwise kernels beside them; with it they become `addmm`, which
# copies the summand first.
OPTIONS = {"pattern_matcher": False, "size_asserts": False, "alignment_asserts": False}


def compile_graph(graph: torch.fx.GraphModule, example: Sequence[Tensor]) -> Callable[..., Sequence[Tensor]]:
    """A traced graph as machine code for inputs that are laid out as the example."""
    arguments: list[Any] = list(example)
    _describe_inputs(graph, example)
    on_cpu = all(tensor.device.type == "cpu" for tensor in example)
    # A C++ wrapper calls the kernels faster than a Python one. For a GPU it takes minutes to build, and a recording of the
    # kernels (`bilevel.linalg.replay`) needs neither.
    options = {**OPTIONS, "cpp_wrapper": on_cpu}
    compiled: Callable[..., Sequence[Tensor]] = torch._inductor.compile(graph, arguments, options=options)
    return compiled


def _describe_inputs(graph: torch.fx.GraphModule, example: Sequence[Tensor]) -> None:
    """Let the graph know its inputs as they are laid out here, without which torch keeps no code on disk for the next process.

    What it knows from tracing may be something else: inputs of a part are laid out as the part before it was compiled.
    """
    mode = FakeTensorMode(shape_env=ShapeEnv())
    for node in graph.graph.nodes:
        node.meta.pop("val", None)
    for node, tensor in zip(graph.graph.find_nodes(op="placeholder"), example, strict=True):
        node.meta["val"] = mode.from_tensor(tensor, static_shapes=True)


def layout(tensor: Tensor) -> Any:
    """All that compiled code relies on."""
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


class Fused:
    """Arithmetic that is compiled when it is first called with tensors of a layout; run as written where that fails.

    The first results of each program are compared with the function's own.

    Args:
        function: of tensors, without side effects.
    """

    def __init__(self, function: Callable[..., Sequence[Tensor]]) -> None:
        """Nothing is compiled yet."""
        self.function = function
        self._programs: dict[Any, Callable[..., Sequence[Tensor]]] = {}

    def __call__(self, *tensors: Tensor) -> Sequence[Tensor]:
        """The function's results."""
        key = tuple(map(layout, tensors))
        program = self._programs.get(key)
        if program is None:
            program = self._programs[key] = self._compiled(tensors)
        return program(*tensors)

    def _compiled(self, tensors: Sequence[Tensor]) -> Callable[..., Sequence[Tensor]]:
        examples = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device) for t in tensors]
        try:
            with torch.no_grad():
                program = compile_graph(trace(self.function, examples), examples)
                found, expected = program(*tensors), self.function(*tensors)
        except Exception:  # of any kind, from a missing C++ compiler on: what it would have saved is time only
            return self.function
        return program if _same(found, expected, tensors) else self.function


def _same(found: Sequence[Tensor], expected: Sequence[Tensor], inputs: Sequence[Tensor]) -> bool:
    """Whether results agree to half of the digits of the largest number on the way; masks, made by comparisons, may differ."""
    if [(one.shape, one.dtype) for one in found] != [(one.shape, one.dtype) for one in expected]:
        return False
    numbers = (one for one in (*inputs, *expected) if one.is_floating_point() and one.numel())
    size = max((float(one.nan_to_num(0.0, 0.0, 0.0).abs().amax()) for one in numbers), default=0.0)
    for one, other in zip(found, expected, strict=True):
        if other.is_floating_point():
            close = torch.finfo(other.dtype).eps ** 0.5 * size
            if not torch.allclose(one, other, rtol=0.0, atol=close, equal_nan=True):
                return False
        elif other.dtype is not torch.bool and not torch.equal(one, other):
            return False
    return True


@cache
def fused(function: Arithmetic) -> Fused:
    """A solver's arithmetic with the plain inner product; compiled once in a process for each layout."""
    return Fused(partial(function, torch.linalg.vecdot))
