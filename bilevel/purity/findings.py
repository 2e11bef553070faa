"""What makes a loss more than one function: what freezing takes care of, and what it cannot."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import TorchFunctionMode

from bilevel.purity.freeze import DEVICES, Purity
from bilevel.purity.holdings import Holdings
from bilevel.purity.sources import global_sources, same

_FOLDERS = (Path(torch.__file__).parent, Path(__file__).parent)
_DROP = ("scaled_dot_product_attention", "multi_head_attention_forward", "lstm", "gru", "rnn_tanh", "rnn_relu")
_COMPARED = 2**20  # entries: larger tensors are only asked how often autograd saw them change


class Fault(Enum):
    """A way in which a loss is not one fixed function; the name is the key, the value ends a sentence about the place.

    The first four are frozen inside a solve, the others cannot be.
    """

    dropout = (
        "draws a dropout mask at every evaluation: a solve keeps its first one; call eval() on the module, or set "
        "training=False, for a loss without masks"
    )
    noise = (
        "draws random numbers at every evaluation: a solve keeps its first ones; draw them once, before the loss, for a "
        "loss without noise"
    )
    tracked_batch_norm = (
        "updates running statistics at every evaluation: a solve keeps them constant and puts them back; set "
        "track_running_stats=False, or call eval() to normalise by them"
    )
    changing_buffer = (
        "is a buffer that every evaluation changes: a solve keeps it constant and puts it back; call eval() on the module "
        "if it should stay"
    )
    hidden_randomness = (
        "returns another value when it is evaluated again at the same point, with generators and buffers frozen: draw from "
        "torch's global generator or from one that the problem holds as an attribute, and keep iterators, clocks and "
        "the operating system's random numbers out of it"
    )
    fresh_minibatch = (
        "returns other data when it is called again with the same numbers: make it a pure function of (step, inner_step), "
        "as bilevel.data.Minibatches is"
    )
    changed_in_place = (
        "is changed in place by an evaluation, which the next one then sees: compute without in-place operations, or on a "
        "clone"
    )
    autocast = (
        "runs under an autocast that the loss turns on itself, which rounds float32 to about three digits, and with it "
        "products, curvature and hypergradient: take torch.autocast out of the losses, or give it enabled=False"
    )

    @property
    def frozen(self) -> bool:
        """Whether freezing takes care of it."""
        return self in (Fault.dropout, Fault.noise, Fault.tracked_batch_norm, Fault.changing_buffer)


@dataclass(frozen=True)
class Finding:
    """A fault and where it is.

    Attributes:
        fault: what it is; `fault.name` is a stable key.
        place: the module, generator, function or tensor, with its dotted name.

    Example:
        >>> print(Finding(Fault.fresh_minibatch, "inner_batches"))
        inner_batches returns other data when it is called again with the same numbers: make it a pure function of
        (step, inner_step), as bilevel.data.Minibatches is.
    """

    fault: Fault
    place: str

    def __str__(self) -> str:
        """The sentence."""
        return f"{self.place} {self.fault.value}."


def randomness(purity: Purity, functions: Mapping[str, Callable[[], Any]]) -> list[Finding]:
    """What would change from one evaluation to the next without the freezing, each with the module or line responsible.

    Evaluates each function once, with compiled functions run as written, and leaves no trace.

    Args:
        purity: of the problem.
        functions: names and evaluations at some point, for instance `{"inner_loss": lambda: loss(params, hparams)}`.

    Example:
        >>> purity = Purity.of({"drop": (drop := torch.nn.Dropout(0.1))})
        >>> [found.place for found in randomness(purity, {"inner_loss": lambda: drop(torch.ones(9)).sum()})]
        ["problem['drop'] (Dropout(p=0.1, inplace=False)) in inner_loss"]
    """
    findings: dict[Finding, None] = {}
    for name, evaluate in functions.items():
        with purity.rehearsal() as solve, _as_written(), _GeneratorWatch(purity.holdings) as watch:
            purity.freeze(evaluate, f"{name}, watched")()
        for fault, place in watch.seen:
            findings[Finding(fault, f"{place} in {name}")] = None
        tapes = list(solve.tapes.values())
        for source in dict.fromkeys(drawn for tape in tapes for drawn in tape.drawn if drawn not in watch.sources):
            findings[Finding(Fault.noise, f"{name} (from {source})")] = None
        for buffer in dict.fromkeys(changed for tape in tapes for changed in tape.buffers):
            if isinstance(buffer.module, _NormBase):
                module = _described(buffer.name.rpartition(".")[0], buffer.module)
                findings[Finding(Fault.tracked_batch_norm, f"{module} in {name}")] = None
            else:
                findings[Finding(Fault.changing_buffer, f"{buffer.name} in {name}")] = None
    return list(findings)


def disturbances(
    purity: Purity,
    functions: Mapping[str, Callable[[], Any]],
    *,
    batches: Mapping[str, Callable[[], Any]] | None = None,
    inputs: Mapping[str, Tensor] | None = None,
    num_evaluations: int = 3,
) -> list[Finding]:
    """What cannot be frozen, by name. Leaves generators and buffers as they were.

    An autocast is looked for in one evaluation more, with compiled functions run as written: those that are compared
    have to be the ones that a solve makes.

    Args:
        purity: of the problem.
        functions: names and evaluations at some point, of nested tensors; values may differ by rounding, since some
            reductions add in no fixed order.
        batches: names and draws of a batch, each for the same numbers of steps whenever it is called.
        inputs: further tensors that must not change, for instance params and hparams.
        num_evaluations: a fault that shows only now and then needs more of them.

    Example:
        >>> from itertools import count
        >>> clock = count()
        >>> [found.fault.name for found in disturbances(Purity.of(None), {"inner_loss": lambda: torch.tensor(next(clock))})]
        ['hidden_randomness']
    """
    findings = []
    for name, evaluate in functions.items():
        frozen = purity.freeze(evaluate, f"{name}, repeated")
        tensors = {**purity.holdings.tensors, **(inputs or {})}
        before = {place: (tensor._version, _copied(tensor)) for place, tensor in tensors.items()}
        with purity.rehearsal():
            values = [frozen() for _ in range(num_evaluations)]
            with _as_written(), _AutocastWatch(purity.holdings) as watch:
                frozen()
        changed = [place for place, tensor in tensors.items() if not _untouched(tensor, *before[place])]
        findings += [Finding(Fault.changed_in_place, f"{place} in {name}") for place in changed]
        if not changed and not all(_close(values[0], value) for value in values[1:]):
            findings.append(Finding(Fault.hidden_randomness, name))
        if watch.place:
            findings.append(Finding(Fault.autocast, f"{watch.place} in {name}"))
    for name, draw in (batches or {}).items():
        with purity.rehearsal():
            if not same(draw(), draw()):
                findings.append(Finding(Fault.fresh_minibatch, name))
    return findings


def _as_written() -> AbstractContextManager[Any]:
    """Compiled functions run uncompiled, call by call; importing the compiler takes seconds, so not if nobody has."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def _copied(tensor: Tensor) -> Tensor | None:
    return tensor.detach().clone() if tensor.numel() <= _COMPARED else None


