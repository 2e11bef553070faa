"""Exceptions and warnings that commands turn into one sentence: the user's mistakes, and numbers not to be trusted."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
    """A mistake in what the user asked for; the message says what was expected, what came and what to try."""


class NumericalError(RuntimeError):
    """A number that must not be used, refused because a policy or the caller asked for that; the message says what to try."""


class ConvergenceWarning(UserWarning):
    """A result of an iteration that did not reach its tolerance; trackers and receipts tell the same."""


def nearest(word: str, names: Iterable[str], otherwise: str) -> str:
    """The end of a sentence about a name that is none of the valid ones: the nearest of them, or what else to do.

    Args:
        word: the name that came.
        names: the valid ones.
        otherwise: the end of the sentence when none of them is near.

    Example:
        >>> nearest("sharde", ["shared", "per_weight"], "choose one.")
        "did you mean 'shared'?"
        >>> nearest("zebra", ["shared", "per_weight"], "choose one.")
        'choose one.'
    """
    close = difflib.get_close_matches(word, list(names), n=1)
    return f"did you mean '{close[0]}'?" if close else otherwise
