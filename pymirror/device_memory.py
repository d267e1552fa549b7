# SPDX-License-Identifier: MIT
"""DeviceMemory: memory that only a device reaches (MEMORY_DEVICE_PRIVATE), or the CPU too (_COHERENT).

The private kind is an arena in this mm: real pages move into it and leave holes, and a touch of such a hole
by the CPU brings the page home. See docs/device-memory.md.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ._shim import ffi, lib
from .affected import PAGE_SIZE
from .arguments import check_mm, integer, seconds, shown
from .dma.device import DmaDevice
from .errors import MirrorError, check
from .event import Event
from .lock import not_in_callback, not_under_driver_lock
from .mm_base import check_pages
from .walk import check_interval

if TYPE_CHECKING:
    from .device import Device
    from .mm import AddressSpace

FAULT_AROUND = (4 << 10, 64 << 10, 2 << 20)
NEEDS = {
    "thread": ("uffd_kernel", "uffd_events", "pagemap"),
    "inline": ("sigbus", "uffd_events", "pagemap"),
}


class DeviceMemory:
    """Memory of ``dev`` for at most ``size`` bytes, rounded up to pages.

    ``kind="private"``: only the device reaches it. ``"coherent"``: the CPU reaches it as well, without a
    fault: pages that migrate are exchanged for others (new PFNs) and stay mapped; needs the feature ``pfn``.

    Pages get there by migrate_to_device(), and home by migrate_to_system(), by a CPU fault, and when it or
    their address space is closed. It serves one address space at a time, from the first migration on.
    ``owner`` is what MIGRATE events carry (dev_pagemap.owner), by default the device. A CPU fault brings
    home the page, and what else is in device memory of the aligned ``fault_around`` bytes: 4 KiB, 64 KiB or
    2 MiB; a whole huge page always comes home whole.

    ``timeslice`` is for how many seconds pages stay at least once they have migrated (drm_gpusvm's
    timeslice_ms), at most 1: a CPU fault waits that long, a call and an eviction do not.

    Close it, or use it as a context manager. EINVAL.
    """

    _event = Event.MIGRATE

    def __init__(
        self,
        dev: Device | None,
        size: int,
        *,
        owner: Any = None,
        fault_around: int = FAULT_AROUND[0],
        kind: str = "private",
        timeslice: float = 0.0,
    ) -> None:
        if dev is not None and not isinstance(dev, DmaDevice):
            raise _einval(f"dev={shown(dev)}", "give the Device that the memory is on")
        size = integer("DeviceMemory", "size", size)
        if not 0 < size < 1 << 46:
            raise _einval(f"size {size}", "give bytes, more than 0 and less than 64 TiB")
        if fault_around not in FAULT_AROUND:
            raise _einval(f"fault_around={shown(fault_around)}", f"give one of {FAULT_AROUND}")
        if kind not in ("private", "coherent"):
            raise _einval(f"kind={shown(kind)}", 'give "private" or "coherent"')
        if not 0 <= seconds("DeviceMemory", "timeslice", timeslice) <= 1:
            raise _einval(f"timeslice={timeslice!r}", "give seconds, at most 1: Python waits with its lock")
        self.kind = kind
        self.timeslice = timeslice
        self.device = dev
        self.size = -(-size // PAGE_SIZE) * PAGE_SIZE
        self.owner = dev if owner is None else owner
        self.fault_around = fault_around
        self.closed = False
        self._mm: AddressSpace | None = None
        self._native: Any = ffi.NULL
        # Taken before the mmap lock, and held while callbacks run; the other one protects the pointer alone.
        self._lock = threading.RLock()
        self._pointer = threading.Lock()
        self._pid = os.getpid()

    @property
    def mm(self) -> AddressSpace | None:
        """The address space that it serves now."""
        return self._mm

    @property
    def used(self) -> int:
        """Bytes of it that pages are in."""
        if os.getpid() != self._pid:
            return 0
        with self._pointer:
            return int(lib.pm_devmem_used(self._native)) * PAGE_SIZE if self._native else 0

    def populate(self, start: int, end: int) -> None:
        """Give the pages of [start, end) that are in this memory and were never touched zeroed memory.

        Start and end are user addresses. It is what alloc_page() and clear_highpage() of a driver do that
        migrates. EINVAL; ENOMEM; ESRCH in a forked child; EDEADLK in a callback and under a driver lock.
        """
        what = "DeviceMemory.populate"
        not_in_callback(what)
        not_under_driver_lock(what)
        with self._lock:
            self._check(what)
            if (mm := self._mm) is not None:
                check_pages(mm, what, start, end)
                check(lib.pm_devmem_populate(self._native, start, end), what, addr=start, mm=mm)

    @property
    def pfns(self) -> range:
        """The PFNs of its pages, of a private memory that serves an address space: else an empty range."""
        with self._pointer:
            if not self._native or os.getpid() != self._pid or self.kind != "private":
                return range(0)
            first = ffi.new("uint64_t[2]")
            check(lib.pm_devmem_range(self._native, first, first + 1), "DeviceMemory.pfns")
            return range(first[0], first[0] + first[1])

    def holds(self, start: int, end: int) -> npt.NDArray[np.bool_]:
        """Which pages of [start, end), user addresses, are in this memory now: bool, one a 4 KiB page.

        EINVAL; ESRCH in a forked child.
        """
        what = "DeviceMemory.holds"
        self._check(what)
        start, end = check_interval(what, start, end)
        ret = np.zeros((end - start) // PAGE_SIZE, np.uint8)
        with self._pointer:
            if (mm := self._mm) is not None:
                buffer = ffi.from_buffer("uint8_t[]", ret)
                check(lib.pm_devmem_holds(self._native, start, ret.size, buffer), what, addr=start, mm=mm)
        return ret.astype(np.bool_)

    def close(self) -> None:
        """Bring all its pages home, and give the memory back. Idempotent, and quiet in a forked child.

        EDEADLK in a callback, under a driver lock and under read_lock(). EAGAIN, ENOMEM: as
        migrate_to_system(); it is open still.
        """
        if self.closed or os.getpid() != self._pid:
            return
        not_in_callback("DeviceMemory.close")
        not_under_driver_lock("DeviceMemory.close")
        if (mm := self._mm) is not None:
            mm._mmap_lock.check_free("DeviceMemory.close")
        with self._lock:
            if not self.closed:
                self._leave()
                self.closed = True

    def __enter__(self) -> DeviceMemory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{self.used >> 10} of {self.size >> 10} KiB used"
        return f"<DeviceMemory of {self.device!r}, {state}>"

    @contextmanager
    def _serving(self, mm: AddressSpace, what: str) -> Iterator[Any]:
        """The native half, for mm, which no other thread closes meanwhile."""
        with self._lock:
            self._check(what)
            if self._mm is not mm:
                self._move_to(mm, what)
            yield self._native

    def _check(self, what: str) -> None:
        if os.getpid() != self._pid:
            raise MirrorError(
                errno.ESRCH,
                f"{what}: {type(self).__name__} belongs to process {self._pid}",
                hint="open a new AddressSpace in this process, and make device memory for it",
            )
        if self.closed:
            raise _einval("it is closed", "make new device memory", what)

    def _move_to(self, mm: AddressSpace, what: str) -> None:
        for feature in NEEDS[mm.fault_delivery]:
            mm.features.require(feature, what)
        if self.kind == "coherent":
            for feature in ("pfn", "move"):
                mm.features.require(feature, what)
        if self.used:
            raise MirrorError(
                errno.EXDEV,
                f"{what}: {self!r} has pages of another address space",
                hint="bring them home first, or use device memory of its own for each",
            )
        self._leave()
        # It destroys what Ctrl-C does not let get any further.
        made = ffi.gc(ffi.new("pm_devmem **"), _destroy)
        check(self._create(mm, made), what, hint="free memory, or ulimit -v")
        if self.kind == "coherent" and (ret := lib.pm_devmem_coherent(made[0])):
            ffi.release(made)
            check(ret, what, hint="fewer coherent memories of one address space")
        check(lib.pm_devmem_timeslice(made[0], int(self.timeslice * 1e9)), what)
        check(lib.pm_devmem_fault_around(made[0], self.fault_around), what)
        mm._device_memory.add(self)
        self._native, self._mm, made[0] = made[0], mm, ffi.NULL

    def _create(self, mm: AddressSpace, made: Any) -> int:
        return int(lib.pm_devmem_create(mm.native, self.size, id(self.owner), made))

    def _leave(self) -> None:
        """Have no part in an address space any more; one that is closed has its pages back already."""
        if (mm := self._mm) is None:
            return
        while (span := self._oldest()) is not None:
            moved = ffi.new("uint64_t *")
            with mm._migrating("DeviceMemory.close", *span, self.owner, self._event):
                ret = lib.pm_migrate_to_system(mm.native, *span, self._native, moved)
            check(ret, "DeviceMemory.close", addr=span[0], mm=mm)
        with self._pointer:
            # Before it is gone: Ctrl-C may strike right after the call.
            native, self._native, self._mm = self._native, ffi.NULL, None
            if ret := lib.pm_devmem_destroy(native):
                self._native, self._mm = native, mm
            check(ret, "DeviceMemory.close")
        mm._device_memory.discard(self)

    def _leave_closed(self) -> None:
        with self._lock:
            self._leave()

    def _oldest(self) -> tuple[int, int] | None:
        """Where the pages are that were moved in least recently, None if it is empty or the mm closed."""
        span = ffi.new("uint64_t[2]")
        ret = lib.pm_devmem_next(self._native, span, span + 1)
        if ret in (-errno.ENOENT, -errno.ESRCH):
            return None
        check(ret, "DeviceMemory")
        return span[0], span[1]


def _destroy(made: Any, null: Any = ffi.NULL, destroy: Any = lib.pm_devmem_destroy) -> None:
    if made[0] != null:
        destroy(made[0])


def _einval(wrong: str, hint: str, what: str = "DeviceMemory") -> MirrorError:
    return MirrorError(errno.EINVAL, f"{what}: {wrong}", hint=hint)


def coherent_pages(mm: AddressSpace, start: int, end: int) -> npt.NDArray[np.bool_]:
    """Which pages of [start, end) are in coherent device memory: bool, one a 4 KiB page.

    It is is_device_coherent_page(). EINVAL: no interval of whole pages. ESRCH.
    """
    what = "coherent_pages"
    check_mm(what, mm)
    mm._check_here(what)
    check_pages(mm, what, start, end)
    ret = np.zeros((end - start) // PAGE_SIZE, np.uint8)
    buffer = ffi.from_buffer("uint8_t[]", ret)
    check(lib.pm_coherent_pages(mm.native, ffi.NULL, start, ret.size, buffer), what, addr=start, mm=mm)
    return ret.astype(np.bool_)