def _untouched(tensor: Tensor, version: int, values: Tensor | None) -> bool:
    """By autograd's count of changes and, as functional batch norm is not counted, by the values."""
    return tensor._version == version and (values is None or same(tensor.detach(), values))


def _close(first: Any, second: Any) -> bool:
    """The same to rounding: 64 units in the last place of the largest entry, NaN where NaN is."""
    if not isinstance(first, Tensor) or not isinstance(second, Tensor) or first.shape != second.shape:
        if isinstance(first, list | tuple) and isinstance(second, list | tuple) and len(first) == len(second):
            return all(map(_close, first, second))
        if isinstance(first, Mapping) and isinstance(second, Mapping) and list(first) == list(second):
            return all(_close(first[key], second[key]) for key in first)
        return same(first, second)
    first, second = first.detach(), second.detach()
    if same(first, second) or not (first.is_floating_point() or first.is_complex()):
        return same(first, second)
    finite = first.isfinite() & second.isfinite()
    if not same(first[~finite], second[~finite]):
        return False
    size = first[finite].abs().max()
    return bool((first[finite] - second[finite]).abs().max() <= 64 * torch.finfo(first.dtype).eps * size)


def _described(name: str, module: torch.nn.Module) -> str:
    words = repr(module)
    return f"{name} ({type(module).__name__ if chr(10) in words else words})"


class CallWatch(TorchFunctionMode):
    """Looks at every call of a torch function, and can say where it was made."""

    def __init__(self, holdings: Holdings) -> None:
        """Remember the names of modules."""
        super().__init__()
        self._modules = {id(module): name for name, module in holdings.modules.items()}

    def _place(self, function: str, source: str = "") -> str:
        """The module whose `forward` is running, else the user's line."""
        frame: FrameType | None = sys._getframe(2)
        line = ""
        while frame is not None:
            file = Path(frame.f_code.co_filename)
            if not line and not any(folder in file.parents for folder in _FOLDERS):
                line = f"{file.name}:{frame.f_lineno}"
            owner = frame.f_locals.get("self")
            if id(owner) in self._modules and isinstance(owner, torch.nn.Module):
                return _described(self._modules[id(owner)], owner)
            frame = frame.f_back
        return f"{function} at {line}{f' (from {source})' if source else ''}"


class _AutocastWatch(CallWatch):
    """Asks at every call whether an autocast is on: a solve turns off those around it, so that one is the loss's own.

    Attributes:
        place: of the first call that computes under one; empty when none did.
    """

    place = ""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        value, function = func(*args, **(kwargs or {})), getattr(func, "__name__", str(func))
        computes = isinstance(value, Tensor) and function != "__get__"  # which looks an attribute up, such as x.T
        if not self.place and computes and any(map(torch.is_autocast_enabled, DEVICES)):
            self.place = self._place(function)
        return value


class _GeneratorWatch(CallWatch):
    """Looks at torch's generators after every call of a torch function: who moved one, and from where.

    Attributes:
        seen: faults and their places, in order, each once.
        sources: names of the generators that are accounted for.
    """

    def __init__(self, holdings: Holdings) -> None:
        super().__init__(holdings)
        self._sources = [source for source in (*global_sources(), *holdings.sources) if not source.dear]
        self._states = [source.read() for source in self._sources]
        self.seen: dict[tuple[Fault, str], None] = {}
        self.sources: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._states = [source.read() for source in self._sources]
        value = func(*args, **(kwargs or {}))
        moved = [s.name for s, old in zip(self._sources, self._states, strict=True) if not same(old, s.read())]
        if moved:
            function = getattr(func, "__name__", str(func))
            fault = Fault.dropout if "dropout" in function or function in _DROP else Fault.noise
            self.seen[fault, self._place(function, " and ".join(moved))] = None
            self.sources.update(moved)
        return value
