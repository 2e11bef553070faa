"""Hypergradient methods: one file a method, all with the contract of `method.py`."""

from bilevel.hypergradient.accuracy import Accuracy, AdaptiveAccuracy, DecreasingAccuracy, FixedAccuracy
from bilevel.hypergradient.damping import AdaptiveDamping, Damping, NoDamping
from bilevel.hypergradient.error_estimate import ErrorEstimate, ErrorEstimator
from bilevel.hypergradient.evaluate import Evaluation, default_solver, hypergradient_at
from bilevel.hypergradient.finite_difference import FiniteDifference
from bilevel.hypergradient.forward import ForwardMode
from bilevel.hypergradient.implicit import Implicit
from bilevel.hypergradient.implicit_update import ImplicitUpdate
from bilevel.hypergradient.method import Hypergradient, HypergradientMethod, differentiate, start_method
from bilevel.hypergradient.one_step import OneStep
from bilevel.hypergradient.paths import check_not_all_zero, check_paths, find_paths
from bilevel.hypergradient.sama import SAMA
from bilevel.hypergradient.stochastic import BOME, F2SA, MASOBA, SABA, SOBA, TTSA, AmIGO, PBGDFree, StocBiO
from bilevel.hypergradient.unrolled import Unrolled

__all__ = [
    "BOME",
    "F2SA",
    "MASOBA",
    "SABA",
    "SAMA",
    "SOBA",
    "TTSA",
    "Accuracy",
    "AdaptiveAccuracy",
    "AdaptiveDamping",
    "AmIGO",
    "Damping",
    "DecreasingAccuracy",
    "ErrorEstimate",
    "ErrorEstimator",
    "Evaluation",
    "FiniteDifference",
    "FixedAccuracy",
    "ForwardMode",
    "Hypergradient",
    "HypergradientMethod",
    "Implicit",
    "ImplicitUpdate",
    "NoDamping",
    "OneStep",
    "PBGDFree",
    "StocBiO",
    "Unrolled",
    "check_not_all_zero",
    "check_paths",
    "default_solver",
    "differentiate",
    "find_paths",
    "hypergradient_at",
    "start_method",
]
