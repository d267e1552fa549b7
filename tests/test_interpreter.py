"""Interpreters that pymirror does not work in refuse the import in a sentence; the main one goes on."""

from __future__ import annotations

import subprocess
import sys

import pytest

import pymirror as pm

SUBINTERPRETER = """
import sys
try:
    import _interpreters as interpreters
except ImportError:
    import _xxsubinterpreters as interpreters
{first}
one = interpreters.create()
interpreters.run_string(one, '''
try:
    import pymirror
except ImportError as refused:
    print(refused)
''')
interpreters.destroy(one)
import pymirror as pm
with pm.AddressSpace() as mm:
    print(len(mm.mmap(4096)))
"""
# A build without the lock says so by this function; an ordinary one has it or not, and it says True.
FREE_THREADED = """
import sys
sys._is_gil_enabled = lambda: False
try:
    import pymirror
except ImportError as refused:
    print(refused)
"""


def run(program: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=50, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


@pytest.mark.parametrize("first", ["", "import pymirror"], ids=["it is the first to import it", "it is not"])
def test_a_subinterpreter_is_refused_and_the_main_one_goes_on(first: str) -> None:
    refused, size = run(SUBINTERPRETER.format(first=first))
    assert "this is a subinterpreter" in refused
    assert "; do: import pymirror in the main interpreter" in refused
    assert size == "4096"


def test_a_free_threaded_interpreter_is_refused() -> None:
    (refused,) = run(FREE_THREADED)
    assert "without its global lock" in refused
    assert "PYTHON_GIL=1" in refused


def test_the_main_interpreter_is_not_refused() -> None:
    assert pm.interpreter.refusal() == ""
