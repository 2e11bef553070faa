"""The one exception that means "the caller can mend this": commands turn it into a sentence and exit status 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
    """A mistake in what the user asked for; the message says what was expected, what came and what to try."""


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
