"""What as many real images are worth, drawn at random: the measure of distilled ones."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from bilevel.data.fashion_mnist import CLASSES
from bilevel.errors import UsageError
from bilevel.problems.distillation import NUM_CLASSES, Distillation
from bilevel.rng import generator
from bilevel.solvers import LBFGS, Objective, run
from bilevel.tree import Layout


class RandomImages:
    """A callback that trains on as many real images, drawn at random with equal shares of the classes, after a run.

    Each draw is trained on with every penalty of a grid, and the penalty is the one with the least mean loss on the real
    training images of the outer loss; the accuracy is that on the test images.

    Args:
        num_draws: of the images.
        num_points: size of the grid of penalties.
        low: smallest penalty.
        high: largest penalty.
        atol: gradient norm to which everything is trained.
        seed: of the draws.
    """

    def __init__(
        self,
        num_draws: int = 20,
        num_points: int = 5,
        low: float = 1e-4,
        high: float = 1.0,
        atol: float = 1e-4,
        seed: int = 0,
    ) -> None:
        """Check the settings; nothing is trained before the run has ended."""
        if num_draws < 1 or num_points < 1 or not 0 < low <= high:
            raise UsageError(
                "RandomImages needs num_draws >= 1, num_points >= 1 and 0 < low <= high, but got "
                f"{num_draws}, {num_points}, {low} and {high}."
            )
        self.num_draws, self.seed = num_draws, seed
        self.penalties = torch.tensor(np.geomspace(high, low, num_points))
        self.solver = LBFGS(max_steps=1000, atol=atol)

    def on_start(self, run: Any) -> None:
        """Look whether images are distilled."""
        problem = run.setup.problem.problem
        if not isinstance(problem, Distillation):
            raise UsageError(f"RandomImages belongs to Distillation, but the problem is {type(problem).__name__}.")
        self.problem = problem

    def on_step(self, record: dict[str, Any], hparams: dict[str, Tensor]) -> None:
        """Nothing to do."""

    def on_end(self, summary: dict[str, Any]) -> None:
        """Train and compare; not where a run was cut short, which will go on."""
        if not summary["finished"] or not summary["best"]:
            return
        started = time.perf_counter()
        penalty, accuracy = self.accuracies()
        ours, number = summary["best"]["metrics.test_accuracy"], len(self.problem.labels)
        summary["distilled"] = {
            "labels": [CLASSES[label] for label in self.problem.labels.tolist()],
            "accuracy": ours,
            "random": accuracy.tolist(),
            "random_penalty": penalty,
            "above": ours - float(accuracy.mean()),
            "seconds": time.perf_counter() - started,
        }
        spread = f" ± {float(accuracy.std()):.3f}" if len(accuracy) > 1 else ""
        summary["baseline"] = {
            "name": f"test accuracy after training on {number} images",
            "columns": ["trained on", "test accuracy", "the largest", "its penalty"],
            "rows": [
                [
                    f"real images, {len(accuracy)} random draws",
                    f"{float(accuracy.mean()):.4f}{spread}",
                    f"{float(accuracy.max()):.4f}",
                    f"{penalty:.1e}",
                ]
            ],
        }

    def accuracies(self) -> tuple[float, Tensor]:
        """The penalty that is best for the draws, and the test accuracy of each with it, `(num_draws,)`."""
        problem = self.problem
        chosen = self._draws()
        layout, penalties = Layout.of(problem.origin), self.penalties.to(problem.x_train)
        centre = layout.ravel(problem.origin)
        x, y = problem.x_train[chosen], problem.labels.expand(len(chosen), -1)  # (D, N, ...), (D, N)
        network = torch.vmap(problem.network)
        losses, rights = [], []
        for penalty in penalties:

            def loss(params: Tensor, hparams: Any, penalty: Tensor = penalty) -> Tensor:
                scores = network(layout.unravel(params), x)
                each = cross_entropy(scores.movedim(-1, 1), y, reduction="none").mean(-1)
                return each + 0.5 * penalty * (params - centre).square().sum(-1)

            trained = run(self.solver, Objective(loss), centre.expand(len(chosen), -1).clone(), {}).params
            with torch.no_grad():
                pairs = [self._worth(layout.unravel(params)) for params in trained]
            losses.append(sum(value for value, _ in pairs) / len(pairs))
            rights.append(torch.tensor([right for _, right in pairs], dtype=torch.float64))
        best = int(np.argmin(losses))
        return float(penalties[best]), rights[best]

    def _worth(self, params: dict[str, Tensor]) -> tuple[float, float]:
        """Loss on the real training images and accuracy on the test images."""
        problem = self.problem
        loss = float(cross_entropy(problem.network(params, problem.x_train), problem.y_train))
        right = problem.network(params, problem.x_test).argmax(-1) == problem.y_test
        return loss, float(right.double().mean())

    def _draws(self) -> Tensor:
        """Numbers of the images of each draw, in the order of the distilled ones' classes, `(num_draws, N)`."""
        problem, source = self.problem, generator(self.seed)
        count = len(problem.labels) // NUM_CLASSES
        draws = []
        for _ in range(self.num_draws):
            order = torch.randperm(len(problem.y_train), generator=source).to(problem.y_train.device)
            by_class = [order[problem.y_train[order] == label][:count] for label in range(NUM_CLASSES)]
            if any(len(one) < count for one in by_class):
                raise UsageError(
                    f"RandomImages needs {count} real images of each class, but problem.num_train leaves fewer: take more."
                )
            draws.append(torch.stack(by_class, 1).flatten())
        return torch.stack(draws)
