"""Mirrors and ranges: snapshot, fault, waiting, validity, and the end of the mm they look at."""

from __future__ import annotations

import ctypes
import errno
import gc
import mmap
import os
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from seams import WAIT_S, Background, errno_of, foreign, inject, needs, points

import pymirror as pm
from pymirror.pfn import PfnArray

PAGE = 4096
HUGE = 2 * pm.MiB
PUNCH_HOLE_KEEP_SIZE = 3
FAULT = pm.HMM_PFN_REQ_FAULT
WRITE = pm.HMM_PFN_REQ_FAULT | pm.HMM_PFN_REQ_WRITE


class Driver(pm.Mirror):
    def __init__(self, mm: pm.AddressSpace, device: pm.Device | None = None) -> None:
        self.device = device or pm.Device("d")
        self.updates: list[pm.MmuNotifierRange] = []
        self.released = 0
        super().__init__(mm)

    def sync_cpu_device_pagetables(self, update: pm.MmuNotifierRange) -> None:
        with self.lock:
            self.updates.append(update)
            self.device.page_table.clear(update.start, update.end)

    def release(self) -> None:
        self.released += 1


@pytest.fixture
def driver(mm: pm.AddressSpace) -> Iterator[Driver]:
    with Driver(mm) as driver:
        yield driver


def valid(pfns: PfnArray) -> list[bool]:
    return ((pfns & pm.HMM_PFN_VALID) != 0).tolist()


def writable(pfns: PfnArray) -> list[bool]:
    return ((pfns & pm.HMM_PFN_WRITE) != 0).tolist()


def whole(driver: Driver, buf: pm.Region, flags: int = FAULT) -> pm.Range:
    rng = driver.range(buf.addr, buf.addr + buf.size)
    rng.default_flags = flags
    return rng


def invalidate(mm: pm.AddressSpace, start: int, pages: int = 1, **how: Any) -> None:
    with mm.invalidate(start, start + pages * PAGE, **how):
        pass


def as_bytes(buf: pm.Region) -> memoryview:
    return memoryview(buf).cast("B")


class TestHmm:
    def test_mirrors_and_ranges_of_an_mm_share_one(self, mm: pm.AddressSpace) -> None:
        buf = mm.mmap(PAGE)
        with Driver(mm) as one, Driver(mm) as two, one.range(buf.addr, buf.addr + PAGE) as rng:
            assert one.hmm is two.hmm is pm.Hmm.get(mm)
            assert not one.hmm.dead
            assert rng.registered

    def test_it_lives_as_long_as_somebody_uses_it(self, mm: pm.AddressSpace) -> None:
        buf = mm.mmap(PAGE)
        with Driver(mm) as driver:
            rng = whole(driver, buf)
            rng.register()
            first = id(pm.Hmm.get(mm))
        assert id(pm.Hmm.get(mm)) == first
        rng.snapshot()
        rng.unregister()

    def test_two_address_spaces_have_two(self, mm: pm.AddressSpace) -> None:
        with pm.AddressSpace() as other, Driver(mm) as one, Driver(other) as two:
            assert one.hmm is not two.hmm


