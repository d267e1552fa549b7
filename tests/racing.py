"""What races are made of: changes of memory by either hand, forks and threads that Python does not know."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
from mirroring import PAGE, filled
from seams import WAIT_S, foreign

import pymirror as pm

MADV_REMOVE = 9
MAP_ANONYMOUS = 0x22
MAP_FIXED = 0x32
MAP_FIXED_NOREPLACE = 0x100022
STACK = 64 << 10

LIBC = ctypes.CDLL(None, use_errno=True)

Change = Callable[[pm.AddressSpace, int], object]


def replace(addr: int, size: int = PAGE) -> None:
    """Unmap, and map other memory there in one step: no hole is left that another could take."""
    foreign.mmap(addr, size, flags=MAP_FIXED)


API: dict[str, Change] = {
    "api-munmap": lambda mm, addr: mm.munmap(addr, PAGE),
    "api-dontneed": lambda mm, addr: mm.madvise(addr, PAGE, mmap.MADV_DONTNEED),
    "api-mprotect": lambda mm, addr: mm.mprotect(addr, PAGE, 0),
    "api-mremap": lambda mm, addr: mm.mremap(addr, PAGE, PAGE, flags=5),
}
FOREIGN: dict[str, Change] = {
    "foreign-munmap": lambda mm, addr: foreign.munmap(addr, PAGE),
    "foreign-dontneed": lambda mm, addr: foreign.madvise(addr, PAGE, mmap.MADV_DONTNEED),
    "foreign-fixed": lambda mm, addr: replace(addr),
    "foreign-dontunmap": lambda mm, addr: foreign.mremap(addr, PAGE, PAGE, flags=5),
}
CHANGES = API | FOREIGN

#: What a page gives that was changed: zeroes, or the errno of an access.
GONE = {"api-munmap", "api-mprotect", "foreign-munmap"}


def watched(mm: pm.AddressSpace, pages: int = 4) -> pm.Region:
    buf = filled(mm, pages)
    mm.watch(buf.addr, buf.addr + buf.size)
    return buf


def changes(table: dict[str, Change]) -> Any:
    return pytest.mark.parametrize("change", list(table))


class NativeThread:
    """A thread that runs a function of libc and never needs the GIL."""

    def __init__(self, function: Any, argument: int = 0) -> None:
        self._thread = ctypes.c_ulong()
        start = ctypes.cast(function, ctypes.c_void_p)
        error = LIBC.pthread_create(ctypes.byref(self._thread), None, start, ctypes.c_void_p(argument))
        assert error == 0, os.strerror(error)

    def stays(self, seconds: float = 0.05) -> bool:
        return self._join(seconds) is None

    def result(self, timeout: float = WAIT_S) -> int:
        found = self._join(timeout)
        assert found is not None, f"the native thread has not ended after {timeout} s"
        return found

    def _join(self, seconds: float) -> int | None:
        until = time.time_ns() + int(seconds * 1e9)
        deadline = (ctypes.c_long * 2)(*divmod(until, 10**9))
        value = ctypes.c_void_p()
        error = LIBC.pthread_timedjoin_np(self._thread, ctypes.byref(value), deadline)
        return None if error else value.value or 0


class NativeFork(NativeThread):
    """libc's fork(), without the GIL that os.fork() holds. The child has nothing to do, and ends."""

    def __init__(self) -> None:
        super().__init__(LIBC.fork)

    def result(self, timeout: float = WAIT_S) -> int:
        """The child's wait status."""
        return wait_for(super().result(timeout))


def raw_clone(function: Any = None, argument: int = 0) -> int:
    """A fork that libc does not see. The child keeps descriptors and runs a function of libc, or _exit."""
    stack = ctypes.create_string_buffer(STACK)
    top = (ctypes.addressof(stack) + STACK) & ~0xF
    start = ctypes.cast(function or LIBC._exit, ctypes.c_void_p)
    pid = LIBC.clone(start, ctypes.c_void_p(top), int(signal.SIGCHLD), ctypes.c_void_p(argument))
    assert pid > 0, os.strerror(ctypes.get_errno())
    return int(pid)


