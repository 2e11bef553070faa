"""The one place that turns a node of the configuration into an object.

Node by node, never the root: Hydra turns dataclasses inside a root without `_target_` back into configurations. What a
node names is judged twice: its text before anything is imported (`allow`), and the object that was found, which must be
defined under an allowed prefix (`torch.optim.optimizer.torch.load` begins well and ends elsewhere).
"""

from __future__ import annotations

import inspect
import sys
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

from bilevel.cli.allow import allowed_prefixes, check_targets, is_allowed
from bilevel.cli.suggest import hint
from bilevel.errors import UsageError

_SPECIAL = ("_target_", "_partial_", "_args_", "_convert_", "_recursive_")


def build(node: Mapping[str, Any] | None, where: str) -> Any:
    """Makes the object that a node describes, with the objects of the nodes inside it.

    Args:
        node: a resolved node with a `_target_`; None gives None.
        where: its place in the configuration, for messages: `solver`.

    Returns:
        The object, or with `_partial_: true` a `functools.partial` of its class.

    Raises:
        UsageError: the node names something outside the allow-list or something that is not there, its keys are not
            the arguments of the class, or the class refuses a value.

    Example:
        >>> build({"_target_": "torch.optim.SGD", "_partial_": True, "lr": 0.1}, "outer_optimizer").keywords
        {'lr': 0.1}
    """
    if node is None:
        return None
    if not isinstance(node, Mapping) or "_target_" not in node:
        raise UsageError(f"{where} describes no object: it needs a _target_, the dotted name of a class.")
    check_targets(node, where)
    _check_calls(node, where)
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    try:
        return instantiate(dict(node), _convert_="all")
    except InstantiationException as error:
        cause = _cause(error, InstantiationException)
        if isinstance(cause, UsageError):
            raise cause from error
        if isinstance(cause, ValueError | InstantiationException):  # a ValueError is the user's mistake, by convention
            raise UsageError(f"{where} cannot be built: {' '.join(str(cause).split())}") from error
        raise cause from error


def find_target(name: str, where: str) -> Callable[..., Any]:
    """Imports what a `_target_` names.

    Args:
        name: a dotted name that `check_targets` has let pass.
        where: its place in the configuration, for messages.

    Raises:
        UsageError: there is no such thing, it cannot be called, or it is defined outside the allow-list.
    """
    # what instantiate itself uses, so that the object judged is the object called; its public name logs a line more
    from hydra._internal.utils import _locate
    from hydra.errors import InstantiationException

    prefixes = allowed_prefixes()
    assert is_allowed(name, prefixes), "check_targets comes first"
    try:
        found = _locate(name)
    except (ImportError, InstantiationException) as error:
        home, _, last = name.rpartition(".")
        if home in sys.modules:
            names = [one for one in vars(sys.modules[home]) if not one.startswith("_")]
            raise UsageError(
                f"{where} names {name}, but {home} has no '{last}'{hint(last, names, 'it has')}"
            ) from error
        raise UsageError(f"{where} names {name}, which cannot be imported: {_reason(error)}.") from error
    if not (inspect.isclass(found) or inspect.isroutine(found)):
        raise UsageError(f"{where} names {name}, which is neither a class nor a function.")
    home = getattr(found, "__module__", None) or ""
    if not is_allowed(home, prefixes):
        raise UsageError(f"{where} names {name}, which is defined in {home or 'no module'}, outside the allow-list.")
    return typing.cast(Callable[..., Any], found)


def _check_calls(node: Any, where: str) -> None:
    """Checks each node with a `_target_`, inside out or not, against the signature of what it names."""
    if isinstance(node, Mapping):
        if "_target_" in node:
            _check_call(find_target(node["_target_"], where), node, where)
        for key, value in node.items():
            _check_calls(value, f"{where}.{key}")
    elif isinstance(node, list | tuple):
        for number, value in enumerate(node):
            _check_calls(value, f"{where}.{number}")


def _check_call(target: Callable[..., Any], node: Mapping[str, Any], where: str) -> None:
    try:
        signature = inspect.signature(target)
    except ValueError:  # some builtins have none
        return
    name = node["_target_"]
    taken = signature.parameters
    open_ended = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in taken.values())
    hints = _hints(target)
    given = {key: value for key, value in node.items() if key not in _SPECIAL}
    unknown = [] if open_ended else [key for key in given if key not in taken]
    if unknown:
        # An experiment sets keys of the part that it chooses; another part may not have them.
        without = " ".join(f"~{where}.{key}" for key in unknown)
        raise UsageError(
            f"{where}: {name} takes no argument '{unknown[0]}'{hint(unknown[0], taken, 'its arguments are')} "
            f"Leave it out, or, where an experiment sets it, add {without}."
        )
    for key, value in given.items():
        if value is None and key in taken and taken[key].default is not None and not _takes_none(hints.get(key)):
            raise UsageError(f"{where}.{key} cannot be null: {name} takes {_spelled(hints[key])}.")
    if not node.get("_partial_") and not node.get("_args_"):
        for key, one in taken.items():
            required = one.default is one.empty and one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)
            if required and key not in given:
                raise UsageError(f"{where}: {name} needs the argument '{key}'.")


def _hints(target: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except (NameError, TypeError, AttributeError):  # annotations that only a type checker can read
        return {}


def _takes_none(annotation: Any) -> bool:
    if annotation is None or annotation is type(None) or isinstance(annotation, typing.TypeVar):
        return True
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return any(_takes_none(one) for one in typing.get_args(annotation))
    return annotation in (Any, object)


def _spelled(annotation: Any) -> str:
    return annotation.__name__ if inspect.isclass(annotation) else str(annotation)


def _cause(error: Exception, wrapper: type[Exception]) -> Exception:
    """The exception that Hydra wrapped, however many times."""
    while isinstance(error, wrapper) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


def _reason(error: Exception) -> str:
    inner: BaseException = error
    while inner.__cause__ is not None:
        inner = inner.__cause__
    return " ".join(str(inner).split()).rstrip(".")
