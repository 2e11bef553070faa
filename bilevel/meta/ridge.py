r"""A ridge regression as the head of a network, solved for each task and differentiated implicitly (R2D2)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from bilevel.constraints import Constraint, Positive
from bilevel.data import Examples, TaskSource
from bilevel.errors import UsageError
from bilevel.meta.few_shot import BODY, HEAD, FewShot, under
from bilevel.meta.objectives import TaskObjective
from bilevel.models import FeatureNetwork
from bilevel.tree import TensorDict

Tensors = Mapping[str, Tensor]


class RidgeFewShot(FewShot):
    r"""Learn features on which a ridge regression of the support set predicts the query set.

    With support features `Z` (S, D) and targets `Y` (S, O) the weights `W = Z^T A` of the regression follow from its dual
    variable, which is what adapts: `A` minimises `tr(A^T (Z Z^T + penalty I) A) / 2 - tr(A^T Y)`, a quadratic of `S O` unknowns
    however many features there are. Predictions are `scale Z_query Z^T A`; body, penalty and scale are learned.

    Args:
        tasks: where tasks come from.
        network: a `FeatureNetwork`; its head is not used.
        objective: loss and score of a task.
        num_tasks: tasks in an outer step.
        tasks_at_once: tasks whose query losses are differentiated at a time.
        seed: of the starting weights and of the tasks.
        penalty: starting value of the ridge penalty, in units of squared features.
        scale: starting value of the scale of predictions.

    Reference: Bertinetto, Henriques, Torr and Vedaldi (2019), "Meta-learning with differentiable closed-form solvers".
    """

    constraints: ClassVar[Mapping[str, Constraint]] = {"penalty": Positive(), "scale": Positive()}
    network: FeatureNetwork
    needs_features = True

    def __init__(
        self,
        tasks: TaskSource,
        network: FeatureNetwork,
        objective: TaskObjective | None = None,
        num_tasks: int = 16,
        tasks_at_once: int | None = 2,
        seed: int = 0,
        penalty: float = 1.0,
        scale: float = 1.0,
    ) -> None:
        """Look at a task for the sizes."""
        super().__init__(tasks, network, objective, num_tasks, tasks_at_once, seed)
        for name, value in (("penalty", penalty), ("scale", scale)):
            if not (isinstance(value, int | float) and 0 < value < math.inf):
                raise UsageError(f"RidgeFewShot needs {name} > 0, a number, but got {value!r}.")
        self.penalty_start, self.scale_start = penalty, scale
        targets = tasks.draw("train", 1, seed, 0).support.targets
        self.num_support, self.num_outputs = targets.shape[1], len(self.start["head.bias"])

    def init_hparams(self) -> dict[str, Any]:
        """The body, the penalty, and how predictions are scaled."""
        like = self.start["head.bias"]
        body = {name: value for name, value in self.start.items() if name not in HEAD}
        number = like.new_full
        return {
            BODY: body,
            "penalty": number((), self.penalty_start),
            "scale": number((), self.scale_start),
        }

    def init_params(self, hparams: Tensors) -> TensorDict:
        """Zeros: the problem is a quadratic."""
        return {"dual": self.start["head.bias"].new_zeros(self.num_support, self.num_outputs)}

    def inner_loss(self, params: Tensors, hparams: Tensors, batch: Examples) -> Tensor:
        """The dual objective of the regression."""
        features, dual = self._features(hparams, batch.inputs), params["dual"]
        targets = self.objective.regression_targets(batch.targets, dual, self.num_outputs)
        image = features @ (features.mT @ dual) + hparams["penalty"] * dual
        return (dual * (0.5 * image - targets)).sum((-2, -1))

    def predict(self, params: Tensors, hparams: Tensors, support: Examples, inputs: Tensor) -> Tensor:
        """`scale Z Z_support^T A`."""
        weights = self._features(hparams, support.inputs).mT @ params["dual"]  # (*batch, D, O)
        return hparams["scale"] * (self._features(hparams, inputs) @ weights)

    def lower_curvature(self, hparams: Tensors) -> float:
        """The penalty: the quadratic's other part is positive semi-definite."""
        return float(hparams["penalty"])

    def _features(self, hparams: Tensors, inputs: Tensor) -> Tensor:
        return self.network.features(under(BODY, hparams), inputs)
