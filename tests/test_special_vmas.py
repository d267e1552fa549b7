"""Memory that is a device's or the kernel's own: nothing to mirror, and each call says so in its way."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from mirroring import FAULT, PAGE, Driver
from seams import errno_of

import pymirror as pm

ERROR, NONE, SPECIAL = 0xE << 8, 0, 0xC << 8
OWN: dict[str, Any] = {"flags": (1, 2, 4), "values": (ERROR, NONE, SPECIAL), "pfn_shift": 12}


@pytest.fixture
def driver(mm: pm.AddressSpace) -> Iterator[Driver]:
    with Driver(mm) as driver:
        yield driver


@pytest.fixture(params=["vvar", "ring"])
def special(request: pytest.FixtureRequest, mm: pm.AddressSpace) -> Iterator[pm.Vma]:
    """A vma of the kernel's own pages: its clock, or the ring of a performance counter (VM_PFNMAP)."""
    if request.param == "vvar":
        yield next(vma for vma in mm.vmas() if vma.name == "[vvar]")
        return
    fd = performance_counter()
    try:
        region = mm.mmap(2 * PAGE, fd=fd, shared=True)
    finally:
        os.close(fd)
    found = mm.vma_lookup(region.addr)
    assert found is not None
    if not found.special:
        pytest.skip("not on this kernel: it maps the ring of a counter as ordinary pages")
    yield found
    region.close()


def performance_counter() -> int:
    """A descriptor of perf_event_open(): this thread's clock, in user space only."""
    size, software, task_clock, user_only = 64, 1, 1, 1 << 5 | 1 << 6
    attributes = struct.pack("=IIQQQQQ", software, size, task_clock, 0, 0, 0, user_only).ljust(size, b"\0")
    fd = ctypes.CDLL(None, use_errno=True).syscall(298, attributes, 0, -1, -1, 0)
    if fd < 0:
        pytest.skip(f"not for this user: perf_event_open ({os.strerror(ctypes.get_errno())})")
    return int(fd)


def test_it_is_told_from_other_memory(mm: pm.AddressSpace, special: pm.Vma) -> None:
    assert special.special
    buf = mm.mmap(PAGE)
    vma = mm.vma_lookup(buf.addr)
    assert vma is not None
    assert not vma.special
    vdso = next(vma for vma in mm.vmas() if vma.name == "[vdso]")
    assert not vdso.special


def test_the_series_snapshot_and_fault_are_efault(driver: Driver, special: pm.Vma) -> None:
    with driver.range(special.start, special.end) as rng:
        for look in (rng.snapshot, rng.fault):
            rng.default_flags = FAULT
            with pytest.raises(pm.MirrorError, match="own pages") as failed:
                look()
            assert failed.value.errno == errno.EFAULT
            assert failed.value.addr == special.start
            assert not rng.pfns.any()


def test_the_drivers_own_value_for_special_stands_in_its_entries(driver: Driver, special: pm.Vma) -> None:
    with driver.range(special.start, special.end, **OWN) as rng:
        for look in (rng.snapshot, rng.fault):
            rng.pfns[:] = 1
            assert errno_of(look) == errno.EFAULT
            assert set(rng.pfns.tolist()) == {SPECIAL}


def test_special_also_where_nothing_is_asked_for(driver: Driver, special: pm.Vma) -> None:
    with driver.range(special.start, special.end, **OWN) as rng:
        rng.fault()
        assert set(rng.pfns.tolist()) == {SPECIAL}


def test_beside_ordinary_pages_only_the_special_ones_say_so(mm: pm.AddressSpace, driver: Driver) -> None:
    kernels = [vma for vma in mm.vmas() if vma.name.startswith(("[vvar", "[vdso"))]
    start, end = kernels[0].start, kernels[-1].end
    expected = [mm.vma_lookup(addr) for addr in range(start, end, PAGE)]
    assert {vma.special for vma in expected if vma} == {True, False}
    with driver.range(start, end, **OWN) as rng:
        rng.fault()
        for vma, entry in zip(expected, rng.pfns.tolist(), strict=True):
            assert (entry == SPECIAL) == (vma is not None and vma.special)
            assert (entry == ERROR) == (vma is None)


def test_an_error_without_a_request_is_the_drivers_error_value(mm: pm.AddressSpace, driver: Driver) -> None:
    buf = mm.mmap(3 * PAGE)
    memoryview(buf).cast("B")[0] = 1
    start = buf.addr
    mm.munmap(start + PAGE, PAGE)
    with driver.range(start, start + 3 * PAGE, **OWN) as rng:
        rng.fault()
        assert rng.pfns[0] & np.uint64(1)
        assert rng.pfns[1:].tolist() == [ERROR, NONE]


def test_a_hole_is_not_special(mm: pm.AddressSpace, driver: Driver) -> None:
    buf = mm.mmap(2 * PAGE)
    mm.munmap(buf.addr, PAGE)
    with driver.range(buf.addr, buf.addr + 2 * PAGE, **OWN) as rng:
        rng.default_flags = 1
        assert errno_of(rng.fault) == errno.EFAULT
        assert rng.pfns.tolist() == [NONE, NONE]


def test_the_modern_walk_goes_on_past_it_when_it_asks_for_nothing(
    mm: pm.AddressSpace, special: pm.Vma
) -> None:
    sub = pm.IntervalNotifier(mm, special.start, special.size, lambda sub, range, seq: sub.set_seq(seq))
    pfns = np.zeros(special.size // PAGE, np.uint64)
    pm.hmm_range_fault(sub, special.start, special.end, pfns, seq=sub.read_begin())
    assert set(pfns.tolist()) == {pm.HMM_PFN_ERROR}
    asked = [FAULT] + [0] * (pfns.size - 1)
    pfns[:] = asked
    failed = errno_of(
        pm.hmm_range_fault,
        sub,
        special.start,
        special.end,
        pfns,
        pfn_flags_mask=FAULT,
        seq=sub.read_begin(),
    )
    assert failed == errno.EFAULT
    sub.remove()
