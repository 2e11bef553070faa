"""Runs that are kept in a file from one command to the next, and the question whether they are still the present code's."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Iterable, Sequence
from hashlib import sha256
from pathlib import Path

import torch
from omegaconf import OmegaConf

from benchmarks.common import Row
from bilevel.errors import UsageError

ROOT = Path(__file__).parent.parent
NO_PART = ("diagnostics", "report")  # of the library, in a run: certificates, plans and pictures


class Kept:
    """Rows in a file, a line each, after a line that says which code and keys they are of.

    Rows of other code are accepted where that code gives the same: some are made again, and have to come out alike to the
    last digit. Then the file counts as the present code's.

    Args:
        file: where; it is made if there is none.
        sources: files of the benchmark itself that its runs depend on.
        keys: changes of the experiment, as on its command line.
        remake: the rows of the file that are to be made again, made again; asked for where the code is another one.

    Attributes:
        rows: what the file held.

    Raises:
        UsageError: the file holds no runs, or those of other keys, or of code that gives others.
    """

    def __init__(
        self,
        file: Path,
        sources: Sequence[Path],
        keys: Sequence[str],
        remake: Callable[[list[Row]], Iterable[tuple[Row, Row]]],
    ) -> None:
        """Take what the file holds."""
        self.file, self.rows = file, []
        head = {"code": fingerprint(sources), "keys": list(keys)}
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(head) + "\n")
            return
        text = file.read_text()
        whole = text[: text.rfind("\n") + 1]  # without a line that was cut short while it was written
        first, *lines = whole.splitlines() or ["{}"]
        found = json.loads(first)
        if found.get("keys") != head["keys"]:
            raise UsageError(f"{file} holds no runs, or runs of other keys: give the name of a new file.")
        self.rows = [json.loads(line) for line in lines]
        if found["code"] != head["code"]:
            for old, new in remake(self.rows):
                if old != new:
                    raise UsageError(
                        f"{file} holds runs of other code or another machine, which come out differently now: {old} was "
                        f"expected, and {new} came. Give the name of a new file."
                    )
        if whole != text or found != head:
            fresh = file.with_suffix(".new")
            fresh.write_text("\n".join([json.dumps(head), *lines]) + "\n")
            fresh.replace(file)

    def add(self, row: Row) -> None:
        """Keep a row."""
        self.rows.append(row)
        with self.file.open("a") as lines:
            lines.write(json.dumps(row) + "\n")


def fingerprint(sources: Sequence[Path]) -> str:
    """Of everything that a run depends on: the library, the configuration, these files and torch's version."""
    library = (path for path in ROOT.glob("bilevel/**/*.py") if path.relative_to(ROOT).parts[1] not in NO_PART)
    parts = [torch.__version__, *(meaning(path.read_text()) for path in sorted([*library, *sources]))]
    parts += [settings(path.read_text()) for path in sorted(ROOT.glob("conf/**/*.yaml"))]
    return sha256("\0".join(parts).encode()).hexdigest()


def settings(text: str) -> str:
    r"""What a configuration file sets: its package and its keys, without its other comments.

    Example:
        >>> settings("# @package _global_\na: 1  # a comment") == settings("# @package _global_\n# another\na: 1")
        True
        >>> settings("a: 1") == settings("a: 2")
        False
    """
    packages = [line for line in text.splitlines() if line.startswith("# @package")]
    return "\n".join([*packages, repr(OmegaConf.to_container(OmegaConf.create(text)))])


def meaning(source: str) -> str:
    r"""The syntax tree of a module without docstrings: what is left when comments and documentation are not counted.

    Example:
        >>> meaning("def f():\n    'A docstring.'\n    return 1") == meaning("def f(): return 1  # a comment")
        True
        >>> meaning("def f(): return 1") == meaning("def f(): return 2")
        False
    """
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            del node.body[0]
    return ast.dump(tree)
