"""Every system call of every operation fails once: the error is clean, nothing is lost, left or broken by it.

The n-th call of one kind fails, for n from 1 until the operation gets by without meeting it.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from mirroring import FAULT, PAGE, WRITE, FaultDriver, filled
from racing import eventually, in_child, raw_clone, wait_for
from seams import Background, errno_of, foreign, inject, needs

import pymirror as pm
from pymirror._shim import lib
from pymirror.page_table import PM_ENTRY_VALID

MOST = 80
HUGE = 2 << 20

#: What each kind of call may fail with.
ERRORS = {
    "OPEN": [errno.EMFILE],
    "CLOSE": [errno.EINTR],
    "READ": [errno.EINTR, errno.EAGAIN],
    "PREAD": [errno.EINTR, errno.ENOMEM],
    "IOCTL": [errno.ENOMEM],
    "POLL": [errno.EINTR, errno.ENOMEM],
    "MMAP": [errno.ENOMEM],
    "MUNMAP": [errno.ENOMEM],
    "MPROTECT": [errno.ENOMEM],
    "MADVISE": [errno.ENOMEM, errno.EAGAIN],
    "MREMAP": [errno.ENOMEM],
    "USERFAULTFD": [errno.EMFILE],
    "EVENTFD": [errno.EMFILE],
    "MEMFD": [errno.EMFILE],
    "FTRUNCATE": [errno.EINTR],
    "VM_READV": [errno.EINTR, errno.ENOMEM],
    "VM_WRITEV": [errno.EINTR, errno.ENOMEM],
    "THREAD": [errno.EAGAIN],
    "MALLOC": [errno.ENOMEM],
    "WRITE": [errno.EAGAIN],
    "MINCORE": [errno.EAGAIN],
}


@dataclass
class Space:
    """An open mm with a driver over some memory, and what its bytes must be."""

    mm: pm.AddressSpace
    driver: FaultDriver
    buf: pm.Region
    expected: bytearray
    made: list[Any] = field(default_factory=list)
    rng: pm.Range | None = None
    gone: bool = False  # page 2: unmapped or moved away

    def page(self, n: int) -> int:
        return self.buf.addr + n * PAGE

    def range(self, flags: int = FAULT) -> pm.Range:
        rng = self.driver.range(self.buf.addr, self.buf.addr + self.buf.size)
        rng.default_flags = flags
        self.made.append(rng)
        return rng

    def set(self, page: int, content: bytes, pages: int = 1) -> None:
        self.expected[page * PAGE : (page + pages) * PAGE] = content * (PAGE * pages // len(content))


@contextmanager
def space() -> Iterator[Space]:
    with pm.AddressSpace() as mm:
        # Before the driver, so that it is not watched from its birth.
        buf = filled(mm, 8)
        with FaultDriver(mm) as driver:
            yield Space(mm, driver, buf, bytearray(bytes(buf)))
        assert not mm.errors


@dataclass(frozen=True)
class Operation:
    """``run`` is made to fail. ``prepare`` comes before it, ``done`` checks its success.

    ``also``: errors that it may give besides that of the call that failed.
    """

    name: str
    run: Callable[[Space], object]
    prepare: Callable[[Space], object] = lambda space: None
    done: Callable[[Space], object] = lambda space: None
    also: frozenset[int] = frozenset()


def _map(space: Space) -> None:
    space.driver.map(space.buf.addr, space.page(8), WRITE)


def _registered(space: Space) -> None:
    space.rng = space.range()
    space.rng.register()


def _unfaulted(space: Space) -> None:
    space.mm.madvise(space.buf.addr, 8 * PAGE, mmap.MADV_DONTNEED)
    space.set(0, b"\0", 8)
    _registered(space)


def _faulted(space: Space) -> None:
    _registered(space)
    assert space.rng is not None
    space.rng.fault()


def _again(rng: pm.Range | None) -> pm.Range:
    """A range may have been invalidated by an attempt that failed."""
    assert rng is not None
    rng.wait_until_valid()
    return rng


def _fault(space: Space) -> None:
    _again(space.rng).fault()


def _program(space: Space) -> None:
    rng = _again(space.rng)
    assert space.driver.device.page_table.map(rng, rng.fault())


def _new(**how: Any) -> Callable[[Space], None]:
    def run(space: Space) -> None:
        size = how.pop("size", 4 * PAGE)
        region = space.mm.mmap(size, **how)
        region[0] = 7
        assert space.driver.device.read(space.mm, region.addr, 1) == b"\7"
        region.close()

    return run


def _whole(space: Space) -> None:
    """A notifier over everything, so that new memory is watched from its birth."""
    space.made.append(pm.IntervalNotifier(space.mm, 0, 1 << 64, lambda sub, range, seq: sub.set_seq(seq)))


def _unmap(space: Space) -> None:
    space.mm.munmap(space.page(2), PAGE)
    space.gone = True


def _unmapped(space: Space) -> None:
    assert errno_of(space.driver.device.read, space.mm, space.page(2), 1) == errno.EFAULT
    assert space.buf.left == [(space.page(0), space.page(2)), (space.page(3), space.page(8))]


def _gone(space: Space) -> None:
    assert errno_of(space.driver.device.read, space.mm, space.page(2), 1) == errno.EFAULT


def _zap(space: Space) -> None:
    space.mm.madvise(space.page(2), PAGE, mmap.MADV_DONTNEED)


def _zapped(space: Space) -> None:
    space.set(2, b"\0")


def _move(space: Space) -> None:
    moved = space.mm.mremap(space.page(2), PAGE, 2 * PAGE)
    space.gone = True
    assert bytes(moved)[:PAGE] == bytes(space.expected[2 * PAGE : 3 * PAGE])
    space.made.append(moved)


def _protect(space: Space) -> None:
    space.mm.mprotect(space.page(2), PAGE, mmap.PROT_READ)


def _protected(space: Space) -> None:
    assert errno_of(space.driver.device.write, space.mm, space.page(2), b"x") == errno.EPERM


def _read(space: Space) -> None:
    assert space.driver.device.read(space.mm, space.buf.addr, space.buf.size) == bytes(space.expected)


def _write(space: Space) -> None:
    space.driver.device.write(space.mm, space.page(2) + 10, b"device")
    space.expected[2 * PAGE + 10 : 2 * PAGE + 16] = b"device"


def _foreign_zap(space: Space) -> None:
    foreign.madvise(space.page(2), PAGE, mmap.MADV_DONTNEED)
    _zapped(space)
    _is_fenced(space)


def _foreign_unmap(space: Space) -> None:
    foreign.munmap(space.page(2), PAGE)
    space.gone = True
    _is_fenced(space)


def _is_fenced(space: Space) -> None:
    """When the call has returned, whether or not the callback has run."""
    entry = int(space.driver.device.page_table.entries(space.page(2), space.page(3))[0])
    assert not entry & PM_ENTRY_VALID
    space.mm.sync()


def _fork(space: Space) -> None:
    expected = bytes(space.expected)

    def child() -> None:
        lib.pm_inject_clear()
        assert ctypes.string_at(space.buf.addr, space.buf.size) == expected

    assert in_child(child) == 0
    space.mm.sync()


def _clone(space: Space) -> None:
    assert wait_for(raw_clone()) == 0
    space.mm.sync()


def _reported(space: Space) -> None:
    """What is watched by now tells of a change, whatever failed before."""
    told = space.mm.stats()["events"]["CLEAR"]
    foreign.madvise(space.page(5), PAGE, mmap.MADV_DONTNEED)
    space.set(5, b"\0")
    assert space.mm.stats()["events"]["CLEAR"] == told + 1
    assert space.rng is None or not space.rng.valid


OPERATIONS = [
    Operation("mmap", _new()),
    Operation("mmap shared", _new(shared=True)),
    Operation("mmap thp", _new(huge="thp", size=HUGE)),
    Operation("mmap inside a notifier", _new(), _whole),
    Operation("watch", lambda space: space.mm.watch(space.buf.addr, space.page(8)), done=_reported),
    Operation("register", _registered, done=_reported),
    Operation("fault", _fault, _unfaulted, also=frozenset({errno.EBUSY})),
    Operation("snapshot", lambda space: _again(space.rng).snapshot(), _registered),
    Operation("map", _program, _faulted, _reported),
    Operation("device read", _read, done=_reported),
    Operation("device read of what is mapped", _read, _map),
    Operation("device write", _write, done=_reported, also=frozenset({errno.EBUSY})),
    Operation("device write to what is mapped", _write, _map),
    Operation("munmap", _unmap, _map, _unmapped),
    Operation("mprotect", _protect, _map, _protected),
    Operation("madvise", _zap, _map, _zapped),
    Operation("mremap", _move, _map),
    Operation("foreign madvise", _foreign_zap, _map),
    Operation("foreign munmap", _foreign_unmap, _map, _gone),
    Operation("fork", _fork, _map, _reported),
    Operation("raw clone", _clone, _map, _reported),
]


def check_all_is_well(space: Space) -> None:
    """What holds at any time, and after an error too."""
    mm, table = space.mm, space.driver.device.page_table
    eventually(lambda: mm.stats()["active"] == 0)
    stats = mm.stats()
    assert stats["inflight"] == 0
    assert stats["drain_timeouts"] == 0
    assert not mm.errors
    assert not mm.closed
    for at in range(space.buf.addr, space.page(8), PAGE):
        offset = at - space.buf.addr
        if mm.vma_lookup(at) is None:
            assert (offset, space.gone) == (2 * PAGE, True)
        else:
            assert ctypes.string_at(at, PAGE) == space.expected[offset : offset + PAGE]
    assert table.verify(space.buf.addr, space.page(8)) is None
    assert space.driver.device.stats.stale == 0


def attempt(operation: Operation, kind: str, number: int, nth: int) -> bool:
    """One failure of the n-th call; False when there was none."""
    what = f"{kind} {nth} {errno.errorcode[number]}"
    with space() as made:
        operation.prepare(made)
        before = bytes(made.expected)
        with inject(kind, nth, number) as injection:
            refusal = refusal_of(operation.run, made)
        name = errno.errorcode.get(refusal, refusal)
        assert refusal in {0, number} | operation.also, f"{what} gave {name}"
        if refusal:
            assert injection.struck, f"{what}: {name} of itself"
            made.expected[:] = before
            check_all_is_well(made)
            operation.run(made)
        operation.done(made)
        check_all_is_well(made)
        return bool(injection.struck)


def refusal_of(run: Callable[..., object], *args: object) -> int:
    """0 or the errno of an error of the library; any other comes through."""
    try:
        run(*args)
    except pm.MirrorError as error:
        return error.errno or -1
    return 0


def kinds_used(operation: Operation) -> list[str]:
    """The kinds of calls that it makes. The monitor's own are among them, at all times."""
    with space() as made:
        operation.prepare(made)
        before = {kind: lib.pm_sys_calls(getattr(lib, f"PM_SYS_{kind}")) for kind in ERRORS}
        operation.run(made)
        return [
            kind for kind, n in before.items() if lib.pm_sys_calls(getattr(lib, f"PM_SYS_{kind}")) > n
        ] + ["READ", "POLL"]


