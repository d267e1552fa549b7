# SPDX-License-Identifier: MIT
"""The kernel's hmm-tests by their names: what each asserts, on real memory and the dmirror driver.

Those on huge pages that migrate whole are in test_hmm_tests_thp.py.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import socket
import struct
from collections.abc import Iterator

import pytest
import test_hmm_tests_thp
from hmm_suite import (
    BUFFER_PAGES,
    HUGE,
    HUGE_PAGES,
    NAMES,
    NOT_POSSIBLE,
    TIMES,
    Hmm,
    content,
    hmm,
    hmm2,
    pattern,
    quirks,
    variant,
)
from mirroring import PAGE
from racing import waiting_child
from seams import Background, errno_of, foreign, needs

import pymirror as pm
from pymirror.drivers.dmirror_uapi import (
    PROT_DEV_COHERENT_REMOTE,
    PROT_ERROR,
    PROT_NONE,
    PROT_PMD,
    PROT_READ,
    PROT_WRITE,
    PROT_ZERO,
)

__all__ = ["hmm", "hmm2", "quirks", "variant"]

pytestmark = [pytest.mark.root, pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")]

READ, WRITE = mmap.PROT_READ, mmap.PROT_READ | mmap.PROT_WRITE


def test_all_of_them_are_here() -> None:
    tests = {**vars(test_hmm_tests_thp), **globals()}
    assert len(NAMES) == len(set(NAMES)) == 38
    missing = [name for name in NAMES if not callable(tests.get(f"test_{name}"))]
    assert missing == sorted(NOT_POSSIBLE)
    assert all(NOT_POSSIBLE.values())


def test_open_close(hmm: Hmm) -> None:
    other = hmm.open(hmm.mm, 1)
    other.close()
    other.close()
    assert errno_of(other.migrate_to_dev, hmm.buffer(1).addr, 1) == errno.ESRCH


def test_anon_read(hmm: Hmm) -> None:
    """Pages of zeroes, of which one is read-only, and pages that were written."""
    buf = hmm.mm.mmap(BUFFER_PAGES * PAGE)
    hmm.mm.mprotect(buf.addr + PAGE, PAGE, READ)
    ctypes.memmove(buf.addr + 2 * PAGE, pattern(BUFFER_PAGES - 2), buf.size - 2 * PAGE)
    result = hmm.dev.read(buf.addr, BUFFER_PAGES)
    assert (result.cpages, result.faults) == (BUFFER_PAGES, 1)
    assert result.data == bytes(2 * PAGE) + pattern(BUFFER_PAGES - 2)


def test_anon_read_prot(hmm: Hmm) -> None:
    buf = hmm.buffer()
    hmm.mm.mprotect(buf.addr, buf.size, 0)
    seen = bytearray(b"\x55" * buf.size)
    assert errno_of(hmm.dev.read, buf.addr, BUFFER_PAGES) == errno.EFAULT
    assert errno_of(hmm.dev.device.read_into, hmm.mm, buf.addr, seen) == errno.EFAULT
    assert seen == b"\x55" * buf.size
    hmm.mm.mprotect(buf.addr, buf.size, WRITE)
    assert content(buf) == pattern(BUFFER_PAGES)


def test_anon_write(hmm: Hmm) -> None:
    buf = hmm.mm.mmap(BUFFER_PAGES * PAGE)
    result = hmm.dev.write(buf.addr, pattern(BUFFER_PAGES))
    assert (result.cpages, result.faults) == (BUFFER_PAGES, 1)
    assert content(buf) == pattern(BUFFER_PAGES)


def test_anon_write_prot(hmm: Hmm) -> None:
    buf = hmm.mm.mmap(BUFFER_PAGES * PAGE, prot=READ)
    result = hmm.dev.read(buf.addr, 1)
    assert (result.cpages, result.faults, result.data) == (1, 1, bytes(PAGE))
    assert errno_of(hmm.dev.write, buf.addr, pattern(BUFFER_PAGES)) == errno.EPERM
    assert content(buf) == bytes(buf.size)
    hmm.mm.mprotect(buf.addr, buf.size, WRITE)
    result = hmm.dev.write(buf.addr, pattern(BUFFER_PAGES))
    assert (result.cpages, result.faults) == (BUFFER_PAGES, 1)
    assert content(buf) == pattern(BUFFER_PAGES)


@pytest.mark.parametrize("thp", [False, True])
@pytest.mark.parametrize("migrate", [False, True])
def test_anon_write_child(hmm: Hmm, migrate: bool, thp: bool) -> None:
    """What the child's device writes, the child alone sees."""
    buf = hmm.huge(BUFFER_PAGES) if thp else hmm.buffer()
    new = pattern(BUFFER_PAGES, 99)
    with waiting_child() as parent_goes_on:
        if migrate:
            errno_of(hmm.dev.migrate_to_dev, buf.addr, BUFFER_PAGES)

        def work(dev: object) -> None:
            assert content(buf) == pattern(BUFFER_PAGES)
            result = dev.write(buf.addr, new)  # type: ignore[attr-defined]
            assert result.cpages == BUFFER_PAGES
            assert content(buf) == new

        hmm.in_child(work)
        assert content(buf) == pattern(BUFFER_PAGES)
        parent_goes_on()
    assert content(buf) == pattern(BUFFER_PAGES)


