"""dma-debug: each category is provoked by the bug that it is for, and its report read."""

from __future__ import annotations

import ctypes
import errno
import gc
import inspect
import logging
import pickle
import threading
import warnings
from collections.abc import Iterator
from unittest.mock import MagicMock

import pytest
from dma_memory import PAGE, mapped, pages, refuses
from racing import in_child

import pymirror as pm
from pymirror.dma.record import Site

Category = pm.DmaDebugCategory


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "pymirror.dma")


@pytest.fixture
def device() -> Iterator[pm.Device]:
    with pm.Device("d0") as device:
        yield device


def here() -> int:
    frame = inspect.currentframe()
    assert frame is not None
    assert frame.f_back is not None
    return frame.f_back.f_lineno


def only(device: pm.Device, category: str) -> pm.DmaDebugReport:
    """The one report there is, of that category."""
    (report,) = device.dma_errors
    assert report.category == category
    assert device.dma_debug.counts == {category: 1}
    assert report.device == device.name
    assert report.detected.file in (__file__, inspect.getsourcefile(mapped))
    return report


class TestUnmap:
    def test_of_what_was_never_mapped(self, device: pm.Device) -> None:
        with refuses(errno.EINVAL, Category.FREE_UNALLOCATED):
            pm.dma_unmap_single(device, 0x1234000, 8, pm.DMA_TO_DEVICE)
        report = only(device, "free-unallocated")
        assert (report.address, report.size, report.direction) == (0x1234000, 8, pm.DMA_TO_DEVICE)
        assert report.mapped is None
        assert report.detected.line == here() - 4

    def test_twice(self, device: pm.Device) -> None:
        addr = mapped(device, bytearray(8), pm.DMA_TO_DEVICE)
        pm.dma_unmap_single(device, addr, 8, pm.DMA_TO_DEVICE)
        with refuses(errno.EINVAL, Category.FREE_UNALLOCATED):
            pm.dma_unmap_single(device, addr, 8, pm.DMA_TO_DEVICE)
        only(device, "free-unallocated")

    def test_of_an_address_inside_a_mapping(self, device: pm.Device) -> None:
        addr = mapped(device, bytearray(64), pm.DMA_TO_DEVICE)
        with refuses(errno.EINVAL, Category.FREE_UNALLOCATED):
            pm.dma_unmap_single(device, addr + 8, 8, pm.DMA_TO_DEVICE)
        report = only(device, "free-unallocated")
        assert f"inside the 64 bytes mapped at {addr:#x}" in report.text
        assert device.dma_read(addr, 64) == bytes(64)
        pm.dma_unmap_single(device, addr, 64, pm.DMA_TO_DEVICE)

    @pytest.mark.parametrize("addr", [0, pm.DMA_MAPPING_ERROR])
    def test_of_an_invalid_address(self, device: pm.Device, addr: int) -> None:
        with refuses(errno.EINVAL, Category.FREE_INVALID):
            pm.dma_unmap_single(device, addr, 8, pm.DMA_TO_DEVICE)
        assert only(device, "free-invalid").address == addr

    def test_with_another_size(self, device: pm.Device) -> None:
        addr = mapped(device, bytearray(64), pm.DMA_TO_DEVICE)
        with refuses(errno.EINVAL, Category.SIZE_MISMATCH) as caught:
            pm.dma_unmap_single(device, addr, 63, pm.DMA_TO_DEVICE)
        report = only(device, "size-mismatch")
        assert (report.address, report.size) == (addr, 63)
        assert report.mapped is not None
        assert report.mapped.file.endswith("dma_memory.py")
        assert str(report) in str(caught.value)
        pm.dma_unmap_single(device, addr, 64, pm.DMA_TO_DEVICE)

    def test_with_the_function_of_a_page(self, device: pm.Device) -> None:
        addr = mapped(device, bytearray(64), pm.DMA_TO_DEVICE)
        pm.dma_unmap_page(device, addr, 64, pm.DMA_TO_DEVICE)
        report = only(device, "type-mismatch")
        assert "frees as page DMA memory that was mapped as single" in report.text
        assert len(device.dma_debug) == 0

    def test_with_a_function_that_would_free_something_else(self, device: pm.Device) -> None:
        cpu, addr = pm.dma_alloc_coherent(device, 64)
        with refuses(errno.EINVAL, Category.TYPE_MISMATCH):
            pm.dma_unmap_single(device, addr, 64, pm.DMA_BIDIRECTIONAL)
        assert only(device, "type-mismatch").type == "coherent"
        device.dma_read(addr, 64)
        pm.dma_free_coherent(device, 64, cpu, addr)

    def test_of_coherent_memory_by_another_view(self, device: pm.Device) -> None:
        cpu, addr = pm.dma_alloc_coherent(device, 64)
        other, other_addr = pm.dma_alloc_coherent(device, 64)
        with refuses(errno.EINVAL, Category.CPU_ADDRESS_MISMATCH):
            pm.dma_free_coherent(device, 64, other, addr)
        only(device, "cpu-address-mismatch")
        pm.dma_free_coherent(device, 64, cpu, addr)
        pm.dma_free_coherent(device, 64, other, other_addr)

    def test_in_another_direction(self, device: pm.Device) -> None:
        addr = mapped(device, bytearray(64), pm.DMA_BIDIRECTIONAL)
        pm.dma_unmap_single(device, addr, 64, pm.DMA_TO_DEVICE)
        report = only(device, "direction-mismatch")
        assert "frees as DMA_TO_DEVICE DMA memory that was mapped DMA_BIDIRECTIONAL" in report.text
        assert len(device.dma_debug) == 0

    def test_of_a_scatterlist_with_what_mapping_gave_for_nents(self, device: pm.Device) -> None:
        sgl = pm.sg_list(pages(3), max_segment=PAGE)
        count = pm.dma_map_sg(device, sgl, 3, pm.DMA_TO_DEVICE)
        assert count == 1
        pm.dma_unmap_sg(device, sgl, count, pm.DMA_TO_DEVICE)
        assert "scatterlist of 1 entries mapped with 3" in only(device, "sg-nents-mismatch").text
        assert len(device.dma_debug) == device.domain.iova_stats()["live"] == 0

    def test_without_a_look_at_the_mapping_error(self, device: pm.Device) -> None:
        line = here() + 1
        addr = pm.dma_map_single(device, bytearray(8), 8, pm.DMA_TO_DEVICE)
        pm.dma_unmap_single(device, addr, 8, pm.DMA_TO_DEVICE)
        report = only(device, "map-error-unchecked")
        assert report.mapped is not None
        assert (report.mapped.file, report.mapped.line) == (__file__, line)


