# SPDX-License-Identifier: MIT
"""The console script `pymirror`: what has to hold while the package is not there yet.

Importing it takes some tenths of a second. Ctrl-C meanwhile ends the process as it ends any other, without a
traceback, and a package that cannot be imported is one line.
"""

from __future__ import annotations

import signal
import sys

EXIT_REFUSED = 3
EXIT_INTERRUPTED = 130


def main() -> int:
    """Run `pymirror` with the arguments of this process and return the exit code."""
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    try:
        if ours:
            # Not KeyboardInterrupt: numpy makes an ImportError of its own of it.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        return _run(ours)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    finally:
        if ours:
            # Nothing is left that would have to be done in order.
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def _run(ours: bool) -> int:
    try:
        from pymirror.cli.main import build_parser, run

        parser = build_parser()
    except ImportError as missing:
        print(f"pymirror: {missing}", file=sys.stderr)
        return EXIT_REFUSED
    if ours:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return run(parser)
