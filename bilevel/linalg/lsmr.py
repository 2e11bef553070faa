"""LSMR, for least squares and for square operators that only have products with both `A` and `A^T`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from bilevel.errors import UsageError
from bilevel.linalg.iterative import IterativeSolver
from bilevel.linalg.operator import LinearOperator
from bilevel.linalg.system import Facts, Progress, System, columns, divide
from bilevel.result import Result, Solution, full_codes


class _Memory(NamedTuple):
    x: Tensor
    residual: Tensor
    u: Tensor
    v: Tensor
    h: Tensor
    h_bar: Tensor
    image: Tensor  # A h
    image_bar: Tensor  # A h_bar
    alpha: Tensor
    alpha_bar: Tensor
    zeta_bar: Tensor  # +- ‖A^T r‖
    rho: Tensor
    rho_bar: Tensor
    cosine_bar: Tensor
    sine_bar: Tensor


@dataclass(frozen=True)
class LSMR(IterativeSolver):
    r"""Least-squares solution `min_x ‖A x - b‖`, by MINRES on the normal equations without forming them.

    Needs no structure and takes any shape `(m, n)`, but products with the transpose, two products a step (and one to
    start), and as many steps as a condition number of `κ²` asks for. Ends as `converged` when the residual is small, as
    `least_squares` when the residual is orthogonal to the range and cannot be made smaller.

    Args:
        rtol: tolerance relative to the right-hand side; None makes `max_steps` a budget.
        atol: absolute tolerance.
        max_steps: largest number of steps (of two products each).

    Reference: Fong and Saunders (2011), "LSMR: an iterative algorithm for sparse least-squares problems".

    Example:
        >>> from bilevel.linalg import MatrixOperator
        >>> operator, solver = MatrixOperator(torch.tensor([[1.0], [1.0]])), LSMR()
        >>> [round(v, 4) for v in solver.compute(solver.init(operator), torch.tensor([1.0, 3.0])).value.tolist()]
        [2.0]
    """

    square: ClassVar[bool] = False

    def init(self, operator: LinearOperator) -> LinearOperator:
        """Any operator will do."""
        return operator

    def compute(
        self,
        state: LinearOperator,
        vector: Tensor,
        *,
        x0: Tensor | None = None,
        rtol: float | None = None,
        preconditioner: LinearOperator | None = None,
    ) -> Solution:
        """Run the loop; a preconditioner is refused, since none of the other solvers' kinds fits a least-squares problem."""
        if preconditioner is not None:
            raise UsageError("LSMR takes no preconditioner: precondition the operator itself (A @ M), or use GMRES.")
        return super().compute(state, vector, x0=x0, rtol=rtol)

    def start(self, system: System, residual: Tensor) -> _Memory:
        """The first pair of Golub-Kahan vectors."""
        beta = system.norm(residual)
        u = residual * columns(divide(torch.ones_like(beta), beta))
        v = system.transposed_mv(u)
        alpha = system.norm(v)
        v = v * columns(divide(torch.ones_like(alpha), alpha))
        one, zero = torch.ones_like(beta), torch.zeros_like(beta)
        return _Memory(
            x=torch.zeros_like(v), residual=residual, u=u, v=v, h=v, h_bar=torch.zeros_like(v),
            image=torch.zeros_like(u), image_bar=torch.zeros_like(u), alpha=alpha, alpha_bar=alpha,
            zeta_bar=alpha * beta, rho=one, rho_bar=one, cosine_bar=one, sine_bar=zero,
        )  # fmt: skip

    def step(self, system: System, memory: _Memory) -> tuple[_Memory, Progress]:
        """One Golub-Kahan step and the two rotations of LSMR; the products `A h` ride along for the true residual."""
        m = memory
        product = system.mv(m.v)
        gain = system.norm(product)
        # A h_k = A v_k - (theta / rho) A h_{k-1}; m.image holds the second part, so that no product is spent on it.
        image = product + m.image
        u = product - columns(m.alpha) * m.u
        beta = system.norm(u)
        u = u * columns(divide(torch.ones_like(beta), beta))
        v = system.transposed_mv(u) - columns(beta) * m.v
        alpha = system.norm(v)
        v = v * columns(divide(torch.ones_like(alpha), alpha))
        rho = torch.hypot(m.alpha_bar, beta)
        cosine, sine = divide(m.alpha_bar, rho), divide(beta, rho)
        theta = sine * alpha
        alpha_bar = cosine * alpha
        theta_bar, rho_temp = m.sine_bar * rho, m.cosine_bar * rho
        rho_bar = torch.hypot(rho_temp, theta)
        cosine_bar, sine_bar = divide(rho_temp, rho_bar), divide(theta, rho_bar)
        zeta, zeta_bar = cosine_bar * m.zeta_bar, -sine_bar * m.zeta_bar
        keep = columns(divide(theta_bar * rho, m.rho * m.rho_bar))
        h_bar = m.h - keep * m.h_bar
        image_bar = image - keep * m.image_bar
        weight = columns(divide(zeta, rho * rho_bar))
        x = m.x + weight * h_bar
        residual = m.residual - weight * image_bar
        turn = columns(divide(theta, rho))
        memory = _Memory(
            x=x, residual=residual, u=u, v=v, h=v - turn * m.h, h_bar=h_bar, image=-turn * image, image_bar=image_bar,
            alpha=alpha, alpha_bar=alpha_bar, zeta_bar=zeta_bar, rho=rho, rho_bar=rho_bar, cosine_bar=cosine_bar,
            sine_bar=sine_bar,
        )  # fmt: skip
        estimate = system.norm(residual)
        running = full_codes(Result.running, beta.shape, beta.device)
        return memory, Progress(estimate, Facts(gain, running), optimal=divide(zeta_bar.abs(), estimate))

    def correction(self, system: System, memory: _Memory) -> Tensor:
        """The iterate."""
        return memory.x
