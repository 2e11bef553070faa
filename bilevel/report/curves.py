"""The picture of a certificate: error of the hypergradient against products, one line a linear solver."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure

from bilevel.report.style import LIGHT, Plate, Theme, blank, draw

__all__ = ["paint_curves"]


def paint_curves(curves: Mapping[str, Sequence[tuple[int, float]]], path: Path) -> None:
    """Draw the curves and write them as a PNG.

    Args:
        curves: for each solver, pairs of products and relative error.
        path: the file; its folder exists.
    """
    plate = Plate(path.stem, "Error against products", "", partial(_paint, curves))
    path.write_bytes(draw(plate, LIGHT))


def _paint(curves: Mapping[str, Sequence[tuple[int, float]]], theme: Theme) -> Figure:
    figure, (axes,) = blank(1, 1, 3.6)
    for index, (name, curve) in enumerate(curves.items()):
        shown = [(products, error) for products, error in curve if error > 0]
        if not shown:
            continue
        colour = theme.series[index % len(theme.series)]
        axes.plot(*zip(*shown, strict=True), color=colour, marker="o", markersize=3, label=name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("Hessian-vector products")
    axes.set_title("relative error of the hypergradient")
    if axes.lines:
        axes.legend(loc="best")
    return figure
