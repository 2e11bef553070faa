"""The overrides as typed: read, refused when malformed or given twice, and taken apart into single values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from bilevel.errors import UsageError


@dataclass(frozen=True)
class Given:
    """One override.

    Attributes:
        text: as typed, `+trainer.num_steps=3`.
        sign: "" (change), "+" (add), "++" (add or change) or "~" (delete).
        key: `trainer.num_steps`, `solver`, or with its package `linear_solver@hypergradient.linear_solver`.
        members: the values: one, or several in a sweep; an interval sweep has none that could be listed.
        texts: the members as overrides of their own, `+trainer.num_steps=3`.
        is_sweep: whether it stands for several runs.
    """

    text: str
    sign: str
    key: str
    members: tuple[Any, ...]
    texts: tuple[str, ...]
    is_sweep: bool

    @property
    def group(self) -> str:
        """The key without its package."""
        return self.key.partition("@")[0]

    @property
    def is_hydra(self) -> bool:
        """Whether it is about Hydra's own configuration."""
        return self.key.startswith(("hydra.", "hydra/"))


def read_overrides(texts: Sequence[str], loader: ConfigLoader) -> list[Given]:
    """Reads overrides.

    Args:
        texts: as typed.
        loader: Hydra's loader, which lists the options that `glob(...)` matches.

    Raises:
        UsageError: one is malformed, or two are about the same key.
    """
    parser = OverridesParser.create(config_loader=loader)
    given = [_read(text, parser) for text in texts]
    first: dict[str, Given] = {}
    for one in given:
        if one.key in first:
            raise UsageError(f"{one.key} is given twice, as {first[one.key].text} and as {one.text}: give it once.")
        first[one.key] = one
    return given


def _read(text: str, parser: OverridesParser) -> Given:
    try:
        override = parser.parse_overrides([text])[0]
        members, texts = _members(override, parser)
    except HydraException as error:
        raise UsageError(_malformed(text)) from error
    if not _key(override):
        raise UsageError(_malformed(text))
    sign = override.get_key_element()[: -len(_key(override))]
    return Given(text, sign, _key(override), members, texts, override.is_sweep_override())


def _key(override: Override) -> str:
    return override.get_key_element().lstrip("+~")


def _members(override: Override, parser: OverridesParser) -> tuple[tuple[Any, ...], tuple[str, ...]]:
    assert override.input_line is not None
    if not override.is_sweep_override():
        return (override.value(),), (override.input_line,)
    if not override.is_discrete_sweep():
        return (), ()
    texts = tuple(f"{override.get_key_element()}={member}" for member in override.sweep_string_iterator())
    return tuple(one.value() for one in parser.parse_overrides(list(texts))), texts


def _malformed(text: str) -> str:
    key, equals, value = text.partition("=")
    if not equals:
        return f"cannot read '{text}': an override is written key=value, for example seed=1."
    if not key.strip("+~"):
        return f"cannot read '{text}': a key is missing before the =."
    return (
        f"cannot read the value in '{text}': quote a text that holds one of []{{}}():=,'\" or a space, "
        f"""for example {key}='"{value.replace('"', "").replace("'", "")}"'."""
    )
