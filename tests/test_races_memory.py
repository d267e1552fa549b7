"""Device accesses against holes, moves and new memory; unmapping from two threads."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from mirroring import PAGE, WRITE, FaultDriver, as_bytes, filled
from notifying import Recorder
from racing import MADV_REMOVE, MAP_FIXED_NOREPLACE, eventually
from seams import Background, errno_of, foreign, needs, points

import pymirror as pm


@pytest.fixture(autouse=True)
def events() -> None:
    needs("uffd_events", "pagemap")


@pytest.fixture
def driver(mm: pm.AddressSpace) -> Iterator[FaultDriver]:
    with FaultDriver(mm) as driver:
        yield driver


def mirrored(mm: pm.AddressSpace, driver: FaultDriver, **how: Any) -> pm.Region:
    buf = filled(mm, 4, **how)
    driver.map(buf.addr, buf.addr + buf.size, WRITE)
    return buf


def punch(buf: pm.Region, page: int) -> None:
    foreign.punch_hole(buf.fd, page * PAGE, PAGE)


class TestHolePunch:
    @pytest.mark.parametrize("point", ["ACCESS_LOOKED_UP", "ACCESS_COPIED"])
    def test_a_read_during_madv_remove_is_done_again(
        self, mm: pm.AddressSpace, driver: FaultDriver, point: str
    ) -> None:
        buf = mirrored(mm, driver, shared=True)
        before = bytes(buf)
        with points(point) as there:
            read = Background(driver.device.read, mm, buf.addr, buf.size)
            there.wait()
            foreign.madvise(buf.addr + PAGE, PAGE, MADV_REMOVE)
            there.release()
            assert read.result() == before[:PAGE] + bytes(PAGE) + before[2 * PAGE :]
        assert driver.device.stats.redone >= 1
        assert os.pread(buf.fd, PAGE, PAGE) == bytes(PAGE)

    def test_a_read_before_a_fallocate_finds_it_out(self, mm: pm.AddressSpace, driver: FaultDriver) -> None:
        buf = mirrored(mm, driver, shared=True)
        before = bytes(buf)
        recorder = Recorder(mm)
        with points("ACCESS_LOOKED_UP") as there:
            read = Background(driver.device.read, mm, buf.addr, buf.size)
            there.wait()
            punch(buf, 1)
            there.release()
            assert read.result() == before[:PAGE] + bytes(PAGE) + before[2 * PAGE :]
        assert driver.device.stats.detected == 1
        recorder.unregister()
        assert ("whole", "start", "CLEAR", buf.addr + PAGE, buf.addr + 2 * PAGE) in recorder.log

    def test_a_read_that_a_fallocate_came_after_is_of_before(
        self, mm: pm.AddressSpace, driver: FaultDriver
    ) -> None:
        buf = mirrored(mm, driver, shared=True)
        before = bytes(buf)
        with points("ACCESS_COPIED") as there:
            read = Background(driver.device.read, mm, buf.addr, buf.size)
            there.wait()
            punch(buf, 1)
            there.release()
            assert read.result() == before
        assert driver.device.read(mm, buf.addr + PAGE, PAGE) == bytes(PAGE)
        assert driver.device.stats.detected == 1

    def test_a_write_is_before_madv_remove(self, mm: pm.AddressSpace, driver: FaultDriver) -> None:
        buf = mirrored(mm, driver, shared=True)
        with points("ACCESS_LOOKED_UP") as there:
            write = Background(driver.device.write, mm, buf.addr + PAGE, b"x" * PAGE)
            there.wait()
            hole = Background(foreign.madvise, buf.addr + PAGE, PAGE, MADV_REMOVE)
            eventually(lambda: "drains device writes" in mm.dump())
            there.release()
            write.result()
            hole.result()
        if not mm.stats()["drain_timeouts"]:
            assert os.pread(buf.fd, PAGE, PAGE) == bytes(PAGE)

    def test_a_write_that_a_fallocate_came_before_is_in_the_new_page(
        self, mm: pm.AddressSpace, driver: FaultDriver
    ) -> None:
        buf = mirrored(mm, driver, shared=True)
        with points("ACCESS_LOOKED_UP") as there:
            write = Background(driver.device.write, mm, buf.addr + PAGE, b"x" * 100)
            there.wait()
            punch(buf, 1)
            there.release()
            write.result()
        assert os.pread(buf.fd, PAGE, PAGE) == b"x" * 100 + bytes(PAGE - 100)
        assert driver.device.stats.detected == 1

    def test_a_hole_made_through_another_mapping(self, mm: pm.AddressSpace, driver: FaultDriver) -> None:
        """The kernel tells of it where it was asked for only."""
        buf = mirrored(mm, driver, shared=True)
        other = foreign.mmap(0, buf.size, flags=mmap.MAP_SHARED, fd=buf.fd)
        foreign.madvise(other + PAGE, PAGE, MADV_REMOVE)
        assert driver.device.read(mm, buf.addr + PAGE, PAGE) == bytes(PAGE)
        assert driver.device.stats.detected == 1
        foreign.munmap(other, buf.size)


class TestMoves:
    @pytest.mark.parametrize("point", ["ACCESS_LOOKED_UP", "ACCESS_COPIED"])
    def test_a_read_during_dontunmap(self, mm: pm.AddressSpace, driver: FaultDriver, point: str) -> None:
        buf = mirrored(mm, driver)
        before = bytes(buf)
        with points(point) as there:
            read = Background(driver.device.read, mm, buf.addr, buf.size)
            there.wait()
            place = foreign.mremap(buf.addr, buf.size, buf.size, flags=5)
            there.release()
            assert read.result() == bytes(buf.size)
        assert ctypes.string_at(place, buf.size) == before
        foreign.munmap(place, buf.size)

    def test_both_places_are_watched_after_dontunmap(self, mm: pm.AddressSpace, driver: FaultDriver) -> None:
        buf = mirrored(mm, driver)
        place = foreign.mremap(buf.addr, buf.size, buf.size, flags=5)
        mm.sync()
        assert mm.stats()["watched_bytes"] == 2 * buf.size
        for addr in (buf.addr, place):
            driver.map(addr, addr + PAGE)
            foreign.munmap(addr, PAGE)
            stats = driver.device.page_table.stats()
            assert stats["fenced"] == stats["entries"]
            mm.sync()
            assert driver.device.page_table.stats()["entries"] == 0
        foreign.munmap(place + PAGE, buf.size - PAGE)

    @pytest.mark.parametrize("write", [False, True])
    def test_new_memory_where_another_thread_unmapped(
        self, mm: pm.AddressSpace, driver: FaultDriver, write: bool
    ) -> None:
        """The access held is of the new memory, or refused; none after it is of the old."""
        buf = mirrored(mm, driver)
        addr, size = buf.addr, buf.size
        with points("ACCESS_LOOKED_UP") as there:
            access = (
                Background(driver.device.write, mm, addr, b"x" * PAGE)
                if write
                else Background(driver.device.read, mm, addr, PAGE)
            )
            there.wait()
            remap = Background(self._exchange, addr, size)
            if write:
                eventually(lambda: "drains device writes" in mm.dump())
            else:
                remap.result()
            there.release()
            refusal = errno_of(access.result)
            assert refusal in (0, errno.EFAULT)
            assert refusal or access.result() in (None, b"n" * PAGE)
            remap.result()
        assert driver.device.read(mm, addr + PAGE, PAGE) == b"n" * PAGE
        assert ctypes.string_at(addr + PAGE, size - PAGE) == b"n" * (size - PAGE)
        assert driver.device.read(mm, addr, PAGE) == ctypes.string_at(addr, PAGE)
        assert driver.device.stats.stale == 0
        # It is not the Region's to unmap.
        mm.sync()
        del buf
        mm.close()
        assert ctypes.string_at(addr + PAGE, size - PAGE) == b"n" * (size - PAGE)
        foreign.munmap(addr, size)

    def _exchange(self, addr: int, size: int) -> None:
        foreign.munmap(addr, size)
        foreign.mmap(addr, size, flags=MAP_FIXED_NOREPLACE)
        ctypes.memset(addr, ord("n"), size)


class TestUnmappingFromTwoThreads:
    @pytest.mark.parametrize(
        ("first", "second"), [((0, 4), (0, 4)), ((0, 3), (1, 4)), ((0, 4), (1, 2)), ((1, 2), (0, 4))]
    )
    def test_the_same_and_overlapping_intervals(
        self, mm: pm.AddressSpace, driver: FaultDriver, first: tuple[int, int], second: tuple[int, int]
    ) -> None:
        buf = mirrored(mm, driver)
        addr, table = buf.addr, driver.device.page_table
        recorder = Recorder(mm)
        with points("INVALIDATE_FENCED") as fenced:
            one = Background(mm.munmap, addr + first[0] * PAGE, (first[1] - first[0]) * PAGE)
            fenced.wait()
            two = Background(mm.munmap, addr + second[0] * PAGE, (second[1] - second[0]) * PAGE)
            assert two.stays()
            fenced.release()
            one.result()
            two.result()
        recorder.unregister()
        left = set(range(4)) - set(range(*first)) - set(range(*second))
        assert {
            (start - addr) // PAGE for start, end in buf.left for start in range(start, end, PAGE)
        } == left
        assert table.stats()["entries"] == len(left)
        told = [entry[3:] for entry in recorder.log if entry[1] == "start"]
        intervals = [(addr + start * PAGE, addr + end * PAGE) for start, end in (first, second)]
        inside = set(range(*second)) <= set(range(*first))
        assert told == intervals[: 1 if inside else 2]
        assert [entry[1] for entry in recorder.log] == ["start", "end"] * len(told)
        for page in range(4):
            found = errno_of(driver.device.read, mm, addr + page * PAGE, 1)
            assert found == (0 if page in left else errno.EFAULT)
        assert not mm.errors

    def test_an_operation_and_a_foreign_munmap(self, mm: pm.AddressSpace, driver: FaultDriver) -> None:
        """The other's munmap is before that of the operation, and inside its invalidation: told once."""
        buf = mirrored(mm, driver)
        recorder = Recorder(mm)
        with points("INVALIDATE_FENCED") as fenced:
            operation = Background(mm.munmap, buf.addr, buf.size)
            fenced.wait()
            foreign.munmap(buf.addr + PAGE, PAGE)
            fenced.release()
            operation.result()
        mm.sync()
        recorder.unregister()
        assert [entry[1] for entry in recorder.log] == ["start", "end"]
        assert buf.closed
        assert driver.device.page_table.stats()["entries"] == 0

    def test_a_foreign_munmap_inside_an_operation_that_unmaps_nothing(
        self, mm: pm.AddressSpace, driver: FaultDriver
    ) -> None:
        """It is told, and the Region loses the memory: it must not unmap what comes there next."""
        buf = mirrored(mm, driver)
        addr = buf.addr
        with points("INVALIDATE_FENCED") as fenced:
            operation = Background(mm.mprotect, addr, 4 * PAGE, mmap.PROT_READ)
            fenced.wait()
            foreign.munmap(addr, 4 * PAGE)
            fenced.release()
            assert errno_of(operation.result) == errno.ENOMEM
        mm.sync()
        assert mm.stats()["events"]["UNMAP"] == 1
        assert buf.closed


