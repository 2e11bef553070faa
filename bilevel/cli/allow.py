"""What a configuration may name: an allow-list of prefixes, judged on the text before anything is imported.

A configuration file can come from anywhere, and Hydra calls whatever `_target_` names. So every `_target_` must begin
with an allowed prefix, and only the environment (`BILEVEL_ALLOW=my_pkg.,other.`) can add one, never a file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from bilevel.errors import UsageError

ALLOWED = ("bilevel.", "torch.optim.")
"""The prefixes that are allowed everywhere."""

VARIABLE = "BILEVEL_ALLOW"
"""The environment variable that adds prefixes, separated by commas."""

# sweepers, launchers and Hydra's own callbacks; `hydra.utils` would lead anywhere
_HYDRA_ALLOWED = (
    "hydra._internal.core_plugins.",
    "hydra.experimental.callbacks.",
    "hydra_plugins.",
    "optuna.samplers.",
    "optuna.pruners.",
)
_HYDRA_PARTS = ("launcher", "sweeper", "callbacks", "job_logging", "hydra_logging")  # what Hydra instantiates
_FORBIDDEN = ("bilevel.cli.",)  # a configuration may not run the command line
_DOTTED = re.compile(r"[A-Za-z]\w*(\._?[A-Za-z]\w*)+")  # no dunder: `__init__.__globals__` leads anywhere
_STREAMS = ("ext://sys.stdout", "ext://sys.stderr")


def allowed_prefixes() -> tuple[str, ...]:
    """The allowed prefixes, each ending in a dot: the fixed ones and those of `BILEVEL_ALLOW`."""
    added = (part.strip().rstrip(".") for part in os.environ.get(VARIABLE, "").split(","))
    return ALLOWED + tuple(f"{part}." for part in added if part)


def is_allowed(name: str, prefixes: tuple[str, ...]) -> bool:
    """Whether a dotted name, or the name of a module itself, lies under one of the prefixes."""
    return f"{name}.".startswith(prefixes) and not f"{name}.".startswith(_FORBIDDEN)


def check_targets(config: Any, where: str = "") -> None:
    """Refuses a configuration that names anything outside the allow-list. Imports nothing.

    Args:
        config: a resolved configuration: dicts, lists and plain values.
        where: its dotted place, for the message.

    Raises:
        UsageError: a `_target_` that is no text, is not a plain dotted name, or lies outside the allow-list; a text
            with an interpolation left in it, which Hydra would fill in a second time, with a `_target_` perhaps.
    """
    _check(config, where, allowed_prefixes())


def check_hydra(config: Any) -> None:
    """Refuses what in Hydra's own configuration could run code or change the allow-list.

    Args:
        config: the node `hydra` of a composed configuration.

    Raises:
        UsageError: a `_target_` outside Hydra and the allow-list, a logging configuration with a factory or a class
            of its own, or an environment variable of ours or of Hydra's policy.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    parts = [name for name in _HYDRA_PARTS if OmegaConf.is_config(config[name])]
    try:
        nodes = {name: OmegaConf.to_container(config[name], resolve=True) for name in parts}
    except OmegaConfBaseException as error:
        raise UsageError(f"hydra's configuration does not resolve: {str(error).splitlines()[0]}.") from error
    for name, node in nodes.items():
        _check(node, f"hydra.{name}", allowed_prefixes() + _HYDRA_ALLOWED, strict=False)
        if name.endswith("logging"):
            _check_logging(node, f"hydra.{name}")
    for name in [*config.job.env_set, *config.job.env_copy]:
        if str(name).upper().startswith(("BILEVEL_", "HYDRA_", "PYTHON")):
            raise UsageError(f"hydra.job.env_set may not set {name}: set it in the environment yourself.")


def _walk(config: Any, where: str) -> Iterator[tuple[str, Any]]:
    yield where, config
    if isinstance(config, Mapping):
        for key, value in config.items():
            yield from _walk(value, f"{where}.{key}" if where else str(key))
    elif isinstance(config, list | tuple):
        for number, value in enumerate(config):
            yield from _walk(value, f"{where}.{number}")


def _check(config: Any, where: str, prefixes: tuple[str, ...], strict: bool = True) -> None:
    for place, value in _walk(config, where):
        if strict and isinstance(value, str) and "${" in value:
            raise UsageError(f"{place} holds an interpolation that is not resolved, {value!r}: write its value.")
        if isinstance(value, Mapping) and "_target_" in value:
            _check_target(value["_target_"], place or "the configuration", prefixes)


def _check_target(target: Any, where: str, prefixes: tuple[str, ...]) -> None:
    if not isinstance(target, str) or not _DOTTED.fullmatch(target):
        raise UsageError(f"{where} has the _target_ {target!r}, which is not the dotted name of a class.")
    if is_allowed(target, prefixes):
        return
    if target.startswith(_FORBIDDEN):
        raise UsageError(f"{where} has the _target_ {target}, and a configuration may not run the command line.")
    raise UsageError(
        f"{where} has the _target_ {target}, and configurations may only name {', '.join(ALLOWED)}: if you trust it, "
        f"set {VARIABLE}={target.split('.')[0]}. in the environment."
    )


def _check_logging(config: Any, where: str) -> None:
    for place, value in _walk(config, where):
        if isinstance(value, Mapping) and "()" in value:
            raise UsageError(f"{place} names a factory ('()'), which a logging configuration may not do here.")
        if isinstance(value, Mapping) and not str(value.get("class", "logging.")).startswith("logging."):
            raise UsageError(f"{place} names the class {value['class']}: only those of logging are taken.")
        if isinstance(value, str) and value.startswith(("ext://", "cfg://")) and value not in _STREAMS:
            raise UsageError(f"{place} names {value}: only {' and '.join(_STREAMS)} are taken.")