def number_of_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture(autouse=True)
def features() -> None:
    needs("uffd_events", "pagemap", "event_fork")


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_one_call_that_fails(operation: Operation) -> None:
    fds = number_of_fds()
    for kind in dict.fromkeys(kinds_used(operation)):
        for number in ERRORS[kind]:
            nth = 1
            while attempt(operation, kind, number, nth):
                nth += 1
                assert nth < MOST
    assert number_of_fds() == fds


def test_open() -> None:
    fds = number_of_fds()
    pm.AddressSpace().close()
    refused = 0
    for kind, numbers in ERRORS.items():
        for number in numbers:
            struck, nth = True, 0
            while struck:
                nth += 1
                with inject(kind, nth, number) as injection:
                    opened: list[pm.AddressSpace] = []
                    refusal = refusal_of(lambda opened=opened: opened.append(pm.AddressSpace()))  # type: ignore[misc]
                struck = injection.struck > 0
                assert refusal in (0, number), f"{kind} {nth}"
                refused += refusal != 0
                assert bool(opened) == (refusal == 0)
                for mm in opened:
                    with FaultDriver(mm) as driver:
                        buf = filled(mm, 2)
                        assert driver.device.read(mm, buf.addr, buf.size) == bytes(buf)
                    mm.close()
                assert number_of_fds() == fds
    assert refused


