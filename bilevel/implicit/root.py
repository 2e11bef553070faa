"""Derivatives of a root at a given solution, as pure functions: `root_vjp` and `root_jvp`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten  # the pytree that torch.func itself uses

from bilevel.errors import UsageError
from bilevel.implicit.checks import check_captured
from bilevel.implicit.linear import LinearRoot, Optimality, Root, jvp_of_root, vjp_of_root
from bilevel.linalg import NO_TAGS, LinearSolver, Tag


@dataclass(frozen=True)
class FlatRoot(Root):
    """A user's root on flat vectors: `F(x, *θ)` and the solver of `x`, both between vectors of length `n`.

    Attributes:
        residual: `F`, `(*batch, n)`.
        find: the user's solver, `(*tensors) -> (*batch, n)`.
        solver: for the linear systems of the derivative.
        tags: what is known of `∂F/∂x`.
    """

    residual: Optimality
    find: Callable[..., Tensor]
    solver: LinearSolver
    tags: frozenset[Tag]

    def optimality(self, x: Tensor, *tensors: Tensor) -> Tensor:
        """`F(x, θ)`."""
        return self.residual(x, *tensors)

    def solve(self, *tensors: Tensor) -> Tensor:
        """By the user's solver."""
        return self.find(*tensors)

    def system(self, transposed: bool, x: Tensor, tensors: Sequence[Tensor]) -> tuple[LinearRoot, Sequence[Tensor]]:
        """Systems with `∂F/∂x` at `x`."""
        return LinearRoot(self.residual, self.solver, self.tags, transposed), [x, *tensors]

    def batched(
        self, in_dims: Sequence[int | None], size: int, tensors: Sequence[Tensor]
    ) -> tuple[Root, Sequence[Tensor]]:
        """The user's solver is called once for each element: it may be any code; linear systems go as one batch."""

        def find(*given: Tensor) -> Tensor:
            def element(index: int) -> Tensor:
                return self.find(*(t[index] if dim == 0 else t for t, dim in zip(given, in_dims, strict=True)))

            return torch.stack([element(index) for index in range(size)])

        residual = torch.vmap(self.residual, in_dims=(0, *in_dims))
        return FlatRoot(residual, find, self.solver, self.tags), tensors


@dataclass(frozen=True)
class Structure:
    """How a nest (dict, list, tuple) of tensors becomes one vector and back."""

    spec: Any
    shapes: tuple[torch.Size, ...]

    @classmethod
    def of(cls, nest: Any) -> Structure:
        """The structure of a nest of tensors of one floating-point dtype.

        Raises:
            UsageError: a leaf is not a floating-point tensor, or dtypes differ.
        """
        leaves, spec = tree_flatten(nest)
        for leaf in leaves:
            if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
                kind = leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__
                raise UsageError(f"a solution was expected to consist of floating-point tensors, but holds a {kind}.")
        if len({leaf.dtype for leaf in leaves}) != 1:
            raise UsageError(
                f"a solution was expected to have one dtype, but has {sorted(str(leaf.dtype) for leaf in leaves)}."
            )
        return cls(spec, tuple(leaf.shape for leaf in leaves))

    def ravel(self, nest: Any) -> Tensor:
        """As one vector `(n,)`.

        Raises:
            UsageError: the nest has another structure or other shapes.
        """
        leaves, spec = tree_flatten(nest)
        shapes = [getattr(leaf, "shape", None) for leaf in leaves]
        if spec != self.spec or shapes != list(self.shapes):
            raise UsageError(
                f"the optimality must have the solution's structure and shapes {[tuple(s) for s in self.shapes]}, but has "
                f"{[tuple(s) if s is not None else None for s in shapes]} in structure {spec}."
            )
        return torch.cat([leaf.reshape(-1) for leaf in leaves])

    def unravel(self, vector: Tensor) -> Any:
        """The nest again."""
        sizes = [shape.numel() for shape in self.shapes]
        parts = [part.reshape(shape) for part, shape in zip(vector.split(sizes), self.shapes, strict=True)]
        return tree_unflatten(parts, self.spec)


def is_tensor(leaf: Any) -> bool:
    """True for what a derivative can be taken with respect to."""
    return isinstance(leaf, Tensor)


@dataclass(frozen=True)
class Arguments:
    """The tensors among nested arguments, and how to put them back among the rest."""

    spec: Any
    leaves: tuple[Any, ...]

    @classmethod
    def of(cls, args: Any) -> Arguments:
        """Take nested arguments apart."""
        leaves, spec = tree_flatten(args)
        return cls(spec, tuple(leaves))

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors in order."""
        return [leaf for leaf in self.leaves if is_tensor(leaf)]

    def rebuild(self, tensors: Sequence[Any]) -> Any:
        """The nested arguments with other values for the tensors."""
        given = iter(tensors)
        return tree_unflatten([next(given) if is_tensor(leaf) else leaf for leaf in self.leaves], self.spec)

    def only_tensors(self, values: Sequence[Any]) -> Any:
        """The nested arguments with a value for each tensor and None for everything else."""
        given = iter(values)
        return tree_unflatten([next(given) if is_tensor(leaf) else None for leaf in self.leaves], self.spec)


def flat_optimality(optimality: Callable[..., Any], structure: Structure, arguments: Arguments) -> Optimality:
    """The user's optimality between vectors: `(x, *tensors) -> F`."""

    def residual(x: Tensor, *tensors: Tensor) -> Tensor:
        return structure.ravel(optimality(structure.unravel(x), *arguments.rebuild(tensors)))

    return residual


