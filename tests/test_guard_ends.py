"""Guarded pages where something else has come to its end: a fork, a file, the number of vmas."""

from __future__ import annotations

import ctypes
import errno
import faulthandler
import mmap
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from disk import disk_file
from guarding import CONTENTS, PAGES, run, space, to_device
from mirroring import PAGE
from racing import run_child, wait_for
from seams import Background, inject, needs, points

import pymirror as pm

pytestmark = [pytest.mark.root, pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")]

MADV_POPULATE_READ = 22
MAX_MAP_COUNT = int(Path("/proc/sys/vm/max_map_count").read_text())


@pytest.fixture(params=["thread", "inline"])
def mm(nothing_left_behind: None, request: pytest.FixtureRequest) -> Iterator[pm.AddressSpace]:
    with space(request.param) as made:
        yield made


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    with disk_file(tmp_path, CONTENTS) as made:
        yield made


def test_code_stays(mm: pm.AddressSpace, file: int) -> None:
    """Once it has been PROT_NONE it would not become executable again, where that is denied."""
    with pm.DeviceMemory(pm.Device("d"), pm.MiB) as vram:
        buf = mm.mmap(PAGES * PAGE, fd=file)
        ctypes.memset(buf.addr, 9, 2 * PAGE)
        mm.mprotect(buf.addr, buf.size, mmap.PROT_READ | mmap.PROT_EXEC)
        assert to_device(buf, vram) == 0
        assert ctypes.string_at(buf.addr, 2 * PAGE) == bytes([9]) * 2 * PAGE


def test_coherent_memory_takes_none(mm: pm.AddressSpace, file: int) -> None:
    needs("pfn")
    with pm.DeviceMemory(pm.Device("d"), pm.MiB, kind="coherent") as memory:
        buf = mm.mmap(PAGES * PAGE, fd=file)
        ctypes.memset(buf.addr, 9, 2 * PAGE)
        assert to_device(buf, memory) == 0
        assert ctypes.string_at(buf.addr, 2 * PAGE) == bytes([9]) * 2 * PAGE


def test_a_device_write_ends_before_they_come_home(mm: pm.AddressSpace, file: int) -> None:
    """Also if it is a system call of pymirror's that they come home for."""
    with pm.DeviceMemory(pm.Device("d"), pm.MiB) as vram:
        buf, device = mm.mmap(PAGES * PAGE, fd=file), vram.device
        ctypes.memset(buf.addr, 9, PAGE)
        assert to_device(buf, vram) == 1
        sub = pm.IntervalNotifier(mm, buf.addr, PAGE, lambda sub, update, seq: sub.set_seq(seq))
        pfns, seq = np.zeros(1, np.uint64), sub.read_begin()
        asked = {"default_flags": pm.HMM_PFN_REQ_FAULT, "dev_private_owner": vram.owner}
        pm.hmm_range_fault(sub, buf.addr, buf.addr + PAGE, pfns, seq=seq, **asked)
        assert device.page_table.map(sub, seq, buf.addr, pfns)
        with points("ACCESS_LOOKED_UP") as point:
            write = Background(device.write, mm, buf.addr, b"device")
            point.wait()
            populate = Background(mm.madvise, buf.addr, PAGE, MADV_POPULATE_READ)
            assert populate.stays()
            point.release()
            write.result()
            populate.result()
        assert vram.used == 0
        assert ctypes.string_at(buf.addr, 7) == b"device" + bytes([9])
        device.page_table.clear(buf.addr, buf.addr + PAGE)
        sub.remove()


def test_a_fork_at_which_they_cannot_come_home(nothing_left_behind: None, file: int) -> None:
    """It is told once, whether all of device memory was to come home or guarded pages alone."""
    needs("guard", "wp_async", "uffd_events", "pagemap", "uffd_kernel")
    with pm.AddressSpace(disable=["event_fork"]) as mm, pm.DeviceMemory(pm.Device("d"), pm.MiB) as vram:
        buf = mm.mmap(PAGES * PAGE, fd=file)
        ctypes.memset(buf.addr, 9, 2 * PAGE)
        assert to_device(buf, vram) == 2
        before = mm.stats()["events"]["MIGRATE"]
        with inject("MPROTECT", err=errno.EACCES, times=1000):
            if (pid := os.fork()) == 0:
                run_child(lambda: None)
        assert wait_for(pid) == 0
        assert mm.stats()["events"]["MIGRATE"] == before + 1
        assert ctypes.string_at(buf.addr, 2 * PAGE) == bytes([9]) * 2 * PAGE


def test_a_child_beyond_the_end_of_the_file(nothing_left_behind: None, file: int) -> None:
    """Its SIGBUS is none that an address space without inline delivery would make it wait for."""
    needs("uffd_kernel")
    with space("inline") as other, pm.DeviceMemory(pm.Device("o"), pm.MiB) as memory:
        taken = other.mmap(PAGE)
        taken[0] = 1
        assert to_device(taken, memory) == 1
        with pm.AddressSpace() as mm, pm.DeviceMemory(pm.Device("d"), pm.MiB) as vram:
            buf = mm.mmap(PAGES * PAGE, fd=file)
            ctypes.memset(buf.addr, 9, PAGE)
            assert to_device(buf, vram) == 1
            os.ftruncate(file, 0)
            if (pid := os.fork()) == 0:
                faulthandler.enable(file=os.open(os.devnull, os.O_WRONLY))
                run_child(lambda: ctypes.string_at(buf.addr, 1))
            assert os.WTERMSIG(wait_for(pid)) == signal.SIGBUS


MANY = f"""
import mmap, numpy

assert out() == 1
many = mmap.mmap(-1, 2 * {MAX_MAP_COUNT} * 4096, flags=0x4022, prot=mmap.PROT_READ)
held = numpy.frombuffer(many, numpy.uint8)
mprotect = ctypes.CDLL(None).mprotect
mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
at = held.ctypes.data + 4096
while mprotect(at, 4096, 0) == 0:
    at += 8192
found = ctypes.string_at(buf.addr, 1)
del held
many.close()
assert found == bytes([1])
vram.close()
mm.close()
"""


@pytest.mark.skipif(MAX_MAP_COUNT > 200_000, reason="vm.max_map_count is too large")
def test_home_when_there_are_as_many_vmas_as_there_may_be(mm: pm.AddressSpace, tmp_path: Path) -> None:
    status, said = run(mm, tmp_path, MANY)
    assert status == 0, said
