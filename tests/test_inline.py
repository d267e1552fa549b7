# SPDX-License-Identifier: MIT
"""The two deliveries of CPU faults on device memory: where they differ, and what inline asks of a program."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from mirroring import PAGE, FaultDriver, as_bytes
from racing import in_child
from seams import errno_of, foreign, needs

import pymirror as pm

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")

PAGES = 64
SYS_FUTEX = 202
MADV_POPULATE_WRITE = 23
LIBC = ctypes.CDLL(None, use_errno=True)


@pytest.fixture(params=["thread", "inline"])
def mm(nothing_left_behind: None, request: pytest.FixtureRequest) -> Iterator[pm.AddressSpace]:
    needs("uffd_events", "move", "pagemap", "uffd_kernel" if request.param == "thread" else "sigbus")
    with pm.AddressSpace(fault_delivery=request.param) as space:
        yield space


inline = pytest.mark.parametrize("mm", ["inline"], indirect=True)


def out(mm: pm.AddressSpace, vram: pm.DeviceMemory, pages: int = PAGES) -> pm.Region:
    """Memory on the device, each page full of its number."""
    buf = mm.mmap(pages * PAGE)
    np.frombuffer(buf, np.uint8).reshape(pages, PAGE)[:] = np.arange(pages, dtype=np.uint8)[:, None]
    assert pm.migrate_to_device(mm, buf.addr, buf.addr + buf.size, vram) == pages
    return buf


def intact(buf: pm.Region) -> bool:
    pages = np.frombuffer(buf, np.uint8).reshape(-1, PAGE)
    return bool((pages == np.arange(len(pages), dtype=np.uint8)[:, None]).all())


class IoVec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("len", ctypes.c_size_t))


def vm_readv(addr: int) -> int:
    into = ctypes.create_string_buffer(8)
    local, remote = IoVec(ctypes.addressof(into), 8), IoVec(addr, 8)
    return int(LIBC.process_vm_readv(os.getpid(), ctypes.byref(local), 1, ctypes.byref(remote), 1, 0))


def futex_wake(addr: int) -> int:
    """FUTEX_WAKE_OP with an operation that changes nothing: the kernel reads and writes the word."""
    return int(LIBC.syscall(SYS_FUTEX, ctypes.c_void_p(addr), 5, 0, None, ctypes.c_void_p(addr), 1 << 28))


def error_of(call: Callable[[], int]) -> int:
    """0, or the errno of a call of libc's."""
    return ctypes.get_errno() if call() < 0 else 0


def test_system_calls(mm: pm.AddressSpace, vram: pm.DeviceMemory) -> None:
    """They wait for the page, or are EFAULT, and then nothing has come home."""
    buf, (read, write) = out(mm, vram), os.pipe()
    want = 0 if mm.fault_delivery == "thread" else errno.EFAULT
    os.write(write, b"\0")
    try:
        assert errno_of(os.readv, read, [as_bytes(buf)[:1]]) == want
        assert errno_of(os.write, write, as_bytes(buf)[PAGE : PAGE + 1]) == want
    finally:
        os.close(read)
        os.close(write)
    assert error_of(lambda: vm_readv(buf.addr + 2 * PAGE)) == want
    assert error_of(lambda: futex_wake(buf.addr + 3 * PAGE)) == want
    assert vram.used == (PAGES - (0 if want else 4)) * PAGE
    assert intact(buf)


def test_the_ways_of_a_device(mm: pm.AddressSpace, vram: pm.DeviceMemory) -> None:
    """Faults of a device, its copies to and from device memory, and pins bring home what they need."""
    buf = out(mm, vram)
    view = as_bytes(buf)
    with FaultDriver(mm) as driver:
        driver.device.read_into(mm, buf.addr + PAGE, view[8 * PAGE : 9 * PAGE])
        driver.device.write(mm, buf.addr + 2 * PAGE, view[9 * PAGE : 10 * PAGE])
        assert (view[8 * PAGE], view[2 * PAGE]) == (1, 9)
        driver.device.page_table.clear(buf.addr, buf.addr + buf.size)
    assert vram.used == (PAGES - 4) * PAGE
    dev = pm.Device("d1")
    with pm.pin_user_pages(mm, buf.addr + 20 * PAGE, 4) as pin:
        daddrs = pm.gup_range_dma_map(pin, dev)
        assert dev.dma_read(int(daddrs[1]), 1) == bytes([21])
        pm.gup_range_dma_unmap(pin, dev)
    mm.madvise(buf.addr + 30 * PAGE, 4 * PAGE, MADV_POPULATE_WRITE)
    assert vram.used == (PAGES - 12) * PAGE
    view[8 * PAGE : 9 * PAGE] = bytes([8]) * PAGE
    view[2 * PAGE : 3 * PAGE] = bytes([2]) * PAGE
    view.release()
    assert intact(buf)


