"""Snapshot and fault: what they show, what they refuse, and the modern hmm_range_fault()."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from mirroring import FAULT, PAGE, WRITE, Driver, as_bytes, modern_fault, valid, whole, writable
from notifying import invalidate
from seams import errno_of, needs

import pymirror as pm

HUGE = 2 * pm.MiB


@pytest.fixture
def driver(mm: pm.AddressSpace) -> Iterator[Driver]:
    with Driver(mm) as driver:
        yield driver


@pytest.mark.needs("pagemap")
class TestSnapshot:
    def test_it_shows_what_is_there_and_faults_nothing(self, mm: pm.AddressSpace, driver: Driver) -> None:
        buf = mm.mmap(4 * PAGE)
        as_bytes(buf)[PAGE] = 1
        with whole(driver, buf) as rng:
            for _ in range(2):
                assert rng.snapshot() == rng.seq
                assert valid(rng.pfns) == [False, True, False, False]
                assert writable(rng.pfns) == [False, True, False, False]
        assert mm.stats()["populated_pages"] == 0

    def test_pfns_are_those_of_the_pagemap(self, mm: pm.AddressSpace, driver: Driver) -> None:
        needs("pfn")
        buf = mm.mmap(8 * PAGE)
        as_bytes(buf)[:] = b"\1" * buf.size
        with open("/proc/self/pagemap", "rb") as pagemap, whole(driver, buf) as rng:
            rng.snapshot()
            pagemap.seek(buf.addr // PAGE * 8)
            raw = np.frombuffer(pagemap.read(8 * 8), np.uint64)
        assert pm.hmm_pfn_to_pfn(rng.pfns).tolist() == (raw & np.uint64((1 << 55) - 1)).tolist()
        assert set(pm.hmm_pfn_to_map_order(rng.pfns).tolist()) == {0}

    def test_a_huge_page_says_so(self, mm: pm.AddressSpace, driver: Driver) -> None:
        needs("pfn", "pagemap_scan")
        buf = mm.mmap(HUGE, huge="thp")
        as_bytes(buf)[0] = 1
        with whole(driver, buf) as rng:
            rng.snapshot()
        if not valid(rng.pfns)[-1]:
            pytest.skip("the kernel gave no huge page")
        assert set(pm.hmm_pfn_to_map_order(rng.pfns).tolist()) == {9}
        assert pm.hmm_pfn_to_map_order(int(rng.pfns[3])) == 9

    def test_a_hole_is_efault_and_what_precedes_it_is_told(self, mm: pm.AddressSpace, driver: Driver) -> None:
        buf = mm.mmap(3 * PAGE)
        as_bytes(buf)[0] = 1
        with whole(driver, buf) as rng:
            mm.munmap(buf.addr + PAGE, PAGE)
            rng.wait_until_valid()
            with pytest.raises(pm.MirrorError) as failed:
                rng.snapshot()
            assert failed.value.errno == errno.EFAULT
            assert failed.value.addr == buf.addr + PAGE
            assert "in no vma" in str(failed.value)
            assert valid(rng.pfns) == [True, False, False]

    def test_an_unreadable_vma_is_eperm(self, mm: pm.AddressSpace, driver: Driver) -> None:
        buf = mm.mmap(2 * PAGE)
        mm.mprotect(buf.addr + PAGE, PAGE, 0)
        with whole(driver, buf) as rng:
            with pytest.raises(pm.MirrorError) as failed:
                rng.snapshot()
            assert (failed.value.errno, failed.value.addr) == (errno.EPERM, buf.addr + PAGE)
            assert failed.value.vma is not None

    def test_invalid_is_eagain(self, mm: pm.AddressSpace, driver: Driver) -> None:
        buf = mm.mmap(PAGE)
        with whole(driver, buf) as rng:
            invalidate(mm, buf.addr)
            assert errno_of(rng.snapshot) == errno.EAGAIN
            assert errno_of(rng.fault) == errno.EAGAIN
            rng.wait_until_valid()
            rng.snapshot()

    def test_an_invalidation_does_not_erase_it(self, mm: pm.AddressSpace, driver: Driver) -> None:
        buf = mm.mmap(PAGE)
        as_bytes(buf)[0] = 1
        with whole(driver, buf) as rng:
            rng.snapshot()
            before = rng.pfns.copy()
            mm.madvise(buf.addr, PAGE, mmap.MADV_DONTNEED)
            assert not rng.valid
            assert rng.pfns.tolist() == before.tolist()

    def test_the_function_of_the_series(self, mm: pm.AddressSpace, driver: Driver) -> None:
        buf = mm.mmap(PAGE)
        with whole(driver, buf) as rng:
            assert pm.hmm_range_snapshot(rng) == rng.seq


@pytest.mark.needs("pagemap")
class TestFault:
    @pytest.mark.parametrize(("flags", "can_write"), [(FAULT, False), (WRITE, True)])
    def test_it_faults_what_is_asked_for(
        self, mm: pm.AddressSpace, driver: Driver, flags: int, can_write: bool
    ) -> None:
        buf = mm.mmap(4 * PAGE)
        mm.madvise(buf.addr, buf.size, mmap.MADV_NOHUGEPAGE)
        with whole(driver, buf, flags) as rng:
            assert rng.fault() == rng.seq
            assert valid(rng.pfns) == [True] * 4
            assert writable(rng.pfns) == [can_write] * 4

    def test_requests_page_by_page(self, mm: pm.AddressSpace, driver: Driver) -> None:
        buf = mm.mmap(4 * PAGE)
        mm.madvise(buf.addr, buf.size, mmap.MADV_NOHUGEPAGE)
        with whole(driver, buf, 0) as rng:
            rng.pfns[:] = [0, FAULT, WRITE, 0]
            rng.fault()
            assert valid(rng.pfns) == [False, True, True, False]
            assert writable(rng.pfns) == [False, False, True, False]

    def test_the_mask_takes_the_old_content_out(self, mm: pm.AddressSpace, driver: Driver) -> None:
        buf = mm.mmap(PAGE)
        with whole(driver, buf, WRITE) as rng:
            rng.fault()
            mm.mprotect(buf.addr, PAGE, mmap.PROT_READ)
            rng.wait_until_valid()
            rng.default_flags = FAULT
            rng.pfn_flags_mask = 0
            rng.fault()
            assert writable(rng.pfns) == [False]

    def test_a_hole_is_efault(self, mm: pm.AddressSpace, driver: Driver) -> None:
        buf = mm.mmap(3 * PAGE)
        mm.munmap(buf.addr + 2 * PAGE, PAGE)
        with driver.range(buf.addr, buf.addr + 3 * PAGE) as rng:
            rng.default_flags = WRITE
            with pytest.raises(pm.MirrorError) as failed:
                rng.fault()
        assert (failed.value.errno, failed.value.addr) == (errno.EFAULT, buf.addr + 2 * PAGE)

    def test_a_write_to_a_read_only_vma_is_eperm(self, mm: pm.AddressSpace, driver: Driver) -> None:
        buf = mm.mmap(PAGE, prot=mmap.PROT_READ)
        with whole(driver, buf, WRITE) as rng:
            with pytest.raises(pm.MirrorError) as failed:
                rng.fault()
            assert failed.value.errno == errno.EPERM
            assert failed.value.vma is not None
            rng.pfn_flags_mask = 0
            rng.default_flags = FAULT
            rng.fault()

    def test_a_shared_mapping(self, mm: pm.AddressSpace, driver: Driver) -> None:
        buf = mm.mmap(2 * PAGE, shared=True)
        with whole(driver, buf, WRITE) as rng:
            rng.fault()
            assert writable(rng.pfns) == [True, True]

    @pytest.mark.hugetlb
    @pytest.mark.parametrize("page_shift", [12, 21])
    def test_hugetlb(self, mm: pm.AddressSpace, driver: Driver, page_shift: int) -> None:
        buf = mm.mmap(2 * HUGE, huge="hugetlb")
        with driver.range(buf.addr, buf.addr + buf.size, page_shift) as rng:
            rng.pfns[0] = WRITE
            rng.fault()
            assert rng.npages == len(rng.pfns) == buf.size >> page_shift
            assert valid(rng.pfns)[0]
            assert pm.hmm_pfn_to_map_order(int(rng.pfns[0])) == 9
            assert not valid(rng.pfns)[-1]

    @pytest.mark.hugetlb
    def test_page_shift_of_huge_pages_fits_hugetlb_only(self, mm: pm.AddressSpace, driver: Driver) -> None:
        buf = mm.mmap(HUGE, huge="thp")
        with driver.range(buf.addr, buf.addr + HUGE, 21) as rng:
            assert errno_of(rng.snapshot) == errno.EINVAL
        assert errno_of(driver.range, buf.addr + PAGE, buf.addr + HUGE, 21) == errno.EINVAL
        assert errno_of(driver.range, buf.addr, buf.addr + HUGE, 30) == errno.EINVAL

    def test_not_blocking_refuses_what_must_be_read_from_disk(
        self, mm: pm.AddressSpace, driver: Driver, tmp_path: Any
    ) -> None:
        path = tmp_path / "file"
        path.write_bytes(b"\1" * PAGE * 4)
        fd = os.open(path, os.O_RDWR)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            buf = mm.mmap(4 * PAGE, shared=True, fd=fd)
            with whole(driver, buf) as rng:
                failed = errno_of(rng.fault, block=False)
                assert failed in (0, errno.EAGAIN)
                if failed == 0:
                    pytest.skip("the file system keeps its pages in memory")
                rng.fault()
                assert valid(rng.pfns) == [True] * 4
        finally:
            os.close(fd)

    def test_under_a_driver_lock_it_is_edeadlk(self, mm: pm.AddressSpace, driver: Driver) -> None:
        buf = mm.mmap(PAGE)
        with whole(driver, buf) as rng, driver.lock:
            for call in (rng.fault, rng.snapshot, rng.wait_until_valid):
                assert errno_of(call) == errno.EDEADLK
            assert rng.valid


class TestModernFault:
    def test_without_requests_it_only_looks(self, mm: pm.AddressSpace) -> None:
        buf = mm.mmap(4 * PAGE)
        as_bytes(buf)[PAGE] = 1
        assert valid(modern_fault(mm, buf)) == [False, True, False, False]
        assert valid(modern_fault(mm, buf, WRITE)) == [True] * 4

    def test_holes_and_unreadable_vmas_are_errors_in_the_array(self, mm: pm.AddressSpace) -> None:
        buf = mm.mmap(4 * PAGE)
        as_bytes(buf)[:] = b"\1" * buf.size
        mm.mprotect(buf.addr, PAGE, 0)
        mm.munmap(buf.addr + 2 * PAGE, PAGE)
        start = buf.addr
        sub = pm.IntervalNotifier(mm, start, 4 * PAGE, lambda sub, range, seq: sub.set_seq(seq))
        pfns = np.zeros(4, np.uint64)
        pm.hmm_range_fault(sub, start, start + 4 * PAGE, pfns, seq=sub.read_begin())
        assert ((pfns & pm.HMM_PFN_ERROR) != 0).tolist() == [True, False, True, False]
        assert valid(pfns) == [False, True, False, True]
        with pytest.raises(pm.MirrorError) as failed:
            pm.hmm_range_fault(sub, start, start + 4 * PAGE, pfns, default_flags=FAULT, seq=sub.read_begin())
        assert (failed.value.errno, failed.value.addr) == (errno.EFAULT, start)
        sub.remove()

    def test_a_moved_sequence_is_ebusy(self, mm: pm.AddressSpace) -> None:
        buf = mm.mmap(PAGE)
        sub = pm.IntervalNotifier(mm, buf.addr, PAGE, lambda sub, range, seq: sub.set_seq(seq))
        seq = sub.read_begin()
        invalidate(mm, buf.addr)
        pfns = np.zeros(1, np.uint64)
        assert errno_of(pm.hmm_range_fault, sub, buf.addr, buf.addr + PAGE, pfns, seq=seq) == errno.EBUSY
        sub.remove()

    def test_wrong_use(self, mm: pm.AddressSpace) -> None:
        buf = mm.mmap(3 * PAGE)
        sub = pm.IntervalNotifier(mm, buf.addr, 2 * PAGE, lambda sub, range, seq: sub.set_seq(seq))
        seq = sub.read_begin()
        good = np.zeros(2, np.uint64)
        end = buf.addr + 2 * PAGE
        for start, stop, pfns in [
            (buf.addr, end + PAGE, np.zeros(3, np.uint64)),
            (buf.addr + 1, end, good),
            (buf.addr, buf.addr, good),
            (buf.addr, end, np.zeros(3, np.uint64)),
            (buf.addr, end, np.zeros(2, np.int64)),
            (buf.addr, end, np.zeros(4, np.uint64)[::2]),
            (buf.addr, end, [0, 0]),
        ]:
            assert errno_of(pm.hmm_range_fault, sub, start, stop, pfns, seq=seq) == errno.EINVAL
        good.flags.writeable = False
        assert errno_of(pm.hmm_range_fault, sub, buf.addr, end, good, seq=seq) == errno.EINVAL
        sub.remove()
