"""Operations: what they announce, what they refuse, and what they leave of the memory."""

from __future__ import annotations

import errno
import mmap

import numpy as np
import pytest
from oplog import PAGE, Log, pages, prots
from seams import errno_of, inject, needs

import pymirror as pm
from pymirror.event import WHOLE_MM_END

READ = mmap.PROT_READ
MADV_FREE = 8
MADV_REMOVE = 9
USER_END = 1 << 47


@pytest.fixture
def log(mm: pm.AddressSpace) -> Log:
    return Log(mm)


def test_munmap_announces_the_whole_interval_and_unmaps_it(mm: pm.AddressSpace, log: Log) -> None:
    region = pages(mm, 4)
    mm.munmap(region.addr + PAGE, 2 * PAGE)
    assert log.take() == [("UNMAP", region.addr + PAGE, region.addr + 3 * PAGE)]
    assert prots(mm, region) == ["rw", "-", "-", "rw"]
    assert region.left == [
        (region.addr, region.addr + PAGE),
        (region.addr + 3 * PAGE, region.addr + 4 * PAGE),
    ]


def test_munmap_of_a_hole_is_no_event(mm: pm.AddressSpace, log: Log) -> None:
    region = pages(mm, 4)
    mm.munmap(region.addr, region.size)
    log.take()
    mm.munmap(region.addr, region.size)
    assert log.take() == []


def test_a_size_is_rounded_up_to_pages(mm: pm.AddressSpace, log: Log) -> None:
    region = mm.mmap(PAGE + 1)
    assert region.size == len(region) == 2 * PAGE
    mm.munmap(region.addr, 1)
    assert log.take() == [("UNMAP", region.addr, region.addr + PAGE)]


def test_mprotect_announces_only_vmas_whose_protection_changes(mm: pm.AddressSpace, log: Log) -> None:
    region = pages(mm, 6)
    mm.mprotect(region.addr + 2 * PAGE, 2 * PAGE, READ)
    assert log.take() == [("PROTECTION_VMA", region.addr + 2 * PAGE, region.addr + 4 * PAGE)]
    mm.mprotect(region.addr + PAGE, 5 * PAGE, READ)
    assert log.take() == [
        ("PROTECTION_VMA", region.addr + PAGE, region.addr + 2 * PAGE),
        ("PROTECTION_VMA", region.addr + 4 * PAGE, region.addr + 6 * PAGE),
    ]
    mm.mprotect(region.addr + PAGE, 5 * PAGE, READ)
    assert log.take() == []
    assert prots(mm, region) == ["rw"] + ["r-"] * 5


def test_mprotect_over_a_hole_is_enomem_after_what_precedes_it_changed(mm: pm.AddressSpace, log: Log) -> None:
    region = pages(mm, 4)
    mm.munmap(region.addr + 2 * PAGE, PAGE)
    log.take()
    with pytest.raises(pm.MirrorError, match="leave the hole out") as failed:
        mm.mprotect(region.addr + PAGE, 3 * PAGE, READ)
    assert failed.value.errno == errno.ENOMEM
    assert failed.value.addr == region.addr + 2 * PAGE
    assert log.take() == [("PROTECTION_VMA", region.addr + PAGE, region.addr + 2 * PAGE)]
    assert prots(mm, region) == ["rw", "r-", "-", "rw"]


def test_madvise_that_zaps_is_clear(mm: pm.AddressSpace, log: Log) -> None:
    region = pages(mm, 4)
    view = np.frombuffer(region, np.uint8)
    view[:] = 7
    mm.madvise(region.addr + PAGE, PAGE, mmap.MADV_DONTNEED)
    assert log.take() == [("CLEAR", region.addr + PAGE, region.addr + 2 * PAGE)]
    assert view[::PAGE].tolist() == [7, 0, 7, 7]


@pytest.mark.parametrize("advice", [mmap.MADV_NORMAL, mmap.MADV_WILLNEED, mmap.MADV_NOHUGEPAGE])
def test_madvise_that_only_hints_is_no_event(mm: pm.AddressSpace, log: Log, advice: int) -> None:
    region = pages(mm, 4)
    mm.madvise(region.addr, region.size, advice)
    assert log.take() == []


def test_madvise_over_a_hole_does_the_rest(mm: pm.AddressSpace, log: Log) -> None:
    region = pages(mm, 3)
    view = np.frombuffer(region, np.uint8)
    view[::PAGE] = 7
    mm.munmap(region.addr + PAGE, PAGE)
    log.take()
    assert errno_of(mm.madvise, region.addr, region.size, mmap.MADV_DONTNEED) == errno.ENOMEM
    assert log.take() == [
        ("CLEAR", region.addr, region.addr + PAGE),
        ("CLEAR", region.addr + 2 * PAGE, region.addr + 3 * PAGE),
    ]
    assert (view[0], view[2 * PAGE]) == (0, 0)


