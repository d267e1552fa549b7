"""The driver's own pfns: flags, values and pfn_shift of the 5.1 series."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from mirroring import PAGE, Driver, filled
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


def test_pfns_to_and_from_entries(mm: pm.AddressSpace, driver: Driver) -> None:
    encoding = driver.range(0, PAGE, **OWN).encoding
    assert encoding is not None
    assert encoding.from_pfn(0x1234) == 0x1234 << 12 | VALID
    assert encoding.to_pfn(encoding.from_pfn(0x1234) | WRITE) == 0x1234
    assert [encoding.to_pfn(entry) for entry in (ERROR, NONE, WRITE)] == [-1, -1, -1]


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
        {"values": (0, 0, ERROR)},
        {"values": (ERROR, 0, 0)},
        {"values": (ERROR, VALID, ERROR)},
    ],
)
def test_entries_that_cannot_be_told_apart_are_einval(driver: Driver, bad: dict[str, Any]) -> None:
    assert errno_of(driver.range, 0, PAGE, **{**OWN, **bad}) == errno.EINVAL
