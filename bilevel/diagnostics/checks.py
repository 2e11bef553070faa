"""The checks of a certificate, in the order of its table: each looks at a subject and returns a row."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from bilevel.diagnostics.comparisons import finite_differences, first_steps, method, stationarity
from bilevel.diagnostics.curvature import spectrum
from bilevel.diagnostics.finding import DIFFERENCE, TITLES, Flaw, Limits, Row, nonfinite_row, row
from bilevel.diagnostics.resolved import pull_to_raw, raw_coordinates, raw_places
from bilevel.diagnostics.subject import Subject, relative
from bilevel.hypergradient.outer import outer_gradients
from bilevel.linalg import Tag
from bilevel.linearisation import Linearisation
from bilevel.problem import Problem
from bilevel.purity import Fault, disturbances, randomness
from bilevel.rng import generator, normal

EXACT = 1e-8  # relative difference of numbers that are equal but for rounding, in float64
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
    covered = subject.method.paths - ({"initial"} if subject.method.warm_start else set())
    flaws = []
    for name, ways in subject.paths.items():
        if not ways & covered:
            where = f"only by the paths {', '.join(sorted(ways))}" if ways else "by no path at all"
            flaws.append((Flaw.disconnected_hyperparameter, f"'{name}' reaches the outer loss {where}"))
    connected = len(subject.paths) - len(flaws)
    return Row(TITLES["paths"], f"{connected} of {len(subject.paths)}", "all", tuple(flaws))


def finite(subject: Subject, limits: Limits) -> Row:
    """Whether the losses, `F` and the products with its derivatives are finite where the solver ends, and at the root.

    One product with a random vector stands for a matrix: it has no zeros that could hide an entry.
    """
    broken = _broken(subject, subject.at_own, "where the inner solve ends")
    broken = broken or _broken(subject, subject.at_refined, "at the refined solution")
    return nonfinite_row("finite", broken)


def _broken(subject: Subject, at: Linearisation, where: str) -> list[str]:
    """What is not finite at a point; a product is not worth a word where the loss is not finite, nor one it is made of."""
    vector = _direction(subject, at.params, 5)
    with torch.no_grad():
        losses = {"outer_loss": subject.flat.outer_loss(at.params, subject.hparams, subject.batches.outer)}
        of_loss = subject.flat.objective(subject.batches.curvature).loss
        if of_loss is not None:
            losses["inner_loss"] = of_loss(at.params, subject.hparams)
    _, by_params, direct = outer_gradients(subject.flat, at.params, subject.hparams, subject.batches)
    mixed = at.mixed(vector)
    hessian = "Hessian" if Tag.symmetric in at.operator.tags else "Jacobian"
    stages = [
        {"the solution itself": at.params},
        losses,
        {
            "the optimality F" if of_loss is None else "the gradient of inner_loss": at.optimality,
            "the gradient of outer_loss": by_params,
            **{f"the gradient of outer_loss with respect to '{name}'": value for name, value in direct.items()},
        },
        {
            f"a product with the {hessian}": at.operator.mv(vector),
            **{f"the mixed product of '{name}'": value for name, value in mixed.items()},
        },
    ]
    for stage in stages:
        found = [f"{name} is not finite {where}" for name, value in stage.items() if not bool(value.isfinite().all())]
        if found:
            return found
    return []


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
    """`<w, (∂F/∂θ) u>` by finite differences of `F` against `<(∂F/∂θ)^T w, u>` by the graph, for each hyperparameter by itself.

    In raw coordinates, where no step leaves the constraint: a natural step may reach a penalty below zero. A derivative that
    is small beside the others' would not show in one direction for all.
    """
    x = subject.refined
    theta, natural = raw_coordinates(subject)
    u, w = _direction(subject, theta, 20) * theta.abs().clamp(min=1e-3), _direction(subject, x, 21)
    pulled = pull_to_raw(subject, subject.layout.ravel(subject.at_refined.mixed(w)))
    length = 1e-4
    # What rounding leaves of F, which is a difference of terms as large as its derivative times the point.
    rounding = torch.finfo(x.dtype).eps * _size(subject.at_refined) * float(x.norm()) / length
    errors: dict[str, float] = {}
    for name, place in raw_places(subject).items():
        along = torch.zeros_like(u)
        along[place] = u[place]
        with torch.no_grad():
            beside = [natural(theta + s * length * along) for s in (1, -1)]
        values = [subject.linearise(x, hparams).optimality.detach() for hparams in beside]
        forward = float((w * (values[0] - values[1])).sum() / (2 * length))
        backward, size = float(pulled @ along), float(pulled[place].norm() * along.norm())
        change = float((values[0] - values[1]).norm()) / (2 * length)
        errors[name] = abs(forward - backward) / max(size, change, rounding / DIFFERENCE, 1e-12)
    where = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name])
    worst = errors[where]
    said = f"the mixed product and finite differences of F in '{where}' differ by {worst:.2g}"
    flaw = Flaw.wrong_optimality if hasattr(subject.problem, "optimality") else Flaw.wrong_mixed_product
    return row(TITLES["adjoint"], worst, DIFFERENCE, flaw, said)


CHECKS: tuple[Check, ...] = (
    paths,
    finite,
    repeatable,
    symmetric,
    spectrum,
    smooth,
    adjoint,
    optimality_and_loss,
    stationarity,
    finite_differences,
    method,
    first_steps,
)


def _direction(subject: Subject, like: Tensor, number: int) -> Tensor:
    """A random unit vector for each system."""
    vector = normal(tuple(like.shape), generator(subject.seed, number), like.dtype, like.device)
    return vector / vector.norm(dim=-1, keepdim=True)


def _size(at: Linearisation) -> float:
    """A scale of the operator, from one product."""
    vector = torch.ones_like(at.params) / at.params.shape[-1] ** 0.5
    return float(at.operator.mv(vector).norm(dim=-1).max())
