"""The base of the iterative linear solvers: a method says how to start and to step; the loop does the rest."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from bilevel.errors import UsageError
from bilevel.linalg.allocator import keep_freed_memory
from bilevel.linalg.composite import SharedOperator
from bilevel.linalg.loop import Loop
from bilevel.linalg.operator import LinearOperator
from bilevel.linalg.solver import LinearSolver, check_vector
from bilevel.linalg.system import Facts, Progress, System, divide, select
from bilevel.result import Solution


@dataclass(frozen=True)
class IterativeSolver(LinearSolver):
    """Base of the iterative methods: the tolerances, and the loop.

    A system has converged when its true residual is at most `max(rtol ‖b‖ + atol, max(8, √n) eps (‖A‖ ‖x‖ + ‖b‖))`:
    the second term is the backward error of a stable direct solver, below which no residual can be pushed in that
    precision; where it exceeds the fourth root of the rounding level times `‖b‖` it counts no longer, and a system whose
    iterate has grown so far unsolved is reported as singular. Claims of the recurrence are verified by the true residual
    wherever rounding could have spoilt them, and every 50 steps. A system whose residual has not halved in
    `max(10 n, 1000)` steps has stagnated.

    Args:
        rtol: tolerance relative to the norm of the right-hand side; None makes `max_steps` a budget.
        atol: absolute tolerance on the residual norm, in units of the right-hand side.
        max_steps: largest number of steps.
    """

    rtol: float | None = 1e-6
    atol: float = 0.0
    max_steps: int = 1000

    residual_may_wait: ClassVar[bool] = False  # True where a residual that does not fall means nothing

    def __post_init__(self) -> None:
        """Validate the numbers."""
        name = type(self).__name__
        if self.rtol is not None and not 0 <= self.rtol < 1:
            raise UsageError(f"{name} needs rtol in [0, 1) or None (a budget of max_steps), but got {self.rtol}.")
        if not self.atol >= 0:
            raise UsageError(f"{name} needs atol >= 0, but got {self.atol}.")
        if self.max_steps < 1:
            raise UsageError(
                f"{name} needs max_steps >= 1, but got {self.max_steps}: IdentitySolver is the choice of no step at all."
            )

    @abstractmethod
    def start(self, system: System, residual: Tensor) -> Any:
        """Memory (a NamedTuple of tensors with leading batch) for solving `A d = residual` from `d = 0`."""

    @abstractmethod
    def step(self, system: System, memory: Any) -> tuple[Any, Progress]:
        """One step."""

    @abstractmethod
    def correction(self, system: System, memory: Any) -> Tensor:
        """The iterate `d` that the memory stands at, `(*batch, n)`."""

    def stretch(self, system: System, x0: Tensor, image: Tensor, residual: Tensor) -> Tensor:
        """By how many times itself to lengthen a starting point, `(*batch,)`; so that its residual is least.

        The solution of another system often has the right direction and the wrong length. A start is never worse than
        zero then. The residual's own multiple leaves a good start as it is, where the right-hand side's would cancel.
        """
        return divide(system.inner(image, residual), system.inner(image, image))

    def facts(self, steps: Sequence[Any]) -> Facts:
        """The facts of steps in a row, `(steps, *batch)`: once for many, since each costs more than it weighs."""
        stacked: list[Any] = [None if column[0] is None else torch.stack(column) for column in zip(*steps, strict=True)]
        return Facts(*stacked)

    def replace_residual(self, memory: Any, residual: Tensor) -> Any:
        """Put the true residual in the place of the recursive one, keeping the directions; for methods that can."""
        return memory

    def restart_from(self, system: System, memory: Any, mask: Tensor, residual: Tensor) -> Any:
        """Start the systems in the mask anew from the residual; the others go on as they are."""
        return select(mask, self.start(system, residual), memory)

    def init(self, operator: LinearOperator) -> LinearOperator:
        """Check the tags; the operator is all the state there is."""
        self.check(operator)
        return operator

    def transpose(self, state: LinearOperator) -> LinearOperator:
        """The transposed operator."""
        return state.transpose()

    def compute(
        self,
        state: LinearOperator,
        vector: Tensor,
        *,
        x0: Tensor | None = None,
        rtol: float | None = None,
        preconditioner: LinearOperator | None = None,
    ) -> Solution:
        """Run the method until every system is done; see `LinearSolver.compute`."""
        operator = state
        check_vector(operator, vector)
        if extra := tuple(vector.shape[: vector.ndim - 1 - len(operator.batch_shape)]):
            operator = SharedOperator(operator, extra)
        if x0 is not None:
            check_vector(operator, x0, "starting point x0", axis=1)
        keep_freed_memory()
        with torch.no_grad():
            loop = Loop(self, System(operator, preconditioner), vector, x0, self.rtol if rtol is None else rtol)
            return loop.solve()
