"""What a learned weighting is worth: the same training with equal weights, and what the weighting looks like."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from bilevel.batches import StepBatches
from bilevel.data.fashion_mnist import CLASSES
from bilevel.errors import UsageError
from bilevel.problems.fashion import NUM_CLASSES
from bilevel.problems.reweighting import Reweighting


class WeightingComparison:
    """A callback that makes the run's inner steps again after it, on the same minibatches, with equal weights.

    Of both the step counts that is best by what the run compares steps by: the outer loss where it compares, the metric of
    `trainer.monitor`, or else the latest one. The summary gets a table of test accuracies, and for the report under `weighting`
    the weight by loss, and for each class its training images, their mean weight at the best step and the accuracies on its
    test images.

    Args:
        num_points: of the curve, at even quantiles of the training images' losses.
    """

    def __init__(self, num_points: int = 50) -> None:
        """Check the number."""
        if num_points < 2:
            raise UsageError(f"WeightingComparison needs num_points >= 2, but got {num_points}.")
        self.num_points = num_points

    def on_start(self, run: Any) -> None:
        """Look whether there is a weighting."""
        problem = run.setup.problem.problem
        if not isinstance(problem, Reweighting):
            raise UsageError(
                f"WeightingComparison belongs to Reweighting, but the problem is {type(problem).__name__}."
            )
        self.run, self.problem = run, problem

    def on_step(self, record: dict[str, Any], hparams: dict[str, Tensor]) -> None:
        """Nothing to do."""

    def on_end(self, summary: dict[str, Any]) -> None:
        """Train and compare; not where a run was cut short, which will go on."""
        if not summary["finished"] or not summary["best"]:
            return
        problem, flat, best = self.problem, self.run.setup.problem, self.run.best()
        found = {
            "learned": flat.unravel(best.params),
            "equal": flat.unravel(self.equally_weighted(summary["num_steps"], summary["monitor"])),
        }
        summary["baseline"] = {
            "name": "the same training with equal weights",
            "columns": ["weights", "test accuracy", "of the rarest classes"],
            "rows": [
                [name, f"{figures['test_accuracy']:.4f}", f"{figures['rare_accuracy']:.4f}"]
                for name, figures in ((name, problem.metrics(params, {})) for name, params in found.items())
            ],
        }
        with torch.no_grad():
            losses = cross_entropy(problem.network(found["learned"], problem.x), problem.y, reduction="none")
            weights = problem.weights(losses, best.hparams)
            points = losses.quantile(torch.linspace(0, 1, self.num_points).to(losses))
            curve = problem.weights(points, best.hparams)
            right = {
                name: problem.network(params, problem.x_test).argmax(-1) == problem.y_test
                for name, params in found.items()
            }
        summary["weighting"] = {
            "losses": points.tolist(),
            "weights": curve.tolist(),
            "classes": [
                {
                    "name": CLASSES[label],
                    "images": int(problem.counts[label]),
                    "weight": float(weights[problem.y == label].mean()),
                    **{name: float(each[problem.y_test == label].double().mean()) for name, each in right.items()},
                }
                for label in range(NUM_CLASSES)
            ],
        }

    def equally_weighted(self, num_steps: int, monitor: str | None) -> Tensor:
        """Params of the best step with a weighting that is the same for all losses.

        Args:
            num_steps: outer steps of the run.
            monitor: the metric that steps compare by; None for the outer loss.
        """
        setup = self.run.setup
        flat, method = setup.problem, setup.method
        # A network of zeros gives the same to every loss.
        equal = {name: torch.zeros_like(value) for name, value in self.run.hparams.items()}
        params = flat.start(equal).detach()
        best, least = params, float("inf")
        state = method.init(flat, setup.solver, params, equal)
        for step in range(num_steps):
            made = method.compute(flat, setup.solver, params, equal, StepBatches(self.problem, step), state)
            params, state = made.params, made.state
            figure = made.outer_loss
            if monitor is not None:
                figure = self.problem.metrics(flat.unravel(params), equal)[monitor]
            if figure < least or not (monitor or flat.is_comparable):
                best, least = params, figure
        return best
