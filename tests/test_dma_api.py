"""The DMA API over the driver's own memory: what a device sees, when, and what it may not."""

from __future__ import annotations

import ctypes
import errno
import gc
import mmap
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
from dma_memory import PAGE, mapped, pages, refuses
from racing import in_child
from seams import foreign

import pymirror as pm
from pymirror.dma.engine import IommuFaultError

WAYS = [pm.DMA_BIDIRECTIONAL, pm.DMA_TO_DEVICE, pm.DMA_FROM_DEVICE]


@pytest.fixture
def device() -> Iterator[pm.Device]:
    with pm.Device("d0") as device:
        yield device
        assert device.release() == []
        assert not device.dma_errors


@pytest.fixture
def direct() -> Iterator[pm.Device]:
    """A device without an IOMMU that reaches all memory."""
    with pm.Device("direct", iommu=False) as device:
        yield device
        assert device.release() == []


def live_iovas(device: pm.Device) -> int:
    return device.domain.iova_stats()["live"]


class TestSingle:
    @pytest.mark.parametrize(("offset", "size"), [(0, 10_000), (1, 1), (4095, 2), (100, 5000)])
    def test_a_device_reads_and_writes_the_buffer_and_no_byte_beside_it(
        self, device: pm.Device, offset: int, size: int
    ) -> None:
        buffer = bytearray(range(250)) * 40
        before = bytes(buffer)
        addr = mapped(device, buffer, pm.DMA_BIDIRECTIONAL, size, offset)
        assert device.dma_read(addr, size) == before[offset : offset + size]
        device.dma_write(addr, bytes(size))
        assert bytes(buffer) == before[:offset] + bytes(size) + before[offset + size :]
        for beside in (addr - 1, addr + size):
            with pytest.raises(IommuFaultError):
                device.dma_read(beside, 1)
        pm.dma_unmap_single(device, addr, size, pm.DMA_BIDIRECTIONAL)

    def test_the_dma_address_has_the_place_in_its_page_that_the_memory_has(self, device: pm.Device) -> None:
        addr = mapped(device, pages(1), pm.DMA_TO_DEVICE, 10, 123)
        assert addr % PAGE == 123
        pm.dma_unmap_single(device, addr, 10, pm.DMA_TO_DEVICE)

    @pytest.mark.parametrize("way", WAYS)
    def test_an_access_against_the_direction_is_an_iommu_fault(
        self, device: pm.Device, way: pm.DmaDirection
    ) -> None:
        buffer = bytearray(64)
        addr = mapped(device, buffer, way)
        reads, writes = way.device_reads, way.device_writes
        if reads:
            device.dma_read(addr, 64)
        else:
            with pytest.raises(IommuFaultError, match="direction") as caught:
                device.dma_read(addr, 64)
            assert (caught.value.reason, caught.value.write) == ("direction", False)
        if writes:
            device.dma_write(addr, b"\xff")
        else:
            with pytest.raises(IommuFaultError, match="direction"):
                device.dma_write(addr, b"\xff")
        assert buffer[0] == (255 if writes else 0)
        pm.dma_unmap_single(device, addr, 64, way)

    def test_the_buffer_cannot_be_resized_while_it_is_mapped(self, device: pm.Device) -> None:
        buffer = bytearray(64)
        addr = mapped(device, buffer, pm.DMA_TO_DEVICE)
        with pytest.raises(BufferError):
            buffer.append(0)
        pm.dma_unmap_single(device, addr, 64, pm.DMA_TO_DEVICE)
        buffer.append(0)

    def test_nothing_is_reached_after_the_unmap(self, device: pm.Device) -> None:
        addr = mapped(device, bytearray(64), pm.DMA_TO_DEVICE)
        device.dma_read(addr, 64)
        pm.dma_unmap_single(device, addr, 64, pm.DMA_TO_DEVICE)
        with pytest.raises(IommuFaultError, match="nothing is mapped"):
            device.dma_read(addr, 1)
        assert live_iovas(device) == 0

    def test_without_room_the_address_is_a_mapping_error(self) -> None:
        domain = pm.IommuDomain(first=PAGE, last=9 * PAGE - 1)
        with pm.Device("d0", iommu=domain) as device:
            addr = pm.dma_map_single(device, bytearray(20 * PAGE), 20 * PAGE, pm.DMA_TO_DEVICE)
            assert addr == pm.DMA_MAPPING_ERROR
            assert pm.dma_mapping_error(device, addr)
            again = mapped(device, bytearray(10), pm.DMA_TO_DEVICE)
            pm.dma_unmap_single(device, again, 10, pm.DMA_TO_DEVICE)
            assert not device.dma_errors

    def test_addresses_are_within_the_mask(self, device: pm.Device) -> None:
        pm.dma_set_mask(device, pm.DMA_BIT_MASK(24))
        addr = mapped(device, bytearray(PAGE), pm.DMA_TO_DEVICE)
        assert addr + PAGE - 1 <= pm.DMA_BIT_MASK(24)
        pm.dma_unmap_single(device, addr, PAGE, pm.DMA_TO_DEVICE)

    def test_wrong_arguments(self, device: pm.Device) -> None:
        with refuses(errno.EINVAL):
            pm.dma_map_single(device, bytearray(8), 8, pm.DMA_NONE)
        with refuses(errno.EINVAL):
            pm.dma_map_single(device, bytearray(8), 9, pm.DMA_TO_DEVICE)
        with refuses(errno.EINVAL):
            pm.dma_map_single(device, bytearray(8), 0, pm.DMA_TO_DEVICE)
        with refuses(errno.EINVAL):
            pm.dma_map_single(device, bytearray(8), 8, pm.DMA_TO_DEVICE, offset=-1)
        with refuses(errno.EFAULT):
            pm.dma_map_single(device, b"constant", 8, pm.DMA_FROM_DEVICE)
        with refuses(errno.EFAULT):
            pm.dma_map_single(device, 17, 8, pm.DMA_TO_DEVICE)  # type: ignore[arg-type]
        assert len(device.dma_debug) == live_iovas(device) == 0

    def test_read_only_memory_may_be_mapped_to_the_device(self, device: pm.Device) -> None:
        addr = mapped(device, b"constant", pm.DMA_TO_DEVICE)
        assert device.dma_read(addr, 8) == b"constant"
        pm.dma_unmap_single(device, addr, 8, pm.DMA_TO_DEVICE)

    def test_a_released_device_maps_nothing(self, device: pm.Device) -> None:
        device.release()
        with refuses(errno.ENODEV):
            pm.dma_map_single(device, bytearray(8), 8, pm.DMA_TO_DEVICE)


