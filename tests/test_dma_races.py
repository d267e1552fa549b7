"""DMA mapping and DMA accesses against invalidations, as orders of named points; failures half-way."""

from __future__ import annotations

import errno
import gc
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from dma import DmaDriver, mirrored, nothing_mapped, numbers
from mirroring import FAULT, PAGE, WRITE
from notifying import invalidate
from racing import ctrl_c, in_child
from seams import Background, errno_of, foreign, inject, needs, points

import pymirror as pm

PAGES = 16
MADV_DONTNEED = 4


@pytest.fixture
def buf(mm: pm.AddressSpace) -> pm.Region:
    return mm.mmap(PAGES * PAGE)


class Contents:
    """The bytes of a Region; its repr does not touch them, for they may be gone when a test has failed."""

    def __init__(self, buf: pm.Region) -> None:
        self._view = numbers(buf)

    def __getitem__(self, index: slice) -> Any:
        return self._view[index]


@pytest.fixture
def mapped(mm: pm.AddressSpace, buf: pm.Region) -> Iterator[tuple[DmaDriver, pm.Range, Any]]:
    view = Contents(buf)
    with mirrored(mm, buf) as (driver, rng):
        yield driver, rng, view
    assert nothing_mapped(driver.device)


CHANGES: dict[str, Callable[[pm.AddressSpace, int], object]] = {
    "invalidate": lambda mm, addr: invalidate(mm, addr),
    "madvise": lambda mm, addr: mm.madvise(addr, PAGE, MADV_DONTNEED),
    "munmap": lambda mm, addr: mm.munmap(addr, PAGE),
    "mprotect": lambda mm, addr: mm.mprotect(addr, PAGE, 1),
    "foreign munmap": lambda mm, addr: foreign.munmap(addr, PAGE),
    "foreign madvise": lambda mm, addr: foreign.madvise(addr, PAGE, MADV_DONTNEED),
}