class TestMap:
    def test_of_the_main_stack(self, device: pm.Device) -> None:
        with open("/proc/self/maps") as maps:
            stack = next(line for line in maps if line.rstrip().endswith("[stack]"))
        top = int(stack.split()[0].split("-")[1], 16)
        buffer = (ctypes.c_ubyte * 64).from_address(top - 4096)
        addr = mapped(device, buffer, pm.DMA_TO_DEVICE)
        report = only(device, "map-stack")
        assert report.address == addr
        pm.dma_unmap_single(device, addr, 64, pm.DMA_TO_DEVICE)

    def test_of_a_threads_stack(self, device: pm.Device) -> None:
        def work() -> None:
            addr = mapped(
                device, (ctypes.c_ubyte * 64).from_address(stack_of_this_thread()), pm.DMA_TO_DEVICE
            )
            pm.dma_unmap_single(device, addr, 64, pm.DMA_TO_DEVICE)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert "from a stack" in only(device, "map-stack").text

    def test_of_program_text(self, device: pm.Device) -> None:
        text = ctypes.cast(ctypes.CDLL(None).getpid, ctypes.c_void_p).value
        assert text is not None
        addr = mapped(device, (ctypes.c_ubyte * 8).from_address(text), pm.DMA_TO_DEVICE)
        only(device, "map-text")
        pm.dma_unmap_single(device, addr, 8, pm.DMA_TO_DEVICE)

    def test_of_constants_of_a_library(self, device: pm.Device) -> None:
        with open("/proc/self/maps") as maps:
            rodata = next(line for line in maps if "/libc" in line and " r--p " in line)
        start = int(rodata.split("-")[0], 16)
        addr = mapped(device, (ctypes.c_ubyte * 8).from_address(start), pm.DMA_TO_DEVICE)
        only(device, "map-text")
        pm.dma_unmap_single(device, addr, 8, pm.DMA_TO_DEVICE)

    def test_of_cache_lines_that_another_device_writes(self, device: pm.Device) -> None:
        memory = pages(1)
        with pm.Device("d1") as other:
            line = here() + 1
            first = pm.dma_map_single(other, memory, 10, pm.DMA_FROM_DEVICE)
            assert not pm.dma_mapping_error(other, first)
            second = mapped(device, memory, pm.DMA_BIDIRECTIONAL, 10, 54)
            assert f"mapped at {__file__}:{line}" in only(device, "map-overlap").text
            pm.dma_unmap_single(other, first, 10, pm.DMA_FROM_DEVICE)
            assert not other.dma_errors
        pm.dma_unmap_single(device, second, 10, pm.DMA_BIDIRECTIONAL)
        device.dma_errors.clear()
        third = mapped(device, memory, pm.DMA_FROM_DEVICE)
        pm.dma_unmap_single(device, third, PAGE, pm.DMA_FROM_DEVICE)
        assert not device.dma_errors

    def test_reading_the_same_memory_overlaps_nothing(self, device: pm.Device) -> None:
        memory = pages(1)
        addrs = [
            mapped(device, memory, way) for way in (pm.DMA_TO_DEVICE, pm.DMA_TO_DEVICE, pm.DMA_FROM_DEVICE)
        ]
        assert not device.dma_errors
        for addr, way in zip(addrs, (pm.DMA_TO_DEVICE, pm.DMA_TO_DEVICE, pm.DMA_FROM_DEVICE), strict=True):
            pm.dma_unmap_single(device, addr, PAGE, way)

    def test_of_a_segment_longer_than_the_device_supports(self, device: pm.Device) -> None:
        pm.dma_set_max_seg_size(device, PAGE)
        sgl = pm.sg_list(pages(2))
        assert pm.dma_map_sg(device, sgl, 1, pm.DMA_TO_DEVICE) == 1
        assert (
            f"{2 * PAGE} bytes, longer than device claims to support [max={PAGE}]"
            in only(device, "segment-length").text
        )
        pm.dma_unmap_sg(device, sgl, 1, pm.DMA_TO_DEVICE)

    def test_of_a_segment_that_cannot_but_cross_the_boundary(self, device: pm.Device) -> None:
        pm.dma_set_seg_boundary(device, PAGE - 1)
        sgl = pm.sg_list(pages(2))
        assert pm.dma_map_sg(device, sgl, 1, pm.DMA_TO_DEVICE) == 1
        assert "[boundary=0xfff]" in only(device, "segment-boundary").text
        pm.dma_unmap_sg(device, sgl, 1, pm.DMA_TO_DEVICE)

    @pytest.mark.root
    def test_of_memory_that_neither_the_device_nor_the_pool_is_in_reach_of(self) -> None:
        with pm.Device("isa", iommu=False, dma_mask=pm.DMA_BIT_MASK(16)) as device:
            addr = pm.dma_map_single(device, bytearray(8), 8, pm.DMA_TO_DEVICE)
            assert pm.dma_mapping_error(device, addr)
            assert "within the mask 0xffff" in only(device, "mask-exceeded").text
            assert device.swiotlb.used == 0


