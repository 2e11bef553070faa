"""The figures of a run with a learned weighting: weight by loss, and what it does for each class."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy
from matplotlib.figure import Figure

from bilevel.report.load import Run
from bilevel.report.style import Plate, Theme, blank

__all__ = ["weighting"]


def weighting(run: Run) -> list[Plate]:
    """The learned curve beside mean weights of the classes, and their test accuracies with and without it."""
    found = run.summary.get("weighting")
    if not found:
        return []
    caption = (
        "Left: the weight of a training image by its loss, over the losses of all of them at the best step. Middle: the mean "
        "weight of each class, with the number of its training images. Right: test accuracy of each class with learned "
        "weights, and after the same steps with equal ones."
    )
    return [Plate("weighting", "Weights of training images", caption, partial(_paint, found))]


def _paint(found: dict[str, Any], theme: Theme) -> Figure:
    figure, (curve, weights, right) = blank(1, 3, 2.8)
    classes = found["classes"]
    rows = numpy.arange(len(classes))[::-1]
    curve.plot(found["losses"], found["weights"], color=theme.series[0])
    curve.set(xlabel="loss", ylabel="weight")
    curve.set_xscale("symlog", linthresh=0.01)
    weights.barh(rows, [one["weight"] for one in classes], color=theme.series[0], height=0.6)
    weights.set_yticks(rows, [f"{one['name']}, {one['images']:,}" for one in classes])
    weights.set(xlabel="mean weight")
    for name, colour, mark in (("equal", theme.faint, "o"), ("learned", theme.series[1], "D")):
        right.plot([one[name] for one in classes], rows, mark, color=colour, markersize=4, label=name)
    right.set_yticks(rows, [])
    right.set(xlabel="test accuracy", xlim=(0, 1), ylim=weights.get_ylim())
    right.legend(loc="lower left")
    return figure