def test_a_device_write_from_what_is_there(mm: pm.AddressSpace, vram: pm.DeviceMemory) -> None:
    """The monitor, which brings it or fills it, does not wait for the write that needs it."""
    buf = out(mm, vram, 4)
    mm.madvise(buf.addr + 3 * PAGE, PAGE, mmap.MADV_DONTNEED)
    target = mm.mmap(2 * PAGE)
    view = as_bytes(buf)
    with FaultDriver(mm) as driver:
        driver.device.write(mm, target.addr, view[2 * PAGE :])
        driver.device.page_table.clear(target.addr, target.addr + target.size)
    view.release()
    assert bytes(target) == bytes([2]) * PAGE + bytes(PAGE)
    assert (vram.used, mm.stats()["drain_timeouts"]) == (2 * PAGE, 0)


def test_threads_and_never_touched_pages(mm: pm.AddressSpace, vram: pm.DeviceMemory) -> None:
    """Threads that hold the GIL, and threads that do not, among migrations: each sees its own writes."""
    buf = mm.mmap(256 * PAGE)
    counts = np.frombuffer(buf, np.uint64)[:: PAGE // 8]
    done = [0] * 4

    def count(which: int) -> None:
        for i in range(300):
            counts[(i * 7 + which) % 64 * 4 + which] += 1
            done[which] += 1

    threads = [threading.Thread(target=count, args=(which,)) for which in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        pm.migrate_to_device(mm, buf.addr, buf.addr + buf.size, vram)
    for thread in threads:
        thread.join()
    assert [int(counts[which::4].sum()) for which in range(4)] == done == [300] * 4


def test_forks_among_threads_that_allocate(mm: pm.AddressSpace, vram: pm.DeviceMemory) -> None:
    buf, going = out(mm, vram), threading.Event()
    kept: list[bytes] = []

    def allocate() -> None:
        while not going.is_set():
            kept[:] = [bytes(buf[i * PAGE : i * PAGE + 500]) for i in range(PAGES)]

    threads = [threading.Thread(target=allocate) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(20):
            pm.migrate_to_device(mm, buf.addr, buf.addr + buf.size, vram)
            assert in_child(lambda: check(intact(buf))) == 0
    finally:
        going.set()
        for thread in threads:
            thread.join()
    assert intact(buf)


def check(holds: bool) -> None:
    assert holds


def test_a_signal_handler_may_touch(mm: pm.AddressSpace, vram: pm.DeviceMemory) -> None:
    buf, seen = out(mm, vram), []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(buf[5 * PAGE]))
    try:
        signal.raise_signal(signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert seen == [5]
    assert vram.used == (PAGES - 1) * PAGE


@inline
def test_memory_beside_it_is_left_alone(mm: pm.AddressSpace, vram: pm.DeviceMemory) -> None:
    """Holes of the heap do not fault: they may be touched where SIGBUS is blocked."""
    beside = mm.mmap(4 * pm.MiB)
    middle = beside.addr + 2 * pm.MiB
    assert pm.migrate_to_device(mm, middle, middle + PAGE, vram) == 1
    pthread_mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGBUS})
    try:
        assert ctypes.string_at(middle - PAGE, 1) + ctypes.string_at(middle + PAGE, 1) == b"\0\0"
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, pthread_mask)
    assert mm.stats()["device_filled"] == 0
    assert vram.used == PAGE


