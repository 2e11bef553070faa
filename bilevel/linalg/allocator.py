"""One word to the C library's allocator: keep what a step frees for the next one."""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache

KEPT = 512 * 2**20  # bytes
LARGEST = 32 * 2**20  # of a block that comes from the heap, bytes: glibc takes no more
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


@cache
def keep_freed_memory() -> None:
    """Let glibc keep up to 512 MB of freed memory for the next step; other allocators do not notice.

    A step on vectors and activations of some megabytes each allocates and frees tens of them. glibc returns the end of its
    heap to the system by its own rule, and every page comes back through a page fault: 37,000 of them, a twentieth of the
    time, in a meta-step of 16 tasks with some hundred thousand parameters each. Who has set glibc's tunables is left alone.
    """
    if sys.platform != "linux" or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGEST)
        mallopt(M_TRIM_THRESHOLD, KEPT)
