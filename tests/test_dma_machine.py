"""DMA mappings of mirrored and pinned memory against a model: random steps, checked after each.

What must hold: no IOVA is handed out twice and none is lost; a device reads what the page that it may reach
holds, never another; what was invalidated is not served, and told as stale where the driver forgot it; pins
are all given back.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tally
from dma import numbers
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from mirroring import FAULT, PAGE, WRITE
from seams import foreign

import pymirror as pm
from pymirror.features import probe
from pymirror.pfn import PfnArray

PAGES = 6
MADV_DONTNEED = 4
READ_ONLY, READ_WRITE = 1, 3
FEATURES = probe()

pages = st.integers(0, PAGES - 1)
devices = st.sampled_from(
    ["strict", "lazy", "shared", "direct"] if "pfn" in FEATURES else ["strict", "lazy", "shared"]
)


class Memory:
    """A Region and what the CPU has in it: a page object for each page, so that a pin can keep an old one."""

    def __init__(self, mm: pm.AddressSpace) -> None:
        self.buf = mm.mmap(PAGES * PAGE)
        view = numbers(self.buf)
        self.pages = [bytearray(view[at : at + PAGE].tobytes()) for at in range(0, PAGES * PAGE, PAGE)]
        self.writable = True

    def addr(self, page: int) -> int:
        return self.buf.addr + page * PAGE


class Driver(pm.Mirror):
    """It unmaps what is invalidated, or forgets to."""

    def __init__(self, mm: pm.AddressSpace) -> None:
        self.mapped: list[Mapping] = []
        self.forgets = False
        super().__init__(mm)

    def sync_cpu_device_pagetables(self, update: pm.MmuNotifierRange) -> None:
        with self.lock:
            for mapping in self.mapped:
                mapping.invalidated(update.start, update.end, self.forgets)


class Mapping:
    """What was mapped, and what a device must find at each of its pages: a page object, "stale", or None."""

    def __init__(self, memory: Memory, device: pm.Device, owner: Any, daddrs: Any, write: bool) -> None:
        self.memory, self.device, self.owner, self.daddrs, self.write = memory, device, owner, daddrs, write
        self.addresses = daddrs.tolist()
        self.found: list[bytearray | str | None] = list(memory.pages)

    @property
    def mirrored(self) -> bool:
        return isinstance(self.owner, pm.Range)

    def unmap(self, start: int, end: int) -> int:
        unmap = pm.hmm_range_dma_unmap if self.mirrored else pm.gup_range_dma_unmap
        taken = unmap(self.owner, self.device, self.daddrs, start=start, end=end)
        for page in range(PAGES):
            if start < self.memory.addr(page) + PAGE and self.memory.addr(page) < end:
                self.found[page] = None
        return taken

    def invalidated(self, start: int, end: int, forget: bool) -> None:
        touched = [page for page in range(PAGES) if start <= self.memory.addr(page) < end]
        if not touched or not any(self.found[page] is not None for page in range(PAGES)):
            return
        if not forget:
            self.unmap(self.memory.addr(touched[0]), self.memory.addr(touched[-1]) + PAGE)
            return
        for page in touched:
            if self.found[page] is not None:
                self.found[page] = "stale"

    def live(self) -> int:
        return sum(found is not None for found in self.found)


class DmaMachine(RuleBasedStateMachine):
    memories = Bundle("memories")
    mappings = Bundle("mappings")
    pins = Bundle("pins")

    def __init__(self) -> None:
        super().__init__()
        self.mm = pm.AddressSpace()
        self.driver = Driver(self.mm)
        shared = pm.IommuDomain()
        self.devices = {
            "strict": pm.Device("strict"),
            "lazy": pm.Device("lazy", iommu=pm.IommuDomain(strict=False)),
            "shared": pm.Device("shared", iommu=shared),
            "direct": pm.Device("direct", iommu=False),
        }
        self.all: list[Mapping] = []
        self.held: list[pm.PinnedPages] = []
        self.ranges: list[pm.Range] = []

    @rule(target=memories)
    def map_memory(self) -> Memory:
        return Memory(self.mm)

    @rule(memory=memories, page=pages, value=st.integers(0, 255))
    def cpu_writes(self, memory: Memory, page: int, value: int) -> None:
        if memory.writable:
            np.frombuffer(memory.buf, np.uint8)[page * PAGE + 1] = value
            memory.pages[page][1] = value

    @rule(target=mappings, memory=memories, name=devices)
    def mirror(self, memory: Memory, name: str) -> Mapping:
        rng = self.driver.range(memory.buf.addr, memory.buf.addr + memory.buf.size)
        rng.register()
        self.ranges.append(rng)
        rng.default_flags, rng.pfn_flags_mask = WRITE if memory.writable else FAULT, 0
        daddrs = self._retry(rng, lambda: pm.hmm_range_dma_map(rng, self.devices[name]))
        return self._mapped(Mapping(memory, self.devices[name], rng, daddrs, memory.writable))

    @precondition(lambda self: "io_uring" in FEATURES)
    @rule(target=pins, memory=memories)
    def pin(self, memory: Memory) -> tuple[Memory, list[bytearray], pm.PinnedPages | None]:
        if not memory.writable:
            return memory, [], None
        pin = pm.pin_user_pages(self.mm, memory.buf.addr, PAGES)
        self.held.append(pin)
        return memory, list(memory.pages), pin

    @rule(target=mappings, pinned=pins, name=devices)
    def map_pin(self, pinned: Any, name: str) -> Mapping:
        memory, held, pin = pinned
        if pin is None or not pin.pinned:
            return Mapping(memory, self.devices[name], None, np.zeros(PAGES, np.uint64), False)
        made = Mapping(memory, self.devices[name], pin, pm.gup_range_dma_map(pin, self.devices[name]), True)
        made.found = list(held)
        return self._mapped(made)

    @rule(pinned=consumes(pins))
    def unpin(self, pinned: Any) -> None:
        _, _, pin = pinned
        if pin is None or not pin.pinned:
            return
        if any(mapping.owner is pin and mapping.live() for mapping in self.all):
            with pytest.raises(pm.MirrorError, match="mapped for DMA"):
                pm.unpin_user_pages(pin)
            return
        pm.unpin_user_pages(pin, dirty=True)

    @rule(memory=memories, page=pages, behind=st.booleans())
    def discard(self, memory: Memory, page: int, behind: bool) -> None:
        if behind and "uffd_events" in FEATURES:
            foreign.madvise(memory.addr(page), PAGE, MADV_DONTNEED)
            self.mm.sync()
        else:
            self.mm.madvise(memory.addr(page), PAGE, MADV_DONTNEED)
        memory.pages[page] = bytearray(PAGE)

    @rule(memory=memories)
    def protect(self, memory: Memory) -> None:
        self.mm.mprotect(memory.buf.addr, memory.buf.size, READ_ONLY if memory.writable else READ_WRITE)
        memory.writable = not memory.writable

    @rule(memory=memories, first=pages, n=pages)
    def invalidate(self, memory: Memory, first: int, n: int) -> None:
        last = min(first + n + 1, PAGES)
        with self.mm.invalidate(memory.addr(first), memory.addr(last)):
            pass

    @rule(forgets=st.booleans())
    def change_the_drivers_mind(self, forgets: bool) -> None:
        self.driver.forgets = forgets

    @rule(mapping=mappings, first=pages, n=pages)
    def unmap(self, mapping: Mapping, first: int, n: int) -> None:
        if mapping.owner is None:
            return
        last = min(first + n + 1, PAGES)
        there = sum(found is not None for found in mapping.found[first:last])
        if not mapping.live():
            return
        assert mapping.unmap(mapping.memory.addr(first), mapping.memory.addr(last)) == there

    @rule(name=devices)
    def flush(self, name: str) -> None:
        self.devices[name].domain.flush()

    @rule(mapping=mappings, page=pages)
    def device_reads(self, mapping: Mapping, page: int) -> None:
        if mapping.owner is None or self._aliased(mapping):
            return
        found, daddr = mapping.found[page], mapping.addresses[page]
        if isinstance(found, bytearray):
            assert mapping.device.dma_read(daddr, PAGE) == bytes(found)
        elif found == "stale":
            with pytest.raises(pm.StaleDmaError):
                mapping.device.dma_read(daddr, 1)
        elif not self._reused(mapping, daddr):
            with pytest.raises(pm.IommuFaultError):
                mapping.device.dma_read(daddr, 1)

    @rule(mapping=mappings, page=pages, value=st.integers(0, 255))
    def device_writes(self, mapping: Mapping, page: int, value: int) -> None:
        if mapping.owner is None or self._aliased(mapping):
            return
        found, daddr = mapping.found[page], mapping.addresses[page]
        if isinstance(found, bytearray) and mapping.write:
            mapping.device.dma_write(daddr + 2, bytes([value]))
            found[2] = value
        elif isinstance(found, bytearray):
            with pytest.raises(pm.IommuFaultError, match="for reading"):
                mapping.device.dma_write(daddr, b"x")

    @invariant()
    def bookkeeping_agrees(self) -> None:
        tally.add("steps on DMA mappings", steps=1)
        for device in self.devices.values():
            if device is self.devices["direct"] and "pfn" not in FEATURES:
                continue
            live = [one for one in self.all if one.device is device and one.live()]
            stats = device.domain.stats()
            assert stats["mapped_pages"] == sum(one.live() for one in live)
            assert stats["mappings"] == len(live)
            if isinstance(device.domain, pm.IommuDomain):
                given = [daddr for one in live for daddr in one.addresses]
                assert len(set(given)) == len(given), "an IOVA was handed out twice"
                waiting = stats["lazy_pending"]
                assert device.domain.iova_stats()["live"] == len(live) + waiting, "an IOVA is lost"

    @invariant()
    def the_cpu_has_its_bytes(self) -> None:
        assert not self.mm.errors
        for memory in {id(one.memory): one.memory for one in self.all}.values():
            assert bytes(memory.buf) == b"".join(bytes(page) for page in memory.pages)

    @invariant()
    def pins_are_counted(self) -> None:
        held = sum(pin.npages for pin in self.held if pin.pinned)
        assert self.mm.stats()["pinned_pages"] == held

    def teardown(self) -> None:
        for mapping in self.all:
            if mapping.live():
                mapping.unmap(mapping.memory.addr(0), mapping.memory.addr(PAGES))
        for pin in self.held:
            if pin.pinned:
                pm.unpin_user_pages(pin)
        for rng in self.ranges:
            rng.unregister()
        for device in self.devices.values():
            device.domain.flush()
        self.bookkeeping_agrees()
        self.pins_are_counted()
        self.driver.unregister()
        self.mm.close()

    def _retry(self, rng: pm.Range, work: Callable[[], PfnArray]) -> PfnArray:
        """A discard behind the library's back is being invalidated for a while after it."""
        while True:
            rng.wait_until_valid(10)
            try:
                return work()
            except pm.MirrorError as again:
                if again.errno not in (errno.EBUSY, errno.EAGAIN):
                    raise

    def _mapped(self, mapping: Mapping) -> Mapping:
        self.all.append(mapping)
        if mapping.mirrored:
            self.driver.mapped.append(mapping)
        return mapping

    def _aliased(self, mapping: Mapping) -> bool:
        """Without an IOMMU several mappings have the same address: a device then meets any of them."""
        return not mapping.device.domain.iommu and any(
            one is not mapping
            and one.device is mapping.device
            and set(one.addresses) & set(mapping.addresses)
            for one in self.all
        )

    def _reused(self, mapping: Mapping, daddr: int) -> bool:
        """The address has been given to another mapping since."""
        return any(
            one is not mapping
            and one.live()
            and one.device.domain is mapping.device.domain
            and daddr in one.addresses
            for one in self.all
        )


STRESS = int(os.environ.get("PYMIRROR_STRESS", "1"))
SETTINGS = settings(
    max_examples=60 * STRESS,
    stateful_step_count=40,
    deadline=None,
    derandomize="CI" in os.environ,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.timeout(120 * STRESS)
def test_dma_behaves_as_the_model() -> None:
    with tally.timed("steps on DMA mappings"):
        run_state_machine_as_test(DmaMachine, settings=SETTINGS)
