"""The panels that figures of a run are made of: a curve over the outer steps, an axis, a grid of panels."""

from __future__ import annotations

import numpy
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bilevel.report.load import Run
from bilevel.report.style import blank, log_axis

__all__ = ["curve", "grid", "step_axis"]


def curve(panel: Axes, run: Run, key: str, colour: str, label: str | None = None) -> None:
    """One line of the run's records over its outer steps; the axis is logarithmic where that shows more."""
    steps, values = run.series(key)
    values = numpy.where(numpy.isfinite(values), values, numpy.nan)
    panel.plot(steps, values, color=colour, label=label, marker="o" if steps.size < 15 else None, markersize=2.6)
    log_axis(panel, values)
    step_axis(panel, run)


def step_axis(panel: Axes, run: Run) -> None:
    """The horizontal axis of every panel over time."""
    last = max(int(run.final.get("step", 0)), 1)
    panel.set_xlim(-0.02 * last, 1.02 * last)
    panel.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    panel.set_xlabel("outer step")


def grid(count: int, height: float = 1.9) -> tuple[Figure, list[Axes]]:
    """Three panels in a row, any other number in two columns; a spare place is left empty."""
    columns = 3 if count == 3 else min(count, 2)
    rows = -(-count // columns)
    figure, axes = blank(rows, columns, max(2.4, height * rows))
    for spare in axes[count:]:
        spare.remove()
    return figure, axes[:count]
