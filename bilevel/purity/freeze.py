"""One fixed function inside a solve: generators, buffers, attention kernel and autocast frozen, and put back after it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C import _functorch as functorch  # no public way leads from a tensor under a transform to its memory
from torch.nn.attention import SDPBackend, sdpa_kernel

from bilevel.autodiff import in_transform
from bilevel.purity.holdings import Buffer, Holdings
from bilevel.purity.sources import Source, global_sources, same

Result = TypeVar("Result")
DEVICES = ("cpu", "cuda", "mps", "xpu")


class Purity:
    r"""Keeps the functions of one problem fixed while a solve evaluates them hundreds of times.

    The implicit function theorem, a line search and a product with a Hessian all speak of *one* function. With dropout or
    noise from a generator there is one for each mask, so inside `solve()` each function of the problem keeps the random
    numbers of its first evaluation there: that one draws as it would anyhow, each later one is lent the generators as the
    first found them. After the solve the global generators have therefore moved by the draws of one evaluation of each
    function, and the next solve gets other masks: an outer loop is a stochastic gradient method on
    `E[outer_loss(params*(θ, mask), θ, mask')]`, with a hypergradient that is exact for its masks. The state of the global
    generators is in the checkpoints, so a resumed run goes on to the bit. Generators that the problem itself holds are
    not: they are put back wholly and give every solve the same numbers. After an exception everything is where it was.

    The mask is also kept over inner steps on different minibatches. Fresh masks for each of them would be no function that
    has a stationary point to differentiate at, and a loop that runs its steps again (checkpointed unrolling) has to meet
    each step's masks again. Who wants dropout that changes with the inner step makes the mask, or a seed for it, a part of
    `inner_batches(step, inner_step)`: a pure function of both numbers.

    Buffers (running statistics of a BatchNorm, vectors of a spectral norm) are constants: each evaluation works on
    private copies, for its graph may be differentiated long after a later evaluation would have changed them. Under
    `vmap` the copies are batched, so that tracked statistics do no harm there. Attention takes the mathematical kernel,
    the only one with second derivatives everywhere; autocast is off, for the gradient of a rounded loss is no gradient (one
    that the loss itself turns on stays on, and `disturbances` names it).

    Under `vmap` a loss may only draw if `vmap` was called with `randomness="different"` or `"same"`.

    Args:
        holdings: what the problem holds.

    Example:
        >>> purity = Purity.of({"model": torch.nn.Dropout(0.5)})
        >>> loss = purity.freeze(lambda x: torch.nn.functional.dropout(x).sum(), "inner_loss")
        >>> x = torch.rand(1000)
        >>> with purity.solve():
        ...     first, second = loss(x), loss(x)
        >>> bool(first == second), bool(loss(x) == loss(x))
        (True, False)
    """

    def __init__(self, holdings: Holdings) -> None:
        """Remember what there is to freeze; see the class."""
        self.holdings = holdings
        self.active: Solve | None = None
        self.learned: dict[str, list[str]] = {}  # function -> dear sources that it draws from
        self._warned = False

    @classmethod
    def of(cls, problem: Any, name: str = "problem") -> Purity:
        """Walk the attributes of an object once, however nested; `name` is what messages call it."""
        return cls(Holdings.of(problem, name))

    @contextmanager
    def solve(self) -> Iterator[None]:
        """Freeze for a whole inner and linear solve; inside another solve of the same problem it does nothing.

        Warns once, by name, of a generator or buffer that changed during a solve although the first evaluation of every
        function left it alone; the next solve looks again.
        """
        if self.active is not None:
            yield
            return
        with _plain_kernels():
            self.active = solve = Solve(self.holdings, self.learned)
            try:
                yield
            except BaseException:
                solve.undo()
                raise
            finally:
                self.active = None
            late = solve.close()
        if late:
            self.learned.clear()
        if late and not self._warned:
            self._warned = True
            warnings.warn(
                f"{' and '.join(late)} changed during a solve, but not in the first evaluation of a loss, so that the "
                "losses of this solve may not have been one function: use it in every evaluation or in none, and make "
                "what changes with the inner step a part of the batch.",
                stacklevel=3,
            )

    @contextmanager
    def rehearsal(self) -> Iterator[Solve]:
        """A solve that leaves no trace at all, for a look at what evaluations do."""
        assert self.active is None, "a rehearsal inside a solve would undo what the solve has drawn"
        with _plain_kernels():
            self.active = solve = Solve(self.holdings, {})
            try:
                yield solve
            finally:
                self.active = None
                solve.undo()

    def freeze(self, function: Callable[..., Result], name: str) -> Callable[..., Result]:
        """The function, frozen inside a solve and as it is outside.

        Args:
            function: of tensors or nested tensors.
            name: functions of one name share their random numbers; give each function of the problem its own.
        """

        def frozen(*args: Any) -> Result:
            solve = self.active
            return function(*args) if solve is None else solve.evaluate(function, name, args)

        return frozen


@dataclass(frozen=True)
class Tape:
    """What the evaluations of one function in a solve have in common.

    Attributes:
        sources: the sources that are lent, each with the state that the first evaluation found.
        buffers: those that the function changes.
        drawn: names of the sources that it draws from.
    """

    sources: list[tuple[Source, Any]]
    buffers: list[Buffer]
    drawn: list[str]


class Solve:
    """The state of one solve: what was there when it began, and a tape for each function."""

    def __init__(self, holdings: Holdings, learned: dict[str, list[str]]) -> None:
        """Note the states of all generators and copy the buffers."""
        self.tapes: dict[str, Tape] = {}
        self._learned = learned
        self._global, self._held = global_sources(), holdings.sources
        self._began = {source: source.read() for source in (*self._global, *self._held)}
        self._expected = {source: state for source, state in self._began.items() if source.dear}
        self._buffers = holdings.buffers
        self._originals = [(buffer, buffer.tensor, buffer.tensor.detach().clone()) for buffer in self._buffers]

    def evaluate(self, function: Callable[..., Result], name: str, args: tuple[Any, ...]) -> Result:
        """One evaluation of a function: the first records, the others repeat its random numbers."""
        tape = self.tapes.get(name)
        if tape is None:
            return self._first(function, name, args)
        found = [source.read() for source, _ in tape.sources]
        try:
            for source, state in tape.sources:
                source.write(state)
            if not tape.buffers:
                return function(*args)
            with _private(tape.buffers, args):
                return function(*args)
        finally:
            for (source, _), state in zip(tape.sources, found, strict=True):
                source.write(state)

    def _first(self, function: Callable[..., Result], name: str, args: tuple[Any, ...]) -> Result:
        """Evaluate with the generators as they are, and see what it draws and changes."""
        learned = self._learned.get(name)
        watched = [
            source for source in self._began if not source.dear or learned is None or source.name in learned
        ]  # twisters that it did not draw from in an earlier solve are only looked at when this solve ends
        before = [(source, source.read()) for source in watched]
        with _private(self._buffers, args) as changed:
            value = function(*args)
        drawn = [source for source, state in before if not same(state, source.read())]
        self._learned[name] = [source.name for source in drawn if source.dear]
        self._expected |= {source: source.read() for source in watched if source.dear}
        lent = [(source, state) for source, state in before if not source.dear or source in drawn]
        self.tapes[name] = Tape(lent, changed, [source.name for source in drawn])
        return value

    def undo(self) -> None:
        """Put everything back to where it was when the solve began."""
        for source, state in self._began.items():
            source.write(state)
        self._put_back_buffers()

    def close(self) -> list[str]:
        """End well: buffers and held generators are put back; returns the names of what changed unnoticed."""
        late = [source.name for source, state in self._expected.items() if not same(state, source.read())]
        for source in self._held:
            source.write(self._began[source])
        return late + self._put_back_buffers()

    def _put_back_buffers(self) -> list[str]:
        changed = []
        for buffer, tensor, values in self._originals:
            if buffer.tensor is not tensor:
                buffer.replace(tensor)
            if not same(tensor.detach(), values):
                with torch.no_grad():
                    tensor.copy_(values)  # tells autograd, so that a graph that still needs the old values says so
                changed.append(buffer.name)
        return changed


@contextmanager
def _private(buffers: list[Buffer], args: tuple[Any, ...]) -> Iterator[list[Buffer]]:
    """Lend copies of the buffers; the list is filled, at the end, with those whose copies were changed.

    Changing the buffers and copying the old values back would not do: batch norm keeps them in its graph, and a later
    product with the Hessian would find them overwritten.
    """
    changed: list[Buffer] = []
    lent: list[tuple[Buffer, Tensor, Tensor]] = []
    try:
        for buffer in buffers:
            original = buffer.tensor
            copy = _batched_like(args, original) if in_transform() else original.detach().clone()
            lent.append((buffer, original, copy))
            buffer.replace(copy)
        yield changed
        for buffer, original, copy in lent:
            now = buffer.tensor
            if now is not copy or now.shape != original.shape or bool(_memory(now != original).any()):
                changed.append(buffer)
    finally:
        for buffer, original, _ in lent:
            buffer.replace(original)


def _batched_like(args: Any, original: Tensor) -> Tensor:
    """A copy that belongs to the transforms around the evaluation and is batched wherever an argument is."""
    copy = original.detach().clone()
    for part in _tensors(args):
        copy = copy + torch.zeros_like(part.detach().flatten()[:1]).sum().to(copy)
    return copy


def _memory(value: Tensor) -> Tensor:
    """The plain tensor under all transforms."""
    while functorch.is_functorch_wrapped_tensor(value):
        value = functorch.get_unwrapped(value)
    return value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(part)


@contextmanager
def _plain_kernels() -> Iterator[None]:
    """Mathematical attention and no autocast.

    The fused inference path of `nn.MultiheadAttention` is off, too: it is taken only where no gradient is recorded, so that
    a line search would see other values than those that the gradient belongs to.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        for device in DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
