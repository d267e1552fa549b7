# SPDX-License-Identifier: MIT
"""dma-debug: a record of every mapping of a device, against which every call is checked. Always on.

The checks are those of the kernel's CONFIG_DMA_API_DEBUG. Findings are reports (report.py), kept with the
device and logged; what a report of each kind does to the call is its category's to say.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol

from .._shim import ffi, lib
from ..errors import check
from .direction import DMA_MAPPING_ERROR, DmaDirection
from .record import Site
from .report import DmaDebugCategory, DmaDebugError, DmaDebugReport

if TYPE_CHECKING:
    from .record import DmaMapping

REPORTS_KEPT = 1024
CACHE_LINE = 64

_log = logging.getLogger("pymirror.dma")


class DmaType(StrEnum):
    """What a mapping was made as; the last four are not streaming mappings of the driver's memory."""

    SINGLE = "single"
    PAGE = "page"
    SG = "scatter-gather"
    COHERENT = "coherent"
    IOVA = "iova"
    HMM = "hmm"
    GUP = "gup"


#: Which types an unmap of a type may be mixed up with and still do what it should.
_ALIKE = {DmaType.SINGLE, DmaType.PAGE}


@dataclass(slots=True, eq=False)
class DmaEntry:
    """``struct dma_debug_entry``: the record of a mapping, or of one segment of a scatterlist's.

    ``address`` is the DMA address, ``size`` bytes, ``cpu_addr`` the process address (0: not the driver's own
    memory), ``site`` the line that made it. ``nents`` is how many entries the list had. ``checked``:
    dma_mapping_error() was asked. ``backing`` is what unmap undoes, ``syncs`` the bounce buffer's copies.
    """

    address: int
    size: int
    direction: DmaDirection
    type: DmaType
    site: Site
    cpu_addr: int = 0
    nents: int = 1
    checked: bool = True
    backing: Backed | None = None
    syncs: Any = None
    number: int = 0
    place: Any = None
    lines: Any = None

    def is_meant(self, size: int, direction: DmaDirection, type_: DmaType, cpu_addr: int, nents: int) -> bool:
        """Whether an unmapping call with these arguments is beyond reproach."""
        return (
            self.size == size
            and self.direction is direction
            and self.type is type_
            and self.checked
            and (self.nents == nents or type_ is not DmaType.SG)
            and (self.cpu_addr == cpu_addr or type_ is not DmaType.COHERENT)
        )

    @property
    def mappings(self) -> list[DmaMapping]:
        """The DmaMappings behind it, in order of address."""
        return self.backing.mappings if self.backing is not None else []


class Backed(Protocol):
    """What an entry is the record of. One may have several entries."""

    @property
    def mappings(self) -> list[DmaMapping]: ...

    def unmap(self, direction: DmaDirection | None) -> None:
        """Idempotent. With a direction, what the device wrote is copied back from bounce buffers."""


_numbers = itertools.count(1)


class _Spans:
    """Intervals that are looked up by what they overlap (native/spans.c)."""

    def __init__(self) -> None:
        spans = ffi.new("pm_spans **")
        check(lib.pm_spans_create(spans), "dma-debug")
        self._native = ffi.gc(spans[0], lib.pm_spans_destroy)

    def add(self, start: int, last: int, cookie: int) -> tuple[Any, int]:
        """The new span, and the cookie of one that it overlaps, 0 without one."""
        span, other = ffi.new("pm_span **"), ffi.new("uint64_t *")
        check(lib.pm_spans_add(self._native, start, last, cookie, span, other), "dma-debug")
        return span[0], int(other[0])

    def find(self, start: int, last: int) -> int:
        other = ffi.new("uint64_t *")
        return int(other[0]) if lib.pm_spans_find(self._native, start, last, other) == 0 else 0

    def remove(self, span: Any) -> None:
        lib.pm_spans_remove(self._native, span)


class _WrittenLines:
    """The cache lines of driver memory that some device may write, whatever device that is."""

    def __init__(self) -> None:
        self._renew()
        os.register_at_fork(after_in_child=self._renew)

    def _renew(self) -> None:
        self.spans = _Spans()
        self.sites: dict[int, Site] = {}

    def add(self, entry: DmaEntry) -> Site | None:
        """Where a mapping of some of the same cache lines was made."""
        start = entry.cpu_addr & -CACHE_LINE
        last = (entry.cpu_addr + entry.size - 1) | (CACHE_LINE - 1)
        entry.lines, other = self.spans.add(start, last, entry.number)
        self.sites[entry.number] = entry.site
        return self.sites.get(other)

    def remove(self, entry: DmaEntry) -> None:
        if self.sites.pop(entry.number, None) is not None:
            self.spans.remove(entry.lines)


_written = _WrittenLines()


