"""mremap() where the kernel does more, or less, than it seems to be asked for."""

from __future__ import annotations

import errno
from typing import Any

import pytest
from notifying import PAGE, Recorder
from seams import errno_of, foreign

import pymirror as pm

HUGE = 2 * pm.MiB


def test_shared_memory_that_is_mapped_once_more_has_not_moved(mm: pm.AddressSpace) -> None:
    """The kernel tells of it as of a move of 0 bytes."""
    log: list[Any] = []
    Recorder(mm, log)
    buf = mm.mmap(4 * PAGE, shared=True)
    mm.watch(buf.addr, buf.addr + buf.size, files=True)
    with pm.Mirror(mm) as mirror, mirror.range(buf.addr - PAGE, buf.addr + buf.size) as rng:
        mm.mremap(buf.addr, 0, buf.size)
        foreign.munmap(foreign.mremap(buf.addr, 0, buf.size), buf.size)
        mm.sync()
        assert rng.valid
        assert [entry for entry in log if entry[3] == entry[4] or entry[3] == buf.addr] == []


@pytest.mark.hugetlb
def test_what_lies_behind_hugetlb_memory_is_not_taken_with_it(mm: pm.AddressSpace) -> None:
    """The kernel would round an old size up to huge pages."""
    around = foreign.mmap(0, 4 * HUGE, prot=0)
    place = -(-around // HUGE) * HUGE
    buf = mm.mmap(HUGE, huge="hugetlb")
    buf = mm.mremap(buf.addr, HUGE, HUGE, flags=pm.MREMAP_MAYMOVE | pm.MREMAP_FIXED, new_addr=place)
    behind = [str(vma) for vma in mm.vmas(place + HUGE, around + 4 * HUGE)]
    assert errno_of(mm.mremap, place, HUGE + PAGE, HUGE) == errno.EINVAL
    assert [str(vma) for vma in mm.vmas(place + HUGE, around + 4 * HUGE)] == behind
    mm.munmap(place, HUGE)
    foreign.munmap(around, 4 * HUGE)
