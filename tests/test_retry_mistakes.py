"""Two mistakes of a retry loop, by name: a sequence from outside the loop, a look without the lock."""

from __future__ import annotations

import errno
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
from mirroring import FAULT, PAGE, filled
from notifying import invalidate
from seams import Background, errno_of

import pymirror as pm
from pymirror.pfn import PfnArray

PAGES = 4


class Locked:
    """A driver whose notifier knows its lock."""

    def __init__(self, mm: pm.AddressSpace, *, take: bool = True) -> None:
        self.mm = mm
        self.lock = pm.DriverLock("driver->update")
        self.take = take
        self.device = pm.Device("d")
        self.buf = filled(mm, PAGES)
        self.pfns: PfnArray = np.zeros(PAGES, np.uint64)
        self.sub = pm.IntervalNotifier(
            mm, self.buf.addr, self.buf.size, self.invalidate, update_lock=self.lock
        )

    def invalidate(self, sub: pm.IntervalNotifier, update: pm.MmuNotifierRange, seq: int) -> bool:
        if not self.take:
            sub.set_seq(seq)
            return True
        with self.lock:
            sub.set_seq(seq)
            self.device.page_table.clear(update.start, update.end)
        return True

    def fault(self, seq: int) -> None:
        pm.hmm_range_fault(
            self.sub,
            self.buf.addr,
            self.buf.addr + self.buf.size,
            self.pfns,
            seq=seq,
            default_flags=FAULT,
        )


@pytest.fixture
def driver(mm: pm.AddressSpace) -> Iterator[Locked]:
    made = Locked(mm)
    yield made
    made.sub.remove()


class TestTheLock:
    def test_read_retry_without_it_is_named(self, driver: Locked) -> None:
        seq = driver.sub.read_begin()
        with pytest.raises(pm.MirrorError, match=r"read_retry of .* without 'driver->update'") as caught:
            driver.sub.read_retry(seq)
        assert caught.value.errno == errno.EPERM
        with driver.lock:
            assert not driver.sub.read_retry(seq)

    def test_check_retry_needs_none(self, driver: Locked) -> None:
        assert not driver.sub.check_retry(driver.sub.read_begin())

    def test_another_thread_that_holds_it_is_no_help(self, driver: Locked) -> None:
        seq = driver.sub.read_begin()
        with driver.lock:
            assert Background(errno_of, driver.sub.read_retry, seq).result() == errno.EPERM

    def test_nor_is_another_lock(self, driver: Locked) -> None:
        seq = driver.sub.read_begin()
        with pm.DriverLock("another"):
            assert errno_of(driver.sub.read_retry, seq) == errno.EPERM

    def test_programming_a_page_table_needs_it(self, driver: Locked) -> None:
        seq = driver.sub.read_begin()
        driver.fault(seq)
        program = driver.device.page_table.map
        assert errno_of(program, driver.sub, seq, driver.buf.addr, driver.pfns) == errno.EPERM
        assert driver.device.page_table.stats()["entries"] == 0
        with driver.lock:
            assert program(driver.sub, seq, driver.buf.addr, driver.pfns)

    def test_mapping_a_pfn_for_dma_needs_it(self, driver: Locked) -> None:
        dma = pm.hmm_dma_map_alloc(driver.device, driver.sub, driver.buf.addr, PAGES)
        seq = driver.sub.read_begin()
        driver.fault(seq)
        dma.pfn_list[:] = driver.pfns
        assert errno_of(pm.hmm_dma_map_pfn, driver.device, dma, 0, seq=seq) == errno.EPERM
        with driver.lock:
            assert pm.hmm_dma_map_pfn(driver.device, dma, 0, seq=seq) != pm.DMA_MAPPING_ERROR
        pm.hmm_dma_unmap_pfn(driver.device, dma, 0)
        pm.hmm_dma_map_free(driver.device, dma)

    def test_a_callback_without_it_is_reported(self, mm: pm.AddressSpace) -> None:
        driver = Locked(mm, take=False)
        invalidate(mm, driver.buf.addr)
        (reported,) = mm.errors
        assert "set_seq of" in str(reported.exception)
        assert "without 'driver->update'" in str(reported.exception)
        driver.sub.remove()

    def test_a_notifier_without_a_lock_is_not_looked_at(self, mm: pm.AddressSpace) -> None:
        buf = filled(mm, 1)
        sub = pm.IntervalNotifier(mm, buf.addr, PAGE, lambda sub, update, seq: sub.set_seq(seq))
        assert not sub.read_retry(sub.read_begin())
        sub.remove()


class TestTheSequence:
    def refuse(self, driver: Locked, seq: int, times: int) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(times):
                assert errno_of(driver.fault, seq) == errno.EBUSY
        assert {warning.category for warning in caught} <= {RuntimeWarning}
        assert {warning.filename for warning in caught} <= {__file__}
        return [str(warning.message) for warning in caught]

    def test_one_that_was_refused_is_named_when_it_comes_again(self, driver: Locked) -> None:
        seq = driver.sub.read_begin()
        invalidate(driver.mm, driver.buf.addr)
        (told,) = self.refuse(driver, seq, 10)
        assert f"sequence {seq}" in told
        assert "inside the retry loop" in told

    def test_a_race_lost_is_no_mistake(self, driver: Locked) -> None:
        for _ in range(5):
            seq = driver.sub.read_begin()
            invalidate(driver.mm, driver.buf.addr)
            assert self.refuse(driver, seq, 2) == []

    def test_a_sequence_that_stands_is_refused_for_another_reason(
        self, driver: Locked, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        refused = pm.MirrorError(errno.EBUSY, "it cannot be had at the moment")
        monkeypatch.setattr("pymirror.walk.walk_error", lambda *_: refused)
        driver.mm.munmap(driver.buf.addr, PAGE)
        assert self.refuse(driver, driver.sub.read_begin(), 5) == []

    def test_notifiers_that_come_and_go_with_the_same_number_make_no_mistake(self) -> None:
        for _ in range(5):
            with pm.AddressSpace() as mm:
                driver = Locked(mm)
                seq = driver.sub.read_begin()
                invalidate(mm, driver.buf.addr)
                assert self.refuse(driver, seq, 1) == []
                driver.sub.remove()

    def test_many_threads_that_lose_the_same_race_make_no_mistake(self, driver: Locked) -> None:
        seq = driver.sub.read_begin()
        invalidate(driver.mm, driver.buf.addr)
        threads = [Background(errno_of, driver.fault, seq) for _ in range(5)]
        assert [thread.result() for thread in threads] == [errno.EBUSY] * 5
