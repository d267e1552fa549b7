"""Mirrors and ranges: registration, waiting, validity, and the end of the mm they look at."""

from __future__ import annotations

import errno
import gc
import mmap
import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from mirroring import FAULT, PAGE, Driver, valid, whole
from notifying import invalidate
from seams import WAIT_S, Background, errno_of, foreign, inject, needs

import pymirror as pm


@pytest.fixture
def driver(mm: pm.AddressSpace) -> Iterator[Driver]:
    with Driver(mm) as driver:
        yield driver


class TestHmm:
    def test_mirrors_and_ranges_of_an_mm_share_one(self, mm: pm.AddressSpace) -> None:
        buf = mm.mmap(PAGE)
        with Driver(mm) as one, Driver(mm) as two, one.range(buf.addr, buf.addr + PAGE) as rng:
            assert one.hmm is two.hmm is pm.Hmm.get(mm)
            assert not one.hmm.dead
            assert rng.registered

    def test_it_lives_as_long_as_somebody_uses_it(self, mm: pm.AddressSpace) -> None:
        buf = mm.mmap(PAGE)
        with Driver(mm) as driver:
            rng = whole(driver, buf)
            rng.register()
            first = id(pm.Hmm.get(mm))
        assert id(pm.Hmm.get(mm)) == first
        rng.snapshot()
        rng.unregister()

    def test_two_address_spaces_have_two(self, mm: pm.AddressSpace) -> None:
        with pm.AddressSpace() as other, Driver(mm) as one, Driver(other) as two:
            assert one.hmm is not two.hmm


class TestMirror:
    def test_every_mirror_is_told(self, mm: pm.AddressSpace) -> None:
        buf = mm.mmap(2 * PAGE)
        with Driver(mm) as one, Driver(mm) as two:
            mm.madvise(buf.addr, PAGE, mmap.MADV_DONTNEED)
            for driver in (one, two):
                (update,) = driver.updates
                assert (update.start, update.end, update.event) == (buf.addr, buf.addr + PAGE, pm.Event.CLEAR)

    def test_unregister_is_idempotent_and_ends_the_callbacks(self, mm: pm.AddressSpace) -> None:
        driver = Driver(mm)
        driver.unregister()
        driver.unregister()
        invalidate(mm, 0)
        assert driver.updates == []
        assert not driver.mm_is_alive()
        rng = driver.range(0x1000, 0x2000)
        assert errno_of(rng.register) == errno.EFAULT

    def test_release_comes_once_with_ranges_invalid_and_waiters_awake(self) -> None:
        mm = pm.AddressSpace()
        buf = mm.mmap(PAGE)
        seen: list[Any] = []

        class Dying(Driver):
            def release(self) -> None:
                super().release()
                seen.extend([rng.valid, self.mm_is_alive(), self.hmm.dead])

        driver = Dying(mm)
        rng = whole(driver, buf)
        rng.register()
        assert rng.valid
        mm.close()
        mm.close()
        assert driver.released == 1
        assert seen == [False, False, True]
        driver.unregister()
        rng.unregister()

    def test_no_release_after_unregister(self) -> None:
        mm = pm.AddressSpace()
        driver = Driver(mm)
        driver.unregister()
        mm.close()
        assert driver.released == 0

    def test_eagain_of_a_mirror_is_not_lost_when_not_blockable(self, mm: pm.AddressSpace) -> None:
        class Busy(Driver):
            def sync_cpu_device_pagetables(self, update: pm.MmuNotifierRange) -> int:
                return -errno.EAGAIN if not update.blockable else 0

        with Busy(mm):
            assert errno_of(invalidate, mm, 0, blockable=False) == errno.EAGAIN
            invalidate(mm, 0)
        assert not mm.errors

    def test_a_plain_mirror_will_do(self, mm: pm.AddressSpace) -> None:
        buf = mm.mmap(PAGE)
        with pm.Mirror(mm) as mirror, mirror.range(buf.addr, buf.addr + PAGE) as rng:
            assert rng.snapshot() == rng.seq


