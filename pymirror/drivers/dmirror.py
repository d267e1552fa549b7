"""dmirror: the kernel's HMM test device (lib/test_hmm.c) as a driver on the public API.

A `Dmirror` is what an open /dev/hmm_dmirrorN is: a page table of its own, filled by device faults, and one
interval notifier over the whole address space. Its commands are the test device's READ, WRITE and SNAPSHOT.

It copies Linux 6.12's device with its peculiarities, because recordings bear them out. They stand in `Quirks`
and nowhere else; a driver of one's own should not imitate them.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..device import Device, DeviceFault
from ..errors import MirrorError, error
from ..event import Guarantee, MmuNotifierRange
from ..hmm import hmm_range_fault
from ..lock import DriverLock
from ..mm import AddressSpace
from ..notifier import IntervalNotifier
from ..pfn import (
    HMM_PFN_ERROR,
    HMM_PFN_REQ_FAULT,
    HMM_PFN_REQ_WRITE,
    HMM_PFN_VALID,
    HMM_PFN_WRITE,
    hmm_pfn_to_map_order,
    hmm_pfn_to_pfn,
)

PAGE = 4096
WHOLE_MM = 1 << 64

PROT_ERROR = 0xFF
PROT_NONE = 0x00
PROT_READ = 0x01
PROT_WRITE = 0x02
PROT_PMD = 0x04
PROT_ZERO = 0x10

_PMD_ORDER = 9


@dataclass(frozen=True, slots=True)
class Quirks:
    """What the test device of Linux 6.12 does that a driver need not do.

    ======================  ==============================================================================
    chunk_pages             Range faults and snapshots go in calls of this many pages, counted from where the
                            fault struck, not from an aligned address.
    overrun_pages           An invalidation drops this many pages beyond its last one: the device takes the
                            exclusive end for the last page of the interval.
    fault_to_end            A device fault populates everything from the missing page to the end of the
                            command's request, asking for the same access everywhere, not the missing run.
    snapshot_as_owner       A snapshot names the device as the owner of device-private pages; a range fault
                            does not, so it brings the device's own pages home.
    fault_timeout           Seconds in which a range fault is tried again before it is EBUSY.
    ======================  ==============================================================================
    """

    chunk_pages: int = 64
    overrun_pages: int = 1
    fault_to_end: bool = True
    snapshot_as_owner: bool = True
    fault_timeout: float = 1.0


LINUX_6_12 = Quirks()


@dataclass(frozen=True, slots=True)
class Result:
    """What a command gives: pages served, fault rounds, and bytes (a READ's pages, a SNAPSHOT's bytes)."""

    cpages: int
    faults: int = 0
    data: bytes = b""


@dataclass(slots=True)
class _Request:
    """The command under way: where it ends, and the fault rounds it took."""

    end: int
    faults: int = 0


class Dmirror:
    """One open test device mirroring `mm`.

    Commands come one at a time, as through one file descriptor; use two devices for two mirrors. Errors
    are MirrorError: EFAULT (hole, or no access), EPERM (write to a read-only vma), EBUSY or ETIMEDOUT
    (invalidated for longer than the quirks' fault_timeout), EINVAL (misaligned), ESRCH (the address space
    is closed).
    """

    def __init__(self, mm: AddressSpace, name: str = "hmm_dmirror0", *, quirks: Quirks = LINUX_6_12) -> None:
        self.mm = mm
        self.quirks = quirks
        self.device = Device(name)
        self.lock = DriverLock()
        self._request: _Request | None = None
        self.device.set_fault_handler(self._device_fault)
        self.notifier = IntervalNotifier(mm, 0, WHOLE_MM, self._invalidate)

    def close(self) -> None:
        """Stop mirroring. Idempotent."""
        self.notifier.remove()
        self.device.page_table.clear(0, WHOLE_MM)

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
        owner = self.device if self.quirks.snapshot_as_owner else None
        protections = b"".join(
            self._protections(self._range_fault(start, end, flags=0, program=False, owner=owner))
            for start, end in self._chunks(addr, addr + npages * PAGE)
        )
        return Result(npages, data=protections)

    @contextmanager
    def _command(self, addr: int, npages: int) -> Iterator[_Request]:
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
            self._range_fault(first, last, flags=flags, program=True)
        if request is not None:
            request.faults += 1

    def _range_fault(
        self, start: int, end: int, *, flags: int, program: bool, owner: object = None
    ) -> npt.NDArray[np.uint64]:
        """hmm_range_fault() with the retry rule. Gives the pfns; with `program` makes entries of them."""
        pfns = np.zeros((end - start) // PAGE, np.uint64)
        deadline = time.monotonic() + self.quirks.fault_timeout
        while True:
            seq = self.notifier.read_begin(self.quirks.fault_timeout)
            try:
                hmm_range_fault(
                    self.notifier, start, end, pfns, default_flags=flags, seq=seq, dev_private_owner=owner
                )
                with self.lock:
                    if program and self.device.page_table.map(self.notifier, seq, start, pfns):
                        return pfns
                    if not program and not self.notifier.read_retry(seq):
                        return pfns
            except MirrorError as refused:
                if refused.errno != errno.EBUSY:
                    raise
            if time.monotonic() >= deadline:
                raise error(errno.EBUSY, "dmirror: invalidated again and again", addr=start, mm=self.mm)

    def _invalidate(self, sub: IntervalNotifier, update: MmuNotifierRange, cur_seq: int) -> bool:
        if not self.lock.acquire(-1 if update.blockable else 0):
            return False
        try:
            sub.set_seq(cur_seq)
            end = min(update.end + self.quirks.overrun_pages * PAGE, WHOLE_MM)
            self.device.page_table.clear(update.start, end)
        finally:
            self.lock.release()
        return True

    def _protections(self, pfns: npt.NDArray[np.uint64]) -> bytes:
        """Snapshot bytes of HMM pfns."""
        valid = (pfns & HMM_PFN_VALID) != 0
        writable = (pfns & HMM_PFN_WRITE) != 0
        protections = np.where(writable, PROT_WRITE, PROT_READ)
        # 0: not known, as PFNs are not shown to everybody.
        if zero := self.mm.features.zero_pfn:
            protections |= np.where(hmm_pfn_to_pfn(pfns) == zero, PROT_ZERO, 0)
        protections |= np.where(hmm_pfn_to_map_order(pfns) == _PMD_ORDER, PROT_PMD, 0)
        protections = np.where(valid, protections, PROT_NONE)
        protections = np.where((pfns & HMM_PFN_ERROR) != 0, PROT_ERROR, protections)
        return protections.astype(np.uint8).tobytes()
