"""Does a value fit the default that it replaces? The types in conf/ are the schema, so torch need not be imported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

# Options of inner solvers that hold a number or name a hyperparameter; the last part of their keys.
NAMING = frozenset(
    {"learning_rate", "momentum", "weight_decay", "beta1", "beta2", "epsilon", "strength", "low", "high"}
)


def may_name(key: str, value: Any) -> bool:
    """Whether a text in the place of a number can be the name of a hyperparameter.

    Example:
        >>> may_name("solver.learning_rate", "rate"), may_name("solver.atol", "rate")
        (True, False)
    """
    path = key.split(".")
    return (
        isinstance(value, str) and path[0] in ("solver", "proximal") and path[-1] in NAMING and "optimizer" not in path
    )  # torch's own


def expected(default: Any, value: Any) -> str | None:
    """What was expected instead of `value`, or None when it fits the default.

    A float takes an integer too; a text takes keys, since a choice by name may be spelt out; a null default takes
    anything; null and interpolations fit everywhere (whether a class takes None is judged when it is built, by its
    signature).

    Example:
        >>> expected(100, "abc")
        'an integer'
        >>> expected(0.1, 3) is None
        True
    """
    if default is None or value is None or default == "???" or _is_interpolation(default) or _is_interpolation(value):
        return None
    for kind, fits, name in _KINDS:
        if isinstance(default, kind):  # bool stands before int, whose subclass it is
            wrong = not isinstance(value, fits) or (isinstance(value, bool) and kind is not bool)
            return name if wrong else None
    return None


_KINDS: tuple[tuple[type, type | tuple[type, ...], str], ...] = (
    (bool, bool, "true or false"),
    (int, int, "an integer"),
    (float, (int, float), "a number"),
    (str, (str, dict), "a text"),
    (list, list, "a list such as [1,2]"),
    (dict, dict, "keys such as {key: value}"),
)


def _is_interpolation(value: Any) -> bool:
    return isinstance(value, str) and "${" in value


def dotted(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of a tree of dicts, dotted, with its value: branches as well as leaves.

    Example:
        >>> list(dotted({"a": {"b": 1}}))
        [('a', {'b': 1}), ('a.b', 1)]
    """
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield f"{prefix}{key}", value
            yield from dotted(value, f"{prefix}{key}.")


def find(tree: Any, key: str) -> Any:
    """The value under a dotted key.

    Raises:
        KeyError: there is none.
    """
    for part in key.split("."):
        if isinstance(tree, Mapping) and part in tree:
            tree = tree[part]
        elif isinstance(tree, list) and part.isdigit() and int(part) < len(tree):
            tree = tree[int(part)]
        else:
            raise KeyError(key)
    return tree
