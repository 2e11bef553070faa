"""One word to the C library's allocator: keep what a solver frees at every step."""

from __future__ import annotations

from functools import cache

import torch


@cache
def keep_freed_memory() -> None:
    """Let glibc keep up to 64 MB of freed memory for the next step; other allocators do not notice.

    A step on vectors and activations of some megabytes each allocates and frees tens of them. glibc returns the end of its
    heap to the system whenever twice the size of the largest block that was ever freed has gathered there, and every page
    comes back through a page fault: tens of thousands in a hypergradient of a network of some hundred thousand parameters.
    The rule adapts to blocks of up to 32 MB (`man mallopt`, M_MMAP_THRESHOLD), so one of this size is allocated and freed,
    once in a process, untouched.
    """
    torch.empty(32 * 2**20 - 2**13, dtype=torch.uint8)  # with its header, and aligned, it is just below the limit
