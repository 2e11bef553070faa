"""Trackers record a run: `JsonlTracker` keeps the primary record, the console and wandb show it.

All are callbacks of the trainer (`on_start`, `on_step`, `on_end`). `metrics.jsonl` is the record that reports and
resumed runs rely on, so its failure stops the run; any other tracker is a `GuardedTracker`, whose failure never does.
"""

from bilevel.tracking.console import ConsoleTracker
from bilevel.tracking.guard import GuardedTracker
from bilevel.tracking.holdout import HoldoutAlarm
from bilevel.tracking.jsonl import JsonlTracker, read_metrics
from bilevel.tracking.wandb import WandbTracker

__all__ = ["ConsoleTracker", "GuardedTracker", "HoldoutAlarm", "JsonlTracker", "WandbTracker", "read_metrics"]
