"""MINRES, for symmetric operators that need not be definite."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from bilevel.linalg.iterative import IterativeSolver
from bilevel.linalg.operator import SYMMETRIC, Tag
from bilevel.linalg.system import Facts, Progress, System, columns, divide, rounding_level
from bilevel.result import Result, full_codes


class _Memory(NamedTuple):
    x: Tensor
    residual: Tensor
    v: Tensor  # Lanczos vectors, not normalised: the new one and the one before it
    v_old: Tensor
    z: Tensor  # M^-1 v
    beta: Tensor
    beta_old: Tensor
    d: Tensor  # search directions and their products, for the last two steps
    d_old: Tensor
    product: Tensor
    product_old: Tensor
    cosine: Tensor
    sine: Tensor
    delta_bar: Tensor
    epsilon: Tensor
    phi_bar: Tensor
    scale: Tensor  # largest column norm of the tridiagonal matrix so far


@dataclass(frozen=True)
class MINRES(IterativeSolver):
    r"""Minimal residual method: the least residual norm over the Krylov space, which never rises.

    Works where CG does not: symmetric indefinite operators, such as the Hessian at a saddle point. The residual is
    carried along by the recurrence of the products `A d` (two more vector updates a step), so that its norm is that of
    the unpreconditioned residual also when a preconditioner is used.

    Args:
        rtol: tolerance relative to the right-hand side; None makes `max_steps` a budget.
        atol: absolute tolerance.
        max_steps: largest number of steps.

    Reference: Paige and Saunders (1975), "Solution of sparse indefinite systems of linear equations".

    Example:
        >>> from bilevel.linalg import DiagonalOperator
        >>> solver = MINRES(rtol=1e-6)
        >>> solution = solver.compute(solver.init(DiagonalOperator(torch.tensor([2.0, -4.0]))), torch.ones(2))
        >>> [round(v, 4) for v in solution.value.tolist()]
        [0.5, -0.25]
    """

    sees_curvature: ClassVar[bool] = True
    requires: ClassVar[frozenset[Tag]] = SYMMETRIC
    instead: ClassVar[str] = "use GMRES, BiCGStab or LSMR, or tag it if it is symmetric."

    def start(self, system: System, residual: Tensor) -> _Memory:
        """The first Lanczos vector."""
        z = system.precondition(residual)
        beta = system.inner(residual, z).clamp(min=0).sqrt()
        zero, none = torch.zeros_like(residual), torch.zeros_like(beta)
        return _Memory(
            x=zero, residual=residual, v=residual, v_old=zero, z=z, beta=beta, beta_old=none, d=zero, d_old=zero,
            product=zero, product_old=zero, cosine=none - 1, sine=none, delta_bar=none, epsilon=none, phi_bar=beta,
            scale=none,
        )  # fmt: skip

    def step(self, system: System, memory: _Memory) -> tuple[_Memory, Progress]:
        """One Lanczos step and one Givens rotation."""
        m = memory
        inverse = divide(torch.ones_like(m.beta), m.beta)
        direction = columns(inverse) * m.z
        image = system.mv(direction)
        alpha = system.inner(direction, image)
        v = image - columns(alpha * inverse) * m.v - columns(divide(m.beta, m.beta_old)) * m.v_old
        z = system.precondition(v)
        beta = system.inner(v, z).clamp(min=0).sqrt()
        # The QR factorisation of the tridiagonal matrix, one column further.
        delta = m.cosine * m.delta_bar + m.sine * alpha
        gamma_bar = m.sine * m.delta_bar - m.cosine * alpha
        gamma = torch.hypot(gamma_bar, beta)
        cosine, sine = divide(gamma_bar, gamma), divide(beta, gamma)
        inverse_gamma = columns(divide(torch.ones_like(gamma), gamma))
        d = (direction - columns(m.epsilon) * m.d_old - columns(delta) * m.d) * inverse_gamma
        product = (image - columns(m.epsilon) * m.product_old - columns(delta) * m.product) * inverse_gamma
        square = system.inner(direction, direction)
        gain = divide(system.norm(image), square.sqrt())
        # The Rayleigh quotient of the residual of the step before (Liu and Roosta, 2022): negative sooner or later where the
        # operator is indefinite and the right-hand side shows it; those of the Lanczos vectors need not be.
        of_residual = -m.cosine * gamma_bar
        rayleigh = divide(torch.where(of_residual < 0, of_residual, alpha), square)
        # `‖A r‖ / ‖r‖` of the step before: where it vanishes, no step lowers the residual and the operator is singular.
        slope = torch.hypot(gamma_bar, m.cosine * beta)
        scale = torch.maximum(m.scale, torch.hypot(alpha, beta))
        singular = (slope <= 10 * rounding_level(v.shape[-1], v.dtype) * scale) & (m.phi_bar != 0)
        phi = torch.where(singular, 0.0, cosine * m.phi_bar)
        phi_bar = torch.where(singular, m.phi_bar, sine * m.phi_bar)
        residual = m.residual - columns(phi) * product
        status = torch.where(singular, Result.singular.code, full_codes(Result.running, gamma.shape, gamma.device))
        memory = _Memory(
            x=m.x + columns(phi) * d, residual=residual, v=v, v_old=m.v, z=z, beta=beta, beta_old=m.beta, d=d,
            d_old=m.d, product=product, product_old=m.product, cosine=cosine, sine=sine,
            delta_bar=-m.cosine * beta, epsilon=m.sine * beta, phi_bar=phi_bar,
            scale=scale,
        )  # fmt: skip
        return memory, Progress(system.norm(residual), Facts(gain, status, rayleigh))

    def correction(self, system: System, memory: _Memory) -> Tensor:
        """The iterate."""
        return memory.x
