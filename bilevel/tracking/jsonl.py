"""`metrics.jsonl`, the primary record of a run: one strict JSON object a line, on disk before the next step."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from bilevel.errors import UsageError
from bilevel.jsonable import decode, encode

if TYPE_CHECKING:
    from torch import Tensor

    from bilevel.trainer.callbacks import RunStart

__all__ = ["JsonlTracker", "read_metrics"]


class JsonlTracker:
    """Append each step's record to a file, flushed and synced, so that a killed run loses nothing.

    A run that starts at step k (0, or later when it is resumed) first removes the records of steps >= k and a line
    that was cut short, in one atomic replacement of the file. Unlike other trackers this one is not guarded: a
    record that cannot be written stops the run.

    Args:
        path: The file, usually `metrics.jsonl` in the run directory; folders are made as needed.

    Example:
        >>> import tempfile
        >>> from types import SimpleNamespace
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     tracker = JsonlTracker(Path(folder) / "metrics.jsonl")
        ...     tracker.on_start(SimpleNamespace(step=0))
        ...     tracker.on_step({"step": 0, "outer_loss": float("inf")}, {})
        ...     tracker.on_end({})
        ...     print(tracker.path.read_text().strip(), read_metrics(tracker.path))
        {"step": 0, "outer_loss": "Infinity"} [{'step': 0, 'outer_loss': inf}]
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Note where the file will be; it is opened when the run starts."""
        self.path = Path(path)
        self._file: IO[bytes] | None = None

    def on_start(self, run: RunStart) -> None:
        """Keep the records before `run.step` and open the file.

        Raises:
            OSError: The file cannot be written.
            UsageError: A line before the last is not a record.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = [record for record in read_metrics(self.path) if record.get("step", -1) < run.step]
        temporary = self.path.with_name(f".{self.path.name}.writing")
        with temporary.open("wb") as file:
            file.writelines(_line(record) for record in kept)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)
        self._file = self.path.open("ab")

    def on_step(self, record: Mapping[str, Any], hparams: Mapping[str, Tensor]) -> None:
        """Append `record`; it is on disk when this returns.

        Raises:
            OSError: It could not be written; the message says what to do.
        """
        assert self._file is not None, "on_step came before on_start"
        try:
            self._file.write(_line(record))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            self._drop()
            raise OSError(
                error.errno,
                f"Could not write step {record.get('step')} to {self.path} ({error.strerror or error}): free some "
                "space or mend the permissions, then continue with resume=RUN_DIRECTORY",
            ) from error

    def on_end(self, summary: Mapping[str, Any]) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _drop(self) -> None:
        """Close without a second complaint: closing tries once more to write what has just failed."""
        file, self._file = self._file, None
        try:
            if file is not None:
                file.close()
        except OSError:
            return


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read the records of a `metrics.jsonl`, with non-finite numbers restored; a missing file has none.

    A last line that was cut short (a run killed while it wrote) is left out.

    Raises:
        UsageError: Another line is not a JSON object.
    """
    path = Path(path)
    lines = path.read_bytes().splitlines() if path.exists() else []
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict):
            records.append(decode(record))
        elif number < len(lines):
            raise UsageError(
                f"Expected a JSON object in every line of {path}, but line {number} is {line[:40]!r}; remove that line."
            )
    return records


def _line(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(encode(record), allow_nan=False) + "\n").encode()
