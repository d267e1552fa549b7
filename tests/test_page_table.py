"""The device page table: fenced by native code, cleared by callbacks, and what a forgotten clear becomes."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import pickle
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from mirroring import FaultDriver, filled
from seams import Background, errno_of, foreign, needs, points

import pymirror as pm
from pymirror.page_table import PM_ENTRY_FENCED, PM_ENTRY_VALID, PM_ENTRY_WRITE

PAGE = 4096
WHOLE = 1 << 64
FAULT = pm.HMM_PFN_REQ_FAULT
WRITE = pm.HMM_PFN_REQ_FAULT | pm.HMM_PFN_REQ_WRITE


@pytest.fixture
def driver(mm: pm.AddressSpace) -> Iterator[FaultDriver]:
    with FaultDriver(mm) as driver:
        yield driver


def has(entries: Any, bit: int) -> list[bool]:
    return ((entries & np.uint64(bit)) != 0).tolist()


def test_its_repr_says_whose_it_is_and_what_is_in_it(mm: pm.AddressSpace, driver: FaultDriver) -> None:
    table = driver.device.page_table
    assert repr(table) == "<PageTable, empty>"
    buf = filled(mm, 4)
    driver.map(buf.addr, buf.addr + buf.size)
    assert repr(table) == f"<PageTable of {mm!r}, 4 entries>"
    driver.clears = False
    mm.madvise(buf.addr, PAGE, mmap.MADV_DONTNEED)
    assert repr(table) == f"<PageTable of {mm!r}, 4 entries, 1 fenced>"
    table.clear(0, WHOLE)
    mm.close()
    assert repr(table) == f"<PageTable of {mm!r}, 0 entries>"


@pytest.mark.needs("process_vm")
class TestFenceAndClear:
    def test_an_operation_fences_and_the_callback_clears(
        self, mm: pm.AddressSpace, driver: FaultDriver
    ) -> None:
        buf = filled(mm, 4)
        driver.map(buf.addr, buf.addr + buf.size)
        table = driver.device.page_table
        mm.madvise(buf.addr + PAGE, PAGE, mmap.MADV_DONTNEED)
        assert has(table.entries(buf.addr, buf.addr + buf.size), PM_ENTRY_VALID) == [True, False, True, True]
        assert table.stats()["entries"] == 3
        assert driver.device.read(mm, buf.addr + PAGE, PAGE) == bytes(PAGE)

    def test_access_before_the_callback_ran_is_an_ordinary_fault(
        self, mm: pm.AddressSpace, driver: FaultDriver
    ) -> None:
        buf = filled(mm, 1)
        driver.map(buf.addr, buf.addr + PAGE)
        table = driver.device.page_table
        with points("INVALIDATE_FENCED") as fenced:
            operation = Background(mm.madvise, buf.addr, PAGE, mmap.MADV_DONTNEED)
            fenced.wait()
            (entry,) = table.entries(buf.addr, buf.addr + PAGE)
            assert entry & PM_ENTRY_FENCED
            assert not entry & PM_ENTRY_VALID
            read = Background(driver.device.read, mm, buf.addr, PAGE)
            assert read.stays()
            fenced.release()
            operation.result()
            assert read.result() == bytes(PAGE)
        assert driver.device.stats.fenced >= 1
        assert driver.device.stats.stale == 0

    def test_a_forgotten_clear_is_found_out_with_both_histories(
        self, mm: pm.AddressSpace, driver: FaultDriver
    ) -> None:
        buf = filled(mm, 2)
        driver.map(buf.addr, buf.addr + buf.size)
        driver.clears = False
        mm.madvise(buf.addr + PAGE, PAGE, mmap.MADV_DONTNEED)
        assert driver.device.read(mm, buf.addr, PAGE) == bytes(buf)[:PAGE]
        with pytest.raises(pm.StaleAccessError) as found:
            driver.device.read(mm, buf.addr, buf.size)
        stale = found.value
        assert (stale.errno, stale.addr) == (errno.EFAULT, buf.addr + PAGE)
        assert stale.mapped is not None
        assert os.path.basename(stale.mapped.file) == "mirroring.py"
        assert stale.mapped.start == buf.addr
        assert stale.invalidated is not None
        assert (stale.invalidated.event, stale.invalidated.guarantee) == (pm.Event.CLEAR, "before")
        assert (stale.invalidated.start, stale.invalidated.end) == (buf.addr + PAGE, buf.addr + 2 * PAGE)
        for part in (
            "mirroring.py:",
            "CLEAR",
            "before",
            f"{buf.addr + PAGE:#x}",
            f"seq {stale.mapped.seq}",
            "ms ago",
        ):
            assert part in str(stale)
        assert driver.device.stats.stale == 1
        copy = pickle.loads(pickle.dumps(stale))
        assert (str(copy), copy.errno) == (str(stale), errno.EFAULT)
        driver.device.page_table.clear(0, WHOLE)
        driver.clears = True
        assert driver.device.read(mm, buf.addr + PAGE, PAGE) == bytes(PAGE)

    def test_mapping_again_over_fenced_entries_makes_them_good(
        self, mm: pm.AddressSpace, driver: FaultDriver
    ) -> None:
        buf = filled(mm, 1)
        driver.map(buf.addr, buf.addr + PAGE)
        driver.clears = False
        mm.madvise(buf.addr, PAGE, mmap.MADV_DONTNEED)
        assert driver.device.page_table.stats()["fenced"] == 1
        driver.map(buf.addr, buf.addr + PAGE)
        assert driver.device.page_table.stats()["fenced"] == 0
        assert driver.device.read(mm, buf.addr, PAGE) == bytes(PAGE)

    def test_a_read_that_an_invalidation_overtakes_is_done_again(
        self, mm: pm.AddressSpace, driver: FaultDriver
    ) -> None:
        buf = filled(mm, 1)
        driver.map(buf.addr, buf.addr + PAGE)
        with points("ACCESS_COPIED") as copied:
            read = Background(driver.device.read, mm, buf.addr, PAGE)
            copied.wait()
            mm.madvise(buf.addr, PAGE, mmap.MADV_DONTNEED)
            copied.release()
            assert read.result() == bytes(PAGE)
        assert driver.device.stats.redone == 1

    def test_an_operation_waits_for_a_write_in_flight(self, mm: pm.AddressSpace, driver: FaultDriver) -> None:
        buf = filled(mm, 1)
        driver.map(buf.addr, buf.addr + PAGE, WRITE)
        with points("ACCESS_LOOKED_UP") as looked_up:
            write = Background(driver.device.write, mm, buf.addr, b"x" * PAGE)
            looked_up.wait()
            zap = Background(mm.madvise, buf.addr, PAGE, mmap.MADV_DONTNEED)
            assert zap.stays()
            looked_up.release()
            write.result()
            zap.result()
        assert bytes(buf) == bytes(PAGE)

    def test_memory_changed_unseen_is_detected_at_the_access(
        self, mm: pm.AddressSpace, driver: FaultDriver
    ) -> None:
        needs("pagemap")
        buf = filled(mm, 2, shared=True)
        driver.map(buf.addr, buf.addr + buf.size)
        seen = []
        sub = pm.IntervalNotifier(
            mm, buf.addr, buf.size, lambda sub, range, seq: (sub.set_seq(seq), seen.append(range))
        )
        offset, length = ctypes.c_long(PAGE), ctypes.c_long(PAGE)
        assert ctypes.CDLL(None).fallocate(buf.fd, 3, offset, length) == 0
        assert driver.device.read(mm, buf.addr, buf.size) == bytes(buf)
        assert driver.device.stats.detected == 1
        (update,) = seen
        assert (update.guarantee, update.start, update.end) == (
            "detected",
            buf.addr + PAGE,
            buf.addr + 2 * PAGE,
        )
        sub.remove()

    def test_a_foreign_munmap_is_never_read_through(self, mm: pm.AddressSpace, driver: FaultDriver) -> None:
        needs("uffd_events")
        buf = filled(mm, 2)
        start = buf.addr
        driver.map(start, start + 2 * PAGE)
        foreign.munmap(start, 2 * PAGE)
        assert errno_of(driver.device.read, mm, start, PAGE) == errno.EFAULT
        mm.sync()
        assert driver.device.page_table.stats()["entries"] == 0

    def test_reader_against_a_thread_that_remaps(self, mm: pm.AddressSpace, driver: FaultDriver) -> None:
        """Every page holds one value in all its bytes; a read that mixes two used a stale entry."""
        buf = mm.mmap(16 * PAGE)
        view = np.frombuffer(buf, np.uint8).reshape(16, PAGE)
        stop = threading.Event()

        def zap() -> int:
            rounds = 0
            while not stop.is_set():
                mm.madvise(buf.addr, buf.size, mmap.MADV_DONTNEED)
                rounds += 1
                time.sleep(0.0003)
            return rounds

        zapper = Background(zap)
        try:
            for value in range(1, 200):
                driver.device.write(mm, buf.addr, bytes([value]) * buf.size)
                pages = np.frombuffer(driver.device.read(mm, buf.addr, buf.size), np.uint8).reshape(16, PAGE)
                assert (pages == pages[:, :1]).all()
                assert np.isin(pages[:, 0], (0, value)).all()
        finally:
            stop.set()
            assert zapper.result() > 0
        assert not mm.errors
        assert driver.device.stats.stale == 0
        assert view.shape == (16, PAGE)


class TestPageTable:
    def test_map_needs_the_sequence_of_now(self, mm: pm.AddressSpace, driver: FaultDriver) -> None:
        buf = filled(mm, 2)
        table = driver.device.page_table
        with driver.range(buf.addr, buf.addr + buf.size) as rng:
            rng.default_flags = WRITE
            seq = rng.fault()
            assert table.map(rng, seq)
            entries = table.entries(buf.addr, buf.addr + buf.size)
            assert has(entries, PM_ENTRY_VALID) == has(entries, PM_ENTRY_WRITE) == [True, True]
            with mm.invalidate(buf.addr, buf.addr + PAGE):
                assert not table.map(rng, seq)
            assert not table.map(rng, seq)
            stats = table.stats()
            assert (stats["entries"], stats["fenced"]) == (1, 0)

    def test_map_of_the_modern_form(self, mm: pm.AddressSpace) -> None:
        buf = filled(mm, 4)
        device = pm.Device("modern")

        def take(sub: pm.IntervalNotifier, range: pm.MmuNotifierRange, seq: int) -> bool:
            sub.set_seq(seq)
            device.page_table.clear(range.start, range.end)
            return True

        sub = pm.IntervalNotifier(mm, 0, WHOLE, take)
        pfns = np.zeros(4, np.uint64)
        seq = sub.read_begin()
        pm.hmm_range_fault(sub, buf.addr, buf.addr + buf.size, pfns, default_flags=FAULT, seq=seq)
        assert device.page_table.map(sub, seq, buf.addr + PAGE, pfns[1:3])
        assert device.read(mm, buf.addr + PAGE, 2 * PAGE) == bytes(buf)[PAGE : 3 * PAGE]
        assert device.page_table.next() == buf.addr + PAGE
        mm.madvise(buf.addr, buf.size, mmap.MADV_DONTNEED)
        assert device.page_table.next() is None
        assert not device.page_table.map(sub, seq, buf.addr, pfns)
        assert errno_of(device.page_table.map, sub, seq) == errno.EINVAL
        sub.remove()

    def test_an_interval_notifier_maps_its_own_memory_only(self, mm: pm.AddressSpace) -> None:
        buf = filled(mm, 2)
        device = pm.Device("d")
        sub = pm.IntervalNotifier(mm, buf.addr, PAGE, lambda sub, range, seq: sub.set_seq(seq))
        pfns = np.full(1, pm.HMM_PFN_VALID, np.uint64)
        assert errno_of(device.page_table.map, sub, sub.read_begin(), buf.addr + PAGE, pfns) == errno.EINVAL
        sub.remove()

    def test_pages_without_valid_are_left_out(self, mm: pm.AddressSpace, driver: FaultDriver) -> None:
        buf = mm.mmap(4 * PAGE)
        memoryview(buf).cast("B")[2 * PAGE] = 1
        with driver.range(buf.addr, buf.addr + buf.size) as rng:
            assert driver.device.page_table.map(rng, rng.snapshot())
        assert driver.device.page_table.next(buf.addr, buf.addr + buf.size) == buf.addr + 2 * PAGE
        assert driver.device.page_table.stats()["entries"] == 1

    def test_clear_and_next(self, mm: pm.AddressSpace, driver: FaultDriver) -> None:
        buf = filled(mm, 8)
        table = driver.device.page_table
        driver.map(buf.addr, buf.addr + buf.size)
        assert table.clear(buf.addr + 2 * PAGE, buf.addr + 4 * PAGE) == 2
        assert table.clear(buf.addr + 2 * PAGE, buf.addr + 4 * PAGE) == 0
        assert table.clear(buf.addr, buf.addr) == 0
        assert table.clear(buf.addr + PAGE, buf.addr) == 0
        assert table.next(buf.addr + 2 * PAGE) == buf.addr + 4 * PAGE
        assert table.next(buf.addr + 2 * PAGE, buf.addr + 4 * PAGE) is None
        assert table.next(buf.addr, buf.addr) is None
        assert table.clear(0, WHOLE) == 6
        assert table.stats()["entries"] == 0

    def test_mapping_file_memory_watches_it(self, mm: pm.AddressSpace, driver: FaultDriver) -> None:
        needs("uffd_events")
        buf = filled(mm, 4, shared=True)
        with driver.range(buf.addr, buf.addr + buf.size) as rng:
            rng.default_flags = FAULT
            seq = rng.fault()
            assert mm.stats()["watched_bytes"] == 0
            assert driver.device.page_table.map(rng, seq)
            assert mm.stats()["watched_bytes"] == buf.size

    def test_wrong_use(self, mm: pm.AddressSpace, driver: FaultDriver) -> None:
        buf = filled(mm, 1)
        table = driver.device.page_table
        assert errno_of(table.map, driver.range(buf.addr, buf.addr + PAGE), 1) == errno.EINVAL
        for start, end in [(1, PAGE), (0, 1), (PAGE, PAGE), (PAGE, 0)]:
            assert errno_of(table.entries, start, end) == errno.EINVAL

    def test_a_device_lives_on_after_its_mm(self) -> None:
        mm = pm.AddressSpace()
        driver = FaultDriver(mm)
        buf = filled(mm, 1)
        assert driver.device.read(mm, buf.addr, PAGE) == bytes(buf)
        mm.close()
        assert errno_of(driver.device.read, mm, buf.addr, PAGE) in (errno.EFAULT, errno.ESRCH)
        driver.device.page_table.clear(0, WHOLE)
        with pm.AddressSpace() as other, FaultDriver(other) as again:
            again.device = driver.device
            driver.device.set_fault_handler(again.handle)
            new = filled(other, 1)
            assert driver.device.read(other, new.addr, PAGE) == bytes(new)

    def test_a_forked_child(self, mm: pm.AddressSpace, driver: FaultDriver) -> None:
        buf = filled(mm, 1)
        driver.map(buf.addr, buf.addr + PAGE)
        child = os.fork()
        if child == 0:
            bad = errno_of(driver.device.read, mm, buf.addr, 1)
            os._exit(0 if bad == errno.ESRCH else 1)
        assert os.waitpid(child, 0)[1] == 0

    def test_a_refused_invalidation_leaves_nothing_stale(self, mm: pm.AddressSpace) -> None:
        """Who may refuse and does has made no mistake: the access is an ordinary fault."""

        class Refuses(FaultDriver):
            def sync_cpu_device_pagetables(self, update: pm.MmuNotifierRange) -> Any:
                return False if not update.blockable else super().sync_cpu_device_pagetables(update)

        buf = filled(mm, 2)
        with Refuses(mm) as driver:
            assert driver.device.read(mm, buf.addr, 2 * PAGE) == bytes(buf)
            with (
                pytest.raises(pm.MirrorError, match="EAGAIN"),
                mm.invalidate(buf.addr, buf.addr + PAGE, blockable=False),
            ):
                pytest.fail("the body ran")
            assert driver.device.page_table.stats()["fenced"] == 0
            assert driver.device.read(mm, buf.addr, 2 * PAGE) == bytes(buf)
            assert (driver.device.stats.stale, driver.device.stats.missing) == (0, 2)


class TestTlb:
    """Translations that the device caches: counted, and flushed with what they translate."""

    def test_counts(self, mm: pm.AddressSpace) -> None:
        buf = filled(mm, 80)
        with FaultDriver(mm) as driver:
            table = driver.device.page_table
            driver.device.read(mm, buf.addr, 4 * PAGE)
            before = table.stats()
            for _ in range(3):
                driver.device.read(mm, buf.addr, 4 * PAGE)
            after = table.stats()
            assert after["tlb_hits"] - before["tlb_hits"] == 12
            assert after["tlb_misses"] == before["tlb_misses"]
            mm.mprotect(buf.addr, PAGE, 1)
            assert table.stats()["tlb_flushed"] == after["tlb_flushed"] + 1
            driver.device.read(mm, buf.addr, PAGE)
            assert table.stats()["tlb_misses"] > after["tlb_misses"]

    def test_it_is_small(self, mm: pm.AddressSpace) -> None:
        buf = filled(mm, 80)
        with FaultDriver(mm) as driver:
            for _ in range(2):
                driver.device.read(mm, buf.addr, buf.size)
            before = driver.device.page_table.stats()
            driver.device.read(mm, buf.addr, buf.size)
            after = driver.device.page_table.stats()
            # 80 pages in 64 places: 16 of these are wanted by two pages.
            assert after["tlb_hits"] - before["tlb_hits"] == 80 - 32
