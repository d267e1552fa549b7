"""dmirror: the kernel's HMM test device (lib/test_hmm.c) as a driver on the public API.

A `Dmirror` is what an open /dev/hmm_dmirrorN is: a page table of its own, filled by device faults, and one
interval notifier over the whole address space, and memory of its own. Its commands are the test device's.

It copies Linux 6.12's device with its peculiarities, because recordings bear them out. They stand in `Quirks`
and nowhere else; a driver of one's own should not imitate them.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from mmap import PROT_EXEC
from mmap import PROT_READ as PROT_READ_ACCESS

import numpy as np
import numpy.typing as npt

from ..device import Device
from ..device_fault import DeviceFault
from ..device_memory import DeviceMemory
from ..errors import MirrorError, error
from ..event import Event, Guarantee, MmuNotifierRange
from ..exclusive import exclusive_pfns, make_device_exclusive_range
from ..hmm import hmm_range_fault
from ..lock import DriverLock
from ..migrate import migrate_to_device, migrate_to_system
from ..mm import AddressSpace
from ..notifier import IntervalNotifier
from ..page_table import PM_ENTRY_VALID
from ..pfn import (
    HMM_PFN_REQ_FAULT,
    HMM_PFN_REQ_WRITE,
    HMM_PFN_VALID,
    HMM_PFN_WRITE,
    PfnArray,
    hmm_pfn_to_map_order,
    hmm_pfn_to_pfn,
    is_device_exclusive_pfn,
    is_device_private_pfn,
)
from ..vma import find_vma
from .dmirror_quirks import LINUX_6_12, Quirks
from .dmirror_uapi import FAIL_ALLOC, PAGE, PMD_ORDER, Result, mkentries
from .kpageflags import in_large_folio
from .retry import RangeRetry, invalidated

WHOLE_MM = 1 << 64
MEMORY_SIZE = 256 << 20
PMD_SIZE = 2 << 20


@dataclass(slots=True)
class _Request:
    """The command under way: where it ends, and the fault rounds it took."""

    end: int
    faults: int = 0


_Pages = npt.NDArray[np.uint64]


class Dmirror:
    """One open test device mirroring `mm`.

    Commands come one at a time, as through one file descriptor; use two devices for two mirrors. Errors
    are MirrorError: EFAULT (hole, or no access), EPERM (write to a read-only vma), EBUSY (invalidated for
    longer than the quirks' fault_timeout), EINVAL (misaligned), ESRCH (the address space is closed).
    """

    def __init__(
        self,
        mm: AddressSpace,
        name: str = "hmm_dmirror0",
        *,
        kind: str = "private",
        quirks: Quirks = LINUX_6_12,
    ) -> None:
        self.mm = mm
        self.quirks = quirks
        self.device = Device(name)
        self.lock = DriverLock("dmirror->mutex")
        self.retry = RangeRetry(self.lock, timeout=quirks.fault_timeout)
        self._request: _Request | None = None
        self._fail_alloc = False
        self._kind = kind
        self.memory = self._new_memory()
        self.device.set_fault_handler(self._device_fault)
        self.notifier = IntervalNotifier(mm, 0, WHOLE_MM, self._invalidate, update_lock=self.lock)

    def close(self) -> None:
        """Stop mirroring; pages in the device's memory come home. Idempotent."""
        self.memory.close()
        self.notifier.remove()
        self.device.page_table.clear(0, WHOLE_MM)

    def _new_memory(self) -> DeviceMemory:
        return DeviceMemory(self.device, MEMORY_SIZE, kind=self._kind)

    def read(self, addr: int, npages: int) -> Result:
        """READ: what the device sees in npages pages from addr."""
        with self._command(addr, npages) as request:
            data = self.device.read(self.mm, addr, npages * PAGE)
        return Result(npages, request.faults, data)

    def write(self, addr: int, data: bytes) -> Result:
        """WRITE: whole pages, as the device. Pages before the one that fails are written."""
        npages = len(data) // PAGE
        with self._command(addr, npages) as request:
            self.device.write(self.mm, addr, data)
        return Result(npages, request.faults)

    def snapshot(self, addr: int, npages: int) -> Result:
        """SNAPSHOT: one PROT_* byte a page, faulting nothing."""
        protections = b"".join(
            mkentries(self.mm, self.memory, start, self._range_fault(start, end, flags=0))
            for start, end in self._chunks(addr, addr + npages * PAGE)
        )
        return Result(npages, data=protections)

    def migrate_to_dev(self, addr: int, npages: int) -> Result:
        """MIGRATE_TO_DEV: pages move into the device's memory; gives what the device then reads there.

        EINVAL at a hole or a vma that cannot be read or has huge pages of hugetlb, after what precedes it has
        moved. ENOENT: not all of it is mapped by the device now.
        """
        staying = self._in_mapped_folio(addr, addr + npages * PAGE)
        self._migrate(addr, npages, partial(self._out, staying))
        return self._read_back(addr, npages)

    def migrate_to_sys(self, addr: int, npages: int) -> Result:
        """MIGRATE_TO_SYS: what is in this device's memory comes home; cpages is the number that moved."""
        return Result(self._migrate(addr, npages, self._home))

    def release(self) -> Result:
        """RELEASE: all of this device's memory comes home and is given back; cpages is what was in it."""
        resident = self.memory.used // PAGE
        self.memory.close()
        self.memory = self._new_memory()
        self.mm.sync()
        return Result(resident)

    def flags(self, flags: int) -> Result:
        """FLAGS: with FAIL_ALLOC the next huge page that migrates gets no huge page of the device, once.

        It is split, and moves as pages of 4 KiB. EINVAL: another flag.
        """
        if flags & ~FAIL_ALLOC:
            raise error(errno.EINVAL, f"dmirror: flags {flags:#x}", hint=f"FAIL_ALLOC ({FAIL_ALLOC}) or 0")
        self._fail_alloc = bool(flags & FAIL_ALLOC)
        return Result(0)

    def exclusive(self, addr: int, npages: int) -> Result:
        """EXCLUSIVE: the device has the pages to itself until the CPU touches them; gives what it reads
        there.

        EBUSY: not all of them could be had.
        """
        self._detect(addr, addr + npages * PAGE)
        for start, end in self._chunks(addr, addr + npages * PAGE):
            self._take(start, end)
        return self._read_back(addr, npages)

    def _take(self, start: int, end: int) -> None:
        if self.quirks.large_folios_not_had and self._split_large(start, end):
            raise error(errno.EBUSY, "dmirror: exclusive access to a large folio", addr=start, mm=self.mm)
        try:
            make_device_exclusive_range(self.mm, start, end, None)
        except MirrorError as refused:
            raise error(errno.EBUSY, "dmirror: exclusive access", addr=start, mm=self.mm) from refused

        def look(seq: int) -> PfnArray:
            self.mm.sync()
            # To READ they are like others, a WRITE faults.
            return exclusive_pfns(self.mm, start, end) & np.uint64(~HMM_PFN_WRITE & (1 << 64) - 1)

        def program(seq: int, pfns: PfnArray) -> bool:
            return not pfns.all() or self.device.page_table.map(self.notifier, seq, start, pfns)

        if not self.retry.run(self.notifier, look, program, addr=start).all():
            raise error(errno.EBUSY, "dmirror: exclusive access to a part", addr=start, mm=self.mm)

    def _split_large(self, start: int, end: int) -> bool:
        """Whether there is a page of a large folio, whose PMD is split then, and the folio is not."""
        pfns = self._range_fault(start, end, flags=0)
        mapped = ((pfns & np.uint64(HMM_PFN_VALID)) != 0) & ~is_device_private_pfn(pfns)
        huge = np.flatnonzero(mapped & (hmm_pfn_to_map_order(pfns) == PMD_ORDER))
        vma = find_vma(self.mm.native, start)
        if huge.size and vma is not None and not vma.hugetlb and not vma.shared:
            addr = start + int(huge[0]) * PAGE
            with self.mm.invalidate(addr // PMD_SIZE * PMD_SIZE, (addr // PMD_SIZE + 1) * PMD_SIZE):
                pass
            # A vma that ends within 2 MiB is what makes the kernel split them.
            self.mm.mprotect(addr, PAGE, vma.prot ^ PROT_EXEC)
            self.mm.mprotect(addr, PAGE, vma.prot)
            return True
        return bool(in_large_folio(hmm_pfn_to_pfn(pfns[mapped])).any())

    def check_exclusive(self, addr: int, npages: int) -> Result:
        """CHECK_EXCLUSIVE: EPERM while the device has one of the pages to itself."""
        self.mm.sync()
        entries = self.device.page_table.entries(addr, addr + npages * PAGE)
        entries = entries[(entries & np.uint64(PM_ENTRY_VALID)) != 0]
        if is_device_exclusive_pfn(entries).any():
            raise error(errno.EPERM, "dmirror: pages are exclusive still", addr=addr, mm=self.mm)
        return Result(0)

    def _split(self, start: int, end: int) -> bool:
        """Whether there is a huge page. A page that goes away and comes back splits what it is part of."""
        pfns = self._range_fault(start, end, flags=0)
        huge = ((pfns & np.uint64(HMM_PFN_VALID)) != 0) & (hmm_pfn_to_map_order(pfns) == PMD_ORDER)
        for page in np.flatnonzero(huge)[:1]:
            addr = start + int(page) * PAGE
            make_device_exclusive_range(self.mm, addr, addr + PAGE, self.device).release()
        return bool(huge.any())

    def _read_back(self, addr: int, npages: int) -> Result:
        """What the device reads, without a fault: ENOENT where it has no entry."""
        self._detect(addr, addr + npages * PAGE)
        entries = self.device.page_table.entries(addr, addr + npages * PAGE)
        if not (entries & np.uint64(PM_ENTRY_VALID)).all():
            raise error(errno.ENOENT, "dmirror: not all pages are on the device", addr=addr, mm=self.mm)
        return Result(npages, data=self.device.read(self.mm, addr, npages * PAGE))

    def _migrate(self, addr: int, npages: int, move: Callable[[int, int], int]) -> int:
        """Vma by vma, and in a vma in chunks, keeping the device's entries of pages that stay."""
        self.mm.sync()
        end, moved = addr + npages * PAGE, 0
        while addr < end:
            vma = find_vma(self.mm.native, addr)
            if vma is None or addr not in vma or not vma.prot & PROT_READ_ACCESS or vma.hugetlb:
                raise error(errno.EINVAL, "dmirror: memory that does not migrate", addr=addr, mm=self.mm)
            last = min(end, vma.end, addr + self.quirks.chunk_pages * PAGE)
            moved += self._migrate_chunk(addr, last, move)
            addr = last
        return moved

    def _migrate_chunk(self, start: int, end: int, move: Callable[[int, int], int]) -> int:
        self._detect(start, end)
        there = self.memory.holds(start, end)
        before = self.device.page_table.entries(start, end)
        moved = move(start, end)
        self.mm.sync()
        if self.quirks.own_migrations:
            self._range_fault(start, end, flags=0, choose=partial(self._keep, start, before, there))
        return moved

    def _keep(self, start: int, before: PfnArray, there: npt.NDArray[np.bool_], pfns: PfnArray) -> PfnArray:
        """What has come into the device's memory, and what the device had mapped and is what it was."""
        pfns = pfns | exclusive_pfns(self.mm, start, start + pfns.size * PAGE)
        new = self.memory.holds(start, start + pfns.size * PAGE) & ~there
        same = (before & pfns & np.uint64(PM_ENTRY_VALID)) != 0
        same &= hmm_pfn_to_pfn(before) == hmm_pfn_to_pfn(pfns)
        readonly = same & ~new & ((before & np.uint64(HMM_PFN_WRITE)) == 0)
        kept = np.where(new | same, pfns, np.uint64(0))
        kept[readonly] &= np.uint64(~HMM_PFN_WRITE & (1 << 64) - 1)
        return kept

    def _out(self, staying: _Pages, start: int, end: int) -> int:
        if self._fail_alloc and self._split(start, end):
            self._fail_alloc = False
        moved = sum(migrate_to_device(self.mm, *piece, self.memory) for piece in _others(staying, start, end))
        if self.quirks.clears_new_pages:
            self.memory.populate(start, end)
        return moved

    def _in_mapped_folio(self, start: int, end: int) -> _Pages:
        """The addresses of pages that are part of a large folio, and mapped one by one."""
        if not self.quirks.mapped_folios_stay:
            return np.zeros(0, np.uint64)
        pfns = self._range_fault(start, end, flags=0)
        mapped = ((pfns & np.uint64(HMM_PFN_VALID)) != 0) & ~is_device_private_pfn(pfns)
        pages = np.flatnonzero(mapped & (hmm_pfn_to_map_order(pfns) == 0))
        pages = pages[in_large_folio(hmm_pfn_to_pfn(pfns[pages]))]
        return np.uint64(start) + pages.astype(np.uint64) * np.uint64(PAGE)

    def _home(self, start: int, end: int) -> int:
        if self.quirks.setup_splits:
            self._split(start, end)
        return migrate_to_system(self.mm, start, end, self.memory)

    @contextmanager
    def _command(self, addr: int, npages: int) -> Iterator[_Request]:
        self.mm.sync()
        self._detect(addr, addr + npages * PAGE)
        self._request = _Request(addr + npages * PAGE)
        try:
            yield self._request
        finally:
            self._request = None

    def _detect(self, start: int, end: int) -> None:
        """Make up for invalidations that no event told of (a copy-on-write break), before the table is used.

        The device would find them page by page. But the overrun of an invalidation reaches pages whose own
        entries are good, so those before the request count too.
        """
        start = max(0, start - self.quirks.overrun_pages * PAGE)
        while start < end and (changed := self.device.page_table.verify(start, end)):
            with self.mm.invalidate(*changed, guarantee=Guarantee.DETECTED):
                start = changed[1]

    def _chunks(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        step = self.quirks.chunk_pages * PAGE
        for first in range(start, end, step):
            yield first, min(first + step, end)

    def _device_fault(self, fault: DeviceFault) -> None:
        request = self._request
        end = request.end if request is not None and self.quirks.fault_to_end else fault.addr + PAGE
        flags = HMM_PFN_REQ_FAULT | (HMM_PFN_REQ_WRITE if fault.write else 0)
        for first, last in self._chunks(fault.addr, end):
            choose = _until_readonly if fault.write else _all
            if self.quirks.faults_rest_of_pmd:
                self._touch_rest(first, last, flags)
            pfns = self._range_fault(first, last, flags=flags, choose=choose)
            if fault.write and (choose(pfns) == 0).any():
                raise error(
                    errno.EFAULT, "dmirror: its own memory, mapped read-only", addr=fault.addr, mm=self.mm
                )
        if request is not None:
            request.faults += 1

    def _touch_rest(self, start: int, end: int, flags: int) -> None:
        pfns = self._range_fault(start, end, flags=0)
        own = is_device_private_pfn(pfns)
        wanting = ~own & ((pfns & np.uint64(flags)) != np.uint64(flags))
        for first, last in self._walks(start, end):
            at = (first - start) // PAGE + np.flatnonzero(
                wanting[(first - start) // PAGE : (last - start) // PAGE]
            )
            if not at.size:
                continue
            for page in np.flatnonzero(own[at[0] : (last - start) // PAGE]) + at[0]:
                addr = start + int(page) * PAGE
                migrate_to_system(self.mm, addr, addr + PAGE, self.memory)

    def _walks(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """The pieces of [start, end) that are walked as one, of one vma and one 2 MiB range, up to a hole."""
        while start < end:
            vma = find_vma(self.mm.native, start)
            if vma is None or start not in vma or not vma.prot & PROT_READ_ACCESS:
                return
            last = min(end, vma.end, (start // PMD_SIZE + 1) * PMD_SIZE)
            yield start, last
            start = last

    def _range_fault(
        self,
        start: int,
        end: int,
        *,
        flags: int,
        choose: Callable[[PfnArray], PfnArray] | None = None,
    ) -> PfnArray:
        """hmm_range_fault() with the retry rule. Gives the pfns; maps those that `choose` leaves."""

        def look(seq: int) -> PfnArray:
            # What came home for this fault is told of late: its callback must not drop what is mapped next.
            self.mm.sync()
            pfns = np.zeros((end - start) // PAGE, np.uint64)
            hmm_range_fault(
                self.notifier,
                start,
                end,
                pfns,
                default_flags=flags,
                seq=seq,
                dev_private_owner=self.device,
            )
            return pfns

        def program(seq: int, pfns: PfnArray) -> bool:
            return choose is None or self.device.page_table.map(self.notifier, seq, start, choose(pfns))

        return self.retry.run(self.notifier, look, program, addr=start)

    def _invalidate(self, sub: IntervalNotifier, update: MmuNotifierRange, cur_seq: int) -> bool:
        def take_off() -> None:
            sub.set_seq(cur_seq)
            own = update.event is Event.MIGRATE and update.owner is self.device
            overrun = 0 if own and self.quirks.own_migrations else self.quirks.overrun_pages
            self.device.page_table.clear(update.start, min(update.end + overrun * PAGE, WHOLE_MM))

        return invalidated(self.lock, update, take_off)


def _others(staying: _Pages, start: int, end: int) -> Iterator[tuple[int, int]]:
    """What of [start, end) lies between the pages at these addresses."""
    inside = staying[(staying >= start) & (staying < end)].tolist()
    for first, last in zip([start, *(page + PAGE for page in inside)], [*inside, end], strict=True):
        if first < last:
            yield first, last


def _all(pfns: PfnArray) -> PfnArray:
    return pfns


def _until_readonly(pfns: PfnArray) -> PfnArray:
    """The pfns before the first that may not be written: memory of the device itself is not faulted."""
    readonly = np.flatnonzero((pfns & np.uint64(HMM_PFN_WRITE)) == 0)
    if not readonly.size:
        return pfns
    pfns = pfns.copy()
    pfns[readonly[0] :] = 0
    return pfns
