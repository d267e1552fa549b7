"""The window after the message of a REMOVE: nothing is programmed in its interval until it is over."""

from __future__ import annotations

import ctypes
import errno
import mmap
import time

import pytest
from mirroring import PAGE, Driver, filled, whole
from racing import NativeFork
from seams import WAIT_S, Background, errno_of, foreign, needs, points

import pymirror as pm


@pytest.fixture(autouse=True)
def events() -> None:
    needs("uffd_events", "pagemap")


class TestWindowOfARemove:
    """Its system call goes on when the message is read, and for a while the pages may be there or gone."""

    @pytest.mark.parametrize("point", ["MONITOR_BEFORE_READ", "MONITOR_AFTER_READ", "MONITOR_AFTER_FENCE"])
    def test_nothing_is_programmed_while_the_monitor_has_the_lock(
        self, mm: pm.AddressSpace, point: str
    ) -> None:
        buf = filled(mm, 4)
        with Driver(mm) as driver, whole(driver, buf) as rng, points(point) as there:
            seq = rng.fault()
            zap = Background(foreign.madvise, buf.addr, PAGE, mmap.MADV_DONTNEED)
            there.wait()
            programming = Background(driver.device.page_table.map, rng, seq)
            assert programming.stays()
            there.release()
            zap.result()
            assert programming.result() is False
            assert not rng.valid
            mm.sync()
            rng.wait_until_valid()
            assert driver.device.page_table.map(rng, rng.fault())
            assert driver.device.read(mm, buf.addr, buf.size) == bytes(buf)

    @pytest.mark.parametrize("point", ["MONITOR_AFTER_READ", "MONITOR_AFTER_FENCE"])
    def test_a_range_is_not_called_valid_meanwhile(self, mm: pm.AddressSpace, point: str) -> None:
        buf = filled(mm, 4)
        with Driver(mm) as driver, whole(driver, buf) as rng, points(point) as there:
            zap = Background(foreign.madvise, buf.addr, PAGE, mmap.MADV_DONTNEED)
            there.wait()
            zap.result()
            look = Background(lambda: rng.valid)
            assert look.stays()
            there.release()
            assert look.result() is False

    def test_its_interval_is_invalid_until_it_is_over(self, mm: pm.AddressSpace) -> None:
        buf, elsewhere = filled(mm, 4), filled(mm, 4)
        with Driver(mm) as driver, whole(driver, buf) as rng, whole(driver, elsewhere) as other:
            table = driver.device.page_table
            seq = rng.fault()
            with points("REMOVE_LINGER") as over:
                foreign.madvise(buf.addr, PAGE, mmap.MADV_DONTNEED)
                over.wait()
                assert not rng.valid
                assert errno_of(rng.wait_until_valid, timeout=0.01) == errno.ETIMEDOUT
                assert errno_of(rng.fault) == errno.EAGAIN
                assert errno_of(rng.snapshot) == errno.EAGAIN
                assert not table.map(rng, seq)
                assert not table.map(rng, rng.seq)
                assert table.stats()["entries"] == 0
                # Who registers now is no better off.
                with whole(driver, buf) as late:
                    assert not late.valid
                # Memory beside it is.
                assert other.wait_until_valid()
                assert table.map(other, other.fault())
                over.release()
            assert rng.wait_until_valid()
            assert table.map(rng, rng.fault())

    def test_many_at_once_are_all_waited_for(self, mm: pm.AddressSpace) -> None:
        """More than the monitor keeps one by one."""
        buf = filled(mm, 400)
        with Driver(mm) as driver, whole(driver, buf) as rng:
            with points("REMOVE_LINGER") as over:
                foreign.madvise(buf.addr, PAGE, mmap.MADV_DONTNEED)
                over.wait()
                zaps = [
                    Background(foreign.madvise, buf.addr + page * PAGE, PAGE, mmap.MADV_DONTNEED)
                    for page in range(2, 300, 2)
                ]
                assert zaps[-1].stays()
                over.release()
                for zap in zaps:
                    zap.result()
            # The callbacks of all these would clear what is programmed before they run.
            mm.sync()
            assert rng.wait_until_valid(timeout=WAIT_S)
            assert driver.device.page_table.map(rng, rng.fault())
            assert driver.device.read(mm, buf.addr, buf.size) == bytes(buf)
        assert mm.stats()["active"] == 0

    def test_one_of_terabytes_holds_nobody_up(self, mm: pm.AddressSpace) -> None:
        """To look at a billion pages takes seconds."""
        size, noreserve = 1 << 43, 0x4022
        huge = foreign.mmap(0, size, flags=noreserve)
        ctypes.memset(huge + size - PAGE, 1, PAGE)
        buf = filled(mm, 1)
        for start, end in ((huge, huge + size), (buf.addr, buf.addr + PAGE)):
            mm.watch(start, end)
        foreign.madvise(huge, size, mmap.MADV_DONTNEED)
        for _ in range(30):
            began = time.monotonic()
            foreign.madvise(buf.addr, PAGE, mmap.MADV_DONTNEED)
            assert time.monotonic() - began < 1
            time.sleep(0.001)
        foreign.munmap(huge, size)

    def test_another_threads_zap_inside_an_operation_lingers_too(self, mm: pm.AddressSpace) -> None:
        """The operation may be over before the other's pages have gone."""
        buf = filled(mm, 4)
        with (
            Driver(mm) as driver,
            whole(driver, buf) as rng,
            points("INVALIDATE_END", "REMOVE_LINGER") as (end, over),
        ):
            operation = Background(mm.madvise, buf.addr, buf.size, mmap.MADV_DONTNEED)
            end.wait()
            foreign.madvise(buf.addr + PAGE, PAGE, mmap.MADV_DONTNEED)
            end.release()
            operation.result()
            over.wait()
            assert errno_of(rng.wait_until_valid, timeout=0.01) == errno.ETIMEDOUT
            over.release()
            assert rng.wait_until_valid()

    def test_and_inside_one_that_zaps_nothing(self, mm: pm.AddressSpace) -> None:
        buf = filled(mm, 4)
        with (
            Driver(mm) as driver,
            whole(driver, buf) as rng,
            points("INVALIDATE_FENCED", "REMOVE_LINGER") as (fenced, over),
        ):
            operation = Background(mm.mprotect, buf.addr, buf.size, mmap.PROT_READ)
            fenced.wait()
            foreign.madvise(buf.addr, PAGE, mmap.MADV_DONTNEED)
            fenced.release()
            operation.result()
            over.wait()
            assert errno_of(rng.wait_until_valid, timeout=0.01) == errno.ETIMEDOUT
            over.release()
            assert rng.wait_until_valid()

    def test_and_inside_a_fork(self, mm: pm.AddressSpace) -> None:
        buf = filled(mm, 4)
        with (
            Driver(mm) as driver,
            whole(driver, buf) as rng,
            points("FORK_PREPARE", "REMOVE_LINGER") as (begun, over),
        ):
            fork = NativeFork()
            begun.wait()
            foreign.madvise(buf.addr, PAGE, mmap.MADV_DONTNEED)
            over.wait()
            over.release()
            begun.release()
            assert fork.result() == 0
            assert rng.wait_until_valid()
