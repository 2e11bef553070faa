"""What the linear solves of earlier outer steps know: their directions and products, which correct a preconditioner.

A solve that starts from the previous adjoint keeps that one's error wherever it leaves little residual, along small
curvature, which is where hypergradients are made of. A solve that starts from zero and is preconditioned by the earlier
directions is as short and keeps none of it: what is old is the approximation of the inverse Hessian only.

Reference: Morales and Nocedal (2000), "Automatic preconditioning by limited memory quasi-Newton updating".
"""

from __future__ import annotations

import torch
from torch import Tensor

from bilevel.linalg import InverseBFGS, LinearOperator, Tag
from bilevel.linalg.lbfgs import Pairs
from bilevel.preconditioner.base import State

STEPS, CHANGES = "recycled.steps", "recycled.changes"


def corrected(initial: LinearOperator | None, like: LinearOperator, state: State) -> LinearOperator | None:
    """A preconditioner with the pairs of earlier solves; as it is where there are none.

    Args:
        initial: what they correct; None for a multiple of the identity.
        like: the operator of the system.
        state: what `learnt` returned; empty before the first solve.
    """
    if STEPS not in state or Tag.symmetric not in like.tags:
        return initial
    return InverseBFGS(like, Pairs.of(like, state[STEPS], state[CHANGES]), initial)


def learnt(state: State, vectors: Tensor, products: Tensor, size: int) -> State:
    """The latest `size` pairs, those of a solve after those of the ones before; one that is not finite becomes zeros, no pair.

    Args:
        state: what it returned the last time; empty at first.
        vectors: `(*batch, k, n)`; none is taken where they span the whole space, as those of a dense solver do.
        products: the operator's products with them.
        size: largest number of pairs, each two vectors of memory, in checkpoints, too.
    """
    if vectors.shape[-2] >= vectors.shape[-1]:
        return {}
    finite = (vectors.isfinite() & products.isfinite()).all(-1, keepdim=True)
    new = {
        name: torch.where(finite, part, 0.0).movedim(-2, 0) for name, part in ((STEPS, vectors), (CHANGES, products))
    }
    return {name: torch.cat([state[name], part] if name in state else [part])[-size:] for name, part in new.items()}
