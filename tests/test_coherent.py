# SPDX-License-Identifier: MIT
"""Device-coherent memory: pages are exchanged and stay mapped; which they are is known by their PFN."""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from mirroring import PAGE
from racing import in_child
from seams import errno_of, inject, needs

import pymirror as pm

pytestmark = [pytest.mark.root, pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")]

PAGES = 64


@pytest.fixture(params=["thread", "inline"])
def mm(request: pytest.FixtureRequest) -> Iterator[pm.AddressSpace]:
    needs("pfn", "move", "uffd_kernel", "uffd_events", "sigbus")
    with pm.AddressSpace(fault_delivery=request.param) as mm:
        yield mm


@pytest.fixture
def memory(mm: pm.AddressSpace) -> Iterator[pm.DeviceMemory]:
    with pm.DeviceMemory(pm.Device("d0"), 16 * pm.MiB, kind="coherent") as memory:
        yield memory


def content(pages: int = PAGES) -> np.ndarray[Any, np.dtype[np.uint8]]:
    numbers = np.repeat(np.arange(1, pages + 1, dtype=np.uint64), PAGE // 8)
    return (numbers * np.uint64(0x9E3779B97F4A7C15)).view(np.uint8)


@pytest.fixture
def buf(mm: pm.AddressSpace) -> pm.Region:
    buf = mm.mmap(PAGES * PAGE)
    np.frombuffer(buf, np.uint8)[:] = content()
    return buf


def pfns_of(mm: pm.AddressSpace, buf: pm.Region) -> np.ndarray[Any, np.dtype[np.uint64]]:
    pfns = np.zeros(buf.size // PAGE, np.uint64)
    sub = pm.IntervalNotifier(mm, buf.addr, buf.size, lambda sub, update, seq: sub.set_seq(seq) or True)
    pm.hmm_range_fault(sub, buf.addr, buf.addr + buf.size, pfns, seq=sub.read_begin())
    sub.remove()
    return pm.hmm_pfn_to_pfn(pfns)


def to_device(buf: pm.Region, memory: pm.DeviceMemory) -> int:
    return pm.migrate_to_device(buf.mm, buf.addr, buf.addr + buf.size, memory)


def test_pages_are_exchanged_and_stay_mapped(
    mm: pm.AddressSpace, buf: pm.Region, memory: pm.DeviceMemory
) -> None:
    before = pfns_of(mm, buf)
    assert to_device(buf, memory) == PAGES
    after = pfns_of(mm, buf)
    assert (before != after).all()
    assert after.all()
    assert memory.used == PAGES * PAGE
    assert memory.holds(buf.addr, buf.addr + buf.size).all()
    assert pm.coherent_pages(mm, buf.addr, buf.addr + buf.size).all()
    buf[5] = 77
    assert bytes(buf[6:]) == content()[6:].tobytes()
    assert (mm.stats()["device_faults"], memory.used) == (0, PAGES * PAGE)
    assert to_device(buf, memory) == 0
    assert pm.migrate_to_system(mm, buf.addr, buf.addr + 4 * PAGE, memory) == 4
    assert pm.migrate_to_system(mm, buf.addr, buf.addr + buf.size) == PAGES - 4
    assert not memory.holds(buf.addr, buf.addr + buf.size).any()
    assert bytes(buf[6:]) == content()[6:].tobytes()


def test_system_calls_reach_it(mm: pm.AddressSpace, buf: pm.Region, memory: pm.DeviceMemory) -> None:
    to_device(buf, memory)
    read, write = os.pipe()
    assert os.write(write, memoryview(buf)[:100]) == 100
    assert os.read(read, 100) == content()[:100].tobytes()
    os.close(read)
    os.close(write)


def test_another_device_does_not_take_it(
    mm: pm.AddressSpace, buf: pm.Region, memory: pm.DeviceMemory
) -> None:
    to_device(buf, memory)
    with pm.DeviceMemory(pm.Device("d1"), pm.MiB, kind="coherent") as other:
        assert to_device(buf, other) == 0
        assert not other.holds(buf.addr, buf.addr + buf.size).any()
        assert pm.migrate_to_system(mm, buf.addr, buf.addr + buf.size, other) == 0
    assert memory.used == PAGES * PAGE


def test_a_copy_on_write_is_system_memory(
    mm: pm.AddressSpace, buf: pm.Region, memory: pm.DeviceMemory
) -> None:
    to_device(buf, memory)
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.read(read, 1)
        os._exit(ctypes.string_at(buf.addr, buf.size) != content().tobytes())
    buf[3 * PAGE] = 1
    holds = memory.holds(buf.addr, buf.addr + buf.size)
    assert np.flatnonzero(~holds).tolist() == [3]
    assert memory.used == (PAGES - 1) * PAGE
    os.write(write, b"x")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    os.close(read)
    os.close(write)


def test_what_becomes_of_memory(mm: pm.AddressSpace, buf: pm.Region, memory: pm.DeviceMemory) -> None:
    to_device(buf, memory)
    mm.madvise(buf.addr, 2 * PAGE, 4)
    mm.munmap(buf.addr + 2 * PAGE, 2 * PAGE)
    assert memory.used == (PAGES - 4) * PAGE
    rest = mm.mremap(buf.addr + 4 * PAGE, (PAGES - 4) * PAGE, (PAGES - 4) * PAGE, flags=5)
    assert memory.holds(rest.addr, rest.addr + rest.size).all()
    mm.mprotect(rest.addr, rest.size, 1)
    assert memory.holds(rest.addr, rest.addr + rest.size).all()
    assert pm.migrate_to_system(mm, rest.addr, rest.addr + rest.size, memory) == PAGES - 4
    assert bytes(rest[:]) == content()[4 * PAGE :].tobytes()


def test_never_touched_and_read_only_memory(mm: pm.AddressSpace, memory: pm.DeviceMemory) -> None:
    buf = mm.mmap(4 * PAGE)
    assert to_device(buf, memory) == 4
    assert bytes(buf[:]) == bytes(4 * PAGE)
    read_only = mm.mmap(4 * PAGE)
    read_only[PAGE] = 9
    mm.mprotect(read_only.addr, read_only.size, 1)
    assert to_device(read_only, memory) == 4
    assert bytes(read_only[PAGE : PAGE + 2]) == b"\x09\x00"
    assert memory.used == 8 * PAGE


def test_exclusive_pages_are_its_again(mm: pm.AddressSpace, buf: pm.Region, memory: pm.DeviceMemory) -> None:
    to_device(buf, memory)
    with pm.make_device_exclusive(mm, buf.addr, memory.device):
        assert not memory.holds(buf.addr, buf.addr + PAGE).any()
    assert memory.holds(buf.addr, buf.addr + PAGE).all()
    assert bytes(buf[:]) == content().tobytes()


def test_the_limit(mm: pm.AddressSpace, buf: pm.Region) -> None:
    with pm.DeviceMemory(pm.Device("d2"), 10 * PAGE, kind="coherent") as memory:
        assert errno_of(to_device, buf, memory) == errno.ENOSPC
        assert memory.used == 10 * PAGE
        other = mm.mmap(10 * PAGE)
        assert to_device(other, memory) == 10
        assert memory.holds(other.addr, other.addr + other.size).all()
    assert bytes(buf[:]) == content().tobytes()


def test_close_gives_all_back(mm: pm.AddressSpace, buf: pm.Region) -> None:
    memory = pm.DeviceMemory(pm.Device("d3"), pm.MiB, kind="coherent")
    to_device(buf, memory)
    before = pfns_of(mm, buf)
    memory.close()
    assert (before != pfns_of(mm, buf)).all()
    assert not pm.coherent_pages(mm, buf.addr, buf.addr + buf.size).any()
    assert bytes(buf[:]) == content().tobytes()


def test_the_address_space_may_be_closed_first(mm: pm.AddressSpace, buf: pm.Region) -> None:
    memory = pm.DeviceMemory(pm.Device("d3"), pm.MiB, kind="coherent")
    to_device(buf, memory)
    mm.close()
    assert memory.used == 0
    assert bytes(buf[:]) == content().tobytes()
    memory.close()


def test_a_child_reads_it(mm: pm.AddressSpace, buf: pm.Region, memory: pm.DeviceMemory) -> None:
    to_device(buf, memory)
    assert in_child(lambda: ctypes.string_at(buf.addr, buf.size) == content().tobytes() or 1 / 0) == 0


def test_needs_pfns(mm: pm.AddressSpace) -> None:
    with (
        pm.AddressSpace(disable=["pfn"]) as blind,
        pm.DeviceMemory(pm.Device("d4"), pm.MiB, kind="coherent") as memory,
        pytest.raises(pm.FeatureError, match="pfn"),
    ):
        to_device(blind.mmap(PAGE), memory)
    with pytest.raises(pm.MirrorError, match="kind"):
        pm.DeviceMemory(pm.Device("d5"), pm.MiB, kind="public")


def test_while_threads_of_the_cpu_write(mm: pm.AddressSpace, buf: pm.Region, memory: pm.DeviceMemory) -> None:
    words = np.frombuffer(buf, np.uint64)
    words[:] = 0
    stop = threading.Event()
    counts = [0, 0]

    def count(which: int) -> None:
        while not stop.is_set():
            for page in range(PAGES):
                words[page * PAGE // 8 + which] += 1
            counts[which] += 1

    threads = [threading.Thread(target=count, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        to_device(buf, memory)
        pm.migrate_to_system(mm, buf.addr, buf.addr + buf.size, memory)
    stop.set()
    for thread in threads:
        thread.join()
    by_page = words.reshape(PAGES, -1)
    assert (by_page[:, 0] == counts[0]).all()
    assert (by_page[:, 1] == counts[1]).all()


@pytest.mark.parametrize("nth", range(1, 40))
def test_a_failed_call_loses_nothing(
    mm: pm.AddressSpace, buf: pm.Region, memory: pm.DeviceMemory, nth: int
) -> None:
    with inject("IOCTL", nth, tid=threading.get_native_id()):
        errno_of(pm.migrate_to_device, mm, buf.addr, buf.addr + 4 * PAGE, memory)
    assert bytes(buf[:]) == content().tobytes()
    assert memory.used <= 4 * PAGE
