"""The checks of a certificate, in the order of its table: each looks at a subject and returns a row."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bilevel.diagnostics.comparisons import finite_differences, first_step, method, stationarity
from bilevel.diagnostics.finding import DIFFERENCE, TITLES, Flaw, Limits, Row, row
from bilevel.diagnostics.subject import DENSE_LIMIT, Subject, relative, solve
from bilevel.hypergradient import find_paths
from bilevel.linalg import Tag, as_matrix, lanczos
from bilevel.linearisation import Linearisation
from bilevel.problem import Problem
from bilevel.purity import Fault, disturbances, randomness
from bilevel.rng import generator, normal

EXACT = 1e-8  # relative difference of numbers that are equal but for rounding, in float64
SINGULAR = 1e-12  # least over largest eigenvalue below which a Hessian counts as singular
NUM_LANCZOS = 80
KINK = 1e-6  # length of the steps to either side of the solution, relative to its size
SHORTER = 0.1  # factor of a second length, at which a jump shows
DATA_DRAWS = ("randint", "randperm", "multinomial")  # what draws indices, not noise

Check = Callable[[Subject, Limits], Row]


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
    return row(TITLES["repeatable"], error, EXACT, Flaw.unrepeatable_product, said)


def symmetric(subject: Subject, limits: Limits) -> Row:
    """`<u, Hv> = <v, Hu>`."""
    operator = subject.at_refined.operator
    if Tag.symmetric not in operator.tags:
        return Row(TITLES["symmetric"], "no Hessian: the inner problem is an optimality")
    u, v = _direction(subject, subject.refined, 2), _direction(subject, subject.refined, 3)
    left, right = operator.mv(v), operator.mv(u)
    gap = ((u * left).sum(-1) - (v * right).sum(-1)).abs()
    error = float((gap / (left.norm(dim=-1) + right.norm(dim=-1)).clamp(min=1e-300)).max())
    return row(
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
        return row(TITLES["smooth"], error, DIFFERENCE, Flaw.kink, said)
    said = f"products with the Hessian differ from finite differences of F by {worst:.2g}"
    flaw = Flaw.wrong_optimality if hasattr(subject.problem, "optimality") else Flaw.wrong_derivative
    return row(TITLES["smooth"], error, DIFFERENCE, flaw, said)


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
    return row(TITLES["adjoint"], error, DIFFERENCE, flaw, said)


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


def _direction(subject: Subject, like: Tensor, number: int) -> Tensor:
    """A random unit vector for each system."""
    vector = normal(tuple(like.shape), generator(subject.seed, number), like.dtype, like.device)
    return vector / vector.norm(dim=-1, keepdim=True)


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
