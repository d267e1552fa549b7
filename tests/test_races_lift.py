# SPDX-License-Identifier: MIT
"""Read-only pages on their way to device memory: others unmap, move and fork them meanwhile."""

from __future__ import annotations

import errno
import mmap
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from mirroring import PAGE
from racing import peek, sleeping_clone
from seams import Background, foreign, inject, needs, points

import pymirror as pm

pytestmark = pytest.mark.root

PAGES = 8
HUGE = 2 * pm.MiB


@pytest.fixture(params=["thread", "inline"])
def mm(request: pytest.FixtureRequest) -> Iterator[pm.AddressSpace]:
    with pm.AddressSpace(fault_delivery=request.param) as mm:
        yield mm


@pytest.fixture
def vram(mm: pm.AddressSpace) -> Iterator[pm.DeviceMemory]:
    with pm.DeviceMemory(pm.Device("d0"), 2 * pm.MiB) as memory:
        yield memory


@pytest.fixture
def buf(mm: pm.AddressSpace) -> pm.Region:
    buf = mm.mmap(PAGES * PAGE)
    while buf.addr % HUGE > HUGE - buf.size:  # it would leave in two parts
        buf = mm.mmap(PAGES * PAGE)
    np.frombuffer(buf, np.uint64)[:] = content()
    foreign.mprotect(buf.addr, buf.size, mmap.PROT_READ)
    return buf


def content() -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    return np.arange(1, PAGES * PAGE // 8 + 1, dtype=np.uint64)


@contextmanager
def lifting(buf: pm.Region, vram: pm.DeviceMemory, err: int = 0) -> Iterator[None]:
    """While the pages are neither here nor there; ``err``: the device has no room for them then."""
    with points("LIFT") as there:
        migration = Background(pm.migrate_to_device, buf.mm, buf.addr, buf.addr + buf.size, vram)
        there.wait()
        try:
            yield
            if not err:
                there.release()
                migration.result()
                return
            with inject("IOCTL", err=err, tid=migration.tid) as injection:
                there.release()
                assert migration.result() == 0
            assert injection.struck == 1
        finally:
            there.release()


def test_what_is_discarded_meanwhile_is_in_no_slot(
    mm: pm.AddressSpace, vram: pm.DeviceMemory, buf: pm.Region
) -> None:
    with lifting(buf, vram):
        foreign.madvise(buf.addr, buf.size, mmap.MADV_DONTNEED)
    assert vram.used == 0
    assert bytes(buf) == bytes(buf.size)
    other = mm.mmap(4 * pm.MiB)
    start = -(-other.addr // HUGE) * HUGE
    assert pm.migrate_to_device(mm, start, start + HUGE, vram) == HUGE // PAGE
    assert bytes(other) == bytes(other.size)


def test_a_copy_that_is_put_off_is_no_page_that_stays(
    mm: pm.AddressSpace, vram: pm.DeviceMemory, buf: pm.Region
) -> None:
    with points("LIFT") as there:
        migration = Background(pm.migrate_to_device, mm, buf.addr, buf.addr + buf.size, vram)
        there.wait()
        foreign.madvise(buf.addr, buf.size, mmap.MADV_DONTNEED)
        with inject("IOCTL", err=errno.EAGAIN, tid=migration.tid) as injection:
            there.release()
            migration.result()
        assert injection.struck == 1
    assert vram.used == 0
    assert bytes(buf) == bytes(buf.size)


@pytest.mark.parametrize("err", [0, errno.ENOMEM])
def test_what_moves_meanwhile(mm: pm.AddressSpace, vram: pm.DeviceMemory, buf: pm.Region, err: int) -> None:
    to = mm.mmap(PAGES * PAGE)
    with lifting(buf, vram, err):
        foreign.mremap(buf.addr, buf.size, buf.size, 3, to.addr)
    assert bytes(to) == content().tobytes()
    assert vram.used == 0


def test_an_error_where_a_part_has_gone(mm: pm.AddressSpace, vram: pm.DeviceMemory, buf: pm.Region) -> None:
    with lifting(buf, vram, errno.ENOMEM):
        foreign.munmap(buf.addr + 2 * PAGE, PAGE)
    assert vram.used == 0
    assert not vram.holds(buf.addr, buf.addr + buf.size).any()
    rest = mm.mmap(PAGE)
    foreign.mremap(rest.addr, PAGE, PAGE, 3, buf.addr + 2 * PAGE)
    assert bytes(buf)[: 2 * PAGE] == content().tobytes()[: 2 * PAGE]
    assert bytes(buf)[3 * PAGE :] == content().tobytes()[3 * PAGE :]


def test_a_raw_clone_meanwhile(mm: pm.AddressSpace, vram: pm.DeviceMemory, buf: pm.Region) -> None:
    needs("event_fork")
    with lifting(buf, vram), sleeping_clone() as pid:
        mm.stats()  # waits for the lock that the child's copies are made under
        assert peek(pid, buf.addr, buf.size) == content().tobytes()
    assert bytes(buf) == content().tobytes()
