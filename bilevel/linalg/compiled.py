r"""Compiled products with the derivatives of a function: traced once, split by what they depend on, run at every point.

For `F(x, θ)` (the gradient of a loss, or an optimality) the eager operators keep a graph and walk it backwards for every
product. Here the whole computation `(x, θ, v) -> (F, ∂F/∂x v, ...)` is traced into one graph of plain tensor operations,
which is then cut: what does not depend on `v` runs once for a point (the *setup*, about the price of the eager graph),
and what does is compiled and runs once for a product. So a compiled product repeats nothing of the forward pass: it has
the matrix products of an eager one, six for a dense layer and two for the first, and all between them is fused.
`python -m benchmarks.compiled` prints what that is worth, what compiling costs, and when it has paid off.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bilevel.linalg.differentiate import Derivatives, Function, differentiate
from bilevel.linalg.operator import LinearOperator
from bilevel.linalg.program import Inputs, Program, timed
from bilevel.linalg.programs import Programs, agree
from bilevel.linalg.tracing import Untraceable


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
        programs: what has been compiled.
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
        self.programs: Programs[Program] = Programs("the products are")

    def at(self, function: Function, point: Tensor, args: Mapping[str, Tensor], data: Any = None) -> Derivatives:
        """The derivatives at a point; compiles at the first of its shapes.

        Args:
            function: as in `differentiate`; always the same function of its arguments.
            point: `x`, `(*batch, n)`.
            args: `θ`, by names.
            data: whatever else the function is given, for instance a batch. Tensors in nested lists, tuples and
                dictionaries may change from point to point; any other value costs a program of its own.
        """
        inputs = Inputs.copied(point, args, data)
        program = self.programs.get(inputs.key)
        if isinstance(program, Program):
            found = program.at(inputs)
            with torch.enable_grad():  # nothing here requires any, but an optimality may take a gradient itself
                value = function(inputs.point, inputs.args, data).detach()
            if not bool(value.isfinite().all()) or agree(found.value, value, _terms(found, inputs.point)):
                return found
            self.programs.outdated()
            program = None
        reference = differentiate(function, inputs.point, inputs.args, data)
        if program is None:
            if not bool(reference.optimality.isfinite().all()):  # nothing to compare with: wait for another point
                return replace(reference, fallback=self.programs.sentence("the function is not finite here"))
            program = self.programs.make(inputs.key, lambda: self._build(function, inputs, reference))
        return replace(reference, fallback=program) if isinstance(program, str) else program.at(inputs)

    def _build(self, function: Function, inputs: Inputs, reference: Derivatives) -> Program:
        """A program whose products are the reference's."""
        program = Program.of(function, inputs, reference, self.seconds)
        with timed(self.seconds, "compare"):
            _compare(program.at(inputs), reference)
        return program


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
        if not agree(compiled, eager):
            gap = float((compiled - eager).norm() / eager.norm())
            raise Untraceable(f"their {name} differs from the eager one by {gap:.1e} (relative)")


def _terms(found: Derivatives, point: Tensor) -> float:
    """The size of what an optimality is a sum of, by which it is rounded: at a root nothing of it is left; 0 for a loss."""
    is_loss = found.value.ndim < point.ndim
    return 0.0 if is_loss else float(found.operator.mv(point).norm())
