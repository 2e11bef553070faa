"""The picture of a certificate: error of the hypergradient against products, a line or a mark for each method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure

from bilevel.report.style import LIGHT, Plate, Theme, blank, draw

__all__ = ["paint_methods"]

ROUNDING = 1e-16  # where an error of nothing is drawn
MARKS = "osD^vPX*"


def paint_methods(methods: Mapping[str, Sequence[tuple[int, float, float]]], path: Path) -> None:
    """Draw the curves and write them as a PNG.

    Args:
        methods: for each method, triples of products, relative error, and relative error beside finite differences.
        path: the file; its folder exists.
    """
    plate = Plate(path.stem, "Error against products", "", partial(_paint, methods))
    path.write_bytes(draw(plate, LIGHT))


def _paint(methods: Mapping[str, Sequence[tuple[int, float, float]]], theme: Theme) -> Figure:
    figure, (axes,) = blank(1, 1, 4.2)
    for index, (name, points) in enumerate(methods.items()):
        places = [(products, max(error, ROUNDING)) for products, error, _ in points]
        axes.plot(
            *zip(*places, strict=True),
            color=theme.series[index % len(theme.series)],
            marker=MARKS[index % len(MARKS)],
            fillstyle="full" if len(places) > 1 else "none",
            markersize=3.5 if len(places) > 1 else 6,
            linestyle="-" if index < len(theme.series) else "--",
            linewidth=1.2,
            label=name,
        )
    axes.set_xscale("symlog", linthresh=1, linscale=0.4)
    axes.set_xlim(left=-0.15)
    axes.set_yscale("log")
    axes.set_xlabel("products with the inner Hessian, recorded inner steps among them")
    axes.set_title("relative error of the hypergradient")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
