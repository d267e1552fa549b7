# SPDX-License-Identifier: MIT
"""The kernel's hmm-tests on huge pages that migrate whole (see test_hmm_tests.py)."""

from __future__ import annotations

import ctypes
import errno
import time
from collections.abc import Callable

import pytest
from hmm_suite import HUGE, HUGE_PAGES, LINUX_NEWEST, Hmm, content, hmm, pattern, variant
from mirroring import PAGE
from seams import errno_of, inject

import pymirror as pm
from pymirror.drivers.dmirror import Quirks
from pymirror.drivers.dmirror_uapi import FAIL_ALLOC, PROT_PMD, PROT_WRITE
from pymirror.replay.evidence import read_pages

__all__ = ["hmm", "variant"]

pytestmark = pytest.mark.root

MADV_FREE, DONTUNMAP = 8, pm.MREMAP_MAYMOVE | 4
OFFSETS = [0, HUGE_PAGES // 2 + 3, HUGE_PAGES - 16]
BENCHMARK_PAGES = [HUGE_PAGES << n for n in range(7)]


@pytest.fixture
def quirks() -> Quirks:
    return LINUX_NEWEST


def migrated(hmm: Hmm, buf: pm.Region, expected: bytes) -> None:
    pages = buf.size // PAGE
    result = hmm.dev.migrate_to_dev(buf.addr, pages)
    assert (result.cpages, result.data) == (pages, expected)
    assert hmm.dev.memory.holds(buf.addr, buf.addr + buf.size).all()


def test_migrate_anon_huge_empty(hmm: Hmm) -> None:
    buf = hmm.huge(touch=False)
    migrated(hmm, buf, bytes(HUGE))
    assert content(buf) == bytes(HUGE)


def test_migrate_anon_huge_zero(hmm: Hmm) -> None:
    """The huge zero page."""
    buf = hmm.huge(touch=False)
    assert ctypes.string_at(buf.addr, 1) == b"\0"
    migrated(hmm, buf, bytes(HUGE))
    ctypes.memmove(buf.addr + 5 * PAGE, b"x", 1)
    assert content(buf) == bytes(5 * PAGE) + b"x" + bytes(HUGE - 5 * PAGE - 1)


def test_migrate_anon_huge_free(hmm: Hmm) -> None:
    """Memory that MADV_FREE gave back has what it had, page by page, or zeroes; written, it stays."""
    buf = hmm.huge()
    hmm.mm.madvise(buf.addr, buf.size, MADV_FREE)
    result = hmm.dev.migrate_to_dev(buf.addr, HUGE_PAGES)
    whole = pattern(HUGE_PAGES)
    for at in range(0, HUGE, PAGE):
        assert result.data[at : at + PAGE] in (whole[at : at + PAGE], bytes(PAGE))
    hmm.dev.write(buf.addr, pattern(HUGE_PAGES, 1))
    assert content(buf) == pattern(HUGE_PAGES, 1)


@pytest.mark.needs("move")  # that keeps a huge page whole
def test_migrate_anon_huge_fault(hmm: Hmm) -> None:
    buf = hmm.huge()
    assert read_pages(buf.addr, 1)[0].huge, "the kernel gave no huge page"
    migrated(hmm, buf, pattern(HUGE_PAGES))
    if hmm.kind == "coherent":
        # It is exchanged page by page.
        assert {page.present for page in read_pages(buf.addr, HUGE_PAGES)} == {True}
        assert set(hmm.snapshot(buf)) == {hmm.resident}
        assert content(buf) == pattern(HUGE_PAGES)
        return
    assert {page.present for page in read_pages(buf.addr, HUGE_PAGES)} == {False}
    assert set(hmm.snapshot(buf)) == {hmm.resident | PROT_PMD}
    assert content(buf, 5, 1) == pattern(HUGE_PAGES)[5 * PAGE : 6 * PAGE]
    assert set(hmm.snapshot(buf)) == {PROT_WRITE | PROT_PMD}, "it came home whole"
    assert content(buf) == pattern(HUGE_PAGES)


@pytest.mark.parametrize("offset", OFFSETS)
def test_migrate_partial_unmap_fault(hmm: Hmm, offset: int) -> None:
    buf, pages = hmm.huge(), 16
    migrated(hmm, buf, pattern(HUGE_PAGES))
    hmm.mm.munmap(buf.addr + offset * PAGE, pages * PAGE)
    assert hmm.dev.memory.used == (HUGE_PAGES - pages) * PAGE
    whole = pattern(HUGE_PAGES)
    assert content(buf, 0, offset) == whole[: offset * PAGE]
    after = offset + pages
    assert content(buf, after, HUGE_PAGES - after) == whole[after * PAGE :]


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("thp", [False, True])
@pytest.mark.parametrize("dontunmap", [False, True])
@pytest.mark.parametrize("order", ["before", "after"])
def test_migrate_remap_fault(hmm: Hmm, order: str, dontunmap: bool, thp: bool, offset: int) -> None:
    """A piece goes elsewhere before it migrates, or after."""
    buf = hmm.huge() if thp else hmm.buffer(HUGE_PAGES)
    whole, size = pattern(HUGE_PAGES), 16 * PAGE
    expected = whole[offset * PAGE : offset * PAGE + size]
    if order == "after":
        migrated(hmm, buf, whole)
    flags = DONTUNMAP if dontunmap else pm.MREMAP_MAYMOVE
    piece = move_away(hmm, buf.addr + offset * PAGE, size, flags)
    if order == "before":
        migrated(hmm, piece, expected)
        errno_of(hmm.dev.migrate_to_dev, buf.addr, HUGE_PAGES)
    assert content(piece) == expected
    if dontunmap:
        assert content(buf, offset, 16) == bytes(size)
    assert content(buf, 0, offset) == whole[: offset * PAGE]
    after = offset + 16
    assert content(buf, after, HUGE_PAGES - after) == whole[after * PAGE :]


def move_away(hmm: Hmm, addr: int, size: int, flags: int) -> pm.Region:
    """It would stay in place were it not told where to go."""
    room = hmm.mm.mmap(size)
    return hmm.mm.mremap(addr, size, size, flags=flags | pm.MREMAP_FIXED, new_addr=room.addr)


def test_migrate_anon_huge_err(hmm: Hmm) -> None:
    """Without a huge page of the device, small ones do."""
    buf = hmm.huge()
    hmm.dev.flags(FAIL_ALLOC)
    migrated(hmm, buf, pattern(HUGE_PAGES))
    assert set(hmm.snapshot(buf)) == {hmm.resident}
    assert content(buf) == pattern(HUGE_PAGES)
    assert errno_of(hmm.dev.flags, 2) == errno.EINVAL
    each_call_fails_once(lambda: hmm.huge(), hmm, pattern(HUGE_PAGES))


def test_migrate_anon_huge_zero_err(hmm: Hmm) -> None:
    def zero() -> pm.Region:
        buf = hmm.huge(touch=False)
        assert ctypes.string_at(buf.addr, 1) == b"\0"
        return buf

    buf = zero()
    hmm.dev.flags(FAIL_ALLOC)
    migrated(hmm, buf, bytes(HUGE))
    hmm.dev.flags(0)
    assert content(buf) == bytes(HUGE)
    each_call_fails_once(zero, hmm, bytes(HUGE))


def each_call_fails_once(make: Callable[[], pm.Region], hmm: Hmm, expected: bytes) -> None:
    """Whichever call of the kernel has no memory for it, all of it is there, here or there."""
    struck, nth = True, 0
    while struck and nth < 16:
        nth += 1
        buf = make()
        with inject("IOCTL", nth, errno.ENOMEM) as injection:
            errno_of(hmm.dev.migrate_to_dev, buf.addr, HUGE_PAGES)
        struck = injection.struck > 0
        assert content(buf) == expected
        buf.close()
    assert nth > 2


@pytest.mark.parametrize("pages", BENCHMARK_PAGES)
def test_benchmark_thp_migration(hmm: Hmm, pages: int) -> None:
    """Times both ways, with huge pages and without, and all is there afterwards."""
    for thp in (True, False):
        buf = hmm.huge(pages) if thp else hmm.buffer(pages)
        start = time.perf_counter()
        hmm.dev.migrate_to_dev(buf.addr, pages)
        there = time.perf_counter()
        assert hmm.dev.memory.used == pages * PAGE
        away = time.perf_counter()
        hmm.dev.migrate_to_sys(buf.addr, pages)
        home = time.perf_counter()
        assert content(buf) == pattern(pages)
        gb = pages * PAGE / 1e9
        print(
            f"{pages * PAGE >> 20} MiB, {'huge pages' if thp else '4 KiB pages'}:"
            f" to the device {(there - start) * 1e3:.2f} ms ({gb / (there - start):.2f} GB/s),"
            f" home {(home - away) * 1e3:.2f} ms ({gb / (home - away):.2f} GB/s)"
        )
        buf.close()
