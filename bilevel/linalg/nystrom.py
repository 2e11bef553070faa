"""Randomised Nyström approximation: a few products with random vectors show the large end of a spectrum."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bilevel.linalg.lowrank import combine, gram, principal
from bilevel.linalg.operator import LinearOperator
from bilevel.rng import generator, normal


class Sketch(NamedTuple):
    """Random vectors and their images under an operator, `(k, *batch, n)` each."""

    probes: Tensor
    images: Tensor


def sketch(operator: LinearOperator, num_probes: int, seed: int = 0, *, before: Sketch | None = None) -> Sketch:
    """Multiply with `num_probes` normal vectors, besides those of the sketch before; that many products."""
    begun = 0 if before is None else len(before.probes)
    shape = (num_probes, *operator.batch_shape, operator.shape[1])
    probes = normal(shape, generator(seed, begun), dtype=operator.dtype, device=operator.device)
    images = torch.stack([operator.mv(probe) for probe in probes])
    if before is None:
        return Sketch(probes, images)
    return Sketch(torch.cat([before.probes, probes]), torch.cat([before.images, images]))


def nystrom(operator: LinearOperator, taken: Sketch) -> tuple[Tensor, Tensor]:
    r"""Eigenvectors and eigenvalues of `Y (Ω^T Y)^{-1} Y^T`, `Y = A Ω`: near the large ones of `A`, and never above them.

    For positive semi-definite `A` the approximation is at most `A`, and its expected error within a factor of the tail of the
    spectrum. The paper shifts `A` by rounding so that `Ω^T Y` has a Cholesky factor; here its eigenvectors serve, and those at
    rounding level are left out. Where `A` is indefinite its negative part spoils directions of `Ω^T Y` as small as the most
    negative one: all below twice that size are left out too, so that the result is positive semi-definite and no direction is
    blown up by a denominator that nearly cancels.

    Args:
        operator: symmetric; only its inner product is used.
        taken: `Ω` and `Y`.

    Returns:
        Orthonormal vectors `(k, *batch, n)` and values `(*batch, k)` in ascending order, at least 0.

    Reference: Frangella, Tropp and Udell (2021), "Randomized Nyström preconditioning".
    """
    core = gram(operator, taken.probes, taken.images)
    values, vectors = torch.linalg.eigh((core + core.mT) / 2)
    level = len(taken.probes) * torch.finfo(values.dtype).eps
    kept = values > torch.maximum(level * values[..., -1:], -2 * values[..., :1])
    inverse_root = torch.where(kept, torch.where(kept, values, 1.0).rsqrt(), 0.0)
    return principal(operator, combine(taken.images, vectors * inverse_root.unsqueeze(-2)))
