"""Seeded generators: random numbers that do not depend on the device, nor on who drew before."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor


def generator(*seeds: int) -> torch.Generator:
    """A CPU generator for a tuple of integers, for instance `(seed, epoch)`; other tuples give other streams.

    Example:
        >>> bool(torch.equal(torch.rand(2, generator=generator(0, 1)), torch.rand(2, generator=generator(0, 1))))
        True
    """
    entropy = np.random.SeedSequence([len(seeds), *(seed & 0xFFFFFFFF for seed in seeds)]).generate_state(1, np.uint64)[
        0
    ]
    return torch.Generator().manual_seed(int(entropy >> np.uint64(1)))


def normal(
    shape: tuple[int, ...],
    source: torch.Generator,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Standard normal numbers, drawn in float64 on the CPU: the same ones on every device and in every dtype."""
    values = torch.randn(shape, generator=source, dtype=torch.float64)
    return values.to(device=device, dtype=dtype or torch.get_default_dtype())


def seed_everything(seed: int) -> None:
    """Seed torch (all devices), NumPy and Python, for problems that draw from the global generators."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def get_state() -> dict[str, Any]:
    """The state of the global generators as tensors and plain numbers, for a checkpoint."""
    state: Any = np.random.get_state(legacy=True)
    name, keys, position, has_gauss, cached = state
    version, words, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [str(name), torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached)],
        "python": [version, torch.tensor(words, dtype=torch.int64), gauss],
    }


def set_state(state: dict[str, Any]) -> None:
    """Put back what `get_state` returned."""
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
