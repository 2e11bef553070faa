"""What an inner solver sees of a problem: values and gradients on plain vectors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.autodiff import in_transform, value_and_gradient
from bilevel.errors import UsageError

Hparams = Mapping[str, Tensor]


@dataclass(frozen=True)
class Objective:
    """An inner problem for one batch of data.

    Attributes:
        loss: `(params, hparams) -> (*batch,)`, one value for each system; None when there is only an optimality.
        optimality: `(params, hparams) -> (*batch, n)`, zero at the solution; None means the gradient of the loss.
    """

    loss: Callable[[Tensor, Hparams], Tensor] | None = None
    optimality: Callable[[Tensor, Hparams], Tensor] | None = None

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
        loss = self.loss
        return value_and_gradient(lambda x: loss(x, hparams), params)

    def gradient(self, params: Tensor, hparams: Hparams) -> Tensor:
        """The optimality, or the gradient of the loss."""
        if self.optimality is None:
            return self.value_and_gradient(params, hparams)[1]
        if in_transform() or torch.is_grad_enabled():
            return self.optimality(params, hparams)
        with torch.enable_grad():  # the optimality may itself take a gradient
            return self.optimality(params.detach(), hparams).detach()
