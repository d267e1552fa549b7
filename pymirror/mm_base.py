# SPDX-License-Identifier: MIT
"""What operations on an mm stand on: its native half, lock and vmas, and the bracket of an invalidation."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from typing import TYPE_CHECKING, Any, TypeVar, cast

from . import trace
from ._shim import ffi, lib
from .adopt import Adoptions
from .affected import PAGE_SIZE, USER_END, Interval, invalid
from .arguments import integer, shown
from .errors import HasVmas, MirrorError, check
from .event import WHOLE_MM_END, Event, Guarantee, MmuNotifierRange, native_end
from .lock import MmapLock, not_in_callback, not_under_driver_lock
from .pin_registry import PinRegistry
from .region import RegionMap
from .vma import Vma, find_vma, hugetlb_vma, walk_vmas

if TYPE_CHECKING:
    from .device_memory import DeviceMemory
    from .exclusive import ExclusiveArena
    from .mm import AddressSpace
    from .notifier import NotifierSet


_E = TypeVar("_E", bound=Enum)


class MmBase:
    """The part of AddressSpace that looks at memory and tells notifiers of changes."""

    native: Any
    notifiers: NotifierSet
    pid: int
    _mmap_lock: MmapLock
    _regions: RegionMap
    _adoptions: Adoptions
    _pins: PinRegistry
    _device_memory: set[DeviceMemory]
    _exclusive_arena: ExclusiveArena | None
    _closed: bool = True  # until it is open
    _closing: bool

    @contextmanager
    def read_lock(self, timeout: float | None = None) -> Iterator[None]:
        """Hold the mmap lock for reading (mmap_read_lock()): no operation changes the memory map meanwhile.

        ESRCH once the mm is being torn down; close() waits for who holds it. ETIMEDOUT after ``timeout``
        seconds (None: never). EDEADLK in a callback and under a driver lock: the order is mmap lock, then
        driver lock.
        """
        self._check_here("read_lock")
        with self._mmap_lock.read("read_lock", timeout):
            yield

    def vmas(self, start: int = 0, end: int | None = None) -> Iterator[Vma]:
        """The vmas that overlap [start, end), in order. Hold read_lock() for a consistent picture.

        ESRCH; EDEADLK in a callback.
        """
        self._check("vmas")
        start, end = integer("vmas", "start", start), USER_END if end is None else integer("vmas", "end", end)
        return self._walk(start, end)

    def find_vma(self, addr: int) -> Vma | None:
        """The vma that holds addr, or the first above it, or None (find_vma()).

        ESRCH; EDEADLK in a callback.
        """
        self._check("find_vma")
        addr = integer("find_vma", "addr", addr)
        return find_vma(self.native, addr) if 0 <= addr < USER_END else None

    def vma_lookup(self, addr: int) -> Vma | None:
        """The vma that holds addr, or None (vma_lookup()). ESRCH; EDEADLK in a callback."""
        vma = self.find_vma(addr)
        return vma if vma is not None and addr in vma else None

    @contextmanager
    def invalidate(
        self,
        start: int,
        end: int,
        event: Event = Event.CLEAR,
        *,
        owner: Any = None,
        blockable: bool = True,
        guarantee: Guarantee = Guarantee.BEFORE,
    ) -> Iterator[MmuNotifierRange]:
        """Invalidate [start, end) around a body that makes the change (mmu_notifier_invalidate_range_*).

        On entry device entries are fenced and the callbacks have run in this thread; read_begin() waits
        until the exit. ``end`` up to 1 << 64. With ``blockable`` false a callback may refuse: EAGAIN, and
        the body does not run. EINVAL; ESRCH; EDEADLK in a callback and under a driver lock.
        """
        self._check("invalidate")
        not_under_driver_lock("invalidate")
        start, end = check_pages(self, "invalidate", start, end)
        what, how = (
            one_of("invalidate: event", Event, event),
            one_of("invalidate: guarantee", Guarantee, guarantee),
        )
        with self._invalidation(start, end, what, owner, blockable, how) as change:
            yield change

    def watch(self, start: int, end: int, files: bool = False) -> int:
        """Have the kernel report foreign munmap, mremap, madvise and fork over the vmas of [start, end).

        Idempotent; gives how many bytes of it are watched now. Vmas that cannot be watched are passed over,
        and mappings of files unless ``files`` (watching switches their fault-around off). 0 where
        userfaultfd is missing. EINVAL; ESRCH; EDEADLK in a callback.
        """
        self._check("watch")
        start, end = check_pages(self, "watch", start, end)
        end = min(end, USER_END)
        flags = lib.PM_WATCH_FILES if files else 0
        total, at = 0, start
        for piece_start, piece_end in self._regions.around(start, end):
            if at < piece_start:
                total += check(lib.pm_watch(self.native, at, piece_start, flags), "watch")
            at = min(piece_end, end)
            # A Region whole, and not the vma that the kernel may have merged it into: that may be the heap.
            whole = check(
                lib.pm_watch(self.native, piece_start, piece_end, flags | lib.PM_WATCH_EXACT), "watch"
            )
            total += min(whole, at - max(piece_start, start))
        if at < end:
            total += check(lib.pm_watch(self.native, at, end, flags), "watch")
        return total

    def _watch_regions(self, start: int = 0, end: int = USER_END) -> None:
        """Watch the Regions in [start, end): for a notifier too wide to have all of it watched."""
        for piece_start, piece_end in self._regions.around(start, min(end, USER_END)):
            check(lib.pm_watch(self.native, piece_start, piece_end, lib.PM_WATCH_EXACT), "watch")

    @contextmanager
    def _invalidation(
        self,
        start: int,
        end: int,
        event: Event,
        owner: Any = None,
        blockable: bool = True,
        guarantee: Guarantee = Guarantee.BEFORE,
    ) -> Iterator[MmuNotifierRange]:
        """One native invalidation with its callbacks. The native half ends before the end's callbacks."""
        what = {"guarantee": guarantee.value, "blockable": blockable}
        with trace.span(
            trace.Track.INVALIDATION, event.name, cast("AddressSpace", self), start, end, **what
        ) as span:
            begun, seq = ffi.new("pm_inv **"), ffi.new("uint64_t *")
            try:
                try:
                    ret = lib.pm_invalidate_start(
                        self.native, start, native_end(end), event, guarantee.native, begun, seq
                    )
                    check(ret, f"invalidate [{start:#x}, {end:#x})")
                    change = MmuNotifierRange(
                        cast("AddressSpace", self), start, end, event, owner, blockable, guarantee, seq[0]
                    )
                    span.note(seq=seq[0])
                    token = self.notifiers.deliver_start(change)
                    lib.pm_invalidate_delivered(begun[0])
                    try:
                        yield change
                    finally:
                        try:
                            end_native(begun)
                        finally:
                            self.notifiers.deliver_end(change, token)
                finally:
                    end_native(begun)
            finally:
                # Once more: Ctrl-C may have struck at the door of the others.
                end_native(begun)

    def _detected(self, start: int, end: int) -> None:
        """Deliver a change of [start, end) that was found by comparing page tables."""
        with self.invalidate(start, end, guarantee=Guarantee.DETECTED):
            pass

    def _walk(self, start: int, end: int) -> Iterator[Vma]:
        return walk_vmas(self.native, max(start, 0), min(end, USER_END))

    def _vma_for_error(self, addr: int) -> Vma | None:
        """The vma at addr for a message or a check, None if it cannot be had. Never raises."""
        try:
            vma = find_vma(self.native, addr) if 0 <= addr < USER_END else None
        except OSError:
            return None
        return vma if vma is not None and addr in vma else None

    def _hugetlb_at(self, addr: int) -> Vma | None:
        return hugetlb_vma(self.native, addr) if 0 <= addr < USER_END else None

    def _check(self, what: str) -> None:
        self._check_here(what)
        not_in_callback(what)

    def _check_here(self, what: str) -> None:
        """ESRCH in a forked child and once the mm is closed."""
        self._check_pid(what)
        if self._closing or self._closed:
            raise MirrorError(
                errno.ESRCH, f"{what}: the address space is closed", hint="open a new AddressSpace"
            )

    def _check_pid(self, what: str) -> None:
        if os.getpid() == self.pid:
            return
        raise MirrorError(
            errno.ESRCH,
            f"{what}: this AddressSpace belongs to process {self.pid}",
            hint="open a new AddressSpace in this process",
        )


