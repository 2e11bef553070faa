"""Steps within a trust region: the properties of Steihaug's method, the rule of the radius, and what Newton-CG gains."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bilevel.linalg import SYMMETRIC, MatrixOperator
from bilevel.solvers import InnerResult, NewtonCG, Objective, newton_cg, run
from bilevel.solvers.line_search import Point
from bilevel.solvers.trust_region import ModelStep, next_radius, truncated_cg

N = 5
SPECTRA = {
    "definite": [1.0, 2.0, 3.0, 5.0, 9.0],
    "indefinite": [-4.0, -0.1, 0.5, 2.0, 7.0],
    "semidefinite": [0.0, 0.0, 1.0, 3.0, 4.0],
    "negative": [-3.0, -2.0, -1.0, -0.5, -0.2],
    "zero": [0.0] * N,
}


pytestmark = pytest.mark.usefixtures("float64")


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def matrix_of(*names, seed=0):
    """One symmetric matrix for each spectrum, `(*names, N, N)`."""
    basis = torch.linalg.qr(normal(len(names), N, N, seed=seed))[0]
    return basis @ torch.diag_embed(torch.tensor([SPECTRA[name] for name in names])) @ basis.mT


def lowered(matrix, gradient, step):
    """By how much a step lowers the model."""
    product = (matrix @ step.unsqueeze(-1)).squeeze(-1)
    return -(torch.linalg.vecdot(gradient, step) + torch.linalg.vecdot(step, product) / 2)


def step_of(matrix, gradient, radius, tolerance=1e-10, max_products=2 * N):
    batch = gradient.shape[:-1]
    radius, tolerance = (torch.as_tensor(one).expand(batch) for one in (radius, tolerance))
    return truncated_cg(MatrixOperator(matrix, SYMMETRIC), gradient, radius, tolerance, max_products)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    radius=st.floats(1e-3, 1e3),
    seed=st.integers(0, 10_000),
    max_products=st.integers(1, 2 * N),
    names=st.lists(st.sampled_from(sorted(SPECTRA)), min_size=1, max_size=4),
)
def test_a_step_stays_in_the_region_and_lowers_the_model_at_least_as_much_as_the_cauchy_point(
    radius, seed, max_products, names
):
    matrix, gradient = matrix_of(*names, seed=seed), normal(len(names), N, seed=seed + 1)
    model = step_of(matrix, gradient, radius, max_products=max_products)
    length = model.direction.norm(dim=-1)
    assert bool((length <= radius * (1 + 1e-9)).all())
    found = lowered(matrix, gradient, model.direction)
    scale = found.abs().clamp(min=1.0)
    torch.testing.assert_close(model.predicted / scale, found / scale, rtol=0, atol=1e-9)
    size = gradient.norm(dim=-1)
    bend = lowered(matrix, gradient * 0, gradient) * -2  # g'Hg
    along = torch.where(bend > 0, size.square() / bend, torch.inf).clamp(max=radius / size)
    cauchy = lowered(matrix, gradient, -along.unsqueeze(-1) * gradient)
    assert bool((found >= cauchy * (1 - 1e-9)).all())
    on_boundary = (length - radius).abs() <= 1e-9 * radius
    assert bool((on_boundary | ~model.bounded).all())


@pytest.mark.parametrize("radius", [torch.inf, 100.0], ids=["no region", "a wide one"])
def test_a_definite_model_is_minimised_as_if_there_were_no_region(radius):
    matrix, gradient = matrix_of("definite", "definite"), normal(2, N, seed=3)
    model = step_of(matrix, gradient, radius)
    torch.testing.assert_close(model.direction, -torch.linalg.solve(matrix, gradient), rtol=1e-9, atol=1e-9)
    assert not bool(model.bounded.any()) and model.num_mv == N


def test_negative_curvature_is_followed_to_the_boundary_or_as_far_as_its_size_says():
    matrix, gradient = torch.diag(torch.tensor([-2.0, 1.0, 1.0, 1.0, 1.0])), torch.zeros(N)
    gradient[0] = 3.0
    for radius, first in ((10.0, -10.0), (torch.inf, -1.5), (0.5, -0.5)):
        model = step_of(matrix, gradient, radius)
        torch.testing.assert_close(model.direction, torch.tensor([first, 0.0, 0.0, 0.0, 0.0]))
        assert bool(model.bounded) and model.num_mv == 1


STRAIGHT = {  # curvatures along the axes that say nothing of how far to go, from a gradient of (1, 1, 1, 1, 1)
    "none": [0.0] * N,
    "hardly any": [1e-320] * N,
    "not finite": [float("nan")] * N,
    "infinite": [float("inf")] * N,
}


@pytest.mark.parametrize("curvature", STRAIGHT.values(), ids=STRAIGHT)
@pytest.mark.parametrize(("radius", "length"), [(torch.inf, 1.0), (2.0, 2.0 / N**0.5)])
def test_without_a_curvature_the_step_is_the_gradients_or_goes_to_the_boundary(curvature, radius, length):
    matrix = torch.stack([torch.eye(N), torch.diag(torch.tensor(curvature))])
    gradient = torch.ones(2, N)
    model = step_of(matrix, gradient, radius)
    torch.testing.assert_close(model.direction[1], torch.full((N,), -length))
    torch.testing.assert_close(model.direction[0], torch.full((N,), -min(1.0, length)))  # that of the system beside it
    assert bool(model.bounded[1]) and bool((model.predicted > 0).all())


def test_a_later_direction_of_no_curvature_is_left_out():
    """The first step is to the minimum along the first axis; then nothing is known of the second."""
    matrix, gradient = torch.diag(torch.tensor([1.0, 0.0])), torch.tensor([1.0, 0.0])
    gradient[1] = 1e-3
    model = step_of(matrix, gradient, torch.inf)
    assert bool(model.direction.isfinite().all()) and float(model.predicted) > 0


def test_the_predicted_decrease_is_right_in_float32_after_many_products():
    values = torch.logspace(-3, 3, 200, dtype=torch.float64)
    gradient = normal(200, seed=4)
    matrix = torch.diag(values)
    model = truncated_cg(
        MatrixOperator(matrix.float(), SYMMETRIC), gradient.float(), *torch.tensor([torch.inf, 0.0]).float(), 190
    )
    expected = lowered(matrix, gradient, model.direction.double())
    assert float(model.predicted) == pytest.approx(float(expected), rel=1e-3)


def test_systems_of_a_batch_do_not_touch_each_other():
    names = list(SPECTRA)
    matrix, gradient = matrix_of(*names), normal(len(names), N, seed=1)
    radius = torch.tensor([torch.inf, 1.0, 0.3, torch.inf, 2.0])
    tolerance = torch.tensor([1e-10, 1e-10, 1e-2, 1e-10, torch.inf])  # the last has nothing to do
    together = truncated_cg(MatrixOperator(matrix, SYMMETRIC), gradient, radius, tolerance, 2 * N)
    for place in range(len(names)):
        alone = step_of(matrix[place], gradient[place], radius[place], tolerance[place])
        torch.testing.assert_close(together.direction[place], alone.direction, rtol=1e-12, atol=1e-12)
        assert together.bounded[place] == alone.bounded
    assert bool((together.direction[-1] == 0).all())


ASKED, OLD = 2.0, 8.0
RULE = {  # share of the promised decrease, length of the step taken, whether the region ended it -> the next radius
    "the model held inside": (1.0, ASKED, False, OLD),
    "it held at the boundary": (0.9, ASKED, True, 2 * ASKED),
    "it held so so at the boundary": (0.5, ASKED, True, ASKED),
    "it promised too much": (0.1, ASKED, False, ASKED / 4),
    "the line search had to shorten": (0.1, ASKED / 8, True, ASKED / 8),
    "no step was found": (0.0, 0.0, True, ASKED / 4),
}


@pytest.mark.parametrize(("share", "taken", "bounded", "expected"), RULE.values(), ids=RULE)
def test_the_next_radius(share, taken, bounded, expected):
    unit = torch.tensor([0.6, 0.8])
    start = Point(torch.zeros(2), torch.tensor(1.0), unit)
    end = Point(taken * unit, torch.tensor(1.0 - share * 0.5), unit)
    model = ModelStep(ASKED * unit, torch.tensor(0.5), torch.tensor(bounded), 1)
    assert float(next_radius(torch.tensor(OLD), start, end, model)) == pytest.approx(expected)


def test_a_decrease_below_rounding_says_nothing_of_the_region():
    unit = torch.tensor([0.6, 0.8])
    start = Point(torch.zeros(2), torch.tensor(1.0), unit)
    model = ModelStep(1e-9 * unit, torch.tensor(1e-17), torch.tensor(True), 1)
    assert float(next_radius(torch.tensor(OLD), start, start, model)) == OLD


def test_newton_cg_leaves_a_region_without_curvature_and_passes_a_point_of_infinite_curvature():
    """Huber's loss far out is straight; the second derivative of |x|^1.5 at zero is infinite."""
    huber = Objective(lambda x, h: torch.where(x.abs() > 1, x.abs() - 0.5, x.square() / 2).sum(-1))
    kink = Objective(lambda x, h: x.abs().pow(1.5).sum(-1) + (x - 1).square().sum(-1))
    with torch.no_grad():
        for objective, start, where in ((huber, [30.0, -7.5], 0.0), (kink, [0.0, 0.0], None)):
            solution = run(NewtonCG(atol=1e-9), objective, torch.tensor(start), {})
            assert solution.result is InnerResult.converged, objective
            if where is not None:
                torch.testing.assert_close(solution.params, torch.full((2,), where), rtol=0, atol=1e-8)


