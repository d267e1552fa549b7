"""An invalidation, by an operation or behind our back, at each step of a fault, a map, a device access."""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Iterator

import pytest
from mirroring import PAGE, WRITE, Driver, FaultDriver, filled, whole
from racing import API, CHANGES, FOREIGN, GONE, changes, eventually
from seams import Background, errno_of, foreign, needs, points

import pymirror as pm
from pymirror.page_table import PM_ENTRY_VALID

WALK_POINTS = ["WALK_BEFORE_READ", "WALK_AFTER_READ", "WALK_BEFORE_POPULATE", "WALK_AFTER_POPULATE"]
ACCESS_POINTS = ["ACCESS_LOOKED_UP", "ACCESS_COPIED"]


@pytest.fixture(autouse=True)
def events() -> None:
    needs("uffd_events", "pagemap")


@pytest.fixture
def driver(mm: pm.AddressSpace) -> Iterator[Driver]:
    with Driver(mm) as driver:
        yield driver


@pytest.fixture
def faulting(mm: pm.AddressSpace) -> Iterator[FaultDriver]:
    with FaultDriver(mm) as driver:
        yield driver


def usable(table: pm.PageTable, start: int, pages: int = 1) -> int:
    """Entries that the device could use."""
    return int(((table.entries(start, start + pages * PAGE) & PM_ENTRY_VALID) != 0).sum())


class TestFault:
    @pytest.mark.parametrize("point", WALK_POINTS)
    @changes(CHANGES)
    def test_its_result_is_refused(
        self, mm: pm.AddressSpace, driver: Driver, point: str, change: str
    ) -> None:
        """EBUSY, or it was done before the change: then the range is invalid and the table refuses it."""
        buf = mm.mmap(4 * PAGE)
        with whole(driver, buf, WRITE) as rng, points(point) as there:
            seq = rng.seq
            fault = Background(rng.fault)
            there.wait()
            CHANGES[change](mm, buf.addr + PAGE)
            there.release()
            assert errno_of(fault.result) in (0, errno.EBUSY)
            assert not rng.valid
            assert not driver.device.page_table.map(rng, seq)
            assert driver.device.page_table.stats()["entries"] == 0
            self._goes_on(driver, rng, change)

    def _goes_on(self, driver: Driver, rng: pm.Range, change: str) -> None:
        # The callback would clear what is programmed before it runs.
        rng.mm.sync()
        assert rng.wait_until_valid()
        if change in GONE:
            with pytest.raises(pm.MirrorError) as failed:
                rng.fault()
            assert (failed.value.errno, failed.value.addr) == (errno.EFAULT, rng.start + PAGE)
            return
        assert driver.device.page_table.map(rng, rng.fault())
        assert usable(driver.device.page_table, rng.start, 4) == 4


class TestMap:
    @changes(FOREIGN)
    def test_a_foreign_change_before_the_commit(
        self, mm: pm.AddressSpace, driver: Driver, change: str
    ) -> None:
        buf = mm.mmap(4 * PAGE)
        with whole(driver, buf, WRITE) as rng, points("MAP_BEFORE_COMMIT") as commit:
            seq = rng.fault()
            programming = Background(driver.device.page_table.map, rng, seq)
            commit.wait()
            CHANGES[change](mm, buf.addr)
            commit.release()
            assert programming.result() is False
            assert driver.device.page_table.stats()["entries"] == 0

    @changes(API)
    def test_an_operation_before_the_commit(self, mm: pm.AddressSpace, driver: Driver, change: str) -> None:
        buf = mm.mmap(4 * PAGE)
        with whole(driver, buf) as rng, points("MAP_BEFORE_COMMIT", "INVALIDATE_FENCED") as (commit, fenced):
            programming = Background(driver.device.page_table.map, rng, rng.fault())
            commit.wait()
            operation = Background(CHANGES[change], mm, buf.addr)
            fenced.wait()
            commit.release()
            assert programming.result() is False
            fenced.release()
            operation.result()
            assert driver.device.page_table.stats()["entries"] == 0

    @changes(FOREIGN)
    def test_a_foreign_change_after_it_fences_before_it_returns(
        self, mm: pm.AddressSpace, driver: Driver, change: str
    ) -> None:
        """With the driver's lock held no callback can have helped."""
        buf = mm.mmap(4 * PAGE)
        table = driver.device.page_table
        with whole(driver, buf) as rng, points("MAP_AFTER_COMMIT") as committed:
            programming = Background(table.map, rng, rng.fault())
            committed.wait()
            with driver.lock:
                CHANGES[change](mm, buf.addr + PAGE)
                assert usable(table, buf.addr, 4) == 3
                assert usable(table, buf.addr + PAGE) == 0
                assert not rng.valid
                committed.release()
                # It was done before the change.
                assert programming.result() is True
            mm.sync()
        stats = table.stats()
        assert (stats["entries"], stats["fenced"]) == (3, 0)

    @changes(API)
    def test_an_operation_after_it(self, mm: pm.AddressSpace, driver: Driver, change: str) -> None:
        buf = mm.mmap(4 * PAGE)
        table = driver.device.page_table
        with whole(driver, buf) as rng, points("MAP_AFTER_COMMIT") as committed:
            programming = Background(table.map, rng, rng.fault())
            committed.wait()
            CHANGES[change](mm, buf.addr + PAGE)
            committed.release()
            assert programming.result() is True
            assert (usable(table, buf.addr, 4), table.stats()["entries"]) == (3, 3)
            assert not table.map(rng, rng.seq)


