"""Freed memory is kept for the next step: after a solve, no large block is mapped anew and no step faults pages."""

import ctypes
import os
import platform
import subprocess
import sys

import pytest

STEPS = """
import ctypes, resource, sys
import torch
from bilevel.linalg import POSITIVE_DEFINITE, ConjugateGradient, MatrixOperator, linear_solve


class Info(ctypes.Structure):  # `struct mallinfo2` of glibc
    _fields_ = [(name, ctypes.c_size_t) for name in
                "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]


libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Info
if sys.argv[1] == "solved":
    linear_solve(MatrixOperator(torch.eye(2), POSITIVE_DEFINITE), torch.ones(2), ConjugateGradient())
mapped = libc.mallinfo2().hblks
block = torch.ones(2**20, 7)
mapped = libc.mallinfo2().hblks - mapped
for step in range(12):
    if step == 2:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(2**20) for _ in range(50)]
    del tensors
print(mapped, (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 10)
"""


def after(what, **wish):
    """Whether a block of 28 MB has a mapping of its own, and the page faults of a step on 200 MB; in a fresh process."""
    settings = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")  # a user's own choice of allocator
    env = {name: value for name, value in os.environ.items() if not name.startswith(settings)} | wish
    done = subprocess.run([sys.executable, "-c", STEPS, what], capture_output=True, text=True, check=True, env=env)
    mapped, faults = done.stdout.split()
    return int(mapped), float(faults)


is_glibc = platform.libc_ver()[0] == "glibc" and hasattr(ctypes.CDLL(None), "mallinfo2")


@pytest.mark.skipif(not is_glibc, reason="the rule is glibc's, and so is what tells of it")
def test_a_solve_makes_the_process_keep_what_it_frees():
    pages = 50 * 4 * 2**20 / 4096
    assert after("nothing")[0] == 1
    mapped, faults = after("solved")
    assert mapped == 0
    assert faults < 0.05 * pages  # without, all pages or a hundredth of them, by what lies at the end of the heap


@pytest.mark.skipif(not is_glibc, reason="the rule is glibc's, and so is what tells of it")
def test_a_user_who_has_set_the_allocator_is_left_alone():
    assert after("solved", MALLOC_TOP_PAD_="131072")[0] == 1
