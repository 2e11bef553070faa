"""The figures of one run: losses, metrics, hyperparameters over time and at the end, receipts."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from bilevel.report.distilled import distilled
from bilevel.report.examples import trust
from bilevel.report.few_shot import adaptation, is_few_shot
from bilevel.report.load import Run
from bilevel.report.panels import curve, grid, step_axis
from bilevel.report.receipts import receipts
from bilevel.report.style import WIDTH, Plate, Theme, blank, is_log_worthy, log_axis
from bilevel.report.weighting import weighting
from bilevel.report.words import words
from bilevel.tracking.format import number

__all__ = ["plates"]

HALF_WIDTH = "_half_width"  # of a metric's 95 % interval, beside it
MAX_PANELS = 12
MAX_LINES = 8
MAX_IMAGES = 10
MIN_IMAGE = 16  # pixels: below that a square trailing size is a coincidence


def plates(run: Run) -> list[Plate]:
    """The figures that the run's files can fill, in reading order."""
    makers = (
        _losses,
        adaptation,
        trust,
        words,
        distilled,
        weighting,
        _metrics,
        _trajectories,
        _histograms,
        _images,
        receipts,
    )
    return [plate for maker in makers for plate in maker(run)]


# -- curves -----------------------------------------------------------------------------------------------------


def _losses(run: Run) -> list[Plate]:
    """Outer and inner loss, side by side: their scales rarely agree."""
    keys = [key for key in ("outer_loss", "inner_loss") if run.series(key)[0].size]
    if not keys:
        return []
    dot = "; the dot is the best step" if run.is_comparable else ", each step's on tasks or a minibatch of its own"
    caption = f"Left: the outer loss, which the hyperparameters minimise{dot}. " * ("outer_loss" in keys)
    if run.summary.get("holdout"):
        caption += (
            "The thin line is the loss on validation examples that the outer loss leaves out, its dot the least value. "
        )
    caption += "Right: the inner loss at the inner solution; it need not fall, for it is not what is being tuned." * (
        len(keys) > 1
    )
    return [Plate("losses", "Losses", caption.strip(), partial(_paint_losses, run, keys))]


def _paint_losses(run: Run, keys: Sequence[str], theme: Theme) -> Figure:
    figure, axes = blank(1, len(keys), 2.6)
    for index, (key, panel) in enumerate(zip(keys, axes, strict=True)):
        curve(panel, run, key, theme.series[index])
        panel.set_title(key.replace("_", " "))
        if key == "outer_loss" and run.is_comparable and run.best is not None:
            step, loss = run.best
            panel.plot([step], [loss], "o", color=theme.ink, markersize=4.5, zorder=5)
            monitor = run.summary.get("monitor")
            note = f"best {number(loss, 5)} at step {step}"
            if monitor:
                note = f"{number(loss, 5)} at step {step}, of the best {monitor.replace('_', ' ')}"
            panel.set_title(note, loc="right", color=theme.faint, fontsize=7.5, fontweight="normal")
            _paint_holdout(run, panel, theme)
    return figure


def _paint_holdout(run: Run, panel: Axes, theme: Theme) -> None:
    """The loss on what the outer loss leaves out, beside it."""
    found = run.summary.get("holdout")
    if found:
        steps, values = run.series(f"metrics.{found['metric']}")
        panel.plot(steps, values, color=theme.faint, linewidth=1.0)
        panel.plot([found["best_step"]], [found["best_loss"]], "o", color=theme.faint, markersize=3.0)


def _metrics(run: Run) -> list[Plate]:
    keys = [key for key in run.keys("metrics.") if run.series(key)[0].size and not key.endswith(HALF_WIDTH)][
        :MAX_PANELS
    ]
    if not keys:
        return []
    caption = (
        "Scores of the validation tasks, by which settings may be chosen; the outer loss is what is minimised."
        if is_few_shot(run)
        else "The problem's own metrics at each outer step. They steer nothing: only the outer loss is minimised."
    )
    caption += " A band is a 95 % interval." * any(key + HALF_WIDTH in run.keys("metrics.") for key in keys)
    return [Plate("metrics", "Metrics", caption, partial(_paint_metrics, run, keys))]


def _paint_metrics(run: Run, keys: Sequence[str], theme: Theme) -> Figure:
    figure, axes = grid(len(keys))
    for index, (key, panel) in enumerate(zip(keys, axes, strict=False)):
        colour = theme.series[index % len(theme.series)]
        curve(panel, run, key, colour)
        (steps, values), (_, half) = run.series(key), run.series(key + HALF_WIDTH)
        if len(half) == len(steps):
            panel.fill_between(steps, values - half, values + half, color=colour, alpha=0.18, linewidth=0)
        panel.set_title(key.removeprefix("metrics.").replace("_", " "))
    return figure


# -- hyperparameters --------------------------------------------------------------------------------------------


def _trajectories(run: Run) -> list[Plate]:
    keys = run.keys("hparams.")
    bands = [key.removesuffix(".median") for key in keys if key.endswith(".median") and key[:-7] + ".min" in keys]
    parts = {f"{band}.{part}" for band in bands for part in ("min", "median", "max")}
    scalars = [key for key in keys if key not in parts and run.series(key)[0].size]
    panels: list[list[str]] = [scalars[start : start + MAX_LINES] for start in range(0, len(scalars), MAX_LINES)]
    panels += [[band] for band in bands]
    if not panels:
        return []
    caption = "Hyperparameters in natural units. A single line is one number"
    caption += (
        "; a band reaches from a tensor's least to its greatest element, its line is the median" * bool(bands) + "."
    )
    if len(panels) > MAX_PANELS:
        caption += f" The first {MAX_PANELS} of {len(panels)} panels are shown."
    return [
        Plate(
            "hparams",
            "Hyperparameters over the run",
            caption,
            partial(_paint_trajectories, run, panels[:MAX_PANELS], frozenset(bands)),
        )
    ]


