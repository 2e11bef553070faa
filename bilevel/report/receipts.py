"""The figure of what each hypergradient is worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bilevel.report.load import Run
from bilevel.report.panels import curve, grid, step_axis
from bilevel.report.style import Plate, Theme

__all__ = ["receipts"]


class _Panel(NamedTuple):
    """A panel and the entries of the records that it shows.

    Attributes:
        title: above it.
        keys: of the entries.
        is_count: whole numbers, from zero on.
        zero_is_none: zeros throughout are nothing to show.
    """

    title: str
    keys: tuple[str, ...]
    is_count: bool = False
    zero_is_none: bool = False

    def has_content(self, run: Run) -> bool:
        """Whether the run has anything to show in it."""
        shown = numpy.concatenate([run.series(key)[1] for key in self.keys])
        shown = shown[numpy.isfinite(shown)]
        return bool(shown.any() if self.zero_is_none else shown.size)


_PANELS = (
    _Panel("estimated relative error", ("hypergradient_error",)),
    _Panel("cosine to the step before", ("hypergradient_cosine",)),
    _Panel("stationarity of the inner solve", ("receipt.stationarity",)),
    _Panel("relative residual of the linear solve", ("receipt.linear_residual",)),
    _Panel("curvature seen: least and largest", ("receipt.curvature_min", "receipt.curvature_max")),
    _Panel("damping of the Hessian", ("receipt.damping",), zero_is_none=True),
    _Panel("hypergradient norm", ("hypergradient_norm",)),
    _Panel("products", ("receipt.products",), is_count=True),
)


def receipts(run: Run) -> list[Plate]:
    """The plate of those figures that the run's records have; none where they have nothing."""
    panels = [panel for panel in _PANELS if panel.has_content(run)]
    if not panels:
        return []
    biased = [record["step"] for record in run.records if record.get("receipt.biased")]
    skipped, shrunk = ([record["step"] for record in run.records if record.get(key)] for key in ("skipped", "shrunk"))
    caption = "What each hypergradient is worth, in natural units: the smaller the residual and the stationarity, the "
    caption += "closer it is to the exact one; products are what it cost in Hessian-vector products. "
    certified = [record.get("receipt.error_certified") for record in run.records]
    if any(one is False for one in certified):
        caption += "The error estimate is not certified: no lower bound of the curvature was declared. "
    if biased:
        share = "Every step" if len(biased) == len(run.records) else f"{len(biased)} of {len(run.records)} steps"
        caption += f"{share} {'was' if len(biased) in (1, len(run.records)) else 'were'} biased (shaded): "
        caption += "the method solves a changed system there, whatever the residual says. "
    else:
        caption += "No step was marked as biased. "
    if skipped:
        where = f"step {skipped[0]}" if len(skipped) == 1 else f"{len(skipped)} steps"
        caption += f"At {where}, crossed out, the hypergradient was not finite and was not applied. "
    if shrunk:
        where = f"step {shrunk[0]}" if len(shrunk) == 1 else f"{len(shrunk)} steps"
        caption += f"At {where}, marked by a triangle, the hypergradient was all error by its estimate and was shrunk. "
    marks = {"x": skipped, "v": shrunk}
    return [Plate("receipts", "Receipts", caption.strip(), partial(_paint, run, panels, biased, marks))]


def _paint(
    run: Run, panels: Sequence[_Panel], biased: Sequence[int], marks: Mapping[str, Sequence[int]], theme: Theme
) -> Figure:
    figure, axes = grid(len(panels))
    for index, (panel, place) in enumerate(zip(panels, axes, strict=True)):
        colour = theme.series[index % len(theme.series)]
        if panel.is_count:
            _bars(place, run, panel.keys[0], colour)
        else:
            for key in panel.keys:
                curve(place, run, key, colour)
        for start, stop in _spans(biased):
            place.axvspan(start - 0.5, stop + 0.5, color=theme.series[1], alpha=0.12, linewidth=0)
        for mark, steps in marks.items():
            height, across = [0.5] * len(steps), place.get_xaxis_transform()
            place.plot(steps, height, mark, color=theme.series[6], markersize=5, transform=across)
        place.set_title(panel.title)
    return figure


def _bars(place: Axes, run: Run, key: str, colour: str) -> None:
    """A bar for each step, all of them one shape: thousands of rectangles take seconds."""
    steps, values = run.series(key)
    first, last = int(steps[0]), int(steps[-1])
    heights = numpy.zeros(last - first + 1)
    heights[steps.astype(int) - first] = numpy.nan_to_num(values)
    place.stairs(heights, numpy.arange(first, last + 2) - 0.5, fill=True, color=colour, alpha=0.75, linewidth=0)
    place.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    step_axis(place, run)


def _spans(steps: Sequence[int]) -> list[tuple[int, int]]:
    """Join neighbouring steps: [1, 2, 3, 7] gives [(1, 3), (7, 7)]."""
    spans: list[tuple[int, int]] = []
    for step in steps:
        if spans and step == spans[-1][1] + 1:
            spans[-1] = (spans[-1][0], step)
        else:
            spans.append((step, step))
    return spans
