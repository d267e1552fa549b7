"""dmirror, the kernel's test device: its commands, its quirks, and what its reads must not change."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from seams import errno_of, needs

import pymirror as pm
from pymirror.device_memory import NEEDS
from pymirror.drivers import dmirror
from pymirror.drivers.dmirror import Dmirror, Quirks
from pymirror.drivers.dmirror_uapi import PROT_PMD, PROT_READ, PROT_WRITE
from pymirror.replay import read_pages
from pymirror.replay.child import ForkedChild

PAGE = 4096
Open = Callable[..., Dmirror]


@pytest.fixture
def open_mirror(mm: pm.AddressSpace) -> Iterator[Open]:
    opened: list[Dmirror] = []

    def open_one(quirks: Quirks | None = None) -> Dmirror:
        opened.append(Dmirror(mm, f"hmm_dmirror{len(opened)}", quirks=quirks or Quirks()))
        return opened[-1]

    yield open_one
    for mirror in opened:
        mirror.close()


@contextmanager
def forked(mm: pm.AddressSpace) -> Iterator[ForkedChild]:
    child = ForkedChild()
    try:
        mm.sync()
        yield child
    finally:
        child.discard()


def test_it_reads_and_writes_what_the_cpu_has(mm: pm.AddressSpace, open_mirror: Open) -> None:
    mirror = open_mirror()
    region = mm.mmap(4 * PAGE)
    region[PAGE] = 5
    assert mirror.read(region.addr, 4).data[PAGE] == 5
    result = mirror.write(region.addr, bytes([9]) * 4 * PAGE)
    assert (result.cpages, result.faults) == (4, 1)
    assert region[3 * PAGE] == 9


def test_a_request_is_one_fault_round_however_many_calls_it_takes(
    mm: pm.AddressSpace, open_mirror: Open
) -> None:
    region = mm.mmap(200 * PAGE)
    assert open_mirror().read(region.addr, 200).faults == 1
    assert open_mirror(Quirks(fault_to_end=False)).read(region.addr, 200).faults == 200


def test_what_is_mapped_is_not_faulted_again(mm: pm.AddressSpace, open_mirror: Open) -> None:
    mirror = open_mirror()
    region = mm.mmap(8 * PAGE)
    mirror.write(region.addr, bytes(8 * PAGE))
    assert mirror.read(region.addr, 8).faults == 0
    mm.madvise(region.addr + 4 * PAGE, PAGE, mmap.MADV_DONTNEED)
    assert mirror.read(region.addr, 4).faults == 0
    assert mirror.read(region.addr, 8).faults == 1


@pytest.mark.parametrize(("overrun", "dropped"), [(1, [2, 3]), (0, [2])])
def test_an_invalidation_drops_the_page_after_too(
    mm: pm.AddressSpace, open_mirror: Open, overrun: int, dropped: list[int]
) -> None:
    mirror = open_mirror(Quirks(overrun_pages=overrun))
    region = mm.mmap(6 * PAGE)
    mirror.write(region.addr, bytes(6 * PAGE))
    mm.madvise(region.addr + 2 * PAGE, PAGE, mmap.MADV_DONTNEED)
    entries = mirror.device.page_table.entries(region.addr, region.addr + region.size)
    assert [page for page, entry in enumerate(entries) if entry == 0] == dropped


@pytest.mark.root
@pytest.mark.parametrize(("page", "faults"), [(1, 0), (2, 1), (3, 1), (4, 0)])
def test_a_copy_on_write_break_that_nobody_told_of_is_found(
    mm: pm.AddressSpace, open_mirror: Open, page: int, faults: int
) -> None:
    needs("pfn")
    mirror = open_mirror()
    region = mm.mmap(6 * PAGE)
    region[0 : 6 * PAGE] = bytes(6 * PAGE)
    with forked(mm):
        mirror.read(region.addr, 6)
        region[2 * PAGE] = 7
        result = mirror.read(region.addr + page * PAGE, 1)
    assert result.faults == faults
    assert result.data[0] == (7 if page == 2 else 0)


def test_errors_are_the_kernels_and_what_precedes_them_is_done(
    mm: pm.AddressSpace, open_mirror: Open
) -> None:
    mirror = open_mirror()
    region = mm.mmap(6 * PAGE)
    mirror.write(region.addr, bytes([1]) * 2 * PAGE)
    mm.mprotect(region.addr + 2 * PAGE, PAGE, mmap.PROT_READ)
    mm.mprotect(region.addr + 3 * PAGE, PAGE, 0)
    mm.munmap(region.addr + 5 * PAGE, PAGE)
    assert errno_of(lambda: mirror.write(region.addr, bytes([2]) * 3 * PAGE)) == errno.EPERM
    assert region[0] == 2
    assert errno_of(lambda: mirror.read(region.addr, 4)) == errno.EFAULT
    assert errno_of(lambda: mirror.read(region.addr + 5 * PAGE, 1)) == errno.EFAULT
    assert errno_of(lambda: mirror.write(region.addr + 3 * PAGE, bytes(PAGE))) == errno.EFAULT
    assert mirror.snapshot(region.addr, 6).data[3:] == bytes([0xFF, 0, 0xFF])


def test_memory_that_stays_invalid_is_given_up(mm: pm.AddressSpace, open_mirror: Open) -> None:
    mirror = open_mirror(Quirks(fault_timeout=0.05))
    region = mm.mmap(PAGE)
    with mm.invalidate(region.addr, region.addr + PAGE):
        assert errno_of(lambda: mirror.read(region.addr, 1)) == errno.ETIMEDOUT


def test_a_page_that_is_touched_before_it_is_mapped_is_not_had(
    mm: pm.AddressSpace, open_mirror: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs(*NEEDS[mm.fault_delivery])
    mirror = open_mirror()
    region = mm.mmap(2 * PAGE)
    mirror.write(region.addr, b"x" * (2 * PAGE))
    really = dmirror.make_device_exclusive_range

    def touched(mm: pm.AddressSpace, start: int, end: int, owner: object) -> object:
        had = really(mm, start, end, owner)
        ctypes.memset(start, 7, PAGE)
        return had

    with monkeypatch.context() as patched:
        patched.setattr(dmirror, "make_device_exclusive_range", touched)
        assert errno_of(lambda: mirror.exclusive(region.addr, 2)) == errno.EBUSY
    assert mirror.read(region.addr, 2).data == bytes([7]) * PAGE + b"x" * PAGE
    assert mirror.exclusive(region.addr, 2).data == bytes([7]) * PAGE + b"x" * PAGE


def test_a_fork_leaves_shared_memory_mapped(mm: pm.AddressSpace, open_mirror: Open) -> None:
    needs("uffd_events")
    mirror = open_mirror()
    shared, private = mm.mmap(4 * PAGE, shared=True), mm.mmap(4 * PAGE)
    for region in (shared, private):
        mirror.write(region.addr, bytes(4 * PAGE))
    with forked(mm):
        assert mirror.read(shared.addr + PAGE, 2).faults == 0
        assert mirror.read(private.addr + PAGE, 2).faults == 1


@pytest.mark.root
def test_a_device_read_does_not_copy_pages_shared_with_a_child(
    mm: pm.AddressSpace, open_mirror: Open
) -> None:
    needs("pfn")
    mirror = open_mirror()
    region = mm.mmap(PAGE)
    region[0] = 1
    with forked(mm):
        before = read_pages(region.addr, 1)
        assert mirror.read(region.addr, 1).data[0] == 1
        assert read_pages(region.addr, 1) == before
        assert not before[0].exclusive


def test_a_device_read_brings_in_the_neighbours_that_fault_around_would(
    mm: pm.AddressSpace, open_mirror: Open
) -> None:
    needs("uffd_events", "pagemap_scan")
    mirror = open_mirror()
    region = mm.mmap(64 * PAGE, shared=True)
    first = -region.addr // PAGE % 16
    os.pwrite(region.fd, bytes(PAGE), (first + 17) * PAGE)
    os.pwrite(region.fd, bytes(PAGE), (first + 30) * PAGE)
    os.pwrite(region.fd, bytes(PAGE), (first + 33) * PAGE)
    mm.watch(region.addr, region.addr + region.size, files=True)
    mirror.read(region.addr + (first + 20) * PAGE, 1)
    present = [page for page, raw in enumerate(read_pages(region.addr, 64)) if raw.present]
    assert present == [first + 17, first + 20, first + 30]


@pytest.mark.hugetlb
def test_a_private_huge_page_only_read_is_read_only(mm: pm.AddressSpace, open_mirror: Open) -> None:
    needs("wp_async", "uffd_events")
    mirror = open_mirror()
    region = mm.mmap(2 * pm.MiB, huge="hugetlb")
    mirror.read(region.addr, 512)
    assert set(mirror.snapshot(region.addr, 512).data) == {PROT_READ | PROT_PMD}
    region[5 * PAGE] = 1
    assert set(mirror.snapshot(region.addr, 512).data) == {PROT_WRITE | PROT_PMD}