def test_anon_write_child_shared(hmm: Hmm) -> None:
    buf = hmm.buffer(shared=True)
    new = pattern(BUFFER_PAGES, 99)

    def work(dev: object) -> None:
        assert content(buf) == pattern(BUFFER_PAGES)
        dev.write(buf.addr, new)  # type: ignore[attr-defined]
        assert content(buf) == new

    hmm.in_child(work)
    assert content(buf) == new


def test_anon_write_huge(hmm: Hmm) -> None:
    buf = hmm.huge(2 * HUGE_PAGES, touch=False)
    result = hmm.dev.write(buf.addr, pattern(2 * HUGE_PAGES))
    assert (result.cpages, result.faults) == (2 * HUGE_PAGES, 1)
    assert content(buf) == pattern(2 * HUGE_PAGES)


@pytest.mark.hugetlb
def test_anon_write_hugetlbfs(hmm: Hmm) -> None:
    buf = hmm.mm.mmap(HUGE, huge="hugetlb")
    result = hmm.dev.write(buf.addr, pattern(HUGE_PAGES))
    assert (result.cpages, result.faults) == (HUGE_PAGES, 1)
    assert content(buf) == pattern(HUGE_PAGES)


@pytest.fixture
def file(nothing_left_behind: None) -> Iterator[int]:
    fd = os.memfd_create("pymirror-test")
    os.write(fd, pattern(BUFFER_PAGES))
    yield fd
    os.close(fd)


def test_file_read(hmm: Hmm, file: int) -> None:
    buf = hmm.mm.mmap(BUFFER_PAGES * PAGE, fd=file, shared=True, prot=READ)
    result = hmm.dev.read(buf.addr, BUFFER_PAGES)
    assert (result.cpages, result.faults) == (BUFFER_PAGES, 1)
    assert result.data == pattern(BUFFER_PAGES)


def test_file_write(hmm: Hmm, file: int) -> None:
    buf = hmm.mm.mmap(BUFFER_PAGES * PAGE, fd=file, shared=True)
    new = pattern(BUFFER_PAGES, 7)
    result = hmm.dev.write(buf.addr, new)
    assert (result.cpages, result.faults) == (BUFFER_PAGES, 1)
    assert content(buf) == new
    assert os.pread(file, buf.size, 0) == new


def test_migrate(hmm: Hmm) -> None:
    buf = hmm.buffer()
    result = hmm.dev.migrate_to_dev(buf.addr, BUFFER_PAGES)
    assert (result.cpages, result.data) == (BUFFER_PAGES, pattern(BUFFER_PAGES))
    assert set(hmm.snapshot(buf)) == {hmm.resident}
    assert content(buf) == pattern(BUFFER_PAGES)


def test_migrate_file_private(hmm: Hmm, file: int) -> None:
    """The copies that a private mapping of a file makes. Inline only guards can stand for them."""
    buf = hmm.mm.mmap(BUFFER_PAGES * PAGE, fd=file)
    ctypes.memmove(buf.addr, pattern(BUFFER_PAGES, 3), buf.size)
    guarded = hmm.kind == "private" and "guard" in hmm.mm.features
    if hmm.delivery == "inline" and not guarded:
        assert errno_of(hmm.dev.migrate_to_dev, buf.addr, BUFFER_PAGES) == errno.ENOENT
    else:
        result = hmm.dev.migrate_to_dev(buf.addr, BUFFER_PAGES)
        assert (result.cpages, result.data) == (BUFFER_PAGES, pattern(BUFFER_PAGES, 3))
    assert content(buf) == pattern(BUFFER_PAGES, 3)
    assert os.pread(file, buf.size, 0) == pattern(BUFFER_PAGES)


