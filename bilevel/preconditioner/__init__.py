"""Preconditioners for the linear system with the inner Hessian, reusable across outer steps."""

from bilevel.preconditioner.auto import AutoPreconditioner
from bilevel.preconditioner.base import Preconditioner, Prepared
from bilevel.preconditioner.jacobi import AdamSecondMoment, Jacobi
from bilevel.preconditioner.kfac import EKFAC, KFAC
from bilevel.preconditioner.lbfgs_pairs import LBFGSPairs
from bilevel.preconditioner.none import NoPreconditioner
from bilevel.preconditioner.nystrom import Nystrom

__all__ = [
    "EKFAC",
    "KFAC",
    "AdamSecondMoment",
    "AutoPreconditioner",
    "Jacobi",
    "LBFGSPairs",
    "NoPreconditioner",
    "Nystrom",
    "Preconditioner",
    "Prepared",
]
