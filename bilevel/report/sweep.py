"""The page of a sweep: a leaderboard of its runs, what differs between their configs, and their curves in one plot."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bilevel.jsonable import flatten
from bilevel.report.html import figure_html, header, table, write_page
from bilevel.report.load import Run
from bilevel.report.style import Plate, Theme, blank, log_axis
from bilevel.tracking.format import duration, number

__all__ = ["sweep_page"]

MAX_DIFFERENCES = 8
MAX_CURVES = 8  # in colour, the leaders; the others stay grey
_HIDDEN = ("hydra.", "directory", "run_dir", "output_dir", "resume")


def sweep_page(sweep: tuple[Path, list[Run]]) -> Path:
    """Write the figures and the page of a sweep; return the page's path."""
    directory, runs = sweep
    ranked = sorted(runs, key=lambda run: run.standing.rank)
    best = ranked[0].standing
    labels = [os.path.relpath(run.directory, directory) for run in ranked]
    seconds = [run.wall_seconds for run in ranked if run.wall_seconds is not None]
    figures = [
        (best.name, best.figure, f"run {labels[0]}" if best.rank < math.inf else best.where),
        ("runs", number(len(runs)), f"{sum(bool(run.summary) for run in runs)} of them ended"),
        ("time of all runs", duration(sum(seconds) if seconds else None), ""),
    ]
    name = directory.resolve().name
    parts = [
        header("A sweep of bilevel", name, f"ranked by the {best.name} of each run", figures),
        "<h2>Leaderboard</h2>" + _leaderboard(directory, ranked, labels),
    ]
    plate = _curves(ranked, labels)
    if plate is not None:
        parts.append(f"<h2>{escape(plate.title)}</h2>" + figure_html(plate, 1, directory / "figures"))
    return write_page(directory, name, parts, broad=True)


def _leaderboard(directory: Path, runs: Sequence[Run], labels: Sequence[str]) -> str:
    differing = differences([run.config for run in runs])
    metrics = list(dict.fromkeys(key for run in runs for key in run.final if key.startswith("metrics.")))
    columns = ["run", *(key.removesuffix("._target_") for key in differing)]
    columns += [runs[0].standing.name, "where", "steps", "time"]
    columns += [f"final {key.removeprefix('metrics.').replace('_', ' ')}" for key in metrics] + ["ended"]
    rows = []
    for run, label in zip(runs, labels, strict=True):
        cells = [run.standing.figure, run.standing.where]
        cells += [number(run.num_steps_taken), duration(run.wall_seconds)]
        cells += [number(run.final.get(key)) for key in metrics]
        cells.append(_short(run.summary.get("stopped_because") or "yes") if run.summary else "killed or running")
        settings = [_short(values[runs.index(run)]) for values in differing.values()]
        rows.append([_link(directory, run, label), *(escape(cell) for cell in (*settings, *cells))])
    return table(columns, rows, own=0 if runs[0].standing.rank < math.inf else None)


def differences(configs: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Keys whose values differ between configs, with each config's value: at most `MAX_DIFFERENCES`, in order.

    Where a config group was swapped, its `_target_` stands for it and comes first.
    """
    flat = [dict(flatten(config)) for config in configs]
    keys = list(dict.fromkeys(key for config in flat for key in config))
    found = {}
    for key in keys:
        values = [config.get(key) for config in flat]
        if any(value != values[0] for value in values) and not key.startswith(_HIDDEN) and "directory" not in key:
            found[key] = values
    swapped = {key: values for key, values in found.items() if key.endswith("._target_")}
    groups = tuple(key.removesuffix("_target_") for key in swapped)
    plain = {key: values for key, values in found.items() if not key.startswith(groups or ("\0",))}
    return dict(list((swapped | plain).items())[:MAX_DIFFERENCES])


def _short(value: Any) -> str:
    if isinstance(value, int | float):
        return f"{value:g}" if isinstance(value, float) else str(value)
    text = "-" if value is None else str(value)
    tail = text.rsplit(".", 1)[-1] if " " not in text and text.count(".") > 1 else text  # a class: its name will do
    return tail if len(tail) <= 40 else f"{tail[:37]}..."


def _link(directory: Path, run: Run, label: str) -> str:
    page = run.directory / "report.html"
    target = quote(Path(os.path.relpath(page, directory)).as_posix())
    return f'<a href="{target}">{escape(label)}</a>' if page.is_file() else escape(label)


def _curves(runs: Sequence[Run], labels: Sequence[str]) -> Plate | None:
    shown = [(run, label) for run, label in zip(runs, labels, strict=True) if run.series("outer_loss")[0].size]
    if not shown:
        return None
    caption = "Outer loss of each run against outer steps, left, and against seconds, right: "
    caption += "equal steps are not equal work."
    if len(shown) > MAX_CURVES:
        caption += f" The {MAX_CURVES} best are in colour, the others grey."
    return Plate("curves", "Outer loss of all runs", caption, partial(_paint_curves, shown))


def _paint_curves(shown: Sequence[tuple[Run, str]], theme: Theme) -> Figure:
    figure, (by_step, by_time) = blank(1, 2, 3.0, sharey=True)
    everything = []
    for rank, (run, label) in reversed(list(enumerate(shown))):  # the leader last, on top
        leads = rank < MAX_CURVES
        look: dict[str, Any] = {"color": theme.series[rank % len(theme.series)] if leads else theme.line}
        look |= {"label": label if leads else None, "zorder": 3 if leads else 2, "linewidth": 1.6 if leads else 1.0}
        steps, losses = run.series("outer_loss")
        losses = numpy.where(numpy.isfinite(losses), losses, numpy.nan)
        everything.append(losses)
        marker: dict[str, Any] = {"marker": "o", "markersize": 2.4} if steps.size < 15 else {}
        by_step.plot(steps, losses, **look, **marker)
        _, seconds = run.series("seconds")
        if seconds.size == steps.size:
            by_time.plot(numpy.nancumsum(seconds), losses, **look, **marker)
    log_axis(by_step, numpy.concatenate(everything))
    by_step.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    by_step.set_title("against steps")
    by_step.set_xlabel("outer step")
    by_time.set_title("against time")
    by_time.set_xlabel("seconds")
    handles, names = by_step.get_legend_handles_labels()
    if len(shown) > 1:
        order = slice(None, None, -1)
        figure.legend(handles[order], names[order], loc="outside lower center", ncols=min(4, len(names)))
    return figure
