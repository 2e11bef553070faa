"""Strengths of a proximal term: those of tensors by patterns of their names, and which of them are learned together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase

from torch import Tensor

from bilevel.broadcast import Broadcast, Groups
from bilevel.errors import UsageError


def strengths_of(patterns: Mapping[str, float], other: float, start: Mapping[str, Tensor]) -> dict[str, float]:
    """The strength of each tensor: of the first pattern that fits, or that of all others.

    Args:
        patterns: from beginnings or patterns of names to strengths.
        other: the strength of tensors that no pattern fits.
        start: the tensors.

    Raises:
        UsageError: a strength is not above 0, or a pattern decides about no tensor.

    Example:
        >>> import torch
        >>> strengths_of({"head": 0.5}, 8.0, {"conv0.weight": torch.ones(2), "head.bias": torch.ones(1)})
        {'conv0.weight': 8.0, 'head.bias': 0.5}
    """
    if not isinstance(patterns, Mapping):
        raise UsageError(
            f"strengths was expected to be a dictionary such as {{head: 0.5}}, but is {patterns!r}: one strength for all "
            "tensors is called strength."
        )
    for value in (*patterns.values(), other):
        if not (isinstance(value, int | float) and 0 < value < math.inf):
            raise UsageError(
                f"the strength of the proximal term was expected to be above 0 and finite, but is {value!r}."
            )
    first = {name: next((pattern for pattern in patterns if _fits(name, pattern)), None) for name in start}
    for pattern in patterns:
        if not any(_fits(name, pattern) for name in start):
            raise UsageError(f"'{pattern}' in strengths fits none of the tensors {', '.join(start)}.")
        if pattern not in first.values():
            raise UsageError(
                f"'{pattern}' in strengths decides about no tensor, since patterns before it fit all of its own: put it first."
            )
    return {name: float(other if pattern is None else patterns[pattern]) for name, pattern in first.items()}


def learned_strengths(learned: str | Groups, strengths: Mapping[str, float], start: Mapping[str, Tensor]) -> Broadcast:
    """Which hyperparameter is the strength of which tensor.

    Raises:
        UsageError: no such granularity, or tensors that are to share a learned strength start with different ones.
    """
    if learned == "per_feature":
        raise UsageError(
            "problem.learned was expected to be null, shared, per_layer, per_tensor, per_weight or groups, but is "
            "'per_feature', which layers with channels last have not: take one of these."
        )
    broadcast = Broadcast.of("strength", learned, start)
    for owner in broadcast.shapes:
        values = sorted({strengths[name] for name, other in broadcast.owners.items() if other == owner})
        if len(values) > 1:
            raise UsageError(
                f"the tensors of the learned strength '{owner}' were expected to start with the same, but have {values}: learn "
                "more of them (problem.learned=per_layer or per_tensor), or give these tensors one number "
                "(problem.strengths=null leaves problem.strength to all)."
            )
    return broadcast


def _fits(name: str, pattern: str) -> bool:
    return name.startswith(pattern) or fnmatchcase(name, pattern)