class TestSync:
    def test_of_what_is_not_mapped(self, device: pm.Device) -> None:
        for sync in (pm.dma_sync_single_for_cpu, pm.dma_sync_single_for_device):
            with refuses(errno.EINVAL, Category.SYNC_UNALLOCATED):
                sync(device, 0x5000, 8, pm.DMA_TO_DEVICE)
        assert device.dma_debug.counts == {"sync-unallocated": 2}

    def test_beyond_the_mapping(self, device: pm.Device) -> None:
        addr = mapped(device, bytearray(64), pm.DMA_TO_DEVICE)
        with refuses(errno.EINVAL, Category.SYNC_BEYOND):
            pm.dma_sync_single_for_device(device, addr + 32, 33, pm.DMA_TO_DEVICE)
        assert f"beyond the 64 bytes mapped at {addr:#x}" in only(device, "sync-beyond").text
        pm.dma_unmap_single(device, addr, 64, pm.DMA_TO_DEVICE)

    def test_in_another_direction(self, device: pm.Device) -> None:
        addr = mapped(device, bytearray(64), pm.DMA_TO_DEVICE)
        pm.dma_sync_single_for_cpu(device, addr, 64, pm.DMA_FROM_DEVICE)
        assert (
            "for the CPU memory mapped DMA_TO_DEVICE as DMA_FROM_DEVICE"
            in only(device, "sync-direction").text
        )
        pm.dma_unmap_single(device, addr, 64, pm.DMA_TO_DEVICE)

    def test_of_a_scatterlist(self, device: pm.Device) -> None:
        sgl = pm.sg_list(pages(2), max_segment=PAGE)
        with refuses(errno.EINVAL, Category.SYNC_UNALLOCATED):
            pm.dma_sync_sg_for_cpu(device, sgl, 2, pm.DMA_FROM_DEVICE)
        pm.dma_map_sg(device, sgl, 2, pm.DMA_FROM_DEVICE)
        pm.dma_sync_sg_for_cpu(device, sgl, 2, pm.DMA_FROM_DEVICE)
        device.dma_errors.clear()
        device.dma_debug.counts.clear()
        pm.dma_sync_sg_for_device(device, sgl, 1, pm.DMA_FROM_DEVICE)
        only(device, "sg-nents-mismatch")
        pm.dma_unmap_sg(device, sgl, 2, pm.DMA_FROM_DEVICE)


