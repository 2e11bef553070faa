"""A checkpoint comes back bit for bit, or not at all."""

import errno
import json
import math
import os
import random
import shutil
import struct
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bilevel.errors import UsageError
from bilevel.trainer import checkpoint
from bilevel.trainer.checkpoint import load_checkpoint, save_checkpoint

FILES = ("tensors.safetensors", "state.json", "manifest.json")
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128, torch.bool]
DTYPES += [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.float8_e4m3fn]


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist())


def same(left: object, right: object) -> bool:
    """Equality of type and of every bit, so that NaN equals NaN, and -0.0 does not equal 0.0."""
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and left.shape == right.shape and raw(left) == raw(right)
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return (
            list(left) == list(right)
            and all(type(a) is type(b) for a, b in zip(left, right, strict=True))
            and all(same(left[key], right[key]) for key in left)
        )
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, float):
        return struct.pack(">d", left) == struct.pack(">d", right)
    return left == right


def make_tensor(dtype: torch.dtype, shape: list[int], seed: int) -> torch.Tensor:
    count = math.prod(shape) * torch.empty((), dtype=dtype).element_size()
    source = random.Random(seed)
    top = 2 if dtype is torch.bool else 256
    data = torch.tensor([source.randrange(top) for _ in range(count)], dtype=torch.uint8)
    return data.view(dtype).reshape(shape)  # any bits: NaNs with payloads and subnormal numbers too


tensors = st.builds(make_tensor, st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=3), st.integers(0, 1000))
leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | tensors
leaves |= st.integers(-(2**90), 2**90)
states = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=4) | st.integers(), inner, max_size=3)
    ),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(state=states)
def test_any_state_comes_back_bit_for_bit(tmp_path_factory: pytest.TempPathFactory, state: object) -> None:
    root = tmp_path_factory.mktemp("checkpoints")
    save_checkpoint(root, 3, state)
    loaded, step, skipped = load_checkpoint(root)
    assert same(state, loaded) and step == 3 and skipped == []


def test_views_shared_storage_and_parameters(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    state = {
        "base": base,
        "transposed": base.T,
        "strided": base[::2, 1::3],
        "expanded": torch.ones(1).expand(5),
        "conjugate": torch.complex(torch.ones(2), torch.ones(2)).conj(),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        1: OrderedDict(a=base[0]),
        "1": {"a": base[1]},
        "lone \ud800 surrogate": base[2],
    }
    save_checkpoint(tmp_path, 0, state)
    loaded, _, _ = load_checkpoint(tmp_path)
    for key in ("base", "transposed", "strided", "expanded", "conjugate", "parameter", "lone \ud800 surrogate"):
        assert torch.equal(loaded[key], state[key]), key
    assert torch.equal(loaded[1]["a"], base[0]) and torch.equal(loaded["1"]["a"], base[1])
    assert not loaded["parameter"].requires_grad
    loaded["base"].zero_()  # writable, and not tied to its former views
    assert loaded["transposed"].sum() > 0


def test_optimiser_and_rng_states_come_back(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimiser = torch.optim.Adam([weight])
    weight.sum().backward()
    optimiser.step()
    save_checkpoint(tmp_path, 1, {"optimiser": optimiser.state_dict(), "rng": torch.get_rng_state()})
    loaded, _, _ = load_checkpoint(tmp_path)
    torch.optim.Adam([weight]).load_state_dict(loaded["optimiser"])
    assert torch.equal(loaded["rng"], torch.get_rng_state())


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"a": [1, {"b": object()}]}, "state.a.1.b is a builtins.object"),
        ({"a": {1.5: 2}}, "state.a has keys of type float"),
        ({True: 1}, "keys of type bool"),
        ([torch.eye(2).to_sparse()], "state.0 is not one"),
    ],
)
def test_what_cannot_be_held_is_named(tmp_path: Path, state: object, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        save_checkpoint(tmp_path / "checkpoints", 0, state)
    assert not (tmp_path / "checkpoints").exists()


def two_checkpoints(root: Path) -> Path:
    save_checkpoint(root, 1, {"x": torch.ones(7), "which": "old"})
    return save_checkpoint(root, 2, {"x": torch.full((7,), 2.0), "which": "new", "loss": math.inf})


@pytest.mark.parametrize("file", FILES)
def test_every_bit_flip_is_noticed(tmp_path: Path, file: str) -> None:
    newest = two_checkpoints(tmp_path)
    intact = (newest / file).read_bytes()
    source = random.Random(file)
    for _ in range(60):
        place, bit = source.randrange(len(intact)), source.randrange(8)
        damaged = bytearray(intact)
        damaged[place] ^= 1 << bit
        (newest / file).write_bytes(damaged)
        state, step, skipped = load_checkpoint(tmp_path)
        assert (state["which"], step) == ("old", 1), f"bit {bit} of byte {place}"
        assert len(skipped) == 1 and str(newest) in skipped[0] and file in skipped[0]
    (newest / file).write_bytes(intact)
    assert load_checkpoint(tmp_path)[1:] == (2, [])


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["truncated", "emptied", "removed", "lengthened"])
def test_damaged_files_fall_back(tmp_path: Path, file: str, damage: str) -> None:
    path = two_checkpoints(tmp_path) / file
    content = path.read_bytes()
    if damage == "removed":
        path.unlink()
    else:
        path.write_bytes({"truncated": content[:-3], "emptied": b"", "lengthened": content + b"\n"}[damage])
    _, step, skipped = load_checkpoint(tmp_path)
    assert step == 1 and len(skipped) == 1 and file in skipped[0]


