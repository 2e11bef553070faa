"""Derivatives of solutions: against closed forms, gradcheck, every composition of torch.func, and finite differences."""

import itertools

import numpy as np
import pytest
import scipy.optimize
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from bilevel.errors import UsageError
from bilevel.implicit import implicit_argmin, implicit_fixed_point, implicit_root, root_jvp, root_vjp
from bilevel.linalg import (
    GMRES,
    LSMR,
    SYMMETRIC,
    BiCGStab,
    ConjugateGradient,
    DenseCholesky,
    DenseLU,
    NeumannSeries,
)
from bilevel.result import SolveError

TIGHT = {"rtol": 1e-13, "max_steps": 2000}
GENERAL = [DenseLU(), GMRES(**TIGHT), BiCGStab(**TIGHT), LSMR(**TIGHT)]
DESCENT = [DenseLU(), DenseCholesky(), ConjugateGradient(**TIGHT), NeumannSeries(**TIGHT)]


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def name_of(value):
    return type(value).__name__


def objective(x, theta, scale):
    """Strictly convex in x, not quadratic."""
    return (x**4).sum() / 4 + scale * (x - theta).square().sum() / 2 + torch.log(torch.cosh(x.sum()))


def minimise(theta, scale):
    x = theta.clone()
    for _ in range(60):
        g = grad(objective)(x, theta, scale)
        x = x - torch.linalg.solve(jacrev(grad(objective))(x, theta, scale), g)
    return x


def argmin_solver(solver):
    return implicit_argmin(objective, solver=solver)(minimise)


def root_residual(x, theta):
    """Unsymmetric, with a unique root near theta."""
    return x + 0.3 * torch.tanh(torch.roll(x, 1)) * x - theta


def newton(theta):
    x = theta.clone()
    for _ in range(60):
        x = x - torch.linalg.solve(jacrev(root_residual)(x, theta), root_residual(x, theta))
    return x


THETA = torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64)


@pytest.mark.parametrize("solver", GENERAL, ids=name_of)
def test_root_passes_gradcheck_in_both_modes_and_twice(solver):
    solve = implicit_root(root_residual, solver=solver)(newton)
    theta = THETA.clone().requires_grad_()
    assert gradcheck(solve, (theta,), check_forward_ad=True)
    assert gradgradcheck(solve, (theta,), check_fwd_over_rev=True)


@pytest.mark.parametrize("solver", DESCENT, ids=name_of)
def test_argmin_passes_gradcheck_in_both_modes_and_twice(solver):
    solve = argmin_solver(solver)
    args = (THETA.clone().requires_grad_(), torch.tensor(1.3, requires_grad=True))
    assert gradcheck(solve, args, check_forward_ad=True)
    assert gradgradcheck(solve, args, check_fwd_over_rev=True)


