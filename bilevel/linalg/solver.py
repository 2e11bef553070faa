"""The contract of a linear solver, and `linear_solve`, the function most callers need."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor

from bilevel.errors import UsageError
from bilevel.linalg.operator import NO_TAGS, LinearOperator, Tag
from bilevel.result import Solution


class LinearSolver(ABC):
    """A way to solve `A x = b`, batched over systems; stateless, so one object serves any number of operators.

    Attributes:
        requires: the tags without which the solver refuses an operator.
        instead: what to use when a tag is missing, for the message.
        square: True when the operator must be square.
        biased: True when the answer is not meant to be the solution (a declared approximation).
        sees_curvature: True when its solutions say whether a symmetric operator is positive definite, as far as the solver
            has come to see it.
    """

    requires: ClassVar[frozenset[Tag]] = NO_TAGS
    instead: ClassVar[str] = ""
    square: ClassVar[bool] = True
    biased: ClassVar[bool] = False
    sees_curvature: ClassVar[bool] = False

    @abstractmethod
    def init(self, operator: LinearOperator) -> Any:
        """Whatever can be prepared once for an operator and used for many right-hand sides (a factorisation, a step).

        Raises:
            UsageError: the operator lacks a tag that the solver needs, or is not square.
        """

    @abstractmethod
    def compute(
        self,
        state: Any,
        vector: Tensor,
        *,
        x0: Tensor | None = None,
        rtol: float | None = None,
        preconditioner: LinearOperator | None = None,
    ) -> Solution:
        """Solve for a right-hand side `(*extra, *batch, m)`; never raises for a numerical failure, but reports it.

        Args:
            state: what `init` returned.
            vector: the right-hand side `b`; extra leading dimensions are more right-hand sides for the same operator.
            x0: where to start, for iterative solvers, which take its best multiple.
            rtol: overrides the solver's own relative tolerance.
            preconditioner: an operator that approximates the inverse (symmetric positive definite for CG and MINRES).
        """

    def is_preconditioned(self, operator: LinearOperator) -> bool:
        """Whether a preconditioner has anything to do: not where the solver of this operator is a direct one."""
        return True

    @abstractmethod
    def transpose(self, state: Any) -> Any:
        """The state for systems with `A^T`."""

    def check(self, operator: LinearOperator) -> None:
        """Raise `UsageError` unless the operator has the shape and the tags that the solver needs."""
        name = type(self).__name__
        if self.square and operator.shape[0] != operator.shape[1]:
            raise UsageError(f"{name} needs a square operator, but this one has shape {operator.shape}: use LSMR.")
        missing = self.requires - operator.tags
        if missing:
            tags = " and ".join(sorted(tag.value for tag in missing))
            raise UsageError(
                f"{name} needs an operator that is {tags}, but this {type(operator).__name__} is not tagged so: "
                f"{self.instead}"
            )


def linear_solve(
    operator: LinearOperator,
    vector: Tensor,
    solver: LinearSolver,
    *,
    x0: Tensor | None = None,
    rtol: float | None = None,
    preconditioner: LinearOperator | None = None,
    throw: bool = True,
) -> Solution:
    """Solve `A x = b` for a batch of systems.

    Args:
        operator: `A`, shape `(m, n)` with its batch.
        vector: `b`, shape `(*batch, m)`, or with extra leading dimensions for several right-hand sides.
        solver: how.
        x0: where to start (iterative solvers, which take its best multiple).
        rtol: overrides the solver's relative tolerance.
        preconditioner: approximates the inverse of `A`.
        throw: raise when a system failed; otherwise the `Solution` says so.

    Raises:
        UsageError: shapes, dtypes or tags do not fit.
        SolveError: `throw` is True and a system was not solved.

    Example:
        >>> import torch
        >>> from bilevel.linalg import ConjugateGradient, MatrixOperator, POSITIVE_DEFINITE
        >>> operator = MatrixOperator(torch.tensor([[4.0, 1.0], [1.0, 3.0]]), POSITIVE_DEFINITE)
        >>> solution = linear_solve(operator, torch.tensor([1.0, 2.0]), ConjugateGradient())
        >>> [round(v, 4) for v in solution.value.tolist()], int(solution.num_mv)
        ([0.0909, 0.6364], 3)
    """
    state = solver.init(operator)
    solution = solver.compute(state, vector, x0=x0, rtol=rtol, preconditioner=preconditioner)
    return solution.raise_if_failed(type(solver).__name__) if throw else solution


def check_vector(operator: LinearOperator, vector: Tensor, name: str = "right-hand side", axis: int = 0) -> None:
    """Raise `UsageError` unless the vector ends in the operator's batch and length, and has its dtype."""
    expected = (*operator.batch_shape, operator.shape[axis])
    if tuple(vector.shape[max(vector.ndim - len(expected), 0) :]) != expected:
        raise UsageError(
            f"the {name} was expected to have shape {expected}, but has {tuple(vector.shape)}: "
            f"one vector of length {operator.shape[axis]} for each system."
        )
    if vector.dtype != operator.dtype:
        raise UsageError(
            f"the {name} is {vector.dtype}, but the operator is {operator.dtype}: convert one with .to(dtype)."
        )
