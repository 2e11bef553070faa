"""What would be wrong in silence and is refused instead: tensors that `optimality` captures."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._C import _functorch as functorch  # no public way tells which transforms a tensor is under ...
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter  # ... or looks below the innermost
from torch.autograd import forward_ad

from bilevel.errors import UsageError
from bilevel.implicit.linear import Optimality


def plain(tensor: Tensor) -> Tensor:
    """The values alone, outside every `torch.func` transform: no derivative, and of a batch under vmap its first element."""
    dims = []
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            dims.append(functorch.maybe_get_bdim(tensor))
        tensor = functorch.get_unwrapped(tensor)
    tensor = tensor.detach()
    for dim in reversed(dims):  # the innermost wrapper's dimension counts among those of the tensor that is stored
        tensor = tensor.select(dim, 0)
    return tensor


def is_tracked(tensor: Tensor) -> bool:
    """Whether the graph, a tangent or the batch of any active transform, not the innermost alone, is on a tensor."""
    if functorch.is_batchedtensor(tensor) or tensor.requires_grad:
        return True
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None:
        return True
    if functorch.peek_interpreter_stack() is None:
        return False
    interpreter = retrieve_current_functorch_interpreter()
    inner = functorch.get_unwrapped(tensor) if functorch.maybe_get_level(tensor) == interpreter.level() else tensor
    with interpreter.lower():
        return is_tracked(inner)


def check_captured(residual: Optimality, x: Tensor, tensors: Sequence[Tensor]) -> None:
    """Evaluate `F` once on plain values of everything it is given; whatever a transform still acts on was captured.

    Raises:
        UsageError: `optimality` uses a tensor that is not among its arguments and would get a silent zero.
    """
    values = [plain(tensor) for tensor in (x, *tensors)]
    with torch.enable_grad():
        captured = is_tracked(residual(*values))
    if captured:
        raise UsageError(
            "optimality uses a tensor that carries a derivative (or a vmap's batch) but is not among its arguments (a "
            "closure or a module's parameters), so its derivative would be a silent zero: pass it as an argument, or "
            "detach it."
        )
