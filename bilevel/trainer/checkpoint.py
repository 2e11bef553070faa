"""Checkpoints: a state goes to disk and comes back bit for bit, or is refused; nothing is ever unpickled.

A checkpoint is a folder ``step_00000012`` holding

* ``tensors.safetensors``: every tensor of the state,
* ``state.json``: everything else, with the tensors' names in their places,
* ``manifest.json``: format version, step, size and SHA-256 of the two files above.

The folder is written under a temporary name, synced and then renamed, so that a killed write leaves the older
checkpoints as they were. Reading verifies every byte and falls back to the newest checkpoint that is intact.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from bilevel.errors import UsageError
from bilevel.trainer.codec import decode, encode

__all__ = ["load_checkpoint", "save_checkpoint"]

FORMAT = 1
TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
_TEMPORARY = ".writing-"
_REPLACED = ".replaced"  # a checkpoint of the same step that is about to be superseded: still readable
_FOLDER = re.compile(rf"step_(\d{{8,}})({re.escape(_REPLACED)})?")


def save_checkpoint(root: Path, step: int, state: Any, *, keep: int = 3) -> Path:
    """Write `state` as the checkpoint of `step` under `root`, then remove the oldest beyond `keep`.

    Args:
        root: Folder of checkpoints; made when missing.
        step: Number of the outer step at which a resumed run continues, at least 0.
        state: Any nesting of dicts (str or int keys), lists, tuples, None, bool, int, float, str and dense tensors
            (any dtype, device, layout in memory). Subclasses of dict come back as dict, parameters as plain tensors;
            two references to one tensor come back as two tensors.
        keep: How many checkpoints to leave, at least 1. The one just written is always among them.

    Returns:
        The folder of the new checkpoint.

    Raises:
        UsageError: `state` holds something else, or `step` or `keep` is out of range.
        OSError: The disk is full or not writable; the previous checkpoints are intact.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = save_checkpoint(Path(folder), 12, {"params": {"w": torch.ones(2)}, "best": float("inf")})
        ...     state, step, skipped = load_checkpoint(Path(folder))
        >>> path.name, step, skipped, state["best"], state["params"]["w"]
        ('step_00000012', 12, [], inf, tensor([1., 1.]))
    """
    if keep < 1 or step < 0:
        raise UsageError(
            f"Expected keep >= 1 and step >= 0 for a checkpoint, got keep={keep} and step={step}; keep=3 is the usual."
        )
    root = Path(root)
    files = dict(zip((TENSORS, STATE), encode(state), strict=True))
    files[MANIFEST] = _manifest(step, files)
    try:
        root.mkdir(parents=True, exist_ok=True)
        for leftover in root.glob(f"{_TEMPORARY}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        folder = _write_folder(root, f"step_{step:08d}", files)
    except OSError as error:
        raise OSError(
            error.errno,
            f"Could not write the checkpoint of step {step} under {root} ({error.strerror or error}); the previous "
            "checkpoints are intact: free some space or mend the permissions, then continue with resume=RUN_DIRECTORY",
        ) from error
    _prune(root, step, keep)
    return folder


def load_checkpoint(root: Path) -> tuple[Any, int, list[str]]:
    """Read the newest intact checkpoint under `root`; tensors come back on the CPU.

    Returns:
        The state, its step, and one sentence for each newer checkpoint that was damaged and skipped.

    Raises:
        UsageError: No checkpoint under `root` is intact, or there is none.
    """
    root = Path(root)
    skipped: list[str] = []
    for _, folder in sorted(_folders(root), reverse=True):
        try:
            state, step = _read_folder(folder)
        except (_DamagedError, OSError) as error:
            skipped.append(f"Skipped the checkpoint {folder}: {error}.")
        else:
            return state, step, skipped
    found = f"none of its {len(skipped)} is intact: {' '.join(skipped)}" if skipped else "it holds none"
    raise UsageError(
        f"Expected a folder with at least one intact checkpoint (step_00000012 and the like) in {root}, but {found}"
        f"{'' if skipped else '.'} Try an older run directory, or start the run afresh."
    )


class _DamagedError(Exception):
    """A checkpoint's bytes are not those that were written; the message is the reason, without a full stop."""


