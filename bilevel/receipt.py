"""What a hypergradient is worth: the residuals, products and curvature behind it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Receipt:
    """How a hypergradient was computed, and how far to trust it; NaN and None mean that a method has no such figure.

    Errors are norms over all hyperparameters, in the space that `space` names, as the gradient itself.

    Attributes:
        stationarity: norm of the inner gradient (with a proximal term: of the gradient mapping), the largest over tasks;
            0 at an exact solution. At the point used for the implicit methods, else the last that the solver measured:
            that of the iterate its last step started from.
        inner_steps: steps of the inner solver.
        inner_gradients: gradients of the inner loss it took (of all tasks at once).
        inner_products: Hessian-vector products inside the inner solver.
        inner_result: name of the `InnerResult`.
        linear_residual: residual norm of the linear system over that of its right-hand side, the largest over tasks; where
            the Hessian is damped, with what that leaves, at most.
        num_mv: matrix-vector products of the linear solve, the largest over tasks.
        setup_mv: products that the preconditioner was built with.
        damping: what was added to the diagonal of the inner Hessian, the largest over tasks.
        linear_method: the solvers that were used, where `linear_solver=auto` has chosen; empty elsewhere.
        linear_result: name of the `Result`, the worst over tasks.
        curvature_min: smallest Rayleigh quotient of the inner Hessian seen by the linear solver.
        curvature_max: largest one.
        error_estimate: of the norm of the gradient's error, from both residuals.
        error_inner: its part that comes from the inner solve.
        error_linear: its part that comes from the linear solve.
        error_certified: whether a declared lower bound of the curvature stands behind the estimate.
        estimate_mv: products that the estimate took.
        space: which coordinates gradient and errors are in: always those of the problem, natural units.
        fallback: why gradients or products that were to be compiled are not; None where they are, or were not meant to be.
        biased: why the number is not the hypergradient even when every solve is exact; empty when it is.
    """

    stationarity: float = math.nan
    inner_steps: int = 0
    inner_gradients: int = 0
    inner_products: int = 0
    inner_result: str | None = None
    linear_residual: float = math.nan
    num_mv: int = 0
    setup_mv: int = 0
    damping: float = 0.0
    linear_method: str = ""
    linear_result: str | None = None
    curvature_min: float = math.nan
    curvature_max: float = math.nan
    error_estimate: float = math.nan
    error_inner: float = math.nan
    error_linear: float = math.nan
    error_certified: bool | None = None
    estimate_mv: int = 0
    space: str = "natural"
    fallback: str | None = None
    biased: tuple[str, ...] = ()

    @property
    def products(self) -> int:
        """All products with the inner Hessian that the hypergradient took: solve, preconditioner, estimate."""
        return self.num_mv + self.setup_mv + self.estimate_mv

    def record(self) -> dict[str, Any]:
        """Flat entries for a metrics record; `receipt.biased` as a boolean, `receipt.products` besides."""
        entries = {f"receipt.{key}": value for key, value in asdict(self).items()}
        entries["receipt.biased"] = bool(self.biased)
        entries["receipt.products"] = self.products
        return entries
