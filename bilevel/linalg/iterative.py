"""The one loop that runs every iterative linear solver.

A method says how to start from a residual, how to take a step and what correction it stands at; this module does the
rest once for all of them: scaling, masks (one a system), tolerances, verification by the true residual, restarts,
stagnation, non-finite values and the accounting of products.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from bilevel.errors import UsageError
from bilevel.linalg.composite import SharedOperator
from bilevel.linalg.operator import LinearOperator, norm
from bilevel.linalg.solver import LinearSolver, check_vector
from bilevel.result import Result, Solution, full_codes

CHECK_PERIOD = 50  # steps between looks at the true residual
MAX_STRIKES = 3  # claims in a row that the true residual refutes without having halved


def rounding_level(n: int, dtype: torch.dtype) -> float:
    """Backward error that rounding leaves in a product of length `n`: `max(8, √n) eps`; no solver can do better."""
    return max(8.0, math.sqrt(n)) * torch.finfo(dtype).eps


def worthless_level(n: int, dtype: torch.dtype) -> float:
    """Relative residual above which rounding is no excuse: where the attainable one is larger, `A` is as good as singular.

    The fourth root of the rounding level: a condition number of about 1e11 in float64, 3e4 in float32.
    """
    return rounding_level(n, dtype) ** 0.25


@dataclass(frozen=True)
class System:
    """What a method may use: products, the preconditioner, the operator's inner product, and what `init` prepared."""

    operator: LinearOperator
    preconditioner: LinearOperator | None
    state: Any

    def mv(self, vector: Tensor) -> Tensor:
        """`A v`."""
        return self.operator.mv(vector)

    def precondition(self, vector: Tensor) -> Tensor:
        """`M^-1 v`, or `v` without a preconditioner."""
        return vector if self.preconditioner is None else self.preconditioner.mv(vector)

    def inner(self, u: Tensor, v: Tensor) -> Tensor:
        """Inner product of each system."""
        return self.operator.inner(u, v)

    def norm(self, vector: Tensor) -> Tensor:
        """Norm of each system's vector."""
        return self.operator.inner(vector, vector).sqrt()


class Progress(NamedTuple):
    """What one step tells the loop about each system, shapes `(*batch,)`.

    Attributes:
        estimate: norm of the residual as the recurrence has it.
        gain: a lower estimate of the operator's norm, from this step's product.
        status: codes of `Result`; `running` where all is well.
        curvature: Rayleigh quotient seen in this step, if the method has one.
        optimal: norm of `A^T r` over the norm of `r` (least squares only).
    """

    estimate: Tensor
    gain: Tensor
    status: Tensor
    curvature: Tensor | None = None
    optimal: Tensor | None = None


def divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """`a / b`, and 0 where `b` is 0: a system that is done stays where it is instead of turning into NaN."""
    return (numerator / denominator).masked_fill_(denominator == 0, 0.0)


def columns(scalar: Tensor) -> Tensor:
    """A scalar for each system, `(*batch,)`, ready to multiply vectors `(*batch, n)`."""
    return scalar.unsqueeze(-1)


