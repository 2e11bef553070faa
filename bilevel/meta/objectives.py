"""What tasks are about: the loss of a task's outputs, and the figure that its result is reported by."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import cross_entropy, normalize, one_hot

from bilevel.data import Episode
from bilevel.errors import UsageError


class TaskObjective(ABC):
    """Loss and score of outputs `(*batch, N, O)` for targets, each of shape `(*batch,)`.

    Attributes:
        score_name: what the score is called.
        higher_is_better: whether a larger score is better.
        floor_name: what the score is compared with.
    """

    score_name: ClassVar[str]
    higher_is_better: ClassVar[bool]
    floor_name: ClassVar[str]

    @abstractmethod
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean loss over a task's examples."""

    @abstractmethod
    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean score over a task's examples."""

    @abstractmethod
    def floor(self, episode: Episode) -> Tensor:
        """Score of each task of what learns nothing from other tasks, `(T,)`; `floor_name` says what that is."""

    @abstractmethod
    def regression_targets(self, targets: Tensor, like: Tensor, num_outputs: int) -> Tensor:
        """Targets for least squares, `(*batch, N, O)`, in the dtype of another tensor."""


@dataclass(frozen=True)
class Classification(TaskObjective):
    """Cross-entropy of class labels `(*batch, N)`, and accuracy.

    Example:
        >>> import torch
        >>> Classification().score(torch.eye(3), torch.tensor([0, 1, 0]))
        tensor(0.6667)
    """

    score_name: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True
    floor_name: ClassVar[str] = "nearest support image (cosine of pixels)"

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy, nats."""
        each = cross_entropy(outputs.reshape(-1, outputs.shape[-1]), targets.reshape(-1), reduction="none")
        return each.view(targets.shape).mean(-1)

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Share of examples whose largest output is that of their label; outputs that are not numbers are wrong."""
        right = (outputs.argmax(-1) == targets) & ~outputs.isnan().any(-1)  # argmax takes NaN for the largest
        return right.to(outputs.dtype).mean(-1)

    def floor(self, episode: Episode) -> Tensor:
        """Accuracy of taking the label of the support input with the largest cosine."""
        support, query = (normalize(part.inputs.flatten(2), dim=-1) for part in (episode.support, episode.query))
        nearest = (query @ support.mT).argmax(-1)  # (T, N)
        return (episode.support.targets.gather(1, nearest) == episode.query.targets).to(query.dtype).mean(-1)

    def regression_targets(self, targets: Tensor, like: Tensor, num_outputs: int) -> Tensor:
        """Indicators of the labels."""
        return one_hot(targets, num_outputs).to(like.dtype)


@dataclass(frozen=True)
class Regression(TaskObjective):
    """Mean squared error of targets `(*batch, N, O)`, which is the score as well."""

    score_name: ClassVar[str] = "mse"
    higher_is_better: ClassVar[bool] = False
    floor_name: ClassVar[str] = "mean of the support targets"

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean squared error, in the targets' units squared.

        Raises:
            UsageError: the shapes differ, which would be broadcast in silence.
        """
        if outputs.shape != targets.shape:
            raise UsageError(
                f"outputs were expected to have the shape of the targets, {tuple(targets.shape)}, but have "
                f"{tuple(outputs.shape)}: give the network as many outputs as a target has numbers."
            )
        return (outputs - targets).square().mean((-2, -1))

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The same."""
        return self.loss(outputs, targets)

    def floor(self, episode: Episode) -> Tensor:
        """Error of a constant."""
        targets = episode.query.targets
        return self.score(episode.support.targets.mean(1, keepdim=True).expand_as(targets), targets)

    def regression_targets(self, targets: Tensor, like: Tensor, num_outputs: int) -> Tensor:
        """The targets."""
        return targets.to(like.dtype)
