"""Differentiate through optimisation: hypergradients, implicit derivatives, and the outer loop that uses them.

Names are loaded when they are first used, so that importing the package (for help, or to refuse a bad configuration)
does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bilevel.broadcast import Broadcast
    from bilevel.constraints import Box, Constraint, Positive, Real, Simplex, UnitInterval
    from bilevel.diagnostics import check, plan
    from bilevel.errors import UsageError
    from bilevel.hypergradient import (
        SAMA,
        FiniteDifference,
        ForwardMode,
        Implicit,
        ImplicitUpdate,
        OneStep,
        Unrolled,
        hypergradient_at,
    )
    from bilevel.implicit import implicit_argmin, implicit_fixed_point, implicit_root, root_jvp, root_vjp
    from bilevel.problem import Problem
    from bilevel.receipt import Receipt
    from bilevel.trainer import Callback, Fit, Trainer, fit

__version__ = "0.1.0"

_HOMES = {
    "Box": "constraints", "Broadcast": "broadcast", "Constraint": "constraints", "Positive": "constraints",
    "Real": "constraints",
    "Simplex": "constraints", "UnitInterval": "constraints", "UsageError": "errors",
    "FiniteDifference": "hypergradient", "ForwardMode": "hypergradient", "Implicit": "hypergradient",
    "ImplicitUpdate": "hypergradient", "SAMA": "hypergradient",
    "OneStep": "hypergradient", "Unrolled": "hypergradient", "hypergradient_at": "hypergradient",
    "implicit_argmin": "implicit",
    "implicit_fixed_point": "implicit", "implicit_root": "implicit", "root_jvp": "implicit", "root_vjp": "implicit",
    "Problem": "problem", "Receipt": "receipt", "Callback": "trainer", "Fit": "trainer", "Trainer": "trainer",
    "fit": "trainer", "check": "diagnostics", "plan": "diagnostics",
}  # fmt: skip

__all__ = [
    "SAMA",
    "Box",
    "Broadcast",
    "Callback",
    "Constraint",
    "FiniteDifference",
    "Fit",
    "ForwardMode",
    "Implicit",
    "ImplicitUpdate",
    "OneStep",
    "Positive",
    "Problem",
    "Real",
    "Receipt",
    "Simplex",
    "Trainer",
    "UnitInterval",
    "Unrolled",
    "UsageError",
    "check",
    "fit",
    "hypergradient_at",
    "implicit_argmin",
    "implicit_fixed_point",
    "implicit_root",
    "plan",
    "root_jvp",
    "root_vjp",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its module when it is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module 'bilevel' has no attribute '{name}'")
    return getattr(importlib.import_module(f"bilevel.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
