"""Freed memory is kept for the next step: no page faults in a process that has solved a system."""

import os
import platform
import subprocess
import sys

import pytest

STEPS = """
import ctypes, resource, sys
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: huge pages would hide the faults
import torch
from bilevel.linalg import POSITIVE_DEFINITE, ConjugateGradient, MatrixOperator, linear_solve

if sys.argv[1] == "solved":
    linear_solve(MatrixOperator(torch.eye(2), POSITIVE_DEFINITE), torch.ones(2), ConjugateGradient())
for step in range(12):
    if step == 2:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(2**20) for _ in range(10)]
    del tensors
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 10)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the rule is glibc's")
def test_after_a_solve_steps_fault_no_pages():
    settings = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")  # a user's own choice of allocator
    env = {name: value for name, value in os.environ.items() if not name.startswith(settings)}
    faults = {}
    for what in ("nothing", "solved"):
        command = [sys.executable, "-c", STEPS, what]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
        faults[what] = float(done.stdout)
    pages = 10 * 4 * 2**20 / 4096
    assert faults["nothing"] > 0.5 * pages  # what it is for; if this fails the allocator has become better
    assert faults["solved"] < 0.05 * pages
