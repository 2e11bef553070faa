"""Gradients of an inner problem as machine code, for the inner steps that nothing differentiates."""

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
Program = Callable[..., Sequence[Tensor]]

# Distance, relative to the entries (to one where all are zero), at which gradients are compared: at a solution they are rounding alone.
NEARBY = 1e-2


class CompiledGradients:
    """The programs of one inner problem, `(x, θ, batch) -> (value, gradient)`, one for each of its shapes.

    The whole evaluation, the backward pass and the anchor's term included, is traced once and compiled, so that what lies
    between its matrix products and convolutions is fused. As of compiled products, tensors that the problem holds are read
    as they are at the time, and anything else as it was when it was traced: therefore the value is compared with the
    problem's own once in each solve (a forward pass), and the problem is traced again where it is another one. The first
    gradient of each program is compared with the eager one.
    """

    def __init__(self) -> None:
        """Nothing is compiled yet."""
        self.programs: Programs[Program] = Programs("the gradients of inner steps are")
        self.compared: WeakKeyDictionary[Any, set[Any]] = WeakKeyDictionary()  # solve -> the keys that were, in it

    def of(self, make: Make, batch: Any, solve: Any = None) -> CompiledGradient:
        """The gradient of the objective on a batch.

        Args:
            make: the problem; always the same one.
            batch: tensors in nested lists, tuples and dictionaries, which may change; any other value costs a program.
            solve: an object that lives as long as one solve; without one the value is compared for each objective.
        """
        compared: set[Any] = set() if solve is None else self.compared.setdefault(solve, set())
        return CompiledGradient(self.programs, make, batch, compared)


class CompiledGradient:
    """Value and gradient of one objective by the problem's programs, or None where there is none.

    Attributes:
        fallback: why there was none at the latest point, a sentence.
    """

    def __init__(self, programs: Programs[Program], make: Make, batch: Any, compared: set[Any]) -> None:
        """See `CompiledGradients.of`."""
        self.fallback: str | None = None
        self._programs, self._make, self._batch, self._compared = programs, make, batch, compared
        self._known: tuple[Hparams, Inputs] | None = None

    def __call__(self, params: Tensor, hparams: Hparams) -> tuple[Tensor, Tensor] | None:
        """Value `(*batch,)`, or the optimality again where there is no loss, and gradient, both detached."""
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
            expected = _evaluate(self._make(self._batch), params, hparams)
            if not _finite(expected):  # nothing to compare with: another point may do
                self.fallback = self._programs.sentence("the function is not finite here")
                return None
            program = self._programs.make(inputs.key, lambda: self._build(inputs, hparams))
            self._compared.add(inputs.key)
            if callable(program):
                self.fallback = None
                return expected
        self.fallback = program
        return None

    def _inputs(self, params: Tensor, hparams: Hparams) -> Inputs:
        """A solve asks for many points with the same hyperparameters, which are taken apart once."""
        if self._known is None or self._known[0] is not hparams or layout(self._known[1].point) != layout(params):
            self._known = hparams, Inputs.of(params, hparams, self._batch)
        return self._known[1]._replace(point=params.detach())

    def _is_current(self, program: Program, inputs: Inputs, hparams: Hparams, found: tuple[Tensor, Tensor]) -> bool:
        """Whether the program's value is the function's; an optimality, which vanishes at a solution, is compared nearby."""
        objective = self._make(self._batch)
        if objective.loss is None:
            near = _near(inputs)
            value, expected = _run(program, near)[0], _evaluate(objective, near.point, hparams)[0]
        else:
            with torch.no_grad():
                value, expected = found[0], objective.loss(inputs.point, hparams)
        return not bool(expected.isfinite().all()) or agree(value, expected)

    def _build(self, inputs: Inputs, hparams: Hparams) -> Program:
        """Trace, compile, and compare with the eager gradient nearby, or where that is not finite at the point itself."""

        def evaluate(*tensors: Tensor) -> tuple[Tensor, Tensor]:
            point, *rest = tensors
            args = dict(zip(inputs.args, rest, strict=False))
            return _evaluate(self._make(inputs.rebuild(rest[len(args) :])), point, args)

        graph = trace(evaluate, inputs.flat)
        arrange_products(graph)
        share(graph)
        with torch.no_grad():
            program = compile_graph(graph, inputs.flat)
        objective, near = self._make(self._batch), _near(inputs)
        expected = _evaluate(objective, near.point, hparams)
        if not _finite(expected):
            near, expected = inputs, _evaluate(objective, inputs.point, hparams)
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


def _run(program: Program, inputs: Inputs) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        value, gradient = program(*inputs.flat)
    return value, gradient


def _near(inputs: Inputs) -> Inputs:
    """The same at a point nearby."""
    point = inputs.point
    noise = torch.randn(point.shape, generator=torch.Generator().manual_seed(0), dtype=point.dtype).to(point)
    typical = point.abs().mean()
    return inputs._replace(point=point + NEARBY * (point.abs() + torch.where(typical > 0, typical, 1.0)) * noise)


def _differ(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> str:
    """How two evaluations differ, the end of a sentence; empty where they do not."""
    for name, one, other in zip(("values", "gradients"), found, expected, strict=True):
        if not agree(one, other):
            return f"their {name} differ from the eager ones by {float((one - other).norm() / other.norm()):.1e} (relative)"
    return ""
