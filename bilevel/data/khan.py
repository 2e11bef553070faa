"""Khan's gene expressions: 83 tumours of four kinds, 2,308 genes."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile, ZipFile

import numpy as np
import torch
from torch import Tensor

from bilevel.data.root import VARIABLE, data_root, reason
from bilevel.errors import UsageError

FOLDER, WHEEL = "islp", "islp-0.6.0-py3-none-any.whl"  # of the data folder
PARTS = {"train": 63, "test": 20}
NUM_GENES = 2308
KINDS = ("Burkitt lymphoma", "Ewing sarcoma", "neuroblastoma", "rhabdomyosarcoma")


class Khan(NamedTuple):
    """Log ratios of expressions `(83, 2308)`, float64, and numbers of the kinds in `KINDS`, `(83,)`."""

    expressions: Tensor
    kinds: Tensor


def load_khan(root: str | Path | None = None) -> Khan:
    """The data of the package `islp`, its 63 training samples and then its 20 test samples.

    The wheel is looked for in the folder `islp` of the data folder, then the package where it is installed.

    Args:
        root: the data folder, see `data_root`.

    Raises:
        UsageError: there is neither, or it is damaged.

    Reference: Khan et al. (2001), "Classification and diagnostic prediction of cancers using gene expression profiling and
    artificial neural networks".

    Example:
        >>> tuple(load_khan().expressions.shape)
        (83, 2308)
    """
    wheel = data_root(root) / FOLDER / WHEEL
    found = importlib.util.find_spec("ISLP")  # looks where it is, does not import it
    if not wheel.is_file() and (found is None or found.origin is None):
        raise UsageError(
            f"{wheel} does not exist, and islp is not installed: pip download --no-deps islp==0.6.0 -d {wheel.parent}, or pip "
            f"install --no-deps islp==0.6.0, or name the data folder with problem.design.root=DIR or the variable {VARIABLE}."
        )
    source = wheel if wheel.is_file() or found is None or found.origin is None else Path(found.origin).parent
    try:
        x = np.vstack([_table(source, f"x{part}") for part in PARTS])
        y = np.concatenate([_table(source, f"y{part}") for part in PARTS])
    except (OSError, KeyError, ValueError, BadZipFile) as error:
        raise UsageError(
            f"the data of Khan in {source} cannot be read ({reason(error)}): get islp 0.6.0 anew."
        ) from error
    sound = x.shape == (sum(PARTS.values()), NUM_GENES) and y.shape == (len(x),) and np.isin(y, [1, 2, 3, 4]).all()
    if not sound or not np.isfinite(x).all():
        raise UsageError(
            f"the data of Khan in {source} were expected to be 83 samples of {NUM_GENES:,} genes, and kinds 1 to 4, but are "
            f"{x.shape} and {y.shape}: get islp 0.6.0 anew."
        )
    return Khan(torch.from_numpy(x), torch.from_numpy(y).long() - 1)


def _table(source: Path, name: str) -> np.ndarray:
    """One of the four tables, without the row of names."""
    path = f"ISLP/data/Khan_{name}.csv"
    if source.is_file():
        with ZipFile(source) as archive:
            content = archive.read(path)
    else:
        content = (source.parent / path).read_bytes()
    return np.loadtxt(io.BytesIO(content), delimiter=",", skiprows=1)
