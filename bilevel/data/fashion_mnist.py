"""Fashion-MNIST: 70,000 grey images of clothes in ten classes, 28 x 28."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bilevel.data.root import data_root, fetch, reason
from bilevel.errors import UsageError

FOLDER = "fashion-mnist"  # of the data folder
DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # where the package dataset-fashion-mnist puts the same files
ADDRESS = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


class File(NamedTuple):
    """One of the four files: how it is called, the MD5 as it is sent, the SHA-256 of what is packed in it."""

    name: str
    md5: str
    sha256: str


FILES = {
    "train_images": File(
        "train-images-idx3-ubyte.gz",
        "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    ),
    "train_labels": File(
        "train-labels-idx1-ubyte.gz",
        "25c81989df183df01b3e8a0aad5dffbe",
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    ),
    "test_images": File(
        "t10k-images-idx3-ubyte.gz",
        "bef4ecab320f06d8554ea6380940ec79",
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    ),
    "test_labels": File(
        "t10k-labels-idx1-ubyte.gz",
        "bb300cfdad3c16e7a12a480ee83cd310",
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    ),
}


class FashionMNIST(NamedTuple):
    """Unsigned bytes, ink 255: images `(N, 28, 28, 1)`, labels `(N,)` as integers of 64 bits; 60,000 and 10,000 of them."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_fashion_mnist(root: str | Path | None = None) -> FashionMNIST:
    """All images and labels.

    The four files are looked for in the folder `fashion-mnist` of the data folder, then where Debian's package
    dataset-fashion-mnist puts them; else they are downloaded. Whatever they come from, their contents are checked.

    Args:
        root: the data folder, see `data_root`.

    Raises:
        UsageError: a file is damaged, or there is none and it cannot be downloaded.

    Reference: Xiao, Rasul and Vollgraf (2017), "Fashion-MNIST: a novel image dataset for benchmarking machine learning
    algorithms".
    """
    parts = {key: torch.from_numpy(_read(_find(file, root), file)) for key, file in FILES.items()}
    images = {key: value.unsqueeze(-1) for key, value in parts.items() if key.endswith("images")}
    labels = {key: value.long() for key, value in parts.items() if key.endswith("labels")}
    return FashionMNIST(**images, **labels)


def _find(file: File, root: str | Path | None) -> Path:
    """Where the file is, or has been put."""
    own = data_root(root) / FOLDER / file.name
    packaged = DEBIAN / file.name
    if not own.is_file() and packaged.is_file():
        return packaged
    fetch(f"{ADDRESS}/{file.name}", own, file.md5)
    return own


def _read(path: Path, file: File) -> np.ndarray:
    """The array of an IDX file: two zeros, the type 8 (unsigned bytes), the number of dimensions, their sizes, the bytes."""
    try:
        content = gzip.decompress(path.read_bytes())
    except PermissionError as error:
        raise UsageError(f"{path} cannot be read ({reason(error)}): give yourself the right to read it.") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"{path} is damaged ({reason(error)}): remove it to have it fetched again.") from error
    found = hashlib.sha256(content).hexdigest()
    if found != file.sha256:
        raise UsageError(
            f"{path} is damaged: the SHA-256 of what is packed in it was expected to be {file.sha256[:12]}..., but is "
            f"{found[:12]}...: remove it to have it fetched again."
        )
    sizes = np.frombuffer(content, ">u4", count=content[3], offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * len(sizes)).reshape(sizes).copy()
