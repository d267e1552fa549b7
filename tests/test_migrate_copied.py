"""Memory that UFFDIO_MOVE does not take, and that goes to device memory all the same: by a copy."""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from contextlib import suppress

import numpy as np
import pytest
from migrating import PAGES, intact, pattern, patterned, to_device
from mirroring import PAGE, every_delivery
from racing import run_child, wait_for
from seams import errno_of, inject, needs

import pymirror as pm

pytestmark = [pytest.mark.root, pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")]

MADV_DONTFORK, MADV_DOFORK = 10, 11


mm = every_delivery


def mlock(buf: pm.Region) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mlock(ctypes.c_void_p(buf.addr), ctypes.c_size_t(buf.size)) == 0


def locked_kib() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmLck:"))


class TestMemoryThatDoesNotMove:
    """What UFFDIO_MOVE refuses is taken out by mremap, and copied."""

    def test_read_only(self, mm: pm.AddressSpace, vram: pm.DeviceMemory) -> None:
        buf = patterned(mm)
        mm.mprotect(buf.addr, buf.size, 1)
        assert to_device(buf, vram) == PAGES
        assert vram.used == PAGES * PAGE
        assert bytes(buf[5 * PAGE : 6 * PAGE]) == pattern(PAGES)[5 * PAGE : 6 * PAGE].tobytes()
        assert vram.used == (PAGES - 1) * PAGE
        assert pm.migrate_to_system(mm, buf.addr, buf.addr + buf.size) == PAGES - 1
        assert intact(buf)

    def test_populate_keeps_what_is_there(self, mm: pm.AddressSpace, vram: pm.DeviceMemory) -> None:
        buf = patterned(mm)
        to_device(buf, vram)
        # Pages that a child has too do not show as this process's own.
        arena = ctypes.c_void_p((vram.pfns.start & ((1 << 50) - 1)) * PAGE)
        madvise = ctypes.CDLL(None, use_errno=True).madvise
        assert madvise(arena, ctypes.c_size_t(16 * pm.MiB), MADV_DOFORK) == 0
        go = os.pipe()
        if (pid := os.fork()) == 0:
            run_child(lambda: os.read(go[0], 1))
        vram.populate(buf.addr, buf.addr + buf.size)
        os.write(go[1], b"x")
        assert wait_for(pid) == 0
        assert madvise(arena, ctypes.c_size_t(16 * pm.MiB), MADV_DONTFORK) == 0
        assert intact(buf)
        for fd in go:
            os.close(fd)

    def test_read_only_zero_pages_and_holes(self, mm: pm.AddressSpace, vram: pm.DeviceMemory) -> None:
        buf = mm.mmap(PAGES * PAGE, prot=1)
        assert bytes(buf[: 4 * PAGE]) == bytes(4 * PAGE)
        assert to_device(buf, vram) == PAGES
        assert bytes(buf[:]) == bytes(PAGES * PAGE)
        assert vram.used == 0

    def test_copies_of_a_file(self, mm: pm.AddressSpace, vram: pm.DeviceMemory) -> None:
        fd = os.memfd_create("pymirror-test")
        os.write(fd, pattern(PAGES).tobytes())
        buf = mm.mmap(PAGES * PAGE, fd=fd)
        buf[3 * PAGE], buf[9 * PAGE] = 1, 2
        leave = 2 if mm.fault_delivery == "thread" or "guard" in mm.features else 0
        assert to_device(buf, vram) == leave
        os.pwrite(fd, b"z", 5 * PAGE)
        assert (buf[3 * PAGE], buf[5 * PAGE], buf[9 * PAGE]) == (1, ord("z"), 2)
        assert vram.used == 0
        buf[7 * PAGE] = 7
        assert os.pread(fd, 1, 7 * PAGE) == pattern(PAGES)[7 * PAGE : 7 * PAGE + 1].tobytes()
        os.close(fd)

    @pytest.mark.parametrize("mm", ["thread"], indirect=True)
    @pytest.mark.parametrize("number", [errno.EAGAIN, errno.ENOMEM])
    @pytest.mark.parametrize("nth", range(1, 5))
    def test_a_dropped_copy_of_a_file(
        self, mm: pm.AddressSpace, vram: pm.DeviceMemory, nth: int, number: int
    ) -> None:
        """What is refused for a moment is not taken for memory of zeroes."""
        fd = os.memfd_create("pymirror-test")
        os.write(fd, pattern(PAGES).tobytes())
        buf = mm.mmap(PAGES * PAGE, fd=fd)
        buf[3 * PAGE] ^= 1
        assert to_device(buf, vram) == 1
        mm.madvise(buf.addr + 3 * PAGE, PAGE, 4)
        with inject("IOCTL", nth, number):
            assert intact(buf)
        os.close(fd)

    def test_shared_with_a_child(self, mm: pm.AddressSpace, vram: pm.DeviceMemory) -> None:
        buf = patterned(mm)
        mm.mprotect(buf.addr, buf.size, 1)
        ready, go = os.pipe(), os.pipe()

        def child() -> None:
            os.write(ready[1], b"x")
            os.read(go[0], 1)
            assert ctypes.string_at(buf.addr, buf.size) == pattern(PAGES).tobytes()

        pid = os.fork()
        if pid == 0:
            run_child(child)
        os.read(ready[0], 1)
        assert to_device(buf, vram) == PAGES
        assert intact(buf)
        os.write(go[1], b"x")
        assert wait_for(pid) == 0
        for end in (*ready, *go):
            os.close(end)

    def test_locked_memory_moves_and_is_locked_at_home(
        self, mm: pm.AddressSpace, vram: pm.DeviceMemory
    ) -> None:
        buf = patterned(mm)
        mlock(buf)
        before = locked_kib()
        assert before >= buf.size >> 10
        there = PAGES if "move" in mm.features else 0
        assert to_device(buf, vram) == there
        assert locked_kib() == before, "no slot stays locked"
        assert intact(buf)
        assert to_device(buf, vram) == there
        assert pm.migrate_to_system(mm, buf.addr, buf.addr + buf.size) == there
        assert intact(buf)
        assert locked_kib() == before

    def test_locked_memory_stays_where_no_more_may_be_locked(
        self, mm: pm.AddressSpace, vram: pm.DeviceMemory
    ) -> None:
        buf = patterned(mm)
        mlock(buf)
        with inject("MLOCK", 1, errno.ENOMEM, times=1 << 20):
            assert errno_of(to_device, buf, vram) == (errno.ENOMEM if "move" in mm.features else 0)
        assert vram.used == 0
        assert intact(buf)

    def test_what_walks_have_locked_is_not_the_processs(
        self, mm: pm.AddressSpace, vram: pm.DeviceMemory
    ) -> None:
        needs("pagemap_scan", "pfn")
        buf = mm.mmap(8 * pm.MiB, huge="thp")
        np.frombuffer(buf, np.uint8)[:] = 7
        with pm.Mirror(mm) as mirror:
            rng = mirror.range(buf.addr, buf.addr + buf.size)
            rng.register()
            for _ in range(3):
                rng.fault()
            rng.unregister()
        assert locked_kib() > 0, "a page whose sharing tells of forks"
        mm.mprotect(buf.addr, buf.size, 1)
        assert to_device(buf, vram) == buf.size // PAGE
        assert np.frombuffer(buf, np.uint8).min() == 7

    def test_locked_memory_stays(self, mm: pm.AddressSpace, vram: pm.DeviceMemory) -> None:
        buf = patterned(mm)
        mlock(buf)
        mm.mprotect(buf.addr, buf.size, 1)
        assert to_device(buf, vram) == 0
        assert intact(buf)

    @pytest.mark.parametrize(
        ("call", "nth"), [("MREMAP", 1), ("MMAP", 1), *(("IOCTL", nth) for nth in range(1, 16))]
    )
    def test_a_failed_call_leaves_it_as_it_was(
        self, mm: pm.AddressSpace, vram: pm.DeviceMemory, call: str, nth: int
    ) -> None:
        needs("pfn")
        buf = patterned(mm)
        mm.mprotect(buf.addr, buf.size, 1)
        pm.migrate_to_device(mm, buf.addr, buf.addr + PAGE, vram)
        with inject(call, nth, tid=threading.get_native_id()), suppress(pm.MirrorError):
            assert to_device(buf, vram) < PAGES
        assert intact(buf)
        assert to_device(buf, vram) == PAGES
        assert intact(buf)
