"""Mappings of files on a disk's file system: truncated, punched and written to while a device maps them."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from disk import disk_file
from mirroring import FAULT, PAGE, WRITE, FaultDriver, as_bytes, modern_fault, valid, whole
from seams import errno_of, needs

import pymirror as pm

PAGES = 8
MADV_REMOVE = 9
KEEP_SIZE, PUNCH_HOLE = 1, 2
CONTENTS = b"".join(bytes([page + 1]) * PAGE for page in range(PAGES))

libc = ctypes.CDLL(None, use_errno=True)
libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long)


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    """A descriptor of a file of PAGES pages, page i full of i + 1."""
    with disk_file(tmp_path, CONTENTS) as made:
        yield made


@pytest.fixture
def driver(mm: pm.AddressSpace) -> Iterator[FaultDriver]:
    with FaultDriver(mm) as driver:
        yield driver


def mapped(
    mm: pm.AddressSpace, driver: FaultDriver, file: int, *, shared: bool, write: bool = False
) -> pm.Region:
    """The file's mapping, all of it in the device's page table."""
    buf = mm.mmap(PAGES * PAGE, fd=file, shared=shared)
    with whole(driver, buf, WRITE if write else FAULT) as rng:
        assert driver.device.page_table.map(rng, rng.fault())
    return buf


def punch(file: int, page: int) -> None:
    assert libc.fallocate(file, PUNCH_HOLE | KEEP_SIZE, page * PAGE, PAGE) == 0, os.strerror(
        ctypes.get_errno()
    )


shared_or_private = pytest.mark.parametrize("shared", [True, False], ids=["shared", "private"])


@shared_or_private
class TestBeyondTheEnd:
    def test_a_fault_is_efault_and_what_precedes_it_is_there(
        self, mm: pm.AddressSpace, driver: FaultDriver, file: int, shared: bool
    ) -> None:
        buf = mm.mmap((PAGES + 2) * PAGE, fd=file, shared=shared)
        with whole(driver, buf) as rng:
            with pytest.raises(pm.MirrorError, match="end of the file") as failed:
                rng.fault()
            assert failed.value.errno == errno.EFAULT
            assert failed.value.addr == buf.addr + PAGES * PAGE
            assert valid(rng.pfns) == [True] * PAGES + [False] * 2
            rng.default_flags = rng.pfn_flags_mask = 0
            rng.snapshot()
            assert rng.pfns[PAGES:].tolist() == [0, 0]

    def test_a_device_access_is_efault_and_nobody_is_killed(
        self, mm: pm.AddressSpace, driver: FaultDriver, file: int, shared: bool
    ) -> None:
        buf = mm.mmap((PAGES + 1) * PAGE, fd=file, shared=shared)
        assert errno_of(driver.device.read, mm, buf.addr + PAGES * PAGE, 1) == errno.EFAULT
        assert errno_of(driver.device.write, mm, buf.addr + PAGES * PAGE, b"x") == errno.EFAULT
        assert driver.device.read(mm, buf.addr, PAGES * PAGE) == CONTENTS

    def test_the_modern_walk_reports_it_as_empty(
        self, mm: pm.AddressSpace, driver: FaultDriver, file: int, shared: bool
    ) -> None:
        buf = mm.mmap((PAGES + 1) * PAGE, fd=file, shared=shared)
        assert modern_fault(mm, buf)[PAGES] == 0


@shared_or_private
class TestTruncation:
    def test_is_found_at_the_next_access(
        self, mm: pm.AddressSpace, driver: FaultDriver, file: int, shared: bool
    ) -> None:
        buf = mapped(mm, driver, file, shared=shared)
        os.ftruncate(file, 2 * PAGE)
        assert driver.device.read(mm, buf.addr, 2 * PAGE) == CONTENTS[: 2 * PAGE]
        assert errno_of(driver.device.read, mm, buf.addr + 2 * PAGE, 1) == errno.EFAULT
        assert errno_of(driver.device.write, mm, buf.addr + 3 * PAGE, b"x") == errno.EFAULT
        assert mm.stats()["detected"] > 0

    def test_grown_again_it_reads_as_zeroes(
        self, mm: pm.AddressSpace, driver: FaultDriver, file: int, shared: bool
    ) -> None:
        needs("pfn")
        buf = mapped(mm, driver, file, shared=shared)
        os.ftruncate(file, PAGE)
        os.ftruncate(file, PAGES * PAGE)
        assert driver.device.read(mm, buf.addr, PAGES * PAGE) == CONTENTS[:PAGE] + bytes((PAGES - 1) * PAGE)


@shared_or_private
def test_a_punched_hole_is_found_at_the_next_access(
    mm: pm.AddressSpace, driver: FaultDriver, file: int, shared: bool
) -> None:
    buf = mapped(mm, driver, file, shared=shared)
    punch(file, 3)
    seen = driver.device.read(mm, buf.addr, PAGES * PAGE)
    assert seen == CONTENTS[: 3 * PAGE] + bytes(PAGE) + CONTENTS[4 * PAGE :]
    assert mm.stats()["detected"] > 0


def test_a_private_copy_survives_a_hole_and_goes_with_the_end(
    mm: pm.AddressSpace, driver: FaultDriver, file: int
) -> None:
    buf = mm.mmap(PAGES * PAGE, fd=file)
    as_bytes(buf)[3 * PAGE : 4 * PAGE] = b"c" * PAGE
    with whole(driver, buf) as rng:
        assert driver.device.page_table.map(rng, rng.fault())
    punch(file, 3)
    assert driver.device.read(mm, buf.addr + 3 * PAGE, PAGE) == b"c" * PAGE
    os.ftruncate(file, 3 * PAGE)
    assert errno_of(driver.device.read, mm, buf.addr + 3 * PAGE, 1) == errno.EFAULT


def test_a_hole_through_the_api_is_told_before_in_every_mapping(
    mm: pm.AddressSpace, driver: FaultDriver, file: int
) -> None:
    buf, other = (mapped(mm, driver, file, shared=True) for _ in range(2))
    mm.madvise(buf.addr + 2 * PAGE, PAGE, MADV_REMOVE)
    table = driver.device.page_table
    for region in (buf, other):
        entries = table.entries(region.addr, region.addr + region.size)
        assert (entries != 0).tolist() == [page != 2 for page in range(PAGES)]
    assert mm.stats()["detected"] == 0
    assert driver.device.read(mm, other.addr + 2 * PAGE, PAGE) == bytes(PAGE)


def test_what_a_device_writes_is_in_the_file(mm: pm.AddressSpace, driver: FaultDriver, file: int) -> None:
    buf = mapped(mm, driver, file, shared=True, write=True)
    driver.device.write(mm, buf.addr + 5 * PAGE - 3, b"abcdef")
    assert os.pread(file, 6, 5 * PAGE - 3) == b"abcdef"
    os.fsync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    assert os.pread(file, 6, 5 * PAGE - 3) == b"abcdef"


def test_what_a_device_writes_to_a_private_mapping_is_not(
    mm: pm.AddressSpace, driver: FaultDriver, file: int
) -> None:
    buf = mapped(mm, driver, file, shared=False, write=True)
    driver.device.write(mm, buf.addr, b"abcdef")
    assert as_bytes(buf)[:6] == b"abcdef"
    assert os.pread(file, PAGES * PAGE, 0) == CONTENTS


@shared_or_private
def test_a_write_to_the_file_shows_through_the_page(
    mm: pm.AddressSpace, driver: FaultDriver, file: int, shared: bool
) -> None:
    buf = mapped(mm, driver, file, shared=shared)
    os.pwrite(file, b"news", PAGE)
    assert driver.device.read(mm, buf.addr + PAGE, 4) == b"news"
    assert np.frombuffer(buf, np.uint8)[PAGE : PAGE + 4].tobytes() == b"news"
