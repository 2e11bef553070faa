"""Picks the command, and turns what went wrong into a sentence and an exit status.

Exit statuses: 0 done, 1 a failure that is not the user's (with its traceback) or a run without a result (one sentence),
2 a mistake the user can mend (one sentence, no traceback), 130 interrupted or terminated. `HYDRA_FULL_ERROR=1` in the
environment shows every traceback.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

from bilevel.cli.suggest import hint
from bilevel.errors import NumericalError, UsageError


@dataclass(frozen=True)
class Command:
    """One command: the module whose `main(arguments) -> exit status` runs it, and its line in the help."""

    module: str
    summary: str


COMMANDS: dict[str, Command] = {
    "train": Command("bilevel.cli.train", "run the outer loop on a problem, or sweep over many runs with -m"),
    "check": Command("bilevel.cli.check", "certify the hypergradient of a problem: exit status 0 or 1"),
    "plan": Command("bilevel.cli.plan", "predict time and memory of each method for a problem, and pick one"),
    "report": Command("bilevel.cli.report", "write report.html for a run, or a leaderboard for a sweep"),
}


class Fruitless(Exception):
    """A run that ended without a result; the sentence says why."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C with a sentence that says what is left and how to go on."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status.

    Args:
        arguments: what follows the program's name; `sys.argv[1:]` when left out.

    Returns:
        0, 1, 2 or 130 as the module docstring says. Failures that are not the user's are raised: Python prints
        their traceback and exits with 1.
    """
    full_errors = os.environ.get("HYDRA_FULL_ERROR") == "1"  # read now: the train command sets it for Hydra
    try:
        return _dispatch(list(sys.argv[1:] if arguments is None else arguments))
    except UsageError as mistake:
        if full_errors:
            raise
        say(str(mistake))
        return 2
    except (Fruitless, NumericalError) as failure:
        if full_errors:
            raise
        say(str(failure))
        return 1
    except KeyboardInterrupt as stop:
        if full_errors:
            raise
        say(str(stop) or "interrupted before a run began, so nothing was written.")
        return 130


def say(message: str) -> None:
    """Prints a message on stderr as one line, whatever line breaks it came with."""
    sys.stdout.flush()
    print(f"bilevel: {' '.join(message.split())}", file=sys.stderr, flush=True)


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        from bilevel.cli.help import overview

        print(overview(COMMANDS))
        return 0
    name, rest = arguments[0], arguments[1:]
    if name in ("-V", "--version"):
        from bilevel.cli.help import version

        print(f"bilevel {version()}")
        return 0
    if name in ("-sc", "--shell-completion"):  # shells ask the program itself, without a command
        name, rest = "train", arguments
    if name not in COMMANDS:
        if "=" in name:
            raise UsageError(f"expected a command before '{name}': write 'train {name}'.")
        raise UsageError(f"there is no command '{name}'{hint(name, COMMANDS, 'the commands are')}")
    status: int = import_module(COMMANDS[name].module).main(rest)
    return status
