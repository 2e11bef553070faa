"""A state as bytes and back: its tensors as safetensors, everything else as JSON with the tensors' names in their places.

In the JSON a list, None, a bool, a str, a finite float and an int stand for themselves; everything else is an object with
one key that says what it is: `{"dict": [[key, value], ...]}`, `{"tuple": [...]}`, `{"float": eight bytes in hexadecimal}`,
`{"int": hexadecimal}` beyond 64 bits, `{"tensor": name in the safetensors, ...}`.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from bilevel.errors import UsageError

__all__ = ["decode", "encode"]

# safetensors has no name for the other dtypes (complex128 for one); those travel as bytes.
_NATIVE = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.bool),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
}


def encode(state: Any) -> tuple[bytes, bytes]:
    """The tensors of a state, and the rest.

    Raises:
        UsageError: the state holds something that is none of `save_checkpoint`'s types; its place is named.
    """
    tensors: dict[str, Tensor] = {}
    rest = _encode_value(state, "state", tensors)
    return safetensors.torch.save(tensors), (json.dumps(rest, indent=1, allow_nan=False) + "\n").encode("ascii")


def decode(tensors: bytes, rest: bytes) -> Any:
    """What `encode` was given; the bytes must be its own, so that whatever fails here is our own mistake."""
    return _decode_value(json.loads(rest), safetensors.torch.load(tensors))


def _encode_value(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if value is None or type(value) in (bool, str):
        return value
    if type(value) is int:
        return value if value.bit_length() < 64 else {"int": hex(value)}
    if isinstance(value, float):
        finite = value - value == 0.0
        return float(value) if finite else {"float": struct.pack(">d", value).hex()}
    if isinstance(value, Tensor):
        return _encode_tensor(value, path, tensors)
    if isinstance(value, Mapping):
        if any(type(key) not in (str, int) for key in value):
            kinds = sorted({type(key).__name__ for key in value} - {"str", "int"})
            raise UsageError(f"A checkpoint's dicts have str or int keys, but {path} has keys of type {kinds[0]}.")
        return {"dict": [[key, _encode_value(item, f"{path}.{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, list) or type(value) in (tuple, torch.Size):
        items = [_encode_value(item, f"{path}.{index}", tensors) for index, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    raise UsageError(
        "A checkpoint holds dicts, lists, tuples, tensors, numbers, strings and None, but "
        f"{path} is a {type(value).__module__}.{type(value).__qualname__}; convert it to one of those."
    )


def _encode_tensor(tensor: Tensor, path: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
        raise UsageError(f"A checkpoint holds dense tensors with data, but {path} is not one; store its parts instead.")
    name = path.encode("ascii", "backslashreplace").decode("ascii")
    while name in tensors:  # keys 1 and "1" of one dict have the same path
        name += "'"
    # A private copy: safetensors refuses tensors that share memory, and a view must not drag its whole storage in.
    dense = tensor.detach().resolve_conj().resolve_neg().to("cpu", copy=True, memory_format=torch.contiguous_format)
    if dense.dtype in _NATIVE:
        tensors[name] = dense
        return {"tensor": name}
    tensors[name] = dense.reshape(-1).view(torch.uint8)
    return {"tensor": name, "dtype": str(dense.dtype).removeprefix("torch."), "shape": list(dense.shape)}


def _decode_value(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode_value(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "dict" in value:
        return {key: _decode_value(item, tensors) for key, item in value["dict"]}
    if "tuple" in value:
        return tuple(_decode_value(item, tensors) for item in value["tuple"])
    if "float" in value:
        return struct.unpack(">d", bytes.fromhex(value["float"]))[0]
    if "int" in value:
        return int(value["int"], 16)
    tensor = tensors[value["tensor"]].clone()  # its own, aligned memory instead of a slice of the file's
    if "dtype" in value:
        return tensor.view(getattr(torch, value["dtype"])).reshape(value["shape"])
    return tensor
