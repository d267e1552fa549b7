"""Too many events, the end while callbacks run, and Ctrl-C in every wait."""

from __future__ import annotations

import errno
import mmap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from mirroring import PAGE, Driver, FaultDriver, filled, whole
from notifying import SOMEWHERE, WHOLE, Recorder, interval, invalidate
from racing import ctrl_c, ctrl_c_in, eventually, replace
from seams import WAIT_S, Background, errno_of, foreign, needs, points

import pymirror as pm


class Held(pm.IntervalNotifier):
    """A notifier whose callback stays inside until it is let go, but not at the end of the mm."""

    def __init__(self, mm: pm.AddressSpace, start: int, length: int) -> None:
        self.inside, self.go = threading.Event(), threading.Event()
        self.seen: list[pm.MmuNotifierRange] = []
        super().__init__(mm, start, length)

    __slots__ = ("go", "inside", "seen")

    def invalidate(self, range: pm.MmuNotifierRange, cur_seq: int) -> bool:
        self.set_seq(cur_seq)
        self.seen.append(range)
        self.inside.set()
        return range.event is pm.Event.RELEASE or self.go.wait(WAIT_S)


@contextmanager
def held(mm: pm.AddressSpace, buf: pm.Region, by: Callable[[], object]) -> Iterator[Held]:
    """A callback over the buffer that ``by`` has brought about, and that does not return during the block."""
    sub = Held(mm, buf.addr, buf.size)
    cause = Background(by)
    assert sub.inside.wait(WAIT_S)
    try:
        yield sub
    finally:
        sub.go.set()
        cause.result()


class TestOverflow:
    LENGTH = 4

    @pytest.fixture
    def mm(self, nothing_left_behind: None) -> Iterator[pm.AddressSpace]:
        needs("uffd_events")
        with pm.AddressSpace(queue_length=self.LENGTH) as mm:
            yield mm

    def test_one_event_stands_for_all_and_the_driver_goes_on(self, mm: pm.AddressSpace) -> None:
        buf, elsewhere = filled(mm, 64), filled(mm, 4)
        far = interval(mm, SOMEWHERE, 4)
        with FaultDriver(mm) as driver, whole(Driver(mm), elsewhere) as rng:
            recorder = Recorder(mm)
            device, table = driver.device, driver.device.page_table
            driver.map(buf.addr, buf.addr + buf.size)
            driver.map(elsewhere.addr, elsewhere.addr + elsewhere.size)
            held_by = Held(mm, buf.addr, PAGE)
            begun = far.read_begin()
            seq = rng.snapshot()
            before = elsewhere_bytes = bytes(elsewhere)
            foreign.munmap(buf.addr, PAGE)
            assert held_by.inside.wait(WAIT_S)
            for page in range(1, 33):
                foreign.munmap(buf.addr + page * PAGE, PAGE)
            # Nobody has been called, and all of it is safe.
            assert mm.stats()["queue_overflows"] == 1
            assert mm.stats()["queue_depth"] == 1
            assert table.stats()["fenced"] == table.stats()["entries"] == 68
            assert far.read_retry(begun)
            assert not rng.valid
            assert not table.map(rng, seq)
            held_by.go.set()
            mm.sync()
            told = [entry[2:] for entry in recorder.log if entry[1] == "start"]
            assert told == [("UNMAP", buf.addr, buf.addr + PAGE), ("UNMAP", 0, WHOLE)]
            assert [range.overflow for range in held_by.seen] == [False, True]
            # Recovery: everything is faulted again, and events come one by one.
            assert table.stats()["entries"] == 0
            assert device.read(mm, elsewhere.addr, elsewhere.size) == before == elsewhere_bytes
            assert errno_of(device.read, mm, buf.addr + 5 * PAGE, 1) == errno.EFAULT
            assert rng.wait_until_valid()
            assert not far.read_retry(far.read_begin())
            recorder.log.clear()
            foreign.munmap(buf.addr + 40 * PAGE, PAGE)
            mm.sync()
            assert recorder.log[0] == ("whole", "start", "UNMAP", buf.addr + 40 * PAGE, buf.addr + 41 * PAGE)
            assert mm.stats()["queue_overflows"] == 1
            recorder.unregister()
            rng.mirror.unregister()
        assert device.stats.stale == 0
        assert not mm.errors

    def test_an_access_meanwhile_is_an_ordinary_fault(self, mm: pm.AddressSpace) -> None:
        """Its entry is fenced by an event that the queue has lost: that does not make the driver a liar."""
        buf = filled(mm, 32)
        with FaultDriver(mm) as driver:
            driver.map(buf.addr, buf.addr + buf.size)
            kept = bytes(buf)[:PAGE]
            sub = Held(mm, buf.addr + PAGE, PAGE)
            for page in range(1, 20):
                foreign.munmap(buf.addr + page * PAGE, PAGE)
            assert sub.inside.wait(WAIT_S)
            assert driver.device.read(mm, buf.addr, PAGE) == kept
            assert errno_of(driver.device.read, mm, buf.addr + 2 * PAGE, 1) == errno.EFAULT
            assert driver.device.stats.stale == 0
            sub.go.set()
            mm.sync()
            assert driver.device.read(mm, buf.addr, PAGE) == kept

    def test_again_and_again(self, mm: pm.AddressSpace) -> None:
        buf = filled(mm, 4)
        with FaultDriver(mm) as driver:
            for _ in range(5):
                driver.map(buf.addr, buf.addr + buf.size)
                with driver.lock:
                    for _ in range(20):
                        foreign.madvise(buf.addr, PAGE, mmap.MADV_DONTNEED)
                mm.sync()
                assert driver.device.read(mm, buf.addr, buf.size) == bytes(buf)
            assert mm.stats()["queue_overflows"] >= 1
            assert driver.device.stats.stale == 0

    def test_sync_waits_for_the_overflow(self, mm: pm.AddressSpace) -> None:
        buf = filled(mm, 32)
        sub = Held(mm, buf.addr, PAGE)
        mm.watch(buf.addr, buf.addr + buf.size)
        foreign.munmap(buf.addr, PAGE)
        assert sub.inside.wait(WAIT_S)
        early = Background(mm.sync)
        for page in range(1, 20):
            foreign.munmap(buf.addr + page * PAGE, PAGE)
        late = Background(mm.sync)
        assert early.stays()
        assert late.stays()
        sub.go.set()
        early.result()
        late.result()
        assert len(sub.seen) == 2


