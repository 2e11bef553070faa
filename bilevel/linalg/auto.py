"""The linear solver that chooses: by the operator's tags and size, and by what it meets on the way."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from bilevel.errors import UsageError
from bilevel.linalg.cg import ConjugateGradient
from bilevel.linalg.dense import DenseCholesky, DenseLU, extreme_eigenvalues
from bilevel.linalg.diagonal import DiagonalSolver
from bilevel.linalg.gmres import GMRES
from bilevel.linalg.matrix import MatrixOperator
from bilevel.linalg.minres import MINRES
from bilevel.linalg.operator import LinearOperator, Tag, norm
from bilevel.linalg.solver import LinearSolver
from bilevel.result import Result, Solution

RESTART = 100  # length of a cycle of GMRES: memory is that many vectors


class _Choice(NamedTuple):
    """A solver with its state, and what takes over where it meets negative curvature (None: nothing does)."""

    operator: LinearOperator
    solver: LinearSolver
    state: Any
    remedy: LinearSolver | None = None
    remedy_state: Any = None


@dataclass(frozen=True)
class AutoSolver(LinearSolver):
    r"""Chooses by tags and size.

    * diagonal: division.
    * at most `dense_size` unknowns, or a matrix that is given: Cholesky, and LU of the same matrix for systems that turn out
      not to be positive definite; LU at once where the operator is not tagged symmetric. `n` products.
    * larger and symmetric: conjugate gradient with the preconditioner; systems that meet negative curvature go on with
      MINRES from where it stopped.
    * larger and unsymmetric: GMRES, the preconditioner on its right.

    The products of all that was tried are counted, and the solution's `method` names it.

    Args:
        rtol: tolerance relative to the right-hand side, for the iterative solvers.
        atol: absolute tolerance.
        max_steps: largest number of steps of each iterative solver.
        dense_size: largest number of unknowns for which the matrix is formed: at a few hundred `n` products cost as much as the
            steps that conjugate gradient takes on ill-conditioned Hessians, and the answer is exact.

    Example:
        >>> from bilevel.linalg import SYMMETRIC
        >>> operator = MatrixOperator(torch.tensor([[1.0, 2.0], [2.0, 1.0]]), SYMMETRIC)
        >>> solver = AutoSolver()
        >>> solution = solver.compute(solver.init(operator), torch.ones(2))
        >>> [round(v, 4) for v in solution.value.tolist()], solution.method
        ([0.3333, 0.3333], 'DenseCholesky, DenseLU')
    """

    sees_curvature: ClassVar[bool] = True

    rtol: float = 1e-6
    atol: float = 0.0
    max_steps: int = 10_000
    dense_size: int = 256

    def __post_init__(self) -> None:
        """Validate the numbers."""
        if self.rtol is None:
            raise UsageError(
                "AutoSolver needs a tolerance rtol: for a budget of steps choose ConjugateGradient or MINRES."
            )
        if self.dense_size < 0:
            raise UsageError(f"AutoSolver needs dense_size >= 0, but got {self.dense_size}.")
        ConjugateGradient(self.rtol, self.atol, self.max_steps)  # its checks are ours

    def is_preconditioned(self, operator: LinearOperator) -> bool:
        """Where it iterates."""
        return Tag.diagonal not in operator.tags and not self._is_dense(operator)

    def _is_dense(self, operator: LinearOperator) -> bool:
        return isinstance(operator, MatrixOperator) or operator.shape[0] <= self.dense_size

    def init(self, operator: LinearOperator) -> _Choice:
        """Choose, and factorise what is small."""
        self.check(operator)
        if Tag.diagonal in operator.tags:
            return _start(DiagonalSolver(), operator)
        symmetric = Tag.symmetric in operator.tags
        n = operator.shape[0]
        if self._is_dense(operator):
            return self._factorise(operator) if symmetric else _start(DenseLU(max_size=n), operator)
        limits = self.rtol, self.atol, self.max_steps
        if not symmetric:
            return _start(GMRES(*limits, restart=RESTART), operator)
        return _start(ConjugateGradient(*limits), operator)._replace(remedy=MINRES(*limits), remedy_state=operator)

    def _factorise(self, operator: LinearOperator) -> _Choice:
        """Cholesky; and LU of the matrix it has formed, where that is not positive definite."""
        choice = _start(DenseCholesky(max_size=operator.shape[0]), operator)
        if not bool((choice.state.defect == Result.negative_curvature.code).any()):
            return choice
        remedy = DenseLU(max_size=operator.shape[0])
        state = remedy.init(MatrixOperator(choice.state.matrix, operator.tags))
        state = state._replace(operator=operator, spectrum=extreme_eigenvalues(choice.state.matrix))
        return choice._replace(remedy=remedy, remedy_state=state)

    def transpose(self, state: _Choice) -> _Choice:
        """The same choice, for the transposed operator; a remedy is for symmetric ones only, which are their own."""
        return state._replace(state=state.solver.transpose(state.state))

    def compute(
        self,
        state: _Choice,
        vector: Tensor,
        *,
        x0: Tensor | None = None,
        rtol: float | None = None,
        preconditioner: LinearOperator | None = None,
    ) -> Solution:
        """Solve; the remedy goes on from the iterate of those systems that met negative curvature."""
        first = state.solver.compute(state.state, vector, x0=x0, rtol=rtol, preconditioner=preconditioner)
        first = _named(first, state.solver)
        failed = first.result == Result.negative_curvature.code
        if state.remedy is None or not bool(failed.any()):
            return first
        # Along negative curvature an iterate of conjugate gradient may be worse than none.
        nearer = failed & (first.residual_norm < norm(state.operator, vector))
        x0 = torch.where(nearer.unsqueeze(-1), first.value, 0.0)
        rest = torch.where(failed.unsqueeze(-1), vector, 0.0)
        again = state.remedy.compute(state.remedy_state, rest, x0=x0, rtol=rtol, preconditioner=preconditioner)
        return first.continued_by(_named(again, state.remedy), failed)


def _start(solver: LinearSolver, operator: LinearOperator) -> _Choice:
    return _Choice(operator, solver, solver.init(operator))


def _named(solution: Solution, solver: LinearSolver) -> Solution:
    return replace(solution, method=type(solver).__name__)
