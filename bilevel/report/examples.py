"""The figures of a run with a weight for each training example: how far they are trusted, and the least trusted to look at."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy
from matplotlib.figure import Figure
from numpy.typing import NDArray

from bilevel.report.load import Run
from bilevel.report.panels import picture
from bilevel.report.style import WIDTH, Plate, Theme, blank

__all__ = ["trust"]

COLUMNS = 8  # of images
NUM_BINS = 40

Arrays = dict[str, NDArray[Any]]


def trust(run: Run) -> list[Plate]:
    """The learned weights of right and of wrong labels, and the images of the least trusted examples."""
    arrays = run.examples
    if not arrays:
        return []
    classes = (run.summary.get("cleaning") or {}).get("classes") or []
    wrong = arrays["label"] != arrays["true_label"]
    caption = (
        f"How many of {len(wrong):,} training examples have which weight: those that are labelled rightly, and the "
        f"{int(wrong.sum()):,} that are not, which nothing that is learned knows."
    )
    found = [Plate("weights", "Weights of the training examples", caption, partial(_paint_weights, arrays))]
    if len(arrays["shown"]):
        caption = (
            "The training examples with the smallest weights, each under the label it has been given, and in brackets what "
            "it is; in a frame where the label is right, so that the example is suspected wrongly."
        )
        found.append(Plate("least_trusted", "Least trusted", caption, partial(_paint_images, arrays, classes)))
    return found


def _paint_weights(arrays: Arrays, theme: Theme) -> Figure:
    figure, (panel,) = blank(1, 1, 2.6)
    wrong = arrays["label"] != arrays["true_label"]
    edges = numpy.linspace(0.0, 1.0, NUM_BINS + 1)
    for name, chosen, colour in (("right label", ~wrong, theme.series[0]), ("wrong label", wrong, theme.series[1])):
        counts, _ = numpy.histogram(arrays["weight"][chosen], bins=edges)
        panel.stairs(counts, edges, fill=True, color=colour, alpha=0.6, label=name)
    panel.set_xlabel("weight")
    panel.set_ylabel("examples")
    panel.set_yscale("symlog", linthresh=10)  # most are at the two ends
    panel.legend()
    return figure


def _paint_images(arrays: Arrays, classes: list[str], theme: Theme) -> Figure:
    images, shown = arrays["images"], arrays["shown"].astype(int)
    rows = -(-len(shown) // COLUMNS)
    side = WIDTH / COLUMNS
    figure = Figure(figsize=(WIDTH, side * 1.3 * rows), layout="constrained")
    axes = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    for panel, index, image in zip(axes, shown, images, strict=False):
        given, true = (int(arrays[name][index]) for name in ("label", "true_label"))
        right = given == true
        title = f"{_name(classes, given)}\n({_name(classes, true)})"
        picture(panel, image, title, theme.series[1] if right else theme.ink, framed=right)
    for spare in axes[len(shown) :]:
        spare.remove()
    return figure


def _name(classes: list[str], label: int) -> str:
    return classes[label] if label < len(classes) else str(label)
