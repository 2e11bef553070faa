"""The look of figures and pages: one palette for paper, one for night; both are drawn, the reader's system picks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox

_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
__all__ = ["DARK", "LIGHT", "Plate", "Theme", "blank", "draw", "draw_in", "is_log_worthy", "log_axis"]

WIDTH = 7.6  # inches: the text width of the page at 100 CSS pixels an inch
DPI = 200


@dataclass(frozen=True)
class Theme:
    """Colours of a figure: `series` are told apart also by readers who see no red or no green."""

    paper: str
    ink: str
    faint: str
    line: str
    series: tuple[str, ...]


LIGHT = Theme(
    paper="#fdfcf9",
    ink="#22252b",
    faint="#6d7078",
    line="#e4e1d8",
    series=("#1f5a93", "#c4541a", "#2f7d5b", "#8a4f9e", "#b08a1e", "#4d9ac0", "#9c3b52", "#5d6470"),
)
DARK = Theme(
    paper="#16181d",
    ink="#e4e2dc",
    faint="#989ba3",
    line="#31343c",
    series=("#7db4e6", "#f0935c", "#77c9a2", "#c795d8", "#dfbf63", "#9fd6ee", "#e38aa0", "#a9b0bc"),
)


@dataclass(frozen=True)
class Plate:
    """A figure of a report.

    Attributes:
        name: File name without ending.
        title: A short heading.
        caption: How to read it, in HTML-free text.
        paint: Draws it in a theme.
    """

    name: str
    title: str
    caption: str
    paint: Callable[[Theme], Figure]


def draw(plate: Plate, theme: Theme, folder: Path | None = None) -> bytes:
    """Render a plate as a PNG, and write it into `folder` when one is given."""
    (data,) = draw_in(plate, [theme], folder)
    return data


def draw_in(plate: Plate, themes: Sequence[Theme], folder: Path | None = None) -> list[bytes]:
    """Render a plate in several themes, which differ in colours alone, so that it is laid out once; `folder` gets the first."""
    pictures: list[bytes] = []
    places: list[Bbox] | None = None
    for theme in themes:
        settings: Any = _settings(theme)  # matplotlib types the keys as one Literal of all its settings
        with rc_context(settings):
            figure = plate.paint(theme)
            figure.set_dpi(DPI)
            canvas = FigureCanvasAgg(figure)
            places = _lay_out(figure, places)
            buffer = BytesIO()
            canvas.print_png(buffer)
        pictures.append(buffer.getvalue())
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{plate.name}.png").write_bytes(pictures[0])
    return pictures


def _lay_out(figure: Figure, places: Sequence[Bbox] | None) -> list[Bbox]:
    """Put the axes where they were in the figure before, or for the first one where the layout engine wants them."""
    engine = figure.get_layout_engine()
    if places is None and engine is not None:
        engine.execute(figure)
    figure.set_layout_engine("none")
    for axes, place in zip(figure.axes, places or [], strict=False):
        axes.set_position(place)
    return [axes.get_position(original=True) for axes in figure.axes]


def blank(rows: int, columns: int, height: float, **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure of the page's width, `height` inches high, and its axes row by row."""
    layout = ConstrainedLayoutEngine(w_pad=0.05, h_pad=0.05, wspace=0.04, hspace=0.04)
    figure = Figure(figsize=(WIDTH, height), layout=layout)
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, list(axes.ravel())


def is_log_worthy(values: Sequence[float] | numpy.ndarray[Any, Any]) -> bool:
    """Whether a log scale shows these values better: all positive, over more than a factor of five."""
    finite = numpy.asarray(values, dtype=float)
    finite = finite[numpy.isfinite(finite)]
    return bool(finite.size and finite.min() > 0 and finite.max() > 5 * finite.min())


def log_axis(axes: Axes, values: Sequence[float] | numpy.ndarray[Any, Any]) -> None:
    """Use a log scale when that is worth it, with few, plain ticks."""
    if is_log_worthy(values):
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        if high / low < 100:  # under two decades: label within the decade too, or there may be one tick in all
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
        else:
            axes.yaxis.set_major_locator(LogLocator(numticks=6))
            axes.yaxis.set_major_formatter(lambda value, _: power_of_ten(value))
        axes.yaxis.set_minor_locator(NullLocator())  # their ticks have no length, and take as long to draw as others
    else:
        axes.set_yscale("linear")
        axes.yaxis.set_major_locator(MaxNLocator(5))


def power_of_ten(value: float) -> str:
    """A tick of a logarithmic axis in plain characters, which take a hundredth of the time of mathematical ones.

    Example:
        >>> power_of_ten(0.01), power_of_ten(1e-12), power_of_ten(1e5)
        ('0.01', '10⁻¹²', '10⁵')
    """
    exponent = round(math.log10(value))
    return f"{value:g}" if -3 < exponent < 4 else "10" + str(exponent).translate(_RAISED)


def _settings(theme: Theme) -> dict[str, Any]:
    return {
        **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), theme.paper),
        **dict.fromkeys(("text.color", "axes.titlecolor"), theme.ink),
        **dict.fromkeys(("axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), theme.faint),
        **dict.fromkeys(("axes.edgecolor", "grid.color", "xtick.color", "ytick.color"), theme.line),
        **dict.fromkeys(("axes.spines.top", "axes.spines.right", "axes.spines.left", "legend.frameon"), False),
        **dict.fromkeys(("xtick.labelsize", "ytick.labelsize", "legend.fontsize", "axes.labelsize"), 7.5),
        **dict.fromkeys(("ytick.major.size", "ytick.minor.size", "xtick.major.size"), 0.0),
        **{"axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True, "grid.linewidth": 0.7},
        **{"axes.titlesize": 8.5, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.titlepad": 7},
        **{"axes.titley": 1.0},  # where it would be, without a search for ticks above the axes at each drawing
        **{"font.family": "DejaVu Sans", "font.size": 8, "lines.linewidth": 1.7, "lines.solid_capstyle": "round"},
        **{"axes.formatter.useoffset": False, "axes.formatter.limits": (-3, 5)},
    }
