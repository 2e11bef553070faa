"""What people do without hypergradients: scikit-learn on a grid of penalties, on the same split and the same objective."""

from __future__ import annotations

import time
import warnings
from typing import Any

import numpy as np

from bilevel.data import Split, load_digits


def sklearn_c(penalty: float, num_examples: int) -> float:
    """Scikit-learn's `C` for a penalty: `mean CE + λ ‖w‖² / 2` is `C Σ CE + ‖w‖² / 2` with `C = 1 / (N λ)`, up to a factor.

    Example:
        >>> sklearn_c(0.01, 100)
        1.0
    """
    return 1.0 / (num_examples * penalty)


class DigitsGrid:
    """A callback that puts scikit-learn's best of a grid into the summary, computed in the same run.

    The grid has `num_points` penalties, log-spaced from `low` to `high`; each is fitted to `tolerance`, intercepts
    unpenalised, from the solution of the one before.

    Args:
        num_points: size of the grid.
        low: smallest penalty.
        high: largest penalty.
        tolerance: of scikit-learn's solver (largest entry of the gradient).
        split_seed: of the split; the problem's own.
    """

    def __init__(
        self,
        num_points: int = 100,
        low: float = 1e-6,
        high: float = 1e4,
        tolerance: float = 1e-10,
        split_seed: int = 0,
    ) -> None:
        """Keep the settings; nothing is fitted before the run has ended."""
        self.penalties = np.geomspace(high, low, num_points)
        self.tolerance, self.split_seed = tolerance, split_seed

    def on_start(self, run: Any) -> None:
        """Nothing to do."""

    def on_step(self, record: dict[str, Any], hparams: dict[str, Any]) -> None:
        """Nothing to do."""

    def on_end(self, summary: dict[str, Any]) -> None:
        """Fit the grid and add `summary["baseline"]`."""
        if not summary.get("best"):
            return
        started = time.perf_counter()
        best = self.search()
        seconds = time.perf_counter() - started
        ours, work = summary["best"], summary["work"]
        summary["baseline"] = {
            "name": f"cross-entropy: scikit-learn's grid (best at {best['penalty']:.3g}) and the hypergradient, same split",
            "columns": ["method", "validation", "test", "accuracy", "penalties", "fits", "gradients", "mat-vecs", "time (s)"],
            "rows": [
                [
                    f"grid of {len(self.penalties)}", f"{best['validation_loss']:.6f}", f"{best['test_loss']:.6f}",
                    f"{best['test_accuracy']:.4f}", 1, len(self.penalties), "-", "-", f"{seconds:.1f}",
                ],
                [
                    f"hypergradient, step {ours['step']}", f"{ours['outer_loss']:.6f}", f"{ours['metrics.test_loss']:.6f}",
                    f"{ours['metrics.test_accuracy']:.4f}", summary["num_hparams"], summary["num_steps"],
                    work["inner_gradients"], work["inner_products"] + work["products"], f"{summary['step_seconds']:.1f}",
                ],
            ],
        }  # fmt: skip
        summary["baseline_figures"] = {**best, "seconds": seconds}

    def search(self) -> dict[str, float]:
        """Penalty, validation loss, test loss and test accuracy of the grid's best point."""
        from sklearn.linear_model import LogisticRegression

        train, validation, test = (_arrays(split) for split in load_digits(self.split_seed))
        # newton-cg reaches 1e-10 within seconds here; lbfgs and newton-cholesky take minutes for the same coefficients.
        model = LogisticRegression(solver="newton-cg", tol=self.tolerance, max_iter=10_000, warm_start=True)
        best: dict[str, float] = {"validation_loss": np.inf}
        for penalty in self.penalties:
            model.C = sklearn_c(float(penalty), len(train[0]))
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore"
                )  # the line search gives up at rounding level, when nothing is left to gain
                model.fit(*train)
            loss = _cross_entropy(model, *validation)
            if loss < best["validation_loss"]:
                best = {
                    "penalty": float(penalty),
                    "validation_loss": loss,
                    "test_loss": _cross_entropy(model, *test),
                    "test_accuracy": float(model.score(*test)),
                }
        return best


def _arrays(split: Split) -> tuple[np.ndarray, np.ndarray]:
    return split.x.double().numpy(), split.y.numpy()


def _cross_entropy(model: Any, x: np.ndarray, y: np.ndarray) -> float:
    return float(-model.predict_log_proba(x)[np.arange(len(y)), y].mean())
