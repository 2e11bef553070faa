"""Checks a command line before a job starts: names, values, sweeps and targets, without torch and without traces.

Hydra would find most of these too, one layer at a time, in several lines, after making the folder of a sweep, and
without saying what was meant. The configuration is composed here exactly as Hydra will compose it for the job.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bilevel.cli.allow import check_hydra, check_targets
from bilevel.cli.arguments import Arguments
from bilevel.cli.composer import Composer, composer, in_one_sentence, resolve
from bilevel.cli.overrides import Given, read_overrides
from bilevel.cli.settings import Settings
from bilevel.cli.suggest import alternatives, hint, near
from bilevel.cli.values import dotted, expected, find, may_name
from bilevel.errors import UsageError

_MAX_COMBINATIONS = 16
"""Up to so many combinations of groups in a sweep are all composed; beyond, each option is tried once."""


def preflight(arguments: Arguments) -> list[dict[str, Any]]:
    """Checks everything about a command line that can be checked without torch.

    Args:
        arguments: the command line.

    Returns:
        The resolved configurations that were composed: the job's, or in a sweep one per combination of groups.

    Raises:
        UsageError: the first mistake found, in one sentence.
    """
    with composer(arguments.config_dir) as compose:
        given = read_overrides(arguments.overrides, compose.loader)
        groups = [one for one in given if _is_group(one, compose)]
        for one in groups:
            _check_option(one, compose)
        base = _compose_groups(groups, given, compose)
        multirun = arguments.multirun or str(base.hydra.mode).endswith("MULTIRUN")
        _check_mode(given, multirun)
        if multirun:
            given += _sweeper_params(base, given, compose)
            groups = [one for one in given if _is_group(one, compose)]
            for one in groups:
                _check_option(one, compose)
        return [_check_job(choice, groups, given, compose) for choice in _combinations(groups)]


def _is_group(one: Given, compose: Composer) -> bool:
    return not any(isinstance(value, dict) for value in one.members) and bool(compose.options(one.group))


def _check_option(one: Given, compose: Composer) -> None:
    options = compose.options(one.group)
    for member in one.members:
        if member is None and one.sign != "~":
            raise UsageError(
                f"{one.group} takes one of {', '.join(options)}, not null: leave {one.text} out, or remove the group "
                f"with ~{one.key}."
            )
        for name in member if isinstance(member, list) else [member]:
            if name is not None and str(name) not in options:
                raise UsageError(f"{one.group} has no option '{name}'{hint(str(name), options, 'its options are')}")


def _compose_groups(groups: Sequence[Given], given: Sequence[Given], compose: Composer) -> DictConfig:
    """The configuration with the first option of each group, before any key is set."""
    texts = [one.texts[0] for one in groups if one.texts] + _early(given)
    config = _compose(texts, groups, compose)
    for group, choice in config.hydra.runtime.choices.items():
        if choice == "???":
            options = ", ".join(compose.options(str(group).partition("@")[0]))
            raise UsageError(f"{group} has no default: choose one with {group}=OPTION out of {options}.")
    return config


def _compose(texts: Sequence[str], groups: Sequence[Given], compose: Composer) -> DictConfig:
    try:
        return compose.compose(texts)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        for one in groups:
            _check_placed(one, groups, compose, error)
        raise UsageError(in_one_sentence(error)) from error


def _check_placed(one: Given, groups: Sequence[Given], compose: Composer, error: Exception) -> None:
    """Refuses a group that the composition has no place for, naming the place that was meant."""
    if one.sign or one.is_hydra or f"'{one.key}'" not in str(error):
        return
    try:
        others = [other.texts[0] for other in groups if other.texts and other.key != one.key]
        choices = [str(key) for key in compose.compose(others).hydra.runtime.choices]
    except (HydraException, OmegaConfBaseException, ValueError):
        return
    places = [choice for choice in choices if choice.partition("@")[0] == one.group]
    if places:
        option = one.text.partition("=")[2]
        raise UsageError(f"{one.key} is not chosen by that name here: write {places[0]}={option}.") from error
    if one.key not in choices:
        raise UsageError(
            f"nothing in this configuration uses the group {one.key}: leave {one.text} out, or add it with +{one.text}."
        ) from error


def _early(given: Sequence[Given]) -> list[str]:
    """The keys of Hydra's that decide what can be composed, and how."""
    return [one.text for one in given if one.key in ("hydra.mode", "hydra.searchpath")]


def _check_mode(given: Sequence[Given], multirun: bool) -> None:
    for one in given:
        if one.is_sweep and not multirun:
            key, _, values = one.text.partition("=")
            or_list = "" if values.endswith(")") else f", or write {key}=[{values}] for a list"
            raise UsageError(f"{one.text} stands for several runs: add -m to make them all{or_list}.")
        if one.key == "resume" and multirun:
            raise UsageError("resume continues one run, and a sweep is several: leave -m out.")
        if one.key == "hydra.run.dir":
            raise UsageError(f"the run folder is made under output_dir: give output_dir=DIR instead of {one.text}.")


