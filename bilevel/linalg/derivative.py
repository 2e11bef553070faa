"""Operators that are derivatives: Jacobian, Hessian, Gauss-Newton; one graph built once serves every product.

A product with a retained graph costs one backward pass through it, 1.6 gradients for an MLP. Rebuilding the graph for
each product makes it 1.3 to 1.6 times as dear, and `jvp(grad(f))` 1.6 to 2.1 times, more where the network is small
(`python -m benchmarks.operators`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import grad

from bilevel.errors import UsageError
from bilevel.linalg.operator import NO_TAGS, SYMMETRIC, LinearOperator, Tag

Function = Callable[[Tensor], Tensor]
AT_ONCE = 32  # cotangents in one pass through a graph: its intermediate results are there so many times


def _pull(output: Tensor, point: Tensor, cotangent: Tensor, create_graph: bool = False) -> Tensor:
    """`J^T cotangent` through a retained graph; extra leading dimensions of the cotangent are so many passes."""
    extra = cotangent.ndim - output.ndim
    if extra > 0:
        number = cotangent.shape[:extra].numel()  # there may be none
        rows = _pull_each(output, point, cotangent.reshape(number, *output.shape))
        return rows.reshape(*cotangent.shape[:extra], *point.shape)
    if not output.requires_grad:
        return torch.zeros_like(point)
    (pulled,) = grad(output, point, cotangent, retain_graph=True, create_graph=create_graph, materialize_grads=True)
    return pulled


def _pull_each(output: Tensor, point: Tensor, cotangents: Tensor) -> Tensor:
    """One pass for some of them at a time, or for each where an operation of the graph cannot be batched."""
    if not output.requires_grad or not len(cotangents):
        return point.new_zeros(len(cotangents), *point.shape)
    try:
        parts = [
            grad(output, point, some, retain_graph=True, is_grads_batched=True, allow_unused=True)[0]
            for some in cotangents.split(AT_ONCE)
        ]
    except RuntimeError:  # vmap has no rule for an operation, or there is no memory for so many
        return torch.stack([_pull(output, point, row) for row in cotangents])
    known = [part for part in parts if part is not None]  # None where the output does not depend on the point
    return torch.cat(known) if known else point.new_zeros(len(cotangents), *point.shape)


class HessianOperator(LinearOperator):
    r"""Hessian of a scalar function, `H v = ∇²f(x) v`, by reverse over reverse through a retained gradient graph.

    A batch of systems is a function `(*batch, n) -> (*batch,)` whose value `b` depends on row `b` alone; the Hessian of
    the sum is then block diagonal and one product serves all systems.

    Args:
        function: the function; must not draw random numbers or update buffers.
        point: where to differentiate, `(*batch, n)`.
        tags: more structure than symmetry, if the caller can vouch for it.

    Attributes:
        point: the leaf that the graph was built from.
        gradient: `∇f(x)` with its graph.

    Example:
        >>> hessian = HessianOperator(lambda x: (x ** 4).sum(-1) / 12, torch.tensor([1.0, 2.0]))
        >>> hessian.mv(torch.ones(2))
        tensor([1., 4.])
    """

    def __init__(self, function: Function, point: Tensor, tags: frozenset[Tag] = SYMMETRIC) -> None:
        """Build the gradient graph at the point."""
        with torch.enable_grad():
            leaf = point.detach().requires_grad_()
            value = function(leaf)
            if value.shape != point.shape[:-1]:
                raise UsageError(
                    f"a function of points of shape {tuple(point.shape)} needs values of shape {tuple(point.shape[:-1])} "
                    f"(one scalar a system), but returned {tuple(value.shape)}."
                )
            (gradient,) = grad(value.sum(), leaf, create_graph=True, materialize_grads=True)
        self._describe(gradient, leaf, tags)

    @classmethod
    def from_gradient(cls, gradient: Tensor, point: Tensor, tags: frozenset[Tag] = SYMMETRIC) -> HessianOperator:
        """From a gradient `(*batch, n)` that was computed with `create_graph=True` at the leaf `point`."""
        operator = cls.__new__(cls)
        operator._describe(gradient, point, tags)
        return operator

    def _describe(self, gradient: Tensor, point: Tensor, tags: frozenset[Tag]) -> None:
        self.gradient, self.point = gradient, point
        self.shape = (point.shape[-1], point.shape[-1])
        self.batch_shape = tuple(point.shape[:-1])
        self.dtype, self.device, self.tags = point.dtype, point.device, tags | SYMMETRIC

    def mv(self, vector: Tensor) -> Tensor:
        """`H v`: one backward pass through the gradient's graph (the Hessian is symmetric: `H v = H^T v`)."""
        return _pull(self.gradient, self.point, vector)

    def transpose(self) -> LinearOperator:
        """Itself."""
        return self


