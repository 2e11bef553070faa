"""The figures of a run that has distilled images: the images, and what random real ones are worth beside them."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy
from matplotlib.figure import Figure
from numpy.typing import NDArray

from bilevel.report.load import Run
from bilevel.report.panels import picture
from bilevel.report.style import WIDTH, Plate, Theme, blank

__all__ = ["distilled"]

COLUMNS = 10  # of images
MOST = 100  # images that are shown


def distilled(run: Run) -> list[Plate]:
    """The learned images under the names of their classes, and accuracies after training on them and on real ones."""
    found, images = run.summary.get("distilled"), run.hparams.get("images")
    if not found or images is None:
        return []
    caption = (
        "The images that the network is trained on, each in its own grey scale from its 1 % to its 99 % quantile: pixels are "
        "free numbers."
    )
    more = f" The first {MOST} of {len(images)} are shown." if len(images) > MOST else ""
    plates = [
        Plate("distilled", "Distilled images", caption + more, partial(_paint_images, images[:MOST], found["labels"]))
    ]
    caption = (
        f"Test accuracy after training on the distilled images (the line), and on as many real ones in each of "
        f"{len(found['random'])} random draws (the dots)."
    )
    return [*plates, Plate("draws", "Distilled and real images", caption, partial(_paint_draws, found))]


def _paint_images(images: NDArray[Any], labels: list[str], theme: Theme) -> Figure:
    rows = -(-len(images) // COLUMNS)
    side = WIDTH / COLUMNS
    figure = Figure(figsize=(WIDTH, side * 1.2 * rows), layout="constrained")
    axes = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    for panel, image, label in zip(axes, images, labels, strict=False):
        low, high = numpy.quantile(image, [0.01, 0.99])
        picture(panel, numpy.clip((image - low) / max(high - low, 1e-12), 0, 1), label, theme.ink)
    for spare in axes[len(images) :]:
        spare.remove()
    return figure


def _paint_draws(found: dict[str, Any], theme: Theme) -> Figure:
    figure, (panel,) = blank(1, 1, 1.3)
    panel.plot(
        found["random"], numpy.zeros(len(found["random"])), "o", color=theme.series[0], alpha=0.6, label="real images"
    )
    panel.axvline(found["accuracy"], color=theme.series[1], label="distilled images")
    panel.yaxis.set_visible(False)
    panel.set_xlabel("test accuracy")
    panel.legend(loc="upper center", ncols=2)
    return figure
