"""The methods that the planner prices for a problem, each by its own few lines."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, replace

from bilevel.diagnostics import cost
from bilevel.diagnostics.bench import UNITS, Bench, Candidate, reach
from bilevel.diagnostics.cost import Cost, Recorded
from bilevel.diagnostics.trials import InnerTrial, LinearTrial, try_linear, try_recorded
from bilevel.errors import UsageError
from bilevel.hypergradient import (
    SAMA,
    FiniteDifference,
    FixedAccuracy,
    ForwardMode,
    HypergradientMethod,
    Implicit,
    ImplicitUpdate,
    OneStep,
    Unrolled,
)
from bilevel.linalg import (
    GMRES,
    LSMR,
    MINRES,
    AutoSolver,
    BiCGStab,
    ConjugateGradient,
    DenseCholesky,
    DenseLU,
    IdentitySolver,
    NeumannSeries,
)
from bilevel.linalg.iterative import IterativeSolver
from bilevel.solvers import InnerSolver

MEASURED = "measured"
CUT = "a trial that was cut short, extrapolated"


def candidates(bench: Bench) -> list[Candidate]:
    """All methods, priced or refused, with the hyperparameters that they do not reach."""
    return [_with_reach(bench, one) for maker in MAKERS for one in maker(bench)]


def _with_reach(bench: Bench, one: Candidate) -> Candidate:
    return replace(one, unreached=reach(bench.site, one.method, one.solver))


def _unsolved(trial: InnerTrial) -> str:
    if trial.converged:
        return ""
    if trial.extrapolated:
        return f"{type(trial.solver).__name__} was tried for {trial.num_made} of its {trial.num_steps} steps only"
    return f"{type(trial.solver).__name__} ends at a gradient norm of {trial.stationarity:.2g}"


def _plain(method: Implicit) -> Implicit:
    """What the automatic method presets goes with it, where another option of the group `hypergradient` is chosen."""
    if not isinstance(method.linear_solver, AutoSolver):
        return method
    auto, plain = Implicit.auto(), Implicit()
    preset = [one.name for one in fields(Implicit) if getattr(auto, one.name) != getattr(plain, one.name)]
    return replace(method, **{name: getattr(plain, name) for name in preset})


def _auto(bench: Bench) -> Iterator[Candidate]:
    """The automatic method, at the tolerances that a run starts with; the first row of a plan is that, if it is configured."""
    if bench.implicit != Implicit.auto():
        yield _tried(bench, _own(bench, "implicit, automatic", Implicit.auto(), "implicit_auto"), bench.own)


def _iterative(bench: Bench) -> Iterator[Candidate]:
    """The theorem with each iterative solver that the operator allows, everything else as configured."""
    configured = bench.implicit.linear_solver
    solvers: dict[str, IterativeSolver] = (
        {"cg": ConjugateGradient(), "minres": MINRES(), "neumann": NeumannSeries()}
        if bench.symmetric
        else {"gmres": GMRES(), "bicgstab": BiCGStab(), "lsmr": LSMR()}
    )
    for name, solver in solvers.items():
        if isinstance(configured, type(solver)):
            solver = configured
        elif (rtol := getattr(configured, "rtol", None)) is not None:
            solver = replace(solver, rtol=rtol)
        method = replace(_plain(bench.implicit), linear_solver=solver)
        yield _tried(bench, _own(bench, f"implicit, {type(solver).__name__}", method, f"implicit_{name}"), bench.own)


def _update(bench: Bench) -> Iterator[Candidate]:
    """The theorem for the step of a solver that is a rule."""
    counts = f"{bench.recorded.num_steps} steps"
    yield _tried(
        bench, _recording(bench, "implicit update", "implicit_update", ImplicitUpdate(), counts), bench.recorded
    )


def _own(bench: Bench, name: str, method: HypergradientMethod, keys: str) -> Candidate:
    """What methods share that go with the configured inner solver."""
    made = Candidate(
        name=name,
        method=method,
        solver=bench.own.solver,
        keys=f"hypergradient={keys}",
        inner_seconds=bench.own.seconds,
        short=_unsolved(bench.own),
        source=CUT if bench.own.extrapolated else UNITS,
        counts=f"{bench.own.num_steps} steps",
    )
    return _checked(made)


def _checked(made: Candidate) -> Candidate:
    """Refused, where the method does not go with the inner solver."""
    try:
        made.method.check(made.solver)
    except UsageError as error:
        return replace(made, refused=str(error).rstrip("."))
    return made


def _tried(bench: Bench, made: Candidate, inner: InnerTrial) -> Candidate:
    """Priced by the hypergradient itself, made from the inner solution that is there."""
    method = made.method
    assert isinstance(method, Implicit | ImplicitUpdate)
    if made.refused:
        return made
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what a run would warn of is not a row's to say
            trial = try_linear(bench.site, bench.units, inner.solver, inner.params, method)
    except UsageError as error:
        return replace(made, refused=str(error).rstrip("."))
    units = replace(bench.units, graph_bytes=trial.bytes)
    return replace(
        made,
        cost=cost.implicit(units, inner.cost, trial.products, trial.product_seconds),
        grows=trial.solved,
        short=made.short or _left(trial),
        source=CUT if inner.extrapolated or trial.made < trial.products else UNITS,
        counts=f"{inner.num_steps} steps, {trial.products:.0f} products",
        error=math.nan if isinstance(method.accuracy, FixedAccuracy) else trial.error,
    )


def _left(trial: LinearTrial) -> str:
    return "" if trial.solved else f"the linear solve ends at a relative residual of {trial.residual:.2g}"


def _dense(bench: Bench) -> Iterator[Candidate]:
    """The theorem with a factorisation: Cholesky, or LU for a matrix that need not be positive definite.

    Without an error estimate, whose subspace would be the whole space, and without anything that speeds up a solve.
    """
    plain = Implicit(linear_solver=ConjugateGradient(), error_estimate=None)
    definite = bench.symmetric
    if definite:
        definite = not try_linear(bench.site, bench.units, bench.own.solver, bench.own.params, plain).negative
    solver = DenseCholesky() if definite else DenseLU()
    size = bench.units.num_unknowns
    made = Candidate(
        name=f"implicit, {type(solver).__name__}",
        method=replace(plain, linear_solver=solver),
        solver=bench.own.solver,
        keys=f"hypergradient=implicit_{'dense_cholesky' if definite else 'dense_lu'} hypergradient.error_estimate=null",
        inner_seconds=bench.own.seconds,
        short=_unsolved(bench.own),
        source=CUT if bench.own.extrapolated else UNITS,
        counts=f"{bench.own.num_steps} steps, {size} products",
    )
    if size > solver.max_size:
        yield replace(made, refused=f"{size} unknowns are more than its max_size of {solver.max_size}")
    else:
        yield replace(made, cost=cost.dense(bench.units, bench.own.cost))


def _recorded(bench: Bench) -> Iterator[Candidate]:
    """Methods that pull back through recorded steps; one measurement of such steps prices them all."""
    trial, num_steps = bench.recorded, bench.recorded.num_steps
    every = max(math.isqrt(num_steps), 1)
    step = trial.seconds / num_steps
    methods: list[tuple[Candidate, Callable[[Recorded], Cost]]] = [
        (
            _recording(bench, "unrolled", "unrolled", Unrolled(), f"{num_steps} steps"),
            lambda one: cost.unrolled(one, num_steps),
        ),
        (
            _recording(
                bench,
                f"unrolled, checkpointed every {every}",
                f"unrolled hypergradient.checkpoint_every={every}",
                Unrolled(checkpoint_every=every),
                f"{2 * num_steps} steps",
            ),
            lambda one: cost.checkpointed(bench.units, one, num_steps, every, step),
        ),
        (
            replace(
                _recording(bench, "one step", "one_step", OneStep(), f"{num_steps} steps"),
                biased="one inner step stands for the whole iteration",
            ),
            lambda one: cost.one_step(one, trial.seconds),
        ),
    ]
    yield from _priced(bench, Unrolled(), methods)


def _forward(bench: Bench) -> Iterator[Candidate]:
    """Tangents of all hyperparameters along with the iteration."""
    num_steps, method = bench.recorded.num_steps, ForwardMode()
    made = _recording(bench, "forward mode", "forward", method, f"{num_steps} steps")
    yield from _priced(bench, method, [(made, lambda one: cost.forward(one, num_steps))])


def _priced(
    bench: Bench, measured: HypergradientMethod, methods: Iterable[tuple[Candidate, Callable[[Recorded], Cost]]]
) -> Iterator[Candidate]:
    try:
        recorded = try_recorded(bench.site, measured, bench.recorded.solver)
    except UsageError as error:
        for made, _ in methods:
            yield replace(made, refused=str(error).rstrip("."))
        return
    for made, price in methods:
        yield replace(made, cost=price(recorded))


def _recording(bench: Bench, name: str, keys: str, method: HypergradientMethod, counts: str) -> Candidate:
    """What methods with recorded steps share."""
    own = bench.recorded.solver == bench.own.solver
    made = Candidate(
        name=name,
        method=method,
        solver=bench.recorded.solver,
        keys=f"hypergradient={keys}" + ("" if own else f" {_solver_keys(bench.recorded.solver)}"),
        short=_unsolved(bench.recorded),
        refused=""
        if bench.recorded.result.usable
        else f"{type(bench.recorded.solver).__name__} fails: {bench.recorded.result.value}",
        further=not own and not bench.recorded.converged and bench.recorded.stationarity > bench.own.stationarity,
        source=CUT if bench.recorded.extrapolated else UNITS,
        counts=counts,
    )
    return made if made.refused else _checked(made)


def _solver_keys(solver: InnerSolver) -> str:
    """All that an experiment may have set for another solver."""
    values = {"max_steps": solver.max_steps, "atol": f"{solver.atol:g}", "rtol": f"{solver.rtol:g}"}
    return " ".join(["solver=gradient_descent", *(f"solver.{key}={value}" for key, value in values.items())])


def _first_order(bench: Bench) -> Iterator[Candidate]:
    """Those that take no product: the identity for the inverse Hessian, DARTS, and SAMA."""
    own, recorded = bench.own, bench.recorded
    identity = Implicit(linear_solver=IdentitySolver(), error_estimate=None)
    key = "implicit_identity hypergradient.error_estimate=null"
    made = _own(bench, "implicit, IdentitySolver", identity, key)
    yield replace(
        made,
        biased="the identity stands for the inverse Hessian",
        cost=cost.implicit(bench.units, own.cost, 0, 0.0),
    )
    made = _own(bench, "finite differences", FiniteDifference(), "finite_difference")
    made = replace(made, biased="one virtual step stands for the inverse Hessian")
    yield _differenced(bench, made, own)
    made = _recording(bench, "SAMA", "sama", SAMA(), f"{recorded.num_steps} steps")
    made = replace(made, biased="the identity and the optimiser's scale stand for the inverse Hessian")
    yield _differenced(bench, made, recorded)


def _differenced(bench: Bench, made: Candidate, inner: InnerTrial) -> Candidate:
    """Priced as a central difference of the inner loss, which there has to be."""
    if made.refused:
        return made
    if bench.site.flat.objective(bench.site.batches.curvature).loss is None:
        return replace(made, refused="it needs inner_loss, and the problem defines only optimality")
    return replace(made, cost=cost.finite_difference(bench.units, inner.cost))


MAKERS: tuple[Callable[[Bench], Iterator[Candidate]], ...] = (
    _auto,
    _iterative,
    _dense,
    _update,
    _recorded,
    _forward,
    _first_order,
)
