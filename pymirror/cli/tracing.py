# SPDX-License-Identifier: MIT
"""The option --trace, of every command that mirrors memory."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from pymirror.trace import Trace


def add_trace_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trace", metavar="FILE", help="write what happens to FILE, for Perfetto or chrome://tracing"
    )


@contextmanager
def tracing(path: str | None) -> Iterator[None]:
    """Trace what is done inside, if there is a file for it. A terminal is told what came of it."""
    if path is None:
        yield
        return
    trace = Trace(path)
    try:
        with trace:
            yield
    finally:
        _tell(trace)


def _tell(trace: Trace) -> None:
    lost = f", {trace.dropped} more found no room" if trace.dropped else ""
    if lost or sys.stderr.isatty():
        print(
            f"trace: {trace.events} events in {trace.path}{lost}; open it at https://ui.perfetto.dev",
            file=sys.stderr,
        )
