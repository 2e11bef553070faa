"""The figures of a few-shot run: how test tasks adapt, and a few of them to look at."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from bilevel.report.load import Run
from bilevel.report.panels import picture
from bilevel.report.style import WIDTH, Plate, Theme, blank
from bilevel.tracking.format import number

__all__ = ["adaptation", "is_few_shot"]

MAX_CLASSES = 20  # rows of images of a task
MAX_QUERIES = 12  # query images of a class
LETTERS = "ABCDEFGHIJKLMNOPQRST"

Arrays = dict[str, NDArray[Any]]


def is_few_shot(run: Run) -> bool:
    """Whether the run has scored test tasks."""
    return bool(run.summary.get("evaluation"))


def adaptation(run: Run) -> list[Plate]:
    """The score against inner steps, and the test tasks that were kept."""
    return [*_scores(run), *_tasks(run)]


def _scores(run: Run) -> list[Plate]:
    found = run.summary.get("evaluation") or {}
    if not found.get("mean"):
        return []
    caption = (
        f"Mean {found['score']} on the query sets of {found['num_tasks']:,} test tasks after each number of inner steps; the "
        "band is its 95 % interval, the dashed line what learns nothing from other tasks."
    )
    return [Plate("adaptation", "Adaptation of test tasks", caption, partial(_paint_scores, found))]


def _paint_scores(found: dict[str, Any], theme: Theme) -> Figure:
    figure, (panel,) = blank(1, 1, 2.8)
    steps, mean, half = (numpy.array(found[key], dtype=float) for key in ("inner_steps", "mean", "half_width"))
    panel.fill_between(steps, mean - half, mean + half, color=theme.series[0], alpha=0.2, linewidth=0)
    panel.plot(steps, mean, "o-", color=theme.series[0], markersize=3)
    panel.axhline(found["floor"], color=theme.faint, linestyle="--", linewidth=1.0)
    panel.set_xlabel("inner steps")
    panel.set_ylabel(found["score"])
    own = found["inner_steps"].index(found["num_steps"])
    panel.set_title(f"{number(mean[own], 4)} ± {number(half[own], 2)} after {int(steps[own])}")
    return figure


def _tasks(run: Run) -> list[Plate]:
    """Images of each task with their predictions, or one figure of all fitted curves."""
    arrays = run.episodes
    if not arrays:
        return []
    inputs, outputs = arrays["query.inputs"], arrays["outputs.after"]
    if inputs.ndim == 5 and outputs.ndim == 3:  # (T, N, H, W, C), (T, N, O)
        return [_images(arrays, task) for task in range(len(inputs))]
    if inputs.ndim == 3 and inputs.shape[-1] == outputs.shape[-1] == 1:
        caption = (
            "Test tasks: the few points that each adapts to, the curve they come from at the query points, and the network "
            "there before and after adaptation."
        )
        return [Plate("tasks", "Test tasks", caption, partial(_paint_curves, arrays))]
    return []


def _images(arrays: Arrays, task: int) -> Plate:
    one = {name: values[task] for name, values in arrays.items()}
    right = [int((one[f"outputs.{when}"].argmax(-1) == one["query.targets"]).sum()) for when in ("before", "after")]
    caption = (
        "Left of the line the support images, one class a row; right of it query images of that class, each under the "
        "class that the adapted network takes it for, in colour where that is wrong. "
        f"Right are {right[1]} of {len(one['query.targets'])}; before adaptation {right[0]}."
    )
    most = max(numpy.bincount(one[f"{part}.targets"].astype(int)).max() for part in ("support", "query"))
    if one["query.targets"].max() >= MAX_CLASSES or most > MAX_QUERIES:
        caption += f" Shown are at most {MAX_CLASSES} classes and {MAX_QUERIES} images of each."
    return Plate(f"task_{task}", f"Test task {task}", caption, partial(_paint_images, one))


def _paint_images(one: Arrays, theme: Theme) -> Figure:
    ways = min(int(one["support.targets"].max()) + 1, MAX_CLASSES)
    support = [numpy.flatnonzero(one["support.targets"] == label)[:MAX_QUERIES] for label in range(ways)]
    query = [numpy.flatnonzero(one["query.targets"] == label)[:MAX_QUERIES] for label in range(ways)]
    shots, queries = max(map(len, support)), max(map(len, query))
    predicted = one["outputs.after"].argmax(-1)
    side = min(WIDTH / (shots + queries + 1), 0.75)
    figure = Figure(figsize=(side * (shots + queries + 0.6), side * 1.25 * ways))
    across = figure.add_gridspec(ways, shots + queries + 1, width_ratios=[1.0] * shots + [0.3] + [1.0] * queries)
    across.update(left=0.01, right=0.99, bottom=0.01, top=1 - 0.25 / (1.25 * ways), wspace=0.12, hspace=0.35)
    for row in range(ways):
        for column, index in enumerate(support[row]):
            picture(figure.add_subplot(across[row, column]), one["support.inputs"][index], LETTERS[row], theme.ink)
        for column, index in enumerate(query[row]):
            guess = int(predicted[index])
            colour = theme.faint if guess == row else theme.series[1]
            panel = figure.add_subplot(across[row, shots + 1 + column])
            picture(panel, one["query.inputs"][index], _letter(guess), colour, framed=guess != row)
    between = across[0, shots].get_position(figure)
    x = (between.x0 + between.x1) / 2
    figure.add_artist(Line2D([x, x], [0.02, 0.98], color=theme.line, linewidth=1.0))
    return figure


def _letter(label: int) -> str:
    return LETTERS[label] if label < len(LETTERS) else str(label)


def _paint_curves(arrays: Arrays, theme: Theme) -> Figure:
    count = len(arrays["query.inputs"])
    columns = min(count, 3)
    figure, axes = blank(-(-count // columns), columns, 2.4 * -(-count // columns), sharey=True)
    for task, panel in enumerate(axes[:count]):
        one = {name: values[task, :, 0] for name, values in arrays.items()}
        order = one["query.inputs"].argsort()
        lines = (
            ("target", "query.targets", theme.faint, "-"),
            ("before", "outputs.before", theme.series[2], ":"),
            ("adapted", "outputs.after", theme.series[0], "-"),
        )
        for label, key, colour, style in lines:
            panel.plot(one["query.inputs"][order], one[key][order], style, color=colour, label=label, linewidth=1.4)
        panel.plot(
            one["support.inputs"], one["support.targets"], "o", color=theme.series[1], markersize=4, label="support"
        )
        error = numpy.square(one["outputs.after"] - one["query.targets"]).mean()
        panel.set_title(f"mean squared error {number(float(error), 3)}")
    for spare in axes[count:]:
        spare.remove()
    axes[0].legend(loc="best", handlelength=1.4)
    return figure
