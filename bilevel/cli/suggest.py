"""The nearest valid name for a misspelt one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def near(word: str, candidates: Iterable[str], cutoff: float = 0.6) -> list[str]:
    """The candidates most like `word`, best first, at most three; empty when none is near.

    A dotted candidate is also compared by its last part, so that `num_stps` finds `trainer.num_steps`, and by the
    initials of that, so that `lr` finds `learning_rate`.

    Example:
        >>> near("trainer.num_stps", ["trainer.num_steps", "trainer.patience"])
        ['trainer.num_steps']
        >>> near("num_steps", ["seed", "solver.num_steps", "trainer.num_steps"])
        ['solver.num_steps', 'trainer.num_steps']
        >>> near("solver.lr", ["outer_optimizer.lr", "solver.atol", "solver.learning_rate"])
        ['solver.learning_rate']
        >>> near("zebra", ["seed", "trainer.num_steps"])
        []
    """
    names = list(candidates)
    exact = [name for name in names if name.rpartition(".")[2] == word]
    if not exact:
        group, _, short = word.rpartition(".")
        exact = [name for name in names if _initials(name) == short and name.rpartition(".")[0] == group]
    close = exact[:3] or difflib.get_close_matches(word, names, n=1, cutoff=cutoff)
    if close:
        return close
    # the last parts must agree better than whole names: every tree has several `name`s and `mode`s
    last = {name.rpartition(".")[2] for name in names}
    close = difflib.get_close_matches(word.rpartition(".")[2], last, n=1, cutoff=max(cutoff, 0.75))
    return [name for name in names if close and name.rpartition(".")[2] == close[0]][:3]


def _initials(name: str) -> str:
    """`lr` of `solver.learning_rate`; nothing for a single word."""
    parts = name.rpartition(".")[2].split("_")
    return "".join(part[:1] for part in parts) if len(parts) > 1 else ""


def hint(word: str, candidates: Iterable[str], otherwise: str) -> str:
    """The end of a sentence: the nearest candidate, or the valid ones when none is near.

    Example:
        >>> hint("trian", ["train", "report"], "the commands are")
        "; did you mean 'train'?"
        >>> hint("zebra", ["train", "report"], "the commands are")
        '; the commands are report, train.'
    """
    names = sorted(candidates)
    close = near(word, names)
    if close:
        return f"; did you mean {alternatives(close)}?"
    if not names:
        return "."
    shown = ", ".join(names[:16]) + (", ..." if len(names) > 16 else "")
    return f"; {otherwise} {shown}."


def alternatives(names: Iterable[str]) -> str:
    """Names for a sentence.

    Example:
        >>> alternatives(["a", "b"])
        "'a' or 'b'"
    """
    return " or ".join(f"'{name}'" for name in names)