@pytest.mark.parametrize(("start", "again"), [(0.3, True), (1.0 + 1e-9, False)])
def test_a_step_that_fails_is_tried_again_in_a_smaller_region_where_it_promised_anything(monkeypatch, start, again):
    monkeypatch.setattr(newton_cg, "search", lambda loss, at, direction, h: (at, torch.tensor(False), 1))
    objective = Objective(lambda x, h: 1.0 + (x - 1).square().sum(-1))
    solver = NewtonCG(atol=0.0)
    with torch.no_grad():
        at = torch.tensor([start])
        params, state = solver.step(at, solver.init(at, objective, {}), objective, {})
    assert torch.equal(params, at) and bool(state["stuck"]) is not again
    assert bool(state["radius"] < torch.inf) is again


def small_network(seed):
    """Four networks of a hidden layer of eight, with little weight decay: far from convex."""
    inputs, targets = normal(20, 5, seed=seed), normal(20, seed=seed + 1)

    def loss(params, hparams):
        hidden = torch.tanh(inputs @ params[..., :40].unflatten(-1, (5, 8)))
        outputs = (hidden @ params[..., 40:].unsqueeze(-1)).squeeze(-1)
        return (outputs - targets).square().sum(-1) / 2 + 0.005 * params.square().sum(-1)

    return Objective(loss), normal(4, 48, seed=seed + 2)


@pytest.mark.parametrize("seed", [0, 10, 20])
def test_newton_cg_solves_networks_with_few_gradients(seed):
    """Steepest descent wherever there is negative curvature stood at a gradient norm of 0.2 after 2,300 of them."""
    objective, start = small_network(seed)
    with torch.no_grad():
        solution = run(NewtonCG(max_steps=400, atol=1e-9), objective, start, {})
        assert solution.result is InnerResult.converged and solution.num_gradients < 1000
        for place in range(len(start)):  # a minimum each, no saddle
            point = solution.params[place]
            with torch.enable_grad():
                hessian = torch.autograd.functional.hessian(lambda x: objective.loss(x, {}), point)
            assert float(torch.linalg.eigvalsh(hessian)[0]) > -1e-6
