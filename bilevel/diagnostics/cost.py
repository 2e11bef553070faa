r"""What a hypergradient costs: each method as a small function of unit costs and counts.

With `g` the seconds of an inner gradient, `h` those of a Hessian product, `N` inner steps, `k` products, `n` parameters:

    implicit, iterative    inner + fixed + k h                      memory of one gradient graph
    implicit, dense        inner + fixed + n h + n³/3 flops         the same and about 3 n² numbers
    unrolled               a + b N                                  c + d N
    checkpointed every K   a + b N and N more steps                 c + d K + (N / K) states
    forward mode           a + b N, with b for all directions       c
    one step               inner + one recorded step                c + d
    finite differences     inner + outer + gradient + 2 sides       a gradient with respect to hyperparameters

`fixed` is one outer gradient, one linearisation and one mixed product.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy


@dataclass(frozen=True)
class Cost:
    """Seconds of one hypergradient, and bytes that it takes at its peak beyond what the process holds before."""

    seconds: float
    bytes: float


NOTHING = Cost(math.nan, math.nan)


@dataclass(frozen=True)
class Work:
    """What one outer step does.

    Attributes:
        gradients: inner gradients.
        inner_products: Hessian products inside the inner solver.
        products: those of the linear solve, its preconditioner and its error estimate.
    """

    gradients: float
    inner_products: float = 0.0
    products: float = 0.0


@dataclass(frozen=True)
class Line:
    """A cost `at + slope * count`.

    Example:
        >>> Line.through(2, 5.0, 6, 13.0)
        Line(at=1.0, slope=2.0)
        >>> Line.through(2, 5.0, 6, 13.0)(10)
        21.0
    """

    at: float
    slope: float

    @classmethod
    def through(cls, few: int, low: float, many: int, high: float) -> Line:
        """The line through two measurements; noise may not make more work cheaper."""
        assert few < many
        slope = max(high - low, 0.0) / (many - few)
        return cls(max(low - slope * few, 0.0), slope)

    def __call__(self, count: float) -> float:
        """The cost of so many."""
        return self.at + self.slope * count


@dataclass(frozen=True)
class Recorded:
    """What a method costs that records inner steps, as a function of their number.

    Attributes:
        seconds: of a whole hypergradient with so many inner steps.
        bytes: its peak.
    """

    seconds: Line
    bytes: Line


@dataclass(frozen=True)
class Units:
    """Unit costs, measured on this machine: seconds and bytes.

    Attributes:
        gradient: seconds of an inner gradient.
        product: seconds of a product with the inner Hessian, through a graph that is there.
        linearise: seconds of an inner gradient with its graph.
        mixed: seconds of a mixed product, through the same graph.
        outer: seconds of the outer gradients.
        side: seconds of an inner gradient with respect to the hyperparameters.
        graph_bytes: peak of a linearisation with its products.
        side_bytes: peak of an inner gradient with respect to the hyperparameters.
        flops: floating-point operations a second of a Cholesky factorisation.
        num_params: length of the vector of parameters, all tasks together.
        num_unknowns: that of one task.
        itemsize: bytes of a number.
    """

    gradient: float
    product: float
    linearise: float
    mixed: float
    outer: float
    side: float
    graph_bytes: float
    side_bytes: float
    flops: float
    num_params: int
    num_unknowns: int
    itemsize: int

    @property
    def fixed(self) -> float:
        """Seconds of an implicit hypergradient beside its two solves."""
        return self.outer + self.linearise + self.mixed

    def work_seconds(self, work: Work) -> float:
        """Gradients and products of an outer step, without what is fixed."""
        return work.gradients * self.gradient + (work.inner_products + work.products) * self.product


def implicit(units: Units, inner: Cost, products: float, product_seconds: float) -> Cost:
    """After the inner solve one linear solve by an iterative solver whose products take so long, vector arithmetic included."""
    seconds = inner.seconds + units.fixed + products * product_seconds
    return Cost(seconds, max(inner.bytes, units.graph_bytes))


def dense(units: Units, inner: Cost) -> Cost:
    """The matrix by `n` products, and its factors; a task has its own."""
    size, num_tasks = units.num_unknowns, units.num_params // units.num_unknowns
    factorisation = num_tasks * size**3 / 3 / units.flops
    seconds = inner.seconds + units.fixed + size * units.product + factorisation
    # Unit vectors, products and the stacked matrix; then the matrix, its factor and a copy in float64 for the residual.
    matrices = max(3 * units.itemsize, 2 * units.itemsize + 8 * (units.itemsize < 8))
    return Cost(seconds, max(inner.bytes, units.graph_bytes + matrices * num_tasks * size**2))


def unrolled(recorded: Recorded, num_steps: float) -> Cost:
    """All steps in one graph."""
    return Cost(recorded.seconds(num_steps), recorded.bytes(num_steps))


def checkpointed(units: Units, recorded: Recorded, num_steps: float, every: int, step_seconds: float) -> Cost:
    """Segments of `every` steps, each run twice; a kept state is the iterate and the solver's vectors (two in all)."""
    kept = math.ceil(num_steps / every) * 2 * units.num_params * units.itemsize
    return Cost(recorded.seconds(num_steps) + num_steps * step_seconds, recorded.bytes(min(every, num_steps)) + kept)


def forward(recorded: Recorded, num_steps: float) -> Cost:
    """All directions through each step; nothing of a step is left when the next one begins."""
    return Cost(recorded.seconds(num_steps), recorded.bytes(num_steps))


def one_step(recorded: Recorded, inner_seconds: float) -> Cost:
    """The solve, then a single recorded step, whose graph is larger than anything that the solve holds."""
    return Cost(inner_seconds + recorded.seconds(1), recorded.bytes(1))


def finite_difference(units: Units, inner: Cost) -> Cost:
    """The solve, a virtual step, the outer gradients, and the two sides of the difference."""
    seconds = inner.seconds + units.gradient + units.outer + 2 * units.side
    return Cost(seconds, max(inner.bytes, units.side_bytes))


def forecast(made: Mapping[float, float], steps: Sequence[int]) -> list[float]:
    """The counts of outer steps that were not made, on straight lines between those that were, and level outside.

    Args:
        made: counts by the number of their step, which may lie between two steps.
        steps: the numbers of the others.

    Example:
        >>> forecast({1: 90.0, 5: 10.0}, [0, 2, 4, 8])
        [90.0, 70.0, 30.0, 10.0]
    """
    places = sorted(made)
    return [float(one) for one in numpy.interp(steps, places, [made[place] for place in places])]
