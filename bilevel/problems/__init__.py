"""Ready problems."""

from bilevel.problems.cleaning_comparison import CleaningComparison
from bilevel.problems.digits import DigitsMLP, DigitsSoftmax
from bilevel.problems.digits_grid import DigitsGrid
from bilevel.problems.distillation import Distillation
from bilevel.problems.hyper_cleaning import HyperCleaning
from bilevel.problems.random_images import RandomImages
from bilevel.problems.reweighting import Reweighting
from bilevel.problems.sparse_designs import GlossDesign, KhanDesign, RandomDesign
from bilevel.problems.sparse_penalties import LeastSquares, Logistic, SparsePenalties
from bilevel.problems.support_vectors import SupportVectors
from bilevel.problems.text_penalties import TextPenalties
from bilevel.problems.text_words import TextWords
from bilevel.problems.weight_decay import WeightDecay
from bilevel.problems.weighting_comparison import WeightingComparison

__all__ = [
    "CleaningComparison",
    "DigitsGrid",
    "DigitsMLP",
    "DigitsSoftmax",
    "Distillation",
    "GlossDesign",
    "HyperCleaning",
    "KhanDesign",
    "LeastSquares",
    "Logistic",
    "RandomDesign",
    "RandomImages",
    "Reweighting",
    "SparsePenalties",
    "SupportVectors",
    "TextPenalties",
    "TextWords",
    "WeightDecay",
    "WeightingComparison",
]