@contextmanager
def sleeping_clone() -> Iterator[int]:
    """The child of a raw clone, asleep with all that it inherited, for the length of the block."""
    pid = raw_clone(LIBC.sleep, 60)
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@contextmanager
def waiting_child(work: Callable[[], object] = lambda: None) -> Iterator[Callable[[], None]]:
    """A child of os.fork() that runs ``work`` when what is given is called, which checks that it returned."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(write)
        run_child(lambda: os.read(read, 1) and work())
    os.close(read)
    ended = False

    def go() -> None:
        nonlocal ended
        os.write(write, b"g")
        ended = True
        assert wait_for(pid) == 0

    try:
        yield go
    finally:
        os.close(write)
        if not ended:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def run_child(work: Callable[[], object]) -> None:
    """In a forked child: run and end, by SIGALRM if it hangs."""
    status = 1
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(int(WAIT_S))
        work()
        status = 0
    except BaseException as error:
        os.write(2, f"child: {type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(status)


def in_child(work: Callable[[], object]) -> int:
    """The wait status of a forked child that runs ``work``."""
    pid = os.fork()
    if pid == 0:
        run_child(work)
    return wait_for(pid)


def wait_for(pid: int, timeout: float = 2 * WAIT_S) -> int:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return status
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError(f"child {pid} has not ended after {timeout} s")


def peek(pid: int, addr: int, size: int) -> bytes:
    """Memory of another process, faulted as a touch of its own would be."""
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        return os.pread(memory.fileno(), size, addr)


def poke(pid: int, addr: int, data: bytes) -> None:
    with open(f"/proc/{pid}/mem", "r+b", buffering=0) as memory:
        assert os.pwrite(memory.fileno(), data, addr) == len(data)


def eventually(condition: Callable[[], object], timeout: float = WAIT_S) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it has not come to pass"
        time.sleep(0.0005)


def _place(ident: int) -> tuple[str, int]:
    """Where a thread stands. Only its innermost frame: to walk them while it runs crashes Python 3.11."""
    frame = sys._current_frames()[ident]
    return frame.f_code.co_name, frame.f_lasti


def _is_stuck(ident: int, function: str) -> bool:
    """In that function, and not on: a thread that only waits for the GIL would have got it meanwhile."""
    place = _place(ident)
    if place[0] != function:
        return False
    time.sleep(0.03)
    return _place(ident) == place


@contextmanager
def ctrl_c(when: Callable[[int], object], then: Callable[[], object] = lambda: None) -> Iterator[None]:
    """SIGINT for the main thread, that of the block, which must end by it at once."""
    main = threading.main_thread().ident
    assert main == threading.get_ident()
    struck: list[float] = []
    begun = threading.Event()
    ended_by: BaseException | None = None

    def handle(number: int, frame: object) -> None:
        # One that comes too late must not end the test run.
        if begun.is_set():
            signal.default_int_handler(number, None)

    def strike() -> None:
        assert begun.wait(WAIT_S)
        when(main)
        struck.append(time.monotonic())
        signal.pthread_kill(main, signal.SIGINT)
        then()

    previous = signal.signal(signal.SIGINT, handle)
    thread = threading.Thread(target=strike, daemon=True)
    thread.start()
    try:
        begun.set()
        yield
    except KeyboardInterrupt as interrupt:
        ended_by = interrupt
    finally:
        begun.clear()
        thread.join(WAIT_S)
        signal.signal(signal.SIGINT, previous)
    assert ended_by is not None, "the block ended of itself"
    assert time.monotonic() - struck[0] < 1.0


def ctrl_c_in(function: str) -> AbstractContextManager[None]:
    """When the block is stuck in the function of that name."""
    return ctrl_c(lambda main: eventually(lambda: _is_stuck(main, function)))
