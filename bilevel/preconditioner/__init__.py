"""Preconditioners for the linear system with the inner Hessian, reusable across outer steps."""

from bilevel.preconditioner.base import Preconditioner, Prepared

__all__ = ["Preconditioner", "Prepared"]
