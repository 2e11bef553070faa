"""Conjugate gradient, for symmetric positive definite operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from bilevel.linalg.iterative import IterativeSolver
from bilevel.linalg.operator import SYMMETRIC, Tag
from bilevel.linalg.system import Facts, Progress, System, columns, divide
from bilevel.result import Result

Inner = Callable[[Tensor, Tensor], Tensor]


class _Memory(NamedTuple):
    x: Tensor
    residual: Tensor
    direction: Tensor
    rho: Tensor  # <r, M^-1 r>


class _Scalars(NamedTuple):
    """Of a step from a direction `p`; what they say of the operator is worked out for many steps at once."""

    curvature: Tensor  # <p, A p>
    square: Tensor  # <p, p>
    image: Tensor | None  # <A p, A p>, where there is a preconditioner
    rho: Tensor  # before the step
    new_rho: Tensor


@dataclass(frozen=True)
class ConjugateGradient(IterativeSolver):
    r"""Preconditioned conjugate gradient; exact after as many steps as `A` has distinct eigenvalues.

    In the A-norm, `‖x_k - x‖ <= 2 ((√κ - 1) / (√κ + 1))^k ‖x_0 - x‖`. The operator must be tagged symmetric; whether it
    is positive definite shows on the way: a direction with `p'Ap <= 0` ends the solve with `negative_curvature` and the
    iterate before it (use MINRES, or add damping). The recursive residual drifts from the true one, above all in
    float32, so it is replaced by the true one every 50 steps and before convergence is claimed near rounding level.

    Args:
        rtol: tolerance relative to the right-hand side; None makes `max_steps` a budget.
        atol: absolute tolerance.
        max_steps: largest number of steps.

    Reference: Hestenes and Stiefel (1952), "Methods of conjugate gradients for solving linear systems".

    Example:
        >>> from bilevel.linalg import MatrixOperator
        >>> solver = ConjugateGradient(rtol=1e-8)
        >>> state = solver.init(MatrixOperator(3.0 * torch.eye(4), SYMMETRIC))
        >>> solver.compute(state, torch.full((4,), 6.0)).value
        tensor([2., 2., 2., 2.])
    """

    requires: ClassVar[frozenset[Tag]] = SYMMETRIC
    instead: ClassVar[str] = "use GMRES, BiCGStab or LSMR, or tag it if it is symmetric."
    sees_curvature: ClassVar[bool] = True
    residual_may_wait: ClassVar[bool] = True  # it minimises the A-norm of the error; the residual may rise for long

    def stretch(self, system: System, x0: Tensor, image: Tensor, residual: Tensor) -> Tensor:
        """To the least A-norm of the error, as every step; to zero where the curvature along it is not positive."""
        curvature = system.inner(x0, image)
        return torch.where(curvature > 0, divide(system.inner(x0, residual), curvature), -1.0)

    def start(self, system: System, residual: Tensor) -> _Memory:
        """First direction: the preconditioned residual."""
        direction = system.precondition(residual)
        return _Memory(torch.zeros_like(residual), residual, direction, system.inner(residual, direction))

    def step(self, system: System, memory: _Memory) -> tuple[_Memory, Progress]:
        """Minimise the A-norm of the error along the direction, then conjugate."""
        x, residual, direction, rho = memory
        state = (x, residual, direction, system.mv(direction), rho, system.bound)
        image = None
        if system.preconditioner is None:
            x, residual, direction, curvature, square, new_rho, estimate, event = system.fuse(_plain)(*state)
        else:
            x, residual, curvature, square, image, estimate, event = system.fuse(_descend)(*state)
            direction, new_rho = system.fuse(_turn)(residual, system.precondition(residual), direction, rho)
        seen = _Scalars(curvature, square, image, rho, new_rho)
        return _Memory(x, residual, direction, new_rho), Progress(estimate, seen, event)

    def facts(self, steps: Sequence[_Scalars]) -> Facts:
        """Curvature, and a lower estimate of the operator's norm."""
        curvature, square, image, rho, new_rho = (
            None if column[0] is None else torch.stack(column) for column in zip(*steps, strict=True)
        )
        assert curvature is not None and square is not None and rho is not None and new_rho is not None
        rayleigh, done = curvature / square, rho == 0
        if image is None:
            # CG is Lanczos in disguise: the sum of a row of its tridiagonal matrix is near the largest eigenvalue long
            # before any Rayleigh quotient is (the directions soon lie in the small end of the spectrum). A row is that of a
            # step, (1 + √β) / α, and of the one before it, (β + √β) / α, which is left out in the first row of these.
            beta, inverse = ((part / rho).masked_fill_(done, 0.0) for part in (new_rho, curvature))
            root = beta.sqrt()
            gain = (1.0 + root) * inverse
            gain[1:] += ((beta + root) * inverse)[:-1]
        else:
            gain = divide(image, square).sqrt()
        indefinite = (curvature <= 0) & ~done
        status = torch.where(indefinite, Result.negative_curvature.code, Result.running.code)
        return Facts(torch.where(indefinite, rayleigh.abs(), gain), status, rayleigh)

    def correction(self, system: System, memory: _Memory) -> Tensor:
        """The iterate."""
        return memory.x

    def replace_residual(self, memory: _Memory, residual: Tensor) -> _Memory:
        """The true residual; the direction stays, so the Krylov space is kept."""
        return memory._replace(residual=residual)


