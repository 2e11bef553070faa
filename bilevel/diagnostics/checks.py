"""The checks of a certificate, in the order of its table: each looks at a subject and returns a row."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bilevel.diagnostics.finding import Flaw, Row
from bilevel.diagnostics.resolved import discrepancy
from bilevel.diagnostics.subject import DENSE_LIMIT, Subject, solve
from bilevel.errors import NumericalError
from bilevel.hypergradient import (
    FixedAccuracy,
    Hypergradient,
    HypergradientMethod,
    Implicit,
    differentiate,
    find_paths,
    start_method,
)
from bilevel.linalg import Tag, as_matrix, lanczos
from bilevel.linearisation import Linearisation
from bilevel.problem import Problem
from bilevel.purity import Fault, disturbances, randomness
from bilevel.rng import generator, normal

EXACT = 1e-8  # relative difference of numbers that are equal but for rounding, in float64
DIFFERENCE = 1e-3  # relative difference that finite differences leave
SINGULAR = 1e-12  # least over largest eigenvalue below which a Hessian counts as singular
NUM_LANCZOS = 80
KINK = 1e-6  # length of the steps to either side of the solution, relative to its size
SHORTER = 0.1  # factor of a second length, at which a jump shows
DATA_DRAWS = ("randint", "randperm", "multinomial")  # what draws indices, not noise

TITLES = {
    "one_function": "losses are fixed functions",
    "paths": "hyperparameters reached",
    "stationarity": "inner problem solved",
    "optimality_and_loss": "optimality fits inner_loss",
    "repeatable": "products repeat",
    "symmetric": "symmetry <u, Hv> = <v, Hu>",
    "smooth": "smooth at the solution",
    "adjoint": "adjoint of the mixed product",
    "spectrum": "curvature",
    "finite_differences": "finite differences of the re-solved problem",
    "method": "the method",
    "first_step": "the first outer step",
}

Check = Callable[[Subject, "Limits"], Row]


@dataclass(frozen=True)
class Limits:
    """What a certificate tolerates.

    Attributes:
        tolerance: relative error of the hypergradient.
    """

    tolerance: float = 1e-2


def one_function(subject: Subject, limits: Limits) -> Row:
    """Whether the losses are functions: no draws, no buffers that change, nothing changed in place, pure batches."""
    flat, batches, problem = subject.flat, subject.batches, subject.problem
    start = flat.start(subject.hparams).detach()
    inner, outer = batches.curvature, batches.outer
    functions = {
        "inner_loss": lambda: flat.objective(inner).gradient(start, subject.hparams),
        "outer_loss": lambda: flat.outer_loss(start, subject.hparams, outer),
    }
    drawn = {
        name: (lambda draw=draw: draw(0, 0))
        for name in ("inner_batches", "outer_batches")
        if (draw := getattr(problem, name)) is not None
    }
    inputs = {"params": start, **{f"hparams[{name!r}]": value for name, value in subject.hparams.items()}}
    with torch.no_grad():
        found = randomness(flat.purity, functions)
        found += disturbances(flat.purity, functions, batches=drawn, inputs=inputs)
    flaws = []
    for one in found:
        is_data = one.fault is Fault.noise and one.place.startswith(DATA_DRAWS)
        flaws.append((Flaw.fresh_minibatch if is_data else Flaw[one.fault.name], one.place))
    return Row(TITLES["one_function"], f"{len(flaws)} disturbances" if flaws else "yes", "yes", tuple(flaws))


def paths(subject: Subject, limits: Limits) -> Row:
    """Which hyperparameters reach the outer loss, and whether the method reaches them."""
    found = find_paths(subject.flat, subject.solver, subject.hparams, subject.batches)
    covered = subject.method.paths - ({"initial"} if subject.method.warm_start else set())
    flaws = []
    for name, ways in found.items():
        if not ways & covered:
            where = f"only by the paths {', '.join(sorted(ways))}" if ways else "by no path at all"
            flaws.append((Flaw.disconnected_hyperparameter, f"'{name}' reaches the outer loss {where}"))
    connected = len(found) - len(flaws)
    return Row(TITLES["paths"], f"{connected} of {len(found)}", "all", tuple(flaws))


def stationarity(subject: Subject, limits: Limits) -> Row:
    """How far the hypergradient at the own solution is from that at the refined one."""
    own, exact = subject.hypergradient(subject.at_own)[0], subject.exact
    error = relative(own, exact)
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


def optimality_and_loss(subject: Subject, limits: Limits) -> Row:
    """Where a problem has both, the loss has to be stationary where `optimality` vanishes."""
    problem = subject.problem
    if not hasattr(problem, "optimality") or type(problem).inner_loss is Problem.inner_loss:
        return Row(TITLES["optimality_and_loss"], "only one is defined")
    of_loss = subject.flat.loss_objective(subject.batches.curvature)
    with torch.no_grad():
        at_root = of_loss.gradient(subject.refined, subject.hparams).norm()
        moved = subject.refined + _direction(subject, subject.refined, 7) * subject.refined.norm().clamp(min=1.0)
        near = of_loss.gradient(moved, subject.hparams).norm()
    figure = float(at_root / near)
    flaws: tuple[tuple[Flaw, str], ...] = ()
    if not figure <= DIFFERENCE:
        said = f"where optimality vanishes the gradient of inner_loss has norm {float(at_root):.2g} ({float(near):.2g} nearby)"
        flaws = ((Flaw.wrong_optimality, said),)
    return Row(TITLES["optimality_and_loss"], f"{figure:.2g}", f"<= {DIFFERENCE:g}", flaws)


def repeatable(subject: Subject, limits: Limits) -> Row:
    """The same product from two graphs of the same point."""
    vector = _direction(subject, subject.refined, 1)
    again = subject.linearise(subject.refined, subject.hparams)
    error = relative(again.operator.mv(vector), subject.at_refined.operator.mv(vector))
    said = f"two products of one vector at one point differ by {error:.2g}"
    return _row(TITLES["repeatable"], error, EXACT, Flaw.unrepeatable_product, said)


def symmetric(subject: Subject, limits: Limits) -> Row:
    """`<u, Hv> = <v, Hu>`."""
    operator = subject.at_refined.operator
    if Tag.symmetric not in operator.tags:
        return Row(TITLES["symmetric"], "no Hessian: the inner problem is an optimality")
    u, v = _direction(subject, subject.refined, 2), _direction(subject, subject.refined, 3)
    left, right = operator.mv(v), operator.mv(u)
    gap = ((u * left).sum(-1) - (v * right).sum(-1)).abs()
    error = float((gap / (left.norm(dim=-1) + right.norm(dim=-1)).clamp(min=1e-300)).max())
    return _row(
        TITLES["symmetric"],
        error,
        EXACT,
        Flaw.unsymmetric_hessian,
        f"<u, Hv> and <v, Hu> differ by {error:.2g}",
    )


def smooth(subject: Subject, limits: Limits) -> Row:
    """Differences of `F` to either side of the solution agree with each other, with shorter ones, and with the product."""
    worst = one_sided = jump = 0.0
    for number in range(3):
        v = _direction(subject, subject.refined, 10 + number)
        found = [_differences(subject, v, KINK * shorter) for shorter in (1.0, SHORTER)]
        one_sided, worst = max(one_sided, found[0][0]), max(worst, found[0][1])
        jump = max(jump, found[1][1] / found[0][1] if found[0][1] > DIFFERENCE else 0.0)
    # Where F jumps (|x| at zero), both sides agree and grow as the step gets shorter; a wrong product stays as wrong as it is.
    is_jump = jump > 0.5 / SHORTER
    error = max(one_sided, worst)
    if one_sided > DIFFERENCE or is_jump:
        said = f"the derivative of F to one side of the solution differs from the other side's by {one_sided:.2g}"
        if one_sided <= DIFFERENCE:
            said = "F jumps at the solution: its differences grow as steps get shorter, as those of |x|' do at zero"
        return _row(TITLES["smooth"], error, DIFFERENCE, Flaw.kink, said)
    said = f"products with the Hessian differ from finite differences of F by {worst:.2g}"
    flaw = Flaw.wrong_optimality if hasattr(subject.problem, "optimality") else Flaw.wrong_derivative
    return _row(TITLES["smooth"], error, DIFFERENCE, flaw, said)


def _differences(subject: Subject, v: Tensor, length: float) -> tuple[float, float]:
    """Between the two one-sided differences of `F` along `v`, and between the central one and the product, relative."""
    x, at = subject.refined, subject.at_refined
    step = length * x.norm(dim=-1, keepdim=True).clamp(min=1.0)
    plus, minus = (subject.linearise(x + s * step * v, subject.hparams).optimality.detach() for s in (1, -1))
    here, product = at.optimality.detach(), at.operator.mv(v)
    size = product.norm(dim=-1).clamp(min=1e-8 * _size(at))
    ahead, behind = (plus - here) / step, (here - minus) / step
    one_sided = ((ahead - behind).norm(dim=-1) / size).max()
    return float(one_sided), float((((plus - minus) / (2 * step) - product).norm(dim=-1) / size).max())


def adjoint(subject: Subject, limits: Limits) -> Row:
    """`<w, (∂F/∂θ) u>` by finite differences of `F` against `<(∂F/∂θ)^T w, u>` by the graph."""
    x, layout = subject.refined, subject.layout
    theta = layout.ravel(subject.hparams)
    u, w = _direction(subject, theta, 20) * theta.abs().clamp(min=1e-3), _direction(subject, x, 21)
    length = 1e-4
    values = [subject.linearise(x, layout.unravel(theta + s * length * u)).optimality.detach() for s in (1, -1)]
    forward = float((w * (values[0] - values[1])).sum() / (2 * length))
    pulled = layout.ravel(subject.at_refined.mixed(w))
    backward, size = float((pulled * u).sum()), float((pulled.norm() * u.norm()).clamp(min=1e-12))
    change = float((values[0] - values[1]).norm()) / (2 * length)
    error = abs(forward - backward) / max(size, change, 1e-12)
    said = f"the mixed product and finite differences of F in the hyperparameters differ by {error:.2g}"
    flaw = Flaw.wrong_optimality if hasattr(subject.problem, "optimality") else Flaw.wrong_mixed_product
    return _row(TITLES["adjoint"], error, DIFFERENCE, flaw, said)


def spectrum(subject: Subject, limits: Limits) -> Row:
    """Extreme eigenvalues of the Hessian, or singular values of the Jacobian: definiteness and conditioning."""
    operator = subject.at_refined.operator
    n, is_hessian = operator.shape[0], Tag.symmetric in operator.tags
    if n <= DENSE_LIMIT:
        matrix = as_matrix(operator)
        values = torch.linalg.eigvalsh((matrix + matrix.mT) / 2) if is_hessian else torch.linalg.svdvals(matrix)
        smallest, largest = values.amin(-1), values.amax(-1)
        least = values.abs().amin(-1)
    elif is_hessian:
        ritz = lanczos(operator, NUM_LANCZOS, subject.seed)
        smallest, largest = ritz.smallest, ritz.largest
        least = _least_by_inverse(subject, limits)
    else:
        gram = operator.transpose() @ operator
        gram.tags = gram.tags | {Tag.symmetric}
        ritz = lanczos(gram, NUM_LANCZOS, subject.seed)
        smallest, largest = ritz.smallest.clamp(min=0).sqrt(), ritz.largest.sqrt()
        least = _least_by_inverse(subject, limits)
    size = torch.maximum(smallest.abs(), largest.abs())
    worst = int((least / size).flatten().argmin())
    low, high, ratio = (float(v.flatten()[worst]) for v in (smallest, largest, size / least.clamp(min=1e-300)))
    figure = f"{'eigenvalues' if is_hessian else 'singular values'} from {low:.3g} to {high:.3g}, condition {ratio:.2g}"
    flaws: tuple[tuple[Flaw, str], ...] = ()
    if bool((least <= SINGULAR * size).any()) or not float(size.max()) > 0:
        flaws = ((Flaw.singular_hessian, f"least eigenvalue in size {float(least.min()):.2g}, largest {high:.2g}"),)
    elif is_hessian and bool((smallest < -SINGULAR * size).any()):
        flaws = ((Flaw.indefinite_hessian, f"least eigenvalue {float(smallest.min()):.3g}, largest {high:.3g}"),)
    return Row(TITLES["spectrum"], figure, "positive definite" if is_hessian else "invertible", flaws)


def finite_differences(subject: Subject, limits: Limits) -> Row:
    """The theorem's number against differences of the re-solved problem along directions of the hyperparameters."""
    error = discrepancy(subject, subject.measured, subject.exact)
    said = f"finite differences of the re-solved problem differ from the theorem's derivative by {error:.2g}"
    flaw = Flaw.wrong_optimality if hasattr(subject.problem, "optimality") else Flaw.wrong_derivative
    return _row(TITLES["finite_differences"], error, DIFFERENCE, flaw, said)


