"""mremap(): what moves, what it announces, and whose the memory is afterwards."""

from __future__ import annotations

import errno

import pytest
from oplog import PAGE, Log, pages, prots
from seams import errno_of

import pymirror as pm

USER_END = 1 << 47


@pytest.fixture
def log(mm: pm.AddressSpace) -> Log:
    return Log(mm)


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
