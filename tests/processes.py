"""The command line in processes that can be killed, forked from one that has imported everything: seconds less than a new one.

The server that is forked imports the modules and computes nothing; a child has its own torch, threads, seeds and standard
output, as a new process has.
"""

import multiprocessing
import os
import sys
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        *("bilevel.cli.train", "bilevel.cli.job", "bilevel.meta", "bilevel.problems", "bilevel.report.html"),
        *("hydra._internal.hydra", "sklearn.datasets", "sklearn.linear_model", "sklearn.model_selection"),
        "torch._dynamo",  # which torch's optimizers import when the first one is made: seconds
    ]
)


class Command:
    """`python -m bilevel WORDS`, whose output goes into a file."""

    def __init__(self, words, output):
        self.output = Path(output)
        self._process = FORKS.Process(target=_run, args=(list(words), str(output)))
        self._process.start()

    def is_alive(self):
        return self._process.is_alive()

    def kill(self):
        """SIGKILL, at whatever line it is."""
        self._process.kill()
        self._process.join()

    def wait(self, timeout=300):
        """Exit status and output."""
        self._process.join(timeout)
        assert not self.is_alive(), f"still running after {timeout} s"
        return self._process.exitcode, self.output.read_text()


def _run(words, output):
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    from bilevel.cli.main import main

    sys.exit(main(words))