class TestTheEndWhileACallbackRuns:
    def test_close_waits_for_one_on_the_dispatcher(self) -> None:
        needs("uffd_events")
        mm = pm.AddressSpace()
        buf = filled(mm, 2)
        recorder = Recorder(mm)
        with held(mm, buf, lambda: foreign.madvise(buf.addr, PAGE, mmap.MADV_DONTNEED)) as sub:
            closing = Background(mm.close)
            assert closing.stays()
            assert errno_of(mm.mmap, PAGE) == errno.ESRCH
            sub.go.set()
            closing.result()
        assert mm.closed
        # As in the kernel, release() may overtake other callbacks; once, and before close() returns.
        assert recorder.log.count(("whole", "release")) == 1
        assert [range.event for range in sub.seen] == [pm.Event.CLEAR, pm.Event.RELEASE]
        assert not mm.errors

    def test_close_with_a_time_out(self) -> None:
        needs("uffd_events")
        mm = pm.AddressSpace()
        buf = filled(mm, 2)
        with held(mm, buf, lambda: foreign.madvise(buf.addr, PAGE, mmap.MADV_DONTNEED)) as sub:
            began = time.monotonic()
            with pytest.raises(
                pm.MirrorError, match=r"a callback still runs: invalidate of Held runs for"
            ) as late:
                mm.close(timeout=0.2)
            assert late.value.errno == errno.ETIMEDOUT
            assert 0.1 < time.monotonic() - began < 5
            # The native half is gone all the same: nothing waits for events any more.
            assert mm.closed
            Background(replace, buf.addr).result()
            assert errno_of(sub.read_begin) == errno.ESRCH
            mm.close()
        eventually(lambda: not any(one.name == "pymirror-dispatch" for one in threading.enumerate()))

    def test_close_waits_for_an_operation_in_its_callback(self, mm: pm.AddressSpace) -> None:
        buf = filled(mm, 2)
        with held(mm, buf, lambda: mm.munmap(buf.addr, PAGE)) as sub:
            assert errno_of(mm.close, timeout=0.05) == errno.ETIMEDOUT
            assert not mm.closed
            closing = Background(mm.close)
            assert closing.stays()
            sub.go.set()
            closing.result()
        assert mm.closed
        assert buf.left == [(buf.addr + PAGE, buf.addr + 2 * PAGE)]

    def test_a_fault_under_way_ends_with_the_mm(self) -> None:
        mm = pm.AddressSpace()
        buf = mm.mmap(4 * PAGE)
        driver = FaultDriver(mm)
        with points("WALK_AFTER_POPULATE") as there:
            read = Background(driver.device.read, mm, buf.addr, buf.size)
            there.wait()
            closing = Background(mm.close)
            assert closing.stays()
            there.release()
            closing.result()
        assert errno_of(read.result) in (errno.EFAULT, errno.ESRCH)
        assert driver.device.page_table.stats()["entries"] == 0

    @pytest.mark.parametrize("point", ["ACCESS_LOOKED_UP", "ACCESS_COPIED"])
    @pytest.mark.parametrize("write", [False, True])
    def test_a_device_access_under_way_too(self, point: str, write: bool) -> None:
        mm = pm.AddressSpace()
        buf = filled(mm, 2)
        driver = FaultDriver(mm)
        driver.map(buf.addr, buf.addr + buf.size, pm.HMM_PFN_REQ_FAULT | pm.HMM_PFN_REQ_WRITE)
        with points(point) as there:
            access: Background[Any] = (
                Background(driver.device.write, mm, buf.addr, b"x" * PAGE)
                if write
                else Background(driver.device.read, mm, buf.addr, PAGE)
            )
            there.wait()
            closing = Background(mm.close)
            assert closing.stays()
            there.release()
            closing.result()
        # A write that was announced is made, a read that was overtaken finds the mm gone.
        assert errno_of(access.result) == (0 if write else errno.ESRCH)
        if write:
            assert bytes(buf)[:PAGE] == b"x" * PAGE


