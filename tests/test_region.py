"""Regions: buffers over real memory, and how long that memory stays."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from seams import errno_of, foreign, needs

import pymirror as pm
from pymirror._shim import ffi

PAGE = 4096
HUGE = 2 << 20


def mapped(addr: int) -> bool:
    """Whether some vma holds addr, asked without pymirror."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        if start <= addr < end:
            return True
    return False


def test_it_is_an_array_of_bytes(mm: pm.AddressSpace) -> None:
    region = mm.mmap(2 * PAGE)
    region[PAGE] = 255
    region[0:2] = [1, 2]
    assert region[PAGE] == 255
    assert region[:3] == [1, 2, 0]
    assert len(region) == region.size == 2 * PAGE
    assert isinstance(region, pm.Region)
    assert ctypes.addressof(region) == region.addr  # type: ignore[arg-type]
    with pytest.raises(IndexError):
        region[2 * PAGE]


def test_views_write_the_memory(mm: pm.AddressSpace) -> None:
    region = mm.mmap(PAGE)
    words = np.frombuffer(region, np.uint64)
    words[1] = 0x0807060504030201
    assert region[8:16] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert memoryview(region).nbytes == PAGE
    assert words.ctypes.data == region.addr


@pytest.mark.parametrize(
    "make",
    [
        memoryview,
        lambda region: np.frombuffer(region, np.uint8),
        lambda region: np.frombuffer(region, np.uint8)[7:],
        np.asarray,
        np.ctypeslib.as_array,
        (ctypes.c_char * 8).from_buffer,
        ffi.from_buffer,
    ],
    ids=["memoryview", "frombuffer", "slice", "asarray", "as_array", "ctypes", "cffi"],
)
def test_close_refuses_while_a_view_lives(mm: pm.AddressSpace, make: Any) -> None:
    region = mm.mmap(PAGE)
    view = make(region)
    with pytest.raises(BufferError, match="1 view"):
        region.close()
    assert mapped(region.addr)
    del view
    gc.collect()
    region.close()
    region.close()
    assert region.closed
    assert not mapped(region.addr)


def test_a_closed_region_is_not_touched(mm: pm.AddressSpace) -> None:
    with mm.mmap(PAGE) as region:
        region[0] = 1
    with pytest.raises(ValueError, match="is unmapped"):
        region[0]
    with pytest.raises(ValueError, match="is unmapped"):
        region[0] = 1


def test_close_unmaps_what_is_left_and_nothing_else(mm: pm.AddressSpace) -> None:
    region = mm.mmap(3 * PAGE)
    mm.munmap(region.addr + PAGE, PAGE)
    other = foreign.mmap(region.addr + PAGE, PAGE, flags=0x32)
    region.close()
    assert [mapped(region.addr + i * PAGE) for i in range(3)] == [False, True, False]
    foreign.munmap(other, PAGE)


def test_the_mm_keeps_regions_mapped(mm: pm.AddressSpace) -> None:
    region = mm.mmap(PAGE)
    addr, gone = region.addr, weakref.ref(region)
    del region
    gc.collect()
    assert gone() is not None
    mm.munmap(addr, PAGE)
    gc.collect()
    assert gone() is None


def test_memory_outlives_the_mm_with_its_last_view() -> None:
    mm = pm.AddressSpace()
    region = mm.mmap(PAGE, shared=True)
    idle = mm.mmap(PAGE)
    fd, addr, idle_addr = region.fd, region.addr, idle.addr
    del idle
    view = np.frombuffer(region, np.uint8)
    view[:] = 7
    mm.close()
    assert not mapped(idle_addr)
    del region
    gc.collect()
    assert view.sum() == 7 * PAGE
    os.fstat(fd)
    del view
    gc.collect()
    assert not mapped(addr)
    assert errno_of(os.fstat, fd) != 0


def test_a_region_can_be_closed_after_its_mm() -> None:
    mm = pm.AddressSpace()
    region = mm.mmap(PAGE)
    view = memoryview(region)
    mm.close()
    with pytest.raises(BufferError):
        region.close()
    view.release()
    region.close()
    assert not mapped(region.addr)


def test_a_view_of_before_a_resize_in_place_keeps_the_memory() -> None:
    mm = pm.AddressSpace()
    region = mm.mmap(4 * PAGE)
    view = np.frombuffer(region, np.uint8)
    view[:PAGE] = 7
    resized = mm.mremap(region.addr, 4 * PAGE, PAGE)
    assert resized.addr == region.addr
    del region, resized
    mm.close()
    gc.collect()
    assert view[:PAGE].sum() == 7 * PAGE


def test_a_moved_region_keeps_its_kind_and_a_descriptor(mm: pm.AddressSpace) -> None:
    region = mm.mmap(2 * PAGE, shared=True, prot=mmap.PROT_READ)
    moved = mm.mremap(
        region.addr,
        2 * PAGE,
        2 * PAGE,
        flags=pm.MREMAP_MAYMOVE | pm.MREMAP_FIXED,
        new_addr=mm.mmap(2 * PAGE).addr,
    )
    assert (moved.shared, moved.prot, moved.huge) == (True, mmap.PROT_READ, None)
    assert region.fd == -1
    assert os.fstat(moved.fd).st_size == 2 * PAGE


def test_what_is_unmapped_behind_our_back_is_not_unmapped_again() -> None:
    needs("uffd_events")
    mm = pm.AddressSpace()
    region = mm.mmap(4 * PAGE)
    mm.watch(region.addr, region.addr + region.size)
    addr = region.addr
    foreign.munmap(addr + PAGE, PAGE)
    mm.sync()
    assert region.left == [(addr, addr + PAGE), (addr + 2 * PAGE, addr + 4 * PAGE)]
    other = foreign.mmap(addr + PAGE, PAGE, flags=0x32)
    del region
    mm.close()
    assert [mapped(addr + i * PAGE) for i in range(4)] == [False, True, False, False]
    foreign.munmap(other, PAGE)


def test_close_itself_learns_of_a_foreign_munmap() -> None:
    needs("uffd_events")
    mm = pm.AddressSpace()
    region = mm.mmap(PAGE)
    addr = region.addr
    mm.watch(addr, addr + PAGE)
    foreign.munmap(addr, PAGE)
    del region
    mm._drain_events()
    other = foreign.mmap(addr, PAGE, flags=0x32)
    mm.close()
    assert mapped(addr)
    foreign.munmap(other, PAGE)


def test_a_new_region_at_the_address_of_one_that_was_lost(mm: pm.AddressSpace) -> None:
    lost = mm.mmap(64 * PAGE)
    foreign.munmap(lost.addr, lost.size)
    found = mm.mmap(64 * PAGE)
    if found.addr != lost.addr:
        pytest.fail("the kernel did not use the address again")
    assert lost.closed
    found[0] = 1
    assert not found.closed
