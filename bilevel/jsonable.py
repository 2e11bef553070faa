"""Plain data (dicts, lists, numbers, text): written as strict JSON, read back, and laid flat. No torch, no NumPy."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["decode", "encode", "flatten"]

# JSON has no word for these; JavaScript's Number() and Python's float() both read the strings.
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def encode(value: Any) -> Any:
    """The same data with non-finite floats replaced by their names at any depth, for `json.dumps(allow_nan=False)`.

    Example:
        >>> encode({"loss": float("inf"), "betas": (0.9, float("nan"))})
        {'loss': 'Infinity', 'betas': [0.9, 'NaN']}
    """
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {str(key): encode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [encode(item) for item in value]
    return value


def decode(value: Any) -> Any:
    """Undo `encode`: the names of non-finite floats become floats again, at any depth.

    Example:
        >>> decode({"loss": "Infinity", "betas": [0.9, "NaN"], "name": "digits"})
        {'loss': inf, 'betas': [0.9, nan], 'name': 'digits'}
    """
    if isinstance(value, dict):
        return {key: decode(item) for key, item in value.items()}
    if isinstance(value, list):
        return [decode(item) for item in value]
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested dicts with dotted keys; lists and empty dicts are leaves.

    Example:
        >>> dict(flatten({"a": {"b": [1, 2]}, "c": {}}))
        {'a.b': [1, 2], 'c': {}}
    """
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
