"""`report DIR`: the report of a run, or the leaderboard of a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bilevel.errors import UsageError

_USAGE = """\
usage: python -m bilevel report DIR

Writes DIR/report.html and its figures from what a run recorded (DIR/metrics.jsonl, DIR/summary.json); for the folder
of a sweep, a leaderboard of its runs. A run writes its own report when it ends."""


def main(words: Sequence[str]) -> int:
    """Runs `report`.

    Args:
        words: what follows `report` on the command line.

    Returns:
        The exit status; see `bilevel.cli.main`.

    Raises:
        UsageError: DIR is missing, or is neither a run's folder nor a sweep's.
    """
    if any(word in ("-h", "--help") for word in words):
        print(_USAGE)
        return 0
    if len(words) != 1 or words[0].startswith("-"):
        raise UsageError("report takes one folder: python -m bilevel report DIR.")
    directory = Path(words[0]).expanduser()
    if not directory.is_dir():
        raise UsageError(f"report takes the folder of a run or a sweep, and there is no folder '{words[0]}'.")
    from bilevel.report import report

    print(f"report: {report(directory)}")
    return 0