def _sweeper_params(base: DictConfig, given: Sequence[Given], compose: Composer) -> list[Given]:
    """What the configuration itself sweeps over (`hydra.sweeper.params`), where the command line does not."""
    params = OmegaConf.select(base, "hydra.sweeper.params") or {}
    texts = [f"{key}={value}" for key, value in params.items()]
    taken = {one.key for one in given}
    return [one for one in read_overrides(texts, compose.loader) if one.key not in taken]


def _combinations(groups: Sequence[Given]) -> list[dict[str, str]]:
    """The choices of options to compose: {key: override} for each."""
    lists = [[(one.key, text) for text in one.texts] for one in groups if one.texts]
    total = 1
    for texts in lists:
        total *= len(texts)
    if total <= _MAX_COMBINATIONS:
        return [dict(choice) for choice in itertools.product(*lists)]
    first = {texts[0][0]: texts[0][1] for texts in lists}
    return [first] + [{**first, key: text} for texts in lists for key, text in texts[1:]]


def _check_job(choice: dict[str, str], groups: Sequence[Given], given: Sequence[Given], compose: Composer) -> Any:
    """Checks one combination of groups, with the first value of every key that is swept over."""
    chosen, early = list(choice.values()), _early(given)
    keys = [one for one in given if one not in groups and one.text not in early]
    base = _compose(chosen + early, groups, compose)
    for one in keys:
        _check_key(one, base, chosen, compose)
    config = _compose(chosen + early + [one.texts[0] for one in keys if one.texts], groups, compose)
    for required in ("problem", "solver", "hypergradient", "outer_optimizer", "trainer", *Settings.keys()):
        if required not in config:
            raise UsageError(f"a job needs {required}: leave out the override that removes it.")
    job = resolve(config)
    Settings.of(job)
    check_targets(job)
    check_hydra(config.hydra)
    return job


def _check_key(one: Given, config: DictConfig, chosen: Sequence[str], compose: Composer) -> None:
    """Refuses a key that is not there, a needless `+`, and a value of another type than the default's."""
    tree = OmegaConf.to_container(config, resolve=False, throw_on_missing=False)
    try:
        default = find(tree, one.key.replace("[", ".").replace("]", ""))
    except KeyError:
        _check_new_key(one, tree, chosen, compose)
        return
    if one.sign == "+" and not isinstance(default, dict | list):
        raise UsageError(f"{one.key} is there already: leave the + out and write {one.text[1:]}.")
    if one.sign != "~" and not one.is_hydra:  # Hydra's own keys have a schema
        for member in one.members:
            _check_value(one.key, default, member)


def _check_new_key(one: Given, tree: Any, chosen: Sequence[str], compose: Composer) -> None:
    names = [key for key, _ in dotted(tree) if not key.rpartition(".")[2].startswith("_")]
    known = [key for key in names if one.is_hydra or key.partition(".")[0] != "hydra"]
    parent, _, last = one.key.rpartition(".")
    siblings = [key for key in known if parent and key.rpartition(".")[0] == parent]
    others = [key for key in dict.fromkeys([*known, *compose.groups()]) if not one.key.startswith(f"{key}.")]
    close = near(one.key, siblings, cutoff=0.8) or near(one.key, others, cutoff=0.75)
    if one.sign in ("+", "++"):
        meant = [key for key in close if near(last, [key.rpartition(".")[2]], cutoff=0.75)]
        if meant:
            value = one.text.partition("=")[2]
            raise UsageError(f"there is no key '{one.key}'; did you mean {meant[0]}={value}, without the {one.sign}?")
        return  # a key of the user's own
    where = f" with {' '.join(chosen)}" if chosen else ""
    if close:
        raise UsageError(f"there is no key '{one.key}'{where}; did you mean {alternatives(close)}?")
    first = one.key.partition(".")[0]
    options = compose.options(first)
    if options and first not in tree:
        raise UsageError(f"there is no key '{one.key}'{where}: first choose {first}={'|'.join(options)}.")
    places = siblings or [key for key in known if "." not in key]
    what = f"the keys of {parent} are" if siblings else "the keys at the top are"
    raise UsageError(f"there is no key '{one.key}'{where}{hint('', places, what)}")


def _check_value(key: str, default: Any, value: Any) -> None:
    wanted = expected(default, value)
    if wanted is not None and not may_name(key, value):
        quoting = f""", so quote it: {key}="'{value}'\"""" if wanted == "a text" else ""
        raise UsageError(f"{key} takes {wanted} (its default is {default!r}), and got {value!r}{quoting}.")
    if isinstance(default, dict) and isinstance(value, dict):
        for name, inner in value.items():
            place = f"{key}.{name}"
            if name in default:
                _check_value(place, default[name], inner)
            elif default:
                names = [f"{key}.{known}" for known in default]
                raise UsageError(f"there is no key '{place}'{hint(place, names, f'the keys of {key} are')}")
