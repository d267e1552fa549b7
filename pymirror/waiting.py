# SPDX-License-Identifier: MIT
"""Who waits long for a lock of Python's and who holds it: on the status pages, for `pymirror inspect`.

Only slow waits come here: a lock that is had within a slice costs nothing.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ._shim import ffi, lib

_SHOWN: int = lib.PM_STATUS_WAITS
_NAME_BYTES = 39


@dataclass(frozen=True, slots=True)
class _Wait:
    lock: str
    tid: int
    since_ns: int
    holder: int
    held_since_ns: int


# By thread ident; single dict operations only, so that a fork at any moment leaves it usable.
_waits: dict[int, _Wait] = {}
os.register_at_fork(after_in_child=_waits.clear)
_natives: Callable[[], Iterable[Any]] = tuple


def shown_by(natives: Callable[[], Iterable[Any]]) -> None:
    """Name what gives the ``pm_mm *`` of every open address space."""
    global _natives
    _natives = natives


def tell(lock: str, since_ns: int, holder: int | None, held_since_ns: int) -> None:
    """The calling thread has waited for ``lock`` since then; the thread of ident ``holder`` has it."""
    tids = {thread.ident: thread.native_id or 0 for thread in threading.enumerate()}
    me = threading.get_ident()
    _waits[me] = _Wait(lock, threading.get_native_id(), since_ns, tids.get(holder, 0), held_since_ns)
    _publish()


def over() -> None:
    """The calling thread waits no longer. Idempotent."""
    if _waits.pop(threading.get_ident(), None) is not None:
        _publish()


def _publish() -> None:
    waits = list(_waits.values())[:_SHOWN]
    shown = ffi.new("struct pm_status_wait[]", max(1, len(waits)))
    for one, wait in zip(shown, waits, strict=False):
        one.since_ns, one.held_since_ns = wait.since_ns, wait.held_since_ns
        one.tid, one.holder_tid = wait.tid, wait.holder
        one.lock = wait.lock.encode()[:_NAME_BYTES]
    for native in _natives():
        lib.pm_status_waits(native, shown, len(waits))
