"""A process with one of everything open: `python exposed.py` says so and stays. For test_security.py."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import signal
import struct
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from seams import foreign

import pymirror as pm

PAGE = 4096
PAGES = 64
SECRET = b"what no other user may read"
_REFUSED = (pm.MirrorError, pm.FeatureError)


class Driver(pm.Mirror):
    """Of a device that has an IOMMU, and one that has none."""

    def __init__(self, mm: pm.AddressSpace) -> None:
        self.dev = pm.Device("d0")
        self.direct = pm.Device("d1", iommu=False)
        super().__init__(mm)

    def sync_cpu_device_pagetables(self, update: pm.MmuNotifierRange) -> None:
        self.dev.page_table.clear(update.start, update.end)


class Exposed:
    """Memory that is mirrored, programmed, mapped for DMA, pinned and shared, a trace, and device memory."""

    def __init__(self, trace: Path) -> None:
        self.trace = pm.Trace(trace)
        self.mm = pm.AddressSpace()
        self.buf = self.mm.mmap(PAGES * PAGE)
        self.mm.madvise(self.buf.addr, self.buf.size, 15)
        np.frombuffer(self.buf, np.uint8)[:] = 1
        self.shared = self.mm.mmap(PAGE, shared=True)
        self.shared[0] = 1
        self.driver = Driver(self.mm)
        self.rng = self.driver.range(self.buf.addr, self.buf.addr + self.buf.size)
        self.rng.default_flags = pm.HMM_PFN_REQ_FAULT
        self.rng.register()
        self.rng.wait_until_valid(timeout=5)
        seq = self.rng.fault()
        self.table = self.driver.dev.page_table
        with self.driver.lock:
            assert self.table.map(self.rng, seq)
        self.refusals: list[str] = []
        self.daddrs = self._had(lambda: pm.hmm_range_dma_map(self.rng, self.driver.dev))
        self.direct = self._had(lambda: pm.hmm_range_dma_map(self.rng, self.driver.direct))
        self._had(lambda: self.driver.dev.dma_read(1 << 40, 8))
        self._had(lambda: self.driver.dev.read(self.mm, 0x1000, 8))
        self.pinned = self.mm.mmap(PAGE)
        self.pinned[0] = 1
        self.pin = self._had(lambda: pm.pin_user_pages(self.mm, self.pinned.addr, 1))
        self.moved = self.mm.mmap(PAGE)
        self.vram = self._had(lambda: pm.DeviceMemory(self.driver.dev, PAGE))
        self._had(lambda: pm.migrate_to_device(self.mm, self.moved.addr, self.moved.addr + PAGE, self.vram))
        with tempfile.TemporaryFile() as file:
            file.truncate(PAGE)
            self.copy = foreign.mmap(0, PAGE, flags=mmap.MAP_PRIVATE, fd=file.fileno())
        ctypes.memset(self.copy, 1, PAGE)
        self._had(lambda: pm.migrate_to_device(self.mm, self.copy, self.copy + PAGE, self.vram))

    def _had(self, make: Any) -> Any:
        """None where this user may not have it, and what was said then is kept."""
        try:
            return make()
        except _REFUSED as refused:
            self.refusals += [str(refused), repr(refused), repr(vars(refused))]
            return None

    def arrays(self) -> dict[str, list[int]]:
        """Every array in which a PFN could be."""
        start, end = self.buf.addr, self.buf.addr + self.buf.size
        found = {"range": self.rng.pfns, "page table": self.table.entries(start, end)}
        found["pfn"] = pm.hmm_pfn_to_pfn(self.rng.pfns)
        found["migrate"] = pm.migrate_pfn_to_pfn(pm.migrate_pfn(pm.hmm_pfn_to_pfn(self.rng.pfns)))
        sub = pm.IntervalNotifier(self.mm, start, end - start, lambda sub, update, seq: sub.set_seq(seq))
        modern = np.zeros(PAGES, np.uint64)
        self._fault(sub, modern)
        found["hmm_range_fault"] = modern
        dma_map = pm.hmm_dma_map_alloc(self.driver.dev, sub, start, PAGES)
        self._fault(sub, dma_map.pfn_list)
        found["hmm_dma_map"] = dma_map.pfn_list
        pm.hmm_dma_map_free(self.driver.dev, dma_map)
        sub.remove()
        if self.pin is not None:
            found["pin"] = self.pin.pfns
        return {name: np.asarray(values).tolist() for name, values in found.items()}

    def _fault(self, sub: pm.IntervalNotifier, pfns: Any) -> None:
        end = sub.start + sub.length
        pm.hmm_range_fault(
            sub, sub.start, end, pfns, default_flags=pm.HMM_PFN_REQ_FAULT, seq=sub.read_begin()
        )

    def texts(self) -> list[str]:
        """Everything that says something: reprs, dumps, counts, refusals, mappings, vmas."""
        objects = [self.mm, self.buf, self.driver, self.driver.dev, self.rng, self.table, self.pin, self.vram]
        objects += [self.trace, self.shared, self.driver.hmm, self.driver.dev.domain, self.daddrs]
        objects += [self.driver.dev.stats, self.mm.stats(), self.table.stats()]
        said = [repr(one) for one in objects] + [str(one) for one in objects] + self.refusals
        said += [str(mapping) for mapping in self.driver.dev.domain.mappings()]
        said += [str(vma) for vma in self.mm.vmas(self.buf.addr, self.buf.addr + self.buf.size)]
        with suppress(_REFUSED):
            self.table.verify(self.buf.addr, self.buf.addr + self.buf.size)
        return [*said, json.dumps(self.mm.dump(), default=str)]

    def close(self) -> None:
        pm.hmm_range_dma_unmap(self.rng, self.driver.dev)
        if self.direct is not None:
            pm.hmm_range_dma_unmap(self.rng, self.driver.direct)
        if self.pin is not None:
            pm.unpin_user_pages(self.pin)
        self.rng.unregister()
        self.driver.unregister()
        self.shared.close()
        self.mm.close()
        foreign.munmap(self.copy, PAGE)
        self.trace.close()


def give_up_capabilities() -> None:
    """What confined.py has left, so that this is a process like any other of its user."""
    header, none = struct.pack("=II", 0x20080522, 0), struct.pack("=6I", *(0,) * 6)
    assert ctypes.CDLL(None).capset(header, none) == 0


def main() -> None:
    if os.getuid() != 0:
        give_up_capabilities()
    made = Exposed(Path(sys.argv[1]))
    np.frombuffer(made.buf, np.uint8)[: len(SECRET)] = np.frombuffer(SECRET, np.uint8)
    about = {"addr": made.buf.addr, "pid": os.getpid(), "arrays": made.arrays(), "texts": made.texts()}
    print(json.dumps(about), flush=True)
    signal.pause()


if __name__ == "__main__":
    main()