@pytest.mark.parametrize("delivery", ["thread", "inline"])
def test_memory_of_mallocs_beside_what_the_shim_allocates(delivery: str) -> None:
    """Its own memory is in the heap too, beside an array that was adopted, and is touched with locks held."""
    needs("uffd_events", "move", "pagemap", "uffd_kernel" if delivery == "thread" else "sigbus")
    program = (
        "import numpy as np, pymirror as pm\n"
        "big = np.ones(30 << 20, np.uint8); del big  # from here on malloc takes such arrays from the heap\n"
        f"mm = pm.AddressSpace(fault_delivery={delivery!r})\n"
        "array = np.ones(3 << 20, np.uint8)\n"
        "own, vram = mm.adopt(array), pm.DeviceMemory(pm.Device('d'), 64 << 20)\n"
        "assert pm.migrate_to_device(mm, own.addr, own.addr + own.size, vram) == own.size >> 12\n"
        "dev, buf = pm.Device('e'), mm.mmap(64 << 20)\n"
        "with pm.Mirror(mm) as mirror:\n"
        "    for addr in range(buf.addr, buf.addr + buf.size, 2 << 20):\n"
        "        with mirror.range(addr, addr + 4096) as rng:\n"
        "            rng.default_flags = pm.HMM_PFN_REQ_FAULT\n"
        "            rng.wait_until_valid(timeout=5.0)\n"
        "            assert dev.page_table.map(rng, rng.fault())\n"
        "dev.page_table.clear(0, 1 << 47)\n"
        "vram.close()\n"
        "assert array.all()\n"
        "own.close(); mm.close()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], timeout=30, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


START = """
import ctypes, faulthandler, mmap, os, signal, sys
import pymirror as pm

def setting():
    mm = pm.AddressSpace(fault_delivery="inline")
    buf = mm.mmap(16 * 4096)
    buf[0] = 1
    vram = pm.DeviceMemory(pm.Device("d"), 1 << 20)
    return mm, buf, vram

def out(mm, buf, vram):
    return pm.migrate_to_device(mm, buf.addr, buf.addr + buf.size, vram)

def touch_beyond_a_file():
    fd = os.memfd_create("empty")
    os.ftruncate(fd, 4096)
    beyond = mmap.mmap(fd, 4096)
    os.ftruncate(fd, 0)
    return beyond[0]

"""


def run(program: str) -> tuple[int, str]:
    needs("uffd_events", "move", "pagemap", "sigbus")
    done = subprocess.run([sys.executable, "-c", START + program], timeout=60, capture_output=True, text=True)
    return done.returncode, done.stderr


def test_an_earlier_handler_gets_what_is_not_ours() -> None:
    status, said = run(
        "faulthandler.enable()\n"
        "mm, buf, vram = setting()\n"
        "assert out(mm, buf, vram) == 16 and buf[0] == 1\n"
        "touch_beyond_a_file()\n"
    )
    assert status == -signal.SIGBUS
    assert "Fatal Python error: Bus error" in said
    assert "touch_beyond_a_file" in said


def test_without_a_handler_it_is_the_end() -> None:
    assert run("mm, buf, vram = setting(); out(mm, buf, vram); touch_beyond_a_file()") == (-signal.SIGBUS, "")


def test_a_thread_that_blocks_sigbus_is_killed() -> None:
    program = (
        "mm, buf, vram = setting(); out(mm, buf, vram)\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGBUS})\n"
        "buf[0]"
    )
    assert run(program) == (-signal.SIGBUS, "")


def test_a_later_handler_is_refused_with_its_place() -> None:
    status, said = run(
        "mm, buf, vram = setting()\n"
        "assert out(mm, buf, vram) == 16 and buf[0] == 1\n"
        "faulthandler.enable()\n"
        "try:\n"
        "    out(mm, buf, vram)\n"
        "except pm.MirrorError as refused:\n"
        "    print(refused, file=sys.stderr)\n"
        "try:\n"
        "    pm.make_device_exclusive(mm, buf.addr, pm.Device('e'))\n"
        "except pm.MirrorError as refused:\n"
        "    print('exclusive:', refused.errno, refused, file=sys.stderr)\n"
        "faulthandler.disable()\n"
        "assert out(mm, buf, vram) == 1 and buf[0] == 1\n"
        "vram.close(); mm.close()\n"
    )
    assert status == 0, said
    for what in said.split("exclusive: 16"):
        assert "EBUSY" in what
        assert "SIGBUS" in what
        assert "python" in what.split("vma:")[1], "the file that the handler is from"
    assert "exclusive: 16" in said


def test_the_process_lives_through_many() -> None:
    """One address space after the other, each with its own device memory and the same handler."""
    status, said = run(
        "for _ in range(20):\n"
        "    mm, buf, vram = setting()\n"
        "    assert out(mm, buf, vram) == 16 and buf[0] == 1 and buf[4096] == 0\n"
        "    mm.close(); vram.close()\n"
    )
    assert (status, said) == (0, "")


def test_memory_that_has_grown_where_it_is(mm: pm.AddressSpace, vram: pm.DeviceMemory) -> None:
    """As realloc makes it: what is new of the vma faults as the rest does, and nobody asked to watch it."""
    addr = foreign.mmap(0, 32 * PAGE)
    foreign.munmap(addr + 8 * PAGE, 24 * PAGE)
    ctypes.memset(addr, 7, 8 * PAGE)
    assert pm.migrate_to_device(mm, addr, addr + 8 * PAGE, vram) == 8
    assert foreign.mremap(addr, 8 * PAGE, 16 * PAGE) == addr
    assert ctypes.string_at(addr + 9 * PAGE, 1) == b"\0"
    assert ctypes.string_at(addr, 16 * PAGE) == bytes([7]) * 8 * PAGE + bytes(8 * PAGE)
    foreign.munmap(addr, 16 * PAGE)
