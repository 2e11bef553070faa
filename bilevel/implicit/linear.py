"""A linear solve that is itself differentiable, as often as one likes: the only place where a derivative is defined.

For a root `F(x*, θ) = 0` everything follows from two linear systems with `A = ∂F/∂x`:

    VJP:  A^T u = cotangent,   θ-cotangent = -(∂F/∂θ)^T u
    JVP:  A v = -(∂F/∂θ) θ-tangent,   v is the tangent of x*

The solution `u` of such a system is again a root, of `M u - b = 0` with `M = A` or `A^T`; its own derivative needs
systems with the same `M` transposed. So one autograd function serves the user's root and every linear solve that
differentiating it gives rise to, to any order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from bilevel.linalg import JacobianOperator, LinearSolver, Tag
from bilevel.result import Result

Optimality = Callable[..., Tensor]  # (x, *tensors) -> F, both (*batch, n), row by row independent


class Root(ABC):
    """Something with `optimality(x, *tensors) = 0`, a way to find `x`, and systems with its Jacobian."""

    @abstractmethod
    def optimality(self, x: Tensor, *tensors: Tensor) -> Tensor:
        """`F(x, θ)`, `(*batch, n)`."""

    @abstractmethod
    def solve(self, *tensors: Tensor) -> Tensor:
        """The root, `(*batch, n)`, from plain tensors; runs without a graph."""

    @abstractmethod
    def system(self, transposed: bool, x: Tensor, tensors: Sequence[Tensor]) -> tuple[LinearRoot, Sequence[Tensor]]:
        """The linear root for `A u = b` (or `A^T u = b`) at `x`, and the tensors that follow `b` among its arguments."""

    @abstractmethod
    def batched(
        self, in_dims: Sequence[int | None], size: int, tensors: Sequence[Tensor]
    ) -> tuple[Root, Sequence[Tensor]]:
        """The same for a batch: tensors with `in_dims` 0 have a new leading dimension; and its arguments."""


class ImplicitFunction(torch.autograd.Function):
    """`tensors -> root.solve(*tensors)`, differentiated by the implicit function theorem."""

    @staticmethod
    def forward(root: Root, *tensors: Tensor) -> Tensor:
        """Solve, on plain tensors."""
        return root.solve(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the solution and the arguments; nothing of the solver's path."""
        ctx.root = inputs[0]
        ctx.save_for_backward(output, *inputs[1:])
        ctx.save_for_forward(output, *inputs[1:])

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        """The VJP of the module's docstring."""
        x, *tensors = ctx.saved_tensors
        wanted = [needed and _differentiable(t) for needed, t in zip(ctx.needs_input_grad[1:], tensors, strict=True)]
        grads = vjp_of_root(ctx.root, x, tensors, cotangent, wanted)
        return None, *grads

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> Tensor:
        """The JVP of the module's docstring."""
        # torch calls this with forward mode off for every level, which loses the tangents of outer levels in silence
        # (pytorch#197867). It is switched on again; only the level whose tangents these are must not act here.
        with forward_ad._set_fwd_grad_enabled(True):
            x, *tensors = (forward_ad.unpack_dual(t).primal for t in ctx.saved_tensors)
            return jvp_of_root(ctx.root, x, tensors, tangents)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], root: Root, *tensors: Tensor) -> tuple[Tensor, int]:
        """Batch to the front, then one batched solve."""
        dims = in_dims[1:]
        moved = [t if dim is None else t.movedim(dim, 0) for t, dim in zip(tensors, dims, strict=True)]
        batched, arguments = root.batched([None if dim is None else 0 for dim in dims], info.batch_size, moved)
        return ImplicitFunction.apply(batched, *arguments), 0


