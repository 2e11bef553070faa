"""Where conf/ is: inside the installed package, or at the top of a checkout."""

from __future__ import annotations

from pathlib import Path

from bilevel.errors import UsageError

CONFIG_NAME = "train"
"""The top-level configuration: conf/train.yaml."""


def conf_directory() -> Path:
    """The folder that holds train.yaml and the config groups.

    Raises:
        UsageError: neither the package nor the folder above it has one.
    """
    package = Path(__file__).resolve().parents[1]
    # the package first: beside an installed one lies site-packages/conf, which would be somebody else's
    for candidate in (package / "conf", package.parent / "conf"):
        if (candidate / f"{CONFIG_NAME}.yaml").is_file():
            return candidate
    raise UsageError(f"conf/ is neither in {package} nor beside it: install bilevel again.")


def config_groups(*roots: Path) -> dict[str, list[str]]:
    """The config groups under some folders and their options, both sorted.

    Args:
        roots: conf/ and, when the user gave one, the folder of `--config-dir`.

    Returns:
        `{"hypergradient": ["implicit_cg", "unrolled"], ...}`; Hydra's own groups are left out.
    """
    groups: dict[str, set[str]] = {}
    for root in roots:
        for file in root.rglob("*.yaml"):
            group = file.parent.relative_to(root).as_posix()
            if group != "." and group.split("/")[0] != "hydra":
                groups.setdefault(group, set()).add(file.stem)
    return {group: sorted(groups[group]) for group in sorted(groups)}
