"""Forks of every kind against the monitor, the device and close(): nothing hangs, no side loses a byte."""

from __future__ import annotations

import ctypes
import errno
import gc
import mmap
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from mirroring import PAGE, WRITE, FaultDriver, as_bytes, filled
from racing import (
    LIBC,
    NativeFork,
    in_child,
    peek,
    poke,
    raw_clone,
    sleeping_clone,
    wait_for,
    waiting_child,
    watched,
)
from seams import Background, errno_of, foreign, needs, points

import pymirror as pm

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")

HOLDING = ["MONITOR_BEFORE_READ", "MONITOR_AFTER_READ", "MONITOR_BEFORE_FENCE", "MONITOR_AFTER_FENCE"]


@pytest.fixture(autouse=True)
def events() -> None:
    needs("event_fork", "pagemap")


@pytest.fixture
def driver(mm: pm.AddressSpace) -> Iterator[FaultDriver]:
    with FaultDriver(mm) as driver:
        yield driver


class TestWhileTheMonitorHoldsTheDeviceLock:
    # Not before the monitor has the lock: fork() is past its start then and holds malloc's locks: this
    # thread could not go on to release the point.
    @pytest.mark.parametrize("point", HOLDING)
    def test_fork_of_libc_waits_for_it(self, mm: pm.AddressSpace, driver: FaultDriver, point: str) -> None:
        buf = filled(mm, 4)
        driver.map(buf.addr, buf.addr + buf.size, WRITE)
        with points(point) as there:
            zap = Background(foreign.madvise, buf.addr, PAGE, mmap.MADV_DONTNEED)
            there.wait()
            fork = NativeFork()
            assert fork.stays()
            there.release()
            assert fork.result() == 0
            zap.result()
        mm.sync()
        assert driver.device.page_table.stats()["entries"] == 0
        assert driver.device.read(mm, buf.addr, buf.size) == bytes(buf)

    @pytest.mark.parametrize("point", ["MONITOR_POLLED", *HOLDING])
    def test_a_raw_clone_waits_for_it(self, mm: pm.AddressSpace, driver: FaultDriver, point: str) -> None:
        buf = filled(mm, 4)
        driver.map(buf.addr, buf.addr + buf.size, WRITE)
        with points(point) as there:
            clone = Background(raw_clone)
            there.wait()
            there.release()
            assert wait_for(clone.result()) == 0
            # Fenced when it returned, whatever callbacks have run.
            stats = driver.device.page_table.stats()
            assert stats["fenced"] == stats["entries"]
        mm.sync()
        assert driver.device.page_table.stats()["entries"] == 0
        assert driver.device.read(mm, buf.addr, buf.size) == bytes(buf)

    @pytest.mark.parametrize("point", HOLDING)
    def test_a_program_is_started_meanwhile(self, mm: pm.AddressSpace, point: str) -> None:
        """subprocess makes a child that shares the memory until it has become the program: no event."""
        buf = watched(mm)
        with points(point) as there:
            zap = Background(foreign.madvise, buf.addr, PAGE, mmap.MADV_DONTNEED)
            there.wait()
            assert subprocess.run(["/bin/true"], check=False, timeout=20).returncode == 0
            there.release()
            zap.result()


class TestBothSides:
    def test_each_has_its_memory_and_the_device_writes_the_parents(
        self, mm: pm.AddressSpace, driver: FaultDriver
    ) -> None:
        buf = filled(mm, 4)
        before = bytes(buf)
        driver.device.write(mm, buf.addr, b"before")
        at_fork = b"before" + before[6:]

        def child() -> None:
            assert ctypes.string_at(buf.addr, buf.size) == at_fork
            assert errno_of(driver.device.write, mm, buf.addr, b"child") == errno.ESRCH
            ctypes.memmove(buf.addr, b"child!", 6)

        with waiting_child(child) as go:
            driver.device.write(mm, buf.addr, b"parent")
            as_bytes(buf)[PAGE : PAGE + 3] = b"cpu"
            go()
        assert bytes(buf) == b"parent" + before[6:PAGE] + b"cpu" + before[PAGE + 3 :]
        assert driver.device.read(mm, buf.addr, buf.size) == bytes(buf)

    def test_of_a_raw_clone_too(self, mm: pm.AddressSpace, driver: FaultDriver) -> None:
        buf = filled(mm, 4)
        before = bytes(buf)
        driver.map(buf.addr, buf.addr + buf.size, WRITE)
        with sleeping_clone() as child:
            driver.device.write(mm, buf.addr, b"parent")
            poke(child, buf.addr + PAGE, b"child")
            assert peek(child, buf.addr, buf.size) == before[:PAGE] + b"child" + before[PAGE + 5 :]
            assert bytes(buf) == b"parent" + before[6:]
            assert driver.device.read(mm, buf.addr, buf.size) == bytes(buf)
        assert driver.device.stats.stale == 0

    def test_shared_memory_is_one(self, mm: pm.AddressSpace, driver: FaultDriver) -> None:
        buf = filled(mm, 2, shared=True)
        driver.map(buf.addr, buf.addr + buf.size, WRITE)
        with sleeping_clone() as child:
            driver.device.write(mm, buf.addr, b"parent")
            assert peek(child, buf.addr, 6) == b"parent"
            poke(child, buf.addr, b"child!")
            assert driver.device.read(mm, buf.addr, 6) == b"child!"

    def test_a_program_with_a_function_before_it(self, mm: pm.AddressSpace, driver: FaultDriver) -> None:
        """preexec_fn makes subprocess fork in earnest."""
        buf = filled(mm, 4)
        driver.map(buf.addr, buf.addr + buf.size, WRITE)
        program = [sys.executable, "-c", "import os; print(sorted(os.listdir('/proc/self/fd')))"]
        plain, forked = (
            subprocess.run(
                program, capture_output=True, check=True, timeout=20, preexec_fn=before, close_fds=False
            )
            for before in (None, lambda: None)
        )
        assert forked.stdout == plain.stdout
        mm.sync()
        assert driver.device.page_table.stats()["entries"] == 0
        assert driver.device.read(mm, buf.addr, buf.size) == bytes(buf)

    def test_a_child_of_a_child(self, mm: pm.AddressSpace) -> None:
        buf = watched(mm)
        before = bytes(buf)

        def grandchild(own: pm.AddressSpace) -> None:
            assert errno_of(own.mmap, PAGE) == errno_of(mm.mmap, PAGE) == errno.ESRCH
            assert ctypes.string_at(buf.addr, buf.size) == before

        def child() -> None:
            with pm.AddressSpace() as own, FaultDriver(own) as driver:
                mine = filled(own, 2)
                assert driver.device.read(own, mine.addr, mine.size) == bytes(mine)
                assert in_child(lambda: grandchild(own)) == 0
                foreign.munmap(mine.addr + PAGE, PAGE)
                own.sync()
                assert driver.device.read(own, mine.addr, PAGE) == ctypes.string_at(mine.addr, PAGE)

        assert in_child(child) == 0
        assert bytes(buf) == before

    def test_a_device_of_before_the_fork_is_no_use_in_the_child(
        self, mm: pm.AddressSpace, driver: FaultDriver
    ) -> None:
        """Refused, and not a map that fails for ever."""
        buf = filled(mm, 1)
        driver.device.read(mm, buf.addr, 1)

        def child() -> None:
            with pm.AddressSpace() as own, FaultDriver(own) as again:
                again.device = driver.device
                driver.device.set_fault_handler(again.handle)
                mine = filled(own, 1)
                assert errno_of(driver.device.read, own, mine.addr, 1) == errno.ESRCH

        assert in_child(child) == 0


