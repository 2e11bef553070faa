"""What hyper-cleaning is worth: training by the weights it found, beside training with all and without what is wrong."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from bilevel.data.fashion_mnist import CLASSES
from bilevel.errors import UsageError
from bilevel.models import SoftmaxRegression
from bilevel.problems.hyper_cleaning import HyperCleaning, detection
from bilevel.solvers import LBFGS, Objective, run
from bilevel.tree import Layout, TensorDict

EXAMPLES = "examples.safetensors"
Tensors = Mapping[str, Tensor]


class Learner(NamedTuple):
    """A network trained with the best of some penalties.

    Attributes:
        name: what it was trained on.
        size: number of examples, those with a weight counted by it.
        num_wrong: of them, labelled wrongly.
        penalty: the best one.
        accuracy: on the test images.
    """

    name: str
    size: float
    num_wrong: float
    penalty: float
    accuracy: float


class CleaningComparison:
    """A callback that trains by the learned weights after a run, and on what there was without cleaning.

    Learners are trained on the training examples as they are, on the validation examples, on both, each training example with
    the mean of the learned weights (what weighing validation examples more is worth), on both (the floor), on both with each
    training example as its weight has it (`cleaned`), and on the validation examples with those that are labelled rightly (the
    ceiling, which nobody knows), with the loss `mean CE + λ ‖x - x₀‖² / 2`, the mean weighted. Each has its best `λ` of a grid
    by cross-validation on its own examples with their weights: the one with the most of them right, each by the learner of the
    folds that it is not in. (Validation examples alone would leave more of the choice to chance.) The summary gets
    a table, and the share of the gap from floor to ceiling that cleaning closes.

    Args:
        num_points: size of the grid.
        low: smallest penalty.
        high: largest penalty.
        num_folds: of a learner's examples.
        atol: gradient norm to which everything is trained.
        num_pictures: least trusted training examples that the report shows.
    """

    def __init__(
        self,
        num_points: int = 7,
        low: float = 3e-4,
        high: float = 1e-2,
        num_folds: int = 3,
        atol: float = 1e-3,
        num_pictures: int = 40,
    ) -> None:
        """Check the settings; nothing is trained before the run has ended."""
        if num_points < 1 or not 0 < low <= high:
            raise UsageError(
                f"CleaningComparison needs num_points >= 1 and 0 < low <= high, but got {num_points}, {low} and {high}."
            )
        if num_folds < 2 or num_pictures < 0:
            raise UsageError(
                f"CleaningComparison needs num_folds >= 2 and num_pictures >= 0, but got {num_folds} and {num_pictures}."
            )
        self.penalties = torch.tensor(np.geomspace(high, low, num_points))
        self.num_folds, self.num_pictures = num_folds, num_pictures
        self.solver = LBFGS(max_steps=1000, atol=atol, history=150)  # a third of the steps of twenty

    def on_start(self, run: Any) -> None:
        """Look whether there is something to compare."""
        problem = run.setup.problem.problem
        if not isinstance(problem, HyperCleaning):
            raise UsageError(
                f"CleaningComparison belongs to HyperCleaning, but the problem is {type(problem).__name__}."
            )
        self.run, self.problem = run, problem

    def on_step(self, record: dict[str, Any], hparams: dict[str, Tensor]) -> None:
        """Nothing to do."""

    def on_end(self, summary: dict[str, Any]) -> None:
        """Train and compare; not where a run was cut short, which will go on."""
        if not summary["finished"] or not summary["best"]:
            return
        started, weight = time.perf_counter(), self.run.best().hparams["weight"].detach()
        learners = self.learners(weight)
        floor, cleaned, ceiling = (learner.accuracy for learner in learners[-3:])
        summary["cleaning"] = {
            "floor": floor,
            "cleaned": cleaned,
            "ceiling": ceiling,
            "gap_closed": (cleaned - floor) / (ceiling - floor) if ceiling > floor else None,
            **detection(weight, self.problem.corrupted),
            "classes": list(CLASSES),
            "seconds": time.perf_counter() - started,
        }
        summary["baseline"] = {
            "name": "training with and without cleaning, each with its best penalty",
            "columns": ["trained on", "examples", "labelled wrongly", "penalty", "test accuracy"],
            "rows": [
                [one.name, f"{one.size:,.0f}", f"{one.num_wrong:,.0f}", f"{one.penalty:.1e}", f"{one.accuracy:.4f}"]
                for one in learners
            ],
        }
        if self.run.directory is not None:
            save_file(self._examples(weight), Path(self.run.directory) / EXAMPLES)

    def learners(self, weight: Tensor) -> list[Learner]:
        """All of them; the last three are floor, cleaned and ceiling.

        Args:
            weight: of the training examples, `(N,)`.
        """
        everything, right = torch.ones_like(weight), (~self.problem.corrupted).to(weight)
        return [
            self._learner("all as labelled", everything, validation=False),
            self._learner("validation", 0 * everything),
            self._learner("validation, all at their mean weight", weight.mean() * everything),
            self._learner("validation, all as labelled (floor)", everything),
            self._learner("validation, all by their weights (cleaned)", weight),
            self._learner("validation, all that are right (ceiling)", right),
        ]

    def _learner(self, name: str, weight: Tensor, *, validation: bool = True) -> Learner:
        problem, penalties = self.problem, self.penalties.to(self.problem.x)
        chosen = weight > 0
        x, y, members = problem.x[chosen], problem.y[chosen], weight[chosen]
        if validation:
            x = torch.cat([x, problem.x_validation, problem.x_holdout])
            y = torch.cat([y, problem.y_validation, problem.y_holdout])
            members = torch.cat([members, members.new_ones(len(y) - len(members))])
        fold = torch.arange(len(y), device=y.device) % self.num_folds
        left_out = torch.stack([fold == number for number in range(self.num_folds)])  # (F, N)
        trained_on = (members * ~left_out).repeat(len(penalties), 1)  # all penalties and folds at once
        params = self._trained(x, y, trained_on, penalties.repeat_interleave(self.num_folds))
        right = self._is_right(params, x, y).unflatten(0, (-1, self.num_folds)) & left_out  # (P, F, N)
        best = penalties[(right * members).sum((1, 2)).argmax()].reshape(1)
        params = self._trained(x, y, members.unsqueeze(0), best)
        accuracy = self._is_right(params, problem.x_test, problem.y_test).double().mean()
        return Learner(name, float(members.sum()), float(weight[problem.corrupted].sum()), float(best), float(accuracy))

    def _trained(self, x: Tensor, y: Tensor, members: Tensor, penalties: Tensor) -> TensorDict:
        """Weights of networks that are trained side by side, each on examples weighted otherwise and with a penalty of its own.

        Args:
            x: inputs `(N, ...)`.
            y: classes `(N,)`.
            members: the weights of the examples for each, `(B, N)`.
            penalties: `(B,)`.
        """
        origin, layout = self.problem.origin, Layout.of(self.problem.origin)
        centre = layout.ravel(origin)
        shares = members / members.sum(-1, keepdim=True)

        def loss(params: Tensor, hparams: Tensors) -> Tensor:
            scores = self._scores(layout.unravel(params), x)  # (B, N, O)
            each = cross_entropy(scores.movedim(-1, 1), y.expand(len(scores), -1), reduction="none")
            return (shares * each).sum(-1) + 0.5 * penalties * (params - centre).square().sum(-1)

        return layout.unravel(run(self.solver, Objective(loss), centre.expand(len(penalties), -1).clone(), {}).params)

    def _scores(self, params: TensorDict, x: Tensor) -> Tensor:
        """Of several networks for the same inputs, `(B, N, O)`."""
        network = self.problem.network
        shared = isinstance(network, SoftmaxRegression)  # takes inputs that all networks share, in one product
        outputs: Tensor = network(params, x) if shared else torch.vmap(network, (0, None))(params, x)
        return outputs

    def _is_right(self, params: TensorDict, x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            return self._scores(params, x).argmax(-1) == y

    def _examples(self, weight: Tensor) -> dict[str, Tensor]:
        """All weights and labels, and the images of the least trusted examples, for the report."""
        problem = self.problem
        order = weight.argsort()[: self.num_pictures]
        tensors = {
            "weight": weight,
            "label": problem.y,
            "true_label": problem.y_true,
            "shown": order,
            "images": problem.x[order],
        }
        return {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