class TestMapping:
    @pytest.mark.parametrize("page", range(PAGES))
    @pytest.mark.parametrize("point", ["WALK_BEFORE_READ", "WALK_AFTER_READ", "DMA_MAP_BEFORE_COMMIT"])
    def test_an_invalidation_of_any_page_unwinds_it_all(
        self,
        mm: pm.AddressSpace,
        buf: pm.Region,
        mapped: tuple[DmaDriver, pm.Range, Any],
        point: str,
        page: int,
    ) -> None:
        driver, rng, _ = mapped
        driver.mapped = None
        with points(point) as there:
            mapping = Background(pm.hmm_range_dma_map, rng, driver.device)
            there.wait()
            invalidate(mm, buf.addr + page * PAGE)
            there.release()
            assert errno_of(mapping.result) == errno.EBUSY
        assert nothing_mapped(driver.device)

    @pytest.mark.parametrize("change", CHANGES)
    def test_whatever_changes_it(
        self, mm: pm.AddressSpace, buf: pm.Region, mapped: tuple[DmaDriver, pm.Range, Any], change: str
    ) -> None:
        if change.startswith("foreign"):
            needs("uffd_events")
        driver, rng, _ = mapped
        with points("DMA_MAP_BEFORE_COMMIT") as there:
            mapping = Background(pm.hmm_range_dma_map, rng, driver.device)
            there.wait()
            CHANGES[change](mm, buf.addr + 3 * PAGE)
            there.release()
            assert errno_of(mapping.result) == errno.EBUSY
        assert nothing_mapped(driver.device)

    def test_one_beside_it_is_no_matter(
        self, mm: pm.AddressSpace, mapped: tuple[DmaDriver, pm.Range, Any]
    ) -> None:
        driver, rng, view = mapped
        beside = mm.mmap(PAGE)
        with points("DMA_MAP_BEFORE_COMMIT") as there:
            mapping = Background(pm.hmm_range_dma_map, rng, driver.device)
            there.wait()
            mm.munmap(beside.addr, PAGE)
            there.release()
            daddrs = mapping.result()
        assert driver.device.dma_read(int(daddrs[0]), 8) == view[:8].tobytes()

    @pytest.mark.parametrize("forgets", [True, False])
    def test_one_just_after_the_commit_fences_it_and_it_is_not_given_out(
        self, mm: pm.AddressSpace, buf: pm.Region, mapped: tuple[DmaDriver, pm.Range, Any], forgets: bool
    ) -> None:
        """Its callback has no mapping to find yet, so that nobody would ever take it down."""
        driver, rng, _ = mapped
        driver.forgets = forgets
        driver.mapped = rng
        out = np.ones(PAGES, np.uint64)
        with points("DMA_MAP_AFTER_COMMIT") as there:
            mapping = Background(pm.hmm_range_dma_map, rng, driver.device, out=out)
            there.wait()
            invalidate(mm, buf.addr)
            assert driver.device.domain.stats()["fenced"] == 1
            there.release()
            assert errno_of(mapping.result) == errno.EBUSY
        assert not out.any()
        assert nothing_mapped(driver.device)

    def test_ctrl_c_as_it_returns_leaves_nothing(self, mapped: tuple[DmaDriver, pm.Range, Any]) -> None:
        driver, rng, _ = mapped
        with points("DMA_MAP_AFTER_COMMIT") as there, ctrl_c(lambda _: there.wait(), there.release):
            pm.hmm_range_dma_map(rng, driver.device)
        gc.collect()
        assert nothing_mapped(driver.device)
        assert not driver.device.domain.mappings()

    def test_threads_that_map_and_unmap_ranges_of_one_device(self, mm: pm.AddressSpace) -> None:
        device = pm.Device("shared")
        driver = DmaDriver(mm, device)

        def work() -> int:
            part = mm.mmap(PAGE)
            unmapped = 0
            with driver.range(part.addr, part.addr + PAGE) as rng:
                rng.default_flags = WRITE
                for _ in range(300):
                    pm.hmm_range_dma_map(rng, device)
                    unmapped += pm.hmm_range_dma_unmap(rng, device)
            return unmapped

        switch = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            threads = [Background(work) for _ in range(8)]
            assert [thread.result() for thread in threads] == [300] * 8
        finally:
            sys.setswitchinterval(switch)
        assert nothing_mapped(device)
        driver.unregister()

    def test_threads_that_want_a_devices_domain_first_have_the_same(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        both = threading.Barrier(2, timeout=10.0)

        def made_together(iommu: bool | pm.DmaDomain) -> pm.DmaDomain:
            both.wait()
            return pm.IommuDomain()

        monkeypatch.setattr("pymirror.dma.device.domain_of", made_together)
        device = pm.Device("d")
        wanted = [Background(lambda: device.domain) for _ in range(2)]
        assert wanted[0].result() is wanted[1].result() is device.domain

    def test_no_memory_at_any_allocation_leaves_nothing(
        self, mm: pm.AddressSpace, mapped: tuple[DmaDriver, pm.Range, Any]
    ) -> None:
        driver, rng, _ = mapped
        assert driver.device.domain.iommu
        for nth in range(1, 20):
            rng.wait_until_valid()
            with inject("MALLOC", nth) as injection:
                failed = errno_of(pm.hmm_range_dma_map, rng, driver.device)
            if not injection.struck:
                break
            assert failed == errno.ENOMEM
            assert nothing_mapped(driver.device)
        assert failed == 0
        pm.hmm_range_dma_unmap(rng, driver.device)


class TestScatterLists:
    @pytest.mark.parametrize("lengths", [(-5, 10), (10, -5), (5, 0)])
    def test_a_length_that_is_none_moves_no_byte(
        self, mapped: tuple[DmaDriver, pm.Range, Any], lengths: tuple[int, int]
    ) -> None:
        driver, rng, view = mapped
        before = view[:].tobytes()
        segments = list(zip(driver.map(rng).tolist(), lengths, strict=False))
        assert errno_of(driver.device.dma_write_sg, segments, b"bytes") == errno.EINVAL
        assert errno_of(driver.device.dma_read_sg, segments) == errno.EINVAL
        assert view[:].tobytes() == before


class TestAccess:
    @pytest.mark.parametrize("change", CHANGES)
    @pytest.mark.parametrize("point", ["ACCESS_LOOKED_UP", "ACCESS_COPIED"])
    def test_a_read_that_an_invalidation_passed_is_not_given_out(
        self,
        mm: pm.AddressSpace,
        buf: pm.Region,
        mapped: tuple[DmaDriver, pm.Range, Any],
        change: str,
        point: str,
    ) -> None:
        if change.startswith("foreign"):
            needs("uffd_events")
        driver, rng, _ = mapped
        daddrs = driver.map(rng)
        with points(point) as there:
            reading = Background(driver.device.dma_read, int(daddrs[0]), 8)
            there.wait()
            CHANGES[change](mm, buf.addr)
            mm.sync()
            there.release()
            assert errno_of(reading.result) == errno.EFAULT
        assert driver.device.dma_stats.redone == 1

    def test_an_invalidation_waits_for_a_write(
        self, mm: pm.AddressSpace, buf: pm.Region, mapped: tuple[DmaDriver, pm.Range, Any]
    ) -> None:
        driver, rng, view = mapped
        daddrs = driver.map(rng)
        with points("ACCESS_LOOKED_UP") as there:
            writing = Background(driver.device.dma_write, int(daddrs[0]), b"written")
            there.wait()
            protecting = Background(mm.mprotect, buf.addr, PAGE, 1)
            assert not protecting.done
            there.release()
            assert errno_of(writing.result) == 0
            assert errno_of(protecting.result) == 0
        assert view[:7].tobytes() == b"written"

    def test_an_unmapping_waits_for_a_write(
        self, buf: pm.Region, mapped: tuple[DmaDriver, pm.Range, Any]
    ) -> None:
        driver, rng, view = mapped
        daddrs = driver.map(rng)
        with points("ACCESS_LOOKED_UP") as there:
            writing = Background(driver.device.dma_write, int(daddrs[0]), b"written")
            there.wait()
            unmapping = Background(pm.hmm_range_dma_unmap, rng, driver.device)
            there.release()
            assert errno_of(writing.result) == 0
            assert unmapping.result() == PAGES
        assert view[:7].tobytes() == b"written"
        assert errno_of(driver.device.dma_read, int(daddrs[0]), 1) == errno.EFAULT

    def test_an_access_before_the_callback_ran_is_an_ordinary_fault(
        self, mm: pm.AddressSpace, buf: pm.Region, mapped: tuple[DmaDriver, pm.Range, Any]
    ) -> None:
        driver, rng, _ = mapped
        daddrs = driver.map(rng)
        with points("INVALIDATE_FENCED") as there:
            changing = Background(mm.madvise, buf.addr, PAGE, MADV_DONTNEED)
            there.wait()
            with pytest.raises(pm.IommuFaultError) as fault:
                driver.device.dma_read(int(daddrs[0]), 1)
            assert fault.value.reason is pm.IommuFaultReason.FENCED
            there.release()
            changing.result()
        assert driver.device.dma_stats.stale == 0

    def test_a_page_exchanged_unseen_is_found_at_the_access(
        self, mm: pm.AddressSpace, mapped: tuple[DmaDriver, pm.Range, Any]
    ) -> None:
        needs("pfn")
        driver, _, _ = mapped
        other = mm.mmap(PAGE)
        with driver.range(other.addr, other.addr + PAGE) as rng:
            rng.default_flags = FAULT
            daddrs = driver.map(rng)
            # The zero page is mapped, and nobody tells of the write that puts another in its place.
            np.frombuffer(other, np.uint8)[:3] = 7
            with pytest.raises(pm.IommuFaultError) as fault:
                driver.device.dma_read(int(daddrs[0]), 3)
            assert fault.value.reason is pm.IommuFaultReason.CHANGED
            assert driver.updates[-1].guarantee is pm.Guarantee.DETECTED
            rng.wait_until_valid()
            daddrs = driver.map(rng)
            assert driver.device.dma_read(int(daddrs[0]), 3) == bytes([7, 7, 7])
            pm.hmm_range_dma_unmap(rng, driver.device)

    def test_a_page_exchanged_unseen_is_found_by_a_snapshot(
        self, mm: pm.AddressSpace, mapped: tuple[DmaDriver, pm.Range, Any]
    ) -> None:
        """Also of a device that has no page table and does not touch it."""
        needs("pfn")
        driver, _, _ = mapped
        other = mm.mmap(2 * PAGE)
        with driver.range(other.addr, other.addr + 2 * PAGE) as rng:
            rng.default_flags = FAULT
            daddrs = driver.map(rng)
            np.frombuffer(other, np.uint8)[PAGE] = 7
            assert errno_of(rng.snapshot) == errno.EBUSY
            assert driver.updates[-1].guarantee is pm.Guarantee.DETECTED
            assert (driver.updates[-1].start, driver.updates[-1].end) == (rng.start + PAGE, rng.end)
            assert driver.device.dma_read(int(daddrs[0]), 1) == bytes(1)
            assert driver.device.domain.stats()["mapped_pages"] == 1
            pm.hmm_range_dma_unmap(rng, driver.device)


class TestTheEnds:
    def test_of_the_address_space(self) -> None:
        mm = pm.AddressSpace()
        buf = mm.mmap(PAGE)
        driver = DmaDriver(mm)
        rng = driver.range(buf.addr, buf.addr + PAGE)
        rng.register()
        rng.default_flags = FAULT
        daddrs = driver.map(rng)
        mm.close()
        assert errno_of(driver.device.dma_read, int(daddrs[0]), 1) == errno.EFAULT
        pm.hmm_range_dma_unmap(rng, driver.device)
        assert nothing_mapped(driver.device)

    def test_in_a_forked_child_the_domain_is_the_parents(
        self, mapped: tuple[DmaDriver, pm.Range, Any]
    ) -> None:
        driver, rng, view = mapped
        device = pm.Device("shared")

        def child() -> None:
            assert errno_of(driver.device.dma_read, int(daddrs[0]), 1) == errno.ESRCH
            assert errno_of(pm.hmm_range_dma_map, rng, device) == errno.ESRCH
            assert errno_of(pm.hmm_range_dma_unmap, rng, driver.device) == errno.ESRCH

        daddrs = driver.map(rng)
        driver.forgets = True
        assert in_child(child) == 0
        rng.wait_until_valid()
        pm.hmm_range_dma_unmap(rng, driver.device)
        daddrs = driver.map(rng)
        assert driver.device.dma_read(int(daddrs[0]), 8) == view[:8].tobytes()

    def test_two_devices_and_two_address_spaces(self, mm: pm.AddressSpace, buf: pm.Region) -> None:
        """A domain that devices share: what one maps the other reaches, and each unmaps its own."""
        domain = pm.IommuDomain()
        one, two = (pm.Device(name, iommu=domain) for name in ("one", "two"))
        view = numbers(buf)
        with pm.AddressSpace() as other, mirrored(mm, buf, one) as (driver, rng):
            far = other.mmap(2 * PAGE)
            numbers(far)
            with mirrored(other, far, two) as (second, far_rng):
                daddrs, far_daddrs = driver.map(rng), second.map(far_rng)
                assert two.dma_read(int(daddrs[3]), 8) == view[3 * PAGE : 3 * PAGE + 8].tobytes()
                assert one.dma_read(int(far_daddrs[0]), 4) == bytes([0, 1, 2, 3])
                mm.munmap(buf.addr, PAGE)
                assert errno_of(two.dma_read, int(daddrs[0]), 1) == errno.EFAULT
                assert one.dma_read(int(far_daddrs[1]), 1)
        assert nothing_mapped(one)

    def test_a_devices_mask_bounds_its_addresses(self, mm: pm.AddressSpace, buf: pm.Region) -> None:
        narrow = pm.Device("narrow", dma_mask=(1 << 32) - 1)
        numbers(buf)
        with mirrored(mm, buf, narrow) as (driver, rng):
            daddrs = driver.map(rng)
            assert int(daddrs.max()) < 1 << 32
            with pytest.raises(pm.IommuFaultError) as fault:
                narrow.dma_read(1 << 32, 1)
            assert fault.value.reason is pm.IommuFaultReason.MASK


@pytest.mark.hugetlb
@pytest.mark.parametrize("huge", ["thp", "hugetlb"])
def test_huge_pages_are_one_entry_each(mm: pm.AddressSpace, huge: str) -> None:
    needs("pfn", "pagemap_scan")
    buf = mm.mmap(4 << 20, huge=huge)
    view = numbers(buf)
    with mirrored(mm, buf) as (driver, rng):
        daddrs = driver.map(rng)
        stats = driver.device.domain.stats()
        assert stats["mapped_pages"] == 1024
        if (pm.hmm_pfn_to_map_order(rng.pfns) == 9).all():
            assert stats["entries"] == 2
            assert stats["segments"] <= 2
        assert driver.device.dma_read(int(daddrs[0]), buf.size) == view.tobytes()
    del view