class TestMirror:
    def test_every_mirror_is_told(self, mm: pm.AddressSpace) -> None:
        buf = mm.mmap(2 * PAGE)
        with Driver(mm) as one, Driver(mm) as two:
            mm.madvise(buf.addr, PAGE, mmap.MADV_DONTNEED)
            for driver in (one, two):
                (update,) = driver.updates
                assert (update.start, update.end, update.event) == (buf.addr, buf.addr + PAGE, pm.Event.CLEAR)

    def test_unregister_is_idempotent_and_ends_the_callbacks(self, mm: pm.AddressSpace) -> None:
        driver = Driver(mm)
        driver.unregister()
        driver.unregister()
        invalidate(mm, 0)
        assert driver.updates == []
        assert not driver.mm_is_alive()
        rng = driver.range(0x1000, 0x2000)
        assert errno_of(rng.register) == errno.EFAULT

    def test_release_comes_once_with_ranges_invalid_and_waiters_awake(self) -> None:
        mm = pm.AddressSpace()
        buf = mm.mmap(PAGE)
        seen: list[Any] = []

        class Dying(Driver):
            def release(self) -> None:
                super().release()
                seen.extend([rng.valid, self.mm_is_alive(), self.hmm.dead])

        driver = Dying(mm)
        rng = whole(driver, buf)
        rng.register()
        assert rng.valid
        mm.close()
        mm.close()
        assert driver.released == 1
        assert seen == [False, False, True]
        driver.unregister()
        rng.unregister()

    def test_no_release_after_unregister(self) -> None:
        mm = pm.AddressSpace()
        driver = Driver(mm)
        driver.unregister()
        mm.close()
        assert driver.released == 0

    def test_eagain_of_a_mirror_is_not_lost_when_not_blockable(self, mm: pm.AddressSpace) -> None:
        class Busy(Driver):
            def sync_cpu_device_pagetables(self, update: pm.MmuNotifierRange) -> int:
                return -errno.EAGAIN if not update.blockable else 0

        with Busy(mm):
            assert errno_of(invalidate, mm, 0, blockable=False) == errno.EAGAIN
            invalidate(mm, 0)
        assert not mm.errors

    def test_a_plain_mirror_will_do(self, mm: pm.AddressSpace) -> None:
        buf = mm.mmap(PAGE)
        with pm.Mirror(mm) as mirror, mirror.range(buf.addr, buf.addr + PAGE) as rng:
            assert rng.snapshot() == rng.seq


