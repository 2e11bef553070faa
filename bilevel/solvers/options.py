"""Options of inner solvers: numbers, or hyperparameters; one may serve all entries of `params`, or several share them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from bilevel.errors import UsageError, nearest
from bilevel.tree import Layout

Shape = tuple[int, ...]
Owners = Mapping[str, str]  # for each tensor of `params` the name of its hyperparameter
Part = TypeVar("Part")


@dataclass(frozen=True)
class Spread:
    """One value for each entry of `params`, out of several hyperparameters; made by `bind`.

    Args:
        parts: for each tensor of `params`, in order, the name of its hyperparameter and the tensor's shape.

    Example:
        >>> rates = Spread((("rate.a", (2,)), ("rate.b", ())))
        >>> rates.value({"rate.a": torch.tensor(0.1), "rate.b": torch.tensor(0.5)})
        tensor([0.1000, 0.1000, 0.5000])
    """

    parts: tuple[tuple[str, Shape], ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Of the hyperparameters."""
        return tuple(dict.fromkeys(name for name, _ in self.parts))

    def value(self, hparams: Mapping[str, Tensor]) -> Tensor:
        """`(n,)`; differentiable."""
        return torch.cat([hparams[name].expand(shape).reshape(-1) for name, shape in self.parts])


Option = float | str | Spread


def option(value: Option, hparams: Mapping[str, Tensor]) -> float | Tensor:
    """A solver's option: the number itself, or what the hyperparameters say.

    Raises:
        UsageError: there is no hyperparameter of that name.
    """
    if isinstance(value, Spread):
        return value.value(hparams)
    if not isinstance(value, str):
        return value
    if value not in hparams:
        raise UsageError(f"a solver's option names the hyperparameter '{value}', but there are only {sorted(hparams)}.")
    return hparams[value]


def hparam_names(owner: Any) -> tuple[str, ...]:
    """The hyperparameters that the options of a solver, or of its parts, name."""
    found: list[str] = []
    for value in vars(owner).values():
        if isinstance(value, str):
            found.append(value)
        elif isinstance(value, Spread):
            found += value.names
        elif is_dataclass(value):
            found += hparam_names(value)
    return tuple(found)


def bind(owner: Part, layout: Layout, hparams: Mapping[str, Tensor], declared: Sequence[Owners] = ()) -> Part:
    """A solver whose options fit the parameters: `rate` stands for `rate.layer0`, `rate.layer1` where those are there.

    A name below the option's fits the parameter tensor of that name, and all tensors whose names go on after a dot behind it;
    of several the longest counts. So hyperparameters per layer, tensor, feature and weight fit (`bilevel.Broadcast`).
    Groups, whose names say nothing of the tensors in them, are to be declared.

    Args:
        owner: the solver, or a part of it.
        layout: of `params`.
        hparams: the hyperparameters that there are.
        declared: for hyperparameters whose names do not say it, which of them each tensor of `params` has.

    Raises:
        UsageError: an option names nothing, or something of a shape that does not fit `params`.
    """
    changes: dict[str, Any] = {}
    for field, value in vars(owner).items():
        if isinstance(value, str):
            changes[field] = _bound(f"{field} of {type(owner).__name__}", value, layout, hparams, declared)
        elif is_dataclass(value) and not isinstance(value, type | Spread):
            changes[field] = bind(value, layout, hparams, declared)
    changes = {field: value for field, value in changes.items() if value is not getattr(owner, field)}
    changed: Any = owner
    return cast(Part, replace(changed, **changes)) if changes else owner


def _bound(
    what: str, name: str, layout: Layout, hparams: Mapping[str, Tensor], declared: Sequence[Owners]
) -> str | Spread:
    below = [one for one in hparams if one.startswith(f"{name}.")]
    if name in hparams:
        shape = tuple(hparams[name].shape)
        if hparams[name].numel() == 1 or shape == (layout.size,):
            return name
        if len(layout.names) == 1:
            return _spread(what, [name], layout, hparams)
        raise UsageError(
            f"{what} was expected to be one number, one for each of the {layout.size} entries of params, or several "
            f"hyperparameters named after params ('{name}.{layout.names[0]}', ...), but '{name}' has shape {shape}."
        )
    if not below:
        hint = nearest(name, hparams, f"give a number, or one of {', '.join(map(repr, sorted(hparams)))}.")
        raise UsageError(f"{what} was expected to be a number or the name of a hyperparameter, but is '{name}': {hint}")
    given: Owners = next((one for one in declared if all(hparam.startswith(f"{name}.") for hparam in one.values())), {})
    if missing := [hparam for hparam in given.values() if hparam not in hparams]:
        raise UsageError(f"{what} is '{name}', whose '{missing[0]}' is declared, but not among the hyperparameters.")
    owners = [given.get(tensor) or _owner(what, name, tensor, below) for tensor in layout.names]
    if unused := [one for one in below if one not in owners]:
        raise UsageError(
            f"{what} is '{name}', but '{unused[0]}' fits none of the parameters {', '.join(layout.names)}."
        )
    return _spread(what, owners, layout, hparams)


def _owner(what: str, name: str, tensor: str, below: Sequence[str]) -> str:
    fitting = [one for one in below if f"{tensor}.".startswith(f"{one[len(name) + 1 :]}.")]
    if not fitting:
        raise UsageError(
            f"{what} is '{name}', but of {', '.join(map(repr, below))} none fits the parameter '{tensor}': name them after "
            "layers or tensors, or declare the groups in the problem's `broadcasts`."
        )
    return max(fitting, key=len)


def _spread(what: str, owners: Sequence[str], layout: Layout, hparams: Mapping[str, Tensor]) -> Spread:
    for owner, tensor, shape in zip(owners, layout.names, layout.shapes, strict=True):
        try:
            hparams[owner].expand(shape)
        except RuntimeError as error:
            raise UsageError(
                f"{what} is '{owner}' of shape {tuple(hparams[owner].shape)}, which does not broadcast to the parameter "
                f"'{tensor}' of shape {shape}."
            ) from error
    return Spread(tuple(zip(owners, layout.shapes, strict=True)))
