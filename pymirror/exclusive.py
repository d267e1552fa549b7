# SPDX-License-Identifier: MIT
"""Exclusive access of a device to pages of the process: make_device_exclusive().

For atomics of devices that cannot do them on memory that the CPU uses too. While the device has a page, the
CPU does not: its next touch ends that, after the device's accesses under way, and notifiers get event
EXCLUSIVE. The page itself stays the same; it moves out of the way and back (see docs/device-memory.md).
"""

from __future__ import annotations

import errno
import os
import threading
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from ._shim import ffi, lib
from .affected import PAGE_SIZE
from .arguments import check_mm, integer
from .device_memory import NEEDS, DeviceMemory
from .errors import check, error
from .event import Event
from .migrate import check_handler, check_migration, check_other_userfaultfd, watch_movable
from .mm_base import check_pages

if TYPE_CHECKING:
    from .mm import AddressSpace
    from .pfn import PfnArray

_ARENA_SIZE = 1 << 36
_making = threading.Lock()


class DeviceExclusive:
    """Pages that a device has to itself, until the CPU touches them or ``release()`` gives them back.

    ``pfns`` are HMM pfns, uint64, one a 4 KiB page: what ``page_table.map(sub, seq, start, pfns)`` takes, 0
    for a page that could not be had. map() refuses those that the CPU has touched since: take them again.
    ``held`` counts those that are the device's still. A context manager.
    """

    def __init__(self, mm: AddressSpace, start: int, pfns: PfnArray, owner: Any) -> None:
        self.mm = mm
        self.start = start
        self.pfns = pfns
        self.owner = owner
        self._pid = os.getpid()

    @property
    def end(self) -> int:
        """The address after the last page."""
        return self.start + self.pfns.size * PAGE_SIZE

    @property
    def held(self) -> int:
        """How many of the pages the CPU has not touched since; 0 in a forked child."""
        if self.mm.closed or os.getpid() != self._pid:
            return 0
        return int(np.count_nonzero(exclusive_pfns(self.mm, self.start, self.end)))

    def release(self) -> None:
        """Give the CPU its pages back, with event EXCLUSIVE. Idempotent.

        EAGAIN: another thread's munmap, madvise or fork did not end for 5 s. EDEADLK in a callback, under a
        driver lock and under read_lock().
        """
        mm, moved, arena = self.mm, ffi.new("uint64_t *"), self.mm._exclusive_arena
        if arena is None or not self.held:
            return
        with mm._migrating("DeviceExclusive.release", self.start, self.end, self.owner, Event.EXCLUSIVE):
            native = arena._native
            check(lib.pm_migrate_to_system(mm.native, self.start, self.end, native, moved), "release", mm=mm)

    def __enter__(self) -> DeviceExclusive:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.release()

    def __repr__(self) -> str:
        return f"<DeviceExclusive {self.start:#x}-{self.end:#x}, {self.held} of {self.pfns.size} pages held>"


def make_device_exclusive(mm: AddressSpace, addr: int, owner: Any) -> DeviceExclusive:
    """Take one page, at ``addr``, away from the CPU for the device that ``owner`` names, a Device for one.

    It is faulted for writing first. Event EXCLUSIVE with ``owner`` goes to the notifiers before; what that
    owner has already stays its own, and nobody is told: a driver may call it between read_begin() and
    read_retry(), which are void for that one time. EFAULT: a hole, or memory that may not be written. EBUSY:
    the page cannot be had: it is pinned, of shared memory or a file, or another userfaultfd has it.
    EINVAL; ENOMEM; ESRCH; EDEADLK in a callback, under a driver lock and under read_lock(); FeatureError.
    """
    addr = integer("make_device_exclusive", "addr", addr)
    page = make_device_exclusive_range(mm, addr, addr + PAGE_SIZE, owner)
    if page.pfns[0]:
        return page
    check_other_userfaultfd(mm, "make_device_exclusive", addr, addr + PAGE_SIZE)
    raise error(
        errno.EBUSY,
        "make_device_exclusive: the page cannot be had",
        addr=addr,
        mm=mm,
        hint="private memory of this process's own, which is not pinned",
    )


