"""How figures look wherever a run is shown: short numbers, readable durations, the baseline beside the run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["BaselineTable", "baseline_table", "duration", "number"]

MISSING = "-"


def number(value: Any, digits: int = 4) -> str:
    """Write a number with `digits` significant digits, integers in full; what is missing becomes a dash.

    Example:
        >>> number(0.123456), number(1234567), number(3.2e-9), number(None), number(float("nan"))
        ('0.1235', '1,234,567', '3.200e-09', '-', 'nan')
    """
    if value is None:
        return MISSING
    if isinstance(value, bool) or not isinstance(value, int | float):
        return {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return str(float(value))
    if value == 0.0:
        return "0"
    scientific = f"{value:.{digits - 1}e}"
    exponent = int(scientific.partition("e")[2])  # after rounding: 9.9999 has that of 10
    return f"{value:,.{max(0, digits - 1 - exponent)}f}" if -3 <= exponent < 6 else scientific


def duration(seconds: Any) -> str:
    """Write a time for people.

    Example:
        >>> [duration(s) for s in (0, 0.00012, 0.042, 3.14, 75, 100000, None)]
        ['0 s', '0.1 ms', '42 ms', '3.1 s', '1:15', '27:46:40', '-']
    """
    if not isinstance(seconds, int | float) or isinstance(seconds, bool) or not math.isfinite(seconds):
        return MISSING
    if seconds <= 0:
        return "0 s"
    if seconds < 0.1:
        milliseconds = 1000 * seconds
        return f"{milliseconds:.0f} ms" if milliseconds >= 9.95 else f"{milliseconds:.1f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


@dataclass(frozen=True)
class BaselineTable:
    """A baseline's figures with the run's own beside them, every cell ready to print.

    Attributes:
        title: The baseline's name.
        columns: One head for each cell of a row; the first stands over the labels.
        rows: The rows, label first.
        own: Index of the row that belongs to the run, or None when it has no figure in these columns.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    own: int | None


def baseline_table(summary: Mapping[str, Any]) -> BaselineTable | None:
    """Put the run's figures beside those of `summary["baseline"]`; None when there is no baseline.

    A column whose head names a figure of the run (`outer_loss`, `metrics.test_loss`, `test loss`, `wall_seconds`...)
    is filled from `summary["final"]` or `summary`; the run's row is left out when no column is. `columns` may
    leave out the head of the label column.

    Example:
        >>> summary = {"name": "digits", "final": {"metrics.test_loss": 0.25}, "baseline":
        ...            {"name": "grid", "columns": ["test loss"], "rows": [["best of 100", 0.5]]}}
        >>> baseline_table(summary).rows
        (('best of 100', '0.5000'), ('digits (this run)', '0.2500'))
    """
    baseline = summary.get("baseline")
    if not isinstance(baseline, Mapping) or not baseline.get("rows"):
        return None
    rows = [list(row) for row in baseline["rows"]]
    width = max(len(row) for row in rows)
    columns = [str(column) for column in baseline.get("columns") or ()]
    columns = (["", *columns] if len(columns) < width else columns)[:width]
    columns += [""] * (width - len(columns))
    cells = [_figure(summary, column) for column in columns[1:]]
    own = None
    if any(cell is not None for cell in cells):
        own = len(rows)
        rows.append([f"{summary.get('name') or 'bilevel'} (this run)", *cells])
    table = tuple(tuple(number(cell) for cell in row + [None] * (width - len(row))) for row in rows)
    return BaselineTable(str(baseline.get("name") or "baseline"), tuple(columns), table, own)


def _figure(summary: Mapping[str, Any], column: str) -> Any:
    """The run's figure that the head `column` names, or None."""
    final = summary.get("final") or {}
    word = column.strip().lower().replace(" ", "_")
    keys: Sequence[str] = (column, word, f"metrics.{word}", f"receipt.{word}")
    found = (source.get(key) for source in (final, summary) for key in keys)
    return next((value for value in found if isinstance(value, int | float | str)), None)
