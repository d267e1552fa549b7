"""Every public method and function, called once: what it gives where it may not be called.

An outcome is the errno of the refusal, or OK. A new public method has to be entered here (test_wrong_use.py).
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from tempfile import NamedTemporaryFile
from typing import Any

import numpy as np
from calls_dma import OWN_MEMORY, PARAMETERS, RANGES
from mirroring import FAULT, PAGE, FaultDriver, filled
from notifying import interval

import pymirror as pm

OK = 0
DEADLK, SRCH, FAULT_ERRNO, INVAL = errno.EDEADLK, errno.ESRCH, errno.EFAULT, errno.EINVAL


COUNTED = (
    "active",
    "inflight",
    "interval_notifiers",
    "invalidate_seq",
    "mmu_notifiers",
    "queue_depth",
    "regions",
    "subs",
    "watched_bytes",
)


DOMAINS = ("DmaDomain", "IommuDomain", "DirectDomain")


class World:
    """One of everything, with memory that is mirrored and programmed."""

    def __init__(self, mm: pm.AddressSpace, trace: pm.Trace) -> None:
        self.trace = trace
        self.mm = mm
        self.buf = filled(mm, 4)
        self.content = bytes(self.buf)
        self.start, self.end = self.buf.addr, self.buf.addr + self.buf.size
        self.driver = FaultDriver(mm)
        self.driver.clears = False
        self.lock = self.driver.lock
        self.device = self.driver.device
        self.table = self.device.page_table
        self.sub = interval(mm, self.start, 4)
        self.whole = pm.MmuNotifier(mm)
        self.unregistered = self.driver.range(self.start, self.end)
        self.rng = self.driver.range(self.start, self.end)
        self.rng.default_flags = FAULT
        self.rng.register()
        self.seq = self.rng.fault()
        self.sub_seq = self.sub.read_begin()
        assert self.table.map(self.rng, self.seq)
        self.daddr = int(pm.hmm_range_dma_map(self.rng, self.device)[0])
        self.domain = self.device.domain
        self.sgl = pm.sg_list(self.content[:8])
        self.mapping = self.domain.mappings()[0]
        self.dma_map = pm.hmm_dma_map_alloc(self.device, self.sub, self.start, 4)
        pm.hmm_range_fault(
            self.sub, self.start, self.end, self.dma_map.pfn_list, default_flags=FAULT, seq=self.sub_seq
        )
        self.buffer = pm.FaultBuffer()
        self.array = np.ones(4 * PAGE, np.uint8)
        self.own = mm.adopt(self.array)
        self.vram = pm.DeviceMemory(self.device, PAGE)
        self.lone = mm.mmap(PAGE)
        self.exclusive = pm.make_device_exclusive(mm, self.lone.addr, self.device)
        self.lone_sub = interval(mm, self.lone.addr, 1)
        assert self.table.map(self.lone_sub, self.lone_sub.read_begin(), self.lone.addr, self.exclusive.pfns)
        spare = mm.mmap(PAGE)
        with pm.migrate_vma_setup(mm, spare.addr, spare.addr + PAGE, self.vram) as self.migrated:
            pass
        self.evicted = pm.migrate_device_range(self.vram, self.vram.pfns.start, 1)
        self.held = mm.mmap(2 * PAGE)
        self.pin, self.other_pin = (pm.pin_user_pages(mm, self.held.addr, 2) for _ in range(2))

    def bounce(self) -> None:
        slots = self.device.swiotlb.alloc(8)
        assert slots is not None
        self.device.swiotlb.free(slots)

    def state(self) -> dict[str, Any]:
        """All that a refused call must leave alone."""
        stats = self.mm.stats()
        vmas = (self.mm.vma_lookup(addr) for addr in range(self.start, self.end, PAGE))
        return {
            # Not where they begin and end: what is beside them is others' memory.
            "protection": [vma and (vma.prot, vma.shared, vma.file) for vma in vmas],
            "content": bytes(self.buf),
            "left": self.buf.left,
            "pfns": self.rng.pfns.tolist(),
            "entries": self.table.entries(self.start, self.end).tolist(),
            "table": self.table.stats(),
            "registered": (self.rng.registered, self.driver.registered, self.whole.registered),
            "errors": len(self.mm.errors),
            "closed": self.mm.closed,
            **{name: stats[name] for name in COUNTED},
        }

    def end_of_it(self) -> None:
        for pin in (self.pin, self.other_pin):
            with pin:
                pass
        self.rng.unregister()
        self.sub.remove()
        self.lone_sub.remove()
        self.whole.unregister()
        self.driver.unregister()


@contextmanager
def world() -> Iterator[World]:
    # What an ordinary user can have on a device.
    delivery = "thread" if os.geteuid() == 0 else "inline"
    with pm.AddressSpace(fault_delivery=delivery) as mm, NamedTemporaryFile() as file:
        # Closed: there is one at a time, but tests have several worlds.
        with pm.Trace(file.name) as trace:
            pass
        made = World(mm, trace)
        yield made
        if not mm.closed:
            made.end_of_it()


@dataclass(frozen=True)
class Call:
    """``run`` makes it. Outcomes: in a callback, under a driver lock, after close(), in a forked child."""

    name: str
    run: Callable[[World], object]
    callback: int = OK
    locked: int = OK
    closed: int = OK
    child: int = OK


def _enter(manager: Any) -> None:
    with manager:
        pass


def _changes(name: str, run: Callable[[World], object]) -> Call:
    """It runs callbacks, or waits for them."""
    return Call(name, run, DEADLK, DEADLK, SRCH, SRCH)


def _maps(name: str, run: Callable[[World], object]) -> Call:
    """DMA to mirrored memory: the mapping of a closed mm is fenced."""
    return Call(name, run, DEADLK, DEADLK, FAULT_ERRNO, SRCH)


def _looks(name: str, run: Callable[[World], object]) -> Call:
    return Call(name, run)


def _pfns() -> Any:
    return np.zeros(4, np.uint64)


CALLS = [
    _changes("AddressSpace.mmap", lambda w: w.mm.mmap(PAGE)),
    _changes("AddressSpace.munmap", lambda w: w.mm.munmap(w.start, PAGE)),
    _changes("AddressSpace.mprotect", lambda w: w.mm.mprotect(w.start, PAGE, mmap.PROT_READ)),
    _changes("AddressSpace.madvise", lambda w: w.mm.madvise(w.start, PAGE, mmap.MADV_DONTNEED)),
    _changes("AddressSpace.mremap", lambda w: w.mm.mremap(w.start, PAGE, PAGE, flags=5)),
    _changes("AddressSpace.oom_reap", lambda w: w.mm.oom_reap(w.start, w.start + PAGE)),
    Call("AddressSpace.adopt", lambda w: w.mm.adopt(w.array), DEADLK, OK, SRCH, SRCH),
    Call("Adopted.close", lambda w: w.own.close(), DEADLK, DEADLK),
    _looks("Adopted.closed", lambda w: w.own.closed),
    _looks("Adopted.view", lambda w: w.own.view),
    _changes("AddressSpace.invalidate", lambda w: _enter(w.mm.invalidate(w.start, w.end))),
    _changes("AddressSpace.read_lock", lambda w: _enter(w.mm.read_lock())),
    _changes("AddressSpace.sync", lambda w: w.mm.sync()),
    Call("AddressSpace.close", lambda w: w.mm.close(), DEADLK, DEADLK),
    Call("AddressSpace.vmas", lambda w: list(w.mm.vmas(w.start, w.end)), DEADLK, OK, SRCH, SRCH),
    Call("AddressSpace.find_vma", lambda w: w.mm.find_vma(w.start), DEADLK, OK, SRCH, SRCH),
    Call("AddressSpace.vma_lookup", lambda w: w.mm.vma_lookup(w.start), DEADLK, OK, SRCH, SRCH),
    Call("AddressSpace.watch", lambda w: w.mm.watch(w.start, w.end), DEADLK, OK, SRCH, SRCH),
    Call("AddressSpace.stats", lambda w: w.mm.stats(), OK, OK, OK, SRCH),
    _looks("AddressSpace.dump", lambda w: w.mm.dump()),
    _looks("AddressSpace.closed", lambda w: w.mm.closed),
    Call("MmuNotifier.__init__", lambda w: pm.MmuNotifier(w.mm), DEADLK, OK, SRCH, SRCH),
    Call("MmuNotifier.unregister", lambda w: w.whole.unregister(), DEADLK, DEADLK),
    _looks("MmuNotifier.registered", lambda w: w.whole.registered),
    _looks("MmuNotifier.invalidate_range_start", lambda w: None),
    _looks("MmuNotifier.invalidate_range_end", lambda w: None),
    _looks("MmuNotifier.release", lambda w: None),
    Call("IntervalNotifier.__init__", lambda w: interval(w.mm, w.start), DEADLK, OK, SRCH, SRCH),
    Call("IntervalNotifier.read_begin", lambda w: w.sub.read_begin(), DEADLK, DEADLK, SRCH, SRCH),
    _looks("IntervalNotifier.read_retry", lambda w: w.sub.read_retry(w.sub_seq)),
    _looks("IntervalNotifier.check_retry", lambda w: w.sub.check_retry(w.sub_seq)),
    Call("IntervalNotifier.set_seq", lambda w: w.sub.set_seq(2), INVAL, INVAL, INVAL, INVAL),
    Call("IntervalNotifier.remove", lambda w: w.sub.remove(), DEADLK, DEADLK),
    *(
        _looks(f"IntervalNotifier.{name}", lambda w, name=name: getattr(w.sub, name))  # type: ignore[misc]
        for name in ("last", "length", "mm", "native", "start", "two_pass", "update_lock", "watched")
    ),
    _looks("IntervalNotifier.invalidate", lambda w: None),
    _looks("IntervalNotifier.invalidate_start", lambda w: None),
    _looks("IntervalNotifier.invalidate_finish", lambda w: None),
    Call("Mirror.__init__", lambda w: pm.Mirror(w.mm), DEADLK, OK, FAULT_ERRNO, SRCH),
    Call("Mirror.range", lambda w: w.driver.range(w.start, w.end), DEADLK),
    Call("Mirror.unregister", lambda w: w.driver.unregister(), DEADLK, DEADLK),
    _looks("Mirror.mm_is_alive", lambda w: w.driver.mm_is_alive()),
    Call("Mirror.mm_down_read", lambda w: _enter(w.driver.mm_down_read()), DEADLK, DEADLK, INVAL, SRCH),
    _looks("Mirror.hmm", lambda w: w.driver.hmm),
    _looks("Mirror.registered", lambda w: w.driver.registered),
    _looks("Mirror.sync_cpu_device_pagetables", lambda w: None),
    _looks("Mirror.invalidate_range_start", lambda w: None),
    _looks("Mirror.invalidate_range_end", lambda w: None),
    _looks("Mirror.release", lambda w: None),
    Call("Hmm.get", lambda w: pm.Hmm.get(w.mm), OK, OK, FAULT_ERRNO, SRCH),
    Call("Hmm.check_alive", lambda w: w.driver.hmm.check_alive("test"), OK, OK, FAULT_ERRNO, SRCH),
    _looks("Hmm.dead", lambda w: w.driver.hmm.dead),
    _looks("Hmm.mm", lambda w: w.driver.hmm.mm),
    Call("Range.register", lambda w: w.unregistered.register(), DEADLK, OK, FAULT_ERRNO, SRCH),
    Call("Range.unregister", lambda w: w.rng.unregister(), DEADLK),
    Call("Range.wait_until_valid", lambda w: w.rng.wait_until_valid(), DEADLK, DEADLK, OK, SRCH),
    Call("Range.fault", lambda w: w.rng.fault(), DEADLK, DEADLK, FAULT_ERRNO, SRCH),
    Call("Range.snapshot", lambda w: w.rng.snapshot(), DEADLK, DEADLK, FAULT_ERRNO, SRCH),
    _looks("Range.read_retry", lambda w: w.rng.read_retry(w.seq)),
    *(
        _looks(f"Range.{name}", lambda w, name=name: getattr(w.rng, name))  # type: ignore[misc]
        for name in ("default_flags", "encoding", "end", "mirror", "mm", "npages", "page_shift", "pfns")
    ),
    *(
        _looks(f"Range.{name}", lambda w, name=name: getattr(w.rng, name))  # type: ignore[misc]
        for name in ("pfn_flags_mask", "registered", "seq", "start", "sub", "valid")
    ),
    _changes("hmm_range_fault", lambda w: pm.hmm_range_fault(w.sub, w.start, w.end, _pfns(), seq=w.sub_seq)),
    Call("hmm_vma_fault", lambda w: pm.hmm_vma_fault(w.rng), DEADLK, DEADLK, FAULT_ERRNO, SRCH),
    Call("hmm_vma_range_done", lambda w: pm.hmm_vma_range_done(w.rng), DEADLK),
    _looks("hmm_device_entry_to_pfn", lambda w: pm.hmm_device_entry_to_pfn(w.rng, w.rng.pfns)),
    _looks("hmm_device_entry_from_pfn", lambda w: pm.hmm_device_entry_from_pfn(w.rng, 1)),
    Call("hmm_range_snapshot", lambda w: pm.hmm_range_snapshot(w.rng), DEADLK, DEADLK, FAULT_ERRNO, SRCH),
    Call("PageTable.map", lambda w: w.table.map(w.rng, w.seq), DEADLK),
    Call("PageTable.verify", lambda w: w.table.verify(w.start, w.end), DEADLK, OK, SRCH),
    _looks("PageTable.clear", lambda w: w.table.clear(w.end, w.end + PAGE)),
    _looks("PageTable.entries", lambda w: w.table.entries(w.start, w.end)),
    _looks("PageTable.next", lambda w: w.table.next(w.start, w.end)),
    _looks("PageTable.stats", lambda w: w.table.stats()),
    _looks("PageTable.who_mapped", lambda w: w.table.who_mapped(w.start)),
    _looks("PageTable.mm", lambda w: w.table.mm),
    _looks("PageTable.native", lambda w: w.table.native),
    _looks("PageTable.check_mm", lambda w: w.table.check_mm(w.mm, "test")),
    _looks("PageTable.access", lambda w: None),
    _changes("Device.read", lambda w: w.device.read(w.mm, w.start, 8)),
    _changes("Device.read_into", lambda w: w.device.read_into(w.mm, w.start, bytearray(8))),
    _changes("Device.write", lambda w: w.device.write(w.mm, w.start, w.content[:8])),
    Call("FaultBuffer.fetch", lambda w: w.buffer.fetch(timeout=0)),
    _looks("FaultBuffer.replay", lambda w: w.buffer.replay()),
    _looks("FaultBuffer.cancel", lambda w: None),
    _looks("FaultBuffer.close", lambda w: pm.FaultBuffer().close()),
    _looks("FaultBuffer.__len__", lambda w: len(w.buffer)),
    _looks("Device.set_fault_handler", lambda w: w.device.set_fault_handler(w.driver.handle)),
    _changes("pin_user_pages", lambda w: _enter(pm.pin_user_pages(w.mm, w.held.addr, 1))),
    _changes("migrate_to_device", lambda w: pm.migrate_to_device(w.mm, w.start, w.end, w.vram)),
    _changes("migrate_to_system", lambda w: pm.migrate_to_system(w.mm, w.start, w.end, w.vram)),
    _looks("Trace.close", lambda w: w.trace.close()),
    _looks("Trace.path", lambda w: w.trace.path),
    _looks("Trace.events", lambda w: w.trace.events),
    _looks("Trace.dropped", lambda w: w.trace.dropped),
    _changes("make_device_exclusive", lambda w: pm.make_device_exclusive(w.mm, w.start, w.device)),
    _changes(
        "make_device_exclusive_range",
        lambda w: pm.make_device_exclusive_range(w.mm, w.start, w.end, w.device),
    ),
    Call("exclusive_pfns", lambda w: pm.exclusive_pfns(w.mm, w.start, w.end), OK, OK, SRCH, SRCH),
    _looks("migrate_pfn", lambda w: pm.migrate_pfn(w.rng.pfns)),
    _looks("migrate_pfn_to_pfn", lambda w: pm.migrate_pfn_to_pfn(w.rng.pfns)),
    _changes("migrate_vma_setup", lambda w: _enter(pm.migrate_vma_setup(w.mm, w.start, w.end, w.vram))),
    *(
        Call(name, run, DEADLK, INVAL, INVAL, INVAL)
        for name, run in {
            "migrate_vma_pages": lambda w: pm.migrate_vma_pages(w.migrated),
            "MigrateVma.alloc_pages": lambda w: w.migrated.alloc_pages(w.migrated.src != 0),
        }.items()
    ),
    _looks("migrate_vma_finalize", lambda w: pm.migrate_vma_finalize(w.migrated)),
    _looks("MigrateVma.pgmap_owner", lambda w: w.migrated.pgmap_owner),
    Call(
        "migrate_device_range",
        lambda w: pm.migrate_device_range(w.vram, w.vram.pfns.start, 1),
        DEADLK,
        OK,
        INVAL,
        SRCH,
    ),
    Call("migrate_device_pages", lambda w: pm.migrate_device_pages(w.evicted), DEADLK, DEADLK, OK, SRCH),
    _looks("migrate_device_finalize", lambda w: pm.migrate_device_finalize(w.evicted)),
    _looks("DeviceMemory.pfns", lambda w: w.vram.pfns),
    Call("coherent_pages", lambda w: pm.coherent_pages(w.mm, w.start, w.end), OK, OK, SRCH, SRCH),
    Call("DeviceMemory.holds", lambda w: w.vram.holds(w.start, w.end), OK, OK, OK, SRCH),
    Call("DeviceExclusive.release", lambda w: w.exclusive.release(), DEADLK, DEADLK),
    _looks("DeviceExclusive.held", lambda w: w.exclusive.held),
    _looks("DeviceExclusive.end", lambda w: w.exclusive.end),
    _changes("Device.atomic_add", lambda w: w.device.atomic_add(w.mm, w.lone.addr, 1)),
    _changes("Device.compare_and_swap", lambda w: w.device.compare_and_swap(w.mm, w.lone.addr, 1, 2)),
    Call("DeviceMemory.populate", lambda w: w.vram.populate(w.start, w.end), DEADLK, DEADLK, OK, SRCH),
    Call("DeviceMemory.close", lambda w: w.vram.close(), DEADLK, DEADLK),
    _looks("DeviceMemory.mm", lambda w: w.vram.mm),
    _looks("DeviceMemory.used", lambda w: w.vram.used),
    Call("unpin_user_pages", lambda w: pm.unpin_user_pages(w.other_pin), OK, OK, SRCH, SRCH),
    Call("PinnedPages.read", lambda w: w.pin.read(0, 8), OK, OK, SRCH, SRCH),
    Call("PinnedPages.read_into", lambda w: w.pin.read_into(0, bytearray(8)), OK, OK, SRCH, SRCH),
    Call("PinnedPages.write", lambda w: w.pin.write(0, b"w"), OK, OK, SRCH, SRCH),
    *(
        _looks(f"PinnedPages.{name}", lambda w, name=name: getattr(w.pin, name))  # type: ignore[misc]
        for name in ("end", "mm", "native", "npages", "pfns", "pinned", "pinned_at", "start", "unpinned_at")
    ),
    _maps("Device.dma_read", lambda w: w.device.dma_read(w.daddr, 8)),
    _maps("Device.dma_read_into", lambda w: w.device.dma_read_into(w.daddr, bytearray(8))),
    _maps("Device.dma_write", lambda w: w.device.dma_write(w.daddr, w.content[:8])),
    _maps("Device.dma_read_sg", lambda w: w.device.dma_read_sg([(w.daddr, 8)])),
    _maps("Device.dma_write_sg", lambda w: w.device.dma_write_sg([(w.daddr, 8)], w.content[:8])),
    *(
        _looks(f"Device.{name}", lambda w, name=name: getattr(w.device, name))  # type: ignore[misc]
        for name in ("domain", "swiotlb", "coherent_dma_mask", "dma_errors")
    ),
    Call("Device.release", lambda w: w.device.release(), child=SRCH),
    *(Call(name, run, child=SRCH) for name, run in OWN_MEMORY.items()),
    *(_looks(name, run) for name, run in PARAMETERS.items()),
    *(Call(name, run, closed=closed, child=child) for name, (run, closed, child) in RANGES.items()),
    _looks("hmm_pfn_to_pfn", lambda w: pm.hmm_pfn_to_pfn(w.rng.pfns)),
    _looks("is_device_exclusive_pfn", lambda w: pm.is_device_exclusive_pfn(w.rng.pfns)),
    _looks("is_device_private_pfn", lambda w: pm.is_device_private_pfn(w.rng.pfns)),
    _looks("hmm_pfn_to_map_order", lambda w: pm.hmm_pfn_to_map_order(w.rng.pfns)),
    *(_looks(f"SwiotlbPool.{name}", lambda w: w.bounce()) for name in ("alloc", "free")),
    _looks("SwiotlbPool.owns", lambda w: w.device.swiotlb.owns(0)),
    _looks("SwiotlbPool.bus_last", lambda w: w.device.swiotlb.bus_last),
    _maps("hmm_range_dma_map", lambda w: pm.hmm_range_dma_map(w.rng, w.device)),
    *(
        _looks(f"{domain}.{name}", lambda w, name=name: getattr(w.domain, name))  # type: ignore[misc]
        for domain in DOMAINS
        for name in ("new_cookie", "remember", "forget", "iommu")
    ),
    *(_looks(f"{domain}.mappings", lambda w: w.domain.mappings()) for domain in DOMAINS),
    *(_looks(f"{domain}.mapping_of", lambda w: w.domain.mapping_of(w.mapping.cookie)) for domain in DOMAINS),
    *(
        Call(f"{domain}.{name}", lambda w, name=name: getattr(w.domain, name)(), child=SRCH)  # type: ignore[misc]
        for domain in DOMAINS
        for name in ("stats", "flush")
    ),
    Call("IommuDomain.iova_stats", lambda w: w.domain.iova_stats(), child=SRCH),
    Call("IommuDomain.reserve", lambda w: w.domain.reserve(4096, 8191), child=SRCH),
    *(
        _looks(f"DmaMapping.{name}", lambda w, name=name: getattr(w.mapping, name))  # type: ignore[misc]
        for name in (
            "cookie",
            "device",
            "direction",
            "iova",
            "kind",
            "mm",
            "native",
            "npages",
            "size",
            "site",
        )
    ),
    *(
        _looks(f"DmaMapping.{name}", lambda w, name=name: getattr(w.mapping, name))  # type: ignore[misc]
        for name in ("start", "when", "mapped", "gave", "dirtied", "unlink", "unmap")
    ),
    _looks("HmmDmaMap.iova", lambda w: w.dma_map.iova),
    _looks("HmmDmaMap.end", lambda w: w.dma_map.end),
    _looks("HmmDmaMap.entries", lambda w: w.dma_map.entries(w.start, w.end)),
    Call("DmaMapping.info", lambda w: w.mapping.info(), child=SRCH),
    Call("Region.close", lambda w: w.buf.close(), DEADLK, DEADLK),
    _looks("Region.closed", lambda w: w.buf.closed),
    _looks("Region.fd", lambda w: w.buf.fd),
    _looks("Region.left", lambda w: w.buf.left),
    _looks("Region.__getitem__", lambda w: w.buf[0]),
    _looks("Region.__len__", lambda w: len(w.buf)),
    Call("DriverLock.acquire", lambda w: _enter(w.lock), OK, DEADLK),
    _looks("DriverLock.release", lambda w: None),
    _looks("DriverLock.held", lambda w: w.lock.held),
    _looks("DriverLock.owner", lambda w: w.lock.owner),
]

# What ends something comes last, so that the others find it there.
_ENDS = ("unregister", "remove", "close")
_LAST = "Device.release"
CALLS.sort(
    key=lambda call: (
        call.name == _LAST,
        call.name.endswith(("range_done", "unpin_user_pages")) or call.name.partition(".")[2] in _ENDS,
    )
)

#: Made by the library and given to callbacks: values.
VALUES = {
    "CallbackError",
    "DeviceFault",
    "DmaDebugReport",
    "DmaEntry",
    "DmaIovaState",
    "FaultEntry",
    "Features",
    "MmuNotifierRange",
    "Scatterlist",
    "Vma",
}