class TestCtrlC:
    """The wait ends at once, by KeyboardInterrupt, and everything can be used as before."""

    def still_works(self, mm: pm.AddressSpace) -> None:
        assert mm.stats()["active"] == 0
        assert mm.notifiers.stats()["callbacks_running"] == 0
        with FaultDriver(mm) as driver:
            buf = filled(mm, 4)
            assert driver.device.read(mm, buf.addr, buf.size) == bytes(buf)
            mm.munmap(buf.addr, PAGE)
            assert errno_of(driver.device.read, mm, buf.addr, 1) == errno.EFAULT
        mm.sync()

    @pytest.mark.parametrize("timeout", [None, 30.0])
    def test_in_wait_until_valid(self, mm: pm.AddressSpace, timeout: float | None) -> None:
        buf = filled(mm, 4)
        with Driver(mm) as driver, whole(driver, buf) as rng:
            with mm.invalidate(buf.addr, buf.addr + PAGE):
                with ctrl_c_in("wait_read_begin"):
                    rng.wait_until_valid(timeout)
                assert not rng.valid
            assert rng.wait_until_valid()
            assert driver.device.page_table.map(rng, rng.fault())
        self.still_works(mm)

    def test_in_read_begin(self, mm: pm.AddressSpace) -> None:
        sub = interval(mm, SOMEWHERE)
        with mm.invalidate(SOMEWHERE, SOMEWHERE + PAGE), ctrl_c_in("wait_read_begin"):
            sub.read_begin()
        assert not sub.read_retry(sub.read_begin())
        self.still_works(mm)

    def test_in_sync(self, mm: pm.AddressSpace) -> None:
        needs("uffd_events")
        buf = filled(mm, 2)
        with held(mm, buf, lambda: foreign.munmap(buf.addr, PAGE)) as sub:
            with ctrl_c_in("sync"):
                mm.sync()
            assert errno_of(mm.sync, timeout=0.01) == errno.ETIMEDOUT
            sub.go.set()
            mm.sync()
        self.still_works(mm)

    def test_in_close_that_waits_for_a_reader(self, mm: pm.AddressSpace) -> None:
        entered, leave = threading.Event(), threading.Event()

        def read() -> None:
            with mm.read_lock():
                entered.set()
                assert leave.wait(WAIT_S)

        reader = Background(read)
        assert entered.wait(WAIT_S)
        with ctrl_c_in("wait"):
            mm.close()
        assert not mm.closed
        # Its wait has not been left standing in the way of other readers.
        with mm.read_lock(timeout=1):
            pass
        leave.set()
        reader.result()
        self.still_works(mm)
        mm.close()

    def test_in_close_that_waits_for_a_callback(self) -> None:
        needs("uffd_events")
        mm = pm.AddressSpace()
        buf = filled(mm, 2)
        with held(mm, buf, lambda: foreign.munmap(buf.addr, PAGE)):
            with ctrl_c_in("_wait_for_tstate_lock"):
                mm.close()
            # It was past all else by then.
            assert mm.closed
            Background(replace, buf.addr + PAGE).result()
        mm.close()

    @pytest.mark.parametrize("kind", ["interval", "whole"])
    def test_in_remove_that_waits_for_a_callback(self, mm: pm.AddressSpace, kind: str) -> None:
        inside, go = threading.Event(), threading.Event()
        seen: list[int] = []

        def take(*_: Any) -> bool:
            if isinstance(_[0], pm.IntervalNotifier):
                _[0].set_seq(_[2])
            seen.append(1)
            inside.set()
            assert go.wait(WAIT_S)
            return True

        class Whole(pm.MmuNotifier):
            def invalidate_range_start(self, range: pm.MmuNotifierRange) -> None:
                take(self)

        sub = interval(mm, SOMEWHERE, 1, take) if kind == "interval" else None
        notifier = None if sub else Whole(mm)
        remove = sub.remove if sub else notifier.unregister  # type: ignore[union-attr]
        operation = Background(invalidate, mm, SOMEWHERE)
        assert inside.wait(WAIT_S)
        with ctrl_c_in("wait"):
            remove()
        assert not operation.done
        go.set()
        operation.result()
        remove()
        invalidate(mm, SOMEWHERE)
        assert seen == [1]
        assert mm.stats()["subs"] == 0
        self.still_works(mm)

    def test_in_an_operation_that_waits_for_another(self, mm: pm.AddressSpace) -> None:
        buf, other = filled(mm, 2), filled(mm, 2)
        with held(mm, buf, lambda: mm.munmap(buf.addr, PAGE)) as sub:
            with ctrl_c_in("wait"):
                mm.munmap(other.addr, PAGE)
            assert not other.closed
            assert other.left == [(other.addr, other.addr + 2 * PAGE)]
            sub.go.set()
        mm.munmap(other.addr, 2 * PAGE)
        self.still_works(mm)

    def test_in_a_device_access_whose_fault_is_not_served(self, mm: pm.AddressSpace) -> None:
        buf = filled(mm, 2)
        device = pm.Device("lazy", fault_timeout=30)
        faults = threading.Semaphore(0)
        device.set_fault_handler(lambda fault: faults.release())
        with ctrl_c(lambda main: [faults.acquire() for _ in range(100)]):
            device.read(mm, buf.addr, 1)
        assert mm.stats()["inflight"] == 0
        self.still_works(mm)

    def test_in_a_fault_that_is_stuck(self, mm: pm.AddressSpace) -> None:
        """Native code is not cut short; the call's result is lost, and nothing else."""
        buf = mm.mmap(4 * PAGE)
        with Driver(mm) as driver, whole(driver, buf) as rng:
            with points("WALK_BEFORE_POPULATE") as there, ctrl_c(lambda main: there.wait(), there.release):
                rng.fault()
                rng.fault()
            rng.wait_until_valid()
            assert driver.device.page_table.map(rng, rng.fault())
        self.still_works(mm)
