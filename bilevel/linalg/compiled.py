r"""Compiled products with the derivatives of a function: traced once, split by what they depend on, run at every point.

For `F(x, θ)` (the gradient of a loss, or an optimality) the eager operators keep a graph and walk it backwards for every
product. Here the whole computation `(x, θ, v) -> (F, ∂F/∂x v, ...)` is traced into one graph of plain tensor operations,
which is then cut: what does not depend on `v` runs once for a point (the *setup*, about the price of the eager graph),
and what does is compiled and runs once for a product. So a compiled product repeats nothing of the forward pass: it has
the matrix products of an eager one, six for a dense layer and two for the first, and all between them is fused.
`python -m benchmarks.compiled` prints what that is worth, what compiling costs, and when it has paid off.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree  # torch has no public name for it, and its other tracers rest on it too

from bilevel.linalg.differentiate import Derivatives, Function, differentiate
from bilevel.linalg.fused import Arithmetic, compile_graph, fused, layout
from bilevel.linalg.matmul import arrange_products
from bilevel.linalg.operator import LinearOperator, Tag
from bilevel.linalg.replay import replayed
from bilevel.linalg.tracing import Part, Untraceable, share, split, trace
from bilevel.tree import TensorDict

Product = Callable[[Tensor], Tensor]

MAX_PROGRAMS = 8  # shapes, and values of what is no tensor, for which one function is compiled
MAX_CHANGES = 3  # times that it is traced again because something has changed that it reads but is not given


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


class CompiledDerivatives:
    """The derivatives of one function, compiled at the first point and used at all others.

    A program serves all points of the same shapes. Its inputs are `args`, the tensors in `data`, and the tensors that the
    function reads by itself (a data set), as they are at the time. Anything else that the function reads is as it was
    when it was traced; therefore it is evaluated at every point (one forward pass), and traced again where its value is
    not the program's. The first products of each program are compared with eager ones.

    Where the function cannot be traced or compiled, or its products come out differently, `at` gives eager derivatives
    and says why in `fallback`. The function itself is not kept: an object may hold the compiled derivatives of its own
    methods.

    Attributes:
        seconds: spent on tracing, on compiling, and on the comparison with eager products, over all programs.

    Example:
        >>> def cube(x, args, data):
        ...     return (args["c"] * x ** 3).sum(-1)
        >>> at = CompiledDerivatives().at(cube, torch.ones(2), {"c": torch.tensor(2.0)})
        >>> at.operator.mv(torch.ones(2)), at.fallback
        (tensor([12., 12.]), None)
    """

    def __init__(self) -> None:
        """Nothing is compiled yet."""
        self.seconds = {"trace": 0.0, "compile": 0.0, "compare": 0.0}
        self._programs: dict[Any, _Program | str] = {}  # for some shapes a sentence: why there is none
        self._changes = 0

    def at(self, function: Function, point: Tensor, args: Mapping[str, Tensor], data: Any = None) -> Derivatives:
        """The derivatives at a point; compiles at the first of its shapes.

        Args:
            function: as in `differentiate`; always the same function of its arguments.
            point: `x`, `(*batch, n)`.
            args: `θ`, by names.
            data: whatever else the function is given, for instance a batch. Tensors in nested lists, tuples and
                dictionaries may change from point to point; any other value costs a program of its own.
        """
        inputs = _Inputs.of(point, args, data)
        program = self._programs.get(inputs.key)
        if isinstance(program, _Program):
            found = program.at(inputs)
            with torch.enable_grad():  # nothing here requires any, but an optimality may take a gradient itself
                value = function(inputs.point, inputs.args, data).detach()
            if not bool(value.isfinite().all()) or _agree(found.value, value, _terms(found, inputs.point)):
                return found
            self._changes += 1
            program = None
        reference = differentiate(function, inputs.point, inputs.args, data)
        if program is None:
            if not bool(reference.optimality.isfinite().all()):  # nothing to compare with: wait for another point
                return replace(reference, fallback=_sentence("the function is not finite here"))
            program = self._make(function, inputs, reference)
            if inputs.key in self._programs or len(self._programs) < MAX_PROGRAMS:
                self._programs[inputs.key] = program
        return replace(reference, fallback=program) if isinstance(program, str) else program.at(inputs)

    def _make(self, function: Function, inputs: _Inputs, reference: Derivatives) -> _Program | str:
        """A program whose products are the reference's, or why there is none."""
        if self._changes > MAX_CHANGES:
            return _sentence(
                f"the function's value was {self._changes} times not that of its graph, so it reads something that changes "
                "and is not among its arguments: make it a hyperparameter or part of the batch"
            )
        if len(self._programs) >= MAX_PROGRAMS and inputs.key not in self._programs:
            return _sentence(f"{MAX_PROGRAMS} other shapes of its arguments have been compiled already")
        try:
            program = _Program.of(function, inputs, reference, self.seconds)
            with _timed(self.seconds, "compare"):
                _compare(program.at(inputs), reference)
        except Untraceable as reason:
            return _sentence(str(reason))
        except Exception as error:  # of any kind; it is not the function's own, which has just been differentiated
            first = str(error).strip().partition("\n")[0].rstrip(".:") or "no message"
            return _sentence(f"they could not be compiled ({type(error).__name__}: {first})")
        return program