class TestPage:
    def test_a_page_and_an_offset(self, device: pm.Device) -> None:
        memory = pages(2)
        addr = pm.dma_map_page(device, memory, PAGE + 5, 100, pm.DMA_TO_DEVICE)
        assert not pm.dma_mapping_error(device, addr)
        assert device.dma_read(addr, 100) == memory[PAGE + 5 : PAGE + 105].tobytes()
        pm.dma_unmap_page(device, addr, 100, pm.DMA_TO_DEVICE)

    def test_memory_that_begins_within_a_page_is_none(self, device: pm.Device) -> None:
        with refuses(errno.EINVAL):
            pm.dma_map_page(device, pages(1)[1:], 0, 10, pm.DMA_TO_DEVICE)


class TestScatterlist:
    def test_entries_that_meet_at_page_borders_are_one_segment(self, device: pm.Device) -> None:
        memory = pages(8)
        sgl = pm.sg_list(memory[3 * PAGE : 4 * PAGE], memory[: 2 * PAGE], memory[6 * PAGE : 6 * PAGE + 10])
        assert pm.dma_map_sg(device, sgl, 3, pm.DMA_TO_DEVICE) == 1
        assert pm.sg_dma_len(sgl[0]) == 3 * PAGE + 10
        want = np.concatenate(
            [memory[3 * PAGE : 4 * PAGE], memory[: 2 * PAGE], memory[6 * PAGE : 6 * PAGE + 10]]
        )
        assert device.dma_read(pm.sg_dma_address(sgl[0]), 3 * PAGE + 10) == want.tobytes()
        pm.dma_unmap_sg(device, sgl, 3, pm.DMA_TO_DEVICE)
        assert live_iovas(device) == 0

    def test_entries_within_pages_are_segments_of_their_own(self, device: pm.Device) -> None:
        memory = pages(4)
        sgl = [pm.Scatterlist(memory, 100, 200), pm.Scatterlist(memory, PAGE + 7, PAGE)]
        assert pm.dma_map_sg(device, sgl, 2, pm.DMA_BIDIRECTIONAL) == 2
        for sg in sgl:
            assert sg.dma_length == sg.length
            assert device.dma_read(sg.dma_address, sg.length) == memory[sg.offset :][: sg.length].tobytes()
        device.dma_write_sg([(sg.dma_address, sg.dma_length) for sg in sgl], bytes(200 + PAGE))
        assert not memory[100:300].any()
        assert not memory[PAGE + 7 : 2 * PAGE + 7].any()
        pm.dma_unmap_sg(device, sgl, 2, pm.DMA_BIDIRECTIONAL)

    def test_segments_are_no_longer_than_the_device_supports(self, device: pm.Device) -> None:
        pm.dma_set_max_seg_size(device, 2 * PAGE)
        sgl = pm.sg_list(pages(5), max_segment=PAGE)
        assert pm.dma_map_sg(device, sgl, 5, pm.DMA_TO_DEVICE) == 3
        assert [sg.dma_length for sg in sgl] == [2 * PAGE, 2 * PAGE, PAGE, 0, 0]
        pm.dma_unmap_sg(device, sgl, 5, pm.DMA_TO_DEVICE)

    @pytest.mark.parametrize("boundary", [PAGE, 2 * PAGE, 4 * PAGE])
    def test_no_segment_crosses_the_boundary(self, device: pm.Device, boundary: int) -> None:
        pm.dma_set_seg_boundary(device, boundary - 1)
        sgl = pm.sg_list(pages(1)[100:], pages(3), pages(1), pages(4), max_segment=boundary)
        count = pm.dma_map_sg(device, sgl, len(sgl), pm.DMA_TO_DEVICE)
        assert count
        for sg in sgl[:count]:
            assert sg.dma_address // boundary == (sg.dma_address + sg.dma_length - 1) // boundary
        assert sum(sg.dma_length for sg in sgl) == sum(sg.length for sg in sgl)
        pm.dma_unmap_sg(device, sgl, len(sgl), pm.DMA_TO_DEVICE)

    def test_no_room_maps_nothing(self) -> None:
        with pm.Device("d0", iommu=pm.IommuDomain(last=9 * PAGE - 1)) as device:
            sgl = pm.sg_list(pages(20), max_segment=PAGE)
            assert pm.dma_map_sg(device, sgl, 20, pm.DMA_TO_DEVICE) == 0
            with refuses(errno.ENOMEM):
                pm.dma_map_sgtable(device, sgl, pm.DMA_TO_DEVICE)
            assert len(device.dma_debug) == live_iovas(device) == 0

    def test_wrong_arguments_map_nothing(self, device: pm.Device) -> None:
        buffer = bytearray(8)
        for nents in (0, 2, -1):
            with refuses(errno.EINVAL):
                pm.dma_map_sg(device, pm.sg_list(buffer), nents, pm.DMA_TO_DEVICE)
        with refuses(errno.EINVAL):
            pm.dma_map_sg(
                device, [pm.Scatterlist(buffer, 0, 8), pm.Scatterlist(buffer, 4, 8)], 2, pm.DMA_TO_DEVICE
            )
        with refuses(errno.EFAULT):
            pm.dma_map_sg(device, pm.sg_list(buffer, b"constant"), 2, pm.DMA_FROM_DEVICE)
        buffer.append(1)
        assert len(device.dma_debug) == live_iovas(device) == 0