def _paint_trajectories(run: Run, panels: Sequence[Sequence[str]], bands: frozenset[str], theme: Theme) -> Figure:
    figure, axes = grid(len(panels))
    for index, (keys, panel) in enumerate(zip(panels, axes, strict=True)):
        if keys[0] in bands:
            _band(panel, run, keys[0], theme.series[index % len(theme.series)])
            panel.set_title(keys[0].removeprefix("hparams."))
            continue
        for line, key in enumerate(keys):
            curve(panel, run, key, theme.series[line % len(theme.series)], key.removeprefix("hparams."))
        if len(keys) > 1:
            panel.legend(loc="best", handlelength=1.2)
        panel.set_title(keys[0].removeprefix("hparams.") if len(keys) == 1 else "single hyperparameters")
    return figure


def _band(panel: Axes, run: Run, key: str, colour: str) -> None:
    rows = [[record.get(f"{key}.{part}") for part in ("min", "median", "max")] for record in run.records]
    numbers = numpy.array([[math.nan if not isinstance(v, int | float) else v for v in row] for row in rows], float)
    numbers = numpy.where(numpy.isfinite(numbers), numbers, numpy.nan)  # (num_steps, 3)
    steps = [record["step"] for record in run.records]
    panel.fill_between(steps, numbers[:, 0], numbers[:, 2], color=colour, alpha=0.18, linewidth=0)
    for column, width in ((0, 0.6), (1, 1.8), (2, 0.6)):
        marker = "o" if len(steps) < 15 and column == 1 else None
        panel.plot(steps, numbers[:, column], color=colour, linewidth=width, marker=marker, markersize=2.6)
    log_axis(panel, numbers)
    step_axis(panel, run)


def _histograms(run: Run) -> list[Plate]:
    tensors = {name: value[numpy.isfinite(value)] for name, value in run.hparams.items() if value.size > 1}
    tensors = dict(list((name, value) for name, value in tensors.items() if value.size)[:MAX_PANELS])
    if not tensors:
        return []
    caption = "How the final values are spread, one panel a tensor; the vertical line is the median. "
    caption += "The axis is logarithmic where all values are positive and differ enough."
    return [Plate("histograms", "Final hyperparameters", caption, partial(_paint_histograms, tensors))]


def _paint_histograms(tensors: dict[str, NDArray[Any]], theme: Theme) -> Figure:
    figure, axes = grid(len(tensors))
    for index, ((name, values), panel) in enumerate(zip(tensors.items(), axes, strict=True)):
        colour = theme.series[index % len(theme.series)]
        num_bins = int(numpy.clip(2 * math.sqrt(values.size), 8, 48))
        if is_log_worthy(values):
            edges = numpy.geomspace(values.min(), values.max(), num_bins + 1)
            panel.set_xscale("log")
        else:
            edges = numpy.histogram_bin_edges(values, bins=num_bins)
        counts, _ = numpy.histogram(values, bins=edges)
        panel.stairs(counts, edges, fill=True, color=colour, alpha=0.75)
        panel.axvline(float(numpy.median(values)), color=theme.ink, linewidth=1.0)
        panel.set_title(f"{name}  ({values.size:,} values)")
        panel.set_ylabel("count")
        panel.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    return figure


def _images(run: Run) -> list[Plate]:
    """A heat map for every tensor whose trailing size is a square, as pixels of an image are."""
    found: list[Plate] = []
    if is_few_shot(run) or run.examples or {"words", "weighting"} & run.summary.keys():  # of these none are images
        return found
    for name, values in run.hparams.items():
        size = values.shape[-1] if values.ndim else 1
        side = math.isqrt(size)
        if values.size and size >= MIN_IMAGE and side * side == size and numpy.isfinite(values).any():
            stack = values.reshape(-1, side, side)
            more = f" The first {MAX_IMAGES} of {len(stack)} are shown." if len(stack) > MAX_IMAGES else ""
            caption = (
                f"The final {name}: each row of {size} values as {side} x {side} pixels, in one colour scale.{more}"
            )
            file = f"image_{re.sub(r'[^A-Za-z0-9_.-]+', '_', name)}"
            found.append(Plate(file, f"{name} as an image", caption, partial(_paint_images, stack[:MAX_IMAGES])))
    return found[:MAX_PANELS]


def _paint_images(stack: NDArray[Any], theme: Theme) -> Figure:
    count = len(stack)
    columns = min(count, 5)
    rows = -(-count // columns)
    side = min(WIDTH / columns, 2.6)
    figure = Figure(figsize=(min(WIDTH, side * columns + 1.0), side * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    finite = stack[numpy.isfinite(stack)]
    low, high = float(finite.min()), float(finite.max())
    norm = LogNorm(low, high) if is_log_worthy(finite) else Normalize(low, high)
    for index, panel in enumerate(axes):
        panel.set_axis_off()
        if index < count:
            picture = panel.imshow(stack[index], norm=norm, cmap="cividis", interpolation="nearest")
            if count > 1:
                panel.set_title(str(index), color=theme.faint, fontweight="normal", pad=3)
    bar = figure.colorbar(picture, ax=list(axes), shrink=0.8, aspect=24, pad=0.02)
    bar.outline.set_visible(False)
    return figure