def _sentence(reason: str) -> str:
    return f"the products are eager, not compiled, because {reason}."


class _Inputs(NamedTuple):
    """A point with everything the function is given, and the key of the programs that can serve it."""

    point: Tensor
    args: TensorDict
    tensors: list[Tensor]  # those in the data
    rebuild: Callable[[Sequence[Tensor]], Any]  # the data with other tensors in their places
    key: Any

    @classmethod
    def of(cls, point: Tensor, args: Mapping[str, Tensor], data: Any) -> _Inputs:
        """Point and args are copied: the products must not see what an optimiser does to them later."""
        point, *values = (
            value.detach().clone(memory_format=torch.contiguous_format) for value in (point, *args.values())
        )
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


class _Program(NamedTuple):
    """A traced function, split; the mixed product, which runs once at a point, is not worth compiling."""

    setup: Callable[..., Sequence[Tensor]]  # inputs -> value, optimality, and what the parts read
    product: _Run
    transposed: _Run
    mixed: _Run
    tags: frozenset[Tag]
    layouts: list[Any]  # of the kept tensors: compiled code relies on it

    @classmethod
    def of(cls, function: Function, inputs: _Inputs, like: Derivatives, seconds: dict[str, float]) -> _Program:
        """Trace, split and compile; of the eager derivatives only shapes and tags matter."""

        def everything(*tensors: Tensor) -> tuple[Any, ...]:
            point, *rest, v, u, w = tensors
            args = dict(zip(inputs.args, rest, strict=False))
            at = differentiate(function, point, args, inputs.rebuild(rest[len(args) :]))
            turned = at.operator.transpose()
            backwards = [] if turned is at.operator else [turned.mv(u)]
            return at.value, at.optimality, [at.operator.mv(v)], backwards, list(at.mixed(w).values())

        with _timed(seconds, "trace"):
            vectors = [torch.empty_like(space) for space in (inputs.point, like.optimality, like.optimality)]
            graph = trace(everything, [*inputs.flat, *vectors])
            arrange_products(graph)
            share(graph)
            setup, (product, transposed, mixed) = split(graph)
        with _timed(seconds, "compile"), torch.no_grad():
            begin = compile_graph(setup, inputs.flat)
            _, _, *kept = begin(*inputs.flat)
            forwards = _compile(product, kept, vectors[0])
            symmetric = Tag.symmetric in like.operator.tags
            backwards = forwards if symmetric else _compile(transposed, kept, vectors[1])
        return cls(begin, forwards, backwards, _Run(*mixed), like.operator.tags, [layout(value) for value in kept])

    def at(self, inputs: _Inputs) -> Derivatives:
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


def _compare(found: Derivatives, reference: Derivatives) -> None:
    """Raise `Untraceable` unless products with random vectors are the reference's.

    Products alone: at a solution the optimality is zero up to rounding, and no two ways of computing that agree.
    """
    draw = torch.Generator().manual_seed(0)

    def random(operator: LinearOperator) -> Tensor:
        shape = (*operator.batch_shape, operator.shape[1])
        return torch.randn(shape, generator=draw, dtype=torch.float64).to(reference.optimality)

    mine, theirs = found.operator, reference.operator
    forwards, backwards = random(theirs), random(theirs.transpose())
    pairs = {
        "product": (mine.mv(forwards), theirs.mv(forwards)),
        "transposed product": (mine.transpose().mv(backwards), theirs.transpose().mv(backwards)),
    }
    mixed = found.mixed(backwards)
    pairs |= {f"derivative by {name}": (mixed[name], part) for name, part in reference.mixed(backwards).items()}
    for name, (compiled, eager) in pairs.items():
        if not _agree(compiled, eager):
            gap = float((compiled - eager).norm() / eager.norm())
            raise Untraceable(f"their {name} differs from the eager one by {gap:.1e} (relative)")


def _terms(found: Derivatives, point: Tensor) -> float:
    """The size of what an optimality is a sum of, by which it is rounded: at a root nothing of it is left; 0 for a loss."""
    is_loss = found.value.ndim < point.ndim
    return 0.0 if is_loss else float(found.operator.mv(point).norm())


def _agree(found: Tensor, expected: Tensor, terms: float = 0.0) -> bool:
    """Whether half of the digits are the same: far above rounding, far below any mistake."""
    tolerance = torch.finfo(expected.dtype).eps ** 0.5
    return bool((found - expected).norm() <= tolerance * (expected.norm() + terms))


@contextmanager
def _timed(seconds: dict[str, float], what: str) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[what] += time.perf_counter() - start
