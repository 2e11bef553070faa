"""Where data sets are looked for, and what is said when one is not there."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import urllib.request
from http.client import HTTPException
from pathlib import Path

from bilevel.errors import UsageError

VARIABLE = "BILEVEL_DATA"
PATIENCE = 60.0  # seconds without a byte after which a download is given up


def data_root(root: str | Path | None = None) -> Path:
    """The folder of data sets: the one given, else that of the environment, else a cache folder in the user's home.

    Example:
        >>> data_root("data/sets").as_posix()
        'data/sets'
    """
    chosen = root if root is not None else os.environ.get(VARIABLE) or Path.home() / ".cache" / "bilevel"
    return Path(chosen).expanduser()


def fetch(address: str, path: Path, md5: str) -> None:
    """Download a file that is not there yet, and check it; what is left behind is the right file or none.

    Raises:
        UsageError: it cannot be downloaded, or it is not the file that was expected.
    """
    if path.is_file():
        try:
            found = _md5(path)
        except OSError as error:
            raise UsageError(f"{path} cannot be read ({reason(error)}): give yourself the right to read it.") from error
        if found != md5:
            raise UsageError(
                f"{path} is damaged: its MD5 was expected to be {md5}, but is {found}; remove it to have it downloaded again."
            )
        return
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")  # runs of a sweep may want it at the same time
    try:
        with urllib.request.urlopen(address, timeout=PATIENCE) as sent:
            path.parent.mkdir(parents=True, exist_ok=True)  # a folder that was misspelt is not made where nothing comes
            with partial.open("wb") as handle:
                shutil.copyfileobj(sent, handle)
        found = _md5(partial)
        if found != md5:
            raise UsageError(
                f"what {address} sent is not {path.name}: its MD5 was expected to be {md5}, but is {found}; put the file into "
                f"{path.parent} by hand, or name the folder where it is with data.root=DIR or the variable {VARIABLE}."
            )
        os.replace(partial, path)
    except (OSError, HTTPException) as error:  # the former is also what urllib raises
        raise UsageError(
            f"{path.name} is not in {path.parent} and cannot be downloaded from {address} ({reason(error)}): put the "
            f"file there, or name the folder where it is with data.root=DIR or the variable {VARIABLE}."
        ) from error
    finally:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            partial.unlink()


def _md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def reason(error: Exception) -> str:
    """What an exception says, on one line and without its full stop, to stand in brackets."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
