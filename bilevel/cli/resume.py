"""`resume=DIR`: the recorded command composed again, and compared with the configuration that the run had.

The recorded config.yaml is only compared, never built: what is built comes from conf/ under today's allow-list.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from bilevel.cli.arguments import Arguments
from bilevel.cli.directories import Record, read_record
from bilevel.errors import UsageError
from bilevel.jsonable import flatten

_MAY_CHANGE = re.compile(r"trainer\.num_steps|tracking(\..*)?|resume")
_RESUME = re.compile(r"\+{0,2}resume=")
_ABSENT = "absent"


def with_recorded_overrides(arguments: Arguments) -> tuple[Arguments, Record | None]:
    """The command line of a resumed run: the recorded overrides, then those given now.

    Args:
        arguments: the command line as typed.

    Returns:
        The full command line and what the run folder says; without `resume=DIR`, the command line as it was and None.

    Raises:
        UsageError: the folder is not the folder of a run, or its files are broken.
    """
    folder = _folder(arguments)
    if folder is None:
        return arguments, None
    record = read_record(folder)
    given = {_key(text) for text in arguments.overrides}
    recorded = tuple(text for text in record.overrides if _key(text) not in given)
    config_dir = arguments.config_dir or record.config_dir
    overrides = recorded + arguments.overrides
    return dataclasses.replace(arguments, overrides=overrides, config_dir=config_dir), record


def check_unchanged(record: Record, config: Mapping[str, Any], folder: str) -> None:
    """Refuses to continue a run under another configuration than it had.

    Args:
        record: what the run folder says.
        config: the resolved configuration of now.
        folder: the run folder, for the message.

    Raises:
        UsageError: a key other than trainer.num_steps, tracking.* and resume differs; the difference is shown.
    """
    before, now = dict(flatten(record.config)), dict(flatten(config))
    changed = [
        f"{key} was {before.get(key, _ABSENT)!r} and is now {now.get(key, _ABSENT)!r}"
        for key in sorted(before.keys() | now.keys())
        if not _MAY_CHANGE.fullmatch(key) and not _same(before.get(key, _ABSENT), now.get(key, _ABSENT))
    ]
    num_steps = now.get("trainer.num_steps")
    if (
        changed
        and num_steps != before.get("trainer.num_steps")
        and all(one.startswith("outer_scheduler.") for one in changed)
    ):
        raise UsageError(
            f"{folder} has a schedule of learning rates that ends with its last step ({'; '.join(changed)}), and cannot go on "
            f"to more steps or end with fewer: start a new run with trainer.num_steps={num_steps}."
        )
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise UsageError(
            f"{folder} continues only as it was, and {'; '.join(changed[:3])}{more}: only trainer.num_steps and "
            "tracking.* may change."
        )


def _folder(arguments: Arguments) -> str | None:
    for text in arguments.overrides:
        if _RESUME.match(text):
            try:
                value = OverridesParser.create().parse_override(text).value()
            except HydraException:
                return text.partition("=")[2]  # a path that wants quoting: preflight says so if it exists
            return None if value is None else str(value)
    return None


def _key(text: str) -> str:
    return text.lstrip("+~").partition("=")[0]


def _same(before: Any, now: Any) -> bool:
    return repr(before) == repr(now)  # inside lists too: 1 is not 1.0, and NaN is like NaN
