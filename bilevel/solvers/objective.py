"""What an inner solver sees of a problem: values and gradients on plain vectors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bilevel.autodiff import in_transform, value_and_gradient
from bilevel.errors import UsageError

Hparams = Mapping[str, Tensor]


@dataclass(frozen=True)
class Anchored:
    """A loss that holds `params` near a centre: a term `½ Σ strength (params - centre)²`, and the rest.

    Attributes:
        rest: `(params, hparams) -> (*batch,)`, the loss without the term.
        term: `hparams -> (strength, centre)`, a number or `(n,)`, and `(n,)`.
    """

    rest: Callable[[Tensor, Hparams], Tensor]
    term: Callable[[Hparams], tuple[Tensor, Tensor]]

    def value(self, params: Tensor, hparams: Hparams) -> Tensor:
        """Of each system, `(*batch,)`."""
        strength, centre = self.term(hparams)
        return (strength * (params - centre).square()).sum(-1) / 2

    def gradient(self, params: Tensor, hparams: Hparams, others: Tensor | None = None) -> Tensor:
        """`strength (params - centre)`, added to what is given, in two passes over it."""
        strength, centre = self.term(hparams)
        if others is None:
            return strength * (params - centre)
        return torch.addcmul(others, strength, params).addcmul_(strength, centre, value=-1)


class Compiled(Protocol):
    """Value and gradient by machine code.

    Attributes:
        fallback: why there was none at the latest point, a sentence.
    """

    fallback: str | None

    def __call__(self, params: Tensor, hparams: Hparams, /) -> tuple[Tensor, ...] | None:
        """Both detached; None where they have to be evaluated as they are written."""


@dataclass(frozen=True)
class Objective:
    """An inner problem for one batch of data.

    Attributes:
        loss: `(params, hparams) -> (*batch,)`, one value for each system; None when there is only an optimality.
        optimality: `(params, hparams) -> (*batch, n)`, zero at the solution; None means the gradient of the loss.
        anchored: what of the loss is `½ Σ strength (params - centre)²`, with the rest of it; None where nothing is known to
            be. Its gradient then is no matter of autograd, for which it would be as much work as a small network.
        compiled: value and gradient, or the optimality, as machine code, for where no derivative is recorded.
        restricted: `kept (n,) -> objective` of the entries that a mask keeps, with all others zero; None where the problem has
            no shorter way to evaluate it than with all of them.
    """

    loss: Callable[[Tensor, Hparams], Tensor] | None = None
    optimality: Callable[[Tensor, Hparams], Tensor] | None = None
    anchored: Anchored | None = None
    compiled: Compiled | None = None
    restricted: Callable[[Tensor], Objective] | None = None

    def on_entries(self, entries: Tensor, params: Tensor) -> Objective:
        """The loss as a function of some entries, with the others where they are.

        Args:
            entries: their numbers in order, `(m,)`.
            params: the others' values, `(*batch, n)`.
        """
        assert self.loss is not None
        loss, kept = self.loss, torch.zeros(params.shape[-1], dtype=torch.bool, device=params.device)
        kept[entries] = True
        if self.restricted is not None and not bool(params[..., ~kept].any()):
            return self.restricted(kept)
        return Objective(lambda x, hparams: loss(params.index_copy(-1, entries, x), hparams))

    def value(self, params: Tensor, hparams: Hparams) -> Tensor:
        """The loss of each system, `(*batch,)`.

        Raises:
            UsageError: the problem is not a minimisation.
        """
        if self.loss is None:
            raise UsageError("this inner solver needs inner_loss, but the problem defines only optimality.")
        return self.loss(params, hparams)

    def value_and_gradient(self, params: Tensor, hparams: Hparams) -> tuple[Tensor, Tensor]:
        """Value and gradient; recorded when gradients are enabled.

        Raises:
            UsageError: the problem is not a minimisation, and this solver needs one.
        """
        if self.loss is None:
            raise UsageError(
                "this inner solver needs inner_loss, but the problem defines only optimality: "
                "use AndersonAcceleration or GradientDescent."
            )
        if (found := self._by_machine_code(params, hparams)) is not None:
            return found
        if self.anchored is not None:
            value, gradient = self._of_rest(params, hparams)
            return value + self.anchored.value(params, hparams), gradient + self.anchored.gradient(params, hparams)
        return _value_and_gradient(self.loss, params, hparams)

    def gradient(self, params: Tensor, hparams: Hparams) -> Tensor:
        """The optimality, or the gradient of the loss."""
        if (found := self._by_machine_code(params, hparams)) is not None:
            return found[1]
        if self.anchored is not None:
            return self.anchored.gradient(params, hparams, self._of_rest(params, hparams)[1])
        if self.optimality is None:
            return self.value_and_gradient(params, hparams)[1]
        if in_transform() or torch.is_grad_enabled():
            return self.optimality(params, hparams)
        with torch.enable_grad():  # the optimality may itself take a gradient
            return self.optimality(params.detach(), hparams).detach()

    def _by_machine_code(self, params: Tensor, hparams: Hparams) -> tuple[Tensor, Tensor] | None:
        if self.compiled is None or torch.is_grad_enabled() or in_transform():
            return None
        found = self.compiled(params, hparams)
        return None if found is None else (found[0], found[1])

    def _of_rest(self, params: Tensor, hparams: Hparams) -> tuple[Tensor, Tensor]:
        """Value and gradient of the loss without the anchor."""
        assert self.anchored is not None
        return _value_and_gradient(self.anchored.rest, params, hparams)


def _value_and_gradient(
    loss: Callable[[Tensor, Hparams], Tensor], params: Tensor, hparams: Hparams
) -> tuple[Tensor, Tensor]:
    """Those of a loss, which must have one value for each system: a sum over them would tie them together."""
    value, gradient = value_and_gradient(lambda x: loss(x, hparams), params)
    if value.shape != params.shape[:-1]:
        raise UsageError(
            f"the loss of params of shape {tuple(params.shape)} was expected to have shape {tuple(params.shape[:-1])}, a "
            f"value for each system, but has {tuple(value.shape)}."
        )
    return value, gradient
