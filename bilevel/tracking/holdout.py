"""An alarm for an outer loop that overfits the examples which it validates on."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bilevel.errors import UsageError
from bilevel.tracking.jsonl import read_metrics

if TYPE_CHECKING:
    from torch import Tensor

    from bilevel.trainer.callbacks import RunStart

__all__ = ["HoldoutAlarm"]


class HoldoutAlarm:
    """Compare the outer loss with the loss on examples that it leaves out; say so when only the former still falls.

    Hyperparameters are fitted to the outer loss as parameters are to the inner one, and as many of them as there are
    validation examples can fit these by heart. A problem that leaves some out and has their loss among its `metrics` can be
    watched: where that loss has risen by a share `rise` above its least value, which is at least `patience` steps old, while
    the outer loss is below what it was then, records get `overfitting`: the step and the loss at the least value, and the loss
    now. Console and report tell of it. Nothing is stopped or chosen: that would make it a part of the validation.

    Args:
        metric: the loss on what is left out, by its name among the problem's metrics.
        rise: share of the least value.
        patience: steps.

    Raises:
        UsageError: a number is out of its range; the problem has no such metric.

    Example:
        >>> alarm = HoldoutAlarm(rise=0.1, patience=1)
        >>> records = [{"step": k, "outer_loss": 1 / (k + 1), "metrics.holdout_loss": (k - 2) ** 2 + 1.0} for k in range(5)]
        >>> for record in records:
        ...     alarm.on_step(record, {})
        >>> ["overfitting" in record for record in records], records[-1]["overfitting"]
        ([False, False, False, True, True], {'best_step': 2, 'best_loss': 1.0, 'loss': 5.0})
    """

    def __init__(self, metric: str = "holdout_loss", rise: float = 0.01, patience: int = 3) -> None:
        """Nothing has been seen yet."""
        if not rise >= 0 or patience < 1:
            raise UsageError(
                f"HoldoutAlarm needs rise >= 0 and patience >= 1, but got rise={rise} and patience={patience}."
            )
        self.metric, self.rise, self.patience = metric, rise, patience
        self._best: tuple[float, int, float] | None = None  # least loss, its step, the outer loss there

    def on_start(self, run: RunStart) -> None:
        """See the steps of a resumed run again."""
        self._best = None
        if run.directory is not None and run.step > 0:
            for record in read_metrics(Path(run.directory) / "metrics.jsonl"):
                if record.get("step", run.step) < run.step:
                    self._see(record)

    def on_step(self, record: dict[str, Any], hparams: dict[str, Tensor]) -> None:
        """Add `overfitting` to the record where it is so."""
        found = self._see(record)
        if found is not None:
            record["overfitting"] = found

    def on_end(self, summary: dict[str, Any]) -> None:
        """Add the step with the least loss on what is left out."""
        if self._best is not None:
            least, step, _ = self._best
            summary["holdout"] = {"metric": self.metric, "best_step": step, "best_loss": least}

    def _see(self, record: dict[str, Any]) -> dict[str, Any] | None:
        key = f"metrics.{self.metric}"
        known = sorted(name.removeprefix("metrics.") for name in record if name.startswith("metrics."))
        if record.get("skipped") or (not known and record.get("step")):  # nothing is evaluated in such a step
            return None
        if key not in record:
            raise UsageError(
                f"HoldoutAlarm watches the metric '{self.metric}' of the problem, but it has {known or 'none'}: leave some "
                "validation examples out of the outer loss and return theirs, or leave the alarm out."
            )
        loss, outer, step = float(record[key]), float(record["outer_loss"]), int(record["step"])
        if self._best is None or loss < self._best[0]:
            self._best = loss, step, outer
        least, best_step, outer_then = self._best
        risen = loss > least + self.rise * abs(least) and math.isfinite(loss)
        if risen and step - best_step >= self.patience and outer < outer_then:
            return {"best_step": best_step, "best_loss": least, "loss": loss}
        return None
