"""One traced function of a point as machine code: split by what depends on a vector, and run at any point of its shapes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree  # torch has no public name for it, and its other tracers rest on it too

from bilevel.linalg.differentiate import Derivatives, Function, differentiate
from bilevel.linalg.fused import Arithmetic, compile_graph, fused, layout
from bilevel.linalg.matmul import arrange_products
from bilevel.linalg.operator import LinearOperator, Tag
from bilevel.linalg.replay import replayed
from bilevel.linalg.tracing import Part, share, split, trace
from bilevel.tree import TensorDict

Product = Callable[[Tensor], Tensor]


class CompiledOperator(LinearOperator):
    """`∂F/∂x` at a point by compiled products; extra leading dimensions of a vector are looped over.

    Args:
        product: `v -> A v` for one vector a system.
        transposed: `v -> A^T v`; the same where it is symmetric.
        point: `x`, `(*batch, n)`.
        optimality: `F`, `(*batch, m)`.
        tags: its structure.
    """

    def __init__(
        self, product: Product, transposed: Product, point: Tensor, optimality: Tensor, tags: frozenset[Tag]
    ) -> None:
        """Keep the products; of the tensors only shape, dtype and device matter."""
        self._spaces, self._products = (point, optimality), (product, transposed)
        self.shape, self.batch_shape = (optimality.shape[-1], point.shape[-1]), tuple(point.shape[:-1])
        self.dtype, self.device, self.tags = point.dtype, point.device, tags

    def mv(self, vector: Tensor) -> Tensor:
        """`A v`: one run of the compiled graph for each extra leading index."""
        product, one = self._products[0], len(self.batch_shape) + 1
        if vector.ndim == one:
            return product(vector)
        rows = [product(row) for row in vector.reshape(-1, *vector.shape[-one:])]
        return torch.stack(rows).reshape(*vector.shape[:-1], self.shape[0])

    def transpose(self) -> LinearOperator:
        """`A^T`; itself where it is symmetric."""
        if Tag.symmetric in self.tags:
            return self
        (product, transposed), (point, optimality) = self._products, self._spaces
        return CompiledOperator(transposed, product, optimality, point, self.tags)

    def fuse(self, function: Arithmetic) -> Callable[..., Sequence[Tensor]]:
        """Compiled, too."""
        return fused(function)


class Inputs(NamedTuple):
    """A point with everything the function is given, and the key of the programs that can serve it."""

    point: Tensor
    args: TensorDict
    tensors: list[Tensor]  # those in the data
    rebuild: Callable[[Sequence[Tensor]], Any]  # the data with other tensors in their places
    key: Any

    @classmethod
    def copied(cls, point: Tensor, args: Mapping[str, Tensor], data: Any) -> Inputs:
        """With copies of point and args, for who keeps them: products must not see what an optimiser does to them later."""
        point, *values = (
            value.detach().clone(memory_format=torch.contiguous_format) for value in (point, *args.values())
        )
        return cls.of(point, dict(zip(args, values, strict=True)), data)

    @classmethod
    def of(cls, point: Tensor, args: Mapping[str, Tensor], data: Any) -> Inputs:
        """As they are, cut from any graph."""
        point, *values = (value.detach() for value in (point, *args.values()))
        entries, spec = pytree.tree_flatten(data)
        tensors = [entry.detach() for entry in entries if isinstance(entry, Tensor)]
        plain = (bool, int, float, complex, str, bytes, type(None))
        others = [(type(entry), entry if isinstance(entry, plain) else id(entry)) for entry in entries
                  if not isinstance(entry, Tensor)]  # fmt: skip

        def rebuild(given: Sequence[Tensor]) -> Any:
            rest = iter(given)
            return pytree.tree_unflatten([next(rest) if isinstance(e, Tensor) else e for e in entries], spec)

        layouts = tuple(layout(value) for value in (point, *values, *tensors))
        key = (tuple(args), str(spec), tuple(others), layouts)
        return cls(point, dict(zip(args, values, strict=True)), tensors, rebuild, key)

    @property
    def flat(self) -> list[Tensor]:
        """All tensors, in the order of the inputs of a graph."""
        return [self.point, *self.args.values(), *self.tensors]


class _Run(NamedTuple):
    """A part of a traced graph, compiled or as traced."""

    call: Callable[..., Sequence[Tensor]]
    reads: list[int]

    def bind(self, kept: Sequence[Tensor], device: torch.device) -> Callable[[Tensor], Sequence[Tensor]]:
        """As a function of its vector at the point where these tensors were kept."""
        values = [kept[index] for index in self.reads]
        call = replayed(lambda vector: self.call(*values, vector), device)

        def run(vector: Tensor) -> Sequence[Tensor]:
            with torch.no_grad():
                return call(vector.contiguous())

        return run


def _compile(part: Part, kept: Sequence[Tensor], vector: Tensor) -> _Run:
    return _Run(compile_graph(part.graph, [*(kept[index] for index in part.reads), vector]), part.reads)


class Program(NamedTuple):
    """A traced function, split; the mixed product, which runs once at a point, is not worth compiling."""

    setup: Callable[..., Sequence[Tensor]]  # inputs -> value, optimality, and what the parts read
    product: _Run
    transposed: _Run
    mixed: _Run
    tags: frozenset[Tag]
    layouts: list[Any]  # of the kept tensors: compiled code relies on it

    @classmethod
    def of(cls, function: Function, inputs: Inputs, like: Derivatives, seconds: dict[str, float]) -> Program:
        """Trace, split and compile; of the eager derivatives only shapes and tags matter."""

        def everything(*tensors: Tensor) -> tuple[Any, ...]:
            point, *rest, v, u, w = tensors
            args = dict(zip(inputs.args, rest, strict=False))
            at = differentiate(function, point, args, inputs.rebuild(rest[len(args) :]))
            turned = at.operator.transpose()
            backwards = [] if turned is at.operator else [turned.mv(u)]
            return at.value, at.optimality, [at.operator.mv(v)], backwards, list(at.mixed(w).values())

        with timed(seconds, "trace"):
            vectors = [torch.empty_like(space) for space in (inputs.point, like.optimality, like.optimality)]
            graph = trace(everything, [*inputs.flat, *vectors])
            arrange_products(graph)
            share(graph)
            setup, (product, transposed, mixed) = split(graph)
        with timed(seconds, "compile"), torch.no_grad():
            begin = compile_graph(setup, inputs.flat)
            _, _, *kept = begin(*inputs.flat)
            forwards = _compile(product, kept, vectors[0])
            symmetric = Tag.symmetric in like.operator.tags
            backwards = forwards if symmetric else _compile(transposed, kept, vectors[1])
        return cls(begin, forwards, backwards, _Run(*mixed), like.operator.tags, [layout(value) for value in kept])

    def at(self, inputs: Inputs) -> Derivatives:
        """Run the setup."""
        with torch.no_grad():
            value, optimality, *kept = self.setup(*inputs.flat)
        assert [layout(tensor) for tensor in kept] == self.layouts, (
            "kept tensors are laid out as when they were compiled"
        )
        product, transposed, mixed = (
            part.bind(kept, inputs.point.device) for part in (self.product, self.transposed, self.mixed)
        )
        jacobian = CompiledOperator(
            lambda v: product(v)[0], lambda v: transposed(v)[0], inputs.point, optimality, self.tags
        )
        return Derivatives(value, optimality, jacobian, lambda v: dict(zip(inputs.args, mixed(v), strict=True)))


@contextmanager
def timed(seconds: dict[str, float], what: str) -> Iterator[None]:
    """Add what the block takes to one of the times."""
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[what] += time.perf_counter() - start
