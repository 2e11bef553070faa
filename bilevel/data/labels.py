"""Wrong labels, put in on purpose."""

from __future__ import annotations

import torch
from torch import Tensor

from bilevel.errors import UsageError
from bilevel.rng import generator


def mislabelled(labels: Tensor, share: float, num_classes: int, *seeds: int) -> Tensor:
    """Labels of which an exact share is another class than before, each of the others as likely.

    Args:
        labels: classes `(N,)`, from 0.
        share: of the labels that are changed, from 0 to 1; which ones is drawn.
        num_classes: number of classes, at least two.
        seeds: of the draws.

    Returns:
        Labels `(N,)`.

    Raises:
        UsageError: the share is no share.

    Example:
        >>> labels = torch.arange(10) % 5
        >>> int((mislabelled(labels, 0.3, 5, 0) != labels).sum())
        3
    """
    if not 0 <= share <= 1:
        raise UsageError(f"the share of wrong labels was expected to be from 0 to 1, but is {share}.")
    source = generator(*seeds)
    chosen = torch.randperm(len(labels), generator=source)[: round(share * len(labels))]
    shift = torch.randint(1, num_classes, (len(chosen),), generator=source)
    changed = labels.clone()
    changed[chosen] = (labels[chosen] + shift) % num_classes
    return changed
