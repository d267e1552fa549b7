# SPDX-License-Identifier: MIT
"""A device's page table: programmed by the driver, fenced by native code, cleared by the callback."""

from __future__ import annotations

import errno
import sys
import time
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from . import trace
from ._shim import ffi, lib
from .arguments import check_is, integer
from .errors import MirrorError, check
from .event import native_end
from .hmm_range import Range
from .lock import not_in_callback
from .notifier import IntervalNotifier
from .walk import PAGE_SHIFT, PAGE_SIZE, USER_END, check_covers, check_interval, check_pfns

if TYPE_CHECKING:
    from .mm import AddressSpace
    from .pfn import PfnArray

MAPPINGS_REMEMBERED = 256

#: Bits of an entry; the PFN is below them. A fenced one has the sequence number in place of the PFN.
PM_ENTRY_VALID = 1 << lib.PM_ENTRY_VALID_BIT
PM_ENTRY_WRITE = 1 << lib.PM_ENTRY_WRITE_BIT
PM_ENTRY_FENCED = 1 << lib.PM_ENTRY_FENCED_BIT


class Mapping(NamedTuple):
    """Who programmed [start, end): file and line of the caller, sequence number, time.monotonic()."""

    start: int
    end: int
    seq: int
    when: float
    file: str
    line: int