class TestRangeRegistration:
    @pytest.mark.parametrize(
        ("start", "end"),
        [
            (0x1001, 0x2000),
            (0x1000, 0x2001),
            (0x1000, 0x1000),
            (0x2000, 0x1000),
            (0, (1 << 47) + PAGE),
            (-PAGE, PAGE),
            (1 << 64, (1 << 64) + PAGE),
        ],
    )
    def test_bad_intervals_are_einval(self, driver: Driver, start: int, end: int) -> None:
        assert errno_of(driver.range, start, end) == errno.EINVAL

    def test_the_end_of_the_address_space_is_a_good_end(self, driver: Driver) -> None:
        with driver.range((1 << 47) - PAGE, 1 << 47) as rng:
            assert errno_of(rng.snapshot) == errno.EFAULT

    def test_register_and_unregister_are_idempotent(self, mm: pm.AddressSpace, driver: Driver) -> None:
        buf = mm.mmap(PAGE)
        rng = whole(driver, buf)
        subs = mm.stats()["subs"]
        rng.register()
        rng.register()
        assert mm.stats()["subs"] == subs + 1
        rng.unregister()
        rng.unregister()
        assert mm.stats()["subs"] == subs
        rng.register()
        assert rng.valid
        rng.unregister()

    def test_a_forgotten_range_leaves_the_tree_with_its_last_reference(
        self, mm: pm.AddressSpace, driver: Driver
    ) -> None:
        buf = mm.mmap(PAGE)
        rng = whole(driver, buf)
        rng.register()
        del rng
        gc.collect()
        assert mm.stats()["subs"] == 0

    def test_unregistered_is_einval_and_keeps_its_pfns(self, mm: pm.AddressSpace, driver: Driver) -> None:
        buf = mm.mmap(PAGE)
        rng = whole(driver, buf)
        for call in (rng.snapshot, rng.fault, rng.wait_until_valid):
            assert errno_of(call) == errno.EINVAL
        with rng:
            rng.fault()
        assert valid(rng.pfns) == [True]
        assert not rng.valid
        assert errno_of(rng.fault) == errno.EINVAL

    def test_registering_watches_the_memory(self, mm: pm.AddressSpace, driver: Driver) -> None:
        needs("uffd_events")
        buf = mm.mmap(4 * PAGE)
        with whole(driver, buf):
            assert mm.stats()["watched_bytes"] >= buf.size

    def test_a_failure_to_watch_registers_nothing(self, mm: pm.AddressSpace, driver: Driver) -> None:
        needs("uffd_events")
        buf = mm.mmap(4 * PAGE)
        rng = whole(driver, buf)
        with inject("USERFAULTFD", err=errno.EMFILE), inject("OPEN", err=errno.EMFILE):
            failed = errno_of(rng.register)
        if failed:
            assert not rng.registered
            assert mm.stats()["subs"] == 0
        else:
            rng.unregister()

    def test_pfns_take_values_and_stay_in_place(self, mm: pm.AddressSpace, driver: Driver) -> None:
        buf = mm.mmap(2 * PAGE)
        rng = whole(driver, buf, 0)
        array = rng.pfns
        rng.pfns = [FAULT, 0]
        assert rng.pfns is array
        with rng:
            rng.fault()
            assert valid(rng.pfns) == [True, False]
        with pytest.raises(ValueError, match="broadcast"):
            rng.pfns = [1, 2, 3]


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

    @pytest.mark.root
    def test_pfns_are_those_of_the_pagemap(self, mm: pm.AddressSpace, driver: Driver) -> None:
        buf = mm.mmap(8 * PAGE)
        as_bytes(buf)[:] = b"\1" * buf.size
        with open("/proc/self/pagemap", "rb") as pagemap, whole(driver, buf) as rng:
            rng.snapshot()
            pagemap.seek(buf.addr // PAGE * 8)
            raw = np.frombuffer(pagemap.read(8 * 8), np.uint64)
        assert pm.hmm_pfn_to_pfn(rng.pfns).tolist() == (raw & np.uint64((1 << 55) - 1)).tolist()
        assert set(pm.hmm_pfn_to_map_order(rng.pfns).tolist()) == {0}

    def test_a_huge_page_says_so(self, mm: pm.AddressSpace, driver: Driver) -> None:
        needs("pfn")
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


class TestRaces:
    @pytest.mark.parametrize(
        "point", ["WALK_BEFORE_READ", "WALK_AFTER_READ", "WALK_BEFORE_POPULATE", "WALK_AFTER_POPULATE"]
    )
    def test_an_invalidation_during_the_fault(self, mm: pm.AddressSpace, driver: Driver, point: str) -> None:
        """It is EBUSY, or the fault was done before: then the range is invalid and the table refuses it."""
        buf = mm.mmap(4 * PAGE)
        with whole(driver, buf, WRITE) as rng, points(point) as there:
            fault = Background(rng.fault)
            there.wait()
            mm.madvise(buf.addr, PAGE, mmap.MADV_DONTNEED)
            there.release()
            assert errno_of(fault.result) in (0, errno.EBUSY)
            assert not rng.valid
            assert not driver.device.page_table.map(rng, rng.seq)
            assert driver.device.page_table.stats()["entries"] == 0
            rng.wait_until_valid()
            seq = rng.fault()
            assert driver.device.page_table.map(rng, seq)

    def test_an_invalidation_between_the_check_and_the_programming(
        self, mm: pm.AddressSpace, driver: Driver
    ) -> None:
        buf = mm.mmap(PAGE)
        with whole(driver, buf) as rng, points("MAP_BEFORE_COMMIT", "INVALIDATE_FENCED") as (commit, fenced):
            seq = rng.fault()
            programming = Background(driver.device.page_table.map, rng, seq)
            commit.wait()
            zap = Background(mm.madvise, buf.addr, PAGE, mmap.MADV_DONTNEED)
            fenced.wait()
            commit.release()
            assert programming.result() is False
            fenced.release()
            zap.result()
            assert driver.device.page_table.stats()["entries"] == 0

    def test_fault_loop_against_a_thread_that_keeps_zapping(
        self, mm: pm.AddressSpace, driver: Driver
    ) -> None:
        buf = mm.mmap(16 * PAGE)
        stop = threading.Event()

        def zap() -> None:
            while not stop.is_set():
                mm.madvise(buf.addr, buf.size, mmap.MADV_DONTNEED)
                time.sleep(0.0002)

        zapper = Background(zap)
        mapped = 0
        deadline = time.monotonic() + WAIT_S
        try:
            with whole(driver, buf) as rng:
                while mapped < 50 and time.monotonic() < deadline:
                    rng.wait_until_valid()
                    try:
                        seq = rng.fault()
                    except pm.MirrorError as refused:
                        assert refused.errno in (errno.EBUSY, errno.EAGAIN)
                        continue
                    with driver.lock:
                        if rng.valid and driver.device.page_table.map(rng, seq):
                            mapped += 1
        finally:
            stop.set()
            zapper.result()
        assert mapped == 50
        assert not mm.errors

    def test_no_aba_of_the_valid_flag(self, mm: pm.AddressSpace, driver: Driver) -> None:
        """In 5.1 the end of an invalidation made every range valid again, with the old snapshot in it."""
        buf = mm.mmap(PAGE)
        with whole(driver, buf) as rng:
            rng.fault()
            invalidate(mm, buf.addr)
            assert not rng.valid
            invalidate(mm, buf.addr)
            assert not rng.valid
            assert rng.wait_until_valid()
            assert rng.valid

    def test_a_range_that_only_touches_stays_valid(self, mm: pm.AddressSpace, driver: Driver) -> None:
        """5.1 invalidated it too."""
        buf = mm.mmap(2 * PAGE)
        with driver.range(buf.addr, buf.addr + PAGE) as rng:
            mm.madvise(buf.addr + PAGE, PAGE, mmap.MADV_DONTNEED)
            assert rng.valid


class TestWaiting:
    def test_it_waits_for_the_end_of_the_invalidation(self, mm: pm.AddressSpace, driver: Driver) -> None:
        buf = mm.mmap(PAGE)
        with whole(driver, buf) as rng:
            with mm.invalidate(buf.addr, buf.addr + PAGE):
                waiter = Background(rng.wait_until_valid)
                assert waiter.stays()
                assert not rng.valid
            assert waiter.result() is True
            assert rng.valid

    def test_it_times_out(self, mm: pm.AddressSpace, driver: Driver) -> None:
        buf = mm.mmap(PAGE)
        with whole(driver, buf) as rng, mm.invalidate(buf.addr, buf.addr + PAGE):
            assert errno_of(rng.wait_until_valid, timeout=0.12) == errno.ETIMEDOUT
            assert errno_of(rng.wait_until_valid, timeout=0) == errno.ETIMEDOUT

    def test_registered_during_an_invalidation_it_is_invalid(
        self, mm: pm.AddressSpace, driver: Driver
    ) -> None:
        buf = mm.mmap(PAGE)
        with mm.invalidate(buf.addr, buf.addr + PAGE):
            rng = whole(driver, buf)
            rng.register()
            assert not rng.valid
            assert errno_of(rng.fault) == errno.EAGAIN
        assert rng.wait_until_valid()
        rng.fault()
        rng.unregister()

    def test_closing_wakes_it_with_false(self) -> None:
        mm = pm.AddressSpace()
        buf = mm.mmap(PAGE)
        inside, go = threading.Event(), threading.Event()

        class Slow(Driver):
            def release(self) -> None:
                inside.set()
                assert go.wait(WAIT_S)

        driver = Slow(mm)
        rng = whole(driver, buf)
        rng.register()
        held = Background(_hold_invalidation, mm, buf.addr, inside)
        waiter = Background(rng.wait_until_valid, timeout=None)
        closing = Background(mm.close)
        assert inside.wait(WAIT_S)
        assert waiter.result() is False
        go.set()
        closing.result()
        held.result()
        assert rng.wait_until_valid() is False


def _hold_invalidation(mm: pm.AddressSpace, addr: int, until: threading.Event) -> None:
    with mm.invalidate(addr, addr + PAGE):
        assert until.wait(WAIT_S)


class TestDetection:
    def test_a_change_no_event_tells_of_is_found_by_the_next_fault(
        self, mm: pm.AddressSpace, driver: Driver
    ) -> None:
        needs("pagemap")
        buf = mm.mmap(4 * PAGE, shared=True)
        as_bytes(buf)[:] = b"\1" * buf.size
        with whole(driver, buf) as rng:
            assert driver.device.page_table.map(rng, rng.fault())
            _change_unseen(buf, 1)
            assert rng.valid
            # Asked for, the page would come back, maybe as the very page that it was.
            rng.default_flags = rng.pfn_flags_mask = 0
            with pytest.raises(pm.MirrorError) as found:
                rng.fault()
            assert found.value.errno == errno.EBUSY
            (update,) = driver.updates
            assert update.guarantee == "detected"
            assert (update.start, update.end) == (buf.addr + PAGE, buf.addr + 2 * PAGE)
            assert not rng.valid
            rng.wait_until_valid()
            rng.default_flags = FAULT
            assert driver.device.page_table.map(rng, rng.fault())
            assert driver.device.read(mm, buf.addr, buf.size) == bytes(buf)

    def test_and_by_the_next_snapshot_and_the_modern_call(self, mm: pm.AddressSpace, driver: Driver) -> None:
        needs("pagemap")
        buf = mm.mmap(4 * PAGE, shared=True)
        as_bytes(buf)[:] = b"\1" * buf.size
        with whole(driver, buf) as rng:
            for look in (rng.snapshot, lambda: _modern(mm, buf)):
                rng.wait_until_valid()
                assert driver.device.page_table.map(rng, rng.fault())
                _change_unseen(buf, 0)
                assert errno_of(look) == errno.EBUSY
                assert driver.updates.pop().guarantee == "detected"


def _modern(mm: pm.AddressSpace, buf: pm.Region, flags: int = 0) -> PfnArray:
    sub = pm.IntervalNotifier(mm, buf.addr, buf.size, lambda sub, range, seq: sub.set_seq(seq))
    pfns = np.zeros(buf.size // PAGE, np.uint64)
    try:
        pm.hmm_range_fault(
            sub, buf.addr, buf.addr + buf.size, pfns, default_flags=flags, seq=sub.read_begin()
        )
    finally:
        sub.remove()
    return pfns


def _change_unseen(buf: pm.Region, page: int) -> None:
    """Take a page away from under shared memory, which userfaultfd has no event for."""
    libc = ctypes.CDLL(None, use_errno=True)
    offset, length = ctypes.c_long(page * PAGE), ctypes.c_long(PAGE)
    assert libc.fallocate(buf.fd, PUNCH_HOLE_KEEP_SIZE, offset, length) == 0


class TestModernFault:
    def test_without_requests_it_only_looks(self, mm: pm.AddressSpace) -> None:
        buf = mm.mmap(4 * PAGE)
        as_bytes(buf)[PAGE] = 1
        assert valid(_modern(mm, buf)) == [False, True, False, False]
        assert valid(_modern(mm, buf, WRITE)) == [True] * 4

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


class TestAfterTheEnd:
    def test_every_call_is_a_clean_efault(self) -> None:
        mm = pm.AddressSpace()
        buf = mm.mmap(PAGE)
        driver = Driver(mm)
        rng, other = whole(driver, buf), whole(driver, buf)
        rng.register()
        seq = rng.fault()
        driver.device.page_table.map(rng, seq)
        mm.close()
        assert not driver.mm_is_alive()
        assert driver.hmm.dead
        for call in (rng.fault, rng.snapshot, other.register, lambda: Driver(mm), lambda: pm.Hmm.get(mm)):
            assert errno_of(call) == errno.EFAULT
        assert not rng.valid
        assert rng.wait_until_valid() is False
        assert driver.device.page_table.map(rng, seq) is False
        assert valid(rng.pfns) == [True]
        rng.unregister()
        driver.unregister()

    def test_a_forked_child_gets_esrch(self, mm: pm.AddressSpace, driver: Driver) -> None:
        buf = mm.mmap(PAGE)
        with whole(driver, buf) as rng:
            seq = rng.fault()
            child = os.fork()
            if child == 0:
                good = (
                    not rng.valid
                    and errno_of(rng.fault) == errno.ESRCH
                    and errno_of(rng.snapshot) == errno.ESRCH
                    and errno_of(rng.wait_until_valid) == errno.ESRCH
                    and errno_of(lambda: Driver(mm)) == errno.ESRCH
                    and driver.device.page_table.map(rng, seq) is False
                    and errno_of(rng.unregister) == 0
                    and errno_of(driver.unregister) == 0
                )
                os._exit(0 if good else 1)
            assert os.waitpid(child, 0)[1] == 0

    def test_a_foreign_munmap_invalidates_the_range(self, mm: pm.AddressSpace, driver: Driver) -> None:
        needs("uffd_events")
        buf = mm.mmap(2 * PAGE)
        with whole(driver, buf) as rng:
            rng.fault()
            foreign.munmap(buf.addr + PAGE, PAGE)
            mm.sync()
            assert not rng.valid
            (update,) = driver.updates
            assert (update.event, update.guarantee) == (pm.Event.UNMAP, "after")
            assert (update.start, update.end) == (buf.addr + PAGE, buf.addr + 2 * PAGE)
