"""Objects made of other objects: a text, a class or anything else in the place of a part is refused by one sentence."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, get_args, get_type_hints

from bilevel.errors import UsageError

_PLAIN = (int, float, str, tuple, list, dict, type(None))  # their owners look at these themselves


def check_parts(owner: Any) -> None:
    """Check the fields of a dataclass that are annotated with classes of this library, or with bool.

    Args:
        owner: an object of the dataclass; called from its `__post_init__`.

    Raises:
        UsageError: one holds something else.

    Example:
        >>> from bilevel.hypergradient import Implicit
        >>> Implicit(compile="no")
        Traceback (most recent call last):
        bilevel.errors.UsageError: Implicit needs compile to be true or false, but got 'no'.
    """
    try:
        hints = get_type_hints(type(owner))
    except NameError:  # a user's class whose annotations are for type checkers only
        return
    for field in fields(owner):
        value, kinds = getattr(owner, field.name), get_args(hints[field.name]) or (hints[field.name],)
        kinds = tuple(kind for kind in kinds if isinstance(kind, type))
        own = [kind for kind in kinds if kind not in _PLAIN]
        if not own or isinstance(value, kinds):
            continue
        name = f"{type(owner).__name__} needs {field.name} to be"
        if own == [bool]:
            raise UsageError(f"{name} true or false, but got {value!r}.")
        what = " or ".join(kind.__name__ for kind in own)
        article = "an" if what[0] in "AEIOU" else "a"
        if isinstance(value, type):
            raise UsageError(f"{name} {article} {what}, but got the class {value.__name__}: write {value.__name__}().")
        raise UsageError(
            f"{name} {article} {what}, but got {value!r}: give an object; on the command line a group makes it, as "
            "linear_solver=cg does."
        )