class DmaDebug:
    """The mappings of one device and what was found wrong with their use.

    ``reports`` are the last ones, ``counts`` how many of each category there were.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.reports: deque[DmaDebugReport] = deque(maxlen=REPORTS_KEPT)
        self.counts: Counter[DmaDebugCategory] = Counter()
        self._by_address: dict[int, list[DmaEntry]] = {}
        self._by_number: dict[int, DmaEntry] = {}
        self._places = _Spans()
        self._lock = threading.Lock()
        self._said: set[tuple[DmaDebugCategory, Site | None, Site]] = set()

    def __len__(self) -> int:
        return len(self._by_number)

    def mappings(self) -> Iterator[DmaEntry]:
        """All that is mapped, oldest first."""
        return iter(list(self._by_number.values()))

    def add(self, entry: DmaEntry) -> None:
        """Record a mapping that has been made, and look at the memory it is of."""
        entry.number = next(_numbers)
        last = entry.address + entry.size - 1
        entry.place, _ = self._places.add(entry.address, last, entry.number)
        with self._lock:
            self._by_number[entry.number] = entry
            self._by_address.setdefault(entry.address, []).append(entry)
        if entry.cpu_addr:
            self._check_memory(entry)
            if entry.direction.device_writes:
                self._check_overlap(entry)

    def remove(self, entry: DmaEntry) -> bool:
        """Forget a entry. False: another thread has done so already."""
        with self._lock:
            if self._by_number.pop(entry.number, None) is None:
                return False
            there = self._by_address[entry.address]
            there.remove(entry)
            if not there:
                del self._by_address[entry.address]
        self._places.remove(entry.place)
        _written.remove(entry)
        return True

    def at(self, address: int) -> DmaEntry | None:
        """The oldest mapping that begins at the DMA address."""
        there = self._by_address.get(address)
        return there[0] if there else None

    def holding(self, address: int, size: int) -> DmaEntry | None:
        """A mapping that has a part of [address, address + size)."""
        return self._by_number.get(self._places.find(address, address + max(size, 1) - 1))

    def mapping_error(self, address: int) -> bool:
        """dma_mapping_error(): the driver has looked."""
        for entry in self._by_address.get(address, ()):
            if not entry.checked:
                entry.checked = True
                break
        return address == DMA_MAPPING_ERROR

    def check_unmap(
        self,
        address: int,
        size: int,
        direction: DmaDirection,
        type_: DmaType,
        *,
        cpu_addr: int = 0,
        nents: int = 1,
    ) -> DmaEntry:
        """The mapping that an unmapping call means; DmaDebugError when there is none that it could mean."""
        there = self._by_address.get(address)
        if (
            there is not None
            and len(there) == 1
            and there[0].is_meant(size, direction, type_, cpu_addr, nents)
        ):
            return there[0]
        asked = DmaEntry(address, size, direction, type_, Site.of_caller(), cpu_addr, nents)
        if address in (DMA_MAPPING_ERROR, 0):
            self.report(DmaDebugCategory.FREE_INVALID, asked, "device driver frees an invalid DMA address")
        entry = self._best(asked)
        if entry is None:
            self._free_of_nothing(asked)
        assert entry is not None
        self._compare(asked, entry)
        if not entry.checked:
            self.report(
                DmaDebugCategory.MAP_ERROR_UNCHECKED,
                entry,
                "device driver did not call dma_mapping_error() before it used the address",
                mapped=entry,
            )
        return entry

    def check_sync(
        self,
        address: int,
        size: int,
        direction: DmaDirection,
        *,
        for_cpu: bool,
        nents: int = 0,
        sg: bool = False,
    ) -> DmaEntry:
        """The mapping that a sync call means; DmaDebugError when it is not all in one."""
        to = "for the CPU" if for_cpu else "for the device"
        type_ = DmaType.SG if sg else DmaType.SINGLE
        asked = DmaEntry(address, size, direction, type_, Site.of_caller())
        entry = self._best(asked) or self.holding(address, 1)
        if entry is None:
            self.report(
                DmaDebugCategory.SYNC_UNALLOCATED,
                asked,
                f"device driver syncs {to} DMA memory that it has not mapped",
            )
        assert entry is not None
        if not entry.address <= address <= address + size <= entry.address + entry.size:
            self.report(
                DmaDebugCategory.SYNC_BEYOND,
                asked,
                f"device driver syncs {to} beyond the {entry.size} bytes mapped at {entry.address:#x}",
                mapped=entry,
            )
        if entry.direction not in (direction, DmaDirection.BIDIRECTIONAL):
            self.report(
                DmaDebugCategory.SYNC_DIRECTION,
                asked,
                f"device driver syncs {to} memory mapped {entry.direction} as {direction}",
                mapped=entry,
            )
        if sg and nents != entry.nents:
            self.report(
                DmaDebugCategory.SG_NENTS_MISMATCH,
                asked,
                f"device driver syncs a scatterlist of {nents} entries that was mapped with {entry.nents}",
                mapped=entry,
            )
        return entry

    def report(
        self,
        category: DmaDebugCategory,
        about: DmaEntry,
        text: str,
        *,
        mapped: DmaEntry | None = None,
        refuse: bool = True,
    ) -> DmaDebugReport:
        """Keep and log a report; raise DmaDebugError if the category refuses the call."""
        report = DmaDebugReport(
            category,
            self.device,
            about.address,
            about.size,
            about.direction,
            (mapped or about).type.value,
            mapped.site if mapped else None,
            Site.of_caller(),
            text,
        )
        self._keep(report)
        if category.refused and refuse:
            raise DmaDebugError(report)
        return report

    def leaks(self, others: Iterable[DmaEntry] = ()) -> list[DmaDebugReport]:
        """Report what is still mapped, also by others than this API: the device is being released."""
        left = [*self._by_number.values(), *others]
        text = f"device driver has pending DMA allocations while released from device [count={len(left)}]"
        return [self.report(DmaDebugCategory.LEAK, entry, text, mapped=entry) for entry in left]

    def _keep(self, report: DmaDebugReport) -> None:
        self.reports.append(report)
        self.counts[report.category] += 1
        key = (report.category, report.mapped, report.detected)
        level = logging.DEBUG if key in self._said else logging.WARNING
        self._said.add(key)
        _log.log(level, "%s", report)

    def _best(self, asked: DmaEntry) -> DmaEntry | None:
        """Without an IOMMU several mappings may have one address: the one that has most in common."""
        there = self._by_address.get(asked.address)
        if not there:
            return None
        if len(there) == 1:
            return there[0]
        return max(
            there,
            key=lambda one: (
                (one.size == asked.size)
                + (one.type == asked.type)
                + (one.direction == asked.direction)
                + (one.nents == asked.nents)
            ),
        )

    def _free_of_nothing(self, asked: DmaEntry) -> None:
        text = "device driver frees DMA memory it has not allocated"
        inside = self.holding(asked.address, 1)
        if inside is not None:
            text += f": the address is inside the {inside.size} bytes mapped at {inside.address:#x}"
        self.report(DmaDebugCategory.FREE_UNALLOCATED, asked, text, mapped=inside)

    def _compare(self, asked: DmaEntry, entry: DmaEntry) -> None:
        if asked.size != entry.size:
            self.report(
                DmaDebugCategory.SIZE_MISMATCH,
                asked,
                f"device driver frees {asked.size} bytes of DMA memory where {entry.size} were mapped",
                mapped=entry,
            )
        if asked.type != entry.type:
            self.report(
                DmaDebugCategory.TYPE_MISMATCH,
                asked,
                f"device driver frees as {asked.type} DMA memory that was mapped as {entry.type}",
                mapped=entry,
                refuse=not {asked.type, entry.type} <= _ALIKE,
            )
        if asked.cpu_addr != entry.cpu_addr and asked.type is DmaType.COHERENT:
            self.report(
                DmaDebugCategory.CPU_ADDRESS_MISMATCH,
                asked,
                f"device driver frees CPU address {asked.cpu_addr:#x}, which is {entry.cpu_addr:#x} by its"
                " DMA address",
                mapped=entry,
            )
        if asked.direction != entry.direction:
            self.report(
                DmaDebugCategory.DIRECTION_MISMATCH,
                asked,
                f"device driver frees as {asked.direction} DMA memory that was mapped {entry.direction}",
                mapped=entry,
            )
        if asked.nents != entry.nents and asked.type is DmaType.SG:
            self.report(
                DmaDebugCategory.SG_NENTS_MISMATCH,
                asked,
                f"device driver frees a scatterlist of {asked.nents} entries mapped with {entry.nents}",
                mapped=entry,
            )

    def _check_memory(self, entry: DmaEntry) -> None:
        area = lib.pm_memory_area(entry.cpu_addr, entry.size)
        if area <= 0:
            return
        if area & lib.PM_AREA_STACK:
            text = f"device driver maps memory from a stack [addr={entry.cpu_addr:#x}]"
            self.report(DmaDebugCategory.MAP_STACK, entry, text, mapped=entry)
        if area & (lib.PM_AREA_TEXT | lib.PM_AREA_RODATA):
            text = f"device driver maps memory from program text or rodata [addr={entry.cpu_addr:#x}]"
            self.report(DmaDebugCategory.MAP_TEXT, entry, text, mapped=entry)

    def _check_overlap(self, entry: DmaEntry) -> None:
        other = _written.add(entry)
        if other is None:
            return
        text = (
            "cache lines of the memory are mapped for writing already, overlapping mappings are not"
            f" supported; the other was mapped at {other}"
        )
        self.report(DmaDebugCategory.MAP_OVERLAP, entry, text, mapped=entry)
