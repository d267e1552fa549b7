# SPDX-License-Identifier: MIT
"""Which interpreters pymirror works in: the main one of a process, with its global lock (GIL).

The library has handlers of signals and of fork, and one registry, for the whole process; its Python half
rests on the GIL where the kernel has a lock of its own. Imported before the shim.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType


def refusal() -> str:
    """Why pymirror cannot work in this interpreter and what to do, or ""."""
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        return (
            "ENOTSUP: this Python runs without its global lock (free-threaded), which pymirror rests on; do:"
            " run it with the environment variable PYTHON_GIL=1, or by an ordinary build of Python"
        )
    if not _is_main():
        return (
            "ENOTSUP: this is a subinterpreter, and pymirror's handlers of signals and of fork are those of"
            " the whole process; do: import pymirror in the main interpreter, or start a process"
        )
    return ""


def _is_main() -> bool:
    interpreters = _interpreters()
    if interpreters is None:
        return True
    # Python 3.13 gives pairs of a number and where it comes from.
    current, main = interpreters.get_current(), interpreters.get_main()
    return bool(current == main)


def _interpreters() -> ModuleType | None:
    """The module that knows, which every CPython has under a private name."""
    for name in ("_interpreters", "_xxsubinterpreters"):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    return None
