"""Clocks and scales: seconds of a call as a median, bytes that it takes at its peak, and what the process holds."""

from __future__ import annotations

import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

REPEATS = 7


def seconds_of(
    function: Callable[[], Any], device: torch.device, *, repeats: int = REPEATS, allowance: float = 1.0
) -> float:
    """Median seconds of a call after one that is not counted; fewer repeats where they would exceed the allowance.

    Args:
        function: what to time.
        device: synchronised before each reading of the clock when it is a CUDA device.
        repeats: how often, at most.
        allowance: seconds for all of it; one counted call is made in any case.
    """
    begun = time.perf_counter()
    function()
    found: list[float] = []
    while len(found) < repeats and (not found or time.perf_counter() - begun + found[-1] <= allowance):
        _wait(device)
        started = time.perf_counter()
        function()
        _wait(device)
        found.append(time.perf_counter() - started)
    return statistics.median(found)


def peak_bytes(function: Callable[[], Any], device: torch.device) -> float:
    """Bytes of tensors that a call holds at its peak, beyond those that were there before it.

    On the CPU every allocation and release of torch's is added up, as its profiler sees them: exact to the byte, and
    blind to what the system's allocator keeps for later use.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return float(torch.cuda.max_memory_allocated(device) - before)
    with _quiet_profiler(), torch.autograd.profiler.profile(profile_memory=True, use_kineto=False) as watched:
        function()
    live = peak = 0
    for event in watched.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return float(peak)


def held_bytes(device: torch.device) -> float:
    """What is held before a hypergradient begins: resident memory of the process, or that of torch on a CUDA device."""
    if device.type == "cuda":
        return float(torch.cuda.memory_allocated(device))
    try:
        return float(int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize())
    except OSError:  # no such file system: the peak so far is an upper bound
        return peak_held_bytes(device)


def peak_held_bytes(device: torch.device) -> float:
    """The most that was ever held, of what `held_bytes` counts."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))


@contextmanager
def _quiet_profiler() -> Iterator[None]:
    """The library below torch's profiler prints two lines on stderr whenever it is used, unless told not to."""
    before = os.environ.get("KINETO_LOG_LEVEL")
    os.environ["KINETO_LOG_LEVEL"] = before or "99"
    try:
        yield
    finally:
        if before is None:
            del os.environ["KINETO_LOG_LEVEL"]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
