"""Ranges against invalidations: races at named points, and changes that no event tells of."""

from __future__ import annotations

import ctypes
import errno
import mmap
import threading
import time
from collections.abc import Iterator

import pytest
from mirroring import FAULT, PAGE, WRITE, Driver, as_bytes, modern_fault, whole
from notifying import invalidate
from seams import WAIT_S, Background, errno_of, needs, points

import pymirror as pm

PUNCH_HOLE_KEEP_SIZE = 3


@pytest.fixture
def driver(mm: pm.AddressSpace) -> Iterator[Driver]:
    with Driver(mm) as driver:
        yield driver


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
                        if refused.errno not in (errno.EBUSY, errno.EAGAIN):
                            raise
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


def _change_unseen(buf: pm.Region, page: int) -> None:
    """Take a page away from under shared memory, which userfaultfd has no event for."""
    libc = ctypes.CDLL(None, use_errno=True)
    offset, length = ctypes.c_long(page * PAGE), ctypes.c_long(PAGE)
    assert libc.fallocate(buf.fd, PUNCH_HOLE_KEEP_SIZE, offset, length) == 0


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
            for look in (rng.snapshot, lambda: modern_fault(mm, buf)):
                rng.wait_until_valid()
                assert driver.device.page_table.map(rng, rng.fault())
                _change_unseen(buf, 0)
                assert errno_of(look) == errno.EBUSY
                assert driver.updates.pop().guarantee == "detected"
