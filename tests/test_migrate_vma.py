# SPDX-License-Identifier: MIT
"""Migration in three steps, without an mm, and for a least time."""

from __future__ import annotations

import ctypes
import errno
import mmap
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from mirroring import PAGE
from seams import Background, errno_of, foreign

import pymirror as pm

pytestmark = pytest.mark.root

PAGES = 32
MIGRATE, VALID, WRITE = pm.MIGRATE_PFN_MIGRATE, pm.MIGRATE_PFN_VALID, pm.MIGRATE_PFN_WRITE


@pytest.fixture(params=["thread", "inline"])
def mm(request: pytest.FixtureRequest) -> Iterator[pm.AddressSpace]:
    with pm.AddressSpace(fault_delivery=request.param) as mm:
        yield mm


def numbered(mm: pm.AddressSpace, pages: int = PAGES) -> pm.Region:
    buf = mm.mmap(pages * PAGE)
    np.frombuffer(buf, np.uint64)[:] = np.arange(pages * PAGE // 8)
    return buf


def intact(buf: pm.Region) -> bool:
    return bool((np.frombuffer(buf, np.uint64) == np.arange(buf.size // 8)).all())


def setup(buf: pm.Region, vram: pm.DeviceMemory, flags: int = pm.MIGRATE_VMA_SELECT_SYSTEM) -> pm.MigrateVma:
    return pm.migrate_vma_setup(buf.mm, buf.addr, buf.addr + buf.size, vram, flags=flags)


def migrating(args: Any) -> np.ndarray[Any, np.dtype[np.bool_]]:
    wanted: np.ndarray[Any, np.dtype[np.bool_]] = (args.src & np.uint64(MIGRATE)) != 0
    return wanted


class TestThreeSteps:
    def test_what_is_collected(self, mm: pm.AddressSpace, vram: pm.DeviceMemory) -> None:
        buf = mm.mmap(8 * PAGE)
        buf[0] = 1
        assert buf[PAGE] == 0
        with setup(buf, vram) as args:
            assert args.src[0] & np.uint64(63) == MIGRATE | VALID | WRITE
            zero_page = MIGRATE if "pfn" in mm.features else MIGRATE | VALID
            assert args.src[1:].tolist() == [zero_page] + [MIGRATE] * 6
            assert (args.cpages, args.npages) == (8, 8)
            assert (pm.migrate_pfn_to_pfn(args.src)[0] != 0) == ("pfn" in mm.features)
        assert vram.used == 0

    def test_the_driver_chooses(self, mm: pm.AddressSpace, vram: pm.DeviceMemory) -> None:
        buf = numbered(mm)
        chosen = np.arange(PAGES) % 3 != 0
        with setup(buf, vram) as args:
            args.dst[:] = args.alloc_pages(migrating(args) & chosen)
            pfns = pm.migrate_pfn_to_pfn(args.dst)
            assert [pfn in vram.pfns for pfn in pfns.tolist()] == chosen.tolist()
            assert pm.migrate_vma_pages(args) == np.count_nonzero(chosen)
            assert (migrating(args) == chosen).all()
        assert (vram.holds(buf.addr, buf.addr + buf.size) == chosen).all()
        assert intact(buf)

    def test_a_lost_race_is_told(self, mm: pm.AddressSpace, vram: pm.DeviceMemory) -> None:
        buf = numbered(mm)
        with pm.pin_user_pages(mm, buf.addr + 3 * PAGE, 2), setup(buf, vram) as args:
            args.dst[:] = args.alloc_pages(migrating(args))
            assert vram.used == PAGES * PAGE
            assert pm.migrate_vma_pages(args) == PAGES - 2
            assert np.flatnonzero(~migrating(args)).tolist() == [3, 4]
        assert vram.used == (PAGES - 2) * PAGE
        assert intact(buf)

    @pytest.mark.parametrize("race", ["munmap", "mprotect"])
    def test_a_page_that_has_gone_is_the_only_one_lost(
        self, mm: pm.AddressSpace, vram: pm.DeviceMemory, race: str
    ) -> None:
        buf = numbered(mm)
        gone = buf.addr + 3 * PAGE
        with setup(buf, vram) as args:
            args.dst[:] = args.alloc_pages(migrating(args))
            if race == "munmap":
                foreign.munmap(gone, PAGE)
            else:
                foreign.mprotect(gone, PAGE, 0)
            assert pm.migrate_vma_pages(args) == PAGES - 1
            assert np.flatnonzero(~migrating(args)).tolist() == [3]
        assert vram.used == (PAGES - 1) * PAGE
        words = np.frombuffer(buf, np.uint64)[4 * PAGE // 8 :]
        assert (words == np.arange(4 * PAGE // 8, PAGES * PAGE // 8)).all()

    def test_the_thread_that_migrates_is_told_what_to_finish(
        self, mm: pm.AddressSpace, vram: pm.DeviceMemory
    ) -> None:
        buf = numbered(mm)
        with setup(buf, vram), pytest.raises(pm.MirrorError, match=r"by migrate_vma_setup\(\)") as failed:
            mm.madvise(buf.addr, PAGE, mmap.MADV_DONTNEED)
        assert (failed.value.errno, failed.value.hint[:22]) == (errno.EDEADLK, "migrate_vma_finalize()")

    def test_what_the_cpu_writes_before_the_move_goes_with_it(
        self, mm: pm.AddressSpace, vram: pm.DeviceMemory
    ) -> None:
        buf = numbered(mm)
        words = np.frombuffer(buf, np.uint64)
        with setup(buf, vram) as args:
            args.dst[:] = args.alloc_pages(migrating(args))
            words[0] = 99
            assert pm.migrate_vma_pages(args) == PAGES
        assert words[0] == 99
        words[0] = 0
        assert intact(buf)

    def test_home(self, mm: pm.AddressSpace, vram: pm.DeviceMemory) -> None:
        buf = numbered(mm)
        pm.migrate_to_device(mm, buf.addr, buf.addr + 8 * PAGE, vram)
        with setup(buf, vram, pm.MIGRATE_VMA_SELECT_DEVICE_PRIVATE) as args:
            assert args.cpages == 8
            assert pm.is_device_private_pfn(pm.migrate_pfn_to_pfn(args.src[:8])).all()
            args.dst[:4] = VALID
            assert pm.migrate_vma_pages(args) == 4
        assert vram.used == 4 * PAGE
        assert intact(buf)

    def test_coherent_memory(self, mm: pm.AddressSpace) -> None:
        buf = numbered(mm)
        with pm.DeviceMemory(pm.Device("d1"), pm.MiB, kind="coherent") as memory:
            with setup(buf, memory) as args:
                assert errno_of(args.alloc_pages, migrating(args)) == errno.EINVAL
                args.dst[:4] = VALID
                assert pm.migrate_vma_pages(args) == 4
            with setup(buf, memory, pm.MIGRATE_VMA_SELECT_DEVICE_COHERENT) as args:
                assert args.cpages == 4
                args.dst[:] = VALID
                assert pm.migrate_vma_pages(args) == 4
            assert memory.used == 0
        assert intact(buf)

    def test_notifiers_hear_of_it_once(self, mm: pm.AddressSpace, vram: pm.DeviceMemory) -> None:
        buf = numbered(mm)
        told: list[tuple[pm.Event, object]] = []

        def invalidate(sub: pm.IntervalNotifier, update: pm.MmuNotifierRange, seq: int) -> bool:
            sub.set_seq(seq)
            told.append((update.event, update.owner))
            return True

        sub = pm.IntervalNotifier(mm, buf.addr, buf.size, invalidate)
        with setup(buf, vram) as args:
            assert told == [(pm.Event.MIGRATE, vram.owner)]
            assert errno_of(sub.read_begin, 0.01) == errno.ETIMEDOUT
            args.dst[:] = args.alloc_pages(migrating(args))
            pm.migrate_vma_pages(args)
        sub.read_begin()
        mm.sync()
        assert len(told) == 1
        sub.remove()

    def test_an_error_ends_it(self, mm: pm.AddressSpace, vram: pm.DeviceMemory) -> None:
        buf = numbered(mm)
        with suppress(ZeroDivisionError), setup(buf, vram) as args:
            args.dst[:] = args.alloc_pages(migrating(args))
            raise ZeroDivisionError
        assert vram.used == 0
        assert errno_of(pm.migrate_vma_pages, args) == errno.EINVAL
        assert "finalized" in repr(args)

    def test_what_is_refused(self, mm: pm.AddressSpace, vram: pm.DeviceMemory) -> None:
        buf = numbered(mm)
        mm.mprotect(buf.addr, PAGE, 1)
        assert errno_of(setup, buf, vram) == errno.EINVAL, "two vmas"
        rest = buf.addr + PAGE, buf.addr + buf.size
        assert errno_of(pm.migrate_vma_setup, mm, *rest, vram, flags=0) == errno.EINVAL
        mm.munmap(buf.addr + buf.size - PAGE, PAGE)
        assert errno_of(pm.migrate_vma_setup, mm, *rest, vram) == errno.EINVAL
        with pm.migrate_vma_setup(mm, buf.addr + PAGE, buf.addr + 3 * PAGE, vram) as args:
            args.dst[:] = pm.migrate_pfn(5)
            assert errno_of(pm.migrate_vma_pages, args) == errno.EINVAL
            assert errno_of(args.alloc_pages, np.ones(9, bool)) == errno.EINVAL

    def test_the_driver_chooses_other_places(self, mm: pm.AddressSpace, vram: pm.DeviceMemory) -> None:
        n = 1024
        buf = mm.mmap(3 * n * PAGE)
        np.frombuffer(buf, np.uint64)[:] = np.arange(buf.size // 8)
        start = -(-buf.addr // pm.MiB // 2) * 2 * pm.MiB
        with pm.migrate_vma_setup(mm, start, start + n * PAGE, vram) as args:
            args.dst[:] = np.roll(args.alloc_pages(migrating(args)), -1)
            assert pm.migrate_vma_pages(args) == n
        assert vram.used == n * PAGE
        assert intact(buf)

    def test_places_that_are_others(self, mm: pm.AddressSpace, vram: pm.DeviceMemory) -> None:
        there, buf = numbered(mm), numbered(mm)
        pm.migrate_to_device(mm, there.addr, there.addr + there.size, vram)
        used = pm.migrate_device_range(vram, vram.pfns.start, len(vram.pfns)).src
        with setup(buf, vram) as args:
            args.dst[:] = used[used != 0] & np.uint64(~MIGRATE & (1 << 64) - 1)
            assert errno_of(pm.migrate_vma_pages, args) == errno.EINVAL, "in use"
            args.dst[:] = args.alloc_pages(migrating(args))
            args.dst[1] = args.dst[0]
            assert errno_of(pm.migrate_vma_pages, args) == errno.EINVAL, "twice"
        assert vram.used == there.size
        assert intact(there)
        assert intact(buf)

    def test_one_that_was_forgotten_ends(self, mm: pm.AddressSpace, vram: pm.DeviceMemory) -> None:
        buf = numbered(mm)
        args = setup(buf, vram)
        args.alloc_pages(migrating(args))
        with pytest.warns(ResourceWarning, match="unfinalized"):
            del args
        assert vram.used == 0
        mm.munmap(buf.addr, buf.size)

    def test_it_ends_where_it_began(self, mm: pm.AddressSpace, vram: pm.DeviceMemory) -> None:
        with setup(numbered(mm), vram) as args:
            args.alloc_pages(migrating(args))
            assert Background(errno_of, pm.migrate_vma_finalize, args).result() == errno.EDEADLK
            assert not args.finalized
        assert vram.used == 0

    def test_memory_that_is_too_small(self, mm: pm.AddressSpace) -> None:
        buf = numbered(mm)
        with pm.DeviceMemory(pm.Device("d2"), 4 * PAGE) as vram:
            with setup(buf, vram) as args:
                args.dst[:] = args.alloc_pages(migrating(args))
                assert np.count_nonzero(args.dst) == 4
                assert pm.migrate_vma_pages(args) == 4
            assert vram.used == vram.size
        assert intact(buf)


class TestWithoutAnMm:
    def test_a_range_of_device_memory(self, mm: pm.AddressSpace, vram: pm.DeviceMemory) -> None:
        buf = numbered(mm)
        pm.migrate_to_device(mm, buf.addr, buf.addr + buf.size, vram)
        mine = vram.pfns
        found = pm.migrate_device_range(vram, mine.start, len(mine))
        used = migrating(found)
        assert np.count_nonzero(used) == PAGES
        assert sorted(found.addrs[used].tolist()) == list(range(buf.addr, buf.addr + buf.size, PAGE))
        found.dst[np.flatnonzero(used)[:10]] = VALID
        assert pm.migrate_device_pages(found) == 10
        pm.migrate_device_finalize(found)
        assert vram.used == (PAGES - 10) * PAGE
        assert intact(buf)

    def test_what_has_gone_meanwhile(self, mm: pm.AddressSpace, vram: pm.DeviceMemory) -> None:
        buf = numbered(mm)
        pm.migrate_to_device(mm, buf.addr, buf.addr + buf.size, vram)
        found = pm.migrate_device_range(vram, vram.pfns.start, len(vram.pfns))
        found.dst[:] = VALID
        mm.munmap(buf.addr, 2 * PAGE)
        assert pm.migrate_device_pages(found) == PAGES - 2
        assert np.count_nonzero(migrating(found)) == PAGES - 2

    def test_what_is_refused(self, mm: pm.AddressSpace, vram: pm.DeviceMemory) -> None:
        assert errno_of(pm.migrate_device_range, vram, 0, 1) == errno.EINVAL
        pm.migrate_to_device(mm, (buf := numbered(mm)).addr, buf.addr + PAGE, vram)
        assert errno_of(pm.migrate_device_range, vram, vram.pfns.start, len(vram.pfns) + 1) == errno.EINVAL


class TestTimeslice:
    """A page stays for a least time: its toucher waits."""

    def test_a_touch_waits(self, mm: pm.AddressSpace) -> None:
        with pm.DeviceMemory(pm.Device("d3"), pm.MiB, timeslice=0.05) as vram:
            buf = numbered(mm)
            began = time.monotonic()
            pm.migrate_to_device(mm, buf.addr, buf.addr + buf.size, vram)
            assert buf[8] == 1
            assert time.monotonic() - began >= 0.05
            assert vram.used == (PAGES - 1) * PAGE
            assert intact(buf)

    def test_a_call_does_not(self, mm: pm.AddressSpace) -> None:
        with pm.DeviceMemory(pm.Device("d4"), pm.MiB, timeslice=1) as vram:
            buf = numbered(mm)
            began = time.monotonic()
            pm.migrate_to_device(mm, buf.addr, buf.addr + buf.size, vram)
            # It waits without Python's lock.
            touch = ctypes.CDLL(None).memcmp
            touch.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
            reader = threading.Thread(target=lambda: touch(buf.addr, buf.addr, 8))
            reader.start()
            assert pm.migrate_to_system(mm, buf.addr, buf.addr + buf.size, vram) == PAGES
            reader.join()
            assert time.monotonic() - began < 1
            assert intact(buf)

    def test_neighbours_that_come_do_not_lengthen_it(self) -> None:
        with pm.AddressSpace() as mm, pm.DeviceMemory(pm.Device("d7"), 4 * pm.MiB, timeslice=0.05) as vram:
            buf = mm.mmap(4 * pm.MiB)
            start = -(-buf.addr // (2 * pm.MiB)) * 2 * pm.MiB
            pm.migrate_to_device(mm, start, start + PAGE, vram)
            memcmp = ctypes.CDLL(None).memcmp
            memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
            touch = Background(memcmp, start, start, 8)
            for page in range(1, 512):
                addr = start + page * PAGE
                pm.migrate_to_device(mm, addr, addr + PAGE, vram)
                time.sleep(0.01)
                if touch.done:
                    break
            assert touch.done, "as long as they came"
            touch.result()

    def test_more_touchers_than_can_wait(self, mm: pm.AddressSpace) -> None:
        with pm.DeviceMemory(pm.Device("d5"), pm.MiB, timeslice=0.05) as vram:
            buf = numbered(mm, 100)
            pm.migrate_to_device(mm, buf.addr, buf.addr + buf.size, vram)
            threads = [threading.Thread(target=lambda page=page: buf[page * PAGE]) for page in range(100)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert vram.used == 0
            assert intact(buf)

    def test_close_does_not_wait(self, mm: pm.AddressSpace) -> None:
        vram = pm.DeviceMemory(pm.Device("d6"), pm.MiB, timeslice=1)
        buf = numbered(mm)
        pm.migrate_to_device(mm, buf.addr, buf.addr + buf.size, vram)
        vram.close()
        assert intact(buf)
        assert errno_of(pm.DeviceMemory, vram.device, PAGE, timeslice=-1) == errno.EINVAL
