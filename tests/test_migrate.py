# SPDX-License-Identifier: MIT
"""Device memory: pages move there, and come home by call, by a touch of the CPU, at close; none is lost."""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from typing import Any

import numpy as np
import pytest
from migrating import PAGES, intact, pattern, patterned, to_device
from mirroring import PAGE, every_delivery
from racing import in_child
from seams import WAIT_S, errno_of, needs

import pymirror as pm

pytestmark = [pytest.mark.root, pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")]


mm = every_delivery


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
        needs("uffd_kernel")
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
