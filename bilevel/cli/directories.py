"""The folder of a run: made when the run really starts, taken away again when it never got to a step."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]  # PyYAML ships no types
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bilevel.cli.composer import first_line
from bilevel.errors import UsageError

CONFIG = "config.yaml"
OVERRIDES = "overrides.yaml"


@dataclass(frozen=True)
class RunDirectory:
    """The folder of one run.

    Attributes:
        path: the folder.
        made: the folders that were made for it, outermost first; empty when the run continues an older one.
    """

    path: Path
    made: tuple[Path, ...] = ()

    @property
    def has_checkpoint(self) -> bool:
        """Whether the run can be continued from here."""
        checkpoints = self.path / "checkpoints"
        return checkpoints.is_dir() and any(checkpoints.iterdir())

    def discard_if_unused(self) -> bool:
        """Takes a new folder away again unless a step was recorded in it; says whether it did."""
        metrics = self.path / "metrics.jsonl"
        if not self.made or self.has_checkpoint or (metrics.exists() and metrics.stat().st_size):
            return False
        shutil.rmtree(self.path, ignore_errors=True)
        for folder in reversed(self.made):
            with contextlib.suppress(OSError):  # somebody else may have put something there meanwhile
                folder.rmdir()
        return True


def new_run_directory(output_dir: str | Path, name: str) -> RunDirectory:
    """Makes `output_dir/name/YYYY-MM-DD_HH-MM-SS`, with `_2`, `_3`, ... when that second is taken.

    Raises:
        UsageError: the folder cannot be made.
    """
    stamp = f"{datetime.now():%Y-%m-%d_%H-%M-%S}"
    family = Path(output_dir).expanduser() / name
    missing = [folder for folder in (*reversed(family.parents), family) if not folder.exists()]
    try:
        family.mkdir(parents=True, exist_ok=True)
        number = 1
        while True:
            path = family / (stamp if number == 1 else f"{stamp}_{number}")
            try:
                path.mkdir()
                return RunDirectory(path, (*missing, path))
            except FileExistsError:
                number += 1
    except OSError as error:
        raise UsageError(
            f"no folder can be made under {family}, because {error.strerror}: give output_dir=DIR."
        ) from error


def sweep_job_directory(path: str | Path) -> RunDirectory:
    """The numbered folder of one job of a sweep, which Hydra has made or which is made here.

    Raises:
        UsageError: it holds a run already.
    """
    folder = Path(path)
    if (folder / CONFIG).exists():
        raise UsageError(f"{folder} holds a run already: give another hydra.sweep.dir.")
    folder.mkdir(parents=True, exist_ok=True)
    return RunDirectory(folder, (folder,))


@dataclass(frozen=True)
class Record:
    """What a run folder says about the command that made it.

    Attributes:
        config: the resolved configuration; for comparing, never for building.
        overrides: the overrides of the job.
        config_dir: the folder of `--config-dir`, or None.
    """

    config: dict[str, Any]
    overrides: tuple[str, ...]
    config_dir: Path | None


def write_record(path: Path, config: Mapping[str, Any], overrides: Sequence[str], config_dir: Path | None) -> None:
    """Writes config.yaml and overrides.yaml into a new run folder."""
    command = {"overrides": list(overrides), "config_dir": None if config_dir is None else str(config_dir)}
    for file, content in ((OVERRIDES, command), (CONFIG, dict(config))):
        (path / file).write_text(OmegaConf.to_yaml(OmegaConf.create(content)), encoding="utf-8")


def read_record(folder: str | Path) -> Record:
    """Reads what `write_record` wrote.

    Raises:
        UsageError: the folder is not there or is not a run's, or a file is missing or broken.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise UsageError(f"resume={folder} takes the folder of a run, and there is no such folder.")
    if (path / "multirun.yaml").exists():
        raise UsageError(f"{folder} is a sweep: continue one of its runs, for example resume={path / '0'}.")
    for file in (CONFIG, OVERRIDES):
        if not (path / file).is_file():
            raise UsageError(f"resume={folder} takes the folder of a run, and {path.resolve()} has no {file}.")
    command = _read(path / OVERRIDES)
    overrides, config_dir = command.get("overrides"), command.get("config_dir")
    if not isinstance(overrides, list) or not all(isinstance(one, str) for one in overrides):
        raise UsageError(f"{path / OVERRIDES} is broken: its overrides are no list of texts.")
    if config_dir is not None and not Path(str(config_dir)).is_dir():
        raise UsageError(f"the run used --config-dir {config_dir}, which is gone: give --config-dir DIR again.")
    return Record(_read(path / CONFIG), tuple(overrides), None if config_dir is None else Path(str(config_dir)))


def _read(file: Path) -> dict[str, Any]:
    try:
        content = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} is broken: {first_line(error)}.") from error
    if not isinstance(content, dict):
        raise UsageError(f"{file} is broken: it holds no keys.")
    return {str(key): value for key, value in content.items()}
