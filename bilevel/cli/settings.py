"""The keys at the top of conf/train.yaml: checked without torch, then put into effect with it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from bilevel.cli.suggest import hint
from bilevel.errors import UsageError

if TYPE_CHECKING:
    import torch

_DEVICE = re.compile(r"cpu|cuda(:\d+)?|mps")
_DTYPES = ("float32", "float64")


@dataclass(frozen=True)
class Settings:
    """What holds for a whole job.

    Attributes:
        name: the family of runs; the folder under `output_dir`.
        seed: every random number of the run follows from it; an integer from 0 to 2^32 - 1.
        device: `cpu`, `cuda`, `cuda:N` or `mps`.
        dtype: `float32` or `float64`.
        threads: torch's threads on the CPU; None leaves torch's own choice.
        resume: the run folder to continue, or None.
        output_dir: where the run folders go.

    Raises:
        UsageError: a value that is none of these.
    """

    name: str
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"
    threads: int | None = None
    resume: str | None = None
    output_dir: str = "outputs"

    def __post_init__(self) -> None:
        for key in ("name", "output_dir"):
            if not isinstance(getattr(self, key), str) or not getattr(self, key):
                raise UsageError(f"{key} takes a text that is not empty, and got {getattr(self, key)!r}.")
        if not all(part.strip(". ") for part in re.split(r"[/\\]", self.name)):
            raise UsageError(f"name becomes a folder under output_dir, and '{self.name}' cannot be one.")
        if not _is_integer(self.seed) or not 0 <= self.seed < 2**32:
            raise UsageError(f"seed takes an integer from 0 to 2^32 - 1, and got {self.seed!r}.")
        if not isinstance(self.device, str) or not _DEVICE.fullmatch(self.device):
            raise UsageError(f"device takes cpu, cuda, cuda:N or mps, and got {self.device!r}.")
        if self.dtype not in _DTYPES:
            raise UsageError(f"dtype has no option '{self.dtype}'{hint(str(self.dtype), _DTYPES, 'its options are')}")
        if self.threads is not None and (not _is_integer(self.threads) or self.threads < 1):
            raise UsageError(f"threads takes an integer of at least 1, or null, and got {self.threads!r}.")
        if self.resume is not None and (not isinstance(self.resume, str) or not self.resume):
            raise UsageError(f"resume takes the folder of a run, and got {self.resume!r}.")
        if self.device == "mps" and self.dtype == "float64":
            raise UsageError("mps has no float64: write dtype=float32, or device=cpu.")

    @classmethod
    def keys(cls) -> tuple[str, ...]:
        """The names of the settings, which are the keys at the top of the configuration."""
        return tuple(field.name for field in fields(cls))

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Settings:
        """Reads the settings off a resolved configuration."""
        return cls(**{key: config[key] for key in cls.keys() if key in config})

    def apply(self) -> tuple[torch.device, torch.dtype]:
        """Puts seed and threads into effect, and checks that the device is there.

        Returns:
            The device and the dtype to which the problem goes.

        Raises:
            UsageError: the device is not there.
        """
        import torch

        from bilevel.rng import seed_everything

        device, dtype = self._device(), getattr(torch, self.dtype)
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        seed_everything(self.seed)
        return device, dtype

    def _device(self) -> torch.device:
        import torch

        device = torch.device(self.device)
        if device.type == "cuda":
            count = torch.cuda.device_count() if torch.cuda.is_available() else 0
            if (device.index or 0) >= count:
                found = f"only {count} of them" if count else "no CUDA device"
                raise UsageError(f"device={self.device} was asked for, and torch sees {found}: write device=cpu.")
        if device.type == "mps" and not torch.backends.mps.is_available():
            raise UsageError("device=mps was asked for, and torch sees no Apple GPU: write device=cpu.")
        return device


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
