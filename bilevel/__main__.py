"""`python -m bilevel`: hands the command line to `bilevel.cli`."""

import sys

from bilevel.cli import main

if __name__ == "__main__":
    sys.exit(main())
