"""`python -m pymirror.cli`, and the console script `pymirror`."""

import sys

from pymirror.cli.main import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
