"""What a person sees of a run: a live bar in a terminal, a handful of aligned lines in a log file."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from bilevel.errors import UsageError
from bilevel.tracking.format import BaselineTable, baseline_table, duration, number
from bilevel.tracking.guard import GuardedTracker
from bilevel.tracking.troubles import Troubles

if TYPE_CHECKING:
    from torch import Tensor

    from bilevel.trainer.callbacks import RunStart

__all__ = ["ConsoleTracker"]


def _known(value: Any, digits: int) -> str:
    """A number where there is one: figures that a method or a first step does not have are dashes, not NaN."""
    return number(None if isinstance(value, float) and value != value else value, digits)


# head, key in the record, width, format
_COLUMNS = (
    ("outer loss", "outer_loss", 11, number),
    ("inner loss", "inner_loss", 11, number),
    ("hypergradient", "hypergradient_norm", 13, lambda value: number(value, 3)),
    (
        "error",
        "hypergradient_error",
        8,
        lambda value: number(value, 2) if isinstance(value, float) and value == value else "-",
    ),
    (
        "cosine",
        "hypergradient_cosine",
        7,
        lambda value: number(value, 2) if isinstance(value, float) and value == value else "-",
    ),
    ("products", "receipt.products", 8, number),
    ("step time", "seconds", 9, duration),
    ("ETA", "eta_seconds", 8, duration),
)


class ConsoleTracker(GuardedTracker):
    """Show progress: a rich bar on stderr when that is a terminal, else plain lines on stdout.

    A solve that did not succeed is told with the step at which it happened first. At the end stdout says how often that
    was and how the run went, and shows the summary's baseline, where there is one, as a table with the run's own
    figures in its last row.

    Args:
        num_lines: About how many lines a run prints when there is no terminal, at least 2.

    Raises:
        UsageError: `num_lines` is less than 2.
    """

    name = "the console"

    def __init__(self, num_lines: int = 20) -> None:
        """Check the options."""
        if num_lines < 2:
            raise UsageError(f"Expected num_lines >= 2 (the first and the last step), got {num_lines}; try 20.")
        self.num_lines = num_lines
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._num_steps = 0
        self._unprinted: Mapping[str, Any] | None = None
        self._has_header = False
        self._troubles = Troubles()

    def start(self, run: RunStart) -> None:
        """Open the bar, or note where the lines begin."""
        self._num_steps, self._has_header, self._unprinted = run.num_steps, False, None
        self._troubles = Troubles()
        if sys.stderr.isatty():
            self._progress = _progress_bar()
            title = str(run.config.get("name") or "bilevel")
            self._task = self._progress.add_task(title, total=run.num_steps, completed=run.step, figures="")
            self._progress.start()

    def step(self, record: Mapping[str, Any], hparams: Mapping[str, Tensor]) -> None:
        """Move the bar or print a line."""
        step = int(record["step"])
        self._num_steps = record.get("num_steps") or self._num_steps
        if self._progress is not None:
            self._progress.update(self._task, completed=step + 1, total=self._num_steps, figures=_figures(record))
        if self._progress is None or not sys.stdout.isatty():
            if self._is_due(step):
                self._print_line(record)
            else:
                self._unprinted = record
        for sentence in self._troubles.news(record):
            print(sentence, flush=True)

    def end(self, summary: Mapping[str, Any]) -> None:
        """Close the bar, print the verdict and the baseline."""
        self._close_bar()
        if self._unprinted is not None:
            self._print_line(self._unprinted)
        for line in (*self._troubles.totals(), _verdict(summary)):
            print(line, flush=True)
        table = baseline_table(summary)
        if table is not None:
            _print_table(table)

    def abandon(self) -> None:
        """Give the terminal back."""
        self._close_bar()

    def _close_bar(self) -> None:
        progress, self._progress = self._progress, None
        if progress is not None:
            progress.stop()

    def _is_due(self, step: int) -> bool:
        """The first line of this process, the last step, and each time another share of the run is done."""
        share = max(1, -(-self._num_steps // (self.num_lines - 1)))
        return not self._has_header or (step + 1) % share == 0 or step + 1 == self._num_steps

    def _print_line(self, record: Mapping[str, Any]) -> None:
        width = max(4, len(str(self._num_steps)))
        if not self._has_header:
            print(f"{'step':>{width}}  " + "  ".join(f"{head:>{wide}}" for head, _, wide, _ in _COLUMNS))
            self._has_header = True
        cells = "  ".join(f"{show(record.get(key)):>{wide}}" for _, key, wide, show in _COLUMNS)
        print(f"{record['step']:>{width}}  {cells}{_remarks(record)}", flush=True)
        self._unprinted = None


def _progress_bar() -> Progress:
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}", style="bold", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}", markup=False),
        console=console,
        refresh_per_second=4,
        redirect_stdout=sys.stdout.isatty(),  # a piped stdout must not end up in the bar's terminal
    )


def _figures(record: Mapping[str, Any]) -> str:
    return (
        f"ETA {duration(record.get('eta_seconds'))}  outer loss {number(record.get('outer_loss'))}"
        f"  hypergradient {number(record.get('hypergradient_norm'), 3)}"
        f"  products {number(record.get('receipt.products'))}{_remarks(record)}"
    )


def _remarks(record: Mapping[str, Any]) -> str:
    marks = (("skipped", "skipped"), ("shrunk", "shrunk"), ("biased", "receipt.biased"))
    words = [word for word, key in marks if record.get(key)]
    return f"  ({', '.join(words)})" if words else ""


def _verdict(summary: Mapping[str, Any]) -> str:
    best = summary.get("best") or {}
    final = summary.get("final") or {}
    steps = final["step"] + 1 if isinstance(final.get("step"), int) else summary.get("num_steps")
    place = f" at step {best['step']}" if isinstance(best.get("step"), int) else ""
    reason = str(summary.get("stopped_because") or "").rstrip(". ")
    return (
        f"best outer loss {number(best.get('outer_loss'), 6)}{place}, after {number(steps)} steps in "
        f"{duration(summary.get('wall_seconds'))}{f'; stopped: {reason}' if reason else ''}"
    )


def _print_table(table: BaselineTable) -> None:
    drawn = Table(title=Text(table.title), title_style="bold", title_justify="left", header_style="bold")
    for index, column in enumerate(table.columns):
        drawn.add_column(Text(column), justify="right" if index else "left", overflow="fold")
    for index, row in enumerate(table.rows):
        drawn.add_row(*(Text(cell) for cell in row), style="bold" if index == table.own else None)
    console = Console(file=sys.stdout)
    if not console.is_terminal:
        console.width = max(console.width, 120)  # in a file nothing forces 80 columns upon a wide table
    console.print(drawn)
