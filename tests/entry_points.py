# SPDX-License-Identifier: MIT
"""A plugin (``pytest -p entry_points``): a run fails that leaves out a native function the package uses.

For runs of a part of the tests on a shim that is built to check itself.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tally

KIND = "native entry points"


class Recorder:
    """Stands before ``lib`` and notes the names that are fetched from it, each of them once."""

    def __init__(self, lib: Any) -> None:
        self._lib = lib
        self.fetched: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._lib, name)
        self.fetched.add(name)
        setattr(self, name, value)
        return value

    def left_out(self) -> list[str]:
        text = "".join(path.read_text() for path in PACKAGE.rglob("*.py"))
        return sorted(set(re.findall(r"\blib\.(pm_\w+)", text)) - self.fetched)


class Ffi:
    """Stands before ``ffi``, whose addressof() takes nothing but the library itself."""

    def __init__(self, ffi: Any, lib: Any) -> None:
        self._ffi, self._lib = ffi, lib

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ffi, name)

    def addressof(self, of: Any, *fields: Any) -> Any:
        return self._ffi.addressof(self._lib if isinstance(of, Recorder) else of, *fields)


def _package() -> Path:
    spec = importlib.util.find_spec("pymirror")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0])


def _record() -> Recorder:
    """Before the package is imported: its modules keep what they find."""
    spec = importlib.util.spec_from_file_location("pymirror._shim", PACKAGE / "_shim.abi3.so")
    assert spec is not None
    assert spec.loader is not None
    shim = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(shim)
    shim.ffi = Ffi(shim.ffi, shim.lib)  # type: ignore[attr-defined]
    shim.lib = Recorder(shim.lib)  # type: ignore[attr-defined]
    sys.modules[spec.name] = shim
    return shim.lib  # type: ignore[attr-defined,no-any-return]


PACKAGE = _package()
recorder = _record()


@pytest.hookimpl(wrapper=True)
def pytest_sessionfinish(session: pytest.Session) -> Iterator[None]:
    yield
    left_out = recorder.left_out()
    called = sum(name.startswith("pm_") for name in recorder.fetched)
    tally.add(KIND, called=called, never_called=len(left_out))
    if left_out:
        print("\nnever called: " + " ".join(left_out))
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