@pytest.mark.parametrize("kind", ["CLOSE", "IOCTL", "WRITE", "READ", "POLL", "PREAD"])
def test_close(kind: str) -> None:
    """It ends whatever fails, and nobody waits for events afterwards."""
    fds = number_of_fds()
    for number in ERRORS[kind]:
        struck, nth = True, 0
        while struck and nth < MOST:
            nth += 1
            mm = pm.AddressSpace()
            driver = FaultDriver(mm)
            buf = filled(mm, 4)
            before = bytes(buf)
            driver.map(buf.addr, buf.addr + buf.size)
            with inject(kind, nth, number) as injection:
                mm.close()
            struck = injection.struck > 0
            assert mm.closed
            Background(foreign.madvise, buf.addr, PAGE, mmap.MADV_DONTNEED).result()
            assert bytes(buf) == bytes(PAGE) + before[PAGE:]
            assert number_of_fds() == fds


@pytest.mark.parametrize("kind", ["READ", "POLL"])
def test_the_monitor_bears_with_many_failures(kind: str) -> None:
    for number in ERRORS[kind]:
        with space() as made:
            _map(made)
            with inject(kind, 1, number, times=50) as injection:
                _foreign_zap(made)
                assert wait_for(raw_clone()) == 0
            assert injection.struck
            check_all_is_well(made)


