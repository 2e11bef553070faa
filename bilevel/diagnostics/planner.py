"""The planner: what each method would cost on a problem, before anybody waits for it."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from bilevel.batches import StepBatches
from bilevel.diagnostics.bench import Bench, Candidate
from bilevel.diagnostics.candidates import MEASURED, candidates
from bilevel.diagnostics.cost import NOTHING, Cost, Units
from bilevel.diagnostics.forecast import Budget, Forecast, recommend
from bilevel.diagnostics.pilot import Job, Pilot, rehearse
from bilevel.diagnostics.trials import InnerTrial, Site, try_inner
from bilevel.diagnostics.units import measure_units
from bilevel.errors import ConvergenceWarning, UsageError
from bilevel.flat import natural_hparams
from bilevel.hypergradient import FixedAccuracy, HypergradientMethod, Implicit, default_solver
from bilevel.problem import Problem
from bilevel.solvers import GradientDescent, InnerSolver
from bilevel.trainer import Callback, Trainer
from bilevel.trainer.optimizer import OptimizerFactory, SchedulerFactory
from bilevel.tree import detach


@dataclass(frozen=True)
class Plan:
    """The result of `plan`.

    Attributes:
        rows: the configuration itself, then one a method.
        budget: what the run may cost.
        chosen: the recommended row; None where nothing fits.
        sentence: why.
        basis: what was measured and what was extrapolated, a sentence each.
        candidates: the methods behind the rows, with their objects; the first row has none.
        units: the unit costs.
        pilot: the outer steps that were made.
    """

    rows: tuple[Forecast, ...]
    budget: Budget
    chosen: Forecast | None
    sentence: str
    basis: tuple[str, ...]
    candidates: tuple[Candidate, ...] = field(repr=False)
    units: Units = field(repr=False)
    pilot: Pilot = field(repr=False)

    @property
    def configured(self) -> Forecast:
        """The row of the configuration as it is."""
        return self.rows[0]

    def as_json(self) -> dict[str, Any]:
        """For `plan.json`."""
        return {
            "configured": self.configured.as_json(),
            "methods": [row.as_json() for row in self.rows[1:]],
            "budget": vars(self.budget),
            "recommended": None if self.chosen is None else self.chosen.name,
            "why": self.sentence,
            "basis": list(self.basis),
            "unit costs": vars(self.units),
            "around the steps": {
                "set-up seconds": self.pilot.set_up_seconds,
                "seconds a step": self.pilot.beside_seconds,
                "seconds a checkpoint": self.pilot.checkpoint_seconds,
                "checkpoints": self.pilot.num_checkpoints,
            },
            "steps made": [
                {"step": one.step, "seconds": one.seconds, **vars(one.work)}
                for one in (*self.pilot.first, *self.pilot.later)
            ],
            "steps forecast": [vars(work) for work in self.pilot.future()],
        }


def plan(
    problem: Problem,
    *,
    solver: InnerSolver | None = None,
    hypergradient: HypergradientMethod | None = None,
    optimizer: OptimizerFactory | None = None,
    scheduler: SchedulerFactory | None = None,
    trainer: Trainer | None = None,
    budget: Budget | None = None,
    pilot_steps: int = 4,
    allowance: float = 20.0,
    callbacks: Sequence[Callback] = (),
    directory: Path | None = None,
) -> Plan:
    r"""Predict time and memory of each hypergradient method on a problem, and recommend one under a budget.

    Some outer steps of the configured run are made for real: the first ones, and some further on, where the optimiser gets
    with the hypergradient held fixed (`bilevel.diagnostics.pilot`). The work of the others lies between. Unit costs (an
    inner gradient, a product, ...) are measured at the first inner solution and give the other methods' prices through
    `bilevel.diagnostics.cost`.

    Args:
        problem: the problem.
        solver: the inner solver; L-BFGS by default, gradient descent for problems with minibatches.
        hypergradient: the configured method; `Implicit.auto()` by default, as in `fit`.
        optimizer: makes the outer optimiser; Adam with learning rate 0.1 by default.
        scheduler: makes its scheduler.
        trainer: settings of the outer loop, of which the number of steps matters most.
        budget: what the run may cost; anything by default.
        pilot_steps: first outer steps that are made for real, at most.
        allowance: seconds that each measured part may take: those steps together, the later ones together, ...
        callbacks: trackers whose cost counts; they are started and ended.
        directory: a folder to be thrown away, for the checkpoints of a run that writes them.

    Raises:
        UsageError: the parts do not fit each other, as in `fit`; a number is out of range.

    Example:
        >>> from bilevel import Problem, plan
        >>> class Shrink(Problem):
        ...     def init_hparams(self):
        ...         return {"penalty": torch.tensor(3.0)}
        ...     def init_params(self, hparams):
        ...         return {"w": torch.zeros(1)}
        ...     def inner_loss(self, params, hparams, batch):
        ...         return (params["w"] - 2).square().sum() + hparams["penalty"] * params["w"].square().sum()
        ...     def outer_loss(self, params, hparams, batch):
        ...         return (params["w"] - 1).square().sum()
        >>> found = plan(Shrink(), allowance=0.1)
        >>> found.configured.worth, found.configured.run_seconds > 0
        ('exact', True)
    """
    if not isinstance(pilot_steps, int) or pilot_steps < 1:
        raise UsageError(f"plan.pilot_steps must be an integer of at least 1, but is {pilot_steps!r}.")
    if not allowance > 0:
        raise UsageError(f"plan.allowance must be a number of seconds above 0, but is {allowance!r}.")
    job = Job(
        problem=problem,
        solver=solver or default_solver(problem),
        method=Implicit.auto() if hypergradient is None else hypergradient,
        optimizer=optimizer or functools.partial(torch.optim.Adam, lr=0.1),
        scheduler=scheduler,
        trainer=trainer or Trainer(),
        callbacks=callbacks,
        directory=directory,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the plan says what ends short
        pilot, setup = rehearse(job, pilot_steps, allowance)
        job = replace(job, solver=setup.solver)  # with its options fitted to the problem
        hparams = detach(natural_hparams(problem))
        with torch.no_grad():
            start = setup.problem.start(hparams)
        site = Site(setup.problem, hparams, StepBatches(problem, 0), start, allowance)
        with setup.problem.purity.solve():
            bench = _measure(site, job)
            found = candidates(bench)
    rows = (_configured(job, pilot, bench), *(_forecast(one, pilot, bench) for one in found))
    limit = budget or Budget()
    chosen, sentence = recommend(rows, limit)
    return Plan(rows, limit, chosen, sentence, _basis(job, pilot, bench), tuple(found), bench.units, pilot)


def _measure(site: Site, job: Job) -> Bench:
    """Two inner solves at most, and the unit costs at the solution of the first."""
    own = try_inner(site, job.solver)
    units, symmetric = measure_units(site, job.solver, own.params)
    recorded = (
        own
        if job.solver.differentiable
        else try_inner(site, GradientDescent(atol=job.solver.atol, rtol=job.solver.rtol))
    )
    implicit = job.method if isinstance(job.method, Implicit) else Implicit()
    return Bench(site, units, symmetric, own, recorded, implicit)


def _configured(job: Job, pilot: Pilot, bench: Bench) -> Forecast:
    """The configuration itself: its first steps were made."""
    linear = getattr(job.method, "linear_solver", None)
    first = pilot.records[0]
    name = type(job.method).__name__ + (f", {type(linear).__name__}" if linear is not None else "")
    result, residual = first["receipt.inner_result"], first["receipt.linear_result"]
    short = "" if result in ("converged", "budget_spent", None) else f"the inner solve ends with {result}"
    if not short and residual not in ("converged", "budget_spent", None):
        short = f"the linear solve ends with {residual}"
    return Forecast(
        name=f"as configured: {name}",
        keys="",
        seconds=pilot.first[0].seconds,
        run_seconds=pilot.run_seconds(bench.units),
        memory_bytes=pilot.peak_bytes,
        own_bytes=max(pilot.peak_bytes - pilot.held_bytes, 0.0),
        biased="its receipt says that it is biased" if first["receipt.biased"] else "",
        short=short,
        source=f"{MEASURED}: {len(pilot.first) + len(pilot.later)} of {pilot.num_steps} outer steps",
        counts=f"{first['receipt.inner_steps']} steps, {first['receipt.products']} products",
        error=math.nan if isinstance(job.method.accuracy, FixedAccuracy) else first["hypergradient_error"],
    )


def _forecast(one: Candidate, pilot: Pilot, bench: Bench) -> Forecast:
    """A run with another method: the configured solver's later solves are forecast, those of another one are as the first."""
    unusable = one.refused
    if one.unreached:
        unusable = "; ".join(f"'{name}' gets no gradient: {reason}" for name, reason in one.unreached.items())
    price = one.cost or NOTHING
    return Forecast(
        name=one.name,
        keys=one.keys,
        seconds=price.seconds,
        run_seconds=pilot.around_seconds + _steps_seconds(one, price, pilot, bench),
        memory_bytes=pilot.memory(price.bytes),
        own_bytes=price.bytes,
        biased=one.biased,
        short=one.short,
        further=one.further,
        unusable=unusable,
        source=one.source if one.cost else "",
        counts=one.counts if one.cost else "",
        error=one.error,
    )


