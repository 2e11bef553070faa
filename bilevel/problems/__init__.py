"""Ready problems."""

from bilevel.problems.cleaning_comparison import CleaningComparison
from bilevel.problems.digits import DigitsMLP, DigitsSoftmax
from bilevel.problems.digits_grid import DigitsGrid
from bilevel.problems.hyper_cleaning import HyperCleaning

__all__ = ["CleaningComparison", "DigitsGrid", "DigitsMLP", "DigitsSoftmax", "HyperCleaning"]
