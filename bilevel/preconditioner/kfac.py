"""Kronecker-factored curvature: K-FAC, and EKFAC with its corrected eigenvalues."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.errors import UsageError
from bilevel.linalg import BlockKroneckerInverse, KroneckerBlock, LinearOperator
from bilevel.linearisation import Linearisation
from bilevel.preconditioner.backpropagation import LinearMap, backpropagate, num_passes
from bilevel.preconditioner.base import Preconditioner, Prepared, State
from bilevel.preconditioner.penalty import penalty_diagonal
from bilevel.solvers import InnerSolution


@dataclass(frozen=True)
class _KroneckerFactored(Preconditioner):
    """What both share: the passes through the model, the penalty, the parameters without a linear map.

    Args:
        num_samples: backward passes with random combinations of the outputs; None makes one for each output of an example,
            which is exact.
        damping: added to the penalty's curvature, at least 0, in units of the Hessian.
        seed: of the random signs.
    """

    num_samples: int | None = None
    damping: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Validate the numbers."""
        name = type(self).__name__
        if self.num_samples is not None and self.num_samples < 1:
            raise UsageError(f"{name} needs num_samples >= 1 or None (exact), but got {self.num_samples}.")
        if not self.damping >= 0:
            raise UsageError(f"{name} needs damping >= 0, but got {self.damping}.")

    def price(self, at: Linearisation) -> float:
        """The passes; infinity where the model is not made for it, or has too many parameters in no linear map."""
        return num_passes(at, self.num_samples)

    def build(self, at: Linearisation, inner: InnerSolution | None) -> Prepared:
        """Factors at the linearisation's point; the products counted are backward passes, and one for the forward ones."""
        with torch.no_grad():
            found = backpropagate(at, self.num_samples, self.seed)
            if not found.maps:
                warnings.warn(
                    f"{type(self).__name__} was expected to find linear maps of parameters (linear or convolution layers, or "
                    "matrix products) in the model's outputs, but found none, and is no more than a diagonal: use "
                    "preconditioner=nystrom or preconditioner=auto.",
                    stacklevel=2,
                )
            penalty = self._penalty(at)
            state: State = {"diagonal": found.diagonal}
            for number, one in enumerate(found.maps):
                state[f"index.{number}"] = one.index
                for name, value in self._describe(one, penalty[..., one.index]).items():
                    state[f"{name}.{number}"] = value
            return Prepared(self._assemble(at, state, penalty), state, found.num_passes)

    def restore(self, at: Linearisation, state: State) -> LinearOperator:
        """The old factors with the present penalty."""
        with torch.no_grad():
            return self._assemble(at, state, self._penalty(at))

    def _penalty(self, at: Linearisation) -> Tensor:
        """Diagonal of the penalty's curvature plus the damping, `(*batch, n)`."""
        known = penalty_diagonal(at)
        return (torch.zeros_like(at.params).detach() if known is None else known) + self.damping

    def _assemble(self, at: Linearisation, state: State, penalty: Tensor) -> LinearOperator:
        blocks = []
        rest = state["diagonal"] + penalty
        number = 0
        while f"index.{number}" in state:
            index = state[f"index.{number}"]
            parts = {
                name: state[f"{name}.{number}"] for name in ("left", "right", "values") if f"{name}.{number}" in state
            }
            left, right, values = self._bases(parts, penalty[..., index])
            # The penalty's diagonal in this basis: exact for all but the entries beside its diagonal there.
            values = values + left.square().mT @ penalty[..., index] @ right.square()
            blocks.append(KroneckerBlock(index, left, right, _positive(values, 2)))
            number += 1
        return BlockKroneckerInverse(at.operator, blocks, _positive(rest, 1))

    @abstractmethod
    def _describe(self, one: LinearMap, penalty: Tensor) -> State:
        """What is kept of a linear map."""

    @abstractmethod
    def _bases(self, parts: State, penalty: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Both bases, and the curvature of the data in them, `(*batch, p, q)`."""


@dataclass(frozen=True)
class KFAC(_KroneckerFactored):
    r"""The inverse of `A ⊗ B + D` for each linear map `y = a M` of the model: K-FAC of the Gauss-Newton matrix.

    `A` is the mean of `a a^T` over examples and places, `B` the sum over examples, places and columns of `g g^T`, where
    `g_c = (∂y)^T S e_c` for the loss's Hessian `S S^T` in the outputs (so that the loss's `1/N` is in `B`). Equal to the
    Gauss-Newton block where `a a^T` and `g g^T` are uncorrelated over examples: with the square loss and one map, exactly.
    Places in an example that share the matrix (positions of a convolution, tokens) count as examples of their own: the
    *expand* convention. Between maps the curvature is taken as zero, and the part of the Hessian that the Gauss-Newton
    matrix leaves out is not seen at all.

    `D` is the diagonal of the penalty's Hessian. The penalties are fitted by a product of one factor for each row and column,
    which is put into the factors of the Kronecker product: penalties that are shared, or one for each input or output, are
    treated exactly, others by their diagonal in the eigenbasis. Parameters in no linear map (embeddings, scales of
    normalisation layers, grouped convolutions) get the diagonal of the Gauss-Newton matrix, from ten more backward passes.

    Used again at another point, the old factors meet the new penalty.

    Args:
        num_samples: backward passes with random combinations of the outputs; None makes one for each output of an example,
            which is exact.
        damping: added to the penalty's curvature, at least 0, in units of the Hessian.
        seed: of the random signs.

    Reference: Martens and Grosse (2015), "Optimizing neural networks with Kronecker-factored approximate curvature";
        Eschenhagen et al. (2023), "Kronecker-factored approximate curvature for modern neural network architectures".
    """

    def _describe(self, one: LinearMap, penalty: Tensor) -> State:
        left, right = _factors(one)
        return {"left": left, "right": right}

    def _bases(self, parts: State, penalty: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _joint_basis(parts["left"], parts["right"], penalty)


@dataclass(frozen=True)
class EKFAC(_KroneckerFactored):
    r"""K-FAC with the exact diagonal of the Gauss-Newton block in its eigenbasis.

    The eigenvalues of `A ⊗ B` are replaced by `Σ_n Σ_c (Q_A^T (Σ_t a_nt g_nct^T) Q_B)²`, the best diagonal in that basis in
    the Frobenius norm; places of an example are summed before they are squared, as the true gradient is. The rest is as
    `KFAC` has it; used again at another point, basis and diagonal stay, and the new penalty is projected on the basis.

    Args:
        num_samples: backward passes with random combinations of the outputs; None makes one for each output of an example,
            which is exact.
        damping: added to the penalty's curvature, at least 0, in units of the Hessian.
        seed: of the random signs.

    Reference: George et al. (2018), "Fast approximate natural gradient descent in a Kronecker-factored eigenbasis".
    """

    def _describe(self, one: LinearMap, penalty: Tensor) -> State:
        left, right, _ = _joint_basis(*_factors(one), penalty)
        return {"left": left, "right": right, "values": _second_moments(one, left, right)}

    def _bases(self, parts: State, penalty: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return parts["left"], parts["right"], parts["values"]


def _factors(one: LinearMap) -> tuple[Tensor, Tensor]:
    """`A` and `B`."""
    a = one.inputs.flatten(-3, -2)  # (*batch, N T, p)
    g = one.gradients.movedim(0, -4).flatten(-4, -2)  # (*batch, columns N T, q)
    return a.mT @ a / a.shape[-2], g.mT @ g


def _joint_basis(left: Tensor, right: Tensor, penalty: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""`L`, `R` and `E` with `L^T A L = diag(a)`, `R^T B R = diag(b)`, `E = a b^T`; a separable `D` turns into ones in them.

    With `D_ij = p_i q_j` the matrix is `D^{1/2} (A' ⊗ B' + I) D^{1/2}`, `A' = p^{-1/2} A p^{-1/2}`: the eigenvectors of `A'`
    and `B'` diagonalise both parts. Otherwise `p` and `q` are the geometric means of rows and columns.
    """
    known = penalty.clamp(min=torch.finfo(penalty.dtype).eps * float(penalty.max()))
    logs = torch.where(known > 0, known, 1.0).log()
    rows = logs.mean(-1)
    columns = logs.mean(-2) - logs.mean((-2, -1)).unsqueeze(-1)
    p, q = (-rows / 2).exp(), (-columns / 2).exp()
    a, basis_a = torch.linalg.eigh(p.unsqueeze(-1) * left * p.unsqueeze(-2))
    b, basis_b = torch.linalg.eigh(q.unsqueeze(-1) * right * q.unsqueeze(-2))
    values = a.clamp(min=0.0).unsqueeze(-1) * b.clamp(min=0.0).unsqueeze(-2)
    return p.unsqueeze(-1) * basis_a, q.unsqueeze(-1) * basis_b, values


def _second_moments(one: LinearMap, left: Tensor, right: Tensor, chunk: int = 64) -> Tensor:
    """Sum over examples and columns of the squared gradients in the bases, `(*batch, p, q)`."""
    a, g = one.inputs @ left.unsqueeze(-3), one.gradients @ right.unsqueeze(-3)
    if a.shape[-2] == 1:
        return a.squeeze(-2).square().mT @ g.squeeze(-2).square().sum(0)
    total = torch.zeros_like(left[..., :1] * right[..., :1, :])
    for column in g:
        for start in range(0, a.shape[-3], chunk):
            part = slice(start, start + chunk)
            total = total + (a[..., part, :, :].mT @ column[..., part, :, :]).square().sum(-3)
    return total


def _positive(values: Tensor, dims: int) -> Tensor:
    """Values at least the square root of the rounding level times the largest; ones where all are zero."""
    largest = values.flatten(-dims).amax(-1).reshape(*values.shape[:-dims], *[1] * dims)
    largest = torch.where(largest > 0, largest, 1.0)
    return values.maximum(torch.finfo(values.dtype).eps ** 0.5 * largest)