def _steps_seconds(one: Candidate, price: Cost, pilot: Pilot, bench: Bench) -> float:
    if one.inner_seconds is None:
        return pilot.num_steps * price.seconds
    rate = bench.own.seconds / max(_inner_work(bench.units, bench.own), 1e-12)
    steps = pilot.work()
    inner = sum(work.gradients * bench.units.gradient + work.inner_products * bench.units.product for work in steps)
    first = pilot.first[0].work.products
    growth = sum(work.products for work in steps) / (len(steps) * first) if first and one.grows else 1.0
    fixed = bench.units.fixed
    rest = price.seconds - one.inner_seconds
    return rate * inner + len(steps) * (min(rest, fixed) + growth * max(rest - fixed, 0.0))


def _inner_work(units: Units, trial: InnerTrial) -> float:
    return trial.num_gradients * units.gradient + trial.num_products * units.product


def _basis(job: Job, pilot: Pilot, bench: Bench) -> tuple[str, ...]:
    made, later, total = len(pilot.first), len(pilot.later), pilot.num_steps
    first = f"measured: the first {made} of {total} outer steps, the set-up before them"
    if pilot.num_checkpoints:
        first += ", a checkpoint and what the trackers do"
    units = bench.units
    costs = {
        "gradient": units.gradient, "product": units.product, "linearisation": units.linearise,
        "mixed product": units.mixed, "outer gradients": units.outer,
    }  # fmt: skip
    if later:
        rest = f"{later} later ones, reached along hypergradients held fixed; gradients and products of the others lie between."
    elif pilot.num_future:
        rest = f"the other {pilot.num_future} are taken to do as much as these."
    else:
        rest = "the whole run."
    said = [
        f"{first}; {rest}",
        f"measured at the first inner solution: {', '.join(f'{name} {1e3 * one:.3g} ms' for name, one in costs.items())}; "
        f"graph {units.graph_bytes / 1e6:.3g} MB.",
    ]
    for trial in {id(one): one for one in (bench.own, bench.recorded)}.values():
        cut = f"; {trial.num_made} were made, the others extrapolated" if trial.extrapolated else ", all made"
        said.append(
            f"inner solve by {type(trial.solver).__name__}: {trial.num_steps} steps, {trial.seconds:.3g} s{cut}."
        )
    if job.trainer.patience is not None:
        said.append("all outer steps are counted, though trainer.patience may end the run before.")
    said.append(
        "other methods: their linear solves and a few recorded steps were made at the first outer step; memory is what the "
        f"process held before ({pilot.held_bytes / 1e6:.0f} MB) and the tensors of one hypergradient."
    )
    return tuple(said)
