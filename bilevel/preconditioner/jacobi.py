"""Diagonal preconditioners: Hutchinson's estimate of the diagonal, and Adam's second moment."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.errors import UsageError
from bilevel.linalg import POSITIVE_DEFINITE, DiagonalOperator, LinearOperator
from bilevel.linearisation import Linearisation
from bilevel.preconditioner.base import Preconditioner, Prepared, State
from bilevel.preconditioner.penalty import penalty_diagonal, signs
from bilevel.rng import generator
from bilevel.solvers import InnerSolution

FLOOR = 1e-3  # of the mean size of the diagonal: what an estimate below is worth is not known


@dataclass(frozen=True)
class Jacobi(Preconditioner):
    r"""The inverse of the diagonal's size, `|mean of z ∘ (H z)|` over random signs `z`, kept above its own standard error.

    The estimate is unbiased; the variance of entry `i` is `Σ_{j≠i} H_ij² / num_probes`, so that it is exact for a diagonal
    operator. Elsewhere its noise may be far above the small entries, and dividing by noise is worse than not to divide: an
    entry below the standard error of its probes is set to that. Where the problem has a penalty its own diagonal is a second
    floor (the data's curvature is positive in a convex problem).

    Kept across outer steps is the estimate less the penalty; the present penalty is added.

    Args:
        num_probes: products to spend, at least 2.
        seed: of the signs.

    Reference: Bekas, Kokiopoulou and Saad (2007), "An estimator for the diagonal of a matrix".
    """

    num_probes: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        """Validate the number."""
        if self.num_probes < 2:
            raise UsageError(
                f"Jacobi needs num_probes >= 2, the least that shows how uncertain they are, but got {self.num_probes}."
            )

    def price(self, at: Linearisation) -> float:
        """The probes."""
        return self.num_probes

    def build(self, at: Linearisation, inner: InnerSolution | None) -> Prepared:
        """Estimate the diagonal by `num_probes` products."""
        with torch.no_grad():
            source, probes = generator(self.seed), []
            for _ in range(self.num_probes):
                z = signs(tuple(at.params.shape), source, at.params)
                probes.append(z * at.operator.mv(z))
            stacked, penalty = torch.stack(probes), _known(at)
            error = stacked.std(0) / self.num_probes**0.5
            state = {"diagonal": stacked.mean(0) - penalty, "error": error}
            return Prepared(_inverse(state["diagonal"], penalty, error), state, self.num_probes)

    def restore(self, at: Linearisation, state: State) -> LinearOperator:
        """The old estimate of the data's part beside the present penalty."""
        with torch.no_grad():
            return _inverse(state["diagonal"], _known(at), state["error"])


@dataclass(frozen=True)
class AdamSecondMoment(Preconditioner):
    r"""The diagonal that Adam divides its steps by: `1 / √v`, from the inner solver's state; no product.

    With `torch.optim.Adam` or AdamW it is `√v̂ + eps`, with this library's `Adam` the same up to a factor, which a solver that
    is preconditioned does not see.

    It is a scale of the gradient, not of the curvature: right in its proportions where gradients come from minibatches or the
    solve is young, and pure rounding where full-batch gradients have long vanished. Every entry is kept above a thousandth of
    the mean.

    Reference: Kingma and Ba (2015), "Adam: a method for stochastic optimization"; Choe et al. (2023), "Making scalable
        meta learning practical", which preconditions by it.
    """

    def build(self, at: Linearisation, inner: InnerSolution | None) -> Prepared:
        """Read the second moment from the optimiser's state.

        Raises:
            UsageError: the inner solver keeps no second moment.
        """
        diagonal = _second_moment(inner)
        return Prepared(self.restore(at, {"diagonal": diagonal}), {"diagonal": diagonal})

    def restore(self, at: Linearisation, state: State) -> LinearOperator:
        """The same diagonal."""
        nothing = torch.zeros_like(state["diagonal"])
        return _inverse(state["diagonal"], nothing, nothing)


def _second_moment(inner: InnerSolution | None) -> Tensor:
    """`√v̂ + eps` of Adam, AdamW and their kin, for the one tensor that the inner solver optimises; `√v` of our own Adam."""
    if inner is not None and "second_moment" in inner.state:
        own: Tensor = inner.state["second_moment"].detach()
        return own.sqrt()
    kept = {} if inner is None else inner.state.get("optimizer", {})
    (group,) = kept.get("param_groups", [{}])
    entry = kept.get("state", {}).get(0, {})
    if "exp_avg_sq" not in entry:
        came = "there was no inner solve" if inner is None else "the inner solver's state holds none"
        raise UsageError(
            f"AdamSecondMoment needs the second moment of an inner solve by Adam, but {came}: use solver=adam, "
            "solver=torch_optimizer with torch.optim.Adam or AdamW, or preconditioner=jacobi."
        )
    correction = 1.0 - float(group["betas"][1]) ** float(entry["step"])
    moment: Tensor = entry["exp_avg_sq"]
    return (moment / correction).sqrt() + float(group["eps"])


def _known(at: Linearisation) -> Tensor:
    """The penalty's diagonal, zeros where there is none."""
    penalty = penalty_diagonal(at)
    return torch.zeros_like(at.params).detach() if penalty is None else penalty


def _inverse(diagonal: Tensor, penalty: Tensor, error: Tensor) -> LinearOperator:
    """The inverse of the size of diagonal plus penalty, at least the penalty, the error, and a floor where both vanish."""
    total = diagonal + penalty
    floor = (FLOOR * total.abs().mean(-1, keepdim=True)).clamp(min=torch.finfo(total.dtype).tiny)
    least = torch.where(penalty > 0, penalty, floor).maximum(error)
    return DiagonalOperator(1.0 / total.abs().maximum(least), POSITIVE_DEFINITE)
