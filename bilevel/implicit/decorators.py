"""Any solver made differentiable: `implicit_root`, `implicit_fixed_point`, `implicit_argmin`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map  # the pytree that torch.func itself uses

from bilevel.errors import UsageError
from bilevel.implicit.checks import check_captured, is_tracked
from bilevel.implicit.linear import ImplicitFunction
from bilevel.implicit.root import Arguments, FlatRoot, Structure, flat_optimality, is_tensor
from bilevel.linalg import (
    GMRES,
    NO_TAGS,
    SYMMETRIC,
    ConjugateGradient,
    JacobianOperator,
    LinearSolver,
    ProductOperator,
    Tag,
    lanczos,
)


@dataclass(frozen=True)
class ImplicitReport:
    """Whether the implicit function theorem holds at a solution.

    Attributes:
        stationarity: `‖F(x*, θ)‖`, zero at an exact root.
        largest: estimate from below of the largest singular value of `∂F/∂x`.
        smallest: estimate from above of the smallest singular value.
        condition: their ratio, an estimate from below of the condition number; infinite at a singular point.
    """

    stationarity: float
    largest: float
    smallest: float
    condition: float


@dataclass(frozen=True)
class ImplicitSolver:
    """A solver with the implicit function theorem's derivatives: call it as the solver.

    Supports reverse and forward mode, `torch.vmap`, `torch.func.jacrev` / `jacfwd` / `hessian` and derivatives of
    derivatives in any nesting of the two modes, with any linear solver.
    """

    optimality: Callable[..., Any]
    find: Callable[..., Any]
    solver: LinearSolver
    tags: frozenset[Tag]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The solution for these arguments; keyword arguments go to the solver alone and get no derivative.

        Raises:
            UsageError: a keyword argument carries a derivative, `optimality` captures a tensor that does, or shapes do
                not fit.
            SolveError: (on differentiation) the linear system is singular or was not solved.
        """
        _refuse_derivatives(kwargs)
        arguments = Arguments.of(args)
        found: list[tuple[Structure, Tensor]] = []

        def find(*tensors: Tensor) -> Tensor:
            solution = _as_tensors(self.find(*arguments.rebuild([t.detach() for t in tensors]), **kwargs), tensors)
            structure = Structure.of(solution)
            vector = structure.ravel(solution)
            if not found:  # under vmap this is called for each element: the first one stands for all
                found.append((structure, vector))
            return vector

        def residual(x: Tensor, *tensors: Tensor) -> Tensor:
            return flat_optimality(self.optimality, found[0][0], arguments)(x, *tensors)

        try:
            x = ImplicitFunction.apply(FlatRoot(residual, find, self.solver, self.tags), *arguments.tensors)
        finally:  # forward mode pushes tangents on at once, and torch has no sentence for a captured tensor it meets there
            if found:
                check_captured(residual, found[0][1], arguments.tensors)
        return found[0][0].unravel(x)

    def report(self, *args: Any, num_steps: int = 30, **kwargs: Any) -> ImplicitReport:
        """The theorem's conditions at the solution for these arguments, by `2 num_steps` products at most."""
        arguments = Arguments.of(args)
        tensors = [t.detach() for t in arguments.tensors]
        solution = _as_tensors(self.find(*arguments.rebuild(tensors), **kwargs), tensors)
        structure = Structure.of(solution)
        residual = flat_optimality(self.optimality, structure, arguments)
        jacobian = JacobianOperator(lambda z: residual(z, *tensors), structure.ravel(solution).detach(), self.tags)
        stationarity = float(jacobian.output.detach().norm())
        values = lanczos(ProductOperator(jacobian.transpose(), jacobian, SYMMETRIC), num_steps)
        largest, smallest = (float(v.clamp(min=0).sqrt()) for v in (values.largest, values.smallest))
        # Squares lose half the digits: below that level the smallest singular value is as good as zero.
        if smallest <= largest * torch.finfo(jacobian.dtype).eps ** 0.5:
            smallest = 0.0
        return ImplicitReport(stationarity, largest, smallest, largest / smallest if smallest else float("inf"))


def _refuse_derivatives(kwargs: dict[str, Any]) -> None:
    for name, value in kwargs.items():
        if any(is_tensor(leaf) and is_tracked(leaf) for leaf in tree_flatten(value)[0]):
            raise UsageError(
                f"keyword argument '{name}' carries a derivative (or a vmap's batch), but keyword arguments go to the "
                "solver alone and a solution does not depend on where its solver started: pass it by position if "
                "optimality takes it, or make it inside the solver."
            )


