"""`python -m pymirror.cli`: the console script `pymirror` without the script."""

import sys

from _pymirror_cli import main

if __name__ == "__main__":
    sys.exit(main())
