"""One configured value as hyperparameters of any granularity: shared, per layer, tensor, feature, weight, or in groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from bilevel.errors import UsageError, nearest
from bilevel.tree import TensorDict

Groups = Mapping[str, str | Sequence[str]]  # name -> pattern(s) of parameter names
Shape = tuple[int, ...]


def _layer(name: str) -> str:
    return name.rpartition(".")[0] or name


def _of_features(shape: Shape) -> Shape:
    """One entry for each input feature: dimension 1 of linear and convolution weights; one for a vector."""
    return (1,) * len(shape) if len(shape) < 2 else tuple(size if dim == 1 else 1 for dim, size in enumerate(shape))


# For each granularity: the hyperparameter's name below its own (empty: its own), and its shape for a parameter's.
GRANULARITIES: dict[str, tuple[Callable[[str], str], Callable[[Shape], Shape]]] = {
    "shared": (lambda name: "", lambda shape: ()),
    "per_layer": (_layer, lambda shape: ()),
    "per_tensor": (lambda name: name, lambda shape: ()),
    "per_feature": (lambda name: name, _of_features),
    "per_weight": (lambda name: name, lambda shape: shape),
}


@dataclass(frozen=True)
class Broadcast:
    """Which hyperparameter belongs to which parameter tensor.

    Attributes:
        owners: for each parameter, the dotted name of its hyperparameter.
        shapes: for each hyperparameter, its shape; it broadcasts against its parameters.

    Example:
        >>> params = {"layer0.weight": torch.ones(3, 4), "layer0.bias": torch.zeros(3), "layer1.weight": torch.ones(1, 3)}
        >>> per_layer = Broadcast.of("penalty", "per_layer", params)
        >>> per_layer.start(0.1)
        {'penalty.layer0': tensor(0.1000), 'penalty.layer1': tensor(0.1000)}
        >>> {name: tuple(value.shape) for name, value in per_layer.expand(per_layer.start(0.1)).items()}
        {'layer0.weight': (), 'layer0.bias': (), 'layer1.weight': ()}
        >>> Broadcast.of("penalty", {"weights": "*.weight", "biases": "*.bias"}, params).owners["layer0.bias"]
        'penalty.biases'
    """

    owners: Mapping[str, str]
    shapes: Mapping[str, Shape]

    @classmethod
    def of(cls, name: str, granularity: str | Groups, params: Mapping[str, Tensor]) -> Broadcast:
        """Match hyperparameters with parameters.

        Args:
            name: of the hyperparameter; those below it get dotted names, unless there is only one.
            granularity: `shared`, `per_layer` (a layer is what stands before the last dot), `per_tensor`, `per_feature`
                (dimension 1 of weights), `per_weight`, or groups: a dictionary from names to patterns of parameter
                names such as `*.weight`, of which the first that fits counts.
            params: the parameters that it applies to.

        Raises:
            UsageError: no such granularity, a group that fits no parameter, or a parameter that fits no group.
        """
        if not params:
            raise UsageError(f"'{name}' was expected to apply to parameters, but there are none.")
        if isinstance(granularity, Mapping):
            suffixes = {key: _group(key, granularity, name) for key in params}
            for group in granularity:
                if group not in suffixes.values():
                    raise UsageError(f"group '{group}' of '{name}' fits none of the parameters {', '.join(params)}.")
            shape_of: Callable[[Shape], Shape] = GRANULARITIES["shared"][1]
        elif isinstance(granularity, str) and granularity in GRANULARITIES:  # a list cannot even be looked up
            suffix_of, shape_of = GRANULARITIES[granularity]
            suffixes = {key: suffix_of(key) for key in params}
        else:
            hint = nearest(str(granularity), GRANULARITIES, "choose one of them.")
            raise UsageError(
                f"'{name}' was expected to be {', '.join(GRANULARITIES)} or groups, but is '{granularity}': {hint}"
            )
        if len(params) == 1 and not isinstance(granularity, Mapping):
            suffixes = dict.fromkeys(params, "")
        owners = {key: f"{name}.{suffix}" if suffix else name for key, suffix in suffixes.items()}
        shapes = {owner: shape_of(tuple(params[key].shape)) for key, owner in owners.items()}
        return cls(owners, shapes)

    def start(self, value: float, like: Tensor | None = None) -> TensorDict:
        """Hyperparameters that all have the same value, in the dtype and on the device of `like`."""
        dtype, device = (None, None) if like is None else (like.dtype, like.device)
        return {name: torch.full(shape, value, dtype=dtype, device=device) for name, shape in self.shapes.items()}

    def expand(self, hparams: Mapping[str, Tensor]) -> TensorDict:
        """For each parameter the hyperparameter that belongs to it, ready to be multiplied with it; differentiable."""
        return {key: hparams[owner] for key, owner in self.owners.items()}


def _group(key: str, groups: Groups, name: str) -> str:
    """The first group with a pattern that fits a parameter's name."""
    for group, patterns in groups.items():
        if any(fnmatchcase(key, pattern) for pattern in ([patterns] if isinstance(patterns, str) else patterns)):
            return group
    raise UsageError(
        f"parameter '{key}' belongs to no group of '{name}', which has {', '.join(groups)}: add a pattern that fits it, "
        "for instance '*' in a last group."
    )
