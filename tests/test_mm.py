"""AddressSpace: what its operations announce, what they refuse, and what they leave of the memory."""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path

import numpy as np
import pytest
from seams import errno_of, inject

import pymirror as pm
from pymirror.event import WHOLE_MM_END

PAGE = 4096
HUGE = 2 << 20
READ, WRITE = mmap.PROT_READ, mmap.PROT_WRITE
MADV_FREE = 8
MADV_REMOVE = 9
USER_END = 1 << 47


class Log(pm.MmuNotifier):
    """Every invalidation, as (event, start, end); the sequence number stays odd while one runs."""

    def __init__(self, mm: pm.AddressSpace) -> None:
        self.ranges: list[pm.MmuNotifierRange] = []
        self.ends = 0
        super().__init__(mm)

    def invalidate_range_start(self, range: pm.MmuNotifierRange) -> None:
        self.ranges.append(range)

    def invalidate_range_end(self, range: pm.MmuNotifierRange) -> None:
        self.ends += 1

    def take(self) -> list[tuple[str, int, int]]:
        assert self.ends == len(self.ranges)
        assert all(one.guarantee == "before" and one.blockable for one in self.ranges)
        taken = [(one.event.name, one.start, one.end) for one in self.ranges]
        self.ranges.clear()
        self.ends = 0
        return taken


@pytest.fixture
def log(mm: pm.AddressSpace) -> Log:
    return Log(mm)


def pages(mm: pm.AddressSpace, n: int, **how: object) -> pm.Region:
    """n pages that no other mapping of this test is merged with."""
    return mm.mmap(n * PAGE, **how)  # type: ignore[arg-type]


def prots(mm: pm.AddressSpace, region: pm.Region) -> list[str]:
    """The protection of each page of the Region, "-" for a hole."""
    found = []
    for addr in range(region.addr, region.addr + region.size, PAGE):
        vma = mm.vma_lookup(addr)
        found.append("-" if vma is None else str(vma).split()[1][:2])
    return found


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


def test_mremap_moves_and_announces_the_old_place(mm: pm.AddressSpace, log: Log) -> None:
    region = pages(mm, 4)
    region[0] = 7
    target = pages(mm, 4)
    moved = mm.mremap(
        region.addr, 4 * PAGE, 4 * PAGE, flags=pm.MREMAP_MAYMOVE | pm.MREMAP_FIXED, new_addr=target.addr
    )
    assert moved.addr == target.addr
    assert moved[0] == 7
    assert log.take() == [
        ("UNMAP", region.addr, region.addr + 4 * PAGE),
        ("UNMAP", target.addr, target.addr + 4 * PAGE),
    ]
    assert region.closed
    assert target.closed
    assert not moved.closed


def test_mremap_of_a_part_leaves_the_rest_to_the_old_region(mm: pm.AddressSpace) -> None:
    region = pages(mm, 4)
    blocker = pages(mm, 1)
    moved = mm.mremap(region.addr + PAGE, PAGE, 8 * PAGE)
    assert moved.addr != region.addr + PAGE
    assert region.left == [
        (region.addr, region.addr + PAGE),
        (region.addr + 2 * PAGE, region.addr + 4 * PAGE),
    ]
    assert moved.left == [(moved.addr, moved.addr + 8 * PAGE)]
    assert not blocker.closed


def test_mremap_that_shrinks_announces_the_tail(mm: pm.AddressSpace, log: Log) -> None:
    region = pages(mm, 4)
    region[0] = 7
    small = mm.mremap(region.addr, 4 * PAGE, PAGE)
    assert log.take() == [("UNMAP", region.addr + PAGE, region.addr + 4 * PAGE)]
    assert (small.addr, small.size, small[0]) == (region.addr, PAGE, 7)
    assert prots(mm, region) == ["rw", "-", "-", "-"]


def test_mremap_that_grows_in_place_announces_nothing(mm: pm.AddressSpace, log: Log) -> None:
    region = pages(mm, 4)
    region[0] = 7
    mm.munmap(region.addr + PAGE, 3 * PAGE)
    log.take()
    grown = mm.mremap(region.addr, PAGE, 4 * PAGE)
    assert log.take() == []
    assert (grown.addr, grown.size, grown[0]) == (region.addr, 4 * PAGE, 7)