@pytest.mark.parametrize(
    ("prepare", "run", "kind", "number", "refusal"),
    [
        (_map, _read, "PREAD", errno.EINTR, errno.EINTR),
        (_map, _write, "PREAD", errno.EINTR, errno.EINTR),
        (_unfaulted, _fault, "PREAD", errno.EINTR, errno.EINTR),
        (_unfaulted, _fault, "MADVISE", errno.EAGAIN, errno.EBUSY),
        (_unfaulted, _fault, "MADVISE", errno.EINTR, errno.EBUSY),
        (_unfaulted, _fault, "MADVISE", errno.ENOMEM, errno.ENOMEM),
    ],
)
def test_a_call_that_keeps_failing(
    prepare: Callable[[Space], None], run: Callable[[Space], None], kind: str, number: int, refusal: int
) -> None:
    """No loop goes on for ever, and none is left with half of its work."""
    with space() as made:
        prepare(made)
        with inject(kind, 1, number, times=1 << 40, tid=threading.get_native_id()):
            assert refusal_of(run, made) == refusal
        check_all_is_well(made)
        run(made)
        check_all_is_well(made)


def test_a_reservation_that_cannot_be_cut(mm: pm.AddressSpace) -> None:
    """For huge pages more is reserved than asked for: were the rest not given back it would be lost."""

    def reserved() -> int:
        return sum(vma.size for vma in mm.vmas() if vma.prot == 0 and not vma.file)

    mm.mmap(PAGE)
    before, nth, struck = reserved(), 0, True
    while struck:
        nth += 1
        with inject("MUNMAP", nth, errno.ENOMEM) as injection:
            refusal = errno_of(mm.mmap, 64 * HUGE, huge="thp")
        struck = injection.struck > 0
        assert refusal == (errno.ENOMEM if struck else 0)
        assert reserved() == before
    assert nth > 1
    assert mm.stats()["regions"] == 2