class TestIova:
    def test_unlinking_what_is_not_linked(self, device: pm.Device) -> None:
        state = pm.dma_iova_try_alloc(device, 2 * PAGE)
        assert state is not None
        pm.dma_iova_link(device, state, pages(1), 0, PAGE, pm.DMA_TO_DEVICE)
        with refuses(errno.EINVAL, Category.IOVA_NOT_LINKED):
            pm.dma_iova_unlink(device, state, 0, 2 * PAGE, pm.DMA_TO_DEVICE)
        assert only(device, "iova-not-linked").address == state.addr + PAGE
        pm.dma_iova_destroy(device, state, PAGE, pm.DMA_TO_DEVICE)

    def test_linking_twice(self, device: pm.Device) -> None:
        state = pm.dma_iova_try_alloc(device, PAGE)
        assert state is not None
        pm.dma_iova_link(device, state, pages(1), 0, PAGE, pm.DMA_TO_DEVICE)
        with refuses(errno.EEXIST, Category.IOVA_LINKED_TWICE):
            pm.dma_iova_link(device, state, pages(1), 0, 10, pm.DMA_TO_DEVICE)
        only(device, "iova-linked-twice")
        pm.dma_iova_destroy(device, state, PAGE, pm.DMA_TO_DEVICE)

    def test_freeing_what_is_still_linked(self, device: pm.Device) -> None:
        state = pm.dma_iova_try_alloc(device, PAGE)
        assert state is not None
        line = here() + 1
        pm.dma_iova_link(device, state, pages(1), 0, PAGE, pm.DMA_TO_DEVICE)
        with refuses(errno.EBUSY, Category.IOVA_STILL_LINKED):
            pm.dma_iova_free(device, state)
        assert f"{__file__}:{line}" in only(device, "iova-still-linked").text
        pm.dma_iova_destroy(device, state, PAGE, pm.DMA_TO_DEVICE)

    def test_unlinking_in_another_direction(self, device: pm.Device) -> None:
        state = pm.dma_iova_try_alloc(device, PAGE)
        assert state is not None
        pm.dma_iova_link(device, state, pages(1), 0, PAGE, pm.DMA_TO_DEVICE)
        pm.dma_iova_destroy(device, state, PAGE, pm.DMA_FROM_DEVICE)
        only(device, "direction-mismatch")