def test_mremap_without_room_is_enomem_unless_it_may_move(mm: pm.AddressSpace, log: Log) -> None:
    region = pages(mm, 4)
    assert errno_of(mm.mremap, region.addr, PAGE, 2 * PAGE, flags=0) == errno.ENOMEM
    assert log.take() == []
    assert region.left == [(region.addr, region.addr + 4 * PAGE)]


def test_mremap_dontunmap_leaves_the_old_place_empty(mm: pm.AddressSpace, log: Log) -> None:
    region = pages(mm, 2)
    region[0] = 7
    moved = mm.mremap(region.addr, 2 * PAGE, 2 * PAGE, flags=pm.MREMAP_MAYMOVE | pm.MREMAP_DONTUNMAP)
    assert log.take() == [("UNMAP", region.addr, region.addr + 2 * PAGE)]
    assert (moved[0], region[0]) == (7, 0)
    assert not region.closed


def test_mremap_of_nothing_maps_shared_memory_again(mm: pm.AddressSpace, log: Log) -> None:
    region = pages(mm, 2, shared=True)
    region[0] = 7
    again = mm.mremap(region.addr, 0, 2 * PAGE)
    assert log.take() == []
    assert again.addr != region.addr
    again[0] = 8
    assert region[0] == 8
    assert errno_of(mm.mremap, pages(mm, 1).addr, 0, PAGE) == errno.EINVAL


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


@pytest.mark.parametrize(
    ("new_size", "flags", "new_addr"),
    [
        (0, 1, None),
        (-PAGE, 1, None),
        (PAGE, 8, None),
        (PAGE, pm.MREMAP_FIXED, 1 << 40),
        (PAGE, pm.MREMAP_DONTUNMAP, None),
        (2 * PAGE, pm.MREMAP_MAYMOVE | pm.MREMAP_DONTUNMAP, None),
        (PAGE, pm.MREMAP_MAYMOVE | pm.MREMAP_FIXED, None),
        (PAGE, pm.MREMAP_MAYMOVE, 1 << 40),
        (PAGE, pm.MREMAP_MAYMOVE | pm.MREMAP_FIXED, (1 << 40) + 1),
        (PAGE, pm.MREMAP_MAYMOVE | pm.MREMAP_FIXED, USER_END),
    ],
)
def test_mremap_refuses_what_does_not_go_together(
    mm: pm.AddressSpace, log: Log, new_size: int, flags: int, new_addr: int | None
) -> None:
    region = pages(mm, 2)
    refusal = errno_of(mm.mremap, region.addr, PAGE, new_size, flags=flags, new_addr=new_addr)
    assert refusal == errno.EINVAL
    assert log.take() == []


def test_mremap_onto_itself_is_einval_and_of_a_hole_efault(mm: pm.AddressSpace, log: Log) -> None:
    region = pages(mm, 4)
    fixed = pm.MREMAP_MAYMOVE | pm.MREMAP_FIXED
    to = region.addr + PAGE
    assert errno_of(mm.mremap, region.addr, 2 * PAGE, 2 * PAGE, flags=fixed, new_addr=to) == errno.EINVAL
    mm.munmap(region.addr, PAGE)
    log.take()
    assert errno_of(mm.mremap, region.addr, PAGE, 2 * PAGE) == errno.EFAULT
    assert log.take() == []


@pytest.mark.parametrize("size", [0, -1])
def test_mmap_of_nothing_is_einval(mm: pm.AddressSpace, size: int) -> None:
    assert errno_of(mm.mmap, size) == errno.EINVAL


def test_mmap_refusals(mm: pm.AddressSpace) -> None:
    assert errno_of(mm.mmap, 1 << 48) == errno.ENOMEM
    assert errno_of(mm.mmap, PAGE, offset=PAGE) == errno.EINVAL
    assert errno_of(mm.mmap, PAGE, huge="gigantic") == errno.EINVAL
    assert errno_of(mm.mmap, PAGE, fd=1 << 20) == errno.EBADF
    with open(os.devnull) as file:
        assert errno_of(mm.mmap, PAGE, fd=file.fileno(), offset=1) == errno.EINVAL
        assert errno_of(mm.mmap, PAGE, fd=file.fileno(), huge="hugetlb") == errno.EINVAL


def test_a_failed_system_call_ends_the_invalidation_and_leaves_the_region(
    mm: pm.AddressSpace, log: Log
) -> None:
    region = pages(mm, 2)
    with inject("MUNMAP", err=errno.ENOMEM):
        assert errno_of(mm.munmap, region.addr, PAGE) == errno.ENOMEM
    assert log.take() == [("UNMAP", region.addr, region.addr + PAGE)]
    assert mm.stats()["active"] == 0
    assert region.left == [(region.addr, region.addr + 2 * PAGE)]


