"""Ready problems."""

from bilevel.problems.digits import DigitsMLP, DigitsSoftmax
from bilevel.problems.digits_grid import DigitsGrid

__all__ = ["DigitsGrid", "DigitsMLP", "DigitsSoftmax"]
