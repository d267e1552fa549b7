"""The driver's own pfns: flags, values and pfn_shift of the 5.1 series."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from mirroring import PAGE, Driver, as_bytes, filled
from seams import errno_of

import pymirror as pm

VALID, WRITE, PRIVATE = 1, 2, 4
ERROR, NONE = 0xE << 4, 0
OWN: dict[str, Any] = {"flags": (VALID, WRITE, PRIVATE), "values": (ERROR, NONE, ERROR), "pfn_shift": 12}


@pytest.fixture
def driver(mm: pm.AddressSpace) -> Iterator[Driver]:
    with Driver(mm) as driver:
        yield driver


def test_requests_and_results_are_in_the_drivers_bits(mm: pm.AddressSpace, driver: Driver) -> None:
    buf = mm.mmap(4 * PAGE)
    memoryview(buf).cast("B")[3 * PAGE] = 1
    with (
        driver.range(buf.addr, buf.addr + buf.size, **OWN) as own,
        driver.range(buf.addr, buf.addr + buf.size) as modern,
    ):
        own.pfns[:] = [VALID, VALID | WRITE, 0, 0]
        own.fault()
        assert (own.pfns & np.uint64(VALID | WRITE)).tolist() == [VALID, VALID | WRITE, NONE, VALID | WRITE]
        modern.snapshot()
        assert [entry >> 12 for entry in own.pfns.tolist()] == pm.hmm_pfn_to_pfn(modern.pfns).tolist()


def test_default_flags_and_mask_are_too(mm: pm.AddressSpace, driver: Driver) -> None:
    buf = mm.mmap(2 * PAGE)
    with driver.range(buf.addr, buf.addr + buf.size, **OWN) as rng:
        rng.default_flags = VALID | WRITE
        assert rng.default_flags == VALID | WRITE
        rng.fault()
        assert (rng.pfns & np.uint64(7)).tolist() == [VALID | WRITE] * 2
        rng.pfn_flags_mask = rng.default_flags = 0
        mm.madvise(buf.addr, buf.size, 4)
        rng.wait_until_valid()
        rng.fault()
        assert rng.pfns.tolist() == [NONE, NONE]


def test_a_device_maps_what_it_holds(mm: pm.AddressSpace, driver: Driver) -> None:
    buf = filled(mm, 3)
    with driver.range(buf.addr, buf.addr + buf.size, **OWN) as rng:
        rng.default_flags = VALID
        assert driver.device.page_table.map(rng, rng.fault())
    assert driver.device.read(mm, buf.addr, buf.size) == bytes(buf)


def test_after_an_error_the_rest_is_none(mm: pm.AddressSpace, driver: Driver) -> None:
    buf = filled(mm, 3)
    start = buf.addr
    own = {**OWN, "values": (ERROR, 1 << 8, ERROR)}
    mm.munmap(start + PAGE, PAGE)
    with driver.range(start, start + 3 * PAGE, **own) as rng:
        rng.default_flags = VALID
        assert errno_of(rng.fault) == errno.EFAULT
        assert [bool(entry & VALID) for entry in rng.pfns.tolist()] == [True, False, False]
        assert rng.pfns.tolist()[1:] == [1 << 8, 1 << 8]


@pytest.mark.hugetlb
def test_with_huge_pages(mm: pm.AddressSpace, driver: Driver) -> None:
    buf = mm.mmap(2 * 2 * pm.MiB, huge="hugetlb")
    with driver.range(buf.addr, buf.addr + buf.size, 21, **OWN) as rng:
        rng.pfns[:] = [0, VALID | WRITE]
        rng.fault()
        assert (rng.pfns & np.uint64(7)).tolist() == [NONE, VALID | WRITE]


@pytest.mark.parametrize(
    "bad",
    [
        {"pfn_shift": None},
        {"flags": None},
        {"values": (ERROR, NONE)},
        {"pfn_shift": 0},
        {"pfn_shift": 64},
        {"pfn_shift": 2},
        {"flags": (1, 1, 4)},
        {"flags": (0, 2, 4)},
        {"flags": (1, 2, 1)},
        {"flags": (1, -2, 4)},
        {"flags": (1, 2, 1 << 64)},
        {"flags": (1 << 12, 2, 4)},
        {"flags": (1, 2)},
        {"values": (0, 0, ERROR)},
        {"values": (ERROR, 0, 0)},
        {"values": (ERROR, VALID, ERROR)},
    ],
)
def test_entries_that_cannot_be_told_apart_are_einval(driver: Driver, bad: dict[str, Any]) -> None:
    assert errno_of(driver.range, 0, PAGE, **{**OWN, **bad}) == errno.EINVAL


class TestConversions:
    """hmm_device_entry_to_pfn() and its kin, over one entry and over arrays."""

    def test_pfns_to_and_from_entries(self, driver: Driver) -> None:
        rng = driver.range(0, PAGE, **OWN)
        assert pm.hmm_device_entry_from_pfn(rng, 0x1234) == 0x1234 << 12 | VALID
        entry = pm.hmm_device_entry_from_pfn(rng, 0x1234) | WRITE
        assert pm.hmm_device_entry_to_pfn(rng, entry) == 0x1234
        assert [pm.hmm_device_entry_to_pfn(rng, entry) for entry in (ERROR, NONE, WRITE)] == [-1, -1, -1]

    def test_to_and_from(self, mm: pm.AddressSpace, driver: Driver) -> None:
        buf = filled(mm, 2)
        for how in ({}, OWN):
            with driver.range(buf.addr, buf.addr + buf.size, **how) as rng:
                rng.snapshot()
                found = pm.hmm_device_entry_to_pfn(rng, rng.pfns)
                assert found.dtype == np.int64
                assert found.tolist() == [pm.hmm_device_entry_to_pfn(rng, int(entry)) for entry in rng.pfns]
                again = pm.hmm_device_entry_from_pfn(rng, found.astype(np.uint64))
                assert pm.hmm_device_entry_to_pfn(rng, again).tolist() == found.tolist()
                assert pm.hmm_device_entry_from_pfn(rng, int(found[0])) == int(again[0])

    def test_what_holds_no_pfn_is_minus_one(self, mm: pm.AddressSpace, driver: Driver) -> None:
        buf = mm.mmap(PAGE)
        own = {**OWN, "values": (ERROR, NONE, 0xC << 4)}
        with driver.range(buf.addr, buf.addr + PAGE, **own) as rng:
            entries = np.array([ERROR, NONE, 0xC << 4, 7 << 12, 7 << 12 | VALID], np.uint64)
            assert pm.hmm_device_entry_to_pfn(rng, entries).tolist() == [-1, -1, -1, -1, 7]
        with driver.range(buf.addr, buf.addr + PAGE) as rng:
            assert pm.hmm_device_entry_to_pfn(rng, pm.HMM_PFN_ERROR) == -1
            assert pm.hmm_device_entry_to_pfn(rng, pm.HMM_PFN_VALID | 9) == 9

    def test_values_that_look_valid_hold_none(self, mm: pm.AddressSpace, driver: Driver) -> None:
        """As amdgpu has them: all ones but the lowest bits."""
        own = {"flags": (1, 2, 0), "values": ((1 << 64) - 2, 0, (1 << 64) - 4), "pfn_shift": 12}
        buf = filled(mm, 1)
        with driver.range(buf.addr, buf.addr + PAGE, **own) as rng:
            rng.snapshot()
            assert rng.pfns[0] & np.uint64(3) == 3
            entries = np.array(own["values"], np.uint64)
            assert pm.hmm_device_entry_to_pfn(rng, entries).tolist() == [-1, -1, -1]


class TestPageShift:
    @pytest.mark.hugetlb
    def test_entries_of_huge_pages_in_the_drivers_bits(self, mm: pm.AddressSpace, driver: Driver) -> None:
        buf = mm.mmap(4 * pm.MiB, huge="hugetlb")
        with driver.range(buf.addr, buf.addr + buf.size, 21, **OWN) as rng:
            rng.pfns[:] = [VALID | WRITE, 0]
            rng.fault()
            assert (rng.pfns & np.uint64(7)).tolist() == [VALID | WRITE, NONE]
            assert rng.npages == 2

    @pytest.mark.hugetlb
    def test_neither_snapshot_nor_fault_of_small_pages(self, mm: pm.AddressSpace, driver: Driver) -> None:
        room = mm.mmap(6 * pm.MiB, huge="thp")
        as_bytes(room)[:] = b"\1" * room.size
        with driver.range(room.addr, room.addr + room.size, 21) as rng:
            rng.pfns[:] = pm.HMM_PFN_REQ_FAULT
            for look in (rng.snapshot, rng.fault):
                assert errno_of(look) == errno.EINVAL
            assert set(rng.pfns.tolist()) == {pm.HMM_PFN_REQ_FAULT}

    @pytest.mark.hugetlb
    def test_a_range_of_small_entries_over_huge_pages_is_fine(
        self, mm: pm.AddressSpace, driver: Driver
    ) -> None:
        buf = mm.mmap(2 * pm.MiB, huge="hugetlb")
        with driver.range(buf.addr + PAGE, buf.addr + 3 * PAGE, 12) as rng:
            rng.default_flags = pm.HMM_PFN_REQ_FAULT
            rng.fault()
            assert pm.hmm_pfn_to_map_order(rng.pfns).tolist() == [9, 9]

    @pytest.mark.parametrize(("start", "end", "shift"), [(PAGE, 2 << 20, 21), (0, PAGE, 21), (0, 0, 12)])
    def test_alignment(self, driver: Driver, start: int, end: int, shift: int) -> None:
        assert errno_of(driver.range, start, end, shift) == errno.EINVAL


class TestTheOlderApi:
    """hmm_vma_fault() and hmm_vma_range_done(), which the series kept as wrappers."""

    def test_a_round(self, mm: pm.AddressSpace, driver: Driver) -> None:
        buf = mm.mmap(2 * PAGE)
        rng = driver.range(buf.addr, buf.addr + buf.size)
        rng.default_flags = pm.HMM_PFN_REQ_FAULT
        rng.pfns[:] = [pm.HMM_PFN_REQ_FAULT | pm.HMM_PFN_REQ_WRITE, 0]
        seq = pm.hmm_vma_fault(rng)
        assert rng.registered
        assert ((rng.pfns & np.uint64(pm.HMM_PFN_WRITE)) != 0).tolist() == [True, False]
        assert driver.device.page_table.map(rng, seq)
        assert pm.hmm_vma_range_done(rng)
        assert not rng.registered
        assert not pm.hmm_vma_range_done(rng)

    def test_done_tells_of_an_invalidation(self, mm: pm.AddressSpace, driver: Driver) -> None:
        buf = filled(mm, 1)
        rng = driver.range(buf.addr, buf.addr + PAGE)
        pm.hmm_vma_fault(rng)
        mm.madvise(buf.addr, PAGE, 4)
        assert not pm.hmm_vma_range_done(rng)

    def test_an_error_leaves_it_unregistered(self, mm: pm.AddressSpace, driver: Driver) -> None:
        buf = mm.mmap(PAGE)
        mm.munmap(buf.addr, PAGE)
        rng = driver.range(buf.addr, buf.addr + PAGE)
        rng.pfns[:] = pm.HMM_PFN_REQ_FAULT
        assert errno_of(pm.hmm_vma_fault, rng) == errno.EFAULT
        assert not rng.registered

    def test_busy_while_it_is_being_invalidated(
        self, mm: pm.AddressSpace, driver: Driver, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("pymirror.hmm_series.HMM_RANGE_DEFAULT_TIMEOUT", 0.01)
        buf = filled(mm, 1)
        rng = driver.range(buf.addr, buf.addr + PAGE)
        with mm.invalidate(buf.addr, buf.addr + PAGE):
            assert errno_of(pm.hmm_vma_fault, rng) == errno.EBUSY
        assert not rng.registered

    def test_the_mm_read_lock_of_a_mirror(self, mm: pm.AddressSpace, driver: Driver) -> None:
        with driver.mm_down_read():
            assert errno_of(mm.mmap, PAGE) == errno.EDEADLK
        driver.unregister()
        with pytest.raises(pm.MirrorError) as refused, driver.mm_down_read():
            pass
        assert refused.value.errno == errno.EINVAL