def method(subject: Subject, limits: Limits) -> Row:
    """The configured method as the outer loop would run it, against the theorem at the same point and finite differences.

    At the solvers' own tolerances: by how much an outer step may fall short of them is what the receipt of that step says.
    """
    name, title = type(subject.method).__name__, TITLES["method"]
    result = _as_in_a_run(subject, replace(subject.method, accuracy=FixedAccuracy()))
    if isinstance(result, NumericalError):
        return Row(title, f"{name} stops", f"<= {limits.tolerance:g}", ((Flaw.stopped_by_policy, str(result)),))
    gradient, implicit = subject.layout.ravel(result.gradient), isinstance(subject.method, Implicit)
    error, beside_measured = relative(gradient, subject.exact), discrepancy(subject, subject.measured, gradient)
    beside = relative(gradient, subject.hypergradient(subject.at_own)[0] if implicit else subject.exact)
    solved = relative(subject.hypergradient(subject.at_own)[0], subject.exact) <= limits.tolerance
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


def first_step(subject: Subject, limits: Limits) -> Row:
    """What a run makes of its first step where it adapts the tolerances: told, not judged, as the receipt tells it, too."""
    title = TITLES["first_step"]
    if isinstance(subject.method.accuracy, FixedAccuracy):
        return Row(title, "at the solvers' own tolerances, as above")
    result = _as_in_a_run(subject, subject.method)
    if isinstance(result, NumericalError):
        return Row(title, "stopped by its policy")
    gradient = subject.layout.ravel(result.gradient)
    error, size = relative(gradient, subject.exact), float(gradient.norm())
    figure = f"relative error {error:.2g}, at the tolerances that a run starts with"
    if size > 0 and not math.isnan(result.receipt.error_estimate):
        figure += f"; its receipt says {result.receipt.error_estimate / size:.2g}"
    return Row(title, figure)