def test_a_renamed_checkpoint_is_not_believed(tmp_path: Path) -> None:
    two_checkpoints(tmp_path).rename(tmp_path / "step_00000009")
    _, step, skipped = load_checkpoint(tmp_path)
    assert step == 1 and "disagree" in skipped[0]


def test_a_newer_format_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    save_checkpoint(tmp_path, 5, {})
    monkeypatch.undo()
    with pytest.raises(UsageError, match="version 2 and this bilevel reads version 1"):
        load_checkpoint(tmp_path)


def test_no_intact_checkpoint_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"{tmp_path}.*it holds none"):
        load_checkpoint(tmp_path)
    with pytest.raises(UsageError, match="it holds none"):
        load_checkpoint(tmp_path / "nowhere")
    (save_checkpoint(tmp_path, 1, {}) / "state.json").unlink()
    with pytest.raises(UsageError, match=r"none of its 1 is intact.*state\.json is missing"):
        load_checkpoint(tmp_path)


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_only_the_newest_are_kept_and_leftovers_go(tmp_path: Path) -> None:
    (tmp_path / ".writing-step_00000003").mkdir()
    (tmp_path / "notes").mkdir()  # somebody else's
    for step in range(5):
        save_checkpoint(tmp_path, step, {"step": step}, keep=2)
    assert names(tmp_path) == ["notes", "step_00000003", "step_00000004"]
    with pytest.raises(UsageError, match="keep=0"):
        save_checkpoint(tmp_path, 5, {}, keep=0)


def test_a_damaged_later_checkpoint_cannot_push_out_the_intact_one(tmp_path: Path) -> None:
    damaged = two_checkpoints(tmp_path)
    (damaged / "state.json").write_bytes(b"{}")
    save_checkpoint(tmp_path, 1, {"again": True}, keep=1)
    assert names(tmp_path) == ["step_00000001"]
    assert load_checkpoint(tmp_path)[0] == {"again": True}


def test_the_same_step_is_replaced_and_the_old_one_serves_until_then(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 4, "first")
    shutil.copytree(tmp_path / "step_00000004", tmp_path / "aside")
    save_checkpoint(tmp_path, 4, "second")
    assert load_checkpoint(tmp_path)[0] == "second" and names(tmp_path) == ["aside", "step_00000004"]
    shutil.rmtree(tmp_path / "step_00000004")  # as if killed between the two renames
    (tmp_path / "aside").rename(tmp_path / "step_00000004.replaced")
    assert load_checkpoint(tmp_path)[:2] == ("first", 4)
    save_checkpoint(tmp_path, 4, "third", keep=1)
    assert load_checkpoint(tmp_path)[0] == "third" and names(tmp_path) == ["step_00000004"]


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_full_disk_leaves_the_previous_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    two_checkpoints(tmp_path)
    before = names(tmp_path)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    for step in (2, 3):  # replacing one, and adding one
        with pytest.raises(OSError, match=r"previous checkpoints are intact: free some space") as caught:
            save_checkpoint(tmp_path, step, {"x": torch.zeros(3)})
        assert caught.value.errno == errno.ENOSPC
    monkeypatch.undo()
    assert names(tmp_path) == before
    assert load_checkpoint(tmp_path)[1:] == (2, [])


def test_a_file_that_outgrows_the_limit_leaves_the_previous_checkpoints(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource", reason="file size limits are a POSIX matter")
    two_checkpoints(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(OSError, match="Could not write the checkpoint of step 3"):
            save_checkpoint(tmp_path, 3, {"x": torch.zeros(1 << 16)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert load_checkpoint(tmp_path)[1:] == (2, [])


def test_nothing_is_pickled(tmp_path: Path) -> None:
    folder = two_checkpoints(tmp_path)
    assert names(folder) == sorted(FILES)
    assert json.loads((folder / "manifest.json").read_text())["step"] == 2
    assert json.loads((folder / "state.json").read_text())["dict"][1] == ["which", "new"]
