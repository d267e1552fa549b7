# SPDX-License-Identifier: MIT
"""Ranges and notifiers of shared virtual memory (``drm_gpusvm_range``, ``drm_gpusvm_notifier``).

A notifier watches an aligned window of the address space for all ranges in it. A range is what is faulted and
migrated in one piece: the largest aligned chunk that lies inside the vma, the notifier and no other range.
"""

from __future__ import annotations

import errno
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..errors import MirrorError
from ..event import MmuNotifierRange
from ..lock import DriverLock
from ..notifier import IntervalNotifier
from ..walk import PAGE_SIZE, USER_END
from .counts import Counts

if TYPE_CHECKING:
    from ..mm import AddressSpace

Interval = tuple[int, int]


@dataclass(frozen=True, slots=True)
class SvmContext:
    """``struct drm_gpusvm_ctx``: how faults are served.

    ``check_pages_threshold``: chunks of so many bytes and less are taken only where the CPU has all their
    pages, except the smallest. ``devmem_possible``: ranges may move to device memory; ``devmem_only``: they
    must, or the fault is EBUSY. ``timeslice``: seconds that a range stays there at least before the driver
    evicts it for another. ``read_only``: writes are EPERM.
    """

    check_pages_threshold: int = 64 << 10
    devmem_possible: bool = True
    devmem_only: bool = False
    timeslice: float = 0.0
    read_only: bool = False


@dataclass
class SvmStats(Counts):
    """Counts.

    Faults: ``batches`` fetched, ``faults`` served and the ``pages`` of their ranges, those that met a
    ``valid`` range, that were left for the next replay (``busy``) or ``cancelled``. Ranges: ``inserted``,
    ``dropped`` and ``split`` when they were collected. Device memory: ``migrations`` and ``migrated_pages``,
    ``evictions`` and ``evicted_pages``, ``no_room`` where everything there is within its timeslice,
    ``exclusive`` pages for atomics. Callbacks: ``invalidations``, those that met no mapped range
    (``false_invalidations``), and ``own_events``.
    """

    batches: int = 0
    faults: int = 0
    pages: int = 0
    valid: int = 0
    busy: int = 0
    cancelled: int = 0
    inserted: int = 0
    dropped: int = 0
    split: int = 0
    migrations: int = 0
    migrated_pages: int = 0
    evictions: int = 0
    evicted_pages: int = 0
    no_room: int = 0
    exclusive: int = 0
    invalidations: int = 0
    false_invalidations: int = 0
    own_events: int = 0


@dataclass(eq=False, slots=True)
class SvmRange:
    """[start, end) bytes of ``notifier``; the flags are those of drm_gpusvm, under the notifier lock.

    ``valid``: its pages are on the device; ``writable``: all of them for writing. ``resident``: it was
    migrated, but for pages that do not move, and nothing is known to have come home since;
    ``has_devmem_pages``: some of it may be in device memory still. ``since`` is when it was migrated, for the
    timeslice. The process unmapped ``holes`` of it.
    """

    notifier: SvmNotifier
    start: int
    end: int
    valid: bool = False
    writable: bool = False
    resident: bool = False
    has_devmem_pages: bool = False
    since: float = 0.0
    holes: list[Interval] = field(default_factory=list)

    @property
    def unmapped(self) -> bool:
        """A part or all of it is gone from the process."""
        return bool(self.holes)

    @property
    def partial_unmap(self) -> bool:
        """A part, not all of it."""
        return self.unmapped and bool(self.left())

    def left(self) -> list[Interval]:
        """What is not unmapped of it."""
        pieces, at = [], self.start
        for start, end in sorted(self.holes):
            if at < start:
                pieces.append((at, start))
            at = max(at, end)
        if at < self.end:
            pieces.append((at, self.end))
        return pieces

    def __len__(self) -> int:
        """Bytes."""
        return self.end - self.start

    def __repr__(self) -> str:
        flags = ("valid", "writable", "resident", "has_devmem_pages", "unmapped", "partial_unmap")
        told = " ".join(flag for flag in flags if getattr(self, flag))
        return f"<SvmRange {self.start:#x}-{self.end:#x} {told}>"


class SvmNotifier:
    """An aligned window of ``size`` bytes with an interval notifier, and the ranges in it.

    ``invalidate(notifier, sub, update, cur_seq)`` is the driver's callback, which may come before the
    constructor has returned. Ranges do not overlap; they are looked
    up and changed under the notifier lock.
    """

    def __init__(
        self,
        mm: AddressSpace,
        addr: int,
        size: int,
        lock: DriverLock,
        invalidate: Callable[[SvmNotifier, IntervalNotifier, MmuNotifierRange, int], bool],
    ) -> None:
        self.start = addr // size * size
        self.end = min(self.start + size, USER_END)
        self._starts: list[int] = []
        self._ranges: list[SvmRange] = []
        self.sub = IntervalNotifier(
            mm,
            self.start,
            self.end - self.start,
            lambda sub, update, seq: invalidate(self, sub, update, seq),
            update_lock=lock,
        )

    @property
    def ranges(self) -> list[SvmRange]:
        """In order of address."""
        return list(self._ranges)

    def find(self, start: int, end: int) -> list[SvmRange]:
        """The ranges that [start, end) overlaps, in order."""
        first = max(0, bisect_right(self._starts, start) - 1)
        found = self._ranges[first : bisect_left(self._starts, end)]
        return [one for one in found if one.end > start]

    def insert(self, rng: SvmRange) -> None:
        """drm_gpusvm_range_insert()."""
        at = bisect_left(self._starts, rng.start)
        self._starts.insert(at, rng.start)
        self._ranges.insert(at, rng)

    def remove(self, rng: SvmRange) -> None:
        """__drm_gpusvm_range_remove()."""
        at = bisect_left(self._starts, rng.start)
        del self._starts[at]
        del self._ranges[at]

    def __repr__(self) -> str:
        return f"<SvmNotifier {self.start:#x}-{self.end:#x} {len(self._ranges)} ranges>"


def chunk_of(
    addr: int,
    sizes: Sequence[int],
    inside: Interval,
    free: Callable[[int, int], bool],
    wanted: Callable[[int, int], bool] = lambda start, end: True,
) -> Interval:
    """drm_gpusvm_range_chunk_size(): the largest aligned chunk around addr that lies ``inside`` and is free.

    ``sizes`` are bytes, descending; the last is taken whether it is ``wanted(start, end)`` or not.
    """
    for size in sizes:
        start = addr // size * size
        end = start + size
        fits = inside[0] <= start and end <= inside[1] and free(start, end)
        if fits and (size == sizes[-1] or wanted(start, end)):
            return start, end
    raise MirrorError(
        errno.EINVAL,
        f"svm: no chunk of {sizes} bytes fits",
        addr=addr,
        hint="end chunk_sizes with 4096",
    )


def check_chunks(sizes: Sequence[int], notifier_size: int) -> None:
    """EINVAL unless these are powers of two, descending to 4096, and the notifier holds the largest."""
    powers = all(size > 0 and not size & (size - 1) for size in (*sizes, notifier_size))
    descending = sorted(set(sizes), reverse=True) == list(sizes)
    if powers and descending and sizes and sizes[-1] == PAGE_SIZE and sizes[0] <= notifier_size:
        return
    raise MirrorError(
        errno.EINVAL,
        f"svm: chunk_sizes={tuple(sizes)}, notifier_size={notifier_size}",
        hint="give powers of two in bytes, descending to 4096, and a notifier_size not below the first",
    )