class PageTable:
    """Device entries by virtual address, a uint64 for each 4 KiB page, of one address space at a time.

    An invalidation fences entries: the device cannot use them any more, whatever the driver does. The
    callback clears them. So a driver that forgets to is found out (StaleAccessError), not obeyed.
    """

    def __init__(self) -> None:
        table = ffi.new("pm_table **")
        check(lib.pm_table_create(table), "PageTable")
        self._native = ffi.gc(table[0], lib.pm_table_put)
        self._mappings: deque[Mapping] = deque(maxlen=MAPPINGS_REMEMBERED)
        self._mm: weakref.ref[AddressSpace] | None = None

    def __repr__(self) -> str:
        mm = self.mm
        if mm is None:
            return "<PageTable, empty>"
        try:
            stats = self.stats()
        except MirrorError:
            return f"<PageTable of {mm!r}>"
        fenced = f", {stats['fenced']:,} fenced" if stats["fenced"] else ""
        return f"<PageTable of {mm!r}, {stats['entries']:,} entries{fenced}>"

    @property
    def native(self) -> Any:
        """The ``pm_table *``."""
        return self._native

    @property
    def mm(self) -> AddressSpace | None:
        """The address space whose entries it has, or last had."""
        return self._mm() if self._mm is not None else None

    def map(
        self,
        target: Range | IntervalNotifier,
        seq: int,
        start: int | None = None,
        pfns: PfnArray | None = None,
    ) -> bool:
        """Program what a walk found, under the driver's lock. False: it stands no more, nothing is done.

        It does not when the sequence has moved, or when a page whose pfn is of device memory has left there
        since: then go again from the walk, or from make_device_exclusive().

        ``map(rng, seq)`` takes the pfns of a range; ``map(sub, seq, start, pfns)`` those of hmm_range_fault()
        under an IntervalNotifier, from `start` on, one a 4 KiB page. Pages without HMM_PFN_VALID are left
        out. The check and the programming are one step under the native device lock. Memory of a file is
        watched from here on.

        EXDEV: the table has entries of another address space. ESRCH: it was made before a fork, in the
        parent. EINVAL: not the memory of the target. EPERM without the notifier's ``update_lock``. EDEADLK in
        a callback.
        """
        not_in_callback("PageTable.map")
        if isinstance(target, Range):
            start, pfns, sub, buffer = target.start, target._pages, target.sub, target._walk.pfns
        else:
            check_is("PageTable.map", "target", target, "update_lock", "a Range or an IntervalNotifier")
            if start is None or pfns is None:
                raise MirrorError(
                    errno.EINVAL,
                    "PageTable.map: start and pfns are missing, which go with an IntervalNotifier",
                    addr=target.start,
                    hint="map(sub, seq, start, pfns), or map(rng, seq) of a Range",
                )
            check_pfns("PageTable.map", pfns, pfns.size)
            sub, buffer = target.native, ffi.from_buffer("uint64_t[]", pfns)
        if sub is None:
            raise MirrorError(
                errno.EINVAL,
                f"PageTable.map: {target!r} was never registered",
                addr=target.start,
                hint="register() it, and fault() it for a sequence number",
            )
        n = pfns.size
        end = start + (n << PAGE_SHIFT)
        check_interval("PageTable.map", start, end, mm=target.mm)
        if isinstance(target, IntervalNotifier):
            check_covers(target, "PageTable.map", start, end)
            target._check_lock("PageTable.map")
        if target.read_retry(seq):
            return _refused(target, seq, start, end)
        target.mm.watch(start, end, files=True)
        ret = lib.pm_table_map(self._native, sub, seq, start, n, buffer)
        if ret == -errno.ESRCH and lib.pm_mm_alive(target.mm.native) == 1:
            raise MirrorError(
                errno.ESRCH,
                "PageTable.map: the page table is that of the process which this one was forked from",
                hint="make a new Device in the child",
            )
        if ret in (-errno.EBUSY, -errno.ESRCH):
            return _refused(target, seq, start, end)
        check(ret, "PageTable.map", addr=start, mm=target.mm)
        self._remember(target.mm, start, end, seq)
        return True

    def clear(self, start: int, end: int) -> int:
        """Drop the entries of [start, end), bytes, ``end`` up to 1 << 64. Returns how many. For callbacks."""
        start, end = _ints("PageTable.clear", start, end)
        if end <= start:
            return 0
        return check(lib.pm_table_clear(self._native, start, native_end(end)), "PageTable.clear")

    def entries(self, start: int, end: int) -> PfnArray:
        """The raw entries of [start, end): uint64, one a 4 KiB page, 0 where there is none.

        For callbacks too. EINVAL: not page-aligned, empty, reversed.
        """
        start, end = check_interval("PageTable.entries", start, end, mm=self.mm)
        ret = np.zeros((end - start) >> PAGE_SHIFT, np.uint64)
        buffer = ffi.from_buffer("uint64_t[]", ret)
        check(lib.pm_table_read(self._native, start, ret.size, buffer), "PageTable.entries")
        return ret

    def next(self, start: int = 0, end: int = USER_END) -> int | None:
        """The address of the first entry in [start, end), fenced or not; None without one."""
        start, end = _ints("PageTable.next", start, end)
        if end <= start:
            return None
        ret = ffi.new("uint64_t *")
        err = lib.pm_table_next(self._native, start, native_end(end), ret)
        if err == -errno.ENOENT:
            return None
        check(err, "PageTable.next")
        return int(ret[0])

    def verify(self, start: int, end: int) -> tuple[int, int] | None:
        """Compare entries with the CPU page table: the first run that changed unseen, or None.

        The run is [start, end), bytes; it is invalidated by nobody yet: fault or access it, or
        mm.invalidate() it. EINVAL; ESRCH: the mm of the entries is closed; EDEADLK in a callback.
        """
        not_in_callback("PageTable.verify")
        start, end = check_interval("PageTable.verify", start, end, mm=self.mm)
        changed = ffi.new("uint64_t[2]")
        err = lib.pm_table_verify(self._native, start, end, changed, changed + 1)
        if err == -errno.ESTALE:
            return int(changed[0]), int(changed[1])
        check(err, "PageTable.verify")
        return None

    def stats(self) -> dict[str, int]:
        """Counts: what is in the table, and what the device's TLB did since the table was made.

        ``entries`` programmed, ``fenced`` ones among them, ``bytes`` of memory that the table takes;
        ``tlb_hits`` and ``tlb_misses`` are pages that the device translated, with the 64 translations that it
        caches, ``tlb_flushed`` cached ones that an invalidation or ``clear()`` took away.
        """
        ret = ffi.new("struct pm_table_stats *")
        check(lib.pm_table_stats(self._native, ret), "PageTable.stats")
        names = ("entries", "fenced", "bytes", "tlb_hits", "tlb_misses", "tlb_flushed")
        return {name: getattr(ret, name) for name in names}

    def who_mapped(self, addr: int) -> Mapping | None:
        """The last map() over the address, if it is not too long ago."""
        addr = integer("PageTable.who_mapped", "addr", addr)
        return next((one for one in reversed(list(self._mappings)) if one.start <= addr < one.end), None)

    def check_mm(self, mm: AddressSpace, what: str) -> None:
        """EXDEV when the table has entries of another address space that is open."""
        bound = self.mm
        if bound is None or bound is mm or bound.closed or not self.stats()["entries"]:
            return
        first = self.next()
        where = f", the first at {first:#x}" if first is not None else ""
        raise MirrorError(
            errno.EXDEV,
            f"{what}: the device's page table has entries of another address space{where}",
            addr=first,
            hint="a device follows one address space at a time: page_table.clear(0, 1 << 64) first",
        )

    def access(self, mm: AddressSpace, access: Any) -> int:
        """pm_access(), for Device: 0 or a negative errno. An mm after a closed one finds nothing there."""
        ret = int(lib.pm_access(self._native, access))
        if ret != -errno.ESRCH or lib.pm_mm_alive(mm.native) != 1 or self.mm is mm:
            return ret
        access.fault = lib.PM_FAULT_MISSING
        access.fault_start = access.addr & ~(PAGE_SIZE - 1)
        access.fault_end = access.fault_start + PAGE_SIZE
        return -errno.EFAULT

    def _atomic(self, mm: AddressSpace, atomic: Any) -> int:
        """pm_access_atomic(), for Device: 0 or a negative errno. As access()."""
        ret = int(lib.pm_access_atomic(self._native, atomic))
        if ret != -errno.ESRCH or lib.pm_mm_alive(mm.native) != 1 or self.mm is mm:
            return ret
        return -errno.EFAULT

    def _remember(self, mm: AddressSpace, start: int, end: int, seq: int) -> None:
        if self._mm is None or self._mm() is not mm:
            self._mm = weakref.ref(mm)
        frame = sys._getframe(2)
        self._mappings.append(
            Mapping(start, end, seq, time.monotonic(), frame.f_code.co_filename, frame.f_lineno)
        )


def _refused(target: Range | IntervalNotifier, seq: int, start: int, end: int) -> bool:
    trace.instant(trace.Track.RETRY, "PageTable.map: invalidated meanwhile", target.mm, start, end, seq=seq)
    return False


def _ints(what: str, start: int, end: int) -> tuple[int, int]:
    """Addresses below 1 << 64, not in order necessarily."""
    start, end = integer(what, "start", start), integer(what, "end", end)
    if start >= 0 and end >= 0 and (start < 1 << 64 or end <= start):
        return start, end
    raise MirrorError(
        errno.EINVAL,
        f"{what}: [{start:#x}, {end:#x}) is not made of addresses",
        addr=start,
        hint="give bytes from 0 to 1 << 64",
    )