def _as_in_a_run(subject: Subject, method: HypergradientMethod) -> Hypergradient | NumericalError:
    """The first hypergradient of an outer loop, or what its policy says."""
    start = subject.flat.start(subject.hparams).detach()
    state = start_method(method, subject.flat, subject.solver, start, subject.hparams)
    try:
        return differentiate(method, subject.flat, subject.solver, start, subject.hparams, subject.batches, state)
    except NumericalError as refusal:
        return refusal


CHECKS: tuple[Check, ...] = (
    paths,
    repeatable,
    symmetric,
    spectrum,
    smooth,
    adjoint,
    optimality_and_loss,
    stationarity,
    finite_differences,
    method,
    first_step,
)


def relative(value: Tensor, reference: Tensor) -> float:
    """Norm of the difference over the norm of the reference; 0 for two zeros."""
    gap, size = float((value - reference).norm()), float(reference.norm())
    if gap == 0:
        return 0.0
    return gap / size if size > 0 else float("inf")


def _direction(subject: Subject, like: Tensor, number: int) -> Tensor:
    """A random unit vector for each system."""
    vector = normal(tuple(like.shape), generator(subject.seed, number), like.dtype, like.device)
    return vector / vector.norm(dim=-1, keepdim=True)


def _row(check: str, figure: float, limit: float, flaw: Flaw, said: str) -> Row:
    return Row(check, f"{figure:.2g}", f"<= {limit:g}", () if figure <= limit else ((flaw, said),))


def _size(at: Linearisation) -> float:
    """A scale of the operator, from one product."""
    vector = torch.ones_like(at.params) / at.params.shape[-1] ** 0.5
    return float(at.operator.mv(vector).norm(dim=-1).max())


def _least_by_inverse(subject: Subject, limits: Limits) -> Tensor:
    """The least eigenvalue in size by inverse iteration: three accurate solves from a random vector."""
    vector = _direction(subject, subject.refined, 30)
    length = torch.ones(vector.shape[:-1], dtype=vector.dtype, device=vector.device)
    for _ in range(3):
        value = solve(subject.at_refined, vector).value
        length = value.norm(dim=-1)
        vector = value / length.clamp(min=1e-300).unsqueeze(-1)
    return 1.0 / length.clamp(min=1e-300)
