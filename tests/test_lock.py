"""The driver's lock, the mmap lock, their order, and what a hang looks like from inside."""

from __future__ import annotations

import errno
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from seams import Background, errno_of, foreign, needs

import pymirror as pm
from pymirror.event import WHOLE_MM_END
from pymirror.lock import MmapLock, in_callback

PAGE = 4096


@contextmanager
def held_elsewhere(lock: Callable[[], object]) -> Iterator[None]:
    """Another thread holds what the context manager takes."""
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with lock():  # type: ignore[attr-defined]
            entered.set()
            leave.wait(10)

    holder = Background(hold)
    assert entered.wait(10)
    try:
        yield
    finally:
        leave.set()
        holder.result()


@contextmanager
def ctrl_c_after(seconds: float) -> Iterator[None]:
    """The main thread gets SIGINT while it waits."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    main, go = threading.get_ident(), threading.Event()

    def interrupt() -> None:
        go.wait(10)
        time.sleep(seconds)
        signal.pthread_kill(main, signal.SIGINT)

    interrupter = Background(interrupt)
    try:
        go.set()
        yield
    except KeyboardInterrupt:
        pass
    else:
        pytest.fail("Ctrl-C did not end the wait")
    finally:
        interrupter.result()
        signal.signal(signal.SIGINT, previous)


def test_a_driver_lock_knows_its_holder() -> None:
    lock = pm.DriverLock("d0")
    assert not lock.held
    with lock:
        assert lock.held
        assert Background(lambda: lock.held).result() is False
        assert Background(lock.acquire, timeout=0.01).result() is False
        assert Background(errno_of, lock.release).result() == errno.EPERM
    assert not lock.held


def test_a_driver_lock_taken_twice_is_edeadlk() -> None:
    lock = pm.DriverLock("d0")
    with lock, pytest.raises(pm.MirrorError, match="EDEADLK: acquire: this thread holds 'd0' already"):
        lock.acquire()
    assert not lock.held


@pytest.mark.parametrize(
    "call",
    [
        lambda mm, addr: mm.mmap(PAGE),
        lambda mm, addr: mm.munmap(addr, PAGE),
        lambda mm, addr: mm.mprotect(addr, PAGE, 1),
        lambda mm, addr: mm.madvise(addr, PAGE, 4),
        lambda mm, addr: mm.mremap(addr, PAGE, PAGE),
        lambda mm, addr: mm.close(),
    ],
    ids=["mmap", "munmap", "mprotect", "madvise", "mremap", "close"],
)
def test_operations_would_deadlock_under_the_locks(
    mm: pm.AddressSpace, call: Callable[[pm.AddressSpace, int], object]
) -> None:
    region = mm.mmap(PAGE)
    region[0] = 7
    with mm.read_lock():
        assert errno_of(call, mm, region.addr) == errno.EDEADLK
    with pm.DriverLock():
        assert errno_of(call, mm, region.addr) == errno.EDEADLK
    found: list[int] = []

    class Meddler(pm.MmuNotifier):
        def invalidate_range_start(self, range: pm.MmuNotifierRange) -> None:
            found.append(errno_of(call, mm, region.addr))

    meddler = Meddler(mm)
    with mm.invalidate(region.addr, region.addr + PAGE):
        pass
    meddler.unregister()
    assert found == [errno.EDEADLK]
    assert region[0] == 7


def test_calls_that_wait_for_callbacks_are_refused_under_a_driver_lock(mm: pm.AddressSpace) -> None:
    with pm.DriverLock():
        assert errno_of(mm.sync) == errno.EDEADLK
        assert errno_of(lambda: mm.read_lock().__enter__()) == errno.EDEADLK
        assert errno_of(lambda: mm.invalidate(0, PAGE).__enter__()) == errno.EDEADLK


def test_readers_share_and_may_nest(mm: pm.AddressSpace) -> None:
    with held_elsewhere(mm.read_lock), mm.read_lock(), mm.read_lock(timeout=0):
        pass
    mm.mmap(PAGE)


def test_an_operation_waits_for_readers(mm: pm.AddressSpace) -> None:
    region = mm.mmap(PAGE)
    with held_elsewhere(mm.read_lock):
        changing = Background(mm.munmap, region.addr, PAGE)
        assert changing.stays()
        # A waiting writer keeps new readers out.
        assert errno_of(lambda: mm.read_lock(timeout=0.02).__enter__()) == errno.ETIMEDOUT
        assert mm.vma_lookup(region.addr) is not None
    changing.result()
    with mm.read_lock():
        assert mm.vma_lookup(region.addr) is None


def test_a_writer_that_gives_up_lets_readers_in() -> None:
    lock = MmapLock()
    with held_elsewhere(lambda: lock.read("reader")):
        assert errno_of(lambda: lock.write("writer", timeout=0.02).__enter__()) == errno.ETIMEDOUT
        with lock.read("second reader", timeout=1):
            pass


def test_a_killed_lock_wakes_who_waits() -> None:
    lock = MmapLock()
    with held_elsewhere(lambda: lock.read("reader")):
        waiting = Background(errno_of, lambda: lock.write("writer").__enter__())
        assert waiting.stays()
        lock.kill()
        assert waiting.result() == errno.ESRCH
    assert errno_of(lambda: lock.read("late").__enter__()) == errno.ESRCH


def test_ctrl_c_ends_the_wait_for_a_driver_lock() -> None:
    lock = pm.DriverLock()
    with held_elsewhere(lambda: lock), ctrl_c_after(0.05):
        lock.acquire()
    with lock:
        pass


def test_ctrl_c_ends_the_wait_for_the_mmap_lock(mm: pm.AddressSpace) -> None:
    region = mm.mmap(PAGE)
    with held_elsewhere(mm.read_lock), ctrl_c_after(0.05):
        mm.munmap(region.addr, PAGE)
    assert not region.closed
    mm.munmap(region.addr, PAGE)


def test_ctrl_c_in_a_callback_ends_the_operation_before_its_change(mm: pm.AddressSpace) -> None:
    region = mm.mmap(PAGE)
    region[0] = 7

    class Slow(pm.MmuNotifier):
        def invalidate_range_start(self, range: pm.MmuNotifierRange) -> None:
            time.sleep(10)

    slow = Slow(mm)
    with ctrl_c_after(0.05):
        mm.munmap(region.addr, PAGE)
    assert region[0] == 7
    assert mm.stats()["active"] == 0
    slow.unregister()
    mm.munmap(region.addr, PAGE)


def test_ctrl_c_ends_sync(mm: pm.AddressSpace) -> None:
    needs("uffd_events")
    region = mm.mmap(PAGE)
    go = threading.Event()

    class Slow(pm.MmuNotifier):
        def invalidate_range_start(self, range: pm.MmuNotifierRange) -> None:
            go.wait(10)

    slow = Slow(mm)
    mm.watch(region.addr, region.addr + PAGE)
    np.frombuffer(region, np.uint8)[:] = 1
    foreign.munmap(region.addr, PAGE)
    with ctrl_c_after(0.1):
        mm.sync()
    assert errno_of(mm.sync, timeout=0.05) == errno.ETIMEDOUT
    go.set()
    mm.sync()
    slow.unregister()


def test_sync_takes_events_that_no_notifier_waits_for(mm: pm.AddressSpace) -> None:
    needs("uffd_events")
    region = mm.mmap(PAGE)
    mm.watch(region.addr, region.addr + PAGE)
    foreign.munmap(region.addr, PAGE)
    mm.sync(timeout=5)
    assert mm.stats()["queue_depth"] == 0
    assert mm.stats()["events"]["UNMAP"] == 1


def test_dump_tells_what_waits_for_what(mm: pm.AddressSpace) -> None:
    region = mm.mmap(PAGE)
    go, inside = threading.Event(), threading.Event()
    lock = pm.DriverLock("lock of d0")

    def slow_callback(sub: pm.IntervalNotifier, range: pm.MmuNotifierRange, seq: int) -> None:
        sub.set_seq(seq)
        with lock:
            inside.set()
            go.wait(10)

    sub = pm.IntervalNotifier(mm, 0, WHOLE_MM_END, slow_callback)
    changing = Background(mm.munmap, region.addr, PAGE)
    assert inside.wait(10)
    text = mm.dump()
    go.set()
    changing.result()
    sub.remove()
    assert f"running: UNMAP {region.addr:#x}-{region.addr + PAGE:#x} (before)" in text
    assert "1 invalidation(s) running" in text
    assert "callback: invalidate of IntervalNotifier runs for" in text
    assert "mmap lock: held (write)" in text
    assert "driver lock 'lock of d0': held for" in text
    assert "in slow_callback" in text or "in wait" in text
    quiet = mm.dump()
    assert "mmap lock and driver locks: free" in quiet
    assert "0 invalidation(s) running" in quiet


@pytest.mark.slow
def test_ctrl_c_at_any_moment_leaves_nothing_held(mm: pm.AddressSpace) -> None:
    region = mm.mmap(4 * PAGE)
    lock = pm.DriverLock()

    def invalidate(sub: pm.IntervalNotifier, range: pm.MmuNotifierRange, seq: int) -> None:
        with lock:
            sub.set_seq(seq)

    sub = pm.IntervalNotifier(mm, 0, WHOLE_MM_END, invalidate)
    for i in range(300):
        with ctrl_c_after(i % 97 * 1e-5):
            while True:
                mm.madvise(region.addr, PAGE, 4)
                with mm.read_lock(), lock:
                    pass
        assert not lock.held
        assert mm._mmap_lock.holders() == []
        assert in_callback() is None
        assert mm.stats()["active"] == 0
    assert not sub.read_retry(sub.read_begin())