class TestRangeRegistration:
    @pytest.mark.parametrize(
        ("start", "end"),
        [
            (0x1001, 0x2000),
            (0x1000, 0x2001),
            (0x1000, 0x1000),
            (0x2000, 0x1000),
            (0, (1 << 47) + PAGE),
            (-PAGE, PAGE),
            (1 << 64, (1 << 64) + PAGE),
        ],
    )
    def test_bad_intervals_are_einval(self, driver: Driver, start: int, end: int) -> None:
        assert errno_of(driver.range, start, end) == errno.EINVAL

    def test_the_end_of_the_address_space_is_a_good_end(self, driver: Driver) -> None:
        with driver.range((1 << 47) - PAGE, 1 << 47) as rng:
            assert errno_of(rng.snapshot) == errno.EFAULT

    def test_register_and_unregister_are_idempotent(self, mm: pm.AddressSpace, driver: Driver) -> None:
        buf = mm.mmap(PAGE)
        rng = whole(driver, buf)
        subs = mm.stats()["subs"]
        rng.register()
        rng.register()
        assert mm.stats()["subs"] == subs + 1
        rng.unregister()
        rng.unregister()
        assert mm.stats()["subs"] == subs
        rng.register()
        assert rng.valid
        rng.unregister()

    def test_a_forgotten_range_leaves_the_tree_with_its_last_reference(
        self, mm: pm.AddressSpace, driver: Driver
    ) -> None:
        buf = mm.mmap(PAGE)
        rng = whole(driver, buf)
        rng.register()
        del rng
        gc.collect()
        assert mm.stats()["subs"] == 0

    def test_unregistered_is_einval_and_keeps_its_pfns(self, mm: pm.AddressSpace, driver: Driver) -> None:
        buf = mm.mmap(PAGE)
        rng = whole(driver, buf)
        for call in (rng.snapshot, rng.fault, rng.wait_until_valid):
            assert errno_of(call) == errno.EINVAL
        with rng:
            rng.fault()
        assert valid(rng.pfns) == [True]
        assert not rng.valid
        assert errno_of(rng.fault) == errno.EINVAL

    def test_registering_watches_the_memory(self, mm: pm.AddressSpace, driver: Driver) -> None:
        needs("uffd_events")
        buf = mm.mmap(4 * PAGE)
        with whole(driver, buf):
            assert mm.stats()["watched_bytes"] >= buf.size

    def test_a_failure_to_watch_registers_nothing(self, mm: pm.AddressSpace, driver: Driver) -> None:
        needs("uffd_events")
        buf = mm.mmap(4 * PAGE)
        rng = whole(driver, buf)
        with inject("USERFAULTFD", err=errno.EMFILE), inject("OPEN", err=errno.EMFILE):
            failed = errno_of(rng.register)
        if failed:
            assert not rng.registered
            assert mm.stats()["subs"] == 0
        else:
            rng.unregister()

    def test_pfns_take_values_and_stay_in_place(self, mm: pm.AddressSpace, driver: Driver) -> None:
        buf = mm.mmap(2 * PAGE)
        rng = whole(driver, buf, 0)
        array = rng.pfns
        rng.pfns = [FAULT, 0]
        assert rng.pfns is array
        with rng:
            rng.fault()
            assert valid(rng.pfns) == [True, False]
        with pytest.raises(ValueError, match="broadcast"):
            rng.pfns = [1, 2, 3]


