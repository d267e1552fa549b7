"""close() with forked children alive, and forks in the middle of close(): nothing is held, nothing hangs."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading

import pytest
from mirroring import PAGE
from racing import (
    NativeFork,
    eventually,
    peek,
    poke,
    raw_clone,
    replace,
    sleeping_clone,
    wait_for,
    waiting_child,
    watched,
)
from seams import Background, errno_of, foreign, needs, points

import pymirror as pm

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")


@pytest.fixture(autouse=True)
def events() -> None:
    needs("event_fork", "pagemap")


class TestCloseWithAChildAlive:
    def _touch(self, buf: pm.Region, expected: bytes) -> None:
        """Each thing that would wait for a reader of events, were the memory still registered."""
        assert ctypes.string_at(buf.addr, buf.size) == expected
        Background(ctypes.memset, buf.addr, 7, PAGE).result()
        for call in (
            lambda: foreign.madvise(buf.addr + PAGE, PAGE, mmap.MADV_DONTNEED),
            lambda: replace(buf.addr + 2 * PAGE),
            lambda: wait_for(raw_clone()),
        ):
            Background(call).result()
        assert ctypes.string_at(buf.addr, 2 * PAGE) == b"\7" * PAGE + bytes(PAGE)

    def test_of_os_fork(self) -> None:
        mm = pm.AddressSpace()
        buf = watched(mm)
        before = bytes(buf)

        def child() -> None:
            assert ctypes.string_at(buf.addr, buf.size) == before
            ctypes.memset(buf.addr, 9, buf.size)
            foreign.madvise(buf.addr, PAGE, mmap.MADV_DONTNEED)
            mm.close()
            foreign.munmap(buf.addr, buf.size)

        with waiting_child(child) as go:
            mm.close()
            self._touch(buf, before)
            go()

    def test_of_a_raw_clone_which_keeps_descriptors(self) -> None:
        mm = pm.AddressSpace()
        buf = watched(mm)
        before = bytes(buf)
        with sleeping_clone() as child:
            held = [os.readlink(f"/proc/{child}/fd/{fd}") for fd in os.listdir(f"/proc/{child}/fd")]
            assert any("userfaultfd" in name for name in held)
            mm.close()
            self._touch(buf, before)
            assert peek(child, buf.addr, buf.size) == before
            poke(child, buf.addr, b"child")
            assert peek(child, buf.addr, PAGE) == b"child" + before[5:PAGE]

    def test_whatever_the_watched_memory_has_become(self) -> None:
        """Moved, left behind by a move, split into more pieces than are counted one by one."""
        mm = pm.AddressSpace()
        moved, left, split = watched(mm), watched(mm), watched(mm, 600)
        place = foreign.mremap(
            moved.addr, moved.size, moved.size, flags=3, new_addr=foreign.mmap(0, moved.size)
        )
        copy = foreign.mremap(left.addr, left.size, left.size, flags=5)
        for page in range(1, 600, 2):
            foreign.munmap(split.addr + page * PAGE, PAGE)
        with sleeping_clone():
            mm.close()
            for addr in (
                place,
                copy,
                left.addr,
                split.addr,
                split.addr + 300 * PAGE,
                split.addr + 598 * PAGE,
            ):
                Background(foreign.madvise, addr, PAGE, mmap.MADV_DONTNEED).result()
                Background(replace, addr).result()
            assert wait_for(Background(raw_clone).result()) == 0
        for addr in (place, copy):
            foreign.munmap(addr, 4 * PAGE)

    def test_while_threads_change_memory(self) -> None:
        """A madvise that began while there was a reader must find one, though a child keeps descriptors."""
        for _ in range(20):
            mm = pm.AddressSpace()
            buf = watched(mm, 64)
            stop = threading.Event()
            changes = [Background(change_on, buf.addr + first * 16 * PAGE, stop) for first in range(4)]
            with sleeping_clone():
                mm.close()
                stop.set()
                for one in changes:
                    one.result()


def change_on(addr: int, stop: threading.Event) -> None:
    while not stop.is_set():
        foreign.madvise(addr, 16 * PAGE, mmap.MADV_DONTNEED)


class TestAForkInTheMiddleOfClose:
    def test_its_child_keeps_nothing(self) -> None:
        mm = pm.AddressSpace()
        buf = watched(mm)
        with points("MONITOR_POLLED") as polled:
            zap = Background(foreign.madvise, buf.addr, PAGE, mmap.MADV_DONTNEED)
            polled.wait()
            closing = Background(mm.close)
            eventually(lambda: errno_of(mm.mmap, PAGE) == errno.ESRCH)
            assert closing.stays()
            with waiting_child(no_descriptor_of_a_mirror) as go:
                go()
            polled.release()
            zap.result()
            closing.result()

    @pytest.mark.parametrize("point", ["FORK_PREPARE", "FORK_PARENT"])
    def test_close_waits_for_it(self, point: str) -> None:
        mm = pm.AddressSpace()
        buf = watched(mm)
        before = bytes(buf)
        with points(point) as there:
            fork = NativeFork()
            there.wait()
            closing = Background(mm.close)
            assert closing.stays()
            there.release()
            assert fork.result() == 0
            closing.result()
        assert bytes(buf) == before


def no_descriptor_of_a_mirror() -> None:
    for fd in os.listdir("/proc/self/fd"):
        try:
            name = os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:
            continue
        assert "userfaultfd" not in name, name
        assert "pymirror" not in name, name
        assert "pagemap" not in name, name
