"""What a person sees of a run: a live bar in a terminal, a handful of aligned lines in a log file."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from bilevel.errors import UsageError
from bilevel.tracking.format import MISSING, BaselineTable, baseline_table, duration, number
from bilevel.tracking.guard import GuardedTracker
from bilevel.tracking.troubles import Troubles

if TYPE_CHECKING:
    from torch import Tensor

    from bilevel.trainer.callbacks import RunStart

__all__ = ["ConsoleTracker"]


Record = Mapping[str, Any]


def _known(value: Any, digits: int = 2) -> str:
    """A number where there is one: figures that a method or a first step does not have are dashes, not NaN."""
    return number(None if isinstance(value, float) and value != value else value, digits)


def _error(record: Record) -> str:
    """The estimate, with a star where nothing certifies it."""
    return _known(record.get("hypergradient_error")) + ("*" if _is_uncertified(record) else " ")


# head, width, the figure of a record
_COLUMNS: tuple[tuple[str, int, Callable[[Record], str]], ...] = (
    ("outer loss", 11, lambda record: number(record.get("outer_loss"))),
    ("inner loss", 11, lambda record: number(record.get("inner_loss"))),
    ("hypergradient", 13, lambda record: number(record.get("hypergradient_norm"), 3)),
    ("error ", 9, _error),
    ("cosine", 6, lambda record: _known(record.get("hypergradient_cosine"))),
    ("products", 8, lambda record: number(record.get("receipt.products"))),
    ("step time", 9, lambda record: duration(record.get("seconds"))),
    ("ETA", 8, lambda record: duration(record.get("eta_seconds"))),
)
_FOOTNOTE = "* the error estimate is not certified: no lower bound of the curvature was declared"


class ConsoleTracker(GuardedTracker):
    """Show progress: a rich bar on stderr when that is a terminal, else plain lines on stdout.

    The bar or line of a step is followed by a line of what its hypergradient rests on: stationarity, linear residual and
    curvature, as far as its method has them.

    A solve that did not succeed is told with the step at which it happened first. At the end stdout says how often that
    was and how the run went, and shows the summary's baseline, where there is one, as a table with the run's own
    figures in its last row.

    Args:
        num_lines: About how many steps a run prints when there is no terminal, at least 2.

    Raises:
        UsageError: `num_lines` is less than 2.
    """

    name = "the console"

    def __init__(self, num_lines: int = 20) -> None:
        """Check the options."""
        if num_lines < 2:
            raise UsageError(f"Expected num_lines >= 2 (the first and the last step), got {num_lines}; try 20.")
        self.num_lines = num_lines
        self._progress: _Bar | None = None
        self._task = TaskID(0)
        self._num_steps = 0
        self._unprinted: Mapping[str, Any] | None = None
        self._has_header = self._has_footnote = False
        self._troubles = Troubles()

    def start(self, run: RunStart) -> None:
        """Open the bar, or note where the lines begin."""
        self._num_steps, self._unprinted = run.num_steps, None
        self._has_header = self._has_footnote = False
        self._troubles = Troubles()
        if sys.stderr.isatty():
            self._progress = _Bar.on_stderr()
            title = str(run.config.get("name") or "bilevel")
            self._task = self._progress.add_task(title, total=run.num_steps, completed=run.step, figures="")
            self._progress.start()

    def step(self, record: Mapping[str, Any], hparams: Mapping[str, Tensor]) -> None:
        """Move the bar or print a line."""
        step = int(record["step"])
        self._num_steps = record.get("num_steps") or self._num_steps
        if self._progress is not None:
            self._progress.below = ", ".join(_words(record))
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
            print(f"{'step':>{width}}  " + "  ".join(f"{head:>{wide}}" for head, wide, _ in _COLUMNS))
            self._has_header = True
        cells = "  ".join(f"{show(record):>{wide}}" for _, wide, show in _COLUMNS)
        print(f"{record['step']:>{width}}  {cells}{_remarks(record)}", flush=True)
        beneath = "".join(f"  {name} {figure:<8}" for name, figure in _grounds(record))
        if beneath:
            print(f"{'':{width}}{beneath}".rstrip(), flush=True)
        if _is_uncertified(record) and not self._has_footnote:
            print(_FOOTNOTE, flush=True)
            self._has_footnote = True
        self._unprinted = None


class _Bar(Progress):
    """A bar with a line of the whole width below it."""

    below = ""

    @classmethod
    def on_stderr(cls) -> _Bar:
        """Made for a terminal."""
        return cls(
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}", markup=False),
            console=Console(stderr=True),
            refresh_per_second=4,
            redirect_stdout=sys.stdout.isatty(),  # a piped stdout must not end up in the bar's terminal
        )

    def get_renderables(self) -> Iterable[RenderableType]:
        """The bar, then the line."""
        yield from super().get_renderables()
        if self.below:
            yield Text(self.below)


def _figures(record: Record) -> str:
    return (
        f"ETA {duration(record.get('eta_seconds'))}  outer loss {number(record.get('outer_loss'))}"
        f"  hypergradient {number(record.get('hypergradient_norm'), 3)}"
        f"  products {number(record.get('receipt.products'))}{_remarks(record)}"
    )


def _is_uncertified(record: Record) -> bool:
    """Whether there is an estimate and no declared bound stands behind it."""
    return record.get("receipt.error_certified") is False and _known(record.get("hypergradient_error")) != MISSING


def _grounds(record: Record) -> list[tuple[str, str]]:
    """What the hypergradient rests on, by name; what its method does not have is left out."""
    keys = (("stationarity", "receipt.stationarity"), ("linear residual", "receipt.linear_residual"))
    found = [(name, _known(record.get(key))) for name, key in keys]
    least, most = (_known(record.get(f"receipt.curvature_{end}")) for end in ("min", "max"))
    found.append(("curvature", MISSING if least == most == MISSING else f"{least} to {most}"))
    return [(name, figure) for name, figure in found if figure != MISSING]


def _words(record: Record) -> list[str]:
    """All that says what the hypergradient is worth and that the bar does not show."""
    error, cosine = _known(record.get("hypergradient_error")), _known(record.get("hypergradient_cosine"))
    found = [("error", f"{error} (not certified)" if _is_uncertified(record) else error), ("cosine", cosine)]
    return [f"{name} {figure}" for name, figure in (*found, *_grounds(record)) if figure != MISSING]


def _remarks(record: Record) -> str:
    marks = (("skipped", "skipped"), ("shrunk", "shrunk"), ("biased", "receipt.biased"))
    words = [word for word, key in marks if record.get(key)]
    return f"  ({', '.join(words)})" if words else ""


def _verdict(summary: Mapping[str, Any]) -> str:
    best = summary.get("best") or {}
    final = summary.get("final") or {}
    steps = final["step"] + 1 if isinstance(final.get("step"), int) else summary.get("num_steps")
    place = f" at step {best['step']}" if isinstance(best.get("step"), int) else ""
    reason = str(summary.get("stopped_because") or "").rstrip(". ")
    which = "best" if summary.get("comparable", True) else "latest"
    loss, monitor = f"outer loss {number(best.get('outer_loss'), 6)}", summary.get("monitor")
    if monitor:
        figure = best.get(f"metrics.{monitor}")
        loss = f"{monitor} {number(figure, 6)} ({loss})"
    return (
        f"{which} {loss}{place}, after {number(steps)} steps in "
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
