r"""How far an implicit hypergradient may be from the exact one, from what its own linear solve has already computed.

Let `F(x, θ)` be the inner gradient, `H = ∂F/∂x`, `M = ∂F/∂θ`, and let `h(x, y) = ∂L/∂θ - M(x)^T y` be what is returned at
the inner solver's point `x` with the linear solver's adjoint `y`. At the exact solution `x*` the exact adjoint is
`y* = H(x*)^{-1} b(x*)` with `b = ∂L/∂x`. With `δ = x - x*`, and with the residual of the *old* adjoint at the *new* point,

    r* = b(x*) - H(x*) y,    y* = y + H(x*)^{-1} r*,
    h(x, y) - h(x*, y*) = [h(x, y) - h(x*, y)] + M(x*)^T H(x*)^{-1} r*.                                           (1)

This is exact: one residual holds both errors, that of the linear solve and that of the inner solve. Two systems with `H`
are left, for `δ` (to first order `H δ = F(x, θ)`) and for `r*`. They cost next to nothing, because the linear solve has
made products `H v`: on the span of its `v` both are solved by projection (Galerkin), with no further product. For
conjugate gradients these are the directions, on which `H` is diagonal. What the span does not hold, `ρ = f - H u` for a
right-hand side `f` and its projected solution `u`, is orthogonal to it; `H^{-1} ρ` is at most `‖ρ‖ / μ` long, `μ` being a
lower bound of the curvature, and hardly shorter than `‖ρ‖ / θ`, `θ` being the smallest curvature (Ritz value) in the span.
It is taken as `ρ / √(μ θ)`, the geometric mean: this is right when the curvatures below `θ` reach down to `μ` evenly on a
log scale and gradients have variance proportional to the curvature, as those of a log-likelihood have. A right-hand side
that is rougher than that can make the error larger, by `√(θ / μ)` at most; a smoother one makes the estimate too large.
Once a product with `ρ / √(μ θ)` is known, its Rayleigh quotient takes the place of `θ` where it is larger.

So the estimate is no bound. It exceeds the error 19 times in 20, and is mostly a few times as large
(`python -m benchmarks.error_estimate`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import grad

from bilevel.batches import StepBatches
from bilevel.errors import UsageError
from bilevel.hypergradient.outer import outer_gradients
from bilevel.linalg import Tag
from bilevel.linalg.recycling import Subspace, WatchedOperator
from bilevel.linearisation import Linearisation, linearise
from bilevel.solvers import InnerSolver
from bilevel.tree import TensorDict

RESOLVED = 0.05  # the part of a solution outside the span, below which no product is spent on making the span larger
MINOR = 0.1  # relative error of params over that of the adjoint, below which a short solve does not pay for the former
CORRECTION = 5  # a linearisation (2), an outer gradient, a pass for `y` and one for the solution of `r*`
TOLERANCE = 1e-3  # by which rounding may put a Ritz value below a lower bound that is exact
WORST_CHANGE = 0.9  # the change of the Hessian is trusted no further: it enlarges the estimate at most tenfold


@dataclass(frozen=True)
class ErrorEstimate:
    """An estimate of the norm of a hypergradient's error, all hyperparameters together, in natural units.

    Attributes:
        value: the estimate, meant to exceed the error 19 times in 20; NaN where there is none (an unsymmetric operator,
            values that are not finite).
        certified: it rests on a declared lower bound of the curvature, which nothing seen contradicts. Otherwise the
            smallest curvature that the linear solve has seen stands for the bound, and may be far too large.
        linear: the part that is left of the linear solve's error, of the same scale.
        inner: the part that is left of the inner solve's error; the two need not add up to `value`.
        num_mv: what it cost, in matrix-vector products (passes through the gradient's graph).
    """

    value: float
    certified: bool
    linear: float
    inner: float
    num_mv: int

    def __str__(self) -> str:
        """The estimate in words."""
        return f"{self.value:.3g} ({'certified' if self.certified else 'not certified'})"


NOTHING = ErrorEstimate(math.nan, False, math.nan, math.nan, 0)


@dataclass(frozen=True)
class Solved:
    """What the linear solve behind a hypergradient came to.

    Attributes:
        watched: the Hessian that the linear solver was given, with what it remembers of the solve.
        rhs: `b`, the outer gradient with respect to params, `(*batch, n)`.
        adjoint: `y`, what the solver returned.
        gradient: the hypergradient, `∂L/∂θ - M^T y`, by names.
    """

    watched: WatchedOperator
    rhs: Tensor
    adjoint: Tensor
    gradient: TensorDict


@dataclass(frozen=True)
class ErrorEstimator:
    r"""Estimates the error of an implicit hypergradient; symmetric `H` (a minimiser), any linear solver, tasks batched.

    The inner error is followed by a Newton step `δ`: the problem is linearised at `x - δ`, and (1) is evaluated there as it
    stands, so that curvature of the hypergradient along `δ` counts. With `E` the right-hand side of (1),

        value = (trust ‖E‖ + doubt U) / (1 - ζ),     U = ε (‖h(x, y) - h(x - δ, y)‖ + ‖M^T z‖) + ω ‖M^T z‖.

    `z` is the solution for `r*`, `ω` the share of it outside the span, `ε` (at most 1) the relative size of a second Newton
    step, and `ζ` the relative change of `H z` between the two points. A well solved system has `ω`, `ε`, `ζ` near zero,
    and the estimate is then `trust` times the error itself. Where the solve was so short that the correction would cost
    more than `fraction` of it, and the relative error of params is by far the smaller one, `E = M^T z` with the residual
    at `x`, and `‖δ‖ / ‖x‖` times the hypergradient stands for the inner part.

    Args:
        fraction: largest cost, over the products of the linear solve; a short solve is charged at least one pass, and
            `CORRECTION` passes where the inner error matters.
        memory: number of products of the linear solve to remember (by a `WatchedOperator`), two vectors each.
        trust: factor of what was computed.
        doubt: factor of what is left over.

    Both factors were fixed once, for all problems and condition numbers, by `python -m benchmarks.error_estimate
    --calibrate`.

    References: Pedregosa (2016), "Hyperparameter optimization with approximate gradient"; Meurant and Tichý (2013), "On
    computing quadrature-based bounds for the A-norm of the error in conjugate gradients"; Saad, Yeung, Erhel and
    Guyomarc'h (2000), "A deflated version of the conjugate gradient algorithm".

    Example:
        >>> from bilevel.flat import FlatProblem
        >>> from bilevel.linalg import ConjugateGradient
        >>> from bilevel.linalg.recycling import WatchedOperator
        >>> from bilevel.linearisation import linearise
        >>> from bilevel.problem import Problem
        >>> from bilevel.solvers import LBFGS
        >>> class Shrink(Problem):
        ...     def init_hparams(self):
        ...         return {"penalty": torch.tensor(3.0)}
        ...     def init_params(self, hparams):
        ...         return {"w": torch.zeros(1)}
        ...     def inner_loss(self, params, hparams, batch):  # solution: w = 2 / (1 + penalty) = 0.5
        ...         return (params["w"] - 2).square().sum() + hparams["penalty"] * params["w"].square().sum()
        ...     def outer_loss(self, params, hparams, batch):  # hypergradient 2 (w - 1) * (-w / (1 + penalty)) = 0.125
        ...         return (params["w"] - 1).square().sum()
        >>> problem = Shrink()
        >>> hparams, batches = problem.init_hparams(), StepBatches(problem, 0)
        >>> flat, found = FlatProblem.of(problem, hparams), torch.tensor([0.51])  # the inner solver stopped early
        >>> at = linearise(flat, LBFGS(), found, hparams)
        >>> _, rhs, _ = outer_gradients(flat, found, hparams, batches)
        >>> estimator = ErrorEstimator()
        >>> watched = WatchedOperator(at.operator, estimator.memory)
        >>> adjoint = ConjugateGradient().compute(watched, rhs).value
        >>> gradient = {"penalty": -at.mixed(adjoint)["penalty"]}
        >>> estimate = estimator.estimate(at, LBFGS(), batches, Solved(watched, rhs, adjoint, gradient), 2.0 * 3.0)
        >>> estimate.certified, 1.0 <= estimate.value / abs(float(gradient["penalty"]) - 0.125) <= 10.0
        (True, True)
    """

    fraction: float = 0.1
    memory: int = 200
    trust: float = 3.0
    doubt: float = 1.5

    def __post_init__(self) -> None:
        """Validate the numbers."""
        if not 0 <= self.fraction <= 1:
            raise UsageError(f"ErrorEstimator needs fraction in [0, 1], but got {self.fraction}.")
        if self.memory < 1:
            raise UsageError(f"ErrorEstimator needs memory >= 1, but got {self.memory}.")
        if not (self.trust >= 1 and self.doubt >= 0):
            raise UsageError(
                f"ErrorEstimator needs trust >= 1 and doubt >= 0, but got trust={self.trust} and doubt={self.doubt}."
            )

    def estimate(
        self,
        at: Linearisation,
        solver: InnerSolver,
        batches: StepBatches,
        solved: Solved,
        lower_curvature: float | None = None,
    ) -> ErrorEstimate:
        """Estimate the error of a hypergradient, the mean over tasks if there are tasks.

        Args:
            at: the inner problem at the point `x` of the hypergradient.
            solver: the inner solver, which knows what vanishes at its solutions.
            batches: the batches of this outer step.
            solved: what the linear solve came to.
            lower_curvature: a lower bound of the inner Hessian's eigenvalues (damping, the smallest penalty of a convex
                loss); None: unknown, and the estimate is not certified.

        Raises:
            UsageError: the bound is not positive.
        """
        if lower_curvature is not None and not 0 < lower_curvature < math.inf:
            raise UsageError(
                f"the error estimate needs lower_curvature > 0, but got {lower_curvature}: pass None where no positive "
                "lower bound is known."
            )
        if Tag.symmetric not in at.operator.tags or not _finite(
            solved.rhs, solved.adjoint, *solved.watched.remembered()
        ):
            return NOTHING
        with torch.no_grad():
            return _Estimation(self, at, solver, batches, solved, lower_curvature).run()


class _Completed(NamedTuple):
    """A solution of `H u = f`: the projected one and `ρ / √(μ θ)` for what is outside the span."""

    value: Tensor
    rest: Tensor  # the second part
    outside: float  # its size over that of the whole
    residual: Tensor  # of the projected solution


class _Estimation:
    """The variables of one estimate; norms are those of all tasks together."""

    def __init__(
        self,
        settings: ErrorEstimator,
        at: Linearisation,
        solver: InnerSolver,
        batches: StepBatches,
        solved: Solved,
        lower: float | None,
    ) -> None:
        self.settings, self.at, self.solver, self.batches, self.solved = settings, at, solver, batches, solved
        self.lower, self.num_mv = lower, 0
        self.budget = int(settings.fraction * solved.watched.num_mv)
        self.gradient = _flatten(solved.gradient)
        vectors, products = solved.watched.remembered()
        if not vectors.shape[-2]:  # the solver made no product: one, so that there is a span
            vectors = solved.rhs.unsqueeze(-2)
            products = self._product(solved.rhs).unsqueeze(-2)
        self.space = Subspace(vectors, products)
        self.residual = self._residual()

    def run(self) -> ErrorEstimate:
        """Short or with a correction of params, whichever the budget and the sizes of the errors call for."""
        shift, change = self._complete(self.at.optimality.detach()), self._complete(self.residual)
        moved, turned = _share(shift.value, self.at.params.detach()), _share(change.value, self.solved.adjoint)
        if self.budget >= CORRECTION or moved > MINOR * min(turned, 1.0):
            return self._corrected()
        return self._short(moved)

    def _short(self, moved: float) -> ErrorEstimate:
        """The linear part by one mixed product; for the inner part, `h` is taken to move as far as `x`, relatively."""
        change = self._enlarge(self.residual, self.budget - self.num_mv - 1)
        effect = float(_flatten(self._mixed(self.at, change.value)).norm())
        inner = moved * float(self.gradient.norm())
        trust, doubt = self.settings.trust, self.settings.doubt
        linear = (trust + doubt * change.outside) * effect
        return self._verdict(linear + doubt * inner, linear, doubt * inner)

    def _corrected(self) -> ErrorEstimate:
        """Equation (1), with `x* = x - δ`."""
        room = self.budget - self.num_mv - CORRECTION
        stationary = self.at.optimality.detach()
        shift = self._enlarge(stationary, room // 2)
        there, slope, direct = self._move(shift.value)
        product, part = self._pass(there, self.solved.adjoint)
        shorter = self._shrinkage(shift, there.optimality.detach())
        residual = self.residual + shorter * (slope - product - self.residual)
        jump = shorter * (self.gradient - (direct - part))  # h(x, y) - h(x*, y)
        change = self._enlarge(residual, self.budget - self.num_mv - 1)
        product, effect = self._pass(there, change.value)
        effect = self._shrinkage(change, residual - product) * effect

        total, gain = float((jump + effect).norm()), float(effect.norm())
        again = min(1.0, _share(self._complete(there.optimality.detach()).value, shift.value))  # ε
        doubt = again * (float(jump.norm()) + gain) + change.outside * gain
        bent = self.space.coordinates(product) - (self.space.products @ change.value.unsqueeze(-1)).squeeze(-1)
        bend = 1.0 / (1.0 - min(WORST_CHANGE, _share(bent, residual)))  # 1 / (1 - ζ)
        trust = self.settings.trust

        linear = self._complete(self.residual).value
        own, other = (_share(part, change.value) * gain for part in (linear, change.value - linear))
        return self._verdict(
            bend * (trust * total + self.settings.doubt * doubt), trust * own, trust * (other + float(jump.norm()))
        )

    def _verdict(self, value: float, linear: float, inner: float) -> ErrorEstimate:
        smallest = float(self.space.smallest.min())
        if not all(map(math.isfinite, (value, linear, inner, smallest))):
            return replace(NOTHING, num_mv=self.num_mv)
        sound = self.lower is not None and self.space.definite and smallest >= (1 - TOLERANCE) * self.lower
        return ErrorEstimate(value, sound, linear, inner, self.num_mv)

    def _complete(self, rhs: Tensor) -> _Completed:
        """Solve in the span, and add what may be outside it."""
        inside, rest = self.space.solve(rhs)
        smallest = self.space.smallest
        smallest = smallest.clamp(max=float(smallest.min()) if not bool(smallest.isfinite().all()) else math.inf)
        bound = smallest if self.lower is None else smallest.clamp(max=self.lower)
        outside = rest / (bound * smallest).sqrt().unsqueeze(-1)
        return _Completed(inside + outside, outside, _share(outside, inside + outside), rest)

    def _shrinkage(self, found: _Completed, left: Tensor) -> float:
        """How much shorter a solution is once a product with it is known, by the residual that it has left.

        The residual of the projected solution less that of the whole is `H` times the part outside the span. Its
        Rayleigh quotient `q` shows what curvatures that part lives on: between `μ` and `q`, not `θ`, if `q` is larger.
        """
        size = torch.linalg.vecdot(found.rest, found.rest)
        quotient = torch.linalg.vecdot(found.rest, found.residual - left) / size.clamp(min=torch.finfo(size.dtype).tiny)
        smallest = self.space.smallest
        shorter = (smallest / quotient.clamp(min=smallest)).sqrt().unsqueeze(-1) * found.rest
        return 1.0 - found.outside**2 * (1.0 - (_share(shorter, found.rest) if bool(found.rest.any()) else 1.0))

    def _enlarge(self, rhs: Tensor, limit: int) -> _Completed:
        """Solve after adding residuals to the span, by at most `limit` products, until it holds the solution."""
        found = self._complete(rhs)
        for _ in range(limit):
            if not found.outside > RESOLVED or self.space.full:  # nor does more help where it is not finite
                break
            self.num_mv += 1
            self.space.extend(self.at.operator, found.residual)
            found = self._complete(rhs)
        return found

    def _residual(self) -> Tensor:
        """`b - H y`: free if the span holds `y`, as that of conjugate gradients does; else by a product."""
        product, left = self.space.product(self.solved.adjoint)
        residual = self.solved.rhs - product
        if bool((self.space.largest * left.norm(dim=-1) <= 0.01 * residual.norm(dim=-1)).all()):
            return residual
        return self.solved.rhs - self._product(self.solved.adjoint)

    def _move(self, shift: Tensor) -> tuple[Linearisation, Tensor, Tensor]:
        """The linearisation, and the outer gradients with respect to params and to hyperparameters, at `x - δ`."""
        self.num_mv += 3
        point = self.at.params.detach() - shift
        there = linearise(self.at.problem, self.solver, point, self.at.hparams, self.at.batch)
        _, by_params, direct = outer_gradients(self.at.problem, point, self.at.hparams, self.batches)
        return there, by_params, _flatten(direct)

    def _product(self, vector: Tensor) -> Tensor:
        self.num_mv += 1
        return self.at.operator.mv(vector)

    def _mixed(self, at: Linearisation, vector: Tensor) -> TensorDict:
        self.num_mv += 1
        return at.mixed(vector)

    def _pass(self, at: Linearisation, vector: Tensor) -> tuple[Tensor, Tensor]:
        """`H v` and `M^T v` by one backward pass: both are derivatives of `F'v`."""
        self.num_mv += 1
        if not at.optimality.requires_grad:
            return torch.zeros_like(vector), torch.zeros_like(self.gradient)
        inputs = [at.params, *at.hparams.values()]
        product, *parts = grad(at.optimality, inputs, vector, retain_graph=True, materialize_grads=True)
        return product, _flatten(dict(zip(at.hparams, parts, strict=True)))


def _flatten(values: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([value.detach().reshape(-1) for value in values.values()]) if values else torch.zeros(0)


def _share(part: Tensor, whole: Tensor) -> float:
    """`‖part‖ / ‖whole‖`; 0 where both vanish."""
    size = float(part.norm())
    return size / float(whole.norm()) if bool(whole.any()) else math.inf if size else 0.0


def _finite(*tensors: Tensor) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors)
