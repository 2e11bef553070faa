"""BiCGStab, for square operators without structure, in constant memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from bilevel.linalg.iterative import IterativeSolver
from bilevel.linalg.system import Progress, System, columns, divide
from bilevel.result import Result, full_codes


class _Memory(NamedTuple):
    x: Tensor
    residual: Tensor
    shadow: Tensor
    direction: Tensor
    rho: Tensor  # <shadow, residual>


@dataclass(frozen=True)
class BiCGStab(IterativeSolver):
    r"""Stabilised biconjugate gradient: two products a step, no transpose, memory of seven vectors.

    Its residual is erratic where GMRES's falls; when the residual turns orthogonal to its shadow the recurrence is
    restarted from the present residual, and a vanished stabiliser (skew-symmetric operators) is a `breakdown`.

    Args:
        rtol: tolerance relative to the right-hand side; None makes `max_steps` a budget.
        atol: absolute tolerance.
        max_steps: largest number of steps (of two products each).

    Reference: van der Vorst (1992), "Bi-CGSTAB: a fast and smoothly converging variant of Bi-CG".

    Example:
        >>> from bilevel.linalg import MatrixOperator
        >>> solver = BiCGStab()
        >>> operator = MatrixOperator(torch.tensor([[2.0, 1.0], [0.0, 4.0]]))
        >>> [round(v, 4) for v in solver.compute(solver.init(operator), torch.tensor([3.0, 4.0])).value.tolist()]
        [1.0, 1.0]
    """

    products_per_step: ClassVar[int] = 2

    def start(self, system: System, residual: Tensor) -> _Memory:
        """The shadow residual is the residual."""
        return _Memory(torch.zeros_like(residual), residual, residual, residual, system.inner(residual, residual))

    def step(self, system: System, memory: _Memory) -> tuple[_Memory, Progress]:
        """A biconjugate step, then a minimal residual step."""
        x, residual, shadow, direction, rho = memory
        eps = torch.finfo(residual.dtype).eps
        searched = system.precondition(direction)
        product = system.mv(searched)
        projection = system.inner(shadow, product)
        alpha = divide(rho, projection)
        half = residual - columns(alpha) * product
        stabiliser = system.precondition(half)
        image = system.mv(stabiliser)
        square = system.inner(image, image)
        omega = divide(system.inner(image, half), square)
        x = x + columns(alpha) * searched + columns(omega) * stabiliser
        new = half - columns(omega) * image
        new_rho = system.inner(shadow, new)
        beta = divide(new_rho, rho) * divide(alpha, omega)
        direction = new + columns(beta) * (direction - columns(omega) * product)
        estimate = system.norm(new)
        # Orthogonal to its shadow: start anew from here, with the residual as its own shadow.
        lost = new_rho.abs() <= eps * estimate * system.norm(shadow)
        shadow = torch.where(columns(lost), new, shadow)
        direction = torch.where(columns(lost), new, direction)
        new_rho = torch.where(lost, estimate.square(), new_rho)
        gain = torch.fmax(
            divide(system.norm(product), system.norm(searched)), divide(square.sqrt(), system.norm(stabiliser))
        )
        stuck = (omega.abs() * gain <= eps) & (system.norm(half) > 0) & (projection.abs() <= eps * rho.abs())
        running = full_codes(Result.running, rho.shape, rho.device)
        status = torch.where(stuck, Result.breakdown.code, running)
        return _Memory(x, new, shadow, direction, new_rho), Progress(estimate, gain, status)

    def correction(self, system: System, memory: _Memory) -> Tensor:
        """The iterate."""
        return memory.x

    def replace_residual(self, memory: _Memory, residual: Tensor) -> _Memory:
        """The true residual; the directions stay."""
        return memory._replace(residual=residual)
