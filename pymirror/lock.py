# SPDX-License-Identifier: MIT
"""The driver's lock, the mm's read/write lock, and what a thread that holds one may not do.

Lock order: the mmap lock, then a driver lock. A call that would turn it round, or wait for the thread that
makes it, raises EDEADLK at once. Every wait ends at Ctrl-C.
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from .errors import MirrorError


class _ThreadState(threading.local):
    """What this thread holds."""

    def __init__(self) -> None:
        self.driver_locks: list[DriverLock] = []
        self.callbacks: list[str] = []


_thread = _ThreadState()
# By id; single dict operations only, so that a fork at any moment leaves it usable.
_held_locks: dict[int, DriverLock] = {}


class DriverLock:
    """The driver's own lock, for its callbacks and where it programs the device (hmm.rst: driver->update).

    Not reentrant: a second acquire by the thread that holds it raises EDEADLK instead of hanging.
    """

    def __init__(self, name: str = "driver lock") -> None:
        self.name = name
        self.owner: int | None = None
        self.since_ns = 0
        self._lock = threading.Lock()

    @property
    def held(self) -> bool:
        """Whether the calling thread holds it."""
        return self.owner == threading.get_ident()

    def acquire(self, timeout: float = -1) -> bool:
        """Take it; with a timeout in seconds, False when it could not be had in time."""
        if self.held:
            raise MirrorError(
                errno.EDEADLK,
                f"acquire: this thread holds {self.name!r} already",
                hint="do not call what takes the lock while holding it",
            )
        if not self._lock.acquire(timeout=timeout):
            return False
        self.owner = threading.get_ident()
        self.since_ns = time.monotonic_ns()
        _thread.driver_locks.append(self)
        _held_locks[id(self)] = self
        return True

    def release(self) -> None:
        if not self.held:
            raise MirrorError(
                errno.EPERM, f"release: this thread does not hold {self.name!r}", hint="acquire() it first"
            )
        _thread.driver_locks.remove(self)
        del _held_locks[id(self)]
        self.owner = None
        self._lock.release()

    def __enter__(self) -> DriverLock:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.release()

    def __repr__(self) -> str:
        return f"<DriverLock {self.name!r} {'held' if self.owner is not None else 'free'}>"


def held_driver_locks() -> list[DriverLock]:
    """Driver locks that some thread holds now, for dumps."""
    return list(_held_locks.values())


def driver_locks_held_here() -> int:
    """How many driver locks the calling thread holds."""
    return len(_thread.driver_locks)


@contextmanager
def callback_scope(name: str) -> Iterator[None]:
    """Marks the calling thread as inside the callback ``name``."""
    _thread.callbacks.append(name)
    try:
        yield
    finally:
        _thread.callbacks.pop()


def in_callback() -> str | None:
    """The callback that the calling thread is in, the innermost; None outside."""
    return _thread.callbacks[-1] if _thread.callbacks else None


def not_in_callback(what: str) -> None:
    """Raise EDEADLK when the calling thread is inside a notifier callback."""
    if not _thread.callbacks:
        return
    raise MirrorError(
        errno.EDEADLK,
        f"{what}: called inside the notifier callback {_thread.callbacks[-1]}",
        hint="a callback may only clear device entries and set sequence numbers; do the rest later",
    )


def not_under_driver_lock(what: str) -> None:
    """Raise EDEADLK when the calling thread holds a driver lock: callbacks that it would wait for take it."""
    if not _thread.driver_locks:
        return
    raise MirrorError(
        errno.EDEADLK,
        f"{what}: this thread holds {_thread.driver_locks[-1].name!r}, which callbacks may need",
        hint="release the driver lock first; the order is mmap lock, then driver lock",
    )


class MmapLock:
    """The mm's read/write lock (mmap_lock), killed at teardown: from then on every acquire is ESRCH.

    Waiting writers keep new readers out; a thread that reads already may read again.
    """

    def __init__(self) -> None:
        self._cond = threading.Condition()
        self._readers: dict[int, int] = {}
        self._since_ns: dict[int, int] = {}
        self._writer: int | None = None
        self._waiting_writers = 0
        self._dead = False

    @contextmanager
    def read(self, what: str, timeout: float | None = None) -> Iterator[None]:
        """Hold it for reading: ESRCH once killed, EDEADLK, ETIMEDOUT after ``timeout`` seconds."""
        not_in_callback(what)
        not_under_driver_lock(what)
        self._acquire_read(what, timeout)
        try:
            yield
        finally:
            self._release_read()

    @contextmanager
    def write(self, what: str, timeout: float | None = None) -> Iterator[None]:
        """Hold it for writing: ESRCH once killed, EDEADLK, ETIMEDOUT after ``timeout`` seconds."""
        self.check_free(what)
        self._acquire_write(what, timeout)
        try:
            yield
        finally:
            self._release_write()

    def check_free(self, what: str) -> None:
        """EDEADLK in a callback, under a driver lock, or when this thread holds the lock in any way."""
        not_in_callback(what)
        not_under_driver_lock(what)
        me = threading.get_ident()
        if me in self._readers:
            raise MirrorError(
                errno.EDEADLK,
                f"{what}: this thread holds read_lock()",
                hint="leave the read_lock() block first",
            )
        if self._writer == me:
            raise MirrorError(
                errno.EDEADLK,
                f"{what}: this thread is inside another operation on the same address space",
                hint="let that operation finish first",
            )

    def kill(self) -> None:
        """Every acquire from now on, and every one that waits, is ESRCH."""
        with self._cond:
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

    def _acquire_read(self, what: str, timeout: float | None) -> None:
        me = threading.get_ident()
        if self._writer == me:
            self.check_free(what)
        with self._cond:
            if me not in self._readers:
                self._wait(what, timeout, lambda: self._writer is None and not self._waiting_writers)
                self._since_ns[me] = time.monotonic_ns()
            self._readers[me] = self._readers.get(me, 0) + 1

    def _release_read(self) -> None:
        me = threading.get_ident()
        with self._cond:
            self._readers[me] -= 1
            if self._readers[me]:
                return
            del self._readers[me]
            self._since_ns.pop(me, None)
            self._cond.notify_all()

    def _acquire_write(self, what: str, timeout: float | None) -> None:
        me = threading.get_ident()
        with self._cond:
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
        with self._cond:
            self._since_ns.pop(threading.get_ident(), None)
            self._writer = None
            self._cond.notify_all()

    def _wait(self, what: str, timeout: float | None, free: Callable[[], bool]) -> None:
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            if self._dead:
                raise MirrorError(
                    errno.ESRCH, f"{what}: the address space is closed", hint="open a new AddressSpace"
                )
            if free():
                return
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise self._timed_out(what, timeout)
            self._cond.wait(left)

    def _timed_out(self, what: str, timeout: float | None) -> MirrorError:
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        held = ", ".join(f"{names.get(ident, ident)} ({how})" for how, ident, _ in self.holders())
        return MirrorError(
            errno.ETIMEDOUT,
            f"{what}: the mmap lock was not free within {timeout} s; held by {held or 'nobody now'}",
            hint="AddressSpace.dump() shows where the holders are",
        )
