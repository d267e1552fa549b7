# SPDX-License-Identifier: MIT
"""Device memory: pages move there, and come home by call, by a touch of the CPU, at close; none is lost."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from mirroring import DELIVERIES, PAGE, space_by
from racing import in_child, run_child, wait_for
from seams import WAIT_S, errno_of, inject, needs

import pymirror as pm

pytestmark = [pytest.mark.root, pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")]

PAGES = 64
MADV_DONTFORK, MADV_DOFORK = 10, 11


@pytest.fixture(params=DELIVERIES)
def mm(nothing_left_behind: None, request: pytest.FixtureRequest) -> Iterator[pm.AddressSpace]:
    with space_by(request.param) as space:
        yield space


@pytest.fixture
def vram(mm: pm.AddressSpace) -> Iterator[pm.DeviceMemory]:
    with pm.DeviceMemory(pm.Device("d0"), 16 * pm.MiB) as memory:
        yield memory


def pattern(pages: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    numbers = np.repeat(np.arange(1, pages + 1, dtype=np.uint64), PAGE // 8)
    return (numbers * np.uint64(0x9E3779B97F4A7C15)).view(np.uint8)


def patterned(mm: pm.AddressSpace, pages: int = PAGES, **kinds: Any) -> pm.Region:
    buf = mm.mmap(pages * PAGE, **kinds)
    np.frombuffer(buf, np.uint8)[:] = pattern(pages)
    return buf


def intact(buf: pm.Region) -> bool:
    return bool(np.array_equal(np.frombuffer(buf, np.uint8), pattern(buf.size // PAGE)))


def to_device(buf: pm.Region, vram: pm.DeviceMemory) -> int:
    return pm.migrate_to_device(buf.mm, buf.addr, buf.addr + buf.size, vram)


class TestMigration:
    def test_there_and_back(self, mm: pm.AddressSpace, vram: pm.DeviceMemory) -> None:
        buf = patterned(mm)
        assert to_device(buf, vram) == PAGES
        assert vram.used == PAGES * PAGE
        assert to_device(buf, vram) == 0
        assert pm.migrate_to_system(mm, buf.addr, buf.addr + 4 * PAGE, vram) == 4
        assert pm.migrate_to_system(mm, buf.addr, buf.addr + buf.size) == PAGES - 4
        assert mm.stats()["device_faults"] == 0
        assert intact(buf)

    def test_a_touch_brings_a_page_home(self, mm: pm.AddressSpace, vram: pm.DeviceMemory) -> None:
        buf = patterned(mm)
        to_device(buf, vram)
        assert bytes(buf[5 * PAGE : 5 * PAGE + 8]) == pattern(PAGES)[5 * PAGE : 5 * PAGE + 8].tobytes()
        assert vram.used == (PAGES - 1) * PAGE
        assert intact(buf)
        assert vram.used == 0

    @pytest.mark.parametrize(("around", "left"), [(64 << 10, PAGES - 16), (2 << 20, 0)])
    def test_a_touch_brings_what_is_around(self, mm: pm.AddressSpace, around: int, left: int) -> None:
        with pm.DeviceMemory(pm.Device("d1"), pm.MiB, fault_around=around) as vram:
            buf = patterned(mm, 1024)
            start = -(-buf.addr // (2 << 20)) * (2 << 20)
            pm.migrate_to_device(mm, start, start + PAGES * PAGE, vram)
            ctypes.string_at(start + 3 * PAGE, 1)
            assert vram.used == left * PAGE

    def test_untouched_memory_takes_no_memory(self, mm: pm.AddressSpace, vram: pm.DeviceMemory) -> None:
        buf = mm.mmap(PAGES * PAGE)
        assert to_device(buf, vram) == PAGES
        assert not np.frombuffer(buf, np.uint8).any()

    def test_faults_on_neighbours_are_told_as_one_event(
        self, mm: pm.AddressSpace, vram: pm.DeviceMemory
    ) -> None:
        told: list[pm.MmuNotifierRange] = []
        busy, go_on = threading.Event(), threading.Event()

        def invalidate(sub: pm.IntervalNotifier, update: pm.MmuNotifierRange, cur_seq: int) -> None:
            sub.set_seq(cur_seq)
            told.append(update)
            busy.set()
            go_on.wait(10)

        buf = patterned(mm)
        to_device(buf, vram)
        sub = pm.IntervalNotifier(mm, buf.addr, buf.size, invalidate)
        assert buf[0] == pattern(1)[0]
        assert busy.wait(10)
        assert intact(buf)
        go_on.set()
        mm.sync()
        sub.remove()
        first, others = told
        assert (first.start, first.end, first.first_seq) == (buf.addr, buf.addr + PAGE, 0)
        assert (others.start, others.end) == (buf.addr + PAGE, buf.addr + buf.size)
        assert others.seq - others.first_seq == 2 * (PAGES - 2)
        assert mm.stats()["device_faults"] == PAGES
        for seq in range(others.first_seq, others.seq + 1, 2):
            found = mm.notifiers.invalidation(seq)
            assert found is not None
            assert (found.start, found.seq) == (others.start, others.seq)

    def test_notifiers_are_told(self, mm: pm.AddressSpace) -> None:
        told = []

        def invalidate(sub: Any, update: pm.MmuNotifierRange, seq: int) -> bool:
            told.append((update.event, update.owner, update.guarantee))
            sub.set_seq(seq)
            return True

        owner = object()
        buf = patterned(mm)
        sub = pm.IntervalNotifier(mm, buf.addr, buf.size, invalidate)
        with pm.DeviceMemory(pm.Device("d2"), pm.MiB, owner=owner) as vram:
            to_device(buf, vram)
            buf[0] = 1
            mm.sync()
            pm.migrate_to_system(mm, buf.addr, buf.addr + buf.size, vram)
            sub.remove()
        assert told == [
            (pm.Event.MIGRATE, owner, pm.Guarantee.BEFORE),
            (pm.Event.MIGRATE, owner, pm.Guarantee.BEFORE),
            (pm.Event.MIGRATE, owner, pm.Guarantee.BEFORE),
        ]

    def test_a_device_fault_brings_pages_home(self, mm: pm.AddressSpace, vram: pm.DeviceMemory) -> None:
        buf = patterned(mm)
        to_device(buf, vram)
        with pm.Mirror(mm) as mirror, mirror.range(buf.addr, buf.addr + buf.size) as rng:
            rng.snapshot()
            assert not rng.pfns.any()
            rng.default_flags = pm.HMM_PFN_REQ_FAULT
            while errno_of(rng.fault) in (errno.EBUSY, errno.EAGAIN):
                rng.wait_until_valid(timeout=1.0)
            assert (rng.pfns & np.uint64(pm.HMM_PFN_VALID)).all()
        assert vram.used == 0
        assert intact(buf)

    def test_the_oldest_makes_room(self, mm: pm.AddressSpace) -> None:
        with pm.DeviceMemory(pm.Device("d3"), PAGES * PAGE) as vram:
            first, second = patterned(mm), patterned(mm)
            assert to_device(first, vram) == PAGES
            assert to_device(second, vram) == PAGES
            assert vram.used == PAGES * PAGE
            assert mm.stats()["device_resident"] == PAGES
            assert intact(first)
            assert intact(second)

    def test_more_than_there_is_room_for(self, mm: pm.AddressSpace) -> None:
        with pm.DeviceMemory(pm.Device("d4"), 10 * PAGE) as vram:
            buf = patterned(mm)
            with pytest.raises(pm.MirrorError, match="10 pages have moved") as refused:
                to_device(buf, vram)
            assert refused.value.errno == errno.ENOSPC
            assert intact(buf)


class TestWhatStays:
    def test_kinds_of_memory(self, mm: pm.AddressSpace, vram: pm.DeviceMemory) -> None:
        fd = os.memfd_create("pymirror-test")
        os.ftruncate(fd, PAGES * PAGE)
        kinds = [patterned(mm, shared=True), patterned(mm, shared=True, fd=fd), mm.mmap(PAGES * PAGE, fd=fd)]
        assert [to_device(buf, vram) for buf in kinds] == [0, 0, 0]
        assert all(intact(buf) for buf in kinds)
        os.close(fd)

    def test_pinned_pages(self, mm: pm.AddressSpace, vram: pm.DeviceMemory) -> None:
        buf = patterned(mm)
        with pm.pin_user_pages(mm, buf.addr + PAGE, 2):
            assert to_device(buf, vram) == PAGES - 2
        assert intact(buf)

    def test_a_hole_ends_it(self, mm: pm.AddressSpace, vram: pm.DeviceMemory) -> None:
        buf = patterned(mm)
        mm.munmap(buf.addr + 3 * PAGE, PAGE)
        with pytest.raises(pm.MirrorError) as refused:
            pm.migrate_to_device(mm, buf.addr, buf.addr + PAGES * PAGE, vram)
        assert (refused.value.errno, refused.value.addr) == (errno.EINVAL, buf.addr + 3 * PAGE)
        assert vram.used == 3 * PAGE

    def test_wrong_arguments(self, mm: pm.AddressSpace, vram: pm.DeviceMemory) -> None:
        for start, end in ((1, PAGE), (PAGE, PAGE), (0, 1 << 48)):
            assert errno_of(pm.migrate_to_device, mm, start, end, vram) == errno.EINVAL
            assert errno_of(pm.migrate_to_system, mm, start, end, vram) == errno.EINVAL
        assert errno_of(pm.DeviceMemory, vram.device, 0) == errno.EINVAL
        with pytest.raises(pm.MirrorError, match="fault_around"):
            pm.DeviceMemory(vram.device, PAGE, fault_around=5)

    def test_another_address_space_waits(self, mm: pm.AddressSpace, vram: pm.DeviceMemory) -> None:
        buf = patterned(mm)
        to_device(buf, vram)
        with pm.AddressSpace(fault_delivery=mm.fault_delivery) as other:
            mine = patterned(other)
            assert errno_of(to_device, mine, vram) == errno.EXDEV
            pm.migrate_to_system(mm, buf.addr, buf.addr + buf.size)
            assert to_device(mine, vram) == PAGES
            assert intact(mine)
        assert intact(buf)

    def test_missing_features(self) -> None:
        for feature, delivery in (
            ("uffd_kernel", "thread"),
            ("sigbus", "inline"),
        ):
            with (
                pm.AddressSpace(disable=[feature], fault_delivery=delivery) as mm,
                pm.DeviceMemory(pm.Device("d5"), pm.MiB) as vram,
                pytest.raises(pm.FeatureError, match=feature),
            ):
                to_device(patterned(mm), vram)


def mlock(buf: pm.Region) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mlock(ctypes.c_void_p(buf.addr), ctypes.c_size_t(buf.size)) == 0


def locked_kib() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmLck:"))


class TestChangesOfMemory:
    def test_mprotect(self, mm: pm.AddressSpace, vram: pm.DeviceMemory) -> None:
        buf = patterned(mm)
        to_device(buf, vram)
        mm.mprotect(buf.addr, buf.size, 1)
        assert intact(buf)
        assert mm.stats()["device_copied"] == PAGES

    def test_dontneed(self, mm: pm.AddressSpace, vram: pm.DeviceMemory) -> None:
        buf = patterned(mm)
        to_device(buf, vram)
        mm.madvise(buf.addr, 4 * PAGE, 4)
        assert vram.used == (PAGES - 4) * PAGE
        assert not np.frombuffer(buf, np.uint8)[: 4 * PAGE].any()

    def test_munmap(self, mm: pm.AddressSpace, vram: pm.DeviceMemory) -> None:
        buf = patterned(mm)
        to_device(buf, vram)
        mm.munmap(buf.addr, buf.size)
        assert vram.used == 0
        assert mm.stats()["device_dropped"] == PAGES

    def test_mremap_of_what_was_split(self, mm: pm.AddressSpace, vram: pm.DeviceMemory) -> None:
        """A part that has been on the device is a vma of its own, and mremap takes one."""
        buf = patterned(mm, 1024)
        middle = -(-buf.addr // (2 << 20)) * (2 << 20)
        assert pm.migrate_to_device(mm, middle, middle + PAGE, vram) == 1
        moved = mm.mremap(buf.addr, buf.size, buf.size + PAGE)
        assert np.array_equal(np.frombuffer(moved, np.uint8)[: 1024 * PAGE], pattern(1024))

    def test_fork(self, mm: pm.AddressSpace, vram: pm.DeviceMemory) -> None:
        needs("event_fork")
        buf = patterned(mm)
        to_device(buf, vram)

        def child() -> None:
            assert ctypes.string_at(buf.addr, buf.size) == pattern(PAGES).tobytes()
            ctypes.memset(buf.addr, 0, buf.size)
            assert errno_of(pm.migrate_to_system, mm, buf.addr, buf.addr + PAGE, vram) == errno.ESRCH
            assert vram.used == 0
            vram.close()

        assert in_child(child) == 0
        assert vram.used == PAGES * PAGE, "they stay where they are"
        assert intact(buf)
        assert mm.stats()["device_child_lost"] == 0

    def test_fork_of_a_run_in_two_vmas(self, mm: pm.AddressSpace, vram: pm.DeviceMemory) -> None:
        needs("event_fork")
        buf = patterned(mm)
        mm.madvise(buf.addr + 5 * PAGE, buf.size - 5 * PAGE, 16)  # MADV_DONTDUMP
        to_device(buf, vram)
        content = pattern(PAGES).tobytes()
        assert in_child(lambda: ctypes.string_at(buf.addr, buf.size) == content or 1 / 0) == 0
        assert vram.used == buf.size
        assert mm.stats()["device_child_lost"] == 0

    def test_fork_without_its_event(self) -> None:
        with pm.AddressSpace(disable=["event_fork"]) as mm, pm.DeviceMemory(pm.Device("d7"), pm.MiB) as vram:
            buf = patterned(mm)
            to_device(buf, vram)
            content = pattern(PAGES).tobytes()
            assert in_child(lambda: ctypes.string_at(buf.addr, buf.size) == content or 1 / 0) == 0
            assert vram.used == 0, "nobody could copy: they come home first"

    def test_drivers_learn_that_pages_left_for_a_fork(self) -> None:
        seen: list[pm.MmuNotifierRange] = []
        with pm.AddressSpace(disable=["event_fork"]) as mm, pm.DeviceMemory(pm.Device("d7"), pm.MiB) as vram:
            buf = patterned(mm)
            to_device(buf, vram)

            def invalidate(sub: pm.IntervalNotifier, update: pm.MmuNotifierRange, seq: int) -> bool:
                sub.set_seq(seq)
                seen.append(update)
                return True

            sub = pm.IntervalNotifier(mm, buf.addr, buf.size, invalidate)
            assert in_child(lambda: None) == 0
            mm.sync(WAIT_S)
            sub.remove()
            assert pm.Event.MIGRATE in [update.event for update in seen]
            assert mm.stats()["events"]["MIGRATE"] >= 1

    def test_a_child_of_a_child(self, mm: pm.AddressSpace, vram: pm.DeviceMemory) -> None:
        buf = patterned(mm)
        to_device(buf, vram)
        content = pattern(PAGES).tobytes()

        def grandchild() -> None:
            assert ctypes.string_at(buf.addr, buf.size) == content

        def child() -> None:
            with pm.AddressSpace() as own, pm.DeviceMemory(pm.Device("d8"), pm.MiB) as memory:
                other = patterned(own)
                to_device(other, memory)
                assert in_child(lambda: (grandchild(), intact(other) or 1 / 0)) == 0
                assert intact(other)

        assert in_child(child) == 0
        assert intact(buf)


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
        leave = 2 if mm.fault_delivery == "thread" else 0
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
        needs("pagemap_scan")
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


class TestProtection:
    """Bits of device pages, as the kernel has them in its entries: see docs/fidelity.md."""

    @staticmethod
    def snapshot(mm: pm.AddressSpace, buf: pm.Region, owner: object) -> np.ndarray[Any, np.dtype[np.uint64]]:
        pfns = np.zeros(buf.size // PAGE, np.uint64)
        sub = pm.IntervalNotifier(mm, buf.addr, buf.size, lambda sub, update, seq: sub.set_seq(seq) or True)
        pm.hmm_range_fault(
            sub,
            buf.addr,
            buf.addr + buf.size,
            pfns,
            seq=sub.read_begin(),
            dev_private_owner=owner,
        )
        sub.remove()
        return pfns

    def test_the_owner_sees_its_pages(self, mm: pm.AddressSpace, vram: pm.DeviceMemory) -> None:
        buf = patterned(mm)
        to_device(buf, vram)
        pfns = self.snapshot(mm, buf, vram.owner)
        assert pm.is_device_private_pfn(pfns).all()
        assert ((pfns & np.uint64(pm.HMM_PFN_WRITE)) != 0).all()
        assert np.unique(pm.hmm_pfn_to_pfn(pfns)).size == PAGES
        assert not self.snapshot(mm, buf, object()).any()
        assert not self.snapshot(mm, buf, None).any()

    @pytest.mark.parametrize("change", ["mprotect", "fork"])
    def test_read_only_from_then_on(self, mm: pm.AddressSpace, vram: pm.DeviceMemory, change: str) -> None:
        needs("wp_async", "event_fork")
        buf = patterned(mm)
        to_device(buf, vram)
        if change == "fork":
            assert in_child(lambda: None) == 0
        else:
            mm.mprotect(buf.addr, buf.size, 1)
            mm.mprotect(buf.addr, buf.size, 3)
        pfns = self.snapshot(mm, buf, vram.owner)
        assert pm.is_device_private_pfn(pfns).all()
        assert not (pfns & np.uint64(pm.HMM_PFN_WRITE)).any()
        assert buf[0] == pattern(PAGES)[0]
        assert not int(self.snapshot(mm, buf, None)[0]) & pm.HMM_PFN_WRITE
        buf[0] = 1
        assert int(self.snapshot(mm, buf, None)[0]) & pm.HMM_PFN_WRITE


class TestAccessByTheDevice:
    """A device reads and writes its own memory where it is."""

    def test_it_stays_there(self, mm: pm.AddressSpace, vram: pm.DeviceMemory) -> None:
        buf, dev = patterned(mm), vram.device
        to_device(buf, vram)
        mapped(mm, buf, vram)
        assert dev.read(mm, buf.addr, buf.size) == pattern(PAGES).tobytes()
        dev.write(mm, buf.addr + PAGE - 2, b"over the edge")
        assert vram.used == buf.size
        assert mm.stats()["device_faults"] == 0
        assert bytes(buf[PAGE - 2 : PAGE + 11]) == b"over the edge"
        assert vram.used == buf.size - 2 * PAGE

    def test_pages_here_and_there(self, mm: pm.AddressSpace, vram: pm.DeviceMemory) -> None:
        buf, dev = patterned(mm), vram.device
        for page in range(0, PAGES, 3):
            pm.migrate_to_device(mm, buf.addr + page * PAGE, buf.addr + (page + 1) * PAGE, vram)
        mapped(mm, buf, vram)
        assert dev.read(mm, buf.addr, buf.size) == pattern(PAGES).tobytes()
        dev.write(mm, buf.addr, pattern(PAGES)[::-1].tobytes())
        assert bytes(buf[:]) == pattern(PAGES)[::-1].tobytes()

    def test_what_nobody_touched(self, mm: pm.AddressSpace, vram: pm.DeviceMemory) -> None:
        buf, dev = mm.mmap(PAGES * PAGE), vram.device
        to_device(buf, vram)
        mapped(mm, buf, vram)
        assert dev.read(mm, buf.addr, buf.size) == bytes(buf.size)
        dev.write(mm, buf.addr + 7, b"first")
        assert bytes(buf[7:12]) == b"first"

    def test_a_cpu_fault_fences_its_entry(self, mm: pm.AddressSpace, vram: pm.DeviceMemory) -> None:
        buf, dev = patterned(mm), vram.device
        to_device(buf, vram)
        mapped(mm, buf, vram)
        dev.set_fault_handler(None)
        buf[2 * PAGE] = 9
        with pytest.raises(pm.MirrorError) as refused:
            dev.read(mm, buf.addr + 2 * PAGE, 1)
        assert refused.value.errno == errno.EFAULT
        assert dev.read(mm, buf.addr, PAGE) == pattern(PAGES)[:PAGE].tobytes()


def mapped(mm: pm.AddressSpace, buf: pm.Region, vram: pm.DeviceMemory) -> None:
    """Map all of it for the device, its own memory as it is."""
    pfns = np.zeros(buf.size // PAGE, np.uint64)
    lock = pm.DriverLock()

    def invalidate(sub: pm.IntervalNotifier, update: pm.MmuNotifierRange, seq: int) -> bool:
        with lock:
            sub.set_seq(seq)
            vram.device.page_table.clear(update.start, update.end)
        return True

    sub = pm.IntervalNotifier(mm, buf.addr, buf.size, invalidate)
    seq = sub.read_begin()
    pm.hmm_range_fault(
        sub,
        buf.addr,
        buf.addr + buf.size,
        pfns,
        default_flags=pm.HMM_PFN_REQ_FAULT | pm.HMM_PFN_REQ_WRITE,
        seq=seq,
        dev_private_owner=vram.owner,
    )
    with lock:
        assert vram.device.page_table.map(sub, seq, buf.addr, pfns)


class TestSystemCalls:
    @pytest.mark.parametrize("mm", ["thread"], indirect=True)
    def test_files(self, mm: pm.AddressSpace, vram: pm.DeviceMemory) -> None:
        buf, read, write = patterned(mm), *os.pipe()
        to_device(buf, vram)
        content = pattern(PAGES)
        os.write(write, memoryview(buf)[:PAGE])
        assert os.read(read, PAGE) == content[:PAGE].tobytes()
        os.write(write, b"from a pipe")
        os.readv(read, [memoryview(buf)[9 * PAGE : 10 * PAGE]])
        os.close(read)
        os.close(write)
        content[9 * PAGE : 9 * PAGE + 11] = np.frombuffer(b"from a pipe", np.uint8)
        assert bytes(buf) == content.tobytes()

    def test_threads_that_hold_the_gil(self, mm: pm.AddressSpace, vram: pm.DeviceMemory) -> None:
        buf = patterned(mm)
        wrong: list[int] = []

        def look() -> None:
            wrong.extend(i for i in range(0, PAGES * PAGE, PAGE) if buf[i] != int(expected[i]))

        expected = pattern(PAGES)
        threads = [threading.Thread(target=look) for _ in range(4)]
        for thread in threads:
            thread.start()
        for _ in range(20):
            to_device(buf, vram)
        for thread in threads:
            thread.join()
        assert not wrong
        assert intact(buf)


class TestEnds:
    def test_closing_the_memory(self, mm: pm.AddressSpace) -> None:
        vram = pm.DeviceMemory(pm.Device("d7"), pm.MiB)
        buf = patterned(mm)
        to_device(buf, vram)
        vram.close()
        vram.close()
        assert mm.stats()["device_to_system"] == PAGES
        assert intact(buf)
        assert errno_of(to_device, buf, vram) == errno.EINVAL

    @pytest.mark.parametrize("delivery", ["thread", "inline"])
    def test_closing_the_address_space(self, delivery: str) -> None:
        vram = pm.DeviceMemory(pm.Device("d8"), pm.MiB)
        mm = pm.AddressSpace(fault_delivery=delivery)
        buf = patterned(mm)
        view = np.frombuffer(buf, np.uint8)
        to_device(buf, vram)
        mm.close()
        assert vram.used == 0
        assert np.array_equal(view, pattern(PAGES))
        vram.close()

    @pytest.mark.parametrize("delivery", ["thread", "inline"])
    @pytest.mark.parametrize("touched", [True, False])
    def test_closing_the_address_space_where_pages_do_not_move(self, touched: bool, delivery: str) -> None:
        vram = pm.DeviceMemory(pm.Device("d9"), pm.MiB)
        mm = pm.AddressSpace(fault_delivery=delivery)
        buf = patterned(mm, 1) if touched else mm.mmap(PAGE)
        view = np.frombuffer(buf, np.uint8)
        assert to_device(buf, vram) == 1
        if touched:
            mm.mprotect(buf.addr, PAGE, mmap.PROT_READ)
        mm.close()
        assert vram.used == 0
        assert np.array_equal(view, pattern(1) if touched else np.zeros(PAGE, np.uint8))
        vram.close()

    @pytest.mark.parametrize("delivery", ["thread", "inline"])
    @pytest.mark.parametrize("ending", ["pass", "import os; os._exit(0)", "raise SystemExit(0)"])
    def test_the_interpreters_exit(self, ending: str, delivery: str) -> None:
        program = (
            "import pymirror as pm\n"
            f"mm = pm.AddressSpace(fault_delivery={delivery!r})\n"
            "buf = mm.mmap(1 << 20)\n"
            "vram = pm.DeviceMemory(pm.Device('d'), 1 << 20)\n"
            "assert pm.migrate_to_device(mm, buf.addr, buf.addr + buf.size, vram) == 256\n" + ending
        )
        done = subprocess.run([sys.executable, "-c", program], timeout=60, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")


def test_a_child_in_a_pid_namespace_of_its_own() -> None:
    """Its parent has no number there, and is alive all the same."""
    program = (
        "import ctypes, os\n"
        "import numpy as np, pymirror as pm\n"
        "with pm.AddressSpace() as mm, pm.DeviceMemory(pm.Device('d'), 64 * pm.MiB) as vram:\n"
        "    buf = mm.mmap(64 * pm.MiB)\n"
        "    np.frombuffer(buf, np.uint8)[:] = 7\n"
        "    pm.migrate_to_device(mm, buf.addr, buf.addr + buf.size, vram)\n"
        "    assert ctypes.CDLL(None).unshare(0x20000000) == 0\n"
        "    if (pid := os.fork()) == 0:\n"
        "        os._exit(ctypes.string_at(buf.addr + buf.size - 1, 1)[0])\n"
        "    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, timeout=60, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