# -- folders ----------------------------------------------------------------------------------------------------


def _folders(root: Path) -> list[tuple[tuple[int, bool], Path]]:
    """Checkpoints with their sort key: later steps are larger, a superseded one is smaller than its successor."""
    matches = ((_FOLDER.fullmatch(path.name), path) for path in (root.iterdir() if root.is_dir() else ()))
    return [((int(match[1]), match[2] is None), path) for match, path in matches if match and path.is_dir()]


def _write_folder(root: Path, name: str, files: dict[str, bytes]) -> Path:
    temporary = root / f"{_TEMPORARY}{name}"
    final, replaced = root / name, root / f"{name}{_REPLACED}"
    try:
        temporary.mkdir()
        for file, content in files.items():
            with (temporary / file).open("wb") as handle:
                handle.write(content)
                handle.flush()
                os.fsync(handle.fileno())
        _sync_folder(temporary)
        if final.exists():  # a folder that is not empty cannot be renamed over
            shutil.rmtree(replaced, ignore_errors=True)
            final.rename(replaced)
        temporary.rename(final)
        _sync_folder(root)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if replaced.exists() and not final.exists():
            replaced.rename(final)
        raise
    return final


def _sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable; Windows has no such call and needs none."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _prune(root: Path, step: int, keep: int) -> None:
    """Leave the checkpoint of `step` and the `keep - 1` before it.

    A later one exists only when a run fell back behind a damaged checkpoint: it goes when it is damaged indeed.
    It never counts towards `keep`, or it could push out the only one that is intact.
    """
    ranked = sorted(_folders(root), reverse=True)
    older = [path for key, path in ranked if key < (step, True)]
    superseded = [path for path in older if path.name.endswith(_REPLACED)]
    stale = [path for path in older if path not in superseded][keep - 1 :]
    later = [path for key, path in ranked if key > (step, True) and not _is_intact(path)]
    for path in (*superseded, *stale, *later):
        shutil.rmtree(path, ignore_errors=True)


def _is_intact(folder: Path) -> bool:
    try:
        _read_folder(folder)
    except (_DamagedError, OSError):
        return False
    return True


# -- manifest ---------------------------------------------------------------------------------------------------


def _manifest(step: int, files: dict[str, bytes]) -> bytes:
    entries = {name: {"bytes": len(data), "sha256": _digest(data)} for name, data in files.items()}
    body = {"format": FORMAT, "step": step, "files": entries}
    return _dump(body | {"sha256": _digest(_dump(body))})


def _read_folder(folder: Path) -> tuple[Any, int]:
    missing = [name for name in (MANIFEST, TENSORS, STATE) if not (folder / name).is_file()]
    if missing:
        raise _DamagedError(f"{missing[0]} is missing")
    manifest = _read_manifest((folder / MANIFEST).read_bytes())
    match = _FOLDER.fullmatch(folder.name)
    if match is None or int(match[1]) != manifest["step"]:
        raise _DamagedError(f"the folder's name and its {MANIFEST} (step {manifest['step']}) disagree")
    files = {}
    for name, entry in manifest["files"].items():
        data = files[name] = (folder / name).read_bytes()
        if len(data) != entry["bytes"]:
            raise _DamagedError(f"{name} has {len(data)} bytes, not the {entry['bytes']} that were written")
        if _digest(data) != entry["sha256"]:
            raise _DamagedError(f"{name} does not have the SHA-256 that its manifest records")
    return decode(files[TENSORS], files[STATE]), manifest["step"]


def _read_manifest(raw: bytes) -> dict[str, Any]:
    """Parse `raw`, which must be exactly what `_manifest` writes: any other byte means damage."""
    try:
        manifest = json.loads(raw)
        body = {key: value for key, value in manifest.items() if key != "sha256"}
        intact = _dump(manifest) == raw and manifest["sha256"] == _digest(_dump(body))
    except (ValueError, AttributeError, KeyError):
        intact = False
    if not intact:
        raise _DamagedError(f"{MANIFEST} is not what was written")
    if body["format"] != FORMAT:
        raise _DamagedError(f"its format is version {body['format']} and this bilevel reads version {FORMAT}")
    return body


def _dump(value: Any) -> bytes:
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode("ascii")


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