# In small problems the scalars of a step cost as much as its product, so there are as few of them as can be. A quotient is
# zero where its system is done (`rho = 0`) or must not move (no positive curvature), which is an event.


def _plain(
    inner: Inner, x: Tensor, residual: Tensor, direction: Tensor, product: Tensor, rho: Tensor, bound: Tensor
) -> tuple[Tensor, ...]:
    """The step without a preconditioner."""
    x, residual, curvature, square = _move(inner, x, residual, direction, product, rho)
    direction, new_rho = _turn(inner, residual, residual, direction, rho)
    estimate = new_rho.sqrt()
    return x, residual, direction, curvature, square, new_rho, estimate, _event(curvature, rho, estimate, bound)


def _descend(
    inner: Inner, x: Tensor, residual: Tensor, direction: Tensor, product: Tensor, rho: Tensor, bound: Tensor
) -> tuple[Tensor, ...]:
    """The part of a step before the preconditioner, with the norms that only the other way gets for nothing."""
    x, residual, curvature, square = _move(inner, x, residual, direction, product, rho)
    estimate = inner(residual, residual).sqrt()
    return x, residual, curvature, square, inner(product, product), estimate, _event(curvature, rho, estimate, bound)


def _move(
    inner: Inner, x: Tensor, residual: Tensor, direction: Tensor, product: Tensor, rho: Tensor
) -> tuple[Tensor, ...]:
    curvature, square = inner(direction, product), inner(direction, direction)
    length = columns((rho / curvature).masked_fill_(curvature <= 0, 0.0))
    x = torch.addcmul(x, length, direction)
    residual = torch.addcmul(residual, length, product, value=-1)
    return x, residual, curvature, square


def _turn(inner: Inner, residual: Tensor, preconditioned: Tensor, direction: Tensor, rho: Tensor) -> tuple[Tensor, ...]:
    new_rho = inner(residual, preconditioned)
    beta = (new_rho / rho).masked_fill_(rho == 0, 0.0)
    return torch.addcmul(preconditioned, columns(beta), direction), new_rho


def _event(curvature: Tensor, rho: Tensor, estimate: Tensor, bound: Tensor) -> Tensor:
    """Negative curvature, a claim, or what is not finite, none of which NaN escapes."""
    return ~((estimate > bound) & (estimate < torch.inf) & ((curvature > 0) | (rho == 0)))
