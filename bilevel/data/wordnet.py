"""WordNet's nouns: 82,064 short definitions in 25 classes, from animals to time."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bilevel.data.root import VARIABLE, data_root, reason
from bilevel.errors import UsageError

FOLDER, NAME = "wordnet", "data.noun"  # of the data folder
DEBIAN = Path("/usr/share/wordnet") / NAME  # where the package wordnet-base puts the same file
NUM_SYNSETS = 82_115  # of version 3.0
FIRST = 4  # number of the first class; 3 holds the 51 most general nouns, which are of no kind
CLASSES = (
    *("act", "animal", "artifact", "attribute", "body", "cognition", "communication", "event", "feeling", "food"),
    *("group", "location", "motive", "object", "person", "phenomenon", "plant", "possession", "process", "quantity"),
    *("relation", "shape", "state", "substance", "time"),
)


class Glosses(NamedTuple):
    """Definitions, with their examples, and the numbers of their classes in `CLASSES`, `(N,)`."""

    texts: tuple[str, ...]
    labels: Tensor


def load_wordnet_nouns(root: str | Path | None = None) -> Glosses:
    """The definition of each set of nouns that mean the same, and the class that lexicographers have put it in.

    The file `data.noun` of WordNet 3.0 is looked for in the folder `wordnet` of the data folder, then where Debian's package
    wordnet-base puts it.

    Args:
        root: the data folder, see `data_root`.

    Raises:
        UsageError: there is no such file, it is damaged, or it is that of another version.

    Reference: Miller (1995), "WordNet: a lexical database for English".
    """
    path = data_root(root) / FOLDER / NAME
    if not path.is_file():
        if not DEBIAN.is_file():
            raise UsageError(
                f"{path} does not exist: install Debian's package wordnet-base, or put the file {NAME} of WordNet 3.0 (in its "
                f"folder dict) there, or name the data folder with data.root=DIR or the variable {VARIABLE}."
            )
        path = DEBIAN
    try:
        lines = [line for line in path.read_text("utf-8").splitlines() if not line.startswith("  ")]  # the licence
        parts = [line.split(" | ", 1) for line in lines]
        labels = torch.tensor([int(head.split(" ", 2)[1]) for head, _ in parts]) - FIRST
    except PermissionError as error:
        raise UsageError(f"{path} cannot be read ({reason(error)}): give yourself the right to read it.") from error
    except (OSError, ValueError, IndexError) as error:
        raise UsageError(f"{path} is damaged ({reason(error)}): put that of WordNet 3.0 there.") from error
    if len(lines) != NUM_SYNSETS or not bool(((labels >= -1) & (labels < len(CLASSES))).all()):
        raise UsageError(
            f"{path} was expected to have the {NUM_SYNSETS:,} nouns of WordNet 3.0, but has {len(lines):,}: it is damaged, or "
            "of another version."
        )
    kept = labels >= 0
    texts = tuple(gloss.strip() for (_, gloss), keep in zip(parts, kept.tolist(), strict=True) if keep)
    return Glosses(texts, labels[kept])
