"""Memory that was there already: whole pages of a buffer, held while mirrored, never thrown away."""

from __future__ import annotations

import array
import errno
import gc
import itertools
import mmap
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from mirroring import PAGE, WRITE, Driver
from seams import errno_of

import pymirror as pm

MADV_DONTNEED = 4
MADV_WILLNEED = 3


def device_reads(mm: pm.AddressSpace, own: pm.Adopted) -> bytes:
    with Driver(mm) as driver, driver.range(own.addr, own.addr + own.size) as rng:
        rng.default_flags = pm.HMM_PFN_REQ_FAULT
        assert driver.device.page_table.map(rng, rng.fault())
        return driver.device.read(mm, own.addr, own.size)


def pages(n: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """n whole pages of numbers, aligned."""
    room = np.empty((n + 1) * PAGE, np.uint8)
    start = -room.ctypes.data % PAGE
    found = room[start : start + n * PAGE]
    found[:] = np.arange(n * PAGE) % 251
    return found


@pytest.mark.parametrize(
    "make",
    [
        lambda: np.arange(8 * PAGE, dtype=np.float64),
        lambda: np.asfortranarray(np.arange(6 * PAGE).reshape(6, PAGE)),
        lambda: np.zeros(4 * PAGE, [("a", "i4"), ("b", "f8")]),
        lambda: np.ma.MaskedArray(np.arange(8 * PAGE)),
        lambda: bytearray(b"mirror" * PAGE),
        lambda: array.array("d", range(4 * PAGE)),
        lambda: bytes(5 * PAGE),
        lambda: mmap.mmap(-1, 3 * PAGE),
    ],
    ids=["numpy", "fortran", "records", "subclass", "bytearray", "array", "bytes", "mmap"],
)
def test_a_device_reads_the_whole_pages_of_any_buffer(mm: pm.AddressSpace, make: Any) -> None:
    owner = make()
    with mm.adopt(owner) as own:
        assert own.addr % PAGE == own.size % PAGE == 0
        assert isinstance(own.view, memoryview)
        assert len(own) == own.size == own.view.nbytes
        assert device_reads(mm, own) == bytes(own.view)
        assert own.readonly == isinstance(owner, bytes)


def test_the_edges_are_told(mm: pm.AddressSpace) -> None:
    room = pages(4)
    own = mm.adopt(room[100 : 3 * PAGE + 7])
    start = room.ctypes.data
    assert (own.addr, own.size) == (start + PAGE, 2 * PAGE)
    assert own.edges == ((start + 100, start + PAGE), (start + 3 * PAGE, start + 3 * PAGE + 7))
    assert bytes(own.view) == room[PAGE : 3 * PAGE].tobytes()
    assert mm.adopt(room).edges == ()


def test_what_a_device_writes_is_in_the_owners_array(mm: pm.AddressSpace) -> None:
    room = pages(2)
    with mm.adopt(room) as own, Driver(mm) as driver, driver.range(own.addr, own.addr + own.size) as rng:
        rng.default_flags = WRITE
        assert driver.device.page_table.map(rng, rng.fault())
        driver.device.write(mm, own.addr + 10, b"written by the device")
    assert room[10:31].tobytes() == b"written by the device"


def test_a_device_cannot_write_where_the_vma_forbids_it(mm: pm.AddressSpace) -> None:
    with (
        mmap.mmap(-1, 2 * PAGE, prot=mmap.PROT_READ) as owner,
        mm.adopt(owner) as own,
        Driver(mm) as driver,
        driver.range(own.addr, own.addr + PAGE) as rng,
    ):
        assert own.readonly
        rng.default_flags = WRITE
        assert errno_of(rng.fault) == errno.EPERM
        rng.default_flags, rng.pfn_flags_mask = pm.HMM_PFN_REQ_FAULT, 0
        assert driver.device.page_table.map(rng, rng.fault())
        assert driver.device.read(mm, own.addr, PAGE) == bytes(PAGE)


@pytest.mark.parametrize(
    ("buffer", "why"),
    [
        (np.zeros(0), "empty"),
        (np.zeros((PAGE, 8))[:, ::2], "contiguous"),
        (np.array([None] * 4 * PAGE), "Python objects"),
        (pages(2)[1 : PAGE + 1], "no whole page"),
        (7, "buffer"),
    ],
    ids=["empty", "strided", "objects", "small", "no-buffer"],
)
def test_what_cannot_be_adopted(mm: pm.AddressSpace, buffer: Any, why: str) -> None:
    with pytest.raises(pm.MirrorError, match=why) as refused:
        mm.adopt(buffer)
    assert refused.value.errno == errno.EINVAL
    assert refused.value.hint


class TestTheOwner:
    def test_cannot_resize(self, mm: pm.AddressSpace) -> None:
        owner = bytearray(4 * PAGE)
        own = mm.adopt(owner)
        with pytest.raises(BufferError):
            owner.extend(b"x")
        own.close()
        owner.extend(b"x")

    def test_cannot_unmap(self, mm: pm.AddressSpace) -> None:
        owner = mmap.mmap(-1, 2 * PAGE)
        own = mm.adopt(owner)
        with pytest.raises(BufferError):
            owner.close()
        own.close()
        owner.close()

    def test_may_be_collected_and_the_memory_stays(self, mm: pm.AddressSpace) -> None:
        own = mm.adopt(pages(2))
        gc.collect()
        assert bytes(own.view[:4]) == bytes([0, 1, 2, 3])
        assert device_reads(mm, own)[:4] == bytes([0, 1, 2, 3])

    def test_is_let_go_when_the_adoption_is_collected(self, mm: pm.AddressSpace) -> None:
        owner = bytearray(4 * PAGE)
        mm.adopt(owner)
        gc.collect()
        owner.extend(b"x")


@pytest.fixture
def owner() -> Iterator[mmap.mmap]:
    """Private memory in a mapping of its own, full of 0x5a."""
    with mmap.mmap(-1, 6 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory[:] = b"\x5a" * len(memory)
        yield memory
        gc.collect()


class TestDiscarding:
    @pytest.mark.parametrize(
        "discard",
        [
            lambda mm, own, **how: mm.munmap(own.addr, PAGE, **how),
            lambda mm, own, **how: mm.madvise(own.addr + PAGE, PAGE, MADV_DONTNEED, **how),
            lambda mm, own, **how: mm.mremap(own.addr, own.size, own.size + PAGE, **how),
            lambda mm, own, **how: mm.oom_reap(own.addr - PAGE, own.addr + PAGE, **how),
        ],
        ids=["munmap", "madvise", "mremap", "oom_reap"],
    )
    def test_needs_force(self, mm: pm.AddressSpace, owner: mmap.mmap, discard: Any) -> None:
        own = mm.adopt(memoryview(owner)[PAGE : 5 * PAGE])
        with pytest.raises(pm.MirrorError, match="adopted") as refused:
            discard(mm, own)
        assert refused.value.errno == errno.EBUSY
        assert refused.value.vma is not None
        assert bytes(own.view) == b"\x5a" * 4 * PAGE
        own.close()
        mm.madvise(refused.value.addr, PAGE, MADV_DONTNEED)
        assert owner[:].count(0) == PAGE

    def test_with_force(self, mm: pm.AddressSpace, owner: mmap.mmap) -> None:
        own = mm.adopt(owner)
        mm.madvise(own.addr, PAGE, MADV_DONTNEED, force=True)
        mm.oom_reap(own.addr + 2 * PAGE, own.addr + 3 * PAGE, force=True)
        assert owner[:PAGE] == owner[2 * PAGE : 3 * PAGE] == bytes(PAGE)
        assert owner[PAGE : 2 * PAGE] == b"\x5a" * PAGE
        own.close()

    def test_of_overlapping_adoptions_each_counts(self, mm: pm.AddressSpace) -> None:
        room = pages(4)
        first, second = mm.adopt(room), mm.adopt(room[PAGE : 3 * PAGE])
        first.close()
        mm.madvise(room.ctypes.data, PAGE, MADV_DONTNEED)
        assert errno_of(mm.madvise, second.addr, PAGE, MADV_DONTNEED) == errno.EBUSY
        second.close()
        mm.madvise(room.ctypes.data + PAGE, PAGE, MADV_DONTNEED)

    def test_what_keeps_the_contents_needs_none(self, mm: pm.AddressSpace) -> None:
        room = pages(2)
        own = mm.adopt(room)
        mm.madvise(own.addr, own.size, MADV_WILLNEED)
        mm.mprotect(own.addr, own.size, mmap.PROT_READ)
        mm.mprotect(own.addr, own.size, mmap.PROT_READ | mmap.PROT_WRITE)
        assert bytes(own.view) == room.tobytes()


class TestTheEnd:
    def test_closing_takes_it_off_devices(self, mm: pm.AddressSpace) -> None:
        own = mm.adopt(pages(2))
        with Driver(mm) as driver, driver.range(own.addr, own.addr + own.size) as rng:
            rng.default_flags = pm.HMM_PFN_REQ_FAULT
            assert driver.device.page_table.map(rng, rng.fault())
            own.close()
            update = driver.updates[-1]
            assert (update.start, update.end) == (own.addr, own.addr + own.size)
            assert (update.event, update.guarantee) == (pm.Event.UNMAP, pm.Guarantee.BEFORE)
            assert driver.device.page_table.next() is None
        assert own.closed
        own.close()
        with pytest.raises(ValueError, match="not adopted"):
            own.view  # noqa: B018

    def test_it_outlives_the_address_space(self) -> None:
        owner = bytearray(4 * PAGE)
        with pm.AddressSpace() as mm:
            own = mm.adopt(owner)
        assert bytes(own.view) == bytes(own.size)
        with pytest.raises(BufferError):
            owner.clear()
        own.close()
        owner.clear()

    def test_a_closed_address_space_adopts_nothing(self) -> None:
        mm = pm.AddressSpace()
        mm.close()
        assert errno_of(mm.adopt, bytearray(4 * PAGE)) == errno.ESRCH


def test_threads_adopt_while_others_look(mm: pm.AddressSpace) -> None:
    """Looking walks over what is adopted: what another thread adopts meanwhile must not end the walk."""
    owners = [pages(1) for _ in range(8)]
    adopted = [mm.adopt(owner) for owner in owners]
    late: list[pm.Adopted] = []
    steps = itertools.count()

    def adopt_late(_frame: Any, event: str, _arg: object) -> None:
        if event == "call" and not late and next(steps) == 6:
            late.append(mm.adopt(owners[0]))

    sys.setprofile(adopt_late)
    try:
        assert set(adopted) <= set(mm._adoptions.live())
    finally:
        sys.setprofile(None)
