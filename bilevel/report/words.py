"""The figures of a run with penalties of words: what speaks for each class, and how rare and common words are penalised."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy
from matplotlib.figure import Figure

from bilevel.report.load import Run
from bilevel.report.style import Plate, Theme, blank

__all__ = ["words"]

COLUMNS = 5  # of classes


def words(run: Run) -> list[Plate]:
    """The words of largest weight, and the penalties by frequency where they differ."""
    found = run.summary.get("words")
    if not found:
        return []
    listed, groups = found["classes"], found["by_frequency"]
    caption = (
        "The words of largest weight for each class, the one with most above. Bold ones are penalised less than the median of "
        "the words shown, so that their weights are free to grow; faint ones more."
    )
    plates = [Plate("words", "What speaks for each class", caption, partial(_paint_words, listed))]
    if any(group["low"] < group["high"] for group in groups):
        caption = (
            "Penalties by the number of training texts that have the word: median and quartiles over words and classes."
        )
        plates.append(Plate("frequency", "Rare and common words", caption, partial(_paint_frequency, groups)))
    return plates


def _paint_words(listed: dict[str, list[dict[str, Any]]], theme: Theme) -> Figure:
    rows = -(-len(listed) // COLUMNS)
    most = max(len(chosen) for chosen in listed.values())
    median = numpy.median([one["penalty"] for chosen in listed.values() for one in chosen])
    figure, axes = blank(rows, COLUMNS, 0.16 * (most + 2.2) * rows)
    for panel, (name, chosen) in zip(axes, listed.items(), strict=False):
        panel.set_title(name, fontsize=7.5)
        panel.set_axis_off()
        panel.set_ylim(most, -0.5)
        for place, one in enumerate(chosen):
            ratio = one["penalty"] / median
            colour = theme.ink if ratio <= 1 else theme.faint
            panel.text(
                0.0,
                place,
                one["word"],
                fontsize=7,
                va="center",
                color=colour,
                fontweight="bold" if ratio < 1 else "normal",
            )
    for spare in axes[len(listed) :]:
        spare.remove()
    return figure


def _paint_frequency(groups: list[dict[str, float]], theme: Theme) -> Figure:
    figure, (panel,) = blank(1, 1, 2.6)
    texts = [math.sqrt(2) * group["texts"] for group in groups]  # the middle of a group
    panel.fill_between(
        texts,
        [group["low"] for group in groups],
        [group["high"] for group in groups],
        color=theme.series[0],
        alpha=0.25,
        linewidth=0,
    )
    panel.plot(texts, [group["median"] for group in groups], color=theme.series[0], marker="o", markersize=3)
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xlabel("training texts that have the word")
    panel.set_ylabel("penalty")
    return figure