def select(mask: Tensor, new: Any, old: Any) -> Any:
    """Field by field, the new memory for the systems in the mask and the old one for the others."""

    def pick(fresh: Tensor, stale: Tensor) -> Tensor:
        if fresh is stale:
            return stale
        shape = mask.shape + (1,) * (fresh.ndim - mask.ndim)
        return torch.where(mask.reshape(shape), fresh, stale)

    return type(old)(*(pick(fresh, stale) for fresh, stale in zip(new, old, strict=True)))


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

    products_per_step: ClassVar[int] = 1
    products_to_start: ClassVar[int] = 0
    residual_may_wait: ClassVar[bool] = False  # True where a residual that does not fall means nothing

    def __post_init__(self) -> None:
        """Validate the numbers."""
        name = type(self).__name__
        if self.rtol is not None and not 0 <= self.rtol < 1:
            raise UsageError(f"{name} needs rtol in [0, 1) or None (a budget of max_steps), but got {self.rtol}.")
        if self.atol < 0:
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

    def replace_residual(self, memory: Any, residual: Tensor) -> Any:
        """Put the true residual in the place of the recursive one, keeping the directions; for methods that can."""
        return memory

    def restart_from(self, system: System, memory: Any, mask: Tensor, residual: Tensor) -> Any:
        """Start the systems in the mask anew from the residual; the others go on as they are."""
        return select(mask, self.start(system, residual), memory)

    def operator_of(self, state: Any) -> LinearOperator:
        """The operator that a state was prepared for."""
        operator: LinearOperator = state
        return operator

    def init(self, operator: LinearOperator) -> Any:
        """Check the tags; the operator is all the state there is."""
        self.check(operator)
        return operator

    def transpose(self, state: Any) -> Any:
        """The transposed operator."""
        return state.transpose()

    def compute(
        self,
        state: Any,
        vector: Tensor,
        *,
        x0: Tensor | None = None,
        rtol: float | None = None,
        preconditioner: LinearOperator | None = None,
    ) -> Solution:
        """Run the method until every system is done; see `LinearSolver.compute`."""
        operator = self.operator_of(state)
        check_vector(operator, vector)
        if extra := tuple(vector.shape[: vector.ndim - 1 - len(operator.batch_shape)]):
            operator = SharedOperator(operator, extra)
        if x0 is not None:
            check_vector(operator, x0, "starting point x0", axis=1)
        with torch.no_grad():
            run = _Run(self, System(operator, preconditioner, state), vector, x0, self.rtol if rtol is None else rtol)
            return run.solve()


