"""Derivatives of roots, fixed points and minimisers by the implicit function theorem."""

from bilevel.implicit.decorators import (
    ImplicitReport,
    ImplicitSolver,
    implicit_argmin,
    implicit_fixed_point,
    implicit_root,
)
from bilevel.implicit.root import root_jvp, root_vjp

__all__ = [
    "ImplicitReport",
    "ImplicitSolver",
    "implicit_argmin",
    "implicit_fixed_point",
    "implicit_root",
    "root_jvp",
    "root_vjp",
]