def _flat_root(
    optimality: Callable[..., Any], solution: Any, args: tuple[Any, ...], solver: LinearSolver, tags: frozenset[Tag]
) -> tuple[FlatRoot, Structure, Arguments, Tensor]:
    structure, arguments = Structure.of(solution), Arguments.of(args)
    x = structure.ravel(solution)
    root = FlatRoot(flat_optimality(optimality, structure, arguments), lambda *_: x, solver, tags)
    check_captured(root.residual, x, arguments.tensors)
    return root, structure, arguments, x


def root_vjp(
    optimality: Callable[..., Any],
    solution: Any,
    args: tuple[Any, ...],
    cotangent: Any,
    solver: LinearSolver,
    tags: frozenset[Tag] = NO_TAGS,
) -> tuple[Any, ...]:
    r"""Pull a cotangent of the solution back to the arguments: `-(∂F/∂θ)^T (∂F/∂x)^{-T} cotangent`.

    The result can be differentiated again, in any nesting of the two modes: it is a function of `solution`, `args` and
    `cotangent`, and `solution` moves with the arguments only if it carries that derivative itself (a closed form, or the
    output of `implicit_root`). A detached solution is a constant, and gives the formula's partial derivative alone.

    Args:
        optimality: `F(x, *args)`, with the structure and shapes of `x`.
        solution: `x*`, a tensor or a nest of tensors with `F(x*, *args) = 0`.
        args: the arguments `θ`, nests of tensors and anything else.
        cotangent: like the solution.
        solver: for the system with `(∂F/∂x)^T`.
        tags: what is known of `∂F/∂x`, for instance `SYMMETRIC` for the gradient of a function.

    Returns:
        A cotangent for each argument, with None for what is not a floating-point tensor.

    Raises:
        UsageError: `optimality` captures a tensor that carries a derivative, or shapes do not fit.
        SolveError: the linear system was not solved; the sentence says why (singular, stagnated, ...).

    Example:
        >>> from bilevel.linalg import DenseLU
        >>> theta = torch.tensor(0.6, dtype=torch.float64)
        >>> x = (1 - theta ** 2).sqrt()  # a root of x² + θ² = 1; dx/dθ = -θ/x
        >>> root_vjp(lambda x, t: x ** 2 + t ** 2 - 1, x, (theta,), torch.ones_like(x), DenseLU())
        (tensor(-0.7500, dtype=torch.float64),)
    """
    root, structure, arguments, x = _flat_root(optimality, solution, args, solver, tags)
    wanted = [tensor.is_floating_point() for tensor in arguments.tensors]
    grads = vjp_of_root(root, x, arguments.tensors, structure.ravel(cotangent), wanted)
    result: tuple[Any, ...] = arguments.only_tensors(grads)
    return result


def root_jvp(
    optimality: Callable[..., Any],
    solution: Any,
    args: tuple[Any, ...],
    tangents: tuple[Any, ...],
    solver: LinearSolver,
    tags: frozenset[Tag] = NO_TAGS,
) -> Any:
    r"""Push tangents of the arguments forward to the solution: `-(∂F/∂x)^{-1} (∂F/∂θ) tangents`.

    It can be differentiated again like `root_vjp`: `solution` moves with the arguments only if it carries that itself.

    Args:
        optimality: `F(x, *args)`, with the structure and shapes of `x`.
        solution: `x*`, a tensor or a nest of tensors.
        args: the arguments `θ`.
        tangents: one for each argument, of its structure; None for an argument (or a leaf) that does not move.
        solver: for the system with `∂F/∂x`.
        tags: what is known of `∂F/∂x`.

    Returns:
        The tangent of the solution, with its structure.

    Raises:
        UsageError: `optimality` captures a tensor that carries a derivative, or shapes do not fit.
        SolveError: the linear system was not solved.

    Example:
        >>> from bilevel.linalg import DenseLU
        >>> theta = torch.tensor(0.6, dtype=torch.float64)
        >>> x = (1 - theta ** 2).sqrt()
        >>> root_jvp(lambda x, t: x ** 2 + t ** 2 - 1, x, (theta,), (torch.ones_like(theta),), DenseLU())
        tensor(-0.7500, dtype=torch.float64)
    """
    root, structure, arguments, x = _flat_root(optimality, solution, args, solver, tags)
    given: list[Tensor | None] = []
    for arg, tangent in zip(args, tangents, strict=True):
        leaves = tree_flatten(arg)[0]
        moves = [None] * len(leaves) if tangent is None else tree_flatten(tangent, is_leaf=lambda v: v is None)[0]
        if len(moves) != len(leaves):
            raise UsageError(
                "tangents were expected to have the structure of the arguments, with None where none moves."
            )
        given.extend(move for leaf, move in zip(leaves, moves, strict=True) if is_tensor(leaf))
    if all(tangent is None for tangent in given):
        return structure.unravel(torch.zeros_like(x))
    return structure.unravel(jvp_of_root(root, x, arguments.tensors, given))
