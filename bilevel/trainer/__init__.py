"""The outer loop: state, steps, checkpoints, runs, and `fit`."""

from bilevel.trainer.callbacks import Callback, RunStart
from bilevel.trainer.fitting import Fit, fit
from bilevel.trainer.run import run
from bilevel.trainer.schedulers import power_decay
from bilevel.trainer.state import TrainState
from bilevel.trainer.trainer import Trainer

__all__ = ["Callback", "Fit", "RunStart", "TrainState", "Trainer", "fit", "power_decay", "run"]