def _as_tensors(solution: Any, tensors: Any) -> Any:
    """NumPy arrays and numbers in a solution as tensors, with dtype and device of the first floating-point argument."""
    like = next((t for t in tensors if t.is_floating_point()), torch.empty(()))

    def convert(leaf: Any) -> Tensor:
        if isinstance(leaf, Tensor):
            return leaf.detach()
        try:
            return torch.as_tensor(leaf, dtype=like.dtype, device=like.device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise UsageError(
                "the solver was expected to return tensors, arrays or numbers, nested as optimality takes them, but "
                f"returned a {type(leaf).__name__} (of SciPy's results the array is `.x`)."
            ) from error

    return tree_map(convert, solution)


def implicit_root(
    optimality: Callable[..., Any], solver: LinearSolver | None = None, tags: frozenset[Tag] = NO_TAGS
) -> Callable[[Callable[..., Any]], ImplicitSolver]:
    r"""Make a solver of `F(x, *args) = 0` differentiable with respect to its arguments.

    `dx*/dθ = -(∂F/∂x)^{-1} ∂F/∂θ`, whatever the solver does inside: it may be NumPy, SciPy or any other code. The
    derivative with respect to an initial iterate is zero, so pass that as a keyword argument.

    Args:
        optimality: `F(x, *args)`; takes every tensor it uses as an argument and has the structure and shapes of `x`.
        solver: for the linear systems of the derivative; GMRES by default, `DenseLU()` for a few hundred unknowns.
        tags: what is known of `∂F/∂x`.

    Returns:
        A decorator for `find(*args, **kwargs) -> x*`.

    Reference: Blondel et al. (2022), "Efficient and modular implicit differentiation".

    Example:
        >>> from bilevel.linalg import DenseLU
        >>> @implicit_root(lambda x, theta: x ** 2 + theta ** 2 - 1, solver=DenseLU())
        ... def circle(theta):
        ...     return (1 - theta ** 2) ** 0.5
        >>> theta = torch.tensor(0.6, requires_grad=True)
        >>> circle(theta).backward()
        >>> theta.grad
        tensor(-0.7500)
    """

    def decorate(find: Callable[..., Any]) -> ImplicitSolver:
        return ImplicitSolver(optimality, find, solver if solver is not None else GMRES(), tags)

    return decorate


def implicit_fixed_point(
    fixed_point: Callable[..., Any], solver: LinearSolver | None = None, tags: frozenset[Tag] = NO_TAGS
) -> Callable[[Callable[..., Any]], ImplicitSolver]:
    r"""Make a solver of `x = T(x, *args)` differentiable: `implicit_root` of `x - T(x, *args)`, so that `A = I - ∂T/∂x`.

    Args:
        fixed_point: `T(x, *args)`, with the structure and shapes of `x`.
        solver: for systems with `I - ∂T/∂x`; GMRES by default. `NeumannSeries(step_size=1.0)` converges when `T` contracts.
        tags: what is known of `I - ∂T/∂x`.

    Example:
        >>> @implicit_fixed_point(lambda x, a: torch.cos(a * x))
        ... def solve(a):
        ...     x = torch.ones_like(a)
        ...     for _ in range(100):
        ...         x = torch.cos(a * x)
        ...     return x
        >>> a = torch.tensor(0.5, requires_grad=True)
        >>> torch.autograd.grad(solve(a), a)[0]
        tensor(-0.3218)
    """

    def optimality(x: Any, *args: Any) -> Any:
        return tree_map(torch.sub, x, fixed_point(x, *args))

    return implicit_root(optimality, solver, tags)


def implicit_argmin(
    objective: Callable[..., Tensor], solver: LinearSolver | None = None, tags: frozenset[Tag] = SYMMETRIC
) -> Callable[[Callable[..., Any]], ImplicitSolver]:
    r"""Make a minimiser of `f(x, *args)` differentiable: `implicit_root` of its gradient, a symmetric system.

    Args:
        objective: `f(x, *args)`, a scalar.
        solver: for systems with the Hessian; conjugate gradient by default, which says so when the Hessian is not
            positive definite; `DenseCholesky()` for a few hundred unknowns.
        tags: what is known of the Hessian beyond symmetry.

    Example:
        >>> @implicit_argmin(lambda x, data: ((x - data) ** 2).sum() + (x ** 2).sum())
        ... def shrink(data):
        ...     return data / 2
        >>> data = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> torch.autograd.grad(shrink(data).sum(), data)[0]
        tensor([0.5000, 0.5000])
    """
    gradient = torch.func.grad(objective)
    return implicit_root(gradient, solver if solver is not None else ConjugateGradient(), tags | SYMMETRIC)
