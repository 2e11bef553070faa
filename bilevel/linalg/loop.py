"""The one loop that runs every iterative linear solver.

Scaling, masks (one a system), tolerances, verification by the true residual, restarts, stagnation, non-finite values
and the accounting of products: once, for all methods.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from bilevel.linalg.operator import norm
from bilevel.linalg.system import Progress, System, columns, rounding_level, select, worthless_level
from bilevel.result import Result, Solution, full_codes

if TYPE_CHECKING:
    from bilevel.linalg.iterative import IterativeSolver

CHECK_PERIOD = 50  # steps between looks at the true residual
MAX_STRIKES = 3  # claims in a row that the true residual refutes without having halved


class _Look(NamedTuple):
    """What is known of every system when the loop looks closer at a step; masks and norms have shape `(*batch,)`."""

    number: int  # of the step
    status: Tensor
    refresh: bool  # the look that comes round every so many steps
    last: bool
    at: Tensor  # whom it concerns
    claim: Tensor  # done, if the recurrence is right
    failed: Tensor  # the method gives up, and says why in `status`
    broken: Tensor  # not finite
    halved: Tensor  # the residual has halved since the last look that found so
    iterate: Tensor
    residual: Tensor | None  # the true one, if it was computed
    norm: Tensor


class Loop:
    """The loop's variables for one call of `compute`; right-hand sides are scaled to norm one.

    Args:
        solver: the method and its tolerances.
        system: what it works on.
        vector: the right-hand sides `(*batch, m)`.
        x0: where to start, `(*batch, n)`; its best multiple is taken.
        rtol: the relative tolerance of this call; None makes `max_steps` a budget.
    """

    def __init__(
        self, solver: IterativeSolver, system: System, vector: Tensor, x0: Tensor | None, rtol: float | None
    ) -> None:
        """Scale the right-hand sides; systems whose right-hand side is zero or not finite are done at once."""
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
        self.status = self.result
        self.pending: list[Progress] = []  # steps whose facts have not been looked at
        shape = (*operator.batch_shape, operator.shape[1])
        self.base = torch.zeros(shape, dtype=vector.dtype, device=vector.device)
        residual = self.vector
        if x0 is not None and bool(self.running.any()):
            self.base = torch.where(columns(self.running), x0 / columns(safe), 0.0)
            image = system.mv(self.base)
            self._charge(self.running)
            longer = columns(solver.stretch(system, self.base, image, self.vector - image))
            self.base = self.base + longer * self.base
            residual = self.vector - image - longer * image
            stale = ~system.norm(residual).isfinite()
            self.base = torch.where(columns(stale), 0.0, self.base)
            residual = torch.where(columns(stale), self.vector, residual)
        self.best, self.best_norm = self.base, system.norm(residual)
        self.first_residual = residual
        self.halved_norm, self.halved_at = self.best_norm, torch.zeros_like(self.result)
        self._set_bound()

    def solve(self) -> Solution:
        """Step until no system is running."""
        if self.tolerance is not None:
            self._finish(self.running & (self.best_norm <= self.tolerance), Result.converged)
            self.everyone = bool(self.running.all())
        if bool(self.running.any()):
            memory = self.solver.start(self.system, self.first_residual)
            self._charge(self.running)
            for number in range(1, self.solver.max_steps + 1):
                memory, progress = self.solver.step(self.system, memory)
                self.pending.append(progress)
                if not self._eventful(progress, number):
                    continue
                self._take_stock()
                memory = self._judge(memory, progress, number)
                if not bool(self.running.any()):
                    break
                self.everyone = bool(self.running.all())
        return self._solution()

    def _charge(self, systems: Tensor) -> None:
        """Put the products made since the last charge on these systems' account."""
        self.num_mv = self.num_mv + self.system.spent * systems
        self.system.spent = 0

    def _take_stock(self) -> None:
        """Count the products and widen the ranges of the systems that are still running, for all steps since the last time."""
        if not self.pending:
            return
        self._charge(self.running)
        facts = self.solver.facts([progress.facts for progress in self.pending])
        estimates = torch.stack([progress.estimate for progress in self.pending])
        passed = torch.where(estimates < torch.inf, estimates if facts.peak is None else facts.peak, torch.nan)
        self.status = facts.status[-1]
        self.gain = self._update(self.gain, torch.fmax(self.gain, _extreme(facts.gain, largest=True)))
        self.peak = self._update(self.peak, torch.fmax(self.peak, _extreme(passed, largest=True)))
        if facts.curvature is not None:
            least, most = (_extreme(facts.curvature, largest=largest) for largest in (False, True))
            self.curvature_min = self._update(self.curvature_min, torch.fmin(self.curvature_min, least))
            self.curvature_max = self._update(self.curvature_max, torch.fmax(self.curvature_max, most))
        self.pending.clear()

    def _update(self, old: Tensor, new: Tensor) -> Tensor:
        """The new value for the systems that are still running; no operation while all are."""
        return new if self.everyone else torch.where(self.running, new, old)

    def _claims(self, progress: Progress) -> Tensor:
        """Which systems are done if the recurrence is right."""
        claim = progress.estimate <= self.system.bound
        if progress.optimal is not None and self.tolerance is not None:
            claim = claim | (progress.optimal <= self._optimality() * self.gain)
        return claim

    def _set_bound(self) -> None:
        """The estimate at which a system claims to be done; none does where there is no tolerance.

        Half the floor: a claim just below it would often be refuted by rounding, and cost the method its directions.
        """
        if self.tolerance is None:
            self.system.bound = torch.full_like(self.scale, -1.0)
        else:
            self.system.bound = torch.maximum(self.tolerance, 0.5 * self._attainable(self.best))

    def _is_refresh(self, number: int) -> bool:
        return self.tolerance is not None and number % CHECK_PERIOD == 0

    def _eventful(self, progress: Progress, number: int) -> bool:
        """Whether a step needs a closer look. Most do not: in small problems this question is all that they may cost."""
        if number == self.solver.max_steps or self._is_refresh(number):
            return True
        if progress.optimal is not None:
            self._take_stock()  # its claims go by the operator's norm
        event = progress.event
        if event is None:
            event = (progress.facts.status != Result.running.code) | self._claims(progress)
            event = event | ~(progress.estimate < torch.inf)  # NaN is not below it, either
        if not self.everyone:
            event = event & self.running
        return bool(event.any() if event.ndim else event)

    def _judge(self, memory: Any, progress: Progress, number: int) -> Any:
        """Look closer at a step: keep what is best, decide which systems are done, and restart false claims."""
        look = self._look(memory, progress, number)
        self._keep(look)
        self._decide(look)
        if look.residual is None or not bool(self.running.any()):
            return memory
        return self._mend(memory, look, look.residual)

    def _look(self, memory: Any, progress: Progress, number: int) -> _Look:
        """The iterate of a step and its residual."""
        last, refresh = number == self.solver.max_steps, self._is_refresh(number)
        broken = self.running & ~(progress.estimate < torch.inf)
        failed = self.running & (self.status != Result.running.code) & ~broken
        claim = self._claims(progress) & self.running & ~failed & ~broken
        at = self.running if last or refresh else claim | failed | broken
        iterate = self.base + self.solver.correction(self.system, memory)
        residual, true_norm = self._measure(iterate, progress, at, number, refresh)
        halved = at & (true_norm <= 0.5 * self.halved_norm)
        return _Look(
            number, self.status, refresh, last, at, claim, failed, broken, halved, iterate, residual, true_norm
        )

    def _keep(self, look: _Look) -> None:
        """Remember the best iterates, and when residuals last halved."""
        self.halved_norm = torch.where(look.halved, look.norm, self.halved_norm)
        self.halved_at = torch.where(look.halved, look.number, self.halved_at)
        if (
            look.last and self.tolerance is None
        ):  # the answer to a budget is its last iterate, not that of least residual
            better = look.at & ~look.failed & ~look.broken
        else:
            better = look.at & (look.norm < self.best_norm)
        # What CG has found before it meets negative curvature lowers the quadratic, whatever the residual does.
        better = better | (look.failed & (look.status == Result.negative_curvature.code))
        self.best = torch.where(columns(better), look.iterate, self.best)
        self.best_norm = torch.where(better, look.norm, self.best_norm)
        self._set_bound()

    def _decide(self, look: _Look) -> None:
        """Which systems are done, and with which result; the first that applies."""
        if self.tolerance is None:
            self._finish(look.failed, look.status)
            self._finish(look.broken, Result.nonfinite)
            if look.last:
                self._finish(self.running, Result.budget_spent)
            return
        # First of all: of an iterate this large no residual can be known in this precision, small as it may have come out.
        self._finish(look.at & ~look.broken & (self._rounding(look.iterate) > self.worthless), Result.singular)
        reached = look.norm <= torch.maximum(self.tolerance, self._attainable(look.iterate))
        self._finish(look.at & reached & ~look.broken, Result.converged)
        self._finish_least_squares(look)
        self._finish(look.failed, look.status)
        self._finish(look.broken, Result.nonfinite)
        false = look.claim & self.running
        self.strikes = torch.where(false, torch.where(look.halved, 0, self.strikes + 1), self.strikes)
        self._finish(false & (self.strikes >= MAX_STRIKES), Result.stagnated)
        if not self.solver.residual_may_wait:
            patience = max(10 * self.vector.shape[-1], 1000)
            self._finish(look.at & (look.number - self.halved_at > patience), Result.stagnated)
        if look.last:
            self._finish(self.running, Result.max_steps)

    def _mend(self, memory: Any, look: _Look, residual: Tensor) -> Any:
        """Put the true residual into the recurrence every so many steps; start systems anew whose claim was false."""
        false = look.claim & self.running
        if look.refresh:
            # Near rounding level the true residual is noise, and would spoil the recurrence instead of mending it.
            mend = self.running & ~false & (look.norm > 100 * self._attainable(look.iterate))
            memory = select(mend, self.solver.replace_residual(memory, residual), memory)
        if bool(false.any()):
            memory = self.solver.restart_from(self.system, memory, false, residual)
            self._charge(false)
            self.base = torch.where(columns(false), look.iterate, self.base)
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
        # A method that sees negative curvature has not moved: its residual is that before the step.
        plain = (self.status == Result.running.code) | (self.status == Result.negative_curvature.code)
        if trusted and not refresh and bool((plain | ~looked_at).all()):
            return None, torch.where(progress.estimate.isfinite(), progress.estimate, torch.inf)
        residual = self.vector - self.system.mv(iterate)
        self._charge(looked_at)
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

    def _finish_least_squares(self, look: _Look) -> None:
        """A claim with a large residual is right if the residual is orthogonal to the range."""
        claim = look.claim & self.running
        if self.solver.square or look.residual is None or not bool(claim.any()):
            return
        slope = norm(self.system.operator, self.system.transposed_mv(look.residual))  # safe from underflow
        self._charge(claim)
        self._finish(claim & (slope <= 2 * self._optimality() * self.gain * look.norm), Result.least_squares)

    def _finish(self, mask: Tensor, result: Result | Tensor) -> None:
        """End those systems of the mask that are still running."""
        ending = mask & self.running
        code = result.code if isinstance(result, Result) else result
        self.result = torch.where(ending, code, self.result)
        self.running = self.running & ~ending

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


def _extreme(values: Tensor, *, largest: bool) -> Tensor:
    """Over the first dimension, NaN left out; NaN where there is nothing else."""
    sign = 1.0 if largest else -1.0
    most = torch.where(values.isnan(), -torch.inf, sign * values).amax(0)
    return torch.where(values.isnan().all(0), torch.nan, sign * most)