def test_migrate_fault(hmm: Hmm) -> None:
    """Half comes home by touches of the CPU; then what is partly there migrates again."""
    buf = hmm.buffer()
    for _ in range(2):
        result = hmm.dev.migrate_to_dev(buf.addr, BUFFER_PAGES)
        assert (result.cpages, result.data) == (BUFFER_PAGES, pattern(BUFFER_PAGES))
        assert content(buf, 0, BUFFER_PAGES // 2) == pattern(BUFFER_PAGES)[: buf.size // 2]
        home = hmm.snapshot(buf, 0, BUFFER_PAGES // 2)
        assert set(home) == {PROT_WRITE if hmm.kind == "private" else hmm.resident}
        assert set(hmm.snapshot(buf, BUFFER_PAGES // 2)) == {hmm.resident}
    assert hmm.dev.migrate_to_sys(buf.addr, BUFFER_PAGES).cpages in (BUFFER_PAGES // 2, BUFFER_PAGES)
    assert content(buf) == pattern(BUFFER_PAGES)


def test_migrate_release(hmm: Hmm) -> None:
    buf = hmm.buffer()
    hmm.dev.migrate_to_dev(buf.addr, BUFFER_PAGES)
    assert hmm.dev.release().cpages == BUFFER_PAGES
    assert hmm.dev.memory.used == 0
    assert set(hmm.snapshot(buf)) == {PROT_WRITE}
    assert content(buf) == pattern(BUFFER_PAGES)
    assert hmm.dev.release().cpages == 0


def test_migrate_shared(hmm: Hmm) -> None:
    buf = hmm.buffer(shared=True)
    assert errno_of(hmm.dev.migrate_to_dev, buf.addr, BUFFER_PAGES) == errno.ENOENT
    assert content(buf) == pattern(BUFFER_PAGES)


def test_migrate_mixed(hmm2: Hmm) -> None:
    """A hole, no access, the zero page, read-only, writable, and a page of the other device."""
    buf = hmm2.mm.mmap(6 * PAGE)
    hmm2.devs[1].migrate_to_dev(buf.addr, 1)
    assert errno_of(hmm2.dev.migrate_to_dev, buf.addr, 1) == errno.ENOENT
    page = [buf.addr + i * PAGE for i in range(6)]
    hmm2.mm.munmap(page[1], PAGE)
    assert errno_of(hmm2.dev.migrate_to_dev, page[0], 3) == errno.EINVAL
    hmm2.mm.mprotect(page[2], PAGE, 0)
    assert errno_of(hmm2.dev.migrate_to_dev, page[2], 2) == errno.EINVAL
    hmm2.mm.mprotect(page[2], PAGE, READ)
    assert ctypes.string_at(page[2], 1) == b"\0"
    for number in (3, 4, 5):
        ctypes.memset(page[number], number, PAGE)
    hmm2.mm.mprotect(page[3], PAGE, READ)
    result = hmm2.dev.migrate_to_dev(page[2], 4)
    assert (result.cpages, result.data[::PAGE]) == (4, bytes([0, 3, 4, 5]))
    hmm2.devs[1].migrate_to_dev(hmm2.buffer(1).addr, 1)
    assert errno_of(hmm2.devs[1].migrate_to_dev, page[5], 1) == errno.ENOENT
    assert ctypes.string_at(page[2], 4 * PAGE)[::PAGE] == bytes([0, 3, 4, 5])


def test_migrate_multiple(hmm: Hmm) -> None:
    for round in range(TIMES):
        buf = hmm.buffer(salt=round)
        result = hmm.dev.migrate_to_dev(buf.addr, BUFFER_PAGES)
        assert (result.cpages, result.data) == (BUFFER_PAGES, pattern(BUFFER_PAGES, round))
        hmm.dev.migrate_to_sys(buf.addr, BUFFER_PAGES)
        assert content(buf) == pattern(BUFFER_PAGES, round)
        buf.close()


def test_anon_read_multiple(hmm: Hmm) -> None:
    for round in range(TIMES):
        buf = hmm.buffer(salt=round)
        result = hmm.dev.read(buf.addr, BUFFER_PAGES)
        assert (result.cpages, result.faults) == (BUFFER_PAGES, 1)
        assert result.data == pattern(BUFFER_PAGES, round)
        buf.close()


@pytest.mark.parametrize("late", range(TIMES))
def test_anon_teardown(hmm: Hmm, late: int) -> None:
    """Another thread unmaps half while the device reads: it reads what was there, or is told."""
    buf, half = hmm.buffer(), BUFFER_PAGES // 2

    def unmap() -> None:
        for page in range(late * 50):
            assert buf[page % half * PAGE] == pattern(1)[0] or page
        foreign.munmap(buf.addr + half * PAGE, half * PAGE)

    hmm.mm.watch(buf.addr, buf.addr + buf.size)
    unmapping = Background(unmap)
    code, reads = 0, 0
    while not code and reads < 1000:
        code = errno_of(lambda: read_whole(hmm, buf))
        reads += unmapping.done
    unmapping.result()
    assert code == errno.EFAULT
    assert hmm.dev.read(buf.addr, half).data == pattern(BUFFER_PAGES)[: half * PAGE]


def read_whole(hmm: Hmm, buf: pm.Region) -> None:
    assert hmm.dev.read(buf.addr, BUFFER_PAGES).data == pattern(BUFFER_PAGES)


def test_mixedmap(hmm: Hmm) -> None:
    """Memory that a driver maps page by page (VM_MIXEDMAP): the ring of a packet socket is of that kind."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as packets:
        ring = struct.pack("=IIII", PAGE, 2, PAGE // 2, 4)
        packets.setsockopt(263, 5, ring)  # SOL_PACKET, PACKET_RX_RING
        buf = hmm.mm.mmap(2 * PAGE, fd=packets.fileno(), shared=True, prot=READ)
        assert "mm" in vm_flags(buf.addr)
        assert hmm.snapshot(buf, 0, 1) == bytes([PROT_READ])
        buf.close()


def vm_flags(addr: int) -> list[str]:
    found = False
    with open("/proc/self/smaps") as smaps:
        for line in smaps:
            found = found or line.startswith(f"{addr:x}-")
            if found and line.startswith("VmFlags:"):
                return line.split()[1:]
    return []


@pytest.mark.needs("pfn")  # that tells the zero page
def test_snapshot(hmm2: Hmm) -> None:
    buf = hmm2.mm.mmap(7 * PAGE)
    page = [buf.addr + i * PAGE for i in range(7)]
    hmm2.mm.munmap(page[0], PAGE)
    hmm2.mm.mprotect(page[1], PAGE, 0)
    assert ctypes.string_at(page[2], 1) == b"\0"
    for number in (3, 4, 5, 6):
        ctypes.memset(page[number], number, 1)
    hmm2.mm.mprotect(page[3], PAGE, READ)
    hmm2.devs[0].migrate_to_dev(page[5], 1)
    hmm2.devs[1].migrate_to_dev(page[6], 1)
    others = PROT_NONE if hmm2.kind == "private" else PROT_DEV_COHERENT_REMOTE | PROT_WRITE
    assert hmm2.dev.snapshot(page[0], 7).data == bytes(
        [PROT_ERROR, PROT_ERROR, PROT_ZERO | PROT_READ, PROT_READ, PROT_WRITE, hmm2.resident, others]
    )


@pytest.mark.hugetlb
def test_compound(hmm: Hmm) -> None:
    buf = hmm.mm.mmap(2 * HUGE, huge="hugetlb")
    ctypes.memset(buf.addr, 1, buf.size)
    assert set(hmm.snapshot(buf)) == {PROT_WRITE | PROT_PMD}
    hmm.mm.mprotect(buf.addr, buf.size, READ)
    assert set(hmm.snapshot(buf)) == {PROT_READ | PROT_PMD}


def test_double_map(hmm2: Hmm) -> None:
    buf = hmm2.buffer()
    for dev in hmm2.devs:
        assert dev.read(buf.addr, BUFFER_PAGES).data == pattern(BUFFER_PAGES)
    hmm2.dev.migrate_to_dev(buf.addr, BUFFER_PAGES)
    assert hmm2.devs[1].read(buf.addr, BUFFER_PAGES).data == pattern(BUFFER_PAGES)
    home = PROT_WRITE if hmm2.kind == "private" else hmm2.resident
    assert set(hmm2.snapshot(buf)) == {home}
    assert content(buf) == pattern(BUFFER_PAGES)


def test_exclusive(hmm: Hmm) -> None:
    buf = hmm.buffer(16)
    assert hmm.dev.exclusive(buf.addr, 16).data == pattern(16)
    assert errno_of(hmm.dev.check_exclusive, buf.addr, 16) == errno.EPERM
    words = (ctypes.c_uint64 * (16 * PAGE // 8)).from_address(buf.addr)
    for at in range(0, len(words), 64):
        words[at] += 1
    assert hmm.dev.check_exclusive(buf.addr, 16).cpages == 0
    expected = (ctypes.c_uint64 * len(words)).from_buffer_copy(pattern(16))
    for at in range(0, len(words), 64):
        expected[at] += 1
    assert content(buf) == bytes(expected)


def test_exclusive_mprotect(hmm: Hmm) -> None:
    buf = hmm.buffer(16)
    hmm.dev.exclusive(buf.addr, 16)
    hmm.mm.mprotect(buf.addr, buf.size, READ)
    assert errno_of(hmm.dev.write, buf.addr, bytes(buf.size)) == errno.EPERM
    assert content(buf) == pattern(16)


def test_exclusive_cow(hmm: Hmm) -> None:
    buf = hmm.buffer(16)
    word = ctypes.c_uint64.from_address(buf.addr + 5 * PAGE)
    before = word.value
    hmm.dev.exclusive(buf.addr, 16)

    def count() -> None:
        for _ in range(3):
            word.value += 1
        assert word.value == (before + 3) % (1 << 64)

    with waiting_child(count) as child_counts:
        word.value += 1
        child_counts()
    assert word.value == (before + 1) % (1 << 64)
    assert content(buf, 6) == pattern(16)[6 * PAGE :]


def test_hmm_gup_test(hmm: Hmm) -> None:
    """What takes pages for a system call leaves coherent ones where they are; what holds them does not."""
    needs("io_uring")
    buf = hmm.buffer(4)
    hmm.dev.migrate_to_dev(buf.addr, 4)
    if hmm.delivery == "thread" or hmm.kind == "coherent":
        home = PROT_WRITE if hmm.kind == "private" else hmm.resident
        assert spliced(buf.addr) == pattern(1)
        assert hmm.snapshot(buf, 0, 1) == bytes([home])
    with pm.pin_user_pages(hmm.mm, buf.addr + 2 * PAGE, 2) as pin:
        assert pin.read() == pattern(4)[2 * PAGE :]
        assert hmm.snapshot(buf, 2) == bytes([PROT_WRITE, PROT_WRITE])
        assert errno_of(hmm.dev.migrate_to_dev, buf.addr + 2 * PAGE, 2) == errno.ENOENT
    assert content(buf) == pattern(4)


def spliced(addr: int) -> bytes:
    """A page that went into a pipe as it is: vmsplice() is get_user_pages_fast()."""
    read, write = os.pipe()
    vector = (ctypes.c_uint64 * 2)(addr, PAGE)
    try:
        assert ctypes.CDLL(None, use_errno=True).vmsplice(write, vector, 1, 0) == PAGE
        return os.read(read, PAGE)
    finally:
        os.close(read)
        os.close(write)


def test_hmm_cow_in_device(hmm: Hmm) -> None:
    """Pages of the device that a child gets too: who writes gets a copy, the other keeps what was there."""
    buf = hmm.buffer()
    hmm.dev.migrate_to_dev(buf.addr, BUFFER_PAGES)
    new = pattern(BUFFER_PAGES, 5)

    def work() -> None:
        assert content(buf) == pattern(BUFFER_PAGES)
        ctypes.memset(buf.addr, 0, buf.size)

    with waiting_child(work) as child_writes:
        ctypes.memmove(buf.addr, new, buf.size)
        child_writes()
    assert content(buf) == new