class TestCoherent:
    @pytest.mark.parametrize("size", [1, PAGE, 5 * PAGE + 1])
    def test_both_sides_see_each_other_at_once(self, device: pm.Device, size: int) -> None:
        cpu, addr = pm.dma_alloc_coherent(device, size)
        assert cpu.nbytes == size
        assert addr % PAGE == 0
        assert not any(cpu)
        cpu[size - 1] = 7
        assert device.dma_read(addr + size - 1, 1) == b"\x07"
        device.dma_write(addr, b"\x09")
        assert cpu[0] == 9
        pm.dma_free_coherent(device, size, cpu, addr)
        with pytest.raises(IommuFaultError):
            device.dma_read(addr, 1)

    def test_its_memory_stays_under_an_array_and_is_the_devices_no_more(self, device: pm.Device) -> None:
        cpu, addr = pm.dma_alloc_coherent(device, 64)
        array = np.frombuffer(cpu, np.uint8)
        device.dma_write(addr, b"\x05")
        pm.dma_free_coherent(device, 64, cpu, addr)
        assert array[0] == 5
        with pytest.raises(IommuFaultError):
            device.dma_read(addr, 1)
        with pytest.raises(ValueError, match="released"):
            cpu[0]

    def test_it_is_freed_by_an_array_of_it(self, device: pm.Device) -> None:
        cpu, addr = pm.dma_alloc_coherent(device, 64)
        pm.dma_free_coherent(device, 64, np.frombuffer(cpu, np.uint8), addr)
        assert not len(device.dma_debug)

    def test_what_a_forked_child_maps_is_not_unmapped_with_it(self, device: pm.Device) -> None:
        """A child that lets the memory go must not unmap what stands at its addresses there."""
        cpu, addr = pm.dma_alloc_coherent(device, 4 * PAGE)
        start = np.frombuffer(cpu, np.uint8).ctypes.data

        def child() -> None:
            try:
                own = foreign.mmap(start, 4 * PAGE, 3, 0x100022)  # MAP_FIXED_NOREPLACE
            except OSError:
                own = 0
            entry = device.dma_debug.at(addr)
            assert entry is not None
            entry.backing = None
            device.domain._mappings.clear()
            cpu.release()
            gc.collect()
            if own == start:
                assert ctypes.string_at(start, 4 * PAGE) == bytes(4 * PAGE)

        assert in_child(child) == 0
        cpu[0] = 1
        assert device.dma_read(addr, 1) == b"\x01"
        pm.dma_free_coherent(device, 4 * PAGE, cpu, addr)

    def test_it_is_there_until_the_very_end(self) -> None:
        """Handlers of atexit that were registered before it run after those of weakref.finalize()."""
        script = (
            "import atexit, weakref\n"
            "import pymirror as pm\n"
            "keep = {}\n"
            "atexit.register(lambda: print(bytes(keep['cpu'][:4])))\n"
            "device = pm.Device('d0')\n"
            "keep['cpu'], addr = pm.dma_alloc_coherent(device, 4096)\n"
            "keep['cpu'][:4] = b'here'\n"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (0, "b'here'\n"), done.stderr

    def test_its_own_mask(self, device: pm.Device) -> None:
        pm.dma_set_coherent_mask(device, pm.DMA_BIT_MASK(20))
        cpu, addr = pm.dma_alloc_coherent(device, 64)
        assert addr < 1 << 20
        pm.dma_free_coherent(device, 64, cpu, addr)

    def test_no_room(self) -> None:
        with pm.Device("d0", iommu=pm.IommuDomain(last=9 * PAGE - 1)) as device:
            with refuses(errno.ENOMEM):
                pm.dma_alloc_coherent(device, 20 * PAGE)
            with refuses(errno.EINVAL):
                pm.dma_alloc_coherent(device, 0)


class TestSync:
    def test_behind_an_iommu_there_is_nothing_to_copy(self, device: pm.Device) -> None:
        buffer = bytearray(64)
        addr = mapped(device, buffer, pm.DMA_FROM_DEVICE)
        assert not pm.dma_need_sync(device, addr)
        device.dma_write(addr + 10, b"now")
        assert buffer[10:13] == b"now"
        pm.dma_sync_single_for_cpu(device, addr + 10, 3, pm.DMA_FROM_DEVICE)
        pm.dma_sync_single_for_device(device, addr, 64, pm.DMA_FROM_DEVICE)
        pm.dma_unmap_single(device, addr, 64, pm.DMA_FROM_DEVICE)


class TestParameters:
    def test_what_a_driver_sets_it_gets(self, device: pm.Device) -> None:
        assert pm.dma_get_max_seg_size(device) == 64 << 10
        assert pm.dma_get_seg_boundary(device) == (1 << 32) - 1
        pm.dma_set_mask_and_coherent(device, pm.DMA_BIT_MASK(40))
        assert pm.dma_get_mask(device) == device.coherent_dma_mask == (1 << 40) - 1
        pm.dma_set_max_seg_size(device, 123)
        pm.dma_set_seg_boundary(device, 0xFFFF)
        assert (pm.dma_get_max_seg_size(device), pm.dma_get_seg_boundary(device)) == (123, 0xFFFF)

    @pytest.mark.parametrize("mask", [0, 0xFFE, 0xFF, 1 << 64, -1, 0x1FF0])
    def test_masks_that_are_none(self, device: pm.Device, mask: int) -> None:
        before = device.dma_mask
        for call in (pm.dma_set_mask, pm.dma_set_coherent_mask, pm.dma_set_mask_and_coherent):
            with refuses(errno.EIO):
                call(device, mask)
        with refuses(errno.EINVAL):
            pm.dma_set_seg_boundary(device, 0x1FF0)
        with refuses(errno.EINVAL):
            pm.dma_set_max_seg_size(device, 0)
        assert device.dma_mask == device.coherent_dma_mask == before

    def test_an_iommu_reaches_everything(self, device: pm.Device) -> None:
        pm.dma_set_mask(device, pm.DMA_BIT_MASK(24))
        assert not pm.dma_addressing_limited(device)
        assert pm.dma_max_mapping_size(device) == (1 << 64) - 1


@pytest.mark.root
class TestDirect:
    def test_the_dma_address_is_the_physical_one(self, direct: pm.Device) -> None:
        memory = pages(1)
        with open("/proc/self/pagemap", "rb") as pagemap:
            pagemap.seek(memory.ctypes.data // PAGE * 8)
            pfn = int.from_bytes(pagemap.read(8), "little") & ((1 << 55) - 1)
        addr = mapped(direct, memory, pm.DMA_TO_DEVICE, 10, 20)
        assert addr == pfn * PAGE + 20
        assert direct.dma_read(addr, 10) == memory[20:30].tobytes()
        pm.dma_unmap_single(direct, addr, 10, pm.DMA_TO_DEVICE)

    def test_a_page_may_be_mapped_several_times(self, direct: pm.Device) -> None:
        memory = pages(1)
        first = mapped(direct, memory, pm.DMA_TO_DEVICE)
        second = mapped(direct, memory, pm.DMA_FROM_DEVICE)
        piece = mapped(direct, memory, pm.DMA_TO_DEVICE, 8, 64)
        assert first == second == piece - 64
        direct.dma_write(second, b"both")
        assert direct.dma_read(first, 4) == b"both"
        pm.dma_unmap_single(direct, second, PAGE, pm.DMA_FROM_DEVICE)
        with pytest.raises(IommuFaultError, match="direction"):
            direct.dma_write(first, b"none")
        pm.dma_unmap_single(direct, first, PAGE, pm.DMA_TO_DEVICE)
        assert direct.dma_read(piece, 8) == memory[64:72].tobytes()
        with pytest.raises(IommuFaultError):
            direct.dma_read(first, 4)
        pm.dma_unmap_single(direct, piece, 8, pm.DMA_TO_DEVICE)
        assert not direct.dma_errors

    def test_pages_that_are_not_there_yet_are_made(self, direct: pm.Device) -> None:
        memory = mmap.mmap(-1, PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        addr = mapped(direct, memory, pm.DMA_FROM_DEVICE)
        direct.dma_write(addr, b"first touch")
        assert memory[:11] == b"first touch"
        pm.dma_unmap_single(direct, addr, PAGE, pm.DMA_FROM_DEVICE)

    def test_a_scatterlist_has_a_segment_an_entry(self, direct: pm.Device) -> None:
        memory = pages(3)
        sgl = pm.sg_list(memory, max_segment=PAGE)
        assert pm.dma_map_sg(direct, sgl, 3, pm.DMA_TO_DEVICE) == 3
        assert direct.dma_read_sg([(sg.dma_address, sg.dma_length) for sg in sgl]) == memory.tobytes()
        pm.dma_unmap_sg(direct, sgl, 3, pm.DMA_TO_DEVICE)

    @pytest.mark.parametrize("size", [100, PAGE, 3 * PAGE])
    def test_coherent_memory_is_in_one_piece(self, direct: pm.Device, size: int) -> None:
        cpu, addr = pm.dma_alloc_coherent(direct, size)
        cpu[size - 1] = 3
        assert direct.dma_read(addr, size) == bytes(cpu)
        direct.dma_write(addr, b"\x08")
        assert cpu[0] == 8
        pm.dma_free_coherent(direct, size, cpu, addr)

    def test_no_two_step_api(self, direct: pm.Device) -> None:
        assert pm.dma_iova_try_alloc(direct, PAGE) is None
        assert not pm.dma_use_iova(None)


def test_without_pfns_there_is_no_direct_mapping(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYMIRROR_DISABLE", "pfn")
    with pm.Device("direct", iommu=False) as device:
        with pytest.raises(pm.FeatureError, match="pfn"):
            pm.dma_map_single(device, bytearray(8), 8, pm.DMA_TO_DEVICE)
        assert len(device.dma_debug) == 0


class TestLazyFlushing:
    def test_an_unmapping_is_flushed_with_its_batch(self) -> None:
        domain = pm.IommuDomain(strict=False)
        with pm.Device("d0", iommu=domain) as device:
            before = domain.stats()["iotlb_flushes"]
            addr = mapped(device, bytearray(8), pm.DMA_TO_DEVICE)
            device.dma_read(addr, 8)
            pm.dma_unmap_single(device, addr, 8, pm.DMA_TO_DEVICE)
            assert domain.stats()["lazy_pending"] == 1
            with pytest.raises(IommuFaultError):
                device.dma_read(addr, 8)
            again = mapped(device, bytearray(8), pm.DMA_TO_DEVICE)
            assert again // PAGE != addr // PAGE, "an IOVA that may be in the IOTLB was given out again"
            pm.dma_unmap_single(device, again, 8, pm.DMA_TO_DEVICE)
            assert domain.flush() == 2
            stats = domain.stats()
            assert stats["lazy_pending"] == 0
            assert stats["iotlb_flushes"] > before

    def test_a_full_space_is_flushed_before_it_fails(self) -> None:
        domain = pm.IommuDomain(last=5 * PAGE - 1, strict=False)
        with pm.Device("d0", iommu=domain) as device:
            for _ in range(20):
                addr = mapped(device, pages(2), pm.DMA_TO_DEVICE)
                pm.dma_unmap_single(device, addr, 2 * PAGE, pm.DMA_TO_DEVICE)
            state = pm.dma_iova_try_alloc(device, 2 * PAGE)
            assert state is not None
            pm.dma_iova_free(device, state)
            domain.flush()
        assert domain.iova_stats()["live"] == 0

    def test_strict_flushing_is_at_each_unmap(self) -> None:
        domain = pm.IommuDomain()
        with pm.Device("d0", iommu=domain) as device:
            before = domain.stats()["iotlb_flushes"]
            for _ in range(3):
                addr = mapped(device, bytearray(8), pm.DMA_TO_DEVICE)
                pm.dma_unmap_single(device, addr, 8, pm.DMA_TO_DEVICE)
            assert domain.stats()["iotlb_flushes"] >= before + 3


def test_two_devices_share_a_domain() -> None:
    domain = pm.IommuDomain()
    with pm.Device("d0", iommu=domain) as one, pm.Device("d1", iommu=domain) as other:
        addr = mapped(one, b"shared", pm.DMA_TO_DEVICE)
        assert other.dma_read(addr, 6) == b"shared"
        assert len(other.dma_debug) == 0
        assert other.release() == []
        pm.dma_unmap_single(one, addr, 6, pm.DMA_TO_DEVICE)
