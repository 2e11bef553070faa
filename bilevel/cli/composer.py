"""Composing conf/ without running anything: what the checks before a job, the resume and the tests need of Hydra."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra import initialize_config_dir
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from bilevel.cli.paths import CONFIG_NAME, conf_directory
from bilevel.errors import UsageError

HYDRA_VERSION_BASE = "1.3"


class Composer:
    """Composes configurations out of conf/ and one folder more. Made by `composer(...)`.

    Example:
        >>> with composer() as compose:
        ...     "trainer" in compose.groups()
        True
    """

    def __init__(self, extra: Path | None) -> None:
        """Takes the Hydra that `composer(...)` has set up, and a folder to search besides conf/."""
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None, "a Composer lives inside `with composer(...)`"
        self._hydra = hydra
        self._searchpath = [] if extra is None else [f"file://{extra}"]
        self._composed: dict[tuple[str, ...], DictConfig] = {}

    @property
    def loader(self) -> ConfigLoader:
        """Hydra's loader, which the override parser wants for `glob(...)`."""
        return self._hydra.config_loader

    def groups(self) -> list[str]:
        """The groups at the top of the search path, Hydra's own left out."""
        names = self.loader.get_group_options("", ObjectType.GROUP, CONFIG_NAME, self._with_searchpath([]))
        return [name for name in names if name != "hydra"]

    def options(self, group: str) -> list[str]:
        """The options of a group such as `solver` or `hydra/launcher`; empty when there is no such group."""
        return self.loader.get_group_options(group, ObjectType.CONFIG, CONFIG_NAME, self._with_searchpath([]))

    def compose(self, overrides: Sequence[str] = ()) -> DictConfig:
        """The composed configuration, with Hydra's own under `hydra`; the same words give the same object.

        Groups that nothing chooses are left out rather than refused; their choice reads `???`.

        Raises:
            HydraException: the overrides do not fit conf/.
            OmegaConfBaseException: a value does not fit its place.
        """
        words = tuple(self._with_searchpath(overrides))
        if words not in self._composed:
            self._composed[words] = self._compose(words)
        return self._composed[words]

    def _compose(self, words: Sequence[str]) -> DictConfig:
        config = self._hydra.compose_config(
            config_name=CONFIG_NAME,
            overrides=list(words),
            run_mode=RunMode.MULTIRUN,  # this mode forgives groups without a choice
            from_shell=False,
            validate_sweep_overrides=False,
        )
        with open_dict(config):  # what only a job has, so that names made of it resolve
            config.hydra.job.num = 0
            config.hydra.job.id = "0"
            config.hydra.runtime.output_dir = "."
        return config

    def _with_searchpath(self, overrides: Sequence[str]) -> list[str]:
        """Adds the user's folder, beside the ones that an override of hydra.searchpath names."""
        paths, rest = list(self._searchpath), []
        for override in overrides:
            if override.lstrip("+").startswith("hydra.searchpath="):
                paths += OmegaConf.from_dotlist([override.lstrip("+")]).hydra.searchpath
            else:
                rest.append(override)
        quoted = ",".join(QuotedString(path, Quote.single).with_quotes() for path in paths)
        return [*rest, f"hydra.searchpath=[{quoted}]"] if paths else rest


@contextmanager
def composer(extra: Path | None = None, conf: Path | None = None) -> Iterator[Composer]:
    """A composer over conf/ and, when given, a user's own folder.

    Args:
        extra: the folder of `--config-dir`.
        conf: another folder in place of conf/; tests use it.
    """
    before = HydraConfig.instance().cfg
    with initialize_config_dir(
        str((conf or conf_directory()).resolve()), job_name="train", version_base=HYDRA_VERSION_BASE
    ):
        try:
            yield Composer(extra)
        finally:
            HydraConfig.instance().cfg = before


def resolve(config: DictConfig | ListConfig) -> dict[str, Any]:
    """A composed configuration as plain dicts and lists with every interpolation filled in, without `hydra`.

    Raises:
        UsageError: an interpolation leads nowhere, or a mandatory value (`???`) is missing.
    """
    assert isinstance(config, DictConfig)
    job = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    if "hydra" in config:
        HydraConfig.instance().set_config(config)
    try:
        missing = sorted(str(key) for key in OmegaConf.missing_keys(job))
        if missing:
            raise UsageError(f"{missing[0]} has no default: give it as {missing[0]}=VALUE.")
        plain = OmegaConf.to_container(job, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        place = f" at {error.full_key}" if getattr(error, "full_key", None) else ""
        raise UsageError(f"the configuration does not resolve{place}: {first_line(error)}.") from error
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def first_line(error: BaseException) -> str:
    """The first line of a Hydra or OmegaConf message, without its full stop."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".:")


def in_one_sentence(error: HydraException | OmegaConfBaseException | ValueError) -> str:
    """What Hydra says over several lines, as one sentence: its first line and what caused it."""
    text = first_line(error)
    if isinstance(error.__cause__, OmegaConfBaseException):
        cause = first_line(error.__cause__)
        text = cause if text == type(error).__name__ else f"{text}: {cause}"
    return f"{text}."
