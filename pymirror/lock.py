# SPDX-License-Identifier: MIT
"""The driver's lock, the mm's read/write lock, and what a thread that holds one may not do.

Lock order: the mmap lock, then a driver lock. A call that would turn it round, or wait for the thread that
makes it, raises EDEADLK at once. Every wait ends at Ctrl-C. It may strike after any call, so what ends
something looks at what is there, not at what should be, and may run twice.
"""

from __future__ import annotations

import _thread as _thread_module
import errno
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from . import waiting
from .arguments import seconds
from .errors import MirrorError

#: Waits go in slices of so many seconds: a signal that comes just before a thread goes to sleep does not wake
#: it, and is heard at the end of the slice.
SLICE = 0.2


class _ThreadState(threading.local):
    """What this thread is in: callbacks, and the driver locks that it has taken and may have let go again."""

    def __init__(self) -> None:
        self.taken: list[DriverLock] = []
        self.callbacks: list[object] = []


_thread = _ThreadState()
# By id; single dict operations only, so that a fork at any moment leaves it usable.
_locks: dict[int, weakref.ref[DriverLock]] = {}


class DriverLock(_thread_module.RLock):  # type: ignore[misc]
    """The driver's own lock, for its callbacks and where it programs the device (hmm.rst: driver->update).

    Not reentrant: a second acquire by the thread that holds it raises EDEADLK instead of hanging.
    """

    # The end of a with block is the base's, in C: there Ctrl-C cannot leave the lock held. Nothing may have
    # to be done at a release, and who holds what is asked of the locks.

    def __init__(self, name: str = "driver lock") -> None:
        self.name = name
        self.taken_by: int | None = None
        self.since_ns = 0
        key = id(self)
        _locks[key] = weakref.ref(self, lambda _: _forget(key))

    @property
    def held(self) -> bool:
        """Whether the calling thread holds it."""
        return bool(self._is_owned())  # type: ignore[attr-defined]

    @property
    def owner(self) -> int | None:
        """The ident of the thread that holds it, for dumps."""
        return self.taken_by if super().__repr__().startswith("<locked") else None

    def acquire(self, timeout: float = -1) -> bool:  # type: ignore[override]
        """Take it; with a timeout in seconds, False when it could not be had in time."""
        if self.held:
            raise MirrorError(
                errno.EDEADLK,
                f"acquire: this thread holds {self.name!r} already, and would wait for itself",
                hint="do not call what takes the lock while holding it",
            )
        try:
            had = super().acquire(timeout=SLICE if timeout < 0 else min(timeout, SLICE))
            if not had and not self._wait(timeout):
                return False
            self.taken_by = threading.get_ident()
            self.since_ns = time.monotonic_ns()
            _thread.taken = [*(lock for lock in held_here() if lock is not self), self]
        except BaseException:
            if self._is_owned():  # type: ignore[attr-defined]
                super().release()
            raise
        return True

    def _wait(self, timeout: float) -> bool:
        """After the first slice, in which it could not be had."""
        since_ns = time.monotonic_ns() - int(SLICE * 1e9)
        deadline = time.monotonic() + timeout - SLICE
        try:
            while timeout < 0 or time.monotonic() < deadline:
                waiting.tell(self.name, since_ns, self.owner, self.since_ns)
                left = SLICE if timeout < 0 else max(0.0, min(SLICE, deadline - time.monotonic()))
                if super().acquire(timeout=left):
                    return True
            return False
        finally:
            waiting.over()

    def release(self) -> None:
        if not self.held:
            message = f"release: this thread does not hold {self.name!r}"
            raise MirrorError(errno.EPERM, message, hint="acquire() it first")
        super().release()

    def __enter__(self) -> DriverLock:  # type: ignore[override]
        self.acquire()
        return self

    def __repr__(self) -> str:
        return f"<DriverLock {self.name!r} {'free' if self.owner is None else 'held'}>"


def _forget(key: int, forget: Callable[..., object] = _locks.pop) -> None:
    forget(key, None)


_forked: dict[int, weakref.ref[Any]] = {}


