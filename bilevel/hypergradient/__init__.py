"""Hypergradient methods: one file a method, all with the contract of `method.py`."""

from bilevel.hypergradient.evaluate import Evaluation, default_solver, hypergradient_at
from bilevel.hypergradient.finite_difference import FiniteDifference
from bilevel.hypergradient.forward import ForwardMode
from bilevel.hypergradient.implicit import Implicit
from bilevel.hypergradient.method import Hypergradient, HypergradientMethod
from bilevel.hypergradient.one_step import OneStep
from bilevel.hypergradient.paths import check_not_all_zero, check_paths, find_paths
from bilevel.hypergradient.unrolled import Unrolled

__all__ = [
    "Evaluation",
    "FiniteDifference",
    "ForwardMode",
    "Hypergradient",
    "HypergradientMethod",
    "Implicit",
    "OneStep",
    "Unrolled",
    "check_not_all_zero",
    "check_paths",
    "default_solver",
    "find_paths",
    "hypergradient_at",
]
