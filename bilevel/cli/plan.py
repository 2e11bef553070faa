"""`plan`: predicts time and memory of each method on a configured problem and recommends one under a budget."""

from __future__ import annotations

import contextlib
import io
import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bilevel.cli.arguments import read_arguments
from bilevel.cli.suggest import hint
from bilevel.errors import UsageError

_USAGE = """\
usage: python -m bilevel plan [--config-dir DIR] [group=option] [key=value] ...

Predicts what a run would take, and what it would take with every other hypergradient method. Takes what `train` takes,
for instance experiment=digits. The budget is plan.seconds (of the whole run) and plan.memory_gb (of the process at its
peak). The first plan.pilot_steps outer steps and some later ones are made for real; these and each other measured part
may take plan.allowance seconds. Prints a table and a recommendation, writes plan.json into a folder under
output_dir/plans, and exits with 0."""

_KEYS = ("seconds", "memory_gb", "pilot_steps", "allowance")


def main(words: Sequence[str]) -> int:
    """Runs `plan`.

    Args:
        words: what follows `plan` on the command line.

    Returns:
        0, also where nothing fits the budget.

    Raises:
        UsageError: a mistake in the command line or in a configuration.
    """
    arguments = read_arguments(words)
    if arguments.help:
        print(_USAGE)
        return 0
    if arguments.multirun or arguments.show:
        raise UsageError("plan looks at one configuration: leave the flags of sweeps and of Hydra out.")
    from bilevel.cli.preflight import preflight

    config = preflight(arguments)[0]
    if config.get("resume") is not None:
        raise UsageError("plan starts from a configuration: leave resume out and give the experiment.")
    options = dict(config.get("plan") or {})
    for key in options:
        if key not in _KEYS:
            raise UsageError(f"there is no key 'plan.{key}'{hint(key, _KEYS, 'the keys of plan are')}")
    return _plan(config, options)


def _plan(config: dict[str, Any], options: dict[str, Any]) -> int:
    from bilevel.cli.directories import new_run_directory
    from bilevel.cli.job import assemble
    from bilevel.cli.settings import Settings
    from bilevel.diagnostics import Budget, plan
    from bilevel.jsonable import encode

    settings = Settings.of(config)
    budget = Budget(seconds=options.pop("seconds", None), memory_gb=options.pop("memory_gb", None))
    # Callbacks of the user's own may do anything; trackers write into the folder that is thrown away, and send nothing.
    parts = assemble({**config, "callbacks": {}, "tracking": _offline(config.get("tracking") or {})}, *settings.apply())
    with tempfile.TemporaryDirectory() as scratch:
        found = plan(
            parts.problem,
            **parts.keywords,
            budget=budget,
            callbacks=[_Muted(tracker) for tracker in parts.trackers],
            directory=Path(scratch),
            **options,
        )
    print(table(found, f"plan of {settings.name}: {found.pilot.num_steps} outer steps"))
    folder = new_run_directory(Path(settings.output_dir) / "plans", settings.name).path
    content = encode({"name": settings.name, **found.as_json(), "config": config})
    (folder / "plan.json").write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    print(f"plan: {folder / 'plan.json'}")
    return 0


def table(found: Any, title: str) -> str:
    """The plan for a terminal or a log file."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(title=Text(title), title_style="bold", title_justify="left", header_style="bold", show_lines=False)
    for head in ("", "method", "s / hypergradient", "s / run", "peak memory", "of it its own", "number", "work"):
        drawn.add_column(head, overflow="fold", justify="right" if head.startswith(("s /", "peak", "of")) else "left")
    for row in found.rows:
        mark = Text("->", "green") if row is found.chosen else Text("-" if row.unusable else "")
        own = f"{row.own_bytes / 1e6:.3g} MB" if math.isfinite(row.own_bytes) else "-"
        memory = f"{row.memory_bytes / 1e9:.3g} GB" if math.isfinite(row.memory_bytes) else "-"
        figures = [_figure(row.seconds), _figure(row.run_seconds), memory, own]
        drawn.add_row(mark, *(Text(cell) for cell in (row.name, *figures, row.worth, row.counts)))
    out = io.StringIO()
    console = Console(file=out, width=118)
    console.print(drawn)
    for row in found.rows:
        why = row.unusable or row.flaw
        if why:
            console.print(Text(f"{row.name}: {'not here: ' if row.unusable else ''}{why}."), highlight=False)
    for sentence in found.basis:
        console.print(Text(sentence), highlight=False)
    console.print(Text(f"recommended: {found.sentence}", "bold"), highlight=False)
    if found.chosen is not None and found.chosen.keys:
        console.print(Text(f"  write {found.chosen.keys}"), highlight=False)
    return out.getvalue().rstrip()


def _figure(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "-"


def _offline(nodes: Mapping[str, Any]) -> dict[str, Any]:
    """The trackers, but nothing of a rehearsal leaves the machine."""
    return {
        name: {**node, "mode": "offline"} if isinstance(node, Mapping) and node.get("mode") == "online" else node
        for name, node in nodes.items()
    }


class _Muted:
    """A tracker that is not heard: it would report a rehearsal as if it were a run."""

    def __init__(self, tracker: Any) -> None:
        """Take the tracker."""
        self.tracker = tracker

    def on_start(self, run: Any) -> None:
        """Start it."""
        with _silence():
            self.tracker.on_start(run)

    def on_step(self, record: dict[str, Any], hparams: dict[str, Any]) -> None:
        """Feed it."""
        with _silence():
            self.tracker.on_step(record, hparams)

    def on_end(self, summary: dict[str, Any]) -> None:
        """End it."""
        with _silence():
            self.tracker.on_end(summary)


@contextmanager
def _silence() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
