"""BiCGStab(l), for square operators without structure, in constant memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bilevel.errors import UsageError
from bilevel.linalg.iterative import IterativeSolver
from bilevel.linalg.system import Facts, Progress, System, columns, divide
from bilevel.result import Result, full_codes


class _Memory(NamedTuple):
    y: Tensor  # the iterate before the preconditioner: x = M^-1 y
    residual: Tensor
    shadow: Tensor
    direction: Tensor
    rho: Tensor  # <shadow, residual> of the last biconjugate step
    alpha: Tensor  # its length
    omega: Tensor  # leading coefficient of the last stabilising polynomial


@dataclass(frozen=True)
class BiCGStab(IterativeSolver):
    r"""Stabilised biconjugate gradient, BiCGStab(l): no transpose, memory of `2 l + 5` vectors.

    A step makes `l` biconjugate gradient steps and then multiplies the residual by the polynomial of degree `l` that
    makes it smallest. The classical method is `degree=1`; its linear factors have real roots, so that it stalls where
    the spectrum lies on both sides of zero or near the imaginary axis, and the default of 2 goes on. The residual is
    erratic where GMRES's falls. When it turns orthogonal to its shadow the recurrence starts anew from the present
    residual; a step of length zero is a `breakdown`.

    Args:
        rtol: tolerance relative to the norm of the right-hand side; None makes `max_steps` a budget.
        atol: absolute tolerance.
        max_steps: largest number of steps (of `2 l` products each).
        degree: `l`; more than 4 loses accuracy.

    Raises:
        UsageError: a number is out of its range.

    Reference: Sleijpen and Fokkema (1993), "BiCGstab(l) for linear equations involving unsymmetric matrices with
    complex spectrum"; van der Vorst (1992) for `l = 1`.

    Example:
        >>> from bilevel.linalg import MatrixOperator
        >>> solver = BiCGStab()
        >>> operator = MatrixOperator(torch.tensor([[2.0, 1.0], [0.0, 4.0]]))
        >>> [round(v, 4) for v in solver.compute(solver.init(operator), torch.tensor([3.0, 4.0])).value.tolist()]
        [1.0, 1.0]
    """

    degree: int = 2

    def __post_init__(self) -> None:
        """Validate the numbers."""
        super().__post_init__()
        if self.degree < 1:
            raise UsageError(f"BiCGStab needs degree >= 1, but got {self.degree}.")

    def start(self, system: System, residual: Tensor) -> _Memory:
        """The shadow residual is the residual."""
        none = torch.zeros_like(system.inner(residual, residual))
        zero = torch.zeros_like(residual)
        return _Memory(zero, residual, residual, zero, none - 1, none, none + 1)

    def step(self, system: System, memory: _Memory) -> tuple[_Memory, Progress]:
        """`l` biconjugate steps, then the minimal residual polynomial."""
        y, residual, shadow, direction, rho, alpha, omega = memory
        gain = torch.zeros_like(rho)

        def product(vector: Tensor) -> Tensor:
            nonlocal gain
            searched = system.precondition(vector)
            image = system.mv(searched)
            gain = torch.fmax(gain, divide(system.norm(image), system.norm(searched)))
            return image

        moved, peak, shadow_norm = torch.zeros_like(rho), torch.zeros_like(rho), system.norm(shadow)
        rho = -omega * rho
        residuals, directions = [residual], [direction]  # r, A r, ..., and the same of the direction
        for number in range(self.degree):
            new_rho = system.inner(shadow, residuals[number])
            beta, rho = alpha * divide(new_rho, rho), new_rho
            directions = [r - columns(beta) * d for r, d in zip(residuals, directions, strict=True)]
            directions.append(product(directions[number]))
            pivot = system.inner(shadow, directions[-1])
            alpha = divide(rho, _cleaned(pivot, shadow_norm * system.norm(directions[-1])))
            residuals = [r - columns(alpha) * d for r, d in zip(residuals, directions[1:], strict=True)]
            residuals.append(product(residuals[number]))
            y = y + columns(alpha) * directions[0]
            moved = torch.maximum(moved, alpha.abs())
            peak = torch.maximum(peak, system.norm(residuals[0]))
        new, coefficients = _minimal_residual(system, residuals)
        direction = directions[0]
        for power, coefficient in enumerate(coefficients):
            y = y + columns(coefficient) * residuals[power]
            direction = direction - columns(coefficient) * directions[power + 1]
            moved = torch.maximum(moved, coefficient.abs())
        estimate = system.norm(new)
        stuck = (moved == 0) & (estimate > 0)
        status = torch.where(stuck, Result.breakdown.code, full_codes(Result.running, rho.shape, rho.device))
        memory = _Memory(y, new, shadow, direction, rho, alpha, coefficients[-1])
        facts = Facts(gain, status, peak=torch.maximum(peak, estimate))
        return _renew(system, memory, estimate), Progress(estimate, facts)

    def correction(self, system: System, memory: _Memory) -> Tensor:
        """The iterate."""
        return system.precondition(memory.y)

    def replace_residual(self, memory: _Memory, residual: Tensor) -> _Memory:
        """The true residual; the directions stay."""
        return memory._replace(residual=residual)


def _minimal_residual(system: System, residuals: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The least `r - Σ c_j A^j r` and its coefficients `c_1, ..., c_l`, each `(*batch,)`.

    By modified Gram-Schmidt: `A^j r = q_j + Σ_{i<j} t_ij q_i`, so that `T c = g` with `g_j = <q_j, r> / <q_j, q_j>`.
    """
    new, *powers = residuals
    basis: list[Tensor] = []
    squares: list[Tensor] = []
    above: list[list[Tensor]] = []  # above[j][i] = t_ij
    along: list[Tensor] = []
    for vector in powers:
        column = []
        for other, square in zip(basis, squares, strict=True):
            column.append(divide(system.inner(other, vector), square))
            vector = vector - columns(column[-1]) * other
        basis.append(vector)
        squares.append(system.inner(vector, vector))
        above.append(column)
        shared = _cleaned(system.inner(vector, new), squares[-1].sqrt() * system.norm(new))
        along.append(divide(shared, squares[-1]))
        new = new - columns(along[-1]) * vector
    coefficients = list(along)
    for later in reversed(range(len(powers))):
        for earlier in range(later):
            coefficients[earlier] = coefficients[earlier] - above[later][earlier] * coefficients[later]
    return new, coefficients


def _cleaned(inner: Tensor, size: Tensor) -> Tensor:
    """An inner product of vectors, zero where rounding alone makes it; `size` is the product of their norms."""
    return torch.where(inner.abs() <= 10 * torch.finfo(inner.dtype).eps * size, 0.0, inner)


def _renew(system: System, memory: _Memory, estimate: Tensor) -> _Memory:
    """Where the residual is orthogonal to its shadow to rounding, start anew with the residual as its own shadow."""
    lost = _cleaned(system.inner(memory.shadow, memory.residual), estimate * system.norm(memory.shadow)) == 0
    return memory._replace(
        shadow=torch.where(columns(lost), memory.residual, memory.shadow),
        direction=torch.where(columns(lost), 0.0, memory.direction),
        rho=torch.where(lost, -1.0, memory.rho),
        alpha=torch.where(lost, 0.0, memory.alpha),
        omega=torch.where(lost, 1.0, memory.omega),
    )
