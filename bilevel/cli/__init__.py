"""The command line: `python -m bilevel COMMAND ...`.

Nothing here imports torch until a job really starts, so that help and mistakes are answered at once.
`main` is the entry point of every front (`python -m bilevel`, `python -m experiments.train`, a console script).
"""

from bilevel.cli.main import main

__all__ = ["main"]
