"""Truncated Neumann series for the inverse, with a step that is estimated and a divergence that is caught."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from bilevel.errors import UsageError
from bilevel.linalg.iterative import IterativeSolver
from bilevel.linalg.operator import LinearOperator, Tag
from bilevel.linalg.spectrum import lanczos
from bilevel.linalg.system import Facts, Progress, System, columns, divide, select
from bilevel.result import Result, Solution

NUM_ESTIMATE = 8
PATIENCE = 5


class _Memory(NamedTuple):
    x: Tensor
    residual: Tensor
    residual_norm: Tensor
    num_growing: Tensor
    step_size: Tensor  # (*batch,)


@dataclass(frozen=True)
class NeumannSeries(IterativeSolver):
    r"""`A^-1 b ≈ a Σ_{j<k} (I - aA)^j b`, summed as the Richardson iteration `x <- x + a (b - A x)`.

    For a symmetric positive definite `A` the error falls by `max(|1 - a λ_min|, |1 - a λ_max|)` a term and converges
    only for `0 < a < 2/λ_max`. Without a `step_size`, `a = 1/λ_max` with `λ_max` estimated by 8 Lanczos products before the
    first term (they are counted). For a symmetric operator the ratio of successive residuals never falls,
    so one ratio above 1 proves divergence; for others five in a row are taken as such.

    Args:
        step_size: the factor `a`; None estimates it, for symmetric operators. For `A = I - J` the classical choice is 1.
        rtol: tolerance relative to the right-hand side; None makes `max_steps` a number of terms.
        atol: absolute tolerance.
        max_steps: largest number of terms.

    Reference: Lorraine, Vicol and Duvenaud (2020), "Optimizing millions of hyperparameters by implicit differentiation".

    Example:
        >>> from bilevel.linalg import MatrixOperator, SYMMETRIC
        >>> solver = NeumannSeries(step_size=0.5, rtol=None, max_steps=2)
        >>> solver.compute(solver.init(MatrixOperator(torch.eye(1), SYMMETRIC)), torch.ones(1)).value
        tensor([0.7500])
    """

    sees_curvature: ClassVar[bool] = True
    residual_may_wait: ClassVar[bool] = True  # its rate is known, and may be slow

    step_size: float | None = None

    def __post_init__(self) -> None:
        """Validate the numbers."""
        super().__post_init__()
        if self.step_size is not None and self.step_size <= 0:
            raise UsageError(f"NeumannSeries needs step_size > 0, or None to estimate it, but got {self.step_size}.")

    def init(self, operator: LinearOperator) -> LinearOperator:
        """Check that the step is given or can be estimated; the operator is all the state there is."""
        self.check(operator)
        if self.step_size is None and Tag.symmetric not in operator.tags:
            raise UsageError(
                "NeumannSeries estimates its step for operators tagged symmetric only: pass step_size "
                "(1.0 is the classical choice for I - J), or use GMRES."
            )
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
        """Sum the series; with a preconditioner `M` it is that of `M^-1 A`, whose step has to be given."""
        if preconditioner is not None and self.step_size is None:
            raise UsageError(
                "NeumannSeries estimates its step without a preconditioner only: pass step_size "
                "(1.0 where the preconditioner is close to the inverse)."
            )
        return super().compute(state, vector, x0=x0, rtol=rtol, preconditioner=preconditioner)

    def start(self, system: System, residual: Tensor) -> _Memory:
        """The empty sum."""
        return _Memory(
            x=torch.zeros_like(residual),
            residual=residual,
            residual_norm=system.norm(residual),
            num_growing=torch.zeros(residual.shape[:-1], dtype=torch.int64, device=residual.device),
            step_size=self._step_size(system),
        )

    def restart_from(self, system: System, memory: _Memory, mask: Tensor, residual: Tensor) -> _Memory:
        """The step is known by now."""
        fresh = memory._replace(
            x=torch.zeros_like(residual),
            residual=residual,
            residual_norm=system.norm(residual),
            num_growing=torch.zeros_like(memory.num_growing),
        )
        restarted: _Memory = select(mask, fresh, memory)
        return restarted

    def _step_size(self, system: System) -> Tensor:
        """The step of each system, `(*batch,)`."""
        operator = system.operator
        if self.step_size is not None:
            return torch.full(operator.batch_shape, self.step_size, dtype=operator.dtype, device=operator.device)
        spectrum = lanczos(operator, NUM_ESTIMATE)
        system.spent += spectrum.num_mv
        radius = torch.maximum(spectrum.largest.abs(), spectrum.smallest.abs())
        return divide(torch.ones_like(radius), radius)

    def step(self, system: System, memory: _Memory) -> tuple[_Memory, Progress]:
        """Add a term; the residual is the next one (times `1/a`)."""
        step_size = memory.step_size
        term = system.precondition(memory.residual)
        product = system.mv(term)
        square = system.inner(term, term)
        rayleigh = system.inner(term, product) / square
        gain = system.norm(product) / square.sqrt()
        x = memory.x + columns(step_size) * term
        residual = memory.residual - columns(step_size) * product
        estimate = system.norm(residual)
        # Rounding makes residuals of converged systems jitter: growth counts only well above that level.
        grew = (estimate > memory.residual_norm) & (estimate > 1e3 * torch.finfo(residual.dtype).eps)
        num_growing = torch.where(grew, memory.num_growing + 1, 0)
        symmetric = Tag.symmetric in system.operator.tags and system.preconditioner is None
        diverged = num_growing >= (1 if symmetric else PATIENCE)
        status = torch.where(diverged, Result.diverged.code, Result.running.code)
        memory = _Memory(x, residual, estimate, num_growing, step_size)
        return memory, Progress(estimate, Facts(gain, status, rayleigh))

    def correction(self, system: System, memory: _Memory) -> Tensor:
        """The partial sum."""
        return memory.x