def make_device_exclusive_range(mm: AddressSpace, start: int, end: int, owner: Any) -> DeviceExclusive:
    """The same for the pages of [start, end), as far as they can be faulted: those not had have a pfn of 0.

    Errors as make_device_exclusive(), of the first page.
    """
    what = "make_device_exclusive"
    check_migration(mm, what, start, end)
    arena = _arena_of(mm, what)
    pfns = exclusive_pfns(mm, start, end)
    if pfns.all() and arena.is_owner(owner, pfns):
        return DeviceExclusive(mm, start, pfns, owner)
    watch_movable(mm, start, end)
    pfns = np.zeros((end - start) // PAGE_SIZE, np.uint64)
    last = ffi.new("uint64_t *", end)
    with arena._serving(mm, what) as native:
        ret = lib.pm_exclusive_fault(native, start, last)
        if ret in (-errno.EINVAL, -errno.ENOMEM):
            ret = -errno.EFAULT
        if ret == 0:
            buffer = ffi.from_buffer("uint64_t[]", pfns)
            with mm._migrating(what, start, int(last[0]), owner, Event.EXCLUSIVE):
                ret = lib.pm_exclusive(native, start, last[0], buffer)
                arena.set_owner(owner, pfns)
            if ret == -errno.EINVAL:
                ret = -errno.EFAULT
    if ret == -errno.EOPNOTSUPP:
        mm.features.require("populate", what)
    if ret == -errno.EBUSY and not pfns.any():
        check_handler(mm, what)
    elif not pfns.any():
        check(ret, what, addr=start, mm=mm)
    return DeviceExclusive(mm, start, pfns, owner)


def exclusive_pfns(mm: AddressSpace, start: int, end: int) -> PfnArray:
    """What devices have to themselves of [start, end) now: HMM pfns, uint64, one a 4 KiB page; 0 elsewhere.

    EINVAL: no interval of whole pages. ESRCH.
    """
    what = "exclusive_pfns"
    check_mm(what, mm)
    mm._check_here(what)
    check_pages(mm, what, start, end)
    pfns = np.zeros((end - start) // PAGE_SIZE, np.uint64)
    arena = mm._exclusive_arena
    if arena is None:
        return pfns
    with arena._pointer:
        if arena.mm is mm:
            ret = lib.pm_exclusive_pfns(arena._native, start, end, ffi.from_buffer("uint64_t[]", pfns))
            check(ret, what, addr=start, mm=mm)
    return pfns


def _arena_of(mm: AddressSpace, what: str) -> ExclusiveArena:
    with _making:
        if mm._exclusive_arena is None:
            for feature in NEEDS[mm.fault_delivery]:
                mm.features.require(feature, what)
            mm._exclusive_arena = ExclusiveArena()
        return mm._exclusive_arena


class ExclusiveArena(DeviceMemory):
    """Where pages are while a device has them to itself: no device's memory. Each page has its owner."""

    _event = Event.EXCLUSIVE

    def __init__(self) -> None:
        super().__init__(None, _ARENA_SIZE)
        # By slot, so that it is of this stay of the page, and bounded by how many there ever were at once.
        self._owners: dict[int, Any] = {}

    def is_owner(self, owner: Any, pfns: PfnArray) -> bool:
        """Whether all these pages are in here for ``owner``."""
        return all(pfn in self._owners and self._owners[pfn] is owner for pfn in pfns.tolist())

    def set_owner(self, owner: Any, pfns: PfnArray) -> None:
        """For whom these pages came; a pfn of 0 is of one that did not."""
        self._owners.update(dict.fromkeys(pfns[pfns != 0].tolist(), owner))

    def _create(self, mm: AddressSpace, made: Any) -> int:
        return int(lib.pm_exclusive_create(mm.native, self.size, made))
