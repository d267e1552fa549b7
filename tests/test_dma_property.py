"""The DMA API over driver memory against a model: random calls, right and wrong ones, checked after each.

What must hold: no DMA address is given twice and none is lost; a device sees what the model says it sees, be
it the memory or a bounce buffer, and nothing once it is unmapped, invalidated or released; a wrong call is
refused and changes nothing; what is left at a release is reported, one by one, and gone. A range is mirrored
into one of the domains meanwhile; more of ranges and pins is in test_dma_machine.py.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tally
from dma import DmaDriver
from dma_memory import PAGE, pages, refuses
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)
from mirroring import WRITE

import pymirror as pm
from pymirror.dma.swiotlb import IO_TLB_SEGSIZE, IO_TLB_SIZE
from pymirror.features import probe

PAGES = 4
STRESS = int(os.environ.get("PYMIRROR_STRESS", "1"))
DIRECT = "pfn" in probe()
NAMES = ["strict", "lazy", "shared", "partner", *(["direct", "bouncing"] if DIRECT else [])]

names = st.sampled_from(NAMES)
ways = st.sampled_from([pm.DMA_BIDIRECTIONAL, pm.DMA_TO_DEVICE, pm.DMA_FROM_DEVICE])
places = st.integers(0, PAGES * PAGE - 1)
values = st.integers(0, 255)


class Piece:
    """A piece of memory and where a device finds it: ``seen`` is what it finds, the memory or a copy."""

    def __init__(self, device: pm.Device, memory: Any, address: int, way: pm.DmaDirection) -> None:
        self.device, self.memory, self.address, self.way = device, memory, address, way
        self.cpu = bytearray(memory.tobytes())
        self.bounced = not device.domain.iommu and device.swiotlb.owns(address)
        self.seen = bytearray(self.cpu) if self.bounced else self.cpu

    @property
    def size(self) -> int:
        return len(self.cpu)

    def to_cpu(self, start: int = 0, end: int | None = None) -> None:
        if self.way.device_writes:
            self.cpu[start:end] = self.seen[start:end]

    def to_device(self, start: int = 0, end: int | None = None) -> None:
        if self.way.device_reads:
            self.seen[start:end] = self.cpu[start:end]


class Mapping:
    """What one call mapped: its pieces, how it is undone, how many records and slots and extents it has."""

    def __init__(self, pieces: list[Piece], undo: Callable[[], None], *, kind: str, records: int = 1) -> None:
        self.pieces, self.undo, self.kind, self.records = pieces, undo, kind, records
        self.device = pieces[0].device
        self.live = True
        self.copies = kind != "coherent"

    def unmapped(self, *, copied: bool) -> None:
        for piece in self.pieces:
            if copied and piece.bounced and self.copies:
                piece.to_cpu()
            piece.memory = piece.memory.copy()
        self.live = False
        if self.kind == "coherent":
            self.undo = lambda: None

    def slots(self) -> int:
        round_up = PAGE if self.kind == "coherent" else 1
        sizes = [-(-piece.size // round_up) * round_up for piece in self.pieces if piece.bounced]
        return sum(-(-size // IO_TLB_SIZE) for size in sizes)


class DriverMemoryMachine(RuleBasedStateMachine):
    mappings = Bundle("mappings")

    def __init__(self) -> None:
        super().__init__()
        self.domains: dict[str, Any] = {"lazy": pm.IommuDomain(strict=False), "shared": pm.IommuDomain()}
        self.domains["partner"] = self.domains["shared"]
        self.pool = pm.SwiotlbPool(2 * IO_TLB_SEGSIZE * IO_TLB_SIZE)
        self.devices = {name: self.make(name) for name in NAMES}
        self.held: list[Mapping] = []
        self.mm = pm.AddressSpace()
        self.region = self.mm.mmap(PAGES * PAGE)
        self.driver = DmaDriver(self.mm, self.devices["shared"])
        self.range = self.driver.range(self.region.addr, self.region.addr + self.region.size)
        self.range.register()
        self.range.default_flags, self.range.pfn_flags_mask = WRITE, 0
        self.mirrored: list[int] = []

    def make(self, name: str) -> pm.Device:
        if name == "direct":
            return pm.Device(name, iommu=False, swiotlb=self.pool)
        if name == "bouncing":
            return pm.Device(name, iommu=False, swiotlb=self.pool, dma_mask=pm.DMA_BIT_MASK(23))
        return pm.Device(name, iommu=self.domains.get(name, True))

    @rule(target=mappings, name=names, place=places, size=st.integers(1, PAGES * PAGE), way=ways)
    def map_single(self, name: str, place: int, size: int, way: pm.DmaDirection) -> Any:
        device, memory = self.devices[name], pages(PAGES)
        size = min(size, memory.size - place)
        addr = pm.dma_map_single(device, memory, size, way, offset=place)
        if pm.dma_mapping_error(device, addr):
            assert not device.domain.iommu, "the IOVA space is not full"
            return multiple()
        piece = Piece(device, memory[place : place + size], addr, way)
        return self.add([piece], lambda: pm.dma_unmap_single(device, addr, size, way), "single")

    @rule(
        target=mappings,
        name=names,
        cuts=st.lists(st.tuples(places, st.integers(1, PAGE)), min_size=1, max_size=5),
        way=ways,
    )
    def map_sg(self, name: str, cuts: list[tuple[int, int]], way: pm.DmaDirection) -> Any:
        device = self.devices[name]
        buffers = [pages(PAGES)[place : place + size] for place, size in cuts]
        sgl = pm.sg_list(*buffers)
        count = pm.dma_map_sg(device, sgl, len(sgl), way)
        if not count:
            assert not device.domain.iommu, "the IOVA space is not full"
            return multiple()
        assert sum(sg.dma_length for sg in sgl) == sum(sg.length for sg in sgl)
        segments = [(sg.dma_address, sg.dma_length) for sg in sgl[:count]]
        pieces, at, (start, length) = [], 0, segments.pop(0)
        for buffer in buffers:
            if at == length:
                at, (start, length) = 0, segments.pop(0)
            pieces.append(Piece(device, buffer, start + at, way))
            at += buffer.size
        assert not segments
        return self.add(
            pieces, lambda: pm.dma_unmap_sg(device, sgl, len(sgl), way), "scatter-gather", len(buffers)
        )

    @rule(target=mappings, name=names, size=st.integers(1, 3 * PAGE))
    def alloc_coherent(self, name: str, size: int) -> Any:
        device = self.devices[name]
        if not device.domain.iommu and self.pool.used > self.pool.slots // 2:
            return multiple()
        cpu, addr = pm.dma_alloc_coherent(device, size)
        piece = Piece(device, np.frombuffer(cpu, np.uint8), addr, pm.DMA_BIDIRECTIONAL)
        piece.seen = piece.cpu

        return self.add([piece], lambda: pm.dma_free_coherent(device, size, cpu, addr), "coherent")

    @rule(
        target=mappings,
        name=st.sampled_from([name for name in NAMES if name not in ("direct", "bouncing")]),
        counts=st.lists(st.integers(1, 2), min_size=1, max_size=4),
        way=ways,
    )
    def link(self, name: str, counts: list[int], way: pm.DmaDirection) -> Any:
        device, total = self.devices[name], sum(counts) * PAGE
        state = pm.dma_iova_try_alloc(device, total)
        assert state is not None
        pieces, at = [], 0
        for count in counts:
            memory = pages(count)
            pm.dma_iova_link(device, state, memory, at, memory.size, way)
            pieces.append(Piece(device, memory, state.addr + at, way))
            at += memory.size
        with pytest.raises(pm.IommuFaultError):
            device.dma_read(state.addr, 1)
        pm.dma_iova_sync(device, state, 0, total)
        with refuses(errno.EBUSY, "iova-still-linked"):
            pm.dma_iova_free(device, state)
        undo = lambda: pm.dma_iova_destroy(device, state, total, way)  # noqa: E731
        return self.add(pieces, undo, "iova", len(counts) + 1)

    @rule(mapping=consumes(mappings))
    def unmap(self, mapping: Mapping) -> None:
        if not mapping.live:
            return
        mapping.undo()
        mapping.unmapped(copied=True)
        self.held.remove(mapping)
        self.check_memory(mapping)
        self.check_gone(mapping)
        if mapping.kind == "single":
            with refuses(errno.EINVAL, "free-unallocated"):
                mapping.undo()

    @rule(mapping=mappings, place=places, value=values)
    def cpu_writes(self, mapping: Mapping, place: int, value: int) -> None:
        piece = mapping.pieces[place % len(mapping.pieces)]
        if mapping.live:
            piece.memory[place % piece.size] = value
            piece.cpu[place % piece.size] = value

    @rule(mapping=mappings, place=places, size=st.integers(1, PAGE))
    def device_reads(self, mapping: Mapping, place: int, size: int) -> None:
        piece = mapping.pieces[place % len(mapping.pieces)]
        start = place % piece.size
        size = min(size, piece.size - start)
        if not mapping.live:
            return
        if piece.way.device_reads:
            got = piece.device.dma_read(piece.address + start, size)
            assert got == piece.seen[start : start + size]
        else:
            with pytest.raises(pm.IommuFaultError, match="direction"):
                piece.device.dma_read(piece.address + start, size)

    @rule(mapping=mappings, place=places, value=values)
    def device_writes(self, mapping: Mapping, place: int, value: int) -> None:
        piece = mapping.pieces[place % len(mapping.pieces)]
        start = place % piece.size
        if not mapping.live:
            return
        if piece.way.device_writes:
            piece.device.dma_write(piece.address + start, bytes([value]))
            piece.seen[start] = value
        else:
            with pytest.raises(pm.IommuFaultError, match="direction"):
                piece.device.dma_write(piece.address + start, bytes([value]))

    @rule(mapping=mappings, place=places, size=st.integers(1, PAGE), for_cpu=st.booleans())
    def sync(self, mapping: Mapping, place: int, size: int, for_cpu: bool) -> None:
        piece = mapping.pieces[place % len(mapping.pieces)]
        start = place % piece.size
        end = min(start + size, piece.size)
        if not mapping.live or mapping.kind in ("iova", "coherent"):
            return
        call = pm.dma_sync_single_for_cpu if for_cpu else pm.dma_sync_single_for_device
        call(piece.device, piece.address + start, end - start, piece.way)
        (piece.to_cpu if for_cpu else piece.to_device)(start, end)

    @rule(mapping=mappings, more=st.integers(1, PAGE))
    def wrong_calls(self, mapping: Mapping, more: int) -> None:
        piece = mapping.pieces[0]
        if not mapping.live or mapping.kind != "single":
            return
        device, addr, size, way = piece.device, piece.address, piece.size, piece.way
        with refuses(errno.EINVAL, "size-mismatch"):
            pm.dma_unmap_single(device, addr, size + more, way)
        with refuses(errno.EINVAL, "sync-beyond"):
            pm.dma_sync_single_for_cpu(device, addr, size + more, way)
        with refuses(errno.EINVAL, "type-mismatch"):
            pm.dma_free_coherent(device, size, memoryview(bytearray(8)), addr)

    @rule(name=names)
    def release(self, name: str) -> None:
        device = self.devices[name]
        mine = [one for one in self.held if one.device is device]
        ranges = len(self.mirrored) if name == "shared" else 0
        leaks = device.release()
        assert len(leaks) == sum(one.records for one in mine) + ranges
        assert all(leak.mapped is not None and leak.category == "leak" for leak in leaks)
        for mapping in mine:
            mapping.unmapped(copied=False)
            self.held.remove(mapping)
            self.check_memory(mapping)
            self.check_gone(mapping)
        with refuses(errno.ENODEV):
            pm.dma_map_single(device, bytearray(8), 8, pm.DMA_TO_DEVICE)
        self.devices[name] = self.make(name)
        if name == "shared":
            self.mirrored, self.driver.mapped = [], None
            self.driver.device = self.devices[name]

    @rule()
    def mirror(self) -> None:
        if not self.mirrored:
            self.range.wait_until_valid(timeout=10)
            self.mirrored = self.driver.map(self.range).tolist()[:1]

    @rule()
    def invalidate(self) -> None:
        with self.mm.invalidate(self.region.addr, self.region.addr + self.region.size):
            pass
        for daddr in self.mirrored:
            with pytest.raises(pm.IommuFaultError):
                self.devices["shared"].dma_read(daddr, 1)
        self.mirrored = []

    @rule(name=names)
    def flush(self, name: str) -> None:
        self.devices[name].domain.flush()

    @invariant()
    def bookkeeping_agrees(self) -> None:
        tally.add("steps on driver memory", steps=1)
        for device in self.devices.values():
            mine = [one for one in self.held if one.device is device]
            assert len(device.dma_debug) == sum(one.records for one in mine)
        assert self.pool.used == sum(one.slots() for one in self.held if one.device.swiotlb is self.pool)
        for domain in {id(device.domain): device.domain for device in self.devices.values()}.values():
            if not isinstance(domain, pm.IommuDomain):
                continue
            held = [one for one in self.held if one.device.domain is domain]
            ranges = len(self.mirrored) if domain is self.domains["shared"] else 0
            given = sorted((piece.address // PAGE, piece) for one in held for piece in one.pieces)
            ends = [(piece.address + piece.size - 1) // PAGE for _, piece in given]
            for (first, _), last in zip(given[1:], ends, strict=False):
                assert first > last, "an IOVA was given out twice"
            extra = domain.iova_stats()["live"] - len(held) - ranges
            assert 0 <= extra <= domain.stats()["lazy_pending"], "an IOVA is lost"

    @invariant()
    def memory_is_as_the_model_has_it(self) -> None:
        for mapping in self.held:
            self.check_memory(mapping)

    def add(self, pieces: list[Piece], undo: Callable[[], None], kind: str, records: int = 1) -> Mapping:
        mapping = Mapping(pieces, undo, kind=kind, records=records)
        self.held.append(mapping)
        return mapping

    def check_memory(self, mapping: Mapping) -> None:
        for piece in mapping.pieces:
            assert piece.memory.tobytes() == piece.cpu

    def check_gone(self, mapping: Mapping) -> None:
        """Nothing is reached through a DMA address that nobody has any more."""
        live = [piece for one in self.held for piece in one.pieces]
        for piece in mapping.pieces:
            if any(one.address <= piece.address < one.address + one.size for one in live):
                continue
            with pytest.raises(pm.MirrorError):
                piece.device.dma_read(piece.address, 1)

    def teardown(self) -> None:
        for mapping in self.held:
            mapping.undo()
            mapping.unmapped(copied=True)
            self.check_memory(mapping)
        self.held = []
        pm.hmm_range_dma_unmap(self.range, self.driver.device)
        for name, device in self.devices.items():
            assert device.release() == [], name
            device.domain.flush()
            assert device.domain.stats()["mappings"] == 0
            if isinstance(device.domain, pm.IommuDomain):
                assert device.domain.iova_stats()["live"] == 0
        for device in self.devices.values():
            found = {one.category for one in device.dma_errors}
            assert found <= {
                "free-unallocated", "iova-still-linked", "size-mismatch", "sync-beyond", "type-mismatch",
            }, found  # fmt: skip
        assert self.pool.used == 0
        self.range.unregister()
        self.driver.unregister()
        self.mm.close()


@pytest.mark.timeout(120 * STRESS)
def test_driver_memory_behaves_as_the_model(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("CRITICAL", "pymirror.dma")
    with tally.timed("steps on driver memory"):
        run_state_machine_as_test(DriverMemoryMachine, settings=SETTINGS)


SETTINGS = settings(
    max_examples=40 * STRESS,
    stateful_step_count=40,
    deadline=None,
    derandomize="CI" in os.environ,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
