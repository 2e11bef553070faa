"""Restarted GMRES, for square operators without any structure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bilevel.errors import UsageError
from bilevel.linalg.iterative import IterativeSolver
from bilevel.linalg.system import Facts, Progress, System, columns, divide, select
from bilevel.result import Result, full_codes


class _Memory(NamedTuple):
    x: Tensor  # of the cycles before this one
    residual: Tensor  # at the start of this cycle
    basis: Tensor  # (*batch, restart + 1, n), written in place
    upper: Tensor  # (*batch, restart, restart), the triangular factor
    rotations: Tensor  # (*batch, restart, 2)
    target: Tensor  # (*batch, restart + 1), the rotated right-hand side
    position: Tensor  # () steps done in this cycle; the same for all systems
    begun: Tensor  # (*batch,) position at which a system's cycle began; above 0 after a restart between cycles


@dataclass(frozen=True)
class GMRES(IterativeSolver):
    r"""Generalised minimal residual method with restarts; with `restart >= n` it is full GMRES.

    Orthogonalises twice by classical Gram-Schmidt (one reduction for the whole basis). A cycle of `restart` steps that
    does not lower the residual ends in `stagnated`, since every later cycle would repeat it.

    Args:
        restart: length of a cycle; memory is `restart + 1` vectors a system.
        rtol: tolerance relative to the right-hand side; None makes `max_steps` a budget.
        atol: absolute tolerance.
        max_steps: largest number of steps, over all cycles.

    Reference: Saad and Schultz (1986), "GMRES: a generalized minimal residual algorithm".

    Example:
        >>> from bilevel.linalg import MatrixOperator
        >>> operator = MatrixOperator(torch.tensor([[0.0, 1.0], [-2.0, 0.0]]))
        >>> solver = GMRES()
        >>> [round(v, 4) for v in solver.compute(solver.init(operator), torch.tensor([1.0, 2.0])).value.tolist()]
        [-1.0, 1.0]
    """

    restart: int = 30

    def __post_init__(self) -> None:
        """Validate the numbers."""
        super().__post_init__()
        if self.restart < 1:
            raise UsageError(f"GMRES needs restart >= 1, but got {self.restart}.")

    def start(self, system: System, residual: Tensor) -> _Memory:
        """An empty cycle."""
        return self._cycle(system, torch.zeros_like(residual), residual)

    def _cycle(self, system: System, x: Tensor, residual: Tensor) -> _Memory:
        batch, n = residual.shape[:-1], residual.shape[-1]
        length = min(self.restart, max(n, 1), self.max_steps)
        beta = system.norm(residual)
        basis = residual.new_zeros(*batch, length + 1, n)
        basis[..., 0, :] = residual * columns(divide(torch.ones_like(beta), beta))
        target = residual.new_zeros(*batch, length + 1)
        target[..., 0] = beta
        upper = residual.new_zeros(*batch, length, length)
        rotations = residual.new_zeros(*batch, length, 2)
        position, begun = torch.zeros((), dtype=torch.int64), torch.zeros_like(beta, dtype=torch.int64)
        return _Memory(x, residual, basis, upper, rotations, target, position, begun)

    def restart_from(self, system: System, memory: _Memory, mask: Tensor, residual: Tensor) -> _Memory:
        """A cycle that begins where the others stand, after columns that are zero and rotations that do nothing."""
        k = int(memory.position)
        fresh = self._cycle(system, torch.zeros_like(residual), residual)
        basis, target = torch.zeros_like(memory.basis), torch.zeros_like(memory.target)
        basis[..., k, :], target[..., k] = fresh.basis[..., 0, :], fresh.target[..., 0]
        rotations = torch.zeros_like(memory.rotations)
        rotations[..., 0] = 1.0
        begun = torch.full_like(memory.begun, k)
        fresh = fresh._replace(basis=basis, target=target, rotations=rotations, position=memory.position, begun=begun)
        return select(mask, fresh, memory)

    def step(self, system: System, memory: _Memory) -> tuple[_Memory, Progress]:
        """One Arnoldi step and one Givens rotation; after the last of a cycle, the next cycle is set up."""
        k = int(memory.position)
        basis, rotations, target = memory.basis, memory.rotations, memory.target
        vector = system.mv(system.precondition(basis[..., k, :].contiguous()))
        gain = system.norm(vector)
        column = basis.new_zeros(*basis.shape[:-2], k + 2)
        done = basis[..., : k + 1, :]
        for _ in range(2):
            weights = system.inner(done.movedim(-2, 0), vector).movedim(0, -1)  # (*batch, k + 1)
            vector = vector - (weights.unsqueeze(-2) @ done).squeeze(-2)
            column[..., : k + 1] += weights
        length = system.norm(vector)
        tiny = 10 * torch.finfo(length.dtype).eps
        scale = torch.maximum(gain, torch.linalg.vector_norm(memory.upper, dim=-2).amax(-1))  # of the columns so far
        length = torch.where(length <= tiny * scale, 0.0, length)
        column[..., k + 1] = length
        basis[..., k + 1, :] = vector * columns(divide(torch.ones_like(length), length))
        for j in range(k):
            c, s = rotations[..., j, 0], rotations[..., j, 1]
            first, second = column[..., j].clone(), column[..., j + 1].clone()
            column[..., j], column[..., j + 1] = c * first + s * second, c * second - s * first
        pivot = torch.hypot(column[..., k], column[..., k + 1])
        c, s = divide(column[..., k], pivot), divide(column[..., k + 1], pivot)
        rotations[..., k, 0], rotations[..., k, 1] = c, s
        memory.upper[..., : k + 1, k] = column[..., : k + 1]
        # The Krylov space is invariant and the operator singular on it: the column is dead, and says so by its zero.
        singular = (length == 0) & (pivot <= tiny * scale)
        memory.upper[..., k, k] = torch.where(singular, 0.0, pivot)
        target[..., k + 1], target[..., k] = -s * target[..., k], c * target[..., k]
        estimate = target[..., k + 1].abs()
        running = full_codes(Result.running, gain.shape, gain.device)
        status = torch.where(singular, Result.singular.code, running)
        memory = memory._replace(position=memory.position + 1)
        if k + 1 < target.shape[-1] - 1:
            return memory, Progress(estimate, Facts(gain, status))
        x = self.correction(system, memory)
        residual = memory.residual - self._image(memory)
        before, after = system.norm(memory.residual), system.norm(residual)
        stuck = (after > 0.999 * before) & (status == Result.running.code) & (memory.begun == 0)
        status = torch.where(stuck, Result.stagnated.code, status)
        return self._cycle(system, x, residual), Progress(estimate, Facts(gain, status))

    def _weights(self, memory: _Memory) -> Tensor:
        """Solution of the triangular system; a vanished pivot (a singular operator) gives weight 0."""
        k = int(memory.position)
        upper, target = memory.upper[..., :k, :k], memory.target[..., :k]
        diagonal = torch.diagonal(upper, dim1=-2, dim2=-1)
        dead = diagonal == 0
        upper = upper + torch.diag_embed(dead.to(upper.dtype))
        target = torch.where(dead, 0.0, target)
        return torch.linalg.solve_triangular(upper, target.unsqueeze(-1), upper=True).squeeze(-1)

    def _image(self, memory: _Memory) -> Tensor:
        """`A` times this cycle's correction, from the Arnoldi relation: `r - r_new = V_{k+1} Q^T (e - e_last)`."""
        k = int(memory.position)
        rotated = memory.target[..., : k + 1].clone()
        rotated[..., k] = 0.0
        for j in reversed(range(k)):
            c, s = memory.rotations[..., j, 0], memory.rotations[..., j, 1]
            first, second = rotated[..., j].clone(), rotated[..., j + 1].clone()
            rotated[..., j], rotated[..., j + 1] = c * first - s * second, s * first + c * second
        return (rotated.unsqueeze(-2) @ memory.basis[..., : k + 1, :]).squeeze(-2)

    def correction(self, system: System, memory: _Memory) -> Tensor:
        """The earlier cycles' iterate and this one's combination of its basis."""
        k = int(memory.position)
        if k == 0:
            return memory.x
        combined = (self._weights(memory).unsqueeze(-2) @ memory.basis[..., :k, :]).squeeze(-2)
        return memory.x + system.precondition(combined)
