"""Derivatives of solutions: against closed forms, gradcheck, every composition of torch.func, and finite differences."""

import functools
import itertools

import numpy as np
import pytest
import scipy.optimize
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jacfwd, jacrev, jvp, vmap

from bilevel.errors import UsageError
from bilevel.implicit import implicit_argmin, implicit_fixed_point, implicit_root, root_jvp, root_vjp
from bilevel.linalg import (
    GMRES,
    LSMR,
    MINRES,
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
DESCENT = [DenseLU(), DenseCholesky(), ConjugateGradient(**TIGHT), MINRES(**TIGHT), NeumannSeries(**TIGHT)]
MODES = {"r": jacrev, "f": jacfwd}


pytestmark = pytest.mark.usefixtures("float64")


def name_of(value):
    return type(value).__name__


THETA = torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64)
SCALE = torch.tensor(1.3, dtype=torch.float64)


def root_residual(x, theta):
    """Unsymmetric, with a unique root near theta."""
    return x + 0.3 * torch.tanh(torch.roll(x, 1)) * x - theta


def newton(theta):
    x, shift = theta, torch.roll(torch.eye(3), 1, 0)
    for _ in range(10):
        slope = torch.tanh(torch.roll(x, 1))
        jacobian = torch.diag(1 + 0.3 * slope) + (0.3 * x * (1 - slope**2)).unsqueeze(-1) * shift
        x = x - torch.linalg.solve(jacobian, root_residual(x, theta))
    return x


def contraction(x, theta):
    return 0.4 * torch.sin(torch.roll(x, 1)) + theta


def iterate(theta):
    x = torch.zeros_like(theta)
    for _ in range(50):
        x = contraction(x, theta)
    return x


def objective(x, theta, scale):
    """Strictly convex in x, not quadratic."""
    return (x**4).sum() / 4 + scale * (x - theta).square().sum() / 2 + torch.log(torch.cosh(x.sum()))


def minimise(theta, scale):
    x = theta
    for _ in range(12):
        slope = torch.tanh(x.sum())
        curvature = torch.diag(3 * x**2 + scale) + (1 - slope**2)
        x = x - torch.linalg.solve(curvature, x**3 + scale * (x - theta) + slope)
    return x


def root_solver(solver):
    return implicit_root(root_residual, solver=solver)(newton)


def fixed_point_solver(solver):
    return implicit_fixed_point(contraction, solver=solver)(iterate)


def argmin_solver(solver):
    return implicit_argmin(objective, solver=solver)(minimise)


# What is decorated, the same in operations torch differentiates itself, arguments, and the linear solvers that suit it.
PROBLEMS = [
    (root_solver, newton, (THETA,), GENERAL),
    (fixed_point_solver, iterate, (THETA,), [*GENERAL, NeumannSeries(step_size=1.0, **TIGHT)]),
    (argmin_solver, minimise, (THETA, SCALE), DESCENT),
]


def passes_gradcheck(solve, native, args):
    """Both modes, then reverse and forward over reverse, against finite differences of the solved problem."""
    leaves = tuple(arg.clone().requires_grad_() for arg in args)
    assert gradcheck(solve, leaves, check_forward_ad=True)
    assert gradgradcheck(solve, leaves, check_fwd_over_rev=True)


def has_the_jacobian(solve, native, args):
    every = tuple(range(len(args)))
    expected = jacrev(native, every)(*args)
    for mode in MODES.values():
        torch.testing.assert_close(mode(solve, every)(*args), expected, rtol=1e-9, atol=1e-10)


def has_the_hessian(solve, native, args):
    """In all four nestings of the two modes; `torch.func.hessian` is one of them."""

    def through(function):
        return lambda theta: function(theta, *args[1:]).pow(3).sum()

    expected = jacrev(jacrev(through(native)))(args[0])
    for outer, inner in itertools.product(MODES.values(), repeat=2):
        torch.testing.assert_close(outer(inner(through(solve)))(args[0]), expected, rtol=1e-8, atol=1e-9)


