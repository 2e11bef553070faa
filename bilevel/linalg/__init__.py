"""Linear operators known by their products, and batched solvers for `A x = b`."""

from bilevel.linalg.auto import AutoSolver
from bilevel.linalg.bicgstab import BiCGStab
from bilevel.linalg.cg import ConjugateGradient
from bilevel.linalg.composite import ProductOperator, ScaledOperator, SumOperator, damped
from bilevel.linalg.dense import DenseCholesky, DenseLU
from bilevel.linalg.derivative import GaussNewtonOperator, HessianOperator, JacobianOperator
from bilevel.linalg.diagonal import DiagonalSolver
from bilevel.linalg.gmres import GMRES
from bilevel.linalg.identity import IdentitySolver
from bilevel.linalg.iterative import IterativeSolver
from bilevel.linalg.kronecker import BlockKroneckerInverse, KroneckerBlock
from bilevel.linalg.lbfgs import InverseBFGS
from bilevel.linalg.lowrank import InverseDiagonalPlusLowRank
from bilevel.linalg.lsmr import LSMR
from bilevel.linalg.matrix import DiagonalOperator, IdentityOperator, MatrixOperator
from bilevel.linalg.minres import MINRES
from bilevel.linalg.neumann import NeumannSeries
from bilevel.linalg.operator import (
    NO_TAGS,
    POSITIVE_DEFINITE,
    SYMMETRIC,
    LinearOperator,
    Tag,
    as_matrix,
    norm,
)
from bilevel.linalg.solver import LinearSolver, linear_solve
from bilevel.linalg.spectrum import RitzValues, lanczos

__all__ = [
    "GMRES",
    "LSMR",
    "MINRES",
    "NO_TAGS",
    "POSITIVE_DEFINITE",
    "SYMMETRIC",
    "AutoSolver",
    "BiCGStab",
    "BlockKroneckerInverse",
    "ConjugateGradient",
    "DenseCholesky",
    "DenseLU",
    "DiagonalOperator",
    "DiagonalSolver",
    "GaussNewtonOperator",
    "HessianOperator",
    "IdentityOperator",
    "IdentitySolver",
    "InverseBFGS",
    "InverseDiagonalPlusLowRank",
    "IterativeSolver",
    "JacobianOperator",
    "KroneckerBlock",
    "LinearOperator",
    "LinearSolver",
    "MatrixOperator",
    "NeumannSeries",
    "ProductOperator",
    "RitzValues",
    "ScaledOperator",
    "SumOperator",
    "Tag",
    "as_matrix",
    "damped",
    "lanczos",
    "linear_solve",
    "norm",
]