def test_a_driver_against_a_thread_that_moves_its_memory(mm: pm.AddressSpace, driver: FaultDriver) -> None:
    """Not an order of points but all of them: a page that is away reads as zeroes, not as another's bytes."""
    buf = filled(mm, 8)
    view = np.frombuffer(as_bytes(buf), np.uint8).reshape(8, PAGE)
    view[:] = np.arange(1, 9, dtype=np.uint8)[:, None]
    room = foreign.mmap(0, PAGE)

    stop = threading.Event()
    moves = 0

    def move() -> None:
        nonlocal moves
        while not stop.wait(0.0003):
            addr = buf.addr + moves % 8 * PAGE
            foreign.mremap(addr, PAGE, PAGE, flags=7, new_addr=room)
            foreign.mremap(room, PAGE, PAGE, flags=7, new_addr=addr)
            moves += 1

    mover = Background(move)
    try:
        while moves < 100:
            pages = np.frombuffer(driver.device.read(mm, buf.addr, buf.size), np.uint8).reshape(8, PAGE)
            assert (pages == pages[:, :1]).all()
            for page in range(8):
                assert pages[page, 0] in (0, page + 1)
    finally:
        stop.set()
        mover.result()
    mm.sync()
    assert driver.device.read(mm, buf.addr, buf.size) == bytes(buf)
    assert view[:, 0].tolist() == list(range(1, 9))
    foreign.munmap(room, PAGE)
    assert not mm.errors
