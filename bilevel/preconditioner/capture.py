"""Which matrix products a model makes with its parameters: their inputs, and a place to hook their output gradients.

A model is a function of named tensors, so there are no layers to look at; what can be seen is every operation that takes a
parameter (or a rearrangement of one: a transpose, a slice, a reshape) as the matrix of a linear map. Such an operation
`y = a M` has `∂y/∂M` in `a` alone, which is what Kronecker-factored curvature is made of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

# Operations that only rearrange entries: what they do to a parameter they do to the positions of its entries.
REARRANGING = frozenset(
    {"t", "transpose", "swapaxes", "swapdims", "permute", "movedim", "reshape", "view", "flatten", "unflatten", "squeeze",
     "unsqueeze", "contiguous", "clone", "__getitem__", "select", "narrow", "chunk", "split", "unbind", "adjoint"}
)  # fmt: skip
PROPERTIES = frozenset({"T", "mT", "H", "mH"})


@dataclass(frozen=True)
class Use:
    """One linear map `y = a M` (+ bias) that a model makes with its parameters.

    Attributes:
        index: positions of `M`'s entries in the vector of parameters, `(p, q)`.
        bias: positions of the bias's entries, `(q,)`; None without one.
        inputs: `a`, `(N, T, p)`: examples, places in an example that share the parameters, features.
        rows: brings a gradient with respect to `y` into the form `(N, T, q)`.
    """

    index: Tensor
    bias: Tensor | None
    inputs: Tensor
    rows: Callable[[Tensor], Tensor]


class Capture(TorchFunctionMode):
    """While it is active, records each use of the parameters and adds a given tensor to its output.

    The added tensors are zeros that require gradients: their gradients are those of the outputs. They come from outside so
    that the whole can be a function under `torch.vmap`.

    Args:
        params: the parameters as the model is given them.
        positions: where their entries are in the vector of all parameters, by the same names.
        added: one tensor for each use, in order; None to record only (uses after the last one get nothing added).
    """

    def __init__(
        self, params: dict[str, Tensor], positions: dict[str, Tensor], added: Sequence[Tensor] | None = None
    ) -> None:
        """Nothing is recorded yet."""
        super().__init__()
        self.uses: list[Use] = []
        self.shapes: list[torch.Size] = []
        self._added = added
        self._known: dict[int, tuple[Tensor, Tensor]] = {}  # by id, with the tensor itself to keep the id alive
        self._products: dict[int, tuple[Tensor, int]] = {}  # outputs that a bias may be added to
        for name, value in params.items():
            self._learn(value, positions[name])

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation; look at it when it takes something that is known."""
        kwargs = kwargs or {}
        operands = [*args, *kwargs.values()]
        if any(
            isinstance(one, Tensor) and (self._index(one) is not None or id(one) in self._products) for one in operands
        ):
            handled = self._handle(func, args, kwargs)
            if handled is not None:
                return handled
        return func(*args, **kwargs)

    def _handle(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The operation's result if it is one of those that are understood, else None."""
        name = getattr(func, "__name__", "")
        if name == "__get__":
            name = getattr(getattr(func, "__self__", None), "__name__", "")
        if name in REARRANGING or name in PROPERTIES:
            return self._rearrange(func, args, kwargs)
        if name == "__setitem__" or (name.endswith("_") and not name.endswith("__")):  # in place: no longer what it was
            self._known.pop(id(args[0]), None)
            self._products.pop(id(args[0]), None)
            return None
        match name:
            case "linear":
                return self._linear(func, *args, **kwargs)
            case "addmm" if not kwargs:
                return self._affine(func, args, args[1], args[2], args[0])
            case "mm" | "matmul" | "__matmul__" | "mv" if not kwargs:
                return self._product(func, *args)
            case "__rmatmul__":
                return self._product(func, args[1], args[0], call=args)
            case "conv1d" | "conv2d":
                return self._convolution(func, *args, **kwargs)
            case "add" | "__add__" | "__radd__" if not kwargs and len(args) == 2:
                return self._add_bias(func, args)
        return None

    def _learn(self, tensor: Tensor, index: Tensor) -> None:
        self._known[id(tensor)] = tensor, index

    def _index(self, tensor: Any) -> Tensor | None:
        return self._known[id(tensor)][1] if id(tensor) in self._known else None

    def _rearrange(self, func: Any, args: Any, kwargs: Any) -> Any:
        index = self._index(args[0])
        if index is None:
            return None
        result, places = func(*args, **kwargs), func(index, *args[1:], **kwargs)
        if isinstance(result, Tensor):
            self._learn(result, places)
        else:
            for one, place in zip(result, places, strict=True):
                self._learn(one, place)
        return result

    def _linear(self, func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
        index = self._index(weight)
        if index is None or index.ndim != 2:
            return None
        args = (input, weight) if bias is None else (input, weight, bias)
        return self._record(func, args, {}, index.mT, bias, input, _rows)

    def _affine(self, func: Any, args: Any, input: Tensor, matrix: Tensor, bias: Tensor) -> Any:
        index = self._index(matrix)
        return None if index is None else self._record(func, args, {}, index, bias, input, _rows)

    def _product(self, func: Any, left: Any, right: Any, call: Any = None) -> Any:
        call = (left, right) if call is None else call
        if any(isinstance(one, Tensor) and one.layout != torch.strided for one in (left, right)):
            return None  # the Gram matrix of sparse inputs is a dense one of their many columns
        index = self._index(right)
        if index is not None and index.ndim == 2 and isinstance(left, Tensor):
            return self._record(func, call, {}, index, None, left, _rows)
        if index is not None and index.ndim == 1 and isinstance(left, Tensor):
            return self._record(func, call, {}, index.unsqueeze(-1), None, left, _scalars)
        index = self._index(left)
        if index is not None and index.ndim == 2 and isinstance(right, Tensor) and right.ndim <= 2:
            turned = right if right.ndim == 1 else right.mT
            return self._record(func, call, {}, index.mT, None, turned, _columns if right.ndim == 2 else _rows)
        return None

    def _convolution(
        self, func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0,
        dilation: Any = 1, groups: int = 1,
    ) -> Any:  # fmt: skip
        index = self._index(weight)
        dims = weight.ndim - 2
        if index is None or groups != 1 or isinstance(padding, str) or input.ndim != weight.ndim:
            return None
        sizes = {
            name: _sizes(value, dims)
            for name, value in (("stride", stride), ("padding", padding), ("dilation", dilation))
        }
        plane, kernel = (input, weight.shape[2:]) if dims == 2 else (input.unsqueeze(-2), (1, *weight.shape[2:]))
        if dims == 1:
            sizes = {name: (0 if name == "padding" else 1, *value) for name, value in sizes.items()}
        patches = functional.unfold(plane.detach(), tuple(kernel), **sizes).mT  # (N, T, C_in * kernel)
        args = (input, weight, bias, stride, padding, dilation, groups)
        return self._record(func, args, {}, index.flatten(1).mT, bias, patches, _channels)

    def _add_bias(self, func: Any, args: Any) -> Any:
        """`y + b` completes the use that `y` came from."""
        product, bias = args if id(args[0]) in self._products else args[::-1]
        index = self._index(bias)
        if id(product) not in self._products or index is None or index.ndim != 1:
            return None
        number = self._products[id(product)][1]
        use = self.uses[number]
        if use.bias is None and use.rows is _rows and len(index) == use.index.shape[1]:
            self.uses[number] = replace(use, bias=index)
        return func(*args)

    def _record(
        self, func: Any, args: Any, kwargs: Any, index: Tensor, bias: Tensor | None, inputs: Tensor, rows: Any
    ) -> Tensor:
        output: Tensor = func(*args, **kwargs)
        places = None if bias is None else self._index(bias)
        folded = inputs.detach() if rows is _channels else _rows(inputs.detach())
        number = len(self.uses)
        self.uses.append(Use(index, places, folded, rows))
        self.shapes.append(output.shape)
        if self._added is not None and number < len(self._added):
            output = output + self._added[number]
        self._products[id(output)] = output, number
        return output


def _sizes(value: Any, dims: int) -> tuple[int, ...]:
    return (value,) * dims if isinstance(value, int) else tuple(value) * (dims // len(value))


def _rows(tensor: Tensor) -> Tensor:
    """`(q,)`, `(N, q)` or `(N, ..., q)` as `(N, T, q)`."""
    if tensor.ndim == 1:
        return tensor.reshape(1, 1, -1)
    return tensor.reshape(tensor.shape[0], -1, tensor.shape[-1])


def _scalars(tensor: Tensor) -> Tensor:
    """The output of a product with a vector, `()`, `(N,)` or `(N, ...)`, as `(N, T, 1)`."""
    return tensor.reshape(tensor.shape[0] if tensor.ndim else 1, -1, 1)


def _columns(tensor: Tensor) -> Tensor:
    """`(q, N)`, examples in columns, as `(N, 1, q)`."""
    return tensor.mT.unsqueeze(-2)


def _channels(tensor: Tensor) -> Tensor:
    """`(N, C, *places)` as `(N, T, C)`."""
    return tensor.flatten(2).mT
