"""The panels that figures of a run are made of: a curve over the outer steps, an axis, a grid of panels, an image."""

from __future__ import annotations

from typing import Any

import numpy
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from bilevel.report.load import Run
from bilevel.report.style import blank, log_axis

__all__ = ["curve", "grid", "picture", "step_axis"]


def curve(panel: Axes, run: Run, key: str, colour: str, label: str | None = None) -> None:
    """One line of the run's records over its outer steps; the axis is logarithmic where that shows all of its lines better."""
    steps, values = run.series(key)
    values = numpy.where(numpy.isfinite(values), values, numpy.nan)
    panel.plot(steps, values, color=colour, label=label, marker="o" if steps.size < 15 else None, markersize=2.6)
    log_axis(panel, numpy.concatenate([numpy.asarray(line.get_ydata(), dtype=float) for line in panel.lines]))
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


def picture(panel: Axes, image: NDArray[Any], title: str, colour: str, *, framed: bool = False) -> None:
    """One image, channels last, in colour where it has three channels, else its first one in grey."""
    grey = image.shape[-1] != 3
    panel.imshow(image[..., 0] if grey else numpy.clip(image, 0, 1), cmap="gray" if grey else None)
    panel.set_title(title, color=colour, fontsize=6.5, pad=2, loc="center", fontweight="bold" if framed else "normal")
    panel.xaxis.set_visible(False)
    panel.yaxis.set_visible(False)
    for spine in panel.spines.values():
        spine.set_visible(framed)
        spine.set_color(colour)
        spine.set_linewidth(1.6)