class TestLeaks:
    def test_every_kind_is_reported_and_then_unmapped(self) -> None:
        domain = pm.IommuDomain()
        device = pm.Device("leaky", iommu=domain)
        buffer = bytearray(8)
        mapped(device, buffer, pm.DMA_TO_DEVICE)
        pm.dma_map_page(device, pages(1), 0, 8, pm.DMA_TO_DEVICE)
        pm.dma_map_sg(device, pm.sg_list(pages(2), max_segment=PAGE), 2, pm.DMA_TO_DEVICE)
        pm.dma_alloc_coherent(device, 8)
        state = pm.dma_iova_try_alloc(device, PAGE)
        assert state is not None
        pm.dma_iova_link(device, state, pages(1), 0, PAGE, pm.DMA_TO_DEVICE)
        pm.dma_iova_sync(device, state, 0, PAGE)
        leaks = device.release()
        assert [leak.type for leak in leaks] == [
            "single", "page", "scatter-gather", "scatter-gather", "coherent", "iova", "iova",
        ]  # fmt: skip
        assert {leak.category for leak in leaks} == {Category.LEAK}
        assert all("[count=7]" in leak.text for leak in leaks)
        assert [leak.mapped.file for leak in leaks[1:] if leak.mapped] == [__file__] * 6
        assert domain.stats()["mappings"] == domain.iova_stats()["live"] == 0
        buffer.append(1)
        assert device.release() == []

    def test_mirrored_ranges_too(self, mm: pm.AddressSpace) -> None:
        buf = mm.mmap(2 * PAGE)
        device = pm.Device("leaky")
        with pm.Mirror(mm) as mirror, mirror.range(buf.addr, buf.addr + buf.size) as rng:
            rng.default_flags = pm.HMM_PFN_REQ_FAULT | pm.HMM_PFN_REQ_WRITE
            line = here() + 1
            pm.hmm_range_dma_map(rng, device)
            (leak,) = device.release()
        assert (leak.type, leak.size) == ("hmm", 2 * PAGE)
        assert leak.mapped is not None
        assert (leak.mapped.file, leak.mapped.line) == (__file__, line)
        assert device.domain.stats()["mappings"] == 0

    def test_what_ctrl_c_left_is_done_by_the_next_release(self, monkeypatch: pytest.MonkeyPatch) -> None:
        device = pm.Device("d0")
        mapped(device, bytearray(8), pm.DMA_TO_DEVICE)
        mapped(device, bytearray(8), pm.DMA_TO_DEVICE)
        with monkeypatch.context() as patch:
            patch.setattr(device.dma_debug, "remove", MagicMock(side_effect=KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                device.release()
        assert len(device.release()) == 2
        assert device.release() == []
        assert not device.domain.mappings()

    def test_of_a_device_that_nobody_released(self) -> None:
        device = pm.Device("forgotten")
        buffer = bytearray(8)
        mapped(device, buffer, pm.DMA_TO_DEVICE)
        (entry,) = device.dma_debug.mappings()
        site = entry.site
        del entry
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            del device
            gc.collect()
        assert [str(one.message) for one in caught if one.category is ResourceWarning] == [
            f"forgotten: not released, 1 DMA mapping(s) leaked; mapped at {site}"
        ]
        buffer.append(0)

    def test_a_device_without_mappings_goes_quietly(self) -> None:
        device = pm.Device("clean")
        addr = mapped(device, bytearray(8), pm.DMA_TO_DEVICE)
        pm.dma_unmap_single(device, addr, 8, pm.DMA_TO_DEVICE)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            del device
            gc.collect()
        assert not caught


class TestReports:
    def test_a_line_says_it_all(self, device: pm.Device) -> None:
        addr = mapped(device, bytearray(8), pm.DMA_TO_DEVICE)
        pm.dma_unmap_page(device, addr, 8, pm.DMA_TO_DEVICE)
        text = str(only(device, "type-mismatch"))
        parts = ["d0: DMA-API: ", f"[device address={addr:#018x}]", "[size=8 bytes]", "[mapped as single]"]
        for part in [*parts, "[direction=DMA_TO_DEVICE]", "mapped at ", "found at "]:
            assert part in text

    def test_they_are_logged_once_a_place(self, device: pm.Device, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.WARNING, "pymirror.dma")
        for _ in range(3):
            addr = pm.dma_map_single(device, bytearray(8), 8, pm.DMA_TO_DEVICE)
            pm.dma_unmap_single(device, addr, 8, pm.DMA_TO_DEVICE)
        assert [(one.name, one.levelname) for one in caplog.records] == [("pymirror.dma", "WARNING")]
        assert device.dma_debug.counts == {"map-error-unchecked": 3}

    def test_they_are_bounded(self, device: pm.Device) -> None:
        for _ in range(1100):
            with pytest.raises(pm.DmaDebugError):
                pm.dma_sync_single_for_cpu(device, 0x5000, 8, pm.DMA_TO_DEVICE)
        assert len(device.dma_errors) == 1024
        assert device.dma_debug.counts == {"sync-unallocated": 1100}

    def test_an_error_is_the_report_and_what_to_do(self, device: pm.Device) -> None:
        for call in (pm.dma_unmap_single, pm.dma_sync_single_for_cpu):
            with pytest.raises(pm.DmaDebugError) as caught:
                call(device, 0x5000, 8, pm.DMA_TO_DEVICE)
            error = caught.value
            assert str(error) == f"[Errno 22] EINVAL: {error.report}; do: {error.hint}"
            assert error.addr == 0x5000
        assert f"<Site {__file__}:" in repr(device.dma_errors)

    def test_every_refusal_has_a_hint(self) -> None:
        for category in Category:
            if category.refused:
                report = pm.DmaDebugReport(
                    category, "d0", 0, 8, pm.DMA_TO_DEVICE, "single", None, Site("f", 1), "text"
                )
                assert pm.DmaDebugError(report).hint

    def test_why_a_mapping_failed_is_logged_and_no_report(
        self, device: pm.Device, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.WARNING, "pymirror.dma")
        with pm.Device("small", dma_mask=pm.DMA_BIT_MASK(13)) as small:
            for _ in range(3):
                assert pm.dma_map_single(small, bytearray(PAGE * 4), PAGE * 4, 1) == pm.DMA_MAPPING_ERROR
            pm.dma_map_sg(small, pm.sg_list(bytearray(PAGE * 4)), 1, pm.DMA_TO_DEVICE)
            assert not small.dma_errors
        single, sg = (record.getMessage() for record in caplog.records)
        assert single.startswith(f"small: mapping failed at {__file__}:")
        assert "ENOSPC" in single
        assert "IOVAs in a row" in sg

    def test_errors_can_be_pickled(self, device: pm.Device) -> None:
        with pytest.raises(pm.DmaDebugError) as caught:
            pm.dma_unmap_single(device, 0x5000, 8, pm.DMA_TO_DEVICE)
        again = pickle.loads(pickle.dumps(caught.value))
        assert str(again) == str(caught.value)
        assert again.errno == errno.EINVAL
        assert str(again.report) == str(caught.value.report)

    def test_every_category_has_a_test_here(self) -> None:
        source = inspect.getsource(inspect.getmodule(type(self)) or type(self))
        for category in Category:
            assert f'"{category.value}"' in source or f"Category.{category.name}" in source, category


def test_a_forked_child_has_nothing_of_it(device: pm.Device) -> None:
    addr = mapped(device, bytearray(8), pm.DMA_FROM_DEVICE)

    def child() -> None:
        with refuses(errno.ESRCH):
            device.dma_read(addr, 8)
        with pm.Device("the child's") as own:
            mine = mapped(own, bytearray(8), pm.DMA_FROM_DEVICE)
            pm.dma_unmap_single(own, mine, 8, pm.DMA_FROM_DEVICE)
            assert not own.dma_errors

    assert in_child(child) == 0
    pm.dma_unmap_single(device, addr, 8, pm.DMA_FROM_DEVICE)


def stack_of_this_thread() -> int:
    """An address in the calling thread's stack: glibc tells where it is."""
    libc = ctypes.CDLL(None)
    attr = ctypes.create_string_buffer(256)
    base, size = ctypes.c_void_p(), ctypes.c_size_t()
    libc.pthread_self.restype = ctypes.c_void_p
    assert libc.pthread_getattr_np(ctypes.c_void_p(libc.pthread_self()), attr) == 0
    assert libc.pthread_attr_getstack(attr, ctypes.byref(base), ctypes.byref(size)) == 0
    libc.pthread_attr_destroy(attr)
    assert base.value is not None
    return base.value + size.value - PAGE


@pytest.mark.root
def test_a_sync_is_of_the_mapping_that_has_all_of_it() -> None:
    """Without an IOMMU mappings of the same memory have the same addresses."""
    memory = pages(1)
    with pm.Device("direct", iommu=False) as device:
        sizes = [(100, 0), (PAGE, 0), (50, 200)]
        addrs = [mapped(device, memory, pm.DMA_TO_DEVICE, size, offset) for size, offset in sizes]
        for offset, size in ((0, 2000), (200, 51), (249, 300), (60, 4000)):
            pm.dma_sync_single_for_device(device, addrs[0] + offset, size, pm.DMA_TO_DEVICE)
        with refuses(errno.EINVAL, "sync-beyond"):
            pm.dma_sync_single_for_device(device, addrs[0], PAGE + 1, pm.DMA_TO_DEVICE)
        with refuses(errno.EINVAL, "sync-unallocated"):
            pm.dma_sync_single_for_device(device, 1 << 70, 8, pm.DMA_TO_DEVICE)
        for addr, (size, _) in zip(addrs, sizes, strict=True):
            pm.dma_unmap_single(device, addr, size, pm.DMA_TO_DEVICE)
