"""The driver of the demonstration: a Mirror that serves the device's faults with the full retry loop.

The loop is the one of the kernel's Documentation/mm/hmm.rst; window and back-off are what drm_gpusvm does
with its chunk sizes: a big window first, smaller ones while the memory around the fault will not keep still.
"""

from __future__ import annotations

import errno
import threading
import time
from collections import Counter

import pymirror as pm
from pymirror.demo.memory import Chunk
from pymirror.demo.options import MIB

WINDOW = 8 * MIB
SMALLEST_WINDOW = MIB // 4
PAGE_SHIFT = 12
ATTEMPTS_PER_WINDOW = 3
FAULT_DEADLINE = 5.0

_RETRY = {errno.EAGAIN: "EAGAIN", errno.EBUSY: "EBUSY"}


class DemoDriver(pm.Mirror):
    """Counts events by (event, guarantee), device faults by reason, and retries by their cause."""

    def __init__(self, mm: pm.AddressSpace, device: pm.Device) -> None:
        self.device = device
        self.events: Counter[tuple[str, str]] = Counter()
        self.faults: Counter[str] = Counter()
        self.retries: Counter[str] = Counter()
        self.entries_cleared = 0
        self.pages_mapped = 0
        self.released = False
        self._counting = threading.Lock()
        super().__init__(mm)
        device.set_fault_handler(self.handle)

    def sync_cpu_device_pagetables(self, update: pm.MmuNotifierRange) -> None:
        with self.lock:
            self.entries_cleared += self.device.page_table.clear(update.start, update.end)
            self.events[update.event.name, update.guarantee.value] += 1

    def release(self) -> None:
        self.released = True

    def handle(self, fault: pm.DeviceFault) -> None:
        """Map what the device misses, or raise what the CPU would meet there (EFAULT, EPERM)."""
        self._count(self.faults, fault.reason)
        self.map_window(fault.mm, fault.addr, fault.end, write=fault.write)

    def map_window(self, mm: pm.AddressSpace, addr: int, end: int, *, write: bool = False) -> int:
        """Fault and map a window around [addr, end), less where that will not do. Returns the end of it."""
        deadline = time.monotonic() + FAULT_DEADLINE
        size = WINDOW
        while True:
            start, stop = _window(mm, addr, end, size)
            try:
                if self._try_window(start, stop, (addr, end) if write else (addr, addr), deadline):
                    return stop
            except pm.MirrorError as error:
                # A neighbour may be a hole by now; what the device itself needs must be there.
                needed = error.addr is None or addr <= error.addr < end
                if error.errno != errno.EFAULT or needed or size == 0:
                    raise
            if time.monotonic() > deadline:
                raise pm.MirrorError(errno.ETIMEDOUT, f"the memory at {addr:#x} does not keep still")
            if size:
                self._count(self.retries, "window_halved")
                size = size // 2 if size > SMALLEST_WINDOW else 0

    def _try_window(self, start: int, end: int, write: tuple[int, int], deadline: float) -> bool:
        """The retry loop over one window: False if it was invalidated ATTEMPTS_PER_WINDOW times.

        Writes are asked for in `write` alone: anywhere else they would copy pages that nobody is to change.
        """
        first, last = ((addr - start) >> PAGE_SHIFT for addr in write)
        with self.range(start, end) as rng:
            rng.default_flags = pm.HMM_PFN_REQ_FAULT
            rng.pfn_flags_mask = pm.HMM_PFN_REQ_WRITE
            for _ in range(ATTEMPTS_PER_WINDOW):
                rng.pfns[:] = 0
                rng.pfns[first:last] = pm.HMM_PFN_REQ_WRITE
                rng.wait_until_valid(timeout=max(0.0, deadline - time.monotonic()))
                try:
                    seq = rng.fault()
                except pm.MirrorError as error:
                    if error.errno not in _RETRY:
                        raise
                    self._count(self.retries, _RETRY[error.errno])
                    continue
                with self.lock:
                    if rng.valid and self.device.page_table.map(rng, seq):
                        self.pages_mapped += rng.npages
                        return True
                self._count(self.retries, "map_refused")
        return False

    def snapshot(self, chunk: Chunk) -> pm.Range:
        """A snapshot of the chunk, whose lock the caller holds; the range is unregistered, its pfns stay."""
        with self.range(chunk.addr, chunk.end) as rng:
            while True:
                rng.wait_until_valid(timeout=FAULT_DEADLINE)
                try:
                    rng.snapshot()
                except pm.MirrorError as error:
                    if error.errno not in _RETRY:
                        raise
                    self._count(self.retries, _RETRY[error.errno])
                    continue
                return rng

    def _count(self, counter: Counter[str], key: str) -> None:
        with self._counting:
            counter[key] += 1


def _window(mm: pm.AddressSpace, addr: int, end: int, size: int) -> tuple[int, int]:
    """The window of `size` bytes around [addr, end), counted from the vma's start and cut to its end."""
    vma = mm.vma_lookup(addr) if size else None
    if vma is None:
        return addr, end
    offset = addr - vma.start
    start = addr - offset % size
    return start, max(min(start + size, vma.end), end)
