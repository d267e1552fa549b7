"""Bounce buffers: really there, copied when the API says so and at no other time, and bounded."""

from __future__ import annotations

import ctypes
import errno
import gc
import mmap
from collections.abc import Iterator
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from dma_memory import PAGE, bouncing, mapped, pages, refuses
from hypothesis import given
from seams import Background, foreign, inject

import pymirror as pm
from pymirror.dma import swiotlb
from pymirror.dma.engine import IommuFaultError
from pymirror.dma.swiotlb import IO_TLB_SEGSIZE, IO_TLB_SIZE, SwiotlbPool, default_pool

SEGMENT = IO_TLB_SEGSIZE * IO_TLB_SIZE


@pytest.fixture
def device() -> Iterator[pm.Device]:
    with bouncing() as device:
        yield device
        assert device.release() == []
        assert not device.dma_errors
        assert device.swiotlb.used == 0


@pytest.mark.root
class TestBouncing:
    def test_the_device_gets_an_address_of_the_pool(self, device: pm.Device) -> None:
        addr = mapped(device, pages(1), pm.DMA_TO_DEVICE)
        assert device.swiotlb.owns(addr)
        assert addr <= device.dma_mask
        assert pm.dma_need_sync(device, addr)
        assert device.swiotlb.used == PAGE // IO_TLB_SIZE
        pm.dma_unmap_single(device, addr, PAGE, pm.DMA_TO_DEVICE)

    def test_mapping_copies_to_the_device_and_later_writes_need_a_sync(self, device: pm.Device) -> None:
        buffer = bytearray(b"before..")
        addr = mapped(device, buffer, pm.DMA_TO_DEVICE)
        assert device.dma_read(addr, 8) == b"before.."
        buffer[:] = b"after..."
        assert device.dma_read(addr, 8) == b"before..", "there is no bounce buffer"
        pm.dma_sync_single_for_device(device, addr, 8, pm.DMA_TO_DEVICE)
        assert device.dma_read(addr, 8) == b"after..."
        pm.dma_unmap_single(device, addr, 8, pm.DMA_TO_DEVICE)

    def test_a_device_write_shows_after_the_sync_for_the_cpu(self, device: pm.Device) -> None:
        buffer = bytearray(8)
        addr = mapped(device, buffer, pm.DMA_FROM_DEVICE)
        device.dma_write(addr, b"incoming")
        assert buffer == bytes(8), "there is no bounce buffer"
        pm.dma_sync_single_for_cpu(device, addr + 2, 3, pm.DMA_FROM_DEVICE)
        assert buffer == b"\0\0com\0\0\0"
        pm.dma_unmap_single(device, addr, 8, pm.DMA_FROM_DEVICE)
        assert buffer == b"incoming"

    def test_what_the_device_did_not_write_stays(self, device: pm.Device) -> None:
        buffer = bytearray(b"12345678")
        addr = mapped(device, buffer, pm.DMA_FROM_DEVICE)
        device.dma_write(addr + 2, b"xx")
        pm.dma_unmap_single(device, addr, 8, pm.DMA_FROM_DEVICE)
        assert buffer == b"12xx5678"

    def test_what_the_device_only_reads_is_not_copied_back(self, device: pm.Device) -> None:
        buffer = bytearray(b"before..")
        addr = mapped(device, buffer, pm.DMA_TO_DEVICE)
        buffer[:] = b"the CPU."
        pm.dma_sync_single_for_cpu(device, addr, 8, pm.DMA_TO_DEVICE)
        pm.dma_unmap_single(device, addr, 8, pm.DMA_TO_DEVICE)
        assert buffer == b"the CPU."

    @pytest.mark.parametrize("prot", [mmap.PROT_READ, 0], ids=["read-only", "none"])
    def test_memory_that_is_not_to_be_written_is_refused(self, device: pm.Device, prot: int) -> None:
        """The copy back at unmap would kill the process."""
        addr = foreign.mmap(0, 2 * PAGE, prot, 0x22)
        buffer = (ctypes.c_ubyte * (2 * PAGE)).from_address(addr)
        with refuses(errno.EFAULT):
            pm.dma_map_single(device, buffer, 2 * PAGE, pm.DMA_FROM_DEVICE)
        if not prot:
            with refuses(errno.EFAULT):
                pm.dma_map_single(device, buffer, 2 * PAGE, pm.DMA_TO_DEVICE)
        foreign.munmap(addr + PAGE, PAGE)
        with refuses(errno.EFAULT):
            pm.dma_map_sg(device, pm.sg_list(pages(1), buffer), 2, pm.DMA_TO_DEVICE)
        foreign.munmap(addr, PAGE)

    def test_out_of_memory_is_a_mapping_error_and_leaves_no_slot(self, device: pm.Device) -> None:
        assert not device.domain.iommu
        with inject("MALLOC") as injection:
            addr = pm.dma_map_single(device, pages(1), PAGE, pm.DMA_TO_DEVICE)
        assert injection.struck
        assert pm.dma_mapping_error(device, addr)
        with inject("MALLOC") as injection, refuses(errno.ENOMEM):
            pm.dma_alloc_coherent(device, 5 * PAGE)
        assert injection.struck
        assert device.swiotlb.used == 0

    def test_ctrl_c_at_unmap_leaves_no_slot_and_no_mapping(
        self, device: pm.Device, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        remove = device.dma_debug.remove

        def struck(*args: Any) -> None:
            for entry in args:
                if isinstance(entry, pm.DmaEntry):
                    remove(entry)
            raise KeyboardInterrupt

        for where, name in ((device.dma_debug, "remove"), (swiotlb.Bounce, "to_cpu")):
            buffer = bytearray(8)
            addr = mapped(device, buffer, pm.DMA_FROM_DEVICE)
            with monkeypatch.context() as patch:
                patch.setattr(where, name, struck)
                with pytest.raises(KeyboardInterrupt):
                    pm.dma_unmap_single(device, addr, 8, pm.DMA_FROM_DEVICE)
            assert device.swiotlb.used == len(device.dma_debug) == len(device.domain.mappings()) == 0
            buffer.append(1)

    def test_a_collection_inside_the_pool_may_release_a_device(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pool = SwiotlbPool(SEGMENT)
        find = swiotlb._find

        def collecting(free: int, count: int, stride: int) -> int:
            gc.collect()
            return find(free, count, stride)

        lost = bouncing(pool)
        mapped(lost, bytearray(8), pm.DMA_TO_DEVICE)
        gc.collect()
        lost.itself = lost  # type: ignore[attr-defined]
        del lost
        monkeypatch.setattr(swiotlb, "_find", collecting)
        with pytest.warns(ResourceWarning, match="leaked"):
            slots = Background(lambda: pool.alloc(8)).result()
        assert slots is not None
        pool.free(slots)
        assert pool.used == 0

    def test_skipping_the_cpu_sync_leaves_the_memory(self, device: pm.Device) -> None:
        buffer = bytearray(8)
        addr = mapped(device, buffer, pm.DMA_FROM_DEVICE)
        device.dma_write(addr, b"dropped!")
        pm.dma_unmap_single(device, addr, 8, pm.DMA_FROM_DEVICE, attrs=pm.DMA_ATTR_SKIP_CPU_SYNC)
        assert buffer == bytes(8)

    def test_a_wrong_direction_at_the_unmap_loses_no_byte(self, device: pm.Device) -> None:
        buffer = bytearray(8)
        addr = mapped(device, buffer, pm.DMA_FROM_DEVICE)
        device.dma_write(addr, b"incoming")
        pm.dma_unmap_single(device, addr, 8, pm.DMA_TO_DEVICE)
        assert buffer == b"incoming"
        assert [one.category for one in device.dma_errors] == ["direction-mismatch"]
        device.dma_errors.clear()

    def test_two_mappings_share_a_page_of_the_pool_and_no_byte(self, device: pm.Device) -> None:
        one, other = pages(1)[:100], pages(1)[:100]
        first, second = mapped(device, one, pm.DMA_BIDIRECTIONAL), mapped(device, other, pm.DMA_BIDIRECTIONAL)
        assert first // PAGE == second // PAGE
        device.dma_write(first, b"a" * 100)
        device.dma_write(second, b"b" * 100)
        with pytest.raises(IommuFaultError):
            device.dma_write(first, b"c" * 101)
        pm.dma_unmap_single(device, first, 100, pm.DMA_BIDIRECTIONAL)
        pm.dma_unmap_single(device, second, 100, pm.DMA_BIDIRECTIONAL)
        assert (one.tobytes(), other.tobytes()) == (b"c" * 100, b"b" * 100)

    def test_a_scatterlist_is_synced_as_a_whole(self, device: pm.Device) -> None:
        memory = pages(3)
        before = memory.tobytes()
        sgl = pm.sg_list(memory, max_segment=PAGE)
        assert pm.dma_map_sg(device, sgl, 3, pm.DMA_BIDIRECTIONAL) == 3
        assert device.dma_read_sg([(sg.dma_address, sg.dma_length) for sg in sgl]) == before
        for sg in sgl:
            device.dma_write(sg.dma_address, b"device")
        assert memory.tobytes() == before
        pm.dma_sync_sg_for_cpu(device, sgl, 3, pm.DMA_BIDIRECTIONAL)
        assert all(memory[i * PAGE : i * PAGE + 6].tobytes() == b"device" for i in range(3))
        memory[:] = 1
        pm.dma_sync_sg_for_device(device, sgl, 3, pm.DMA_BIDIRECTIONAL)
        assert device.dma_read(sgl[2].dma_address, 2) == b"\1\1"
        pm.dma_unmap_sg(device, sgl, 3, pm.DMA_BIDIRECTIONAL)

    def test_a_segment_of_a_scatterlist_may_be_synced_alone(self, device: pm.Device) -> None:
        memory = pages(2, fill=0)
        sgl = pm.sg_list(memory, max_segment=PAGE)
        pm.dma_map_sg(device, sgl, 2, pm.DMA_FROM_DEVICE)
        for sg in sgl:
            device.dma_write(sg.dma_address, b"xyz")
        pm.dma_sync_single_for_cpu(device, sgl[1].dma_address, 3, pm.DMA_FROM_DEVICE)
        assert memory[PAGE : PAGE + 3].tobytes() == b"xyz"
        assert not memory[:PAGE].any()
        pm.dma_unmap_sg(device, sgl, 2, pm.DMA_FROM_DEVICE)

    def test_coherent_memory_is_the_pools_own(self, device: pm.Device) -> None:
        cpu, addr = pm.dma_alloc_coherent(device, 3 * PAGE)
        assert device.swiotlb.owns(addr)
        device.dma_write(addr, b"seen at once")
        assert bytes(cpu[:12]) == b"seen at once"
        array = np.frombuffer(cpu, np.uint8)
        pm.dma_free_coherent(device, 3 * PAGE, cpu, addr)
        assert device.swiotlb.used, "slots were given back under an array of them"
        del array
        assert device.swiotlb.used == 0


@pytest.mark.root
class TestLimits:
    def test_memory_in_pieces_is_bounced_for_a_device_that_reaches_it(self) -> None:
        with pm.Device("direct", iommu=False) as device:
            memory = pages(64)
            addr = mapped(device, memory, pm.DMA_TO_DEVICE)
            assert device.dma_read(addr, memory.size) == memory.tobytes()
            pm.dma_unmap_single(device, addr, memory.size, pm.DMA_TO_DEVICE)

    def test_an_exhausted_pool_is_a_mapping_error_and_no_bug(self) -> None:
        pool = SwiotlbPool(SEGMENT)
        with bouncing(pool) as device:
            buffers = [bytearray(SEGMENT // 2) for _ in range(3)]
            addrs = [mapped(device, buffer, pm.DMA_TO_DEVICE) for buffer in buffers[:2]]
            assert pm.dma_map_single(device, buffers[2], 8, pm.DMA_TO_DEVICE) == pm.DMA_MAPPING_ERROR
            assert pool.exhausted == 1
            assert pm.dma_map_sg(device, pm.sg_list(buffers[2]), 1, pm.DMA_TO_DEVICE) == 0
            with refuses(errno.ENOMEM):
                pm.dma_alloc_coherent(device, PAGE)
            for addr in addrs:
                pm.dma_unmap_single(device, addr, SEGMENT // 2, pm.DMA_TO_DEVICE)
            assert not device.dma_errors
        assert pool.used == 0
        assert pool.high_water == pool.slots

    def test_a_scatterlist_that_does_not_fit_leaves_nothing(self) -> None:
        pool = SwiotlbPool(SEGMENT)
        with bouncing(pool) as device:
            memory = pages(SEGMENT // PAGE + 1)
            assert pm.dma_map_sg(device, pm.sg_list(memory, max_segment=PAGE), 65, pm.DMA_TO_DEVICE) == 0
            assert pool.used == len(device.dma_debug) == device.domain.stats()["mappings"] == 0

    def test_no_mapping_is_above_256_kib(self, device: pm.Device) -> None:
        assert pm.dma_max_mapping_size(device) == SEGMENT
        assert pm.dma_map_single(device, bytearray(SEGMENT + 1), SEGMENT + 1, 1) == pm.DMA_MAPPING_ERROR
        addr = mapped(device, bytearray(SEGMENT), pm.DMA_TO_DEVICE)
        pm.dma_unmap_single(device, addr, SEGMENT, pm.DMA_TO_DEVICE)

    def test_why_there_is_no_bounce_buffer_is_logged(self, caplog: pytest.LogCaptureFixture) -> None:
        with bouncing(SwiotlbPool(SEGMENT)) as device:
            addr = mapped(device, bytearray(SEGMENT), pm.DMA_TO_DEVICE)
            for size in (SEGMENT + 1, SEGMENT + 1, 8):
                pm.dma_map_single(device, bytearray(size), size, pm.DMA_TO_DEVICE)
            pm.dma_map_single(device, bytearray(8), 8, pm.DMA_TO_DEVICE)
            pm.dma_unmap_single(device, addr, SEGMENT, pm.DMA_TO_DEVICE)
        large, full = (record.getMessage() for record in caplog.records)
        assert large.endswith(
            f"{SEGMENT + 1} bytes would be bounced, and bounce buffers are of at most {SEGMENT}"
        )
        assert full.endswith("128 of 128 slots are used")

    def test_mirrored_memory_is_never_bounced(self, mm: pm.AddressSpace, device: pm.Device) -> None:
        buf = mm.mmap(PAGE)
        with pm.Mirror(mm) as mirror, mirror.range(buf.addr, buf.addr + PAGE) as rng:
            rng.default_flags = pm.HMM_PFN_REQ_FAULT
            with pytest.raises(pm.MirrorError) as caught:
                pm.hmm_range_dma_map(rng, device)
        assert caught.value.errno in (errno.EOPNOTSUPP, errno.EFAULT)
        assert device.domain.stats()["mappings"] == 0


class TestPool:
    def test_it_is_made_once(self) -> None:
        assert default_pool() is default_pool()
        assert pm.Device("d0").swiotlb is pm.Device("d1").swiotlb

    @pytest.mark.parametrize(
        ("size", "bus"), [(0, SEGMENT), (SEGMENT + 1, SEGMENT), (SEGMENT, 0), (SEGMENT, PAGE)]
    )
    def test_pools_that_are_none(self, size: int, bus: int) -> None:
        with refuses(errno.EINVAL):
            SwiotlbPool(size, bus)

    @given(st.lists(st.tuples(st.integers(1, SEGMENT), st.booleans()), max_size=40), st.randoms())
    def test_no_slot_is_given_twice_and_none_is_lost(
        self, sizes: list[tuple[int, bool]], random: np.random.Generator
    ) -> None:
        pool = SwiotlbPool(2 * SEGMENT)
        held, taken = [], set[int]()
        for size, aligned in sizes:
            slots = pool.alloc(size, aligned=aligned)
            if slots is None:
                if held:
                    slots = held.pop()
                    pool.free(slots)
                    taken -= set(
                        range(slots.bus_addr, slots.bus_addr + slots.count * IO_TLB_SIZE, IO_TLB_SIZE)
                    )
                continue
            mine = set(range(slots.bus_addr, slots.bus_addr + slots.count * IO_TLB_SIZE, IO_TLB_SIZE))
            assert slots.count * IO_TLB_SIZE >= size
            assert not mine & taken
            assert pool.bus_addr <= slots.bus_addr
            assert slots.bus_addr + slots.count * IO_TLB_SIZE - 1 <= pool.bus_last
            assert slots.bus_addr - pool.bus_addr == slots.cpu_addr - pool.cpu_addr
            assert slots.bus_addr % PAGE == 0 or not (aligned or size >= PAGE)
            taken |= mine
            held.append(slots)
            assert pool.used == len(taken)
        random.shuffle(held)
        for slots in held:
            pool.free(slots)
        assert pool.used == 0
        assert all(pool.alloc(SEGMENT) for _ in range(2))
