"""What was typed after `train`: Hydra's flags and the overrides, in any order.

Hydra's own parser wants all flags before the overrides, prints two lines and a usage for a misspelt flag, and
knows `--experimental-rerun`, which reads a pickle. This one takes any order, says one sentence, and hands Hydra a
clean list.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from bilevel.cli.suggest import hint
from bilevel.errors import UsageError

_REFUSED = {
    "--experimental-rerun": "it reads a pickle: use resume=DIR",
    "--config-path": "conf/ is always searched: add a folder of your own with --config-dir DIR",
    "--config-name": "the top-level configuration is always train: write an experiment instead",
}
_REFUSED["-cp"] = _REFUSED["--config-path"]
_REFUSED["-cn"] = _REFUSED["--config-name"]


@dataclass(frozen=True)
class Arguments:
    """The command line of `train`.

    Attributes:
        overrides: `key=value`, `group=option` and their kin, as typed.
        config_dir: the user's own folder of configurations, absolute; searched besides conf/.
        multirun: True with `-m`.
        show: the flags that show something instead of running it, as Hydra wants them (`--cfg job`); empty for a run.
        help: True with `--help`.
    """

    overrides: tuple[str, ...] = ()
    config_dir: Path | None = None
    multirun: bool = False
    show: tuple[str, ...] = ()
    help: bool = False

    @property
    def checked(self) -> bool:
        """Whether the overrides describe a job: completion, `--info` and Hydra's help take anything."""
        return not self.show or self.show[0] == "--cfg"

    def for_hydra(self) -> list[str]:
        """The same command line as Hydra's own parser reads it: flags first."""
        flags = list(self.show)
        if self.config_dir is not None:
            flags += ["--config-dir", str(self.config_dir)]
        if self.multirun:
            flags.append("--multirun")
        return flags + list(self.overrides)


def read_arguments(words: Sequence[str]) -> Arguments:
    """Reads the command line of `train`.

    Args:
        words: what follows `train`.

    Raises:
        UsageError: an unknown, refused or incomplete flag, two flags that exclude each other, or a folder given by
            `--config-dir` that is not one.
    """
    for word in words:
        reason = _REFUSED.get(word.split("=")[0])
        if reason is not None:
            raise UsageError(f"{word.split('=')[0]} is not taken here, because {reason}.")
    flags, unknown = _parser().parse_known_intermixed_args(list(words))
    for word in unknown:
        raise UsageError(_unknown_flag(word))
    if flags.resolve and flags.cfg is None:
        raise UsageError("--resolve and --package only go with --cfg: write --cfg job --resolve.")
    return Arguments(
        overrides=tuple(flags.overrides),
        config_dir=_directory(flags.config_dir),
        multirun=flags.multirun,
        show=_show(flags),
        help=flags.help,
    )


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints are `UsageError`s."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message[:1].lower()}{message[1:]}; see python -m bilevel train --help.")


def _parser() -> _Parser:
    parser = _Parser(prog="train", add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("-cd", "--config-dir")
    parser.add_argument("--resolve", action="store_true")
    parser.add_argument("-p", "--package")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("-m", "--multirun", action="store_true")
    action.add_argument("-c", "--cfg", choices=["job", "hydra", "all"])
    topics = ["all", "config", "defaults", "defaults-tree", "plugins", "searchpath"]
    action.add_argument("-i", "--info", nargs="?", const="all", choices=topics)
    action.add_argument("-sc", "--shell-completion", action="store_true")
    action.add_argument("--hydra-help", action="store_true")
    return parser


def _show(flags: argparse.Namespace) -> tuple[str, ...]:
    if flags.cfg is not None:
        package = ("--package", flags.package) if flags.package is not None else ()
        return ("--cfg", flags.cfg, *package, *(("--resolve",) if flags.resolve else ()))
    if flags.info is not None:
        return ("--info", flags.info)
    if flags.shell_completion:
        return ("--shell-completion",)
    return ("--hydra-help",) if flags.hydra_help else ()


def _directory(text: str | None) -> Path | None:
    if text is None:
        return None
    path = Path(text).expanduser().resolve()
    if not path.is_dir():
        raise UsageError(f"--config-dir wants a folder of configurations, and '{text}' is not a folder.")
    return path


def _unknown_flag(word: str) -> str:
    name = word.split("=")[0]
    setting = name.lstrip("-").replace("-", "_")
    if name.startswith("--") and "=" in word:
        return f"settings are written without dashes: write {setting}={word.partition('=')[2]}."
    flags = ["--multirun", "--config-dir", "--cfg", "--resolve", "--package", "--info", "--shell-completion", "--help"]
    return f"there is no flag {name}{hint(name, flags, 'the flags are')}"