@pytest.mark.parametrize("solver", [*GENERAL, NeumannSeries(step_size=1.0, **TIGHT)], ids=name_of)
def test_fixed_point_agrees_with_differentiating_the_iteration(solver):
    def contraction(x, theta):
        return 0.4 * torch.sin(torch.roll(x, 1)) + theta

    def iterate(theta):
        x = torch.zeros_like(theta)
        for _ in range(200):
            x = contraction(x, theta)
        return x

    solve = implicit_fixed_point(contraction, solver=solver)(iterate)
    torch.testing.assert_close(jacrev(solve)(THETA), jacrev(iterate)(THETA), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(jacfwd(solve)(THETA), jacrev(iterate)(THETA), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("solver", [DenseLU(), ConjugateGradient(**TIGHT)], ids=name_of)
def test_derivatives_are_those_of_the_resolved_problem(solver):
    solve = argmin_solver(solver)
    scale, step = torch.tensor(0.8), 1e-6
    columns = []
    for direction in torch.eye(3):
        columns.append(
            (minimise(THETA + step * direction, scale) - minimise(THETA - step * direction, scale)) / (2 * step)
        )
    torch.testing.assert_close(jacrev(solve)(THETA, scale), torch.stack(columns, -1), rtol=1e-7, atol=1e-8)


MODES = {"rev": jacrev, "fwd": jacfwd}


@pytest.mark.parametrize("order", list(itertools.product("rf", "rf", "rf")), ids="".join)
def test_circle_derivatives_to_third_order_through_every_triple(order):
    """θ² + x² = 1: x' = -θ/x, x'' = -1/x³, x''' = -3θ/x⁵."""
    circle = implicit_root(lambda x, t: x**2 + t**2 - 1, solver=DenseLU())(lambda t: (1 - t**2).sqrt())
    theta = torch.tensor(0.6)
    x = 0.8
    expected = [-0.6 / x, -1 / x**3, -3 * 0.6 / x**5]
    derivative = circle
    for mode, value in zip(order, expected, strict=True):
        derivative = (jacrev if mode == "r" else jacfwd)(derivative)
        assert float(derivative(theta)) == pytest.approx(value, rel=1e-11)
    batch = torch.tensor([0.6, -0.6, 0.0])
    assert vmap(derivative)(batch).tolist() == pytest.approx([expected[2], -expected[2], 0.0], abs=1e-9)


def test_nested_forward_mode_with_an_iterative_solver_is_refused_by_name():
    circle = implicit_root(lambda x, t: x**2 + t**2 - 1, solver=GMRES(**TIGHT))(lambda t: (1 - t**2).sqrt())
    with pytest.raises(UsageError, match="forward mode nested in forward mode.*GMRES.*DenseLU"):
        jacfwd(jacfwd(circle))(torch.tensor(0.6))


@pytest.mark.parametrize("solver", [DenseLU(), DenseCholesky(), ConjugateGradient(**TIGHT)], ids=name_of)
@pytest.mark.parametrize("transform", [hessian, lambda f: jacrev(jacrev(f)), lambda f: jacrev(jacfwd(f))])
def test_hessian_through_the_solution_is_that_of_differentiated_newton(solver, transform):
    if transform is hessian and not isinstance(solver, DenseLU | DenseCholesky):
        transform = lambda f: jacfwd(jacrev(f))  # noqa: E731 - one expression; what torch.func.hessian does
    scale = torch.tensor(0.9)
    solve = argmin_solver(solver)

    def through(function):
        return lambda theta: function(theta, scale).pow(3).sum()

    expected = jacrev(jacrev(through(minimise)))(THETA)
    torch.testing.assert_close(transform(through(solve))(THETA), expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("solver", [DenseLU(), ConjugateGradient(**TIGHT), NeumannSeries(**TIGHT)], ids=name_of)
def test_vmap_over_arguments_equals_a_loop(solver):
    solve = argmin_solver(solver)
    thetas = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    scales = torch.linspace(0.5, 2.0, 5)

    def gradient(theta, scale):
        return grad(lambda t, s: solve(t, s).square().sum(), argnums=(0, 1))(theta, scale)

    expected = [gradient(t, s) for t, s in zip(thetas, scales, strict=True)]
    for got, want in zip(vmap(gradient)(thetas, scales), zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(got, torch.stack(want), rtol=1e-10, atol=1e-12)
    shared = vmap(gradient, in_dims=(0, None))(thetas, scales[0])
    torch.testing.assert_close(
        shared[0], torch.stack([gradient(t, scales[0])[0] for t in thetas]), rtol=1e-10, atol=1e-12
    )


def test_vmap_of_vmap_and_jacobians_inside():
    solve = argmin_solver(ConjugateGradient(**TIGHT))
    thetas = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(1))
    scale = torch.tensor(1.1)
    for jacobian in (jacrev, jacfwd):
        got = vmap(vmap(lambda t: jacobian(solve)(t, scale)))(thetas)
        want = torch.stack([torch.stack([jacobian(minimise)(t, scale) for t in row]) for row in thetas])
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("pass_through", [jacrev, jacfwd])
def test_a_scipy_solver_is_differentiable(pass_through):
    def find(theta, scale):
        result = scipy.optimize.minimize(
            lambda x: float(objective(torch.as_tensor(x), theta, scale)),
            np.zeros(3),
            jac=lambda x: grad(objective)(torch.as_tensor(x), theta, scale).numpy(),
            method="BFGS",
            options={"gtol": 1e-12},
        )
        return result.x  # a NumPy array

    solve = implicit_argmin(objective, solver=DenseCholesky())(find)
    scale = torch.tensor(1.2)
    torch.testing.assert_close(pass_through(solve)(THETA, scale), jacrev(minimise)(THETA, scale), rtol=1e-6, atol=1e-7)
    batch = torch.stack([THETA, 2 * THETA])
    torch.testing.assert_close(
        vmap(solve, in_dims=(0, None))(batch, scale),
        torch.stack([minimise(t, scale) for t in batch]),
        rtol=1e-6,
        atol=1e-7,
    )


def test_nested_structures_and_a_larger_network():
    """A solution that is a dict, arguments that are nested, inside a network whose other weights learn too."""

    def energy(x, params, strength):
        return (
            (x["a"] - params["w"] @ params["b"]).square().sum() + strength * (x["c"] * x["c"]).sum() + x["c"].sum() ** 2
        )

    def find(params, strength):
        return {"a": params["w"] @ params["b"], "c": torch.zeros(2, 2)}

    solve = implicit_argmin(energy, solver=DenseCholesky())(find)
    weight = torch.randn(2, 3, generator=torch.Generator().manual_seed(2)).requires_grad_()
    bias = torch.ones(3, requires_grad=True)
    strength = torch.tensor(2.0, requires_grad=True)
    x = solve({"w": weight, "b": bias}, strength)
    assert x["c"].shape == (2, 2)
    loss = torch.sin(x["a"]).sum() + x["c"].sum() + weight.sum()
    got = torch.autograd.grad(loss, (weight, bias, strength))
    want = torch.autograd.grad(torch.sin(weight @ bias).sum() + weight.sum(), (weight, bias))
    torch.testing.assert_close(got[:2], want)
    assert got[2] == 0.0


def test_root_vjp_and_jvp_are_adjoint_and_equal_the_dense_formula():
    generator = torch.Generator().manual_seed(3)
    x = newton(THETA)
    jacobian = jacrev(root_residual)(x, THETA)
    dense = torch.linalg.solve(jacobian, torch.eye(3))  # dF/dθ = -I
    cotangent, tangent = torch.randn(3, generator=generator), torch.randn(3, generator=generator)
    for solver in GENERAL:
        (pulled,) = root_vjp(root_residual, x, (THETA,), cotangent, solver)
        pushed = root_jvp(root_residual, x, (THETA,), (tangent,), solver)
        torch.testing.assert_close(pulled, dense.T @ cotangent, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(pushed, dense @ tangent, rtol=1e-10, atol=1e-12)
    gradient = grad(objective)
    x = minimise(THETA, torch.tensor(1.0))
    pulled = root_vjp(gradient, x, (THETA, torch.tensor(1.0)), cotangent, ConjugateGradient(**TIGHT), tags=SYMMETRIC)
    pushed = root_jvp(
        gradient, x, (THETA, torch.tensor(1.0)), (tangent, None), ConjugateGradient(**TIGHT), tags=SYMMETRIC
    )
    assert float(pulled[0] @ tangent) == pytest.approx(float(cotangent @ pushed), rel=1e-10)


def test_dual_numbers_of_forward_ad():
    solve = argmin_solver(ConjugateGradient(**TIGHT))
    scale, tangent = torch.tensor(0.7), torch.tensor([1.0, 0.0, -1.0])
    _, pushed = jvp(lambda t: solve(t, scale), (THETA,), (tangent,))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(THETA, tangent)
        again = torch.autograd.forward_ad.unpack_dual(solve(dual, scale)).tangent
    torch.testing.assert_close(pushed, jacrev(minimise)(THETA, scale) @ tangent, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(again, pushed)


@pytest.mark.parametrize("solver", [DenseLU(), GMRES(**TIGHT)], ids=name_of)
def test_a_singular_point_raises_by_name(solver):
    circle = implicit_root(lambda x, t: x**2 + t**2 - 1, solver=solver)(lambda t: (1 - t**2).sqrt())
    theta = torch.tensor(1.0, requires_grad=True)
    with pytest.raises(SolveError, match="singular"):
        circle(theta).backward()


def test_captured_tensors_are_detected_under_every_transform():
    outside = torch.tensor(2.0, requires_grad=True)

    def capturing(scale):
        return implicit_argmin(lambda x, t: (x - scale * t).square().sum(), solver=DenseLU())(
            lambda t: scale.detach() * t
        )

    with pytest.raises(UsageError, match="not among its arguments"):
        capturing(outside)(THETA)
    with pytest.raises(UsageError, match="not among its arguments"):
        grad(lambda s: capturing(s)(THETA).sum())(torch.tensor(2.0))
    with pytest.raises(UsageError, match="not among its arguments"):
        jvp(lambda s: capturing(s)(THETA).sum(), (torch.tensor(2.0),), (torch.tensor(1.0),))
    assert capturing(outside.detach())(THETA).tolist() == (2 * THETA).tolist()


def test_bad_input_gets_one_sentence():
    solve = implicit_root(lambda x, t: torch.cat([x, t]), solver=DenseLU())(lambda t: t)
    with pytest.raises(UsageError, match=r"solution's structure and shapes \[\(3,\)\], but has \[\(6,\)\]"):
        solve(THETA)
    start = torch.zeros(3, requires_grad=True)
    with pytest.raises(UsageError, match="keyword argument 'start'.*does not depend on where"):
        implicit_root(root_residual)(lambda t, start: newton(t))(THETA, start=start)
    with pytest.raises(UsageError, match="floating-point tensors, but holds a torch.int64"):
        implicit_root(root_residual)(lambda t: torch.arange(3))(THETA)


def test_report_tells_conditioning_and_stationarity():
    circle = implicit_root(lambda x, t: x**2 + t**2 - 1, solver=DenseLU())(lambda t: (1 - t**2).sqrt())
    sound = circle.report(torch.tensor(0.6))
    assert sound.stationarity < 1e-15 and sound.condition == pytest.approx(1.0) and sound.largest == pytest.approx(1.6)
    assert circle.report(torch.tensor(1.0)).condition == float("inf")
    scales = torch.tensor([1.0, 10.0, 100.0])
    stretched = implicit_root(lambda x, t: scales * x - t, solver=DenseLU())(lambda t: t / scales)
    assert stretched.report(THETA).condition == pytest.approx(100.0, rel=1e-6)