@pytest.mark.parametrize(
    ("how", "advice", "refusal"),
    [
        ({"shared": True}, MADV_FREE, errno.EINVAL),
        ({}, MADV_REMOVE, errno.EINVAL),
        ({}, 777, errno.EINVAL),
    ],
)
def test_refused_advice_announces_nothing(
    mm: pm.AddressSpace, log: Log, how: dict[str, bool], advice: int, refusal: int
) -> None:
    region = pages(mm, 2, **how)
    assert errno_of(mm.madvise, region.addr, region.size, advice) == refusal
    assert log.take() == []


def test_remove_is_announced_in_every_mapping_of_the_pages(mm: pm.AddressSpace, log: Log) -> None:
    region = pages(mm, 4, shared=True)
    again = mm.mmap(2 * PAGE, shared=True, fd=region.fd, offset=PAGE)
    np.frombuffer(region, np.uint8)[:] = 7
    mm.madvise(region.addr + PAGE, PAGE, MADV_REMOVE)
    assert sorted(log.take()) == sorted(
        [
            ("CLEAR", region.addr + PAGE, region.addr + 2 * PAGE),
            ("CLEAR", again.addr, again.addr + PAGE),
        ]
    )
    assert (again[0], again[PAGE]) == (0, 7)


@pytest.mark.parametrize("call", ["munmap", "mprotect", "madvise", "mremap"])
@pytest.mark.parametrize(
    ("shift", "size"),
    [(1, PAGE), (0, 0), (0, -PAGE), (-USER_END, PAGE), (0, USER_END), (0, 1 << 64), (USER_END, PAGE)],
)
def test_what_can_be_no_memory_is_einval(
    mm: pm.AddressSpace, log: Log, call: str, shift: int, size: int
) -> None:
    region = pages(mm, 2)
    calls = {
        "munmap": lambda addr: mm.munmap(addr, size),
        "mprotect": lambda addr: mm.mprotect(addr, size, READ),
        "madvise": lambda addr: mm.madvise(addr, size, mmap.MADV_DONTNEED),
        "mremap": lambda addr: mm.mremap(addr, size, 8 * PAGE),
    }
    with pytest.raises(pm.MirrorError, match=rf"EINVAL: {call}.*; do: ") as failed:
        calls[call](region.addr + shift)
    assert failed.value.errno == errno.EINVAL
    assert log.take() == []
    assert prots(mm, region) == ["rw", "rw"]


def test_the_message_names_address_page_size_vma_and_remedy(mm: pm.AddressSpace) -> None:
    region = pages(mm, 2)
    with pytest.raises(pm.MirrorError) as failed:
        mm.munmap(region.addr + 1, PAGE)
    text = str(failed.value)
    assert f"munmap: address {region.addr + 1:#x} is not a multiple of the page size (4096)" in text
    assert f"; vma: {mm.vma_lookup(region.addr)}; do: use {region.addr:#x} or" in text


def test_a_failed_system_call_ends_the_invalidation_and_leaves_the_region(
    mm: pm.AddressSpace, log: Log
) -> None:
    region = pages(mm, 2)
    with inject("MUNMAP", err=errno.ENOMEM):
        assert errno_of(mm.munmap, region.addr, PAGE) == errno.ENOMEM
    assert log.take() == [("UNMAP", region.addr, region.addr + PAGE)]
    assert mm.stats()["active"] == 0
    assert region.left == [(region.addr, region.addr + 2 * PAGE)]


def test_new_memory_inside_a_notifier_is_watched(mm: pm.AddressSpace) -> None:
    needs("uffd_events")
    unwatched = pages(mm, 4)
    assert mm.stats()["watched_bytes"] == 0
    sub = pm.IntervalNotifier(mm, 0, WHOLE_MM_END, lambda sub, range, seq: sub.set_seq(seq))
    region = pages(mm, 4)
    assert mm.stats()["watched_bytes"] >= region.size
    assert not unwatched.closed
    sub.remove()


def test_an_operation_may_span_regions(mm: pm.AddressSpace) -> None:
    area = pages(mm, 8)
    to = range(area.addr, area.addr + area.size, 2 * PAGE)
    fixed = pm.MREMAP_MAYMOVE | pm.MREMAP_FIXED
    regions = [mm.mremap(pages(mm, 2).addr, 2 * PAGE, 2 * PAGE, flags=fixed, new_addr=addr) for addr in to]
    assert area.closed
    mm.munmap(area.addr + PAGE, 6 * PAGE)
    assert [sum(end - start for start, end in region.left) for region in regions] == [PAGE, 0, 0, PAGE]
    assert mm.stats()["region_bytes"] == 2 * PAGE