def _differentiable(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _restrict(root: Root, x: Tensor, tensors: Sequence[Tensor], wanted: Sequence[bool]) -> Callable[..., Tensor]:
    """`F` as a function of the wanted tensors alone."""

    def function(*some: Tensor) -> Tensor:
        given = iter(some)
        return root.optimality(x, *(next(given) if want else t for t, want in zip(tensors, wanted, strict=True)))

    return function


def vjp_of_root(
    root: Root, x: Tensor, tensors: Sequence[Tensor], cotangent: Tensor, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """Cotangents of the wanted tensors, `-(∂F/∂θ)^T A^-T cotangent`."""
    linear, rest = root.system(True, x, tensors)
    adjoint = ImplicitFunction.apply(linear, cotangent, *rest)
    primals = [t for t, want in zip(tensors, wanted, strict=True) if want]
    pullback = torch.func.vjp(_restrict(root, x, tensors, wanted), *primals)[1]
    pulled = iter(pullback(-adjoint))
    return [next(pulled) if want else None for want in wanted]


def jvp_of_root(root: Root, x: Tensor, tensors: Sequence[Tensor], tangents: Sequence[Tensor | None]) -> Tensor:
    """Tangent of the solution, `-A^-1 (∂F/∂θ) tangents`."""
    wanted = [tangent is not None for tangent in tangents]
    primals = [t for t, want in zip(tensors, wanted, strict=True) if want]
    given = [tangent for tangent in tangents if tangent is not None]
    pushed = push_forward(_restrict(root, x, tensors, wanted), primals, given)
    linear, rest = root.system(False, x, tensors)
    return ImplicitFunction.apply(linear, -pushed, *rest)


def push_forward(function: Callable[..., Tensor], primals: Sequence[Tensor], tangents: Sequence[Tensor]) -> Tensor:
    """`J tangents` by reverse mode twice: the pullback is linear in its cotangent, and is pulled back itself.

    Forward mode would do, but differentiating it in reverse is wrong through some normalisation layers (torch 2.13).
    """
    output, pullback = torch.func.vjp(function, *primals)[:2]
    pullback_of_pullback = torch.func.vjp(pullback, torch.zeros_like(output))[1]
    pushed: Tensor = pullback_of_pullback(tuple(tangents))[0]
    return pushed


@dataclass(frozen=True)
class LinearRoot(Root):
    """`M u = b` with `M = ∂F/∂x` (or its transpose) at a point: arguments are `b, x, *θ`.

    Attributes:
        base: `F(x, *θ)`.
        solver: how.
        tags: what is known of `∂F/∂x`.
        transposed: whether `M` is the transpose.
        num_extra: leading dimensions of `b` (and `u`) that `x` does not have: more right-hand sides.
    """

    base: Optimality
    solver: LinearSolver
    tags: frozenset[Tag]
    transposed: bool = False
    num_extra: int = 0

    def optimality(self, x: Tensor, *tensors: Tensor) -> Tensor:
        """`M u - b`."""
        rhs, point, *rest = tensors

        def base(z: Tensor) -> Tensor:
            return self.base(z, *rest)

        def product(u: Tensor) -> Tensor:
            if self.transposed or Tag.symmetric in self.tags:
                pulled: Tensor = torch.func.vjp(base, point)[1](u)[0]
                return pulled
            return push_forward(base, [point], [u])

        for _ in range(self.num_extra):
            product = torch.vmap(product)
        return product(x) - rhs

    def solve(self, *tensors: Tensor) -> Tensor:
        """By the linear solver; raises `SolveError` with a sentence when the system is singular or not solved."""
        rhs, point, *rest = (t.detach() for t in tensors)
        operator = JacobianOperator(lambda z: self.base(z, *rest), point, self.tags)
        state = self.solver.init(operator)
        if self.transposed:
            state = self.solver.transpose(state)
        solution = self.solver.compute(state, rhs.contiguous())
        # The system is square: where the best answer is a least-squares solution, there is no derivative.
        inexact = solution.result == Result.least_squares.code
        solution = replace(solution, result=torch.where(inexact, Result.singular.code, solution.result))
        solution.raise_if_failed(f"implicit differentiation: {type(self.solver).__name__}")
        return solution.value

    def system(self, transposed: bool, x: Tensor, tensors: Sequence[Tensor]) -> tuple[LinearRoot, Sequence[Tensor]]:
        """The same matrix, or its transpose, with another right-hand side."""
        return replace(self, transposed=self.transposed != transposed), tensors[1:]

    def batched(
        self, in_dims: Sequence[int | None], size: int, tensors: Sequence[Tensor]
    ) -> tuple[Root, Sequence[Tensor]]:
        """Either more right-hand sides for one matrix, or a batch of matrices with theirs."""
        rhs, point, *rest = tensors
        if in_dims[0] is None:
            rhs = rhs.expand(size, *rhs.shape)
        if all(dim is None for dim in in_dims[1:]):
            return replace(self, num_extra=self.num_extra + 1), [rhs, point, *rest]
        if in_dims[1] is None:
            point = point.expand(size, *point.shape)
        base = self.base
        for _ in range(self.num_extra):  # right-hand sides that shared a matrix become systems of their own
            base = torch.vmap(base, in_dims=(0, *(None for _ in rest)))
        extra = rhs.shape[1 : 1 + self.num_extra]
        point = point.reshape(size, *(1 for _ in extra), *point.shape[1:]).expand(size, *extra, *point.shape[1:])
        base = torch.vmap(base, in_dims=(0, *in_dims[2:]))
        return replace(self, base=base, num_extra=0), [rhs, point, *rest]
