"""The help texts. They are read off conf/, so that they cannot disagree with it; no torch and no Hydra needed."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import yaml  # type: ignore[import-untyped]  # PyYAML ships no types

from bilevel.cli.paths import CONFIG_NAME, conf_directory, config_groups

if TYPE_CHECKING:
    from bilevel.cli.main import Command

_SETTING = re.compile(r"^(?P<key>\w+): (?P<value>.+?)\s+# (?P<comment>.+)$", re.MULTILINE)

_FLAGS = """\
flags of train:
  -m, --multirun       one run for each combination of the values given as key=a,b,c
  --config-dir DIR     a folder of your own configurations, searched besides conf/
  --cfg job            show the configuration instead of running it (--resolve fills in ${...})
  -sc install=bash     tab completion: eval "$(python -m bilevel train -sc install=bash)"
  --info, --hydra-help what Hydra knows: search path, plugins, its own flags
"""

_EXAMPLES = """\
examples:
  python -m bilevel train experiment=digits
  python -m bilevel train experiment=digits hypergradient=implicit_neumann trainer.num_steps=20 seed=1
  python -m bilevel train -m experiment=digits hypergradient=implicit_cg,unrolled seed=0,1,2
  python -m bilevel train resume=outputs/digits/2025-01-31_12-00-00
  BILEVEL_ALLOW=my_pkg. python -m bilevel train --config-dir my_conf problem=mine

`python -m experiments.train ...` is the same as `python -m bilevel train ...`. Configurations may name classes of
bilevel and torch.optim; BILEVEL_ALLOW in the environment allows more prefixes. HYDRA_FULL_ERROR=1 shows tracebacks.
"""


def version() -> str:
    """The installed version, or "unknown" in a checkout that is not installed."""
    try:
        return metadata.version("bilevel")
    except metadata.PackageNotFoundError:
        return "unknown"


def overview(commands: Mapping[str, Command]) -> str:
    """The text of `python -m bilevel --help`."""
    lines = [
        "bilevel differentiates through optimisation: hypergradients by the implicit function theorem, and the outer",
        "loop that uses them.",
        "",
        "usage: python -m bilevel COMMAND ...",
        "",
        "commands:",
        *(f"  {name:<20} {command.summary}" for name, command in commands.items()),
        f"  {'COMMAND --help':<20} more about a command",
        f"  {'--version':<20} the installed version",
        "",
    ]
    return "\n".join(lines) + _configuration() + "\n" + _EXAMPLES


def train_help(config_dir: Path | None = None) -> str:
    """The text of `python -m bilevel train --help`.

    Args:
        config_dir: the user's own folder, whose groups are listed as well.
    """
    usage = (
        "usage: python -m bilevel train [FLAGS] [group=option] [key=value] ...\n\n"
        "Runs the outer loop; everything a run leaves behind is in its own folder under output_dir.\n\n"
    )
    return usage + _configuration(config_dir) + "\n" + _FLAGS + "\n" + _EXAMPLES


def _configuration(config_dir: Path | None = None) -> str:
    conf = conf_directory()
    text = (conf / f"{CONFIG_NAME}.yaml").read_text(encoding="utf-8")
    chosen = _defaults(text)
    chosen |= _presets(str(chosen["hypergradient"]), conf / "hypergradient")
    lines = ["config groups (group=option; * is the default):"]
    for group, options in config_groups(*filter(None, (conf, config_dir))).items():
        marked = ", ".join(f"{option}*" if chosen.get(group) == option else option for option in options)
        lines += textwrap.wrap(
            marked, 110, initial_indent=f"  {group:<20} ", subsequent_indent=" " * 23, break_on_hyphens=False
        )
    lines += ["", "keys (key=value; every key of the composed configuration can be set: see --cfg job):"]
    for match in _SETTING.finditer(text):
        lines.append(f"  {match['key'] + '=' + match['value']:<20} {match['comment']}")
    return "\n".join(lines) + "\n"


def _defaults(text: str) -> dict[str, str | None]:
    entries = yaml.safe_load(text).get("defaults", [])
    return {group: option for entry in entries if isinstance(entry, dict) for group, option in entry.items()}


def _presets(option: str, folder: Path) -> dict[str, str | None]:
    """What an option of the group `hypergradient` chooses of other groups, itself or through the options it builds on."""
    text = (folder / f"{option}.yaml").read_text(encoding="utf-8")
    found: dict[str, str | None] = {}
    for entry in yaml.safe_load(text).get("defaults", []):
        if isinstance(entry, str) and entry != "_self_":
            found |= _presets(entry, folder)
    for group, choice in _defaults(text).items():
        found[group.removeprefix("override ").lstrip("/").partition("@")[0]] = choice
    return found
