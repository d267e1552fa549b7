"""Operations whose system calls are made to fail, and what must hold whatever failed."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

from mirroring import FAULT, PAGE, WRITE, FaultDriver, filled
from racing import eventually, in_child, raw_clone, wait_for
from seams import errno_of, foreign

import pymirror as pm
from pymirror._shim import lib
from pymirror.page_table import PM_ENTRY_VALID

HUGE = 2 << 20
STRUCK, MISSED = 80, 81

#: What each kind of call may fail with: what its manual names, but for what only a wrong caller sees (EBADF)
#: and what says that the work is done or cannot be (EEXIST, ENOENT, ESRCH), which would be a lie here.
ERRORS = {
    "OPEN": [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR],
    "CLOSE": [errno.EINTR, errno.EIO],
    "READ": [errno.EINTR, errno.EAGAIN],
    "PREAD": [errno.EINTR, errno.ENOMEM, errno.EIO],
    "IOCTL": [errno.ENOMEM, errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.EINVAL, errno.EFAULT],
    "POLL": [errno.EINTR, errno.ENOMEM],
    "MMAP": [errno.ENOMEM, errno.EAGAIN, errno.ENFILE],
    "MUNMAP": [errno.ENOMEM],
    "MPROTECT": [errno.ENOMEM, errno.EACCES],
    "MADVISE": [errno.ENOMEM, errno.EAGAIN, errno.EINTR, errno.EIO],
    "MREMAP": [errno.ENOMEM, errno.EAGAIN],
    "USERFAULTFD": [errno.EMFILE, errno.ENFILE, errno.ENOMEM],
    "TIMERFD": [errno.EMFILE, errno.ENFILE, errno.ENOMEM],
    "MEMFD": [errno.EMFILE, errno.ENFILE, errno.ENOMEM],
    "FTRUNCATE": [errno.EINTR, errno.EIO],
    "VM_READV": [errno.EINTR, errno.ENOMEM],
    "VM_WRITEV": [errno.EINTR, errno.ENOMEM],
    "THREAD": [errno.EAGAIN],
    "MALLOC": [errno.ENOMEM],
    "WRITE": [errno.EAGAIN, errno.EINTR],
    "MINCORE": [errno.EAGAIN, errno.ENOMEM],
    "PWRITE": [errno.EINTR, errno.EIO],
    "URING_SETUP": [errno.EMFILE, errno.ENFILE, errno.ENOMEM],
    "URING_REGISTER": [errno.ENOMEM, errno.EINTR, errno.EAGAIN],
    "URING_ENTER": [errno.EINTR, errno.ENOMEM, errno.EAGAIN, errno.EBUSY],
    "SIGACTION": [errno.EINVAL],
}


#: All errors at each call; else one, and each of them at one call or another of the many operations.
EVERY_ERROR = os.environ.get("PYMIRROR_FAULTS") == "all"


def errors_at(name: str, kind: str, nth: int, but: frozenset[int] = frozenset()) -> list[int]:
    """What the nth call of that kind is made to fail with in the operation."""
    numbers = [number for number in ERRORS[kind] if number not in but]
    if EVERY_ERROR:
        return numbers
    return [numbers[(zlib.crc32(name.encode()) + nth) % len(numbers)]]


def apart(kind: str, attempt: Callable[[], bool]) -> bool:
    """An attempt that leaves memory mapped, as munmap was refused, is made in a child."""
    if kind != "MUNMAP":
        return attempt()

    def child() -> None:
        os._exit(STRUCK if attempt() else MISSED)

    status = os.waitstatus_to_exitcode(in_child(child))
    assert status in (STRUCK, MISSED)
    return status == STRUCK


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

    def books(self) -> None:
        """What more must hold, of what is in use here."""

    def set(self, page: int, content: bytes, pages: int = 1) -> None:
        self.expected[page * PAGE : (page + pages) * PAGE] = content * (PAGE * pages // len(content))


@contextmanager
def space() -> Iterator[Space]:
    with pm.AddressSpace() as mm:
        with FaultDriver(mm) as driver:
            buf = filled(mm, 8)
            yield Space(mm, driver, buf, bytearray(bytes(buf)))
        assert not mm.errors


@dataclass(frozen=True)
class Operation:
    """``run`` is made to fail. ``prepare`` comes before it, ``done`` checks its success.

    ``also``: errors that it may give besides that of the call that failed. ``truths``: errors of ioctl that
    say how memory is, which it believes.
    """

    name: str
    run: Callable[[Space], object]
    prepare: Callable[[Space], object] = lambda space: None
    done: Callable[[Space], object] = lambda space: None
    also: frozenset[int] = frozenset()
    truths: frozenset[int] = frozenset()
    opens: Callable[[], AbstractContextManager[Space]] = space

    def errors_at(self, kind: str, nth: int) -> list[int]:
        return errors_at(self.name, kind, nth, self.truths if kind == "IOCTL" else frozenset())


def map_all(space: Space) -> None:
    space.driver.map(space.buf.addr, space.page(8), WRITE)


def registered(space: Space) -> None:
    space.rng = space.range()
    space.rng.register()


def unfaulted(space: Space) -> None:
    space.mm.madvise(space.buf.addr, 8 * PAGE, mmap.MADV_DONTNEED)
    space.set(0, b"\0", 8)
    registered(space)


def _faulted(space: Space) -> None:
    registered(space)
    assert space.rng is not None
    space.rng.fault()


def _again(rng: pm.Range | None) -> pm.Range:
    """A range may have been invalidated by an attempt that failed."""
    assert rng is not None
    rng.wait_until_valid()
    return rng


def fault(space: Space) -> None:
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


def unmap(space: Space) -> None:
    space.mm.munmap(space.page(2), PAGE)
    space.gone = True


def is_anybodys(space: Space) -> bool:
    """What was page 2 may have been given to another thread by now (the sanitizer's own, for one)."""
    return space.gone and space.mm.vma_lookup(space.page(2)) is not None


def unmapped(space: Space) -> None:
    gone(space)
    assert space.buf.left == [(space.page(0), space.page(2)), (space.page(3), space.page(8))]


def gone(space: Space) -> None:
    code = errno_of(space.driver.device.read, space.mm, space.page(2), 1)
    assert code == errno.EFAULT or is_anybodys(space)


def zap(space: Space) -> None:
    space.mm.madvise(space.page(2), PAGE, mmap.MADV_DONTNEED)


def zapped(space: Space) -> None:
    space.set(2, b"\0")


def move(space: Space) -> None:
    moved = space.mm.mremap(space.page(2), PAGE, 2 * PAGE)
    space.gone = True
    assert bytes(moved)[:PAGE] == bytes(space.expected[2 * PAGE : 3 * PAGE])
    space.made.append(moved)


def protect(space: Space) -> None:
    space.mm.mprotect(space.page(2), PAGE, mmap.PROT_READ)


def protected(space: Space) -> None:
    assert errno_of(space.driver.device.write, space.mm, space.page(2), b"x") == errno.EPERM


def device_read(space: Space) -> None:
    assert space.driver.device.read(space.mm, space.buf.addr, space.buf.size) == bytes(space.expected)


def device_write(space: Space) -> None:
    space.driver.device.write(space.mm, space.page(2) + 10, b"device")
    space.expected[2 * PAGE + 10 : 2 * PAGE + 16] = b"device"


def foreign_zap(space: Space) -> None:
    foreign.madvise(space.page(2), PAGE, mmap.MADV_DONTNEED)
    zapped(space)
    _is_fenced(space)


def foreign_unmap(space: Space) -> None:
    foreign.munmap(space.page(2), PAGE)
    space.gone = True
    _is_fenced(space)


def _is_fenced(space: Space) -> None:
    """When the call has returned, whether or not the callback has run."""
    entry = int(space.driver.device.page_table.entries(space.page(2), space.page(3))[0])
    assert not entry & PM_ENTRY_VALID
    space.mm.sync()


def fork(space: Space) -> None:
    expected = bytes(space.expected)

    def child() -> None:
        lib.pm_inject_clear()
        assert ctypes.string_at(space.buf.addr, space.buf.size) == expected

    assert in_child(child) == 0
    space.mm.sync()


def clone(space: Space) -> None:
    assert wait_for(raw_clone()) == 0
    space.mm.sync()


def reported(space: Space) -> None:
    """What is watched by now tells of a change, whatever failed before."""
    told = space.mm.stats()["events"]["CLEAR"]
    foreign.madvise(space.page(5), PAGE, mmap.MADV_DONTNEED)
    space.set(5, b"\0")
    assert space.mm.stats()["events"]["CLEAR"] == told + 1
    assert space.rng is None or not space.rng.valid


def _unwatched(space: Space) -> None:
    space.made.append(foreign.mmap(0, PAGE))


def _watch(space: Space) -> None:
    space.mm.watch(space.made[0], space.made[0] + PAGE)


def _watched(space: Space) -> None:
    told = space.mm.stats()["events"]["UNMAP"]
    foreign.munmap(space.made[0], PAGE)
    assert space.mm.stats()["events"]["UNMAP"] == told + 1


def _pin(space: Space) -> None:
    """All that is done with pins. What is written is written again when it failed."""
    with pm.pin_user_pages(space.mm, space.page(1), 4) as pin:
        assert pin.read() == bytes(space.expected[PAGE : 5 * PAGE])
        pin.write(PAGE + 10, bytes(space.expected[2 * PAGE + 10 : 3 * PAGE + 20]))
        pm.unpin_user_pages(pin)


def _unpinned(space: Space) -> None:
    stats = space.mm.stats()
    assert (stats["pins"], stats["pin_slots"]) == (0, 0)


def _zero_pages(space: Space) -> None:
    unfaulted(space)
    space.driver.map(space.buf.addr, space.page(8), FAULT)


OPERATIONS = [
    Operation("mmap", _new()),
    Operation("mmap shared", _new(shared=True)),
    Operation("mmap thp", _new(huge="thp", size=HUGE)),
    Operation("mmap inside a notifier", _new(), _whole),
    Operation("watch", _watch, _unwatched, _watched, truths=frozenset({errno.EBUSY, errno.EINVAL})),
    Operation("register", registered, done=reported),
    Operation("fault", fault, unfaulted, also=frozenset({errno.EBUSY})),
    Operation("snapshot", lambda space: _again(space.rng).snapshot(), registered),
    Operation("map", _program, _faulted, reported),
    Operation("device read", device_read, done=reported),
    Operation("device read of what is mapped", device_read, map_all),
    Operation("device write", device_write, done=reported, also=frozenset({errno.EBUSY})),
    Operation("device write to what is mapped", device_write, map_all),
    Operation("munmap", unmap, map_all, unmapped),
    Operation("mprotect", protect, map_all, protected),
    Operation("madvise", zap, map_all, zapped),
    Operation("mremap", move, map_all),
    Operation("foreign madvise", foreign_zap, map_all),
    Operation("foreign munmap", foreign_unmap, map_all, gone),
    Operation("fork", fork, map_all, reported),
    Operation("pin", _pin, done=_unpinned),
    Operation("pin of what is mapped", _pin, map_all, _unpinned),
    Operation("pin of shared pages", _pin, _zero_pages, _unpinned),
    Operation("raw clone", clone, map_all, reported),
]


def check_all_is_well(space: Space) -> None:
    """What holds at any time, and after an error too."""
    mm, table = space.mm, space.driver.device.page_table
    eventually(lambda: mm.stats()["active"] == 0)
    stats = mm.stats()
    assert stats["inflight"] == 0
    assert stats["pins"] == stats["pin_slots"] == 0
    assert stats["drain_timeouts"] == 0
    assert not mm.errors
    assert not mm.closed
    for at in range(space.buf.addr, space.page(8), PAGE):
        offset = at - space.buf.addr
        if space.gone and offset == 2 * PAGE:
            continue
        assert mm.vma_lookup(at) is not None
        assert ctypes.string_at(at, PAGE) == space.expected[offset : offset + PAGE]
    assert table.verify(space.buf.addr, space.page(8)) is None
    space.books()
    assert space.driver.device.stats.stale == 0