class TestWaiting:
    def test_it_waits_for_the_end_of_the_invalidation(self, mm: pm.AddressSpace, driver: Driver) -> None:
        buf = mm.mmap(PAGE)
        with whole(driver, buf) as rng:
            with mm.invalidate(buf.addr, buf.addr + PAGE):
                waiter = Background(rng.wait_until_valid)
                assert waiter.stays()
                assert not rng.valid
            assert waiter.result() is True
            assert rng.valid

    def test_it_times_out(self, mm: pm.AddressSpace, driver: Driver) -> None:
        buf = mm.mmap(PAGE)
        with whole(driver, buf) as rng, mm.invalidate(buf.addr, buf.addr + PAGE):
            assert errno_of(rng.wait_until_valid, timeout=0.12) == errno.ETIMEDOUT
            assert errno_of(rng.wait_until_valid, timeout=0) == errno.ETIMEDOUT

    def test_registered_during_an_invalidation_it_is_invalid(
        self, mm: pm.AddressSpace, driver: Driver
    ) -> None:
        buf = mm.mmap(PAGE)
        with mm.invalidate(buf.addr, buf.addr + PAGE):
            rng = whole(driver, buf)
            rng.register()
            assert not rng.valid
            assert errno_of(rng.fault) == errno.EAGAIN
        assert rng.wait_until_valid()
        rng.fault()
        rng.unregister()

    def test_closing_wakes_it_with_false(self) -> None:
        mm = pm.AddressSpace()
        buf = mm.mmap(PAGE)
        begun, inside, go = threading.Event(), threading.Event(), threading.Event()

        class Slow(Driver):
            def release(self) -> None:
                inside.set()
                assert go.wait(WAIT_S)

        driver = Slow(mm)
        rng = whole(driver, buf)
        rng.register()
        held = Background(_hold_invalidation, mm, buf.addr, begun, inside)
        assert begun.wait(WAIT_S)
        waiter = Background(rng.wait_until_valid, timeout=None)
        closing = Background(mm.close)
        assert inside.wait(WAIT_S)
        assert waiter.result() is False
        go.set()
        closing.result()
        held.result()
        assert rng.wait_until_valid() is False


def _hold_invalidation(
    mm: pm.AddressSpace, addr: int, begun: threading.Event, until: threading.Event
) -> None:
    with mm.invalidate(addr, addr + PAGE):
        begun.set()
        assert until.wait(WAIT_S)


class TestAfterTheEnd:
    def test_every_call_is_a_clean_efault(self) -> None:
        mm = pm.AddressSpace()
        buf = mm.mmap(PAGE)
        driver = Driver(mm)
        rng, other = whole(driver, buf), whole(driver, buf)
        rng.register()
        seq = rng.fault()
        driver.device.page_table.map(rng, seq)
        mm.close()
        assert not driver.mm_is_alive()
        assert driver.hmm.dead
        for call in (rng.fault, rng.snapshot, other.register, lambda: Driver(mm), lambda: pm.Hmm.get(mm)):
            assert errno_of(call) == errno.EFAULT
        assert not rng.valid
        assert rng.wait_until_valid() is False
        assert driver.device.page_table.map(rng, seq) is False
        assert valid(rng.pfns) == [True]
        rng.unregister()
        driver.unregister()

    def test_a_forked_child_gets_esrch(self, mm: pm.AddressSpace, driver: Driver) -> None:
        buf = mm.mmap(PAGE)
        with whole(driver, buf) as rng:
            seq = rng.fault()
            child = os.fork()
            if child == 0:
                good = (
                    not rng.valid
                    and errno_of(rng.fault) == errno.ESRCH
                    and errno_of(rng.snapshot) == errno.ESRCH
                    and errno_of(rng.wait_until_valid) == errno.ESRCH
                    and errno_of(lambda: Driver(mm)) == errno.ESRCH
                    and driver.device.page_table.map(rng, seq) is False
                    and errno_of(rng.unregister) == 0
                    and errno_of(driver.unregister) == 0
                )
                os._exit(0 if good else 1)
            assert os.waitpid(child, 0)[1] == 0

    def test_a_foreign_munmap_invalidates_the_range(self, mm: pm.AddressSpace, driver: Driver) -> None:
        needs("uffd_events")
        buf = mm.mmap(2 * PAGE)
        with whole(driver, buf) as rng:
            rng.fault()
            foreign.munmap(buf.addr + PAGE, PAGE)
            assert not rng.valid
            mm.sync()
            (update,) = driver.updates
            assert (update.event, update.guarantee) == (pm.Event.UNMAP, "after")
            assert (update.start, update.end) == (buf.addr + PAGE, buf.addr + 2 * PAGE)
