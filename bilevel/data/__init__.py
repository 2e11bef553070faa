"""Data sets, splits and minibatches; knows no problem."""

from bilevel.data.minibatches import Minibatches
from bilevel.data.tabular import Split, load_digits

__all__ = ["Minibatches", "Split", "load_digits"]
