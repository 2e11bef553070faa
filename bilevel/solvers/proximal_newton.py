"""Proximal Newton with working sets, for a smooth loss plus a piecewise linear term: sparse models, boxes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from bilevel.errors import UsageError
from bilevel.linalg import HessianOperator, as_matrix
from bilevel.solvers.composite_quadratic import Quadratic
from bilevel.solvers.objective import Hparams, Objective
from bilevel.solvers.proximal import Polyhedral, SoftThreshold, least_subgradient
from bilevel.solvers.solver import InnerSolver, State, fresh_state, row_norm

HALVINGS = 30  # of a step that does not lower the loss
GENTLE = 0.1  # of the tolerance, to which the model is minimised
DESCENT = 1e-4  # of what the model promises, the least that a step has to gain


@dataclass(frozen=True)
class ProximalNewton(InnerSolver):
    r"""Minimises `f(x) + g(x)`: a step minimises `f`'s quadratic model plus `g` over a working set of entries.

    The working set holds the free entries (see `Polyhedral`) and those held ones that are furthest from optimal, as many again
    (at least `growth`): a sparse solution with few entries is found in problems of their size, whatever the number of all. A
    problem that has a method `restricted(kept)` is evaluated on them alone, with all others zero. The Hessian of the working
    set is a dense matrix. Where the whole step does not lower the loss it is halved. Stationarity is the norm of the least
    subgradient of `f + g`. Needs the full batch.

    For the implicit function theorem a solution is a stationary point of its free entries.

    Args:
        max_steps: largest number of steps, one gradient of all entries each.
        atol: stop when the stationarity is at most this.
        rtol: stop as well when it is at most this times that of the starting point.
        proximal: the non-smooth term.
        growth: the working set may always grow by so many entries.

    References: Lee, Sun and Saunders (2014), "Proximal Newton-type methods for minimizing composite functions"; Massias,
    Gramfort and Salmon (2018), "Celer: a fast solver for the lasso with dual extrapolation" (working sets).

    Example:
        >>> from bilevel.solvers import run
        >>> objective = Objective(lambda x, h: ((x - torch.tensor([3.0, 0.5])) ** 2).sum(-1) / 2)
        >>> run(ProximalNewton(proximal=SoftThreshold(1.0)), objective, torch.zeros(2), {}).params
        tensor([2., 0.])
    """

    differentiable: ClassVar[bool] = False
    full_batch: ClassVar[bool] = True
    composite: ClassVar[bool] = True

    proximal: Polyhedral = field(default_factory=SoftThreshold)
    growth: int = 50

    def __post_init__(self) -> None:
        """Validate the term and the number."""
        super().__post_init__()
        if not isinstance(self.proximal, Polyhedral):
            raise UsageError(
                f"ProximalNewton needs a piecewise linear term such as SoftThreshold, but got {self.proximal!r}: use "
                "ProximalGradient for others."
            )
        if not isinstance(self.growth, int) or self.growth < 1:
            raise UsageError(f"ProximalNewton needs growth >= 1, an integer, but got {self.growth!r}.")

    @property
    def polyhedral(self) -> Polyhedral:
        """The proximal term."""
        return self.proximal

    def conditions(self, loss: Objective) -> Objective:
        """The residual of a proximal gradient step of length one."""

        def residual(params: Tensor, hparams: Hparams) -> Tensor:
            return params - self.proximal.prox(params - loss.gradient(params, hparams), 1.0, hparams)

        return Objective(optimality=residual)

    def init(self, params: Tensor, loss: Objective, hparams: Hparams) -> State:
        """Nothing is known before the first step."""
        return fresh_state(params)

    def step(self, params: Tensor, state: State, loss: Objective, hparams: Hparams) -> tuple[Tensor, State]:
        """One step; from a stationary point it does not move."""
        with torch.no_grad():
            gradient = loss.gradient(params, hparams)
            left = least_subgradient(self.proximal, params, gradient, hparams)
            size = row_norm(left)
            counted = {
                "first_stationarity": size,  # unless the state has it already
                **state,
                "stationarity": size,
                "num_gradients": state["num_gradients"] + 1,
            }
            if bool(self.done(counted).all()) or not bool(gradient.isfinite().all()):
                return params, counted
            working = self._working_set(params, left, hparams)
            part, here = loss.on_entries(working, params), params[..., working]
            term = self.proximal.on(working, params, hparams)

            def smooth(x: Tensor) -> Tensor:
                return part.value(x, hparams)

            model = Quadratic(as_matrix(HessianOperator(smooth, here)), gradient[..., working], here)
            end = model.minimum(term, hparams, GENTLE * float(self._tolerance(counted)))
            moved, values = _searched(part, term, model, end, hparams)
            return params.index_copy(-1, working, moved), {
                **counted,
                "num_gradients": counted["num_gradients"] + values,
                "num_mv": state["num_mv"] + len(working),
                "stuck": bool((moved == here).all()),
            }

    def _working_set(self, params: Tensor, left: Tensor, hparams: Hparams) -> Tensor:
        """Numbers of the entries, in order; one set for all systems of a batch."""
        free = self.proximal.free(params, hparams)
        wanted = left.abs().masked_fill(free, 0.0).reshape(-1, params.shape[-1]).amax(0)
        used = free.reshape(-1, params.shape[-1]).any(0)
        number = min(max(self.growth, int(used.sum())), int((wanted > 0).sum()))
        used[wanted.topk(number).indices] = True
        return used.nonzero().squeeze(-1)

    def _tolerance(self, state: State) -> Tensor:
        """Stationarity at which the solve ends, of the strictest system."""
        return (self.rtol * state["first_stationarity"]).clamp(min=self.atol).min()


def _searched(loss: Objective, term: Polyhedral, model: Quadratic, end: Tensor, hparams: Hparams) -> tuple[Tensor, int]:
    """The longest of the steps 1, 1/2, 1/4, ... towards the model's minimum that lowers `f + g` enough, for each system.

    Where the sum no longer resolves the descent, one that does not raise it but shortens the least subgradient.

    Returns:
        The new point `(*batch, m)`, and the number of evaluations.
    """
    here, direction = model.point, end - model.point
    start, gradient = loss.value_and_gradient(here, hparams)
    start = start + term.value(here, hparams)
    left = row_norm(least_subgradient(term, here, gradient, hparams))
    # g is convex: no step gains more than its share of this (negative).
    slope = (model.gradient * direction).sum(-1) + term.value(end, hparams) - term.value(here, hparams)
    slack = 10 * torch.finfo(start.dtype).eps * start.abs()
    size, best = torch.ones_like(start), here
    done = (direction == 0).all(-1)
    for number in range(HALVINGS):  # noqa: B007 - the count is returned
        point = here + size.unsqueeze(-1) * direction
        value, gradient = loss.value_and_gradient(point, hparams)
        value = value + term.value(point, hparams)
        lower = (value <= start + DESCENT * size * slope) & (value < start - slack)
        shorter = row_norm(least_subgradient(term, point, gradient, hparams)) < left
        take = (lower | ((value <= start + slack) & shorter)) & ~done
        best = torch.where(take.unsqueeze(-1), point, best)
        done = done | take
        if bool(done.all()):
            break
        size = torch.where(done, size, 0.5 * size)
    return best, number + 2
