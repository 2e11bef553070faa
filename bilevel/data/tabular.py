"""Small data sets that ship with scikit-learn, split once and for all by a seed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.errors import UsageError


@dataclass(frozen=True)
class Split:
    """Inputs `(N, D)` and labels `(N,)` of a part of a data set."""

    x: Tensor
    y: Tensor


def load_digits(
    seed: int = 0, validation_fraction: float = 0.25, test_fraction: float = 0.25, dtype: torch.dtype | None = None
) -> tuple[Split, Split, Split]:
    """Scikit-learn's handwritten digits (1,797 images of 8x8, pixels scaled to [0, 1]), split with equal class shares.

    Args:
        seed: of the split.
        validation_fraction: share of the validation split.
        test_fraction: share of the test split.
        dtype: of the inputs.

    Returns:
        Training, validation and test split.

    Example:
        >>> [len(part.x) for part in load_digits()]
        [898, 449, 450]
    """
    from sklearn.datasets import load_digits as load
    from sklearn.model_selection import train_test_split

    held_out = validation_fraction + test_fraction
    if not (0 < validation_fraction and 0 < test_fraction and held_out < 1):
        raise UsageError(
            "validation_fraction and test_fraction must be above 0 and sum to less than 1, but are "
            f"{validation_fraction} and {test_fraction}."
        )
    images, labels = load(return_X_y=True)
    images = images / 16.0
    x, x_rest, y, y_rest = train_test_split(images, labels, test_size=held_out, random_state=seed, stratify=labels)
    x_val, x_test, y_val, y_test = train_test_split(
        x_rest, y_rest, test_size=test_fraction / held_out, random_state=seed, stratify=y_rest
    )

    def split(inputs: object, targets: object) -> Split:
        return Split(torch.as_tensor(inputs, dtype=dtype or torch.get_default_dtype()), torch.as_tensor(targets).long())

    return split(x, y), split(x_val, y_val), split(x_test, y_test)