class TestAmongThreads:
    def test_forks_in_threads_that_keep_malloc_busy(self, mm: pm.AddressSpace, driver: FaultDriver) -> None:
        """fork() holds malloc's locks while the monitor answers it: were that to need one, all would hang."""
        buf = filled(mm, 16)
        stop = threading.Event()

        def allocate() -> None:
            while not stop.is_set():
                for size in (24, 1000, 70_000, 300_000):
                    LIBC.free(ctypes.c_void_p(LIBC.malloc(size)))
                gc.collect(0)

        def change() -> None:
            page = 0
            while not stop.is_set():
                page = (page + 1) % 8
                foreign.madvise(buf.addr + page * PAGE, PAGE, mmap.MADV_DONTNEED)

        def access() -> None:
            while not stop.is_set():
                driver.device.write(mm, buf.addr + 8 * PAGE, b"device" * 100)
                driver.device.read(mm, buf.addr, buf.size)

        def fork() -> None:
            for _ in range(15):
                assert in_child(lambda: None) == 0

        LIBC.malloc.restype = ctypes.c_void_p
        busy = [Background(work) for work in (allocate, allocate, change, access)]
        try:
            forks = [Background(fork) for _ in range(2)]
            for _ in range(10):
                assert wait_for(raw_clone()) == 0
            for one in forks:
                one.result(40)
        finally:
            stop.set()
            for one in busy:
                one.result()
        assert driver.device.read(mm, buf.addr, buf.size) == bytes(buf)
        assert not mm.errors
        assert mm.stats()["active"] == 0


class TestWithoutDescriptors:
    """The message of a fork brings a descriptor: without room for it the fork would never end."""

    @contextmanager
    def _limit(self, soft: int) -> Iterator[None]:
        old = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, old[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, old)

    @contextmanager
    def _all_used(self) -> Iterator[None]:
        used: list[int] = []
        with self._limit(256):
            try:
                while not errno_of(lambda: used.append(os.dup(0))):
                    pass
                yield
            finally:
                for fd in used:
                    os.close(fd)

    def _forks(self, mm: pm.AddressSpace) -> None:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)
        for _ in range(3):
            clone = Background(raw_clone)
            pid = clone.result()
            assert wait_for(pid) == 0
            fork = NativeFork()
            assert fork.result() == 0
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == limit

    @pytest.mark.parametrize("how", ["all used", "limit below all"])
    def test_a_fork_ends(self, mm: pm.AddressSpace, driver: FaultDriver, how: str) -> None:
        buf = filled(mm, 4)
        driver.map(buf.addr, buf.addr + buf.size)
        seen: list[int] = []
        with self._all_used() if how == "all used" else self._limit(3):
            self._forks(mm)
            seen.append(mm.stats()["events"]["PROTECTION_PAGE"])
        assert seen == [6]
        mm.sync()
        assert driver.device.page_table.stats()["entries"] == 0
        assert driver.device.read(mm, buf.addr, buf.size) == bytes(buf)
        # The spare one is there again.
        with self._all_used():
            self._forks(mm)

    def test_and_an_open_that_fails_is_clean(self) -> None:
        before = os.listdir("/proc/self/fd")
        with self._all_used():
            found: Callable[[], object] = pm.AddressSpace
            assert errno_of(found) == errno.EMFILE
        assert os.listdir("/proc/self/fd") == before
        with pm.AddressSpace() as mm:
            assert mm.features.have