class _Run:
    """The loop's variables for one call of `compute`; right-hand sides are scaled to norm one."""

    def __init__(
        self, solver: IterativeSolver, system: System, vector: Tensor, x0: Tensor | None, rtol: float | None
    ) -> None:
        self.solver, self.system = solver, system
        operator = system.operator
        self.level = rounding_level(operator.shape[1], vector.dtype)
        self.worthless = worthless_level(operator.shape[1], vector.dtype)
        self.scale = norm(operator, vector)  # (*batch,)
        self.result = torch.where(self.scale == 0, Result.converged.code, Result.running.code)
        self.result = torch.where(self.scale.isfinite(), self.result, Result.nonfinite.code)
        self.running = self.result == Result.running.code
        self.everyone = bool(self.running.all())
        safe = torch.where(self.running, self.scale, 1.0)
        self.vector = torch.where(columns(self.running), vector / columns(safe), 0.0)
        self.tolerance = None if rtol is None else rtol + solver.atol / safe
        self.num_mv = torch.zeros_like(self.result)
        self.gain = torch.zeros_like(self.scale)
        self.peak = torch.zeros_like(self.scale)  # largest residual norm on the way: what it rounded away stays lost
        self.curvature_min = torch.full_like(self.scale, torch.nan)
        self.curvature_max = torch.full_like(self.scale, torch.nan)
        self.strikes = torch.zeros_like(self.result)
        shape = (*operator.batch_shape, operator.shape[1])
        self.base = torch.zeros(shape, dtype=vector.dtype, device=vector.device)
        residual = self.vector
        if x0 is not None and bool(self.running.any()):
            self.base = torch.where(columns(self.running), x0 / columns(safe), 0.0)
            residual = self.vector - system.mv(self.base)
            self.num_mv = self.num_mv + self.running
            stale = ~system.norm(residual).isfinite()
            self.base = torch.where(columns(stale), 0.0, self.base)
            residual = torch.where(columns(stale), self.vector, residual)
        self.best, self.best_norm = self.base, system.norm(residual)
        self.first_residual = residual
        self.halved_norm, self.halved_at = self.best_norm, torch.zeros_like(self.result)
        self.floor = self._attainable(self.base)  # of the best iterate, brought up to date when it changes

    def solve(self) -> Solution:
        """Step until no system is running."""
        if self.tolerance is not None:
            self._finish(self.running & (self.best_norm <= self.tolerance), Result.converged)
            self.everyone = bool(self.running.all())
        if bool(self.running.any()):
            memory = self.solver.start(self.system, self.first_residual)
            self.num_mv = self.num_mv + self.solver.products_to_start * self.running
            for number in range(1, self.solver.max_steps + 1):
                memory, progress = self.solver.step(self.system, memory)
                finite = progress.estimate < torch.inf  # False for NaN too
                self._account(progress, finite)
                if not self._eventful(progress, finite, number):
                    continue
                memory = self._judge(memory, progress, number)
                if not bool(self.running.any()):
                    break
                self.everyone = bool(self.running.all())
        return self._solution()

    def _account(self, progress: Progress, finite: Tensor) -> None:
        """Count the products and widen the ranges of the systems that are still running."""
        self.num_mv = self._update(self.num_mv, self.num_mv + self.solver.products_per_step)
        self.gain = self._update(self.gain, torch.fmax(self.gain, progress.gain))
        self.peak = self._update(self.peak, torch.where(finite, torch.maximum(self.peak, progress.estimate), self.peak))
        if progress.curvature is not None:
            self.curvature_min = self._update(self.curvature_min, torch.fmin(self.curvature_min, progress.curvature))
            self.curvature_max = self._update(self.curvature_max, torch.fmax(self.curvature_max, progress.curvature))

    def _update(self, old: Tensor, new: Tensor) -> Tensor:
        """The new value for the systems that are still running; no operation while all are."""
        return new if self.everyone else torch.where(self.running, new, old)

    def _claims(self, progress: Progress) -> Tensor:
        """Which systems are done if the recurrence is right."""
        if self.tolerance is None:
            return torch.zeros_like(self.running)
        claim = progress.estimate <= torch.maximum(self.tolerance, self.floor)
        if progress.optimal is not None:
            claim = claim | (progress.optimal <= self._optimality() * self.gain)
        return claim

    def _is_refresh(self, number: int) -> bool:
        return self.tolerance is not None and number % CHECK_PERIOD == 0

    def _eventful(self, progress: Progress, finite: Tensor, number: int) -> bool:
        """Whether a step needs a closer look. Most do not: in small problems this question is all that they may cost."""
        if number == self.solver.max_steps or self._is_refresh(number):
            return True
        event = (progress.status != Result.running.code) | ~finite
        if self.tolerance is not None:
            event = event | self._claims(progress)
        return bool((event & self.running).any())

    def _judge(self, memory: Any, progress: Progress, number: int) -> Any:
        """Decide which systems are done after a step; verify claims by the true residual; restart false ones."""
        last = number == self.solver.max_steps
        broken = self.running & ~(progress.estimate < torch.inf)
        failed = self.running & (progress.status != Result.running.code) & ~broken
        claim = self._claims(progress) & self.running & ~failed & ~broken
        refresh = self._is_refresh(number)
        iterate = self.base + self.solver.correction(self.system, memory)
        looked_at = self.running if last or refresh else claim | failed | broken
        residual, true_norm = self._measure(iterate, progress, looked_at, number, refresh)
        better = looked_at & (true_norm < self.best_norm)
        halved = looked_at & (true_norm <= 0.5 * self.halved_norm)
        self.halved_norm = torch.where(halved, true_norm, self.halved_norm)
        self.halved_at = torch.where(halved, number, self.halved_at)
        self.best = torch.where(columns(better), iterate, self.best)
        self.best_norm = torch.where(better, true_norm, self.best_norm)
        self.floor = self._attainable(self.best)
        if self.tolerance is not None:
            reached = true_norm <= torch.maximum(self.tolerance, self._attainable(iterate))
            self._finish(looked_at & reached & ~broken, Result.converged)
            self._finish_least_squares(claim & self.running, residual, true_norm)
        self._finish(failed & self.running, progress.status)
        self._finish(broken & self.running, Result.nonfinite)
        if self.tolerance is not None:
            overgrown = looked_at & self.running & (self._rounding(iterate) > self.worthless)
            self._finish(overgrown, Result.singular)
        false = claim & self.running
        self.strikes = torch.where(false, torch.where(halved, 0, self.strikes + 1), self.strikes)
        self._finish(false & (self.strikes >= MAX_STRIKES), Result.stagnated)
        if self.tolerance is not None and not self.solver.residual_may_wait:
            patience = max(10 * self.vector.shape[-1], 1000)
            self._finish(looked_at & self.running & (number - self.halved_at > patience), Result.stagnated)
        if last:
            if self.tolerance is None:  # a budget: its last iterate is the answer, not the one of least residual
                self.best = torch.where(columns(self.running), iterate, self.best)
                self.best_norm = torch.where(self.running, true_norm, self.best_norm)
            self._finish(self.running, Result.max_steps if self.tolerance is not None else Result.budget_spent)
        if residual is None or not bool(self.running.any()):
            return memory
        if refresh:
            # Near rounding level the true residual is noise, and would spoil the recurrence instead of mending it.
            mend = self.running & ~false & (true_norm > 100 * self._attainable(iterate))
            memory = select(mend, self.solver.replace_residual(memory, residual), memory)
        if bool((false & self.running).any()):
            memory = self.solver.restart_from(self.system, memory, false, residual)
            self.num_mv = self.num_mv + self.solver.products_to_start * (false & self.running)
            self.base = torch.where(columns(false), iterate, self.base)
        return memory

    def _measure(
        self, iterate: Tensor, progress: Progress, looked_at: Tensor, number: int, refresh: bool
    ) -> tuple[Tensor | None, Tensor]:
        """The true residual and its norm, by one product; the recurrence's norm where rounding cannot have spoilt it.

        The recursive residual drifts from the true one by at most about `steps eps (‖A‖ max‖x‖ + ‖b‖)` (van der Vorst
        and Ye, 2000), and `‖A‖ max‖x‖` by about the larger of its present value and the largest residual on the way; a
        claim far above that needs no product to be believed, nor does the end of a budget.
        """
        drift = 10 * number * (self._rounding(iterate) + self.level * self.peak)
        trusted = self.tolerance is None or bool((~looked_at | (progress.estimate > drift)).all())
        if self.tolerance is not None and progress.optimal is not None:
            trusted = False  # a least-squares residual is large, and is wanted itself
        plain = progress.status == Result.running.code
        if trusted and not refresh and bool((plain | ~looked_at).all()):
            return None, torch.where(progress.estimate.isfinite(), progress.estimate, torch.inf)
        residual = self.vector - self.system.mv(iterate)
        self.num_mv = self.num_mv + looked_at
        true_norm = self.system.norm(residual)
        return residual, torch.where(true_norm.isfinite(), true_norm, torch.inf)

    def _rounding(self, iterate: Tensor) -> Tensor:
        """Residual that rounding alone may leave at an iterate."""
        return self.level * (self.gain * self.system.norm(iterate) + 1.0)

    def _attainable(self, iterate: Tensor) -> Tensor:
        """Residual that is accepted because rounding may have left it."""
        return self._rounding(iterate).clamp(max=self.worthless)

    def _optimality(self) -> Tensor:
        """How orthogonal to the range, relative to the operator's norm, a least-squares residual has to be."""
        assert self.tolerance is not None
        return torch.clamp(self.tolerance, min=self.level)

    def _finish_least_squares(self, claim: Tensor, residual: Tensor | None, true_norm: Tensor) -> None:
        if self.solver.square or residual is None or not bool(claim.any()):
            return
        slope = self.system.norm(self.system.operator.transpose().mv(residual))
        self.num_mv = self.num_mv + claim
        self._finish(claim & (slope <= 2 * self._optimality() * self.gain * true_norm), Result.least_squares)

    def _finish(self, mask: Tensor, result: Result | Tensor) -> None:
        code = result.code if isinstance(result, Result) else result
        self.result = torch.where(mask, code, self.result)
        self.running = self.running & ~mask

    def _solution(self) -> Solution:
        finite = self.scale.isfinite()
        nonfinite = full_codes(Result.nonfinite, self.result.shape, self.result.device)
        return Solution(
            value=self.best * columns(torch.where(finite, self.scale, 1.0)),
            result=torch.where(finite, self.result, nonfinite),
            num_mv=self.num_mv,
            residual_norm=torch.where(self.scale == 0, 0.0, self.best_norm * self.scale),
            curvature_min=self.curvature_min,
            curvature_max=self.curvature_max,
        )