def renew_in_child(owner: Any) -> None:
    """Have ``owner._make_locks()`` called in forked children: a thread that is not there may hold the old."""
    key = id(owner)
    _forked[key] = weakref.ref(owner, lambda _: _forget(key, _forked.pop))


def _renew_all() -> None:
    for reference in list(_forked.values()):
        owner = reference()
        if owner is not None:
            owner._make_locks()


os.register_at_fork(after_in_child=_renew_all)


def driver_locks() -> list[DriverLock]:
    """Every driver lock there is, for dumps."""
    return [lock for reference in list(_locks.values()) if (lock := reference()) is not None]


def held_here() -> list[DriverLock]:
    """The driver locks that the calling thread holds."""
    return [lock for lock in _thread.taken if lock.held]


@contextmanager
def callback_scope(callback: object) -> Iterator[None]:
    """Marks the calling thread as inside a callback, whose ``str()`` says which."""
    callbacks = _thread.callbacks
    depth = len(callbacks)
    try:
        callbacks.append(callback)
        yield
    finally:
        del callbacks[depth:]


def in_callback() -> str | None:
    """The callback that the calling thread is in, the innermost; None outside."""
    return str(_thread.callbacks[-1]) if _thread.callbacks else None


def not_in_callback(what: str) -> None:
    """Raise EDEADLK when the calling thread is inside a notifier callback."""
    if not _thread.callbacks:
        return
    raise MirrorError(
        errno.EDEADLK,
        f"{what}: called in a callback, {_thread.callbacks[-1]}, where it would wait for that callback",
        hint="only clear device entries and set sequence numbers in a callback; do the rest later",
    )


def not_under_driver_lock(what: str) -> None:
    """Raise EDEADLK when the calling thread holds a driver lock: callbacks that it would wait for take it."""
    if not (held := held_here()):
        return
    raise MirrorError(
        errno.EDEADLK,
        f"{what}: this thread holds {held[-1].name!r}, which the callbacks that it waits for may need",
        hint="release the driver lock first; the order is mmap lock, then driver lock",
    )


_ENDS = {
    "read_lock": "leave the read_lock() block first",
    "migrate_vma_setup": "migrate_vma_finalize() first, or do it in another thread",
}