@pytest.mark.parametrize(("sys", "huge"), [("MMAP", None), ("MADVISE", "thp"), ("MMAP", "thp")])
def test_a_failed_mmap_leaves_nothing(mm: pm.AddressSpace, sys: str, huge: str | None) -> None:
    before = sum(vma.size for vma in mm.vmas())
    with inject(sys, nth=2 if (sys, huge) == ("MMAP", "thp") else 1, err=errno.EPERM):
        assert errno_of(mm.mmap, 64 * HUGE, shared=True, huge=huge) == errno.EPERM
    assert sum(vma.size for vma in mm.vmas()) - before < 64 * HUGE
    assert mm.stats()["regions"] == 0


def test_shared_memory_is_a_memfd(mm: pm.AddressSpace) -> None:
    region = pages(mm, 2, shared=True)
    region[PAGE] = 9
    assert os.pread(region.fd, 1, PAGE) == b"\x09"
    vma = mm.vma_lookup(region.addr)
    assert vma is not None
    assert vma.shared
    assert vma.file
    fd = region.fd
    mm.munmap(region.addr, region.size)
    assert region.fd == -1
    assert errno_of(os.fstat, fd) == errno.EBADF


def test_a_file_is_mapped_through_a_duplicate(mm: pm.AddressSpace, tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(b"a" * PAGE + b"b" * PAGE)
    with path.open("r+b") as file:
        region = mm.mmap(PAGE, fd=file.fileno(), offset=PAGE, shared=True)
    region[0] = ord("c")
    assert path.read_bytes()[PAGE] == ord("c")
    with path.open("rb") as file:
        private = mm.mmap(2 * PAGE, fd=file.fileno())
        refusal = errno_of(mm.mmap, PAGE, fd=file.fileno(), shared=True)
    private[0] = ord("d")
    assert refusal == errno.EACCES
    assert path.read_bytes()[0] == ord("a")


@pytest.mark.parametrize("shared", [False, True])
def test_thp_is_aligned_and_advised(mm: pm.AddressSpace, shared: bool) -> None:
    region = mm.mmap(HUGE + PAGE, huge="thp", shared=shared)
    assert region.addr % HUGE == 0
    assert region.size == HUGE + PAGE
    smaps = Path("/proc/self/smaps").read_text().split(f"{region.addr:x}-", 1)[1]
    flags = next(line for line in smaps.splitlines() if line.startswith("VmFlags"))
    assert " hg" in flags


@pytest.mark.hugetlb
@pytest.mark.parametrize("shared", [False, True])
def test_hugetlb(mm: pm.AddressSpace, log: Log, shared: bool) -> None:
    region = mm.mmap(PAGE, huge="hugetlb", shared=shared)
    assert region.size == HUGE
    vma = mm.vma_lookup(region.addr)
    assert vma is not None
    assert vma.hugetlb
    assert vma.page_size == HUGE
    region[HUGE - 1] = 7
    for refused in (mm.munmap, lambda addr, size: mm.mprotect(addr, size, READ)):
        assert errno_of(refused, region.addr, PAGE) == errno.EINVAL
    assert log.take() == []
    assert region[HUGE - 1] == 7


def test_no_hugetlb_pages_is_enomem_with_the_command(mm: pm.AddressSpace) -> None:
    with pytest.raises(pm.MirrorError, match=r"nr_overcommit_hugepages.*nr_hugepages") as failed:
        mm.mmap(1 << 45, huge="hugetlb")
    assert failed.value.errno == errno.ENOMEM


def test_vmas_are_those_of_proc_maps(mm: pm.AddressSpace) -> None:
    region = pages(mm, 2, shared=True)
    lines = Path("/proc/self/maps").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{region.addr:x}-"))
    (vma,) = mm.vmas(region.addr, region.addr + region.size)
    assert str(vma).split() == line.split()
    assert mm.find_vma(region.addr + PAGE) == vma
    below = mm.find_vma(0)
    assert below is not None
    assert below.start > 0
    assert mm.vma_lookup(0) is None
    assert mm.find_vma(USER_END) is None


def test_new_memory_inside_a_notifier_is_watched(mm: pm.AddressSpace) -> None:
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
