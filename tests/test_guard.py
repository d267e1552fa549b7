# SPDX-License-Identifier: MIT
"""Private mappings of files: guards stand where copies are on a device, and nothing of them is lost."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from disk import disk_file
from guarding import CONTENTS, COPIES, PAGES, contents, expected, run, space, to_device
from mirroring import PAGE, FaultDriver, modern_fault, valid
from racing import run_child, wait_for
from seams import errno_of, foreign, inject, needs

import pymirror as pm

pytestmark = [pytest.mark.root, pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")]

MADV_DONTNEED = 4
HUGE = 2 * pm.MiB


@pytest.fixture(params=["thread", "inline"])
def mm(nothing_left_behind: None, request: pytest.FixtureRequest) -> Iterator[pm.AddressSpace]:
    with space(request.param) as made:
        yield made


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    with disk_file(tmp_path, CONTENTS) as made:
        yield made


@pytest.fixture
def buf(mm: pm.AddressSpace, file: int) -> Iterator[pm.Region]:
    with mm.mmap(PAGES * PAGE, fd=file) as region:
        for page in COPIES:
            ctypes.memset(region.addr + page * PAGE, 100 + page, PAGE)
        yield region


def there(buf: pm.Region, vram: pm.DeviceMemory) -> list[int]:
    return np.flatnonzero(vram.holds(buf.addr, buf.addr + buf.size)).tolist()


def vmas(buf: pm.Region) -> int:
    return sum(1 for vma in buf.mm.vmas(buf.addr, buf.addr + buf.size))


def test_copies_leave_and_come_home(mm: pm.AddressSpace, vram: pm.DeviceMemory, buf: pm.Region) -> None:
    before = vmas(buf)
    assert to_device(buf, vram) == len(COPIES)
    assert there(buf, vram) == list(COPIES)
    assert vmas(buf) == before, "a guard splits no vma"
    assert ctypes.string_at(buf.addr + 5 * PAGE, PAGE) == bytes([105]) * PAGE
    assert there(buf, vram) == [page for page in COPIES if page != 5]
    assert mm.stats()["device_faults"] == 1
    assert pm.migrate_to_system(mm, buf.addr, buf.addr + 8 * PAGE) == 3
    assert contents(buf) == expected()
    assert (vram.used, vmas(buf)) == (0, before)


def test_the_file_keeps_its_own(buf: pm.Region, vram: pm.DeviceMemory, file: int) -> None:
    to_device(buf, vram)
    ctypes.memset(buf.addr + 6 * PAGE, 7, 10)
    assert ctypes.string_at(buf.addr + 6 * PAGE, 11) == bytes([7]) * 10 + bytes([106])
    os.pwrite(file, b"new", 0)
    assert ctypes.string_at(buf.addr, 3) == b"new"
    assert os.pread(file, len(CONTENTS), PAGE)[: 11 * PAGE] == CONTENTS[PAGE : 12 * PAGE]


def test_a_device_reads_and_writes_them_in_place(
    mm: pm.AddressSpace, vram: pm.DeviceMemory, buf: pm.Region
) -> None:
    device = vram.device
    to_device(buf, vram)
    sub = pm.IntervalNotifier(mm, buf.addr, buf.size, lambda sub, range, seq: sub.set_seq(seq))
    pfns = np.zeros(PAGES, np.uint64)
    seq = sub.read_begin()
    asked = {"default_flags": pm.HMM_PFN_REQ_FAULT, "dev_private_owner": vram.owner}
    pm.hmm_range_fault(sub, buf.addr, buf.addr + buf.size, pfns, seq=seq, **asked)
    assert device.page_table.map(sub, seq, buf.addr, pfns)
    assert device.read(mm, buf.addr, buf.size) == bytes(expected())
    device.write(mm, buf.addr + 4 * PAGE, b"device")
    assert there(buf, vram) == list(COPIES)
    device.page_table.clear(buf.addr, buf.addr + buf.size)
    sub.remove()
    assert ctypes.string_at(buf.addr + 4 * PAGE, 7) == b"device" + bytes([104])


def test_another_owner_faults_them_home(mm: pm.AddressSpace, vram: pm.DeviceMemory, buf: pm.Region) -> None:
    to_device(buf, vram)
    assert not any(valid(modern_fault(mm, buf))[page] for page in COPIES)
    assert errno_of(modern_fault, mm, buf, pm.HMM_PFN_REQ_FAULT) == errno.EBUSY, "they came home meanwhile"
    assert all(valid(modern_fault(mm, buf, pm.HMM_PFN_REQ_FAULT)))
    assert vram.used == 0
    assert contents(buf) == expected()


def test_a_system_call_is_refused_and_pymirrors_own_are_not(
    mm: pm.AddressSpace, vram: pm.DeviceMemory, buf: pm.Region
) -> None:
    to_device(buf, vram)
    read, write = os.pipe()
    with open(write, "wb", buffering=0) as out:
        at = (ctypes.c_char * 8).from_address(buf.addr + 9 * PAGE)
        assert errno_of(out.write, at) == errno.EFAULT
    os.close(read)
    assert there(buf, vram) == list(COPIES)
    other = mm.mmap(PAGE)
    with FaultDriver(mm) as driver:
        into = memoryview(buf).cast("B")[9 * PAGE : 10 * PAGE]
        driver.device.read_into(mm, other.addr, into)
        into.release()
    assert ctypes.string_at(buf.addr + 9 * PAGE, PAGE) == bytes(PAGE)


def test_mprotect_and_mremap_behind_our_back(
    mm: pm.AddressSpace, vram: pm.DeviceMemory, buf: pm.Region
) -> None:
    to_device(buf, vram)
    for prot in (mmap.PROT_READ, 0, mmap.PROT_READ | mmap.PROT_WRITE):
        foreign.mprotect(buf.addr, buf.size, prot)
    assert ctypes.string_at(buf.addr + 4 * PAGE, 1) == bytes([104])
    place = foreign.mmap(0, PAGE)
    assert foreign.mremap(buf.addr + 7 * PAGE, PAGE, PAGE, 3, place) == place
    assert ctypes.string_at(place, PAGE) == bytes([107]) * PAGE
    foreign.munmap(place, PAGE)
    mm.sync()


def test_read_only_at_home(mm: pm.AddressSpace, vram: pm.DeviceMemory, buf: pm.Region) -> None:
    mm.mprotect(buf.addr, buf.size, mmap.PROT_READ)
    assert to_device(buf, vram) == len(COPIES)
    assert contents(buf) == expected()
    assert to_device(buf, vram) == len(COPIES)
    mm.mprotect(buf.addr, buf.size, mmap.PROT_READ | mmap.PROT_WRITE)
    ctypes.memset(buf.addr + 4 * PAGE, 1, 1)
    assert ctypes.string_at(buf.addr + 4 * PAGE, 2) == bytes([1, 104])


@pytest.mark.parametrize("by", ["api", "foreign"])
def test_madvise_gives_the_files_page(
    mm: pm.AddressSpace, vram: pm.DeviceMemory, buf: pm.Region, by: str
) -> None:
    to_device(buf, vram)
    call = mm.madvise if by == "api" else foreign.madvise
    call(buf.addr + 6 * PAGE, 2 * PAGE, MADV_DONTNEED)
    assert ctypes.string_at(buf.addr + 6 * PAGE, 2 * PAGE) == CONTENTS[6 * PAGE : 8 * PAGE]
    assert vram.used == (len(COPIES) - 2) * PAGE
    assert ctypes.string_at(buf.addr + 8 * PAGE, PAGE) == bytes([108]) * PAGE


@pytest.mark.parametrize("by", ["api", "foreign"])
def test_munmap_frees_them(mm: pm.AddressSpace, vram: pm.DeviceMemory, buf: pm.Region, by: str) -> None:
    to_device(buf, vram)
    call = mm.munmap if by == "api" else foreign.munmap
    call(buf.addr + 4 * PAGE, 4 * PAGE)
    mm.sync()
    assert vram.used == (len(COPIES) - 4) * PAGE
    assert ctypes.string_at(buf.addr + 8 * PAGE, 4 * PAGE) == expected()[8 * PAGE : 12 * PAGE]


def test_a_child_has_them_and_they_leave_again(
    mm: pm.AddressSpace, vram: pm.DeviceMemory, buf: pm.Region
) -> None:
    """After a fork pages are write-protected, which a guard does not stand (see native/guard.c)."""
    told: list[str] = []

    def invalidate(sub: pm.IntervalNotifier, update: pm.MmuNotifierRange, seq: int) -> bool:
        sub.set_seq(seq)
        told.append(update.event.name)
        return True

    sub = pm.IntervalNotifier(mm, buf.addr, buf.size, invalidate)
    to_device(buf, vram)
    mm.sync()
    told.clear()
    if (pid := os.fork()) == 0:
        run_child(lambda: os._exit(contents(buf) != expected()))
    assert wait_for(pid) == 0
    mm.sync()
    assert "MIGRATE" in told
    sub.remove()
    assert vram.used == 0
    assert to_device(buf, vram) == len(COPIES)
    assert contents(buf) == expected()


def test_beyond_the_end_of_the_file(
    mm: pm.AddressSpace, vram: pm.DeviceMemory, buf: pm.Region, file: int
) -> None:
    """Copies beyond the end go with it, as those at home do."""
    to_device(buf, vram)
    os.ftruncate(file, 8 * PAGE)
    pm.migrate_to_system(mm, buf.addr, buf.addr + buf.size)
    assert vram.used == 0
    assert ctypes.string_at(buf.addr, 8 * PAGE) == expected()[: 8 * PAGE]
    os.ftruncate(file, 16 * PAGE)
    assert ctypes.string_at(buf.addr + 8 * PAGE, 8 * PAGE) == bytes(8 * PAGE)


def test_eviction_and_close(mm: pm.AddressSpace, buf: pm.Region) -> None:
    with pm.DeviceMemory(pm.Device("d1"), 8 * PAGE) as vram:
        assert to_device(buf, vram) == len(COPIES)
        other = mm.mmap(PAGE)
        ctypes.memset(other.addr, 1, PAGE)
        assert to_device(other, vram) == 1
        # What is in one 2 MiB range goes together.
        first = (buf.addr + COPIES.start * PAGE) // HUGE
        stay = [page for page in COPIES if (buf.addr + page * PAGE) // HUGE != first]
        assert there(buf, vram) == stay
        back = [page for page in COPIES if page < 6 and page not in stay]
        assert pm.migrate_to_device(mm, buf.addr, buf.addr + 6 * PAGE, vram) == len(back)
    assert contents(buf) == expected()


def test_pinned_copies_stay(mm: pm.AddressSpace, vram: pm.DeviceMemory, buf: pm.Region) -> None:
    needs("io_uring")
    to_device(buf, vram)
    with pm.pin_user_pages(mm, buf.addr + 5 * PAGE, 2) as pin:
        assert pin.read() == bytes(expected()[5 * PAGE : 7 * PAGE])
        to_device(buf, vram)
        assert there(buf, vram) == [page for page in COPIES if page not in (5, 6)]
    assert contents(buf) == expected()


def test_exclusive_access_is_refused(mm: pm.AddressSpace, buf: pm.Region) -> None:
    assert errno_of(pm.make_device_exclusive, mm, buf.addr + 5 * PAGE, pm.Device("e")) == errno.EBUSY
    assert contents(buf) == expected()


def test_the_data_of_libraries_stays(mm: pm.AddressSpace, vram: pm.DeviceMemory) -> None:
    data = [
        vma
        for vma in mm.vmas()
        if "libc.so" in vma.name and vma.prot == mmap.PROT_READ | mmap.PROT_WRITE and not vma.shared
    ]
    assert data
    for vma in data:
        assert pm.migrate_to_device(mm, vma.start, vma.end, vram) == 0


def test_without_the_feature_they_stay(nothing_left_behind: None, file: int) -> None:
    needs("wp_async", "uffd_events", "pagemap", "uffd_kernel")
    with pm.AddressSpace(disable=["guard"]) as mm, pm.DeviceMemory(pm.Device("d"), pm.MiB) as vram:
        buf = mm.mmap(PAGES * PAGE, fd=file)
        ctypes.memset(buf.addr, 9, 2 * PAGE)
        assert to_device(buf, vram) == 0
        assert ctypes.string_at(buf.addr, 2 * PAGE) == bytes([9]) * 2 * PAGE


CALLS = [
    ("MPROTECT", errno.ENOMEM),
    ("MADVISE", errno.EAGAIN),
    ("MADVISE", errno.ENOMEM),
    ("PREAD", errno.EIO),
    ("PREAD", errno.EINTR),
    ("PWRITE", errno.ENOMEM),
    ("PWRITE", errno.EIO),
    ("IOCTL", errno.EAGAIN),
    ("IOCTL", errno.ENOMEM),
    ("MMAP", errno.ENOMEM),
    ("OPEN", errno.EMFILE),
    ("SIGACTION", errno.EINVAL),
]


@pytest.mark.parametrize(("call", "number"), CALLS)
@pytest.mark.parametrize("way", ["out", "home", "touch"])
def test_failed_calls_lose_nothing(
    mm: pm.AddressSpace, vram: pm.DeviceMemory, buf: pm.Region, way: str, call: str, number: int
) -> None:
    for nth in range(1, 100):
        if way != "out":
            to_device(buf, vram)
        with inject(call, nth, number) as injection:
            if way == "out":
                errno_of(to_device, buf, vram)
            elif way == "touch":
                assert contents(buf) == expected()
            else:
                errno_of(pm.migrate_to_system, mm, buf.addr, buf.addr + buf.size)
        assert contents(buf) == expected(), f"after {call} number {nth}"
        assert vram.used == 0
        if not injection.struck:
            return
    pytest.fail("the operation never ended without meeting the failure")


def test_threads_touch_while_they_come_and_go(
    mm: pm.AddressSpace, vram: pm.DeviceMemory, buf: pm.Region
) -> None:
    """Each thread counts in words of its own, on every page: no count is ever lost."""
    words = np.frombuffer(buf, np.uint64).reshape(PAGES, PAGE // 8)[COPIES.start : COPIES.stop]
    words[:] = 0
    wrong: list[int] = []
    counts = [0, 0, 0]
    enough = threading.Event()

    def count(own: int) -> None:
        while not enough.is_set():
            for page in words:
                if page[own] != counts[own]:
                    wrong.append(own)
                page[own] += 1
            counts[own] += 1

    workers = [threading.Thread(target=count, args=(own,)) for own in range(len(counts))]
    for worker in workers:
        worker.start()
    moved = 0
    for _ in range(200):
        moved += to_device(buf, vram)
        pm.migrate_to_system(mm, buf.addr + 6 * PAGE, buf.addr + 8 * PAGE)
    enough.set()
    for worker in workers:
        worker.join()
    assert not wrong
    assert moved
    assert (words[:, : len(counts)] == counts).all()


def test_an_earlier_handler_gets_what_is_not_ours(mm: pm.AddressSpace, tmp_path: Path) -> None:
    status, said = run(
        mm, tmp_path, "faulthandler.enable(); assert out() == 1 and buf[0] == 1; ctypes.string_at(4096, 1)"
    )
    assert status == -signal.SIGSEGV
    assert "Fatal Python error: Segmentation fault" in said


def test_without_a_handler_it_is_the_end(mm: pm.AddressSpace, tmp_path: Path) -> None:
    assert run(mm, tmp_path, "out(); ctypes.memset(buf.addr + 8192, 1, 1); ctypes.string_at(4096, 1)") == (
        -signal.SIGSEGV,
        "",
    )


def test_a_later_handler_is_refused_with_its_place(mm: pm.AddressSpace, tmp_path: Path) -> None:
    status, said = run(
        mm,
        tmp_path,
        "assert out() == 1 and buf[0] == 1\n"
        "faulthandler.enable()\n"
        "try:\n"
        "    out()\n"
        "except pm.MirrorError as refused:\n"
        "    print(refused, file=sys.stderr)\n"
        "faulthandler.disable()\n"
        "assert out() == 1 and buf[0] == 1\n"
        "vram.close(); mm.close()\n",
    )
    assert status == 0, said
    assert "EBUSY" in said
    assert "SIGSEGV" in said or mm.fault_delivery == "inline"
