"""`python -m experiments.train [overrides]`: the same as `python -m bilevel train [overrides]`."""

import sys

from bilevel.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