class MmapLock:
    """The mm's read/write lock (mmap_lock), killed at teardown: from then on every acquire is ESRCH.

    Waiting writers keep new readers out; a thread that reads already may read again.
    """

    def __init__(self) -> None:
        self._make_locks()
        renew_in_child(self)
        self._readers: dict[int, int] = {}
        self._since_ns: dict[int, int] = {}
        self._taken_by: dict[int, str] = {}
        self._writer: int | None = None
        self._waiting_writers = 0
        self._dead = False

    @contextmanager
    def read(self, what: str, timeout: float | None = None) -> Iterator[None]:
        """Hold it for reading: ESRCH once killed, EDEADLK, ETIMEDOUT after ``timeout`` seconds."""
        not_in_callback(what)
        not_under_driver_lock(what)
        before = self._readers.get(threading.get_ident(), 0)
        try:
            try:
                self._acquire_read(what, timeout)
                yield
            finally:
                self._release_read(before)
        finally:
            # Once more: Ctrl-C may have struck at the door of the first.
            self._release_read(before)

    @contextmanager
    def write(self, what: str, timeout: float | None = None) -> Iterator[None]:
        """Hold it for writing: ESRCH once killed, EDEADLK, ETIMEDOUT after ``timeout`` seconds."""
        self.check_free(what)
        try:
            try:
                self._acquire_write(what, timeout)
                yield
            finally:
                self._release_write()
        finally:
            self._release_write()

    def check_free(self, what: str) -> None:
        """EDEADLK in a callback, under a driver lock, or when this thread holds the lock in any way."""
        not_in_callback(what)
        not_under_driver_lock(what)
        me = threading.get_ident()
        if me in self._readers:
            taken_by = self._taken_by.get(me, "read_lock")
            raise MirrorError(
                errno.EDEADLK,
                f"{what}: this thread holds the mmap lock for reading, by {taken_by}()",
                hint=_ENDS.get(taken_by, f"let {taken_by}() finish first"),
            )
        if self._writer == me:
            raise MirrorError(
                errno.EDEADLK,
                f"{what}: this thread is inside another operation on the same address space",
                hint="let that operation finish first",
            )

    def kill(self) -> None:
        """Every acquire from now on, and every one that waits, is ESRCH."""
        with self._lock:
            self._dead = True
            self._cond.notify_all()

    def holders(self) -> list[tuple[str, int, int]]:
        """("read" or "write", thread ident, CLOCK_MONOTONIC ns since when), for dumps; takes no lock."""
        writer = self._writer
        found = [("read", ident, self._since_ns.get(ident, 0)) for ident in list(self._readers)]
        if writer is not None:
            found.append(("write", writer, self._since_ns.get(writer, 0)))
        return found

    @property
    def waiting_writers(self) -> int:
        return self._waiting_writers

    def _make_locks(self) -> None:
        # Entered as itself: Condition's own __enter__ is Python, and Ctrl-C could strike between it and the
        # block.
        self._lock = threading.RLock()
        self._cond = threading.Condition(self._lock)

    def _acquire_read(self, what: str, timeout: float | None) -> None:
        me = threading.get_ident()
        if self._writer == me:
            self.check_free(what)
        with self._lock:
            if me not in self._readers:
                self._wait(what, timeout, lambda: self._writer is None and not self._waiting_writers)
                self._since_ns[me] = time.monotonic_ns()
                self._taken_by[me] = what
            self._readers[me] = self._readers.get(me, 0) + 1

    def _release_read(self, before: int) -> None:
        """Back to as many read locks as this thread had before."""
        me = threading.get_ident()
        with self._lock:
            if before:
                self._readers[me] = before
                return
            self._readers.pop(me, None)
            self._since_ns.pop(me, None)
            self._taken_by.pop(me, None)
            self._cond.notify_all()

    def _acquire_write(self, what: str, timeout: float | None) -> None:
        me = threading.get_ident()
        with self._lock:
            self._waiting_writers += 1
            try:
                self._wait(what, timeout, lambda: self._writer is None and not self._readers)
                self._writer = me
                self._since_ns[me] = time.monotonic_ns()
            finally:
                self._waiting_writers -= 1
                if self._writer != me:
                    self._cond.notify_all()

    def _release_write(self) -> None:
        me = threading.get_ident()
        with self._lock:
            if self._writer != me:
                return
            self._since_ns.pop(me, None)
            self._writer = None
            self._cond.notify_all()

    def _wait(self, what: str, timeout: float | None, free: Callable[[], bool]) -> None:
        deadline = None if timeout is None else time.monotonic() + seconds(what, "timeout", timeout)
        since_ns, told = time.monotonic_ns(), False
        try:
            while not self._free_now(what, free):
                if time.monotonic_ns() - since_ns >= SLICE * 1e9:
                    told = True
                    self._tell(since_ns)
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    raise self._timed_out(what, timeout)
                self._cond.wait(SLICE if left is None else min(left, SLICE))
        finally:
            if told:
                waiting.over()

    def _free_now(self, what: str, free: Callable[[], bool]) -> bool:
        if self._dead:
            raise MirrorError(
                errno.ESRCH, f"{what}: the address space is closed", hint="open a new AddressSpace"
            )
        return free()

    def _tell(self, since_ns: int) -> None:
        holders = sorted(self.holders(), key=lambda holder: holder[2])
        how, ident, held_since_ns = holders[0] if holders else ("", None, 0)
        waiting.tell(f"mmap lock ({how})" if how else "mmap lock", since_ns, ident, held_since_ns)

    def _timed_out(self, what: str, timeout: float | None) -> MirrorError:
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        held = ", ".join(f"{names.get(ident, ident)} ({how})" for how, ident, _ in self.holders())
        return MirrorError(
            errno.ETIMEDOUT,
            f"{what}: the mmap lock was not free within {timeout} s; held by {held or 'nobody now'}",
            hint="AddressSpace.dump() shows where the holders are",
        )
