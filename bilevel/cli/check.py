"""`check`: certifies the hypergradient of a configured problem; a table, a JSON file, a picture and an exit status."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bilevel.cli.arguments import read_arguments
from bilevel.errors import UsageError

_USAGE = """\
usage: python -m bilevel check [--config-dir DIR] [group=option] [key=value] ...

Certifies the hypergradient of a problem before anybody relies on it: at the problem's own solution, in float64, and at
the tolerances that the solvers were given (where a run adapts them, its first steps are shown besides). Takes what `train`
takes, for instance experiment=digits. Prints a table of checks with what to do about each finding, writes
certificate.json and certificate.png into a folder under output_dir/checks, and exits with 0 (sound, or approximate as
the experiment's key check.declared says) or 1 (a finding that is not declared, or a declared one that is absent)."""


def main(words: Sequence[str]) -> int:
    """Runs `check`.

    Args:
        words: what follows `check` on the command line.

    Returns:
        0 when the certificate is sound or as declared, else 1.

    Raises:
        UsageError: a mistake in the command line or in a configuration.
    """
    arguments = read_arguments(words)
    if arguments.help:
        print(_USAGE)
        return 0
    if arguments.multirun or arguments.show:
        raise UsageError("check looks at one configuration: leave the flags of sweeps and of Hydra out.")
    from bilevel.cli.preflight import preflight

    config = preflight(arguments)[0]
    if config.get("resume") is not None:
        raise UsageError("check starts from a configuration: leave resume out and give the experiment.")
    return _check(config)


def _check(config: dict[str, Any]) -> int:
    import torch

    from bilevel.cli.directories import new_run_directory
    from bilevel.cli.job import assemble
    from bilevel.cli.settings import Settings
    from bilevel.diagnostics import Verdict, check

    settings = Settings.of({**config, "dtype": "float64"})
    parts = assemble(config, *settings.apply())
    torch.set_default_dtype(torch.float64)
    options = config.get("check") or {}
    certificate = check(
        parts.problem,
        solver=parts.solver,
        hypergradient=parts.hypergradient,
        declared=options.get("declared") or {},
        tolerance=float(options.get("tolerance", 1e-2)),
        seed=settings.seed,
        seconds=options.get("seconds"),
    )
    print(table(certificate, f"hypergradient of {settings.name}"))
    folder = new_run_directory(Path(settings.output_dir) / "checks", settings.name).path
    content = {"name": settings.name, **certificate.as_json(), "config": config}
    (folder / "certificate.json").write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
    _paint(certificate.methods, folder)
    print(f"certificate: {folder / 'certificate.json'}")
    return 1 if certificate.verdict is Verdict.fault else 0


def table(certificate: Any, title: str) -> str:
    """The certificate for a terminal or a log file."""
    from io import StringIO

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(title=Text(title), title_style="bold", title_justify="left", header_style="bold", show_lines=False)
    for head in ("", "check", "figure", "expected"):
        drawn.add_column(head, overflow="fold")
    for row in certificate.rows:
        drawn.add_row(_mark(row, certificate.declared), Text(row.check), Text(row.figure), Text(row.limit))
    out = StringIO()
    console = Console(file=out, width=118)
    console.print(drawn)
    if certificate.methods:
        console.print(_methods(certificate.methods))
    for flaw, place in certificate.found.items():
        reason = certificate.declared.get(flaw.name)
        head = f"{flaw.name}: {place}"
        console.print(Text(head, "bold"), highlight=False)
        console.print(Text(f"  declared: {reason}" if reason else f"  what to do: {flaw.value}"), highlight=False)
    for name in certificate.absent:
        console.print(Text(f"{name}: declared in check.declared, but not found: take it out."), highlight=False)
    console.print(Text(certificate.sentence, "bold"), highlight=False)
    return out.getvalue().rstrip()


def _methods(methods: Mapping[str, Any]) -> Any:
    """A line for each option of `hypergradient=`: the least error that it comes to at the solution, and for how much."""
    from rich.table import Table

    from bilevel.diagnostics import best_point

    drawn = Table(title="all methods at the solution", title_style="bold", title_justify="left", header_style="bold")
    drawn.add_column("hypergradient=")
    for head in ("products", "relative error", "beside finite differences"):
        drawn.add_column(head, justify="right")
    for name, points in methods.items():
        best = best_point(points)
        drawn.add_row(name, f"{best.products:,}", f"{best.error:.2g}", f"{best.measured:.2g}")
    return drawn


def _mark(row: Any, declared: Mapping[str, str]) -> Any:
    """The first cell of a row."""
    from rich.text import Text

    if not row.judged:
        return Text("-", "dim")
    if row.passed:
        return Text("pass", "green")
    return Text("declared", "yellow") if all(flaw.name in declared for flaw, _ in row.flaws) else Text("FAIL", "red")


def _paint(methods: Mapping[str, Any], folder: Path) -> None:
    """The picture; a failure of it must not lose the certificate."""
    if not methods:
        return
    try:
        from bilevel.report.methods import paint_methods

        paint_methods(methods, folder / "certificate.png")
    except Exception as error:  # whatever matplotlib or a full disk may say
        from bilevel.cli.main import say

        say(f"no picture: {error}.")
