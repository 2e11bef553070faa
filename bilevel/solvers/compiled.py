"""Gradients of a problem as machine code, for where nothing is recorded: of inner steps, and of the outer loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from bilevel.linalg.fused import compile_graph, layout
from bilevel.linalg.matmul import arrange_products
from bilevel.linalg.program import Inputs
from bilevel.linalg.programs import Programs, agree
from bilevel.linalg.tracing import Untraceable, share, trace
from bilevel.solvers.objective import Hparams, Objective

Make = Callable[[Any], Objective]  # a batch -> the objective on it
Evaluate = Callable[[Tensor, Hparams, Any], tuple[Tensor, ...]]  # (x, θ, batch) -> value and derivatives
Value = Callable[[Tensor, Hparams, Any], Tensor | None]  # the value alone; None where it vanishes at a solution
Program = Callable[..., Sequence[Tensor]]

# Distance, relative to the entries (to one where all are zero), at which gradients are compared: at a solution they are
# rounding alone.
NEARBY = 1e-2


class CompiledGradients:
    """The programs of one function of a problem, `(x, θ, batch) -> (value, derivatives)`, one for each of its shapes.

    The whole evaluation, the backward pass and the anchor's term included, is traced once and compiled, so that what lies
    between its matrix products and convolutions is fused. As of compiled products, tensors that the problem holds are read
    as they are at the time, and anything else as it was when it was traced: therefore the value is compared with the
    problem's own once in each solve (a forward pass), and the problem is traced again where it is another one. The first
    gradient of each program is compared with the eager one.

    Args:
        what: they are of, as a sentence begins: "the gradients of inner steps are".
    """

    def __init__(self, what: str = "the gradients of inner steps are") -> None:
        """Nothing is compiled yet."""
        self.programs: Programs[Program] = Programs(what)
        self.compared: WeakKeyDictionary[Any, set[Any]] = WeakKeyDictionary()  # solve -> the keys that were, in it

    def of(self, make: Make, batch: Any, solve: Any = None) -> CompiledGradient:
        """The gradient of the objective on a batch.

        Args:
            make: the problem; always the same one.
            batch: tensors in nested lists, tuples and dictionaries, which may change; any other value costs a program.
            solve: an object that lives as long as one solve; without one the value is compared for each objective.
        """

        def value(params: Tensor, hparams: Hparams, data: Any) -> Tensor | None:
            loss = make(data).loss
            return None if loss is None else loss(params, hparams)

        return self.of_function(lambda x, hparams, data: _evaluate(make(data), x, hparams), value, batch, solve)

    def of_function(self, evaluate: Evaluate, value: Value, batch: Any, solve: Any = None) -> CompiledGradient:
        """The same of any function; always the same one."""
        compared: set[Any] = set() if solve is None else self.compared.setdefault(solve, set())
        return CompiledGradient(self.programs, evaluate, value, batch, compared)


class CompiledGradient:
    """Value and derivatives on one batch by the function's programs, or None where there is none.

    Attributes:
        fallback: why there was none at the latest point, a sentence.
    """

    def __init__(
        self, programs: Programs[Program], evaluate: Evaluate, value: Value, batch: Any, compared: set[Any]
    ) -> None:
        """See `CompiledGradients`."""
        self.fallback: str | None = None
        self._programs, self._evaluate, self._value = programs, evaluate, value
        self._batch, self._compared = batch, compared
        self._known: tuple[Hparams, Inputs] | None = None

    def __call__(self, params: Tensor, hparams: Hparams) -> tuple[Tensor, ...] | None:
        """What the function returns, detached; of an objective value `(*batch,)`, or the optimality, and gradient."""
        inputs = self._inputs(params, hparams)
        program = self._programs.get(inputs.key)
        if callable(program):
            found = _run(program, inputs)
            if inputs.key in self._compared or self._is_current(program, inputs, hparams, found):
                self._compared.add(inputs.key)
                self.fallback = None
                return found
            self._programs.outdated()
            program = None
        if program is None:
            # Where it is not finite there is nothing to compare with; another point may do.
            if not _finite(self._evaluate(params, hparams, self._batch)):
                self.fallback = self._programs.sentence("the function is not finite here")
                return None
            program = self._programs.make(inputs.key, lambda: self._build(inputs, hparams))
            self._compared.add(inputs.key)
            if callable(program):
                self.fallback = None  # the program's numbers from the first point on: a run resumed here had them, too
                return _run(program, inputs)
        self.fallback = program
        return None

    def _inputs(self, params: Tensor, hparams: Hparams) -> Inputs:
        """A solve asks for many points with the same hyperparameters, which are taken apart once."""
        if self._known is None or self._known[0] is not hparams or layout(self._known[1].point) != layout(params):
            self._known = hparams, Inputs.of(params, hparams, self._batch)
        return self._known[1]._replace(point=params.detach())

    def _is_current(self, program: Program, inputs: Inputs, hparams: Hparams, found: tuple[Tensor, ...]) -> bool:
        """Whether the program's value is the function's; one that vanishes at a solution is compared nearby."""
        with torch.no_grad():
            value, expected = found[0], self._value(inputs.point, hparams, self._batch)
        if expected is None:
            near = _near(inputs)
            value, expected = _run(program, near)[0], self._evaluate(near.point, hparams, self._batch)[0]
        return not bool(expected.isfinite().all()) or agree(value, expected)

    def _build(self, inputs: Inputs, hparams: Hparams) -> Program:
        """Trace, compile, and compare with the eager gradient nearby, or where that is not finite at the point itself."""

        def evaluate(*tensors: Tensor) -> tuple[Tensor, ...]:
            point, *rest = tensors
            args = dict(zip(inputs.args, rest, strict=False))
            return self._evaluate(point, args, inputs.rebuild(rest[len(args) :]))

        graph = trace(evaluate, inputs.flat)
        arrange_products(graph)
        share(graph)
        with torch.no_grad():
            program = compile_graph(graph, inputs.flat)
        near = _near(inputs)
        expected = self._evaluate(near.point, hparams, self._batch)
        if not _finite(expected):
            near, expected = inputs, self._evaluate(inputs.point, hparams, self._batch)
        if wrong := _differ(_run(program, near), expected):
            raise Untraceable(wrong)
        return program


def _evaluate(objective: Objective, params: Tensor, hparams: Hparams) -> tuple[Tensor, Tensor]:
    """Value, the optimality itself where there is no loss, and gradient."""
    with torch.no_grad():
        if objective.loss is not None:
            return objective.value_and_gradient(params, hparams)
        gradient = objective.gradient(params, hparams)
        return gradient, gradient


def _finite(values: tuple[Tensor, ...]) -> bool:
    return all(bool(value.isfinite().all()) for value in values)


def _run(program: Program, inputs: Inputs) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return tuple(program(*inputs.flat))


def _near(inputs: Inputs) -> Inputs:
    """The same at a point nearby."""
    point = inputs.point
    noise = torch.randn(point.shape, generator=torch.Generator().manual_seed(0), dtype=point.dtype).to(point)
    typical = point.abs().mean()
    return inputs._replace(point=point + NEARBY * (point.abs() + torch.where(typical > 0, typical, 1.0)) * noise)


def _differ(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> str:
    """How two evaluations differ, the end of a sentence; empty where they do not."""
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        if not agree(one, other):
            name, gap = "gradients" if number else "values", float((one - other).norm() / other.norm())
            return f"their {name} differ from the eager ones by {gap:.1e} (relative)"
    return ""
