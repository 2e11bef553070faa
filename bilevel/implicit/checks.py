"""What would be wrong in silence and is refused instead: captured tensors, nested forward mode."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._C import _functorch as functorch  # no public way tells which transforms a tensor is under
from torch.autograd import forward_ad

from bilevel.errors import UsageError
from bilevel.implicit.linear import Optimality


def _levels(tensors: Sequence[Tensor]) -> set[int]:
    """The levels of `torch.func` transforms that the tensors are wrapped for."""
    levels = set()
    for tensor in tensors:
        while functorch.is_functorch_wrapped_tensor(tensor):
            levels.add(functorch.maybe_get_level(tensor))
            tensor = functorch.get_unwrapped(tensor)
    return levels


def transform_levels(tensors: Sequence[Tensor], kind: str) -> int:
    """How many active transforms of a kind ("Jvp", "Grad", "Vmap") the tensors are under."""
    levels = _levels(tensors)
    stack = functorch.get_interpreter_stack() or []
    return sum(1 for interpreter in stack if interpreter.key().name == kind and interpreter.level() in levels)


def check_captured(residual: Optimality, x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """Evaluate `F` once with everything detached; whatever still carries a derivative was captured.

    Raises:
        UsageError: `optimality` uses a tensor that is not among its arguments and would get a silent zero.
    """
    detached = [tensor.detach() for tensor in tensors]
    with torch.enable_grad():
        value = residual(x.detach(), *detached)
    outside = _levels([value]) - _levels([x, *detached])
    tangent = forward_ad.unpack_dual(value).tangent if forward_ad._current_level >= 0 else None
    if value.requires_grad or tangent is not None or outside:
        raise UsageError(
            "optimality uses a tensor that carries a derivative but is not among its arguments (a closure or a module's "
            "parameters), so its derivative would be a silent zero: pass it as an argument, or detach it."
        )
    return value
