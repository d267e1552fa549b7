# SPDX-License-Identifier: MIT
"""dma-debug: a record of every mapping of a device, against which every call is checked. Always on.

The checks are those of the kernel's CONFIG_DMA_API_DEBUG. Findings are reports (report.py), kept with the
device and logged; what a report of each kind does to the call is its category's to say.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence

from .._shim import lib
from .direction import DMA_MAPPING_ERROR, DmaDirection
from .entry import Backed, DmaEntry, DmaType
from .record import Site
from .report import DmaDebugCategory, DmaDebugError, DmaDebugReport
from .spans import Spans, written_lines

REPORTS_KEPT = 1024

_log = logging.getLogger("pymirror.dma")


#: Which types an unmap of a type may be mixed up with and still do what it should.
_ALIKE = {DmaType.SINGLE, DmaType.PAGE}


_numbers = itertools.count(1)


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
        self._places = Spans()
        # A signal handler that strikes inside it may unmap.
        self._lock = threading.RLock()
        self._said: set[tuple[DmaDebugCategory | None, Site | None, Site]] = set()

    def __len__(self) -> int:
        return len(self._by_number)

    def mappings(self) -> Iterator[DmaEntry]:
        """All that is mapped, oldest first."""
        return iter(list(self._by_number.values()))

    def add_all(self, entries: Sequence[DmaEntry], backing: Backed) -> None:
        """Record all that is mapped by one call; unmap it where that cannot be done."""
        try:
            for entry in entries:
                self.add(entry)
        except BaseException:
            for entry in entries:
                self.remove(entry)
            backing.unmap(None)
            raise

    def add(self, entry: DmaEntry) -> None:
        """Record a mapping that has been made, and look at the memory it is of."""
        entry.number = next(_numbers)
        last = entry.address + entry.size - 1
        entry.place, _ = self._places.add(entry.address, last, entry.number)
        with self._lock:
            self._by_address.setdefault(entry.address, []).append(entry)
            self._by_number[entry.number] = entry
        if entry.cpu_addr:
            self._check_memory(entry)
            if entry.direction.device_writes:
                self._check_overlap(entry)

    def remove(self, entry: DmaEntry) -> bool:
        """Forget an entry. False: another thread has done so already."""
        with self._lock:
            if self._by_number.pop(entry.number, None) is None:
                return False
            there = self._by_address[entry.address]
            there.remove(entry)
            if not there:
                del self._by_address[entry.address]
        self._places.remove(entry.place)
        written_lines.remove(entry)
        return True

    def end(self, entry: DmaEntry, direction: DmaDirection | None) -> bool:
        """Forget an entry and unmap what it is the record of, both or neither, also where Ctrl-C strikes.

        False: another thread has done so already.
        """
        try:
            if not self.remove(entry):
                return False
            if entry.backing is not None:
                entry.backing.unmap(direction)
        except BaseException:
            if entry.number not in self._by_number and entry.backing is not None:
                entry.backing.unmap(direction)
            raise
        return True

    def at(self, address: int) -> DmaEntry | None:
        """The oldest mapping that begins at the DMA address."""
        there = self._by_address.get(address)
        return there[0] if there else None

    def holding(self, address: int, size: int) -> DmaEntry | None:
        """A mapping that has all of [address, address + size), or one that has a part of it."""
        return self._by_number.get(self._places.find(address, address + max(size, 1) - 1))

    def _whole(self, address: int, size: int) -> DmaEntry | None:
        """A mapping that has all of it: without an IOMMU a smaller one may be there too."""
        found = self.holding(address, size)
        if found is None or found.address > address or address + size > found.address + found.size:
            return None
        return found

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
        entry = self._best(asked)
        if entry is None or entry.size < size:
            entry = self._whole(address, size) or entry or self.holding(address, 1)
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

    def no_room(self, why: str) -> None:
        """Log why a mapping failed: its caller gets DMA_MAPPING_ERROR, which says nothing."""
        here = Site.of_caller()
        self._log((None, None, here), f"{self.device}: mapping failed at {here}: {why}")

    def leaks(self, others: Iterable[DmaEntry] = ()) -> list[DmaDebugReport]:
        """Report what is still mapped, also by others than this API: the device is being released."""
        left = [*self._by_number.values(), *others]
        text = f"device driver has pending DMA allocations while released from device [count={len(left)}]"
        return [self.report(DmaDebugCategory.LEAK, entry, text, mapped=entry) for entry in left]

    def _keep(self, report: DmaDebugReport) -> None:
        self.reports.append(report)
        self.counts[report.category] += 1
        self._log((report.category, report.mapped, report.detected), report)

    def _log(self, key: tuple[DmaDebugCategory | None, Site | None, Site], what: object) -> None:
        """A warning the first time, for debugging after that."""
        level = logging.DEBUG if key in self._said else logging.WARNING
        self._said.add(key)
        _log.log(level, "%s", what)

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
        other = written_lines.add(entry)
        if other is None:
            return
        text = (
            "cache lines of the memory are mapped for writing already, overlapping mappings are not"
            f" supported; the other was mapped at {other}"
        )
        self.report(DmaDebugCategory.MAP_OVERLAP, entry, text, mapped=entry)