class JacobianOperator(LinearOperator):
    r"""Jacobian of `F: R^n -> R^m`; transposed products by reverse mode, products by reverse mode of those.

    The transposed product `w -> J^T w` is linear in `w`, so its own transposed product is `J v`: two graphs, built once
    (the second when it is first needed), and no forward mode, which is wrong through some normalisation layers when it
    is differentiated again.

    Args:
        function: `(*batch, n) -> (*batch, m)`, row by row independent.
        point: where to differentiate, `(*batch, n)`.
        tags: structure that the caller vouches for.
    """

    def __init__(self, function: Function, point: Tensor, tags: frozenset[Tag] = NO_TAGS) -> None:
        """Build the graph at the point."""
        with torch.enable_grad():
            leaf = point.detach().requires_grad_()
            output = function(leaf)
        self._describe(output, leaf, tags)

    @classmethod
    def from_output(cls, output: Tensor, point: Tensor, tags: frozenset[Tag] = NO_TAGS) -> JacobianOperator:
        """From values `(*batch, m)` that were computed with a graph from the leaf `point`."""
        operator = cls.__new__(cls)
        operator._describe(output, point, tags)
        return operator

    def _describe(self, output: Tensor, point: Tensor, tags: frozenset[Tag]) -> None:
        if output.ndim != point.ndim or output.shape[:-1] != point.shape[:-1]:
            raise UsageError(
                f"a function of points of shape {tuple(point.shape)} needs values of shape (*batch, m) with the same "
                f"batch, but returned {tuple(output.shape)}."
            )
        self.output, self.point = output, point
        self.shape = (output.shape[-1], point.shape[-1])
        self.batch_shape = tuple(point.shape[:-1])
        self.dtype, self.device, self.tags = point.dtype, point.device, tags
        self._pulled: tuple[Tensor, Tensor] | None = None

    def mv(self, vector: Tensor) -> Tensor:
        """`J v`."""
        if Tag.symmetric in self.tags:  # J v = J^T v: one graph is enough
            return _pull(self.output, self.point, vector)
        if self._pulled is None:
            with torch.enable_grad():
                probe = torch.zeros_like(self.output).requires_grad_()
                self._pulled = probe, _pull(self.output, self.point, probe, create_graph=True)
        probe, pulled = self._pulled
        return _pull(pulled, probe, vector)

    def transpose(self) -> LinearOperator:
        """The operator `J^T`, on the same graphs."""
        return self if Tag.symmetric in self.tags else TransposedJacobian(self)


class TransposedJacobian(LinearOperator):
    """`J^T`, on the graphs of a `JacobianOperator`."""

    def __init__(self, jacobian: JacobianOperator) -> None:
        """Share the Jacobian's graphs."""
        self.jacobian = jacobian
        self.shape = (jacobian.shape[1], jacobian.shape[0])
        self.batch_shape = jacobian.batch_shape
        self.dtype, self.device, self.tags = jacobian.dtype, jacobian.device, jacobian.tags

    def mv(self, vector: Tensor) -> Tensor:
        """`J^T v`: one backward pass."""
        return _pull(self.jacobian.output, self.jacobian.point, vector)

    def transpose(self) -> LinearOperator:
        """The Jacobian."""
        return self.jacobian


class GaussNewtonOperator(LinearOperator):
    r"""Generalised Gauss-Newton matrix `G = J^T H_l J` of `l(h(x))`: positive semi-definite when `l` is convex.

    Args:
        function: the model `h`, `(*batch, n) -> (*batch, m)`.
        output_loss: `l`, `(*batch, m) -> (*batch,)`.
        point: where to differentiate, `(*batch, n)`.
        tags: `POSITIVE_DEFINITE` if the caller knows that `J` has full column rank; symmetric always.

    Reference: Schraudolph (2002), "Fast curvature matrix-vector products for second-order gradient descent".

    Example:
        >>> operator = GaussNewtonOperator(lambda x: x ** 2, lambda h: (h ** 2).sum(-1) / 2, torch.tensor([1.0, 2.0]))
        >>> operator.mv(torch.ones(2))
        tensor([ 4., 16.])
    """

    def __init__(
        self, function: Function, output_loss: Function, point: Tensor, tags: frozenset[Tag] = SYMMETRIC
    ) -> None:
        """Build both graphs at the point."""
        self.jacobian = JacobianOperator(function, point)
        self.output_hessian = HessianOperator(output_loss, self.jacobian.output)
        self.shape = (point.shape[-1], point.shape[-1])
        self.batch_shape = tuple(point.shape[:-1])
        self.dtype, self.device, self.tags = point.dtype, point.device, tags | SYMMETRIC

    def mv(self, vector: Tensor) -> Tensor:
        """`J^T (H_l (J v))`."""
        return self.jacobian.transpose().mv(self.output_hessian.mv(self.jacobian.mv(vector)))

    def transpose(self) -> LinearOperator:
        """Itself."""
        return self
