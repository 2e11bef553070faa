"""The checks of a certificate that compare hypergradients: at two points, with finite differences, as a run makes them."""

from __future__ import annotations

import math
from dataclasses import replace

from bilevel.diagnostics.finding import DIFFERENCE, TITLES, Flaw, Limits, Row, row
from bilevel.diagnostics.resolved import discrepancy
from bilevel.diagnostics.subject import Subject, relative
from bilevel.errors import NumericalError
from bilevel.hypergradient import (
    FixedAccuracy,
    Hypergradient,
    HypergradientMethod,
    Implicit,
    differentiate,
    start_method,
)


def stationarity(subject: Subject, limits: Limits) -> Row:
    """How far the hypergradient at the own solution is from that at the refined one."""
    own, exact = subject.own, subject.exact
    error = relative(own, exact, subject.floor)
    inner = subject.inner
    figure = (
        f"{inner.result.name} after {inner.num_steps} steps, |F| = {float(subject.at_own.stationarity.max()):.2g}, "
        f"changes the hypergradient by {error:.2g}"
    )
    flaws: tuple[tuple[Flaw, str], ...] = ()
    if not error <= limits.tolerance:
        flaws = (
            (
                Flaw.unconverged_inner_solve,
                f"{type(subject.solver).__name__} ended with {inner.result.name} after {inner.num_steps} steps, and the "
                f"hypergradient there is {error:.2g} from that at the solution",
            ),
        )
    return Row(TITLES["stationarity"], figure, f"error <= {limits.tolerance:g}", flaws)


def finite_differences(subject: Subject, limits: Limits) -> Row:
    """The theorem's number against differences of the re-solved problem along directions of the hyperparameters."""
    title = TITLES["finite_differences"]
    broken = [one.value for one in subject.measured if not math.isfinite(one.value)]
    if broken:
        said = f"the outer loss at hyperparameters beside those given is not finite: a difference is {broken[0]:g}"
        return Row(title, f"{broken[0]:g}", f"<= {DIFFERENCE:g}", ((Flaw.nonfinite, said),))
    error = discrepancy(subject, subject.measured, subject.exact)
    said = f"finite differences of the re-solved problem differ from the theorem's derivative by {error:.2g}"
    flaw = Flaw.wrong_optimality if hasattr(subject.problem, "optimality") else Flaw.wrong_derivative
    return row(title, error, DIFFERENCE, flaw, said)


def method(subject: Subject, limits: Limits) -> Row:
    """The configured method as the outer loop would run it, against the theorem at the same point and finite differences.

    At the solvers' own tolerances: by how much an outer step may fall short of them is what the receipt of that step says.
    """
    name, title = type(subject.method).__name__, TITLES["method"]
    result = _as_in_a_run(subject, replace(subject.method, accuracy=FixedAccuracy()))
    if isinstance(result, NumericalError):
        return Row(title, f"{name} stops", f"<= {limits.tolerance:g}", ((Flaw.stopped_by_policy, str(result)),))
    gradient, implicit = subject.layout.ravel(result.gradient), isinstance(subject.method, Implicit)
    own, exact, floor = subject.own, subject.exact, subject.floor
    error, beside_measured = relative(gradient, exact, floor), discrepancy(subject, subject.measured, gradient)
    beside = relative(gradient, own if implicit else exact, floor)
    solved = relative(own, exact, floor) <= limits.tolerance
    flaws: tuple[tuple[Flaw, str], ...] = ()
    if not beside <= limits.tolerance and (implicit or solved):
        receipt = result.receipt
        if implicit and not receipt.biased:
            said = f"{receipt.linear_result} after {receipt.num_mv} products, {beside:.2g} from the exact hypergradient"
            flaws = ((Flaw.unsolved_linear_system, said),)
        else:
            why = "; ".join(receipt.biased) or "it differentiates something else than the solution"
            flaws = ((Flaw.biased_method, f"{name} is {beside:.2g} from the exact hypergradient: {why}"),)
    figure = f"{name}: relative error {error:.2g}, {beside_measured:.2g} from finite differences"
    return Row(title, figure, f"<= {limits.tolerance:g}", flaws)


def first_steps(subject: Subject, limits: Limits) -> Row:
    """What a run makes of its first steps where it adapts the tolerances: told, not judged, as their receipts tell it, too.

    The second step stays where the first one was, but has learnt from it: tolerances, damping, preconditioner.
    """
    title = TITLES["first_steps"]
    if isinstance(subject.method.accuracy, FixedAccuracy):
        return Row(title, "at the solvers' own tolerances, as above")
    results: list[Hypergradient] = []
    for _ in range(2):
        result = _as_in_a_run(subject, subject.method, results[-1] if results else None)
        if isinstance(result, NumericalError):
            return Row(title, "stopped by its policy")
        results.append(result)
    gradients = [subject.layout.ravel(result.gradient) for result in results]
    errors = [relative(gradient, subject.exact, subject.floor) for gradient in gradients]
    figure = (
        f"relative errors {' and '.join(f'{error:.2g}' for error in errors)}, at the tolerances that a run starts with"
    )
    sizes, estimates = [float(one.norm()) for one in gradients], [one.receipt.error_estimate for one in results]
    if min(sizes) > 0 and all(map(math.isfinite, estimates)):
        said = [f"{estimate / size:.2g}" for estimate, size in zip(estimates, sizes, strict=True)]
        figure += f"; their receipts say {' and '.join(said)}"
    return Row(title, figure)


def _as_in_a_run(
    subject: Subject, method: HypergradientMethod, after: Hypergradient | None = None
) -> Hypergradient | NumericalError:
    """The first hypergradient of an outer loop or the one after another, or what its policy says."""
    flat, solver, hparams, batches = subject.flat, subject.solver, subject.hparams, subject.batches
    start = flat.start(hparams).detach() if after is None else after.params
    state = start_method(method, flat, solver, start, hparams) if after is None else after.state
    try:
        return differentiate(method, flat, solver, start, hparams, batches, state)
    except NumericalError as refusal:
        return refusal