def is_batched_by_vmap(solve, native, args):
    """Values, forward mode and gradients; every argument batched, then the first alone."""

    def derivatives(function):
        def of_one(*given):
            value, pushed = jvp(function, given, tuple(torch.ones_like(arg) for arg in given))
            return value, pushed, *grad(lambda *g: function(*g).square().sum(), tuple(range(len(given))))(*given)

        return of_one

    batched = [torch.stack([arg, 0.5 * arg, 1.5 * arg]) for arg in args]
    for in_dims in dict.fromkeys([(0,) * len(args), (0,) + (None,) * (len(args) - 1)]):
        given = [b if dim == 0 else arg for b, arg, dim in zip(batched, args, in_dims, strict=True)]
        rows = [[g[i] if dim == 0 else g for g, dim in zip(given, in_dims, strict=True)] for i in range(3)]
        expected = zip(*(derivatives(native)(*row) for row in rows), strict=True)
        for got, want in zip(vmap(derivatives(solve), in_dims)(*given), expected, strict=True):
            torch.testing.assert_close(got, torch.stack(want), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("check", [passes_gradcheck, has_the_jacobian, has_the_hessian, is_batched_by_vmap])
@pytest.mark.parametrize(
    ("decorated", "native", "args", "solver"),
    [
        pytest.param(decorated, native, args, solver, id=f"{decorated.__name__}-{name_of(solver)}")
        for decorated, native, args, solvers in PROBLEMS
        for solver in solvers
    ],
)
def test_derivatives_of_every_problem_with_every_solver(decorated, native, args, solver, check):
    check(decorated(solver), native, args)


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


@pytest.mark.parametrize("solver", [DenseLU(), GMRES(**TIGHT)], ids=name_of)
@pytest.mark.parametrize("order", list(itertools.product("rf", "rf", "rf")), ids="".join)
def test_circle_derivatives_to_third_order_through_every_triple(order, solver):
    """θ² + x² = 1: x' = -θ/x, x'' = -1/x³, x''' = -3θ/x⁵."""
    circle = implicit_root(lambda x, t: x**2 + t**2 - 1, solver=solver)(lambda t: (1 - t**2).sqrt())
    theta = torch.tensor(0.6)
    x = 0.8
    expected = [-0.6 / x, -1 / x**3, -3 * 0.6 / x**5]
    derivative = circle
    for mode, value in zip(order, expected, strict=True):
        derivative = MODES[mode](derivative)
        assert float(derivative(theta)) == pytest.approx(value, rel=1e-11)
    batch = torch.tensor([0.6, -0.6, 0.0])
    assert vmap(derivative)(batch).tolist() == pytest.approx([expected[2], -expected[2], 0.0], abs=1e-9)


POINT, FACTOR = torch.tensor(0.7, dtype=torch.float64), torch.tensor(1.3, dtype=torch.float64)
ENTRIES = ("argument", "cotangent", "both")
PAIRS = list(itertools.product(ENTRIES, repeat=2))
# Of the 27 triples: all of arguments and cotangents, and the one in which every level moves both.
TRIPLES = [*itertools.product(ENTRIES[:2], repeat=3), ("both",) * 3]


def cardano(t):
    """The real root of x³ + x = t."""
    d = torch.sqrt(t * t / 4 + 1 / 27)
    return (t / 2 + d) ** (1 / 3) - (d - t / 2) ** (1 / 3)


def nested(solve, modes, entries):
    """Derivatives of `∂/∂t sin(c S(t))`, outermost first; each level moves the argument t, the cotangent's c, or both."""

    def level(depth, t, c):
        if depth == len(modes):
            return grad(lambda s: torch.sin(c * solve(s)))(t)
        entry, mode = entries[depth], MODES[modes[depth]]
        if entry == "argument":
            return mode(lambda s: level(depth + 1, s, c))(t)
        if entry == "cotangent":
            return mode(lambda s: level(depth + 1, t, s))(c)
        return mode(lambda s: level(depth + 1, s * t, s * c))(torch.tensor(1.0))

    return float(level(0, POINT, FACTOR))


@functools.cache
def nested_expected(entries):
    return nested(cardano, "r" * len(entries), entries)


CUBICS = {
    "root-DenseLU": implicit_root(lambda x, t: x**3 + x - t, solver=DenseLU())(cardano),
    "root-GMRES": implicit_root(lambda x, t: x**3 + x - t, solver=GMRES(**TIGHT))(cardano),
    "argmin-DenseCholesky": implicit_argmin(lambda x, t: x**4 / 4 + x**2 / 2 - t * x, solver=DenseCholesky())(cardano),
}


@pytest.mark.parametrize("cubic", CUBICS)
@pytest.mark.parametrize("modes", ["".join(m) for depth in (2, 3) for m in itertools.product("rf", repeat=depth)])
def test_every_nesting_is_right_wherever_its_levels_enter(modes, cubic):
    for entries in PAIRS if len(modes) == 2 else TRIPLES:
        assert nested(CUBICS[cubic], modes, entries) == pytest.approx(nested_expected(entries), abs=1e-8), entries


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


@pytest.mark.parametrize("solver", [DenseLU(), GMRES(**TIGHT)], ids=name_of)
@pytest.mark.parametrize("modes", list(itertools.product("rf", "rf")), ids="".join)
def test_root_vjp_and_jvp_are_differentiable_in_every_nesting(modes, solver):
    """On θ² + x² = 1 the solution moves with θ if it is given as a function of it, and is a constant if it is not."""
    theta, fixed = torch.tensor(0.6), torch.tensor(0.8)
    outer, inner = (MODES[mode] for mode in modes)

    def equation(x, t):
        return x**2 + t**2 - 1

    def pulled(t, x):
        return root_vjp(equation, x, (t,), torch.ones_like(x), solver)[0]

    def pushed(t, x):
        return root_jvp(equation, x, (t,), (torch.ones_like(t),), solver)

    for derivative in (pulled, pushed):
        moving = outer(inner(lambda t: derivative(t, (1 - t**2).sqrt())))(theta)
        assert float(moving) == pytest.approx(-3 * 0.6 / 0.8**5, rel=1e-11)
        still = inner(lambda t: derivative(t, fixed))  # of -θ/x with x = 0.8
        assert float(still(theta)) == pytest.approx(-1 / 0.8, rel=1e-11)
        assert float(outer(still)(theta)) == pytest.approx(0.0, abs=1e-11)


def test_dual_numbers_of_forward_ad():
    solve = argmin_solver(ConjugateGradient(**TIGHT))
    scale, tangent = torch.tensor(0.7), torch.tensor([1.0, 0.0, -1.0])
    _, pushed = jvp(lambda t: solve(t, scale), (THETA,), (tangent,))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(THETA, tangent)
        again = torch.autograd.forward_ad.unpack_dual(solve(dual, scale)).tangent
    torch.testing.assert_close(pushed, jacrev(minimise)(THETA, scale) @ tangent, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(again, pushed)


def test_dual_numbers_can_be_differentiated_in_reverse():
    solve = argmin_solver(DenseLU())
    leaf, tangent = THETA.clone().requires_grad_(), torch.tensor([1.0, 0.0, -1.0])
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(leaf, tangent)
        pushed = torch.autograd.forward_ad.unpack_dual(solve(dual, SCALE)).tangent
        (got,) = torch.autograd.grad(pushed.square().sum(), leaf)
    expected = grad(lambda t: (jacrev(minimise)(t, SCALE) @ tangent).square().sum())(THETA)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


SINGULAR = {  # what each solver says of a matrix with a vanishing row: [[1, 0, 0], [0, 0, 0], [0, 0, 2]]
    DenseLU(): "DenseLU failed.*singular to working precision",
    DenseCholesky(): "DenseCholesky failed.*not positive definite",
    GMRES(**TIGHT): "GMRES failed.*singular to working precision",
    MINRES(**TIGHT): "MINRES failed.*singular to working precision",
    LSMR(**TIGHT): "LSMR failed.*singular to working precision",
    ConjugateGradient(**TIGHT): "ConjugateGradient failed.*not positive definite",
}


@pytest.mark.parametrize("transform", [jacrev, jacfwd])
@pytest.mark.parametrize("solver", SINGULAR, ids=name_of)
def test_a_singular_point_raises_by_name(solver, transform):
    def equations(x, t):
        return torch.stack([x[0] - t[0], x[1] ** 2 + t[1] ** 2 - 1, 2 * x[2] - t[2]])

    def find(t):
        return torch.stack([t[0], (1 - t[1] ** 2).sqrt(), t[2] / 2])

    solve = implicit_root(equations, solver=solver, tags=SYMMETRIC)(find)
    with pytest.raises(SolveError, match=SINGULAR[solver]):
        transform(solve)(torch.tensor([0.3, 1.0, 0.5]))
    regular = torch.tensor([0.3, 0.6, 0.5])
    torch.testing.assert_close(transform(solve)(regular), torch.diag(torch.tensor([1.0, -0.75, 0.5])))


def test_one_singular_system_of_a_batch_raises_by_name():
    circle = implicit_root(lambda x, t: x**2 + t**2 - 1, solver=LSMR(**TIGHT))(lambda t: (1 - t**2).sqrt())
    with pytest.raises(SolveError, match="1 of 2 systems.*singular"):
        vmap(grad(circle))(torch.tensor([0.6, 1.0]))


def capturing(scale):
    """A minimiser whose objective takes `scale` from a closure."""
    return implicit_argmin(lambda x, t: (x - scale * t).square().sum(), solver=DenseLU())(lambda t: t)


ONE = torch.tensor(1.0, dtype=torch.float64)
LEAF = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)


def on_dual(function):
    with torch.autograd.forward_ad.dual_level():
        return function(torch.autograd.forward_ad.make_dual(ONE, ONE))


def push(function):
    return jvp(function, (ONE,), (ONE,))


CAPTURES = {
    "graph": lambda: capturing(LEAF)(THETA),
    "graph under vmap": lambda: vmap(capturing(LEAF))(THETA),
    "dual": lambda: on_dual(lambda s: capturing(s)(THETA)),
    "dual under vmap": lambda: on_dual(lambda s: vmap(capturing(s))(THETA)),
    "grad": lambda: grad(lambda s: capturing(s)(THETA).sum())(ONE),
    "grad, among the arguments too": lambda: grad(lambda s: capturing(s)(s * THETA).sum())(ONE),
    "jvp": lambda: push(lambda s: capturing(s)(THETA).sum()),
    "jvp, among the arguments too": lambda: push(lambda s: capturing(s)(s * THETA).sum()),
    "jacfwd, among the arguments too": lambda: jacfwd(lambda s: capturing(s)(s * THETA))(ONE),
    "jacrev, among the arguments too": lambda: jacrev(lambda s: capturing(s)(s * THETA))(ONE),
    "outer grad of grad": lambda: grad(lambda t: grad(lambda s: capturing(t)(s * t))(ONE))(ONE),
    "outer grad of jvp": lambda: grad(lambda t: push(lambda s: capturing(t)(s * t))[1])(ONE),
    "outer jvp of grad": lambda: push(lambda t: grad(lambda s: capturing(t)(s * t))(ONE)),
    "outer jvp of jvp": lambda: push(lambda t: push(lambda s: capturing(t)(s * t))[1]),
    "grad of vmap": lambda: grad(lambda t: vmap(lambda s: capturing(t)(s * t))(THETA).sum())(ONE),
    "jvp of vmap": lambda: push(lambda t: vmap(lambda s: capturing(t)(s * t))(THETA).sum()),
    "vmap": lambda: vmap(lambda s: capturing(s)(ONE))(THETA),
    "vmap, among the arguments too": lambda: vmap(lambda s: capturing(s)(s))(THETA),
}


@pytest.mark.parametrize("capture", CAPTURES)
def test_captured_tensors_are_detected_under_every_transform(capture):
    with pytest.raises(UsageError, match="optimality uses a tensor.*not among its arguments.*pass it as an argument"):
        CAPTURES[capture]()


@pytest.mark.parametrize("outer", MODES.values())
@pytest.mark.parametrize("inner", MODES.values())
def test_captured_constants_are_no_mistake(outer, inner):
    solve = implicit_argmin(lambda x, t: (x - 2 * ONE * t**2).square().sum(), solver=DenseLU())(lambda t: 2 * t**2)
    assert float(outer(inner(solve))(ONE)) == pytest.approx(4.0)
    assert vmap(inner(solve))(THETA).tolist() == pytest.approx((4 * THETA).tolist())


@pytest.mark.parametrize("transform", [grad, jacrev, jacfwd])
def test_root_vjp_and_jvp_detect_captured_tensors(transform):
    def pulled(scale):
        return root_vjp(lambda x, t: x - scale * t, ONE, (ONE,), ONE, DenseLU())[0]

    def pushed(scale):
        return root_jvp(lambda x, t: x - scale * t, ONE, (ONE,), (ONE,), DenseLU())

    for derivative in (pulled, pushed):
        with pytest.raises(UsageError, match="not among its arguments"):
            transform(derivative)(ONE)
        assert float(derivative(ONE)) == pytest.approx(1.0)


STARTS = {
    "graph": lambda solve: solve(THETA, start=torch.zeros(3, requires_grad=True)),
    "grad": lambda solve: grad(lambda t: solve(t, start=t).sum())(THETA),
    "jvp": lambda solve: push(lambda s: solve(THETA, start=s * THETA)),
    "vmap": lambda solve: vmap(lambda t: solve(t, start=torch.zeros_like(t)))(torch.stack([THETA, THETA])),
}


@pytest.mark.parametrize("start", STARTS)
def test_keyword_arguments_that_a_transform_acts_on_are_refused(start):
    solve = implicit_root(root_residual, solver=DenseLU())(lambda t, start: newton(t) + 0 * start)
    with pytest.raises(UsageError, match="keyword argument 'start'.*does not depend on where.*make it inside"):
        STARTS[start](solve)
    expected = jacrev(newton)(THETA)
    for mode in MODES.values():
        torch.testing.assert_close(mode(lambda t: solve(t, start=torch.zeros(3)))(THETA), expected)


def test_bad_input_gets_one_sentence():
    solve = implicit_root(lambda x, t: torch.cat([x, t]), solver=DenseLU())(lambda t: t)
    with pytest.raises(UsageError, match=r"solution's structure and shapes \[\(3,\)\], but has \[\(6,\)\]"):
        solve(THETA)
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


def test_what_a_solver_must_not_return_is_named():
    from scipy.optimize import OptimizeResult

    solve = implicit_argmin(lambda x, t: (x - t).square().sum())(lambda t: OptimizeResult(x=t.numpy()).get)
    with pytest.raises(
        UsageError, match=r"expected to return tensors, arrays or numbers.*SciPy's results the array is `.x`"
    ):
        solve(torch.ones(2, requires_grad=True))
