"""The inverse Hessian approximation of L-BFGS, from pairs of steps and changes of the gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from bilevel.linalg.lowrank import combine, gram
from bilevel.linalg.operator import POSITIVE_DEFINITE, LinearOperator
from bilevel.linalg.system import columns


def two_loop(vector: Tensor, steps: Tensor, changes: Tensor, scale: Tensor) -> Tensor:
    """The inverse Hessian approximation times a vector; a pair with `s'y <= 0` acts as if it were not there.

    The approximation starts from `s'y / y'y` of the newest pair times the identity. Right for an optimiser, whose pairs change
    in each step; a preconditioner, whose pairs stay, is cheaper as an `InverseBFGS`.

    Args:
        vector: `(*batch, n)`.
        steps: `s`, differences of the point, oldest first, `(m, *batch, n)`.
        changes: `y`, differences of the gradient, likewise.
        scale: multiple of the identity for systems without a pair, `(*batch,)`.

    Reference: Nocedal (1980), "Updating quasi-Newton matrices with limited storage".
    """
    curvature, length = (torch.linalg.vecdot(one, changes) for one in (steps, changes))  # (m, *batch)
    good = _good(curvature, length)
    rho = torch.where(good, 1.0 / torch.where(good, curvature, 1.0), 0.0).unsqueeze(-1)
    result, weights = vector, []
    for index in reversed(range(len(steps))):
        weight = rho[index] * torch.linalg.vecdot(steps[index], result).unsqueeze(-1)
        result = result - weight * changes[index]
        weights.append(weight)
    result = columns(_scale(curvature, length, scale)) * result
    for index, weight in enumerate(reversed(weights)):
        result = (
            result + (weight - rho[index] * torch.linalg.vecdot(changes[index], result).unsqueeze(-1)) * steps[index]
        )
    return result


class InverseBFGS(LinearOperator):
    r"""The L-BFGS approximation of an inverse, made of pairs; symmetric positive definite.

    In compact form, so that a product is a few matrix products instead of `2 m` vector operations one after the other:

        `H = H_0 + [S  H_0 Y] [[R^{-T} (D + Y^T H_0 Y) R^{-1}, -R^{-T}], [-R^{-1}, 0]] [S  H_0 Y]^T`

    with `R` the upper triangle of `S^T Y` and `D` its diagonal. Computed as `(I - S R^{-T} Y^T) H_0 (I - Y R^{-1} S^T) +
    S R^{-T} D R^{-1} S^T`, which no rounding makes indefinite. Pairs with `s'y <= 0` act as if they were not there.

    Args:
        like: an operator on the same vectors; its shape and its inner product are taken over.
        steps: `s`, oldest first, `(m, *batch, n)`.
        changes: `y`, `(m, *batch, n)`.
        initial: `H_0`, symmetric positive definite; None starts from `s'y / y'y` of the newest pair times the identity.

    Reference: Byrd, Nocedal and Schnabel (1994), "Representations of quasi-Newton matrices and their use in limited memory
        methods".

    Example:
        >>> from bilevel.linalg import IdentityOperator
        >>> step = torch.tensor([[1.0, 0.0]])
        >>> InverseBFGS(IdentityOperator(2), step, 4 * step).mv(torch.tensor([4.0, 4.0]))
        tensor([1., 1.])
    """

    def __init__(
        self, like: LinearOperator, steps: Tensor, changes: Tensor, initial: LinearOperator | None = None
    ) -> None:
        """Make the small matrices; see the class."""
        self.like, self.initial = like, initial
        self.shape, self.batch_shape = like.shape, like.batch_shape
        self.dtype, self.device, self.tags = like.dtype, like.device, POSITIVE_DEFINITE
        curvature, length = like.inner(steps, changes), like.inner(changes, changes)
        good = _good(curvature, length)
        self.scale = _scale(curvature, length, torch.ones(like.batch_shape, dtype=like.dtype, device=like.device))
        # Pairs of length one: R is then as well conditioned as the pairs allow.
        size = torch.where(good, torch.where(good, curvature, 1.0).rsqrt(), 0.0).unsqueeze(-1)
        self.steps, self.changes = size * steps, size * changes
        products = gram(like, self.steps, self.changes)  # (*batch, m, m)
        bad = (~good).movedim(0, -1).to(like.dtype)
        self.upper = products.triu(1) + torch.diag_embed(torch.diagonal(products, dim1=-2, dim2=-1) + bad)

    def mv(self, vector: Tensor) -> Tensor:
        """The product: four sweeps over the pairs and one product with `H_0`."""
        along = self._against(self.steps, vector)  # S^T v, (*extra, *batch, m)
        weights = self._solve(along, transposed=False)  # R^{-1} S^T v
        middle = self._start(vector - self._towards(self.changes, weights))
        # The second half is the first one's transpose, and the pairs' own part, D = I after the scaling.
        back = weights - self._against(self.changes, middle)
        return middle + self._towards(self.steps, self._solve(back, transposed=True))

    def _start(self, vector: Tensor) -> Tensor:
        return columns(self.scale) * vector if self.initial is None else self.initial.mv(vector)

    def _solve(self, weights: Tensor, transposed: bool) -> Tensor:
        matrix = self.upper.mT if transposed else self.upper
        return torch.linalg.solve_triangular(matrix, weights.unsqueeze(-1), upper=not transposed).squeeze(-1)

    def _against(self, vectors: Tensor, vector: Tensor) -> Tensor:
        """Inner products of the list with a vector, `(*extra, *batch, m)`."""
        if vector.ndim == vectors.ndim - 1:
            return gram(self.like, vectors, vector.unsqueeze(0)).squeeze(-1)
        return torch.stack([self._against(vectors, one) for one in vector])

    def _towards(self, vectors: Tensor, weights: Tensor) -> Tensor:
        """The combination of the list, `(*extra, *batch, n)`."""
        return combine(vectors, weights.unsqueeze(-1)).squeeze(0)

    def transpose(self) -> LinearOperator:
        """Itself."""
        return self

    def inner(self, u: Tensor, v: Tensor) -> Tensor:
        """The inner product that was taken over."""
        return self.like.inner(u, v)


def _good(curvature: Tensor, length: Tensor) -> Tensor:
    """Which pairs show positive curvature, beyond rounding."""
    return curvature > torch.finfo(curvature.dtype).eps * length


def _scale(curvature: Tensor, length: Tensor, otherwise: Tensor) -> Tensor:
    """`s'y / y'y` of the newest good pair, `(*batch,)`."""
    scale, good = otherwise, _good(curvature, length)
    for index in range(len(curvature)):
        scale = torch.where(good[index], curvature[index] / torch.where(good[index], length[index], 1.0), scale)
    return scale
