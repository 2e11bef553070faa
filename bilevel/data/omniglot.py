"""Omniglot: 1,623 handwritten characters of 50 alphabets, each drawn by 20 people."""

from __future__ import annotations

import hashlib
import io
import os
import warnings
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bilevel.data.episodes import ClassEpisodes
from bilevel.data.root import data_root, fetch, reason
from bilevel.errors import UsageError
from bilevel.rng import generator

FILE = "omniglot28.npz"
SHA256 = "8784741eae4cf8f88abaeb9eb46d572bb89a5290c60a812e2de7b63d769b0230"
ADDRESS = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python"
ARCHIVES = {
    "images_background.zip": "68d2efa1b9178cc56df9314c21c6e718",
    "images_evaluation.zip": "6b91aef0f799c5bb55b94e3f2daec811",
}
SIDE = 28
NUM_CLASSES, NUM_BACKGROUND = 1623, 964
NUM_TRAINING = 1200  # of the random split


class Omniglot(ClassEpisodes):
    """Few-shot tasks of Omniglot's characters, 28 x 28, ink 1.

    The file `omniglot28.npz` is looked for in the data folder; without it the two official archives are taken from there, or
    downloaded, and made into that file.

    Args:
        root: the data folder; None takes the variable BILEVEL_DATA, or a cache folder in the user's home.
        split: `official` (964 characters of 30 alphabets to train, 659 of 20 others to test) or `random` (1,200 to train,
            423 to test, alphabets mixed, by `split_seed`).
        way: characters in a task.
        shot: support images of a character.
        num_query: query images of a character.
        rotated_parts: parts (`train`, `validation`, `test`) in which each character is also three more, turned by 90, 180 and
            270 degrees; the papers on MAML and implicit MAML turn all.
        shift: pixels by which each training image is moved at most.
        num_validation: training characters that are kept for validation; of the official split the last ones, 50 of the 55 of
            one alphabet (Tifinagh): enough to rank settings by, no estimate of the score on the 20 alphabets of the test part.
        split_seed: of the random split.

    References: Lake, Salakhutdinov and Tenenbaum (2015), "Human-level concept learning through probabilistic program
    induction", for the data and the official split; Vinyals et al. (2016), "Matching networks for one shot learning", for
    the random split with rotations.
    """

    def __init__(
        self,
        root: str | None = None,
        split: str = "official",
        way: int = 5,
        shot: int = 1,
        num_query: int = 15,
        rotated_parts: Sequence[str] = ("train",),
        shift: int = 0,
        num_validation: int = 50,
        split_seed: int = 0,
    ) -> None:
        """Load and split."""
        classes = _split(split, num_validation, split_seed)
        super().__init__(load_omniglot(root), classes, way, shot, num_query, rotated_parts, shift)


def load_omniglot(root: str | Path | None = None) -> Tensor:
    """All images, `(1623, 20, 28, 28, 1)`, unsigned bytes, ink 255; the first 964 characters are the background set.

    Args:
        root: the data folder, see `data_root`.

    Raises:
        UsageError: the file is damaged; or there is none, and the archives are neither there nor to be downloaded.
    """
    folder = data_root(root)
    path = folder / FILE
    images = _read(path) if path.is_file() else _convert(folder)
    found = _sha256(images)
    if found != SHA256:
        warnings.warn(
            f"the images of {path}, made from the official archives, are not those of the documented figures (SHA-256 "
            f"{found[:12]}... instead of {SHA256[:12]}...): another version of Pillow may round otherwise. They are used "
            "as they are.",
            stacklevel=2,
        )
    return torch.from_numpy(images).unsqueeze(-1)


def _convert(folder: Path) -> np.ndarray:
    """The official archives as one array, kept in the folder."""
    for name, md5 in ARCHIVES.items():
        try:
            fetch(f"{ADDRESS}/{name}", folder / name, md5)
        except UsageError as error:
            raise UsageError(f"{FILE} is not in {folder}, and it cannot be made: {error}") from error
    images = np.concatenate([read_archive(folder / name) for name in ARCHIVES])
    _save(folder / FILE, images)
    return images


def _read(path: Path) -> np.ndarray:
    """The file's array, which is what its checksum says."""
    try:
        with np.load(path, allow_pickle=False) as content:
            images, expected = content["images"], str(content["sha256"]) if "sha256" in content else SHA256
    except PermissionError as error:
        raise UsageError(f"{path} cannot be read ({reason(error)}): give yourself the right to read it.") from error
    except _DAMAGE as error:
        raise UsageError(f"{path} is damaged ({reason(error)}): {_REMEDY}") from error
    found = _sha256(images)
    if found != expected:
        raise UsageError(
            f"{path} is damaged: the SHA-256 of its images is {found[:12]}... instead of {expected[:12]}...: {_REMEDY}"
        )
    return images


# What NumPy and zipfile raise on bytes that are not what they were; TypeError where they are one array and not an archive.
_DAMAGE = (OSError, ValueError, KeyError, EOFError, TypeError, RuntimeError, zipfile.BadZipFile, zlib.error)
_REMEDY = "remove it to have it made again from the official archives."


def read_archive(path: Path) -> np.ndarray:
    """The characters of an official archive in the order of their folders, `(characters, drawers, 28, 28)`.

    Each 105 x 105 bitmap, in which ink is 0, is averaged over the pixels that each of 28 x 28 covers.
    """
    from PIL import Image

    with zipfile.ZipFile(path) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".png"))
        characters: dict[str, list[np.ndarray]] = {}
        for name in names:
            with Image.open(io.BytesIO(archive.read(name))) as bitmap:
                ink = Image.fromarray((1 - np.asarray(bitmap.convert("1"), dtype=np.uint8)) * 255)
                characters.setdefault(name.rpartition("/")[0], []).append(
                    np.asarray(ink.resize((SIDE, SIDE), Image.Resampling.BOX))
                )
    return np.stack([np.stack(drawn) for drawn in characters.values()])


def _split(split: str, num_validation: int, seed: int) -> dict[str, list[int]]:
    if split == "official":
        order, num_training = list(range(NUM_CLASSES)), NUM_BACKGROUND
    elif split == "random":
        order, num_training = torch.randperm(NUM_CLASSES, generator=generator(seed)).tolist(), NUM_TRAINING
    else:
        raise UsageError(f"data.split was expected to be 'official' or 'random', but is {split!r}.")
    if not isinstance(num_validation, int) or not 0 <= num_validation < num_training:
        raise UsageError(
            f"data.num_validation was expected to be from 0 to {num_training - 1}, of the {num_training} training characters, "
            f"but is {num_validation!r}."
        )
    kept = num_training - num_validation
    return {"train": order[:kept], "validation": order[kept:num_training], "test": order[num_training:]}


def _save(path: Path, images: np.ndarray) -> None:
    """Write the file whole or not at all; a folder that cannot be written to costs no more than the next conversion."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as handle:
            np.savez_compressed(handle, images=images, n_background=NUM_BACKGROUND, sha256=_sha256(images))
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)


def _sha256(images: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(images).tobytes()).hexdigest()