class TestDeviceRead:
    @pytest.mark.parametrize("point", ACCESS_POINTS)
    @changes(CHANGES)
    def test_it_is_done_again_and_gives_nothing_stale(
        self, mm: pm.AddressSpace, faulting: FaultDriver, point: str, change: str
    ) -> None:
        buf = filled(mm, 4)
        before, addr = bytes(buf), buf.addr
        device = faulting.device
        faulting.map(addr, addr + buf.size, WRITE)
        with points(point) as there:
            read = Background(device.read, mm, addr, 2 * PAGE)
            there.wait()
            CHANGES[change](mm, addr + PAGE)
            there.release()
            if change in GONE:
                assert errno_of(read.result) == errno.EFAULT
            else:
                assert read.result() == before[:PAGE] + bytes(PAGE)
        assert device.stats.redone >= 1
        assert device.stats.stale == 0
        assert device.read(mm, addr + 2 * PAGE, 2 * PAGE) == before[2 * PAGE :]
        assert mm.stats()["inflight"] == 0

    @pytest.mark.parametrize("point", ACCESS_POINTS)
    def test_a_change_elsewhere_does_not_disturb_it(
        self, mm: pm.AddressSpace, faulting: FaultDriver, point: str
    ) -> None:
        buf = filled(mm, 4)
        faulting.map(buf.addr, buf.addr + buf.size)
        with points(point) as there:
            read = Background(faulting.device.read, mm, buf.addr, PAGE)
            there.wait()
            CHANGES["foreign-dontneed"](mm, buf.addr + PAGE)
            CHANGES["api-dontneed"](mm, buf.addr + 2 * PAGE)
            there.release()
            assert read.result() == bytes(memoryview(buf)[:PAGE])
        assert faulting.device.stats.redone == 0


class TestDeviceWrite:
    """What is written is in the memory of before the change, and does not turn up in what is there after."""

    @pytest.mark.parametrize("point", ACCESS_POINTS)
    @changes(API)
    def test_an_operation_waits_for_it(
        self, mm: pm.AddressSpace, faulting: FaultDriver, point: str, change: str
    ) -> None:
        buf = filled(mm, 2)
        faulting.map(buf.addr, buf.addr + buf.size, WRITE)
        with points(point) as there:
            write = Background(faulting.device.write, mm, buf.addr + PAGE, b"x" * PAGE)
            there.wait()
            operation = Background(CHANGES[change], mm, buf.addr + PAGE)
            assert operation.stays()
            there.release()
            write.result()
            moved = operation.result()
        assert mm.stats()["drain_timeouts"] == 0
        if isinstance(moved, pm.Region):
            assert bytes(moved) == b"x" * PAGE
        if change not in GONE:
            assert faulting.device.read(mm, buf.addr + PAGE, PAGE) == bytes(PAGE)
        assert faulting.device.stats.stale == 0

    @pytest.mark.parametrize("point", ACCESS_POINTS)
    def test_a_foreign_zap_waits_for_it(self, mm: pm.AddressSpace, faulting: FaultDriver, point: str) -> None:
        buf = filled(mm, 2)
        faulting.map(buf.addr, buf.addr + buf.size, WRITE)
        with points(point) as there:
            write = Background(faulting.device.write, mm, buf.addr + PAGE, b"x" * PAGE)
            there.wait()
            zap = Background(CHANGES["foreign-dontneed"], mm, buf.addr + PAGE)
            eventually(lambda: "drains device writes" in mm.dump())
            assert not zap.done
            there.release()
            write.result()
            zap.result()
        # A machine so slow that the monitor waited its 100 ms has seen another order.
        if not mm.stats()["drain_timeouts"]:
            assert bytes(buf)[PAGE:] == bytes(PAGE)

    @pytest.mark.parametrize("change", ["foreign-fixed", "foreign-dontunmap"])
    def test_one_that_was_copied_is_in_the_memory_of_before(
        self, mm: pm.AddressSpace, faulting: FaultDriver, change: str
    ) -> None:
        buf = filled(mm, 4)
        before, addr = bytes(buf), buf.addr
        faulting.map(addr, addr + buf.size, WRITE)
        with points("ACCESS_COPIED") as copied:
            write = Background(faulting.device.write, mm, addr + PAGE, b"x" * PAGE)
            copied.wait()
            made = Background(CHANGES[change], mm, addr + PAGE)
            eventually(lambda: "drains device writes" in mm.dump())
            copied.release()
            write.result()
            place = made.result()
        assert bytes(buf) == before[:PAGE] + bytes(PAGE) + before[2 * PAGE :]
        if isinstance(place, int):
            assert ctypes.string_at(place, PAGE) == b"x" * PAGE
            foreign.munmap(place, PAGE)

    def test_one_that_was_not_finds_the_hole(self, mm: pm.AddressSpace, faulting: FaultDriver) -> None:
        buf = filled(mm, 4)
        before, addr = bytes(buf), buf.addr
        faulting.map(addr, addr + buf.size, WRITE)
        with points("ACCESS_LOOKED_UP") as there:
            write = Background(faulting.device.write, mm, addr + PAGE, b"x" * PAGE)
            there.wait()
            made = Background(foreign.munmap, addr + PAGE, PAGE)
            eventually(lambda: "drains device writes" in mm.dump())
            there.release()
            assert errno_of(write.result) == errno.EFAULT
            made.result()
        assert ctypes.string_at(addr, PAGE) == before[:PAGE]
        assert ctypes.string_at(addr + 2 * PAGE, 2 * PAGE) == before[2 * PAGE :]
        assert faulting.device.stats.stale == 0