def check_pages(mm: HasVmas, what: str, start: int, end: int) -> Interval:
    """[start, end) as ints; EINVAL unless it is an interval of whole pages, below 1 << 64."""
    start, end = integer(what, "start", start), integer(what, "end", end)
    if start % PAGE_SIZE or end % PAGE_SIZE:
        wrong = f"not aligned to pages of {PAGE_SIZE} bytes"
    elif start >= end:
        wrong = "empty" if start == end else "reversed"
    elif start < 0 or end > WHOLE_MM_END:
        wrong = "beyond 64 bits of address"
    else:
        return start, end
    hint = f"give the first byte and the byte after the last, multiples of {PAGE_SIZE}"
    raise invalid(mm, what, f"[{start:#x}, {end:#x}) is {wrong}", start, hint)


def one_of(what: str, kind: type[_E], given: object) -> _E:
    """The member of an enumeration; EINVAL for what is none."""
    try:
        return kind(given)
    except ValueError:
        names = ", ".join(f"{kind.__name__}.{member.name}" for member in kind)
        raise MirrorError(errno.EINVAL, f"{what}={shown(given)}", hint=f"give one of {names}") from None


def end_native(begun: Any) -> None:
    """End the invalidation in ``begun``, once: it is taken out."""
    # Between the mark and the call there is no point at which Python looks for signals.
    ended, begun[0] = begun[0], ffi.NULL
    if ended:
        lib.pm_invalidate_end(ended)
