"""Several users of userfaultfd in one process: another library's beside pymirror's, and over its memory."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from mirroring import FAULT, PAGE
from seams import foreign, needs

import pymirror as pm

_NR_USERFAULTFD, _USER_MODE_ONLY = 323, 1
_API, _REGISTER, _UNREGISTER, _ZEROPAGE = 0xC018AA3F, 0xC020AA00, 0x8010AA01, 0xC020AA04
_MODE_MISSING = 1
PAGES = 4
libc = ctypes.CDLL(None, use_errno=True)
SIZE = PAGES * PAGE


class Other:
    """The userfaultfd of some other library."""

    def __init__(self, start: int, size: int) -> None:
        self.fd = libc.syscall(_NR_USERFAULTFD, os.O_CLOEXEC | _USER_MODE_ONLY)
        assert self.fd >= 0, os.strerror(ctypes.get_errno())
        fcntl.ioctl(self.fd, _API, struct.pack("QQQ", 0xAA, 0, 0))
        self.start, self.size = start, size
        try:
            fcntl.ioctl(self.fd, _REGISTER, struct.pack("QQQQ", start, size, _MODE_MISSING, 0))
        except OSError:
            os.close(self.fd)
            raise

    def serve(self, pages: int) -> threading.Thread:
        """Zero pages for so many faults, by a thread of its own."""

        def work() -> None:
            for _ in range(pages):
                addr = struct.unpack_from("Q", os.read(self.fd, 32), 16)[0] & -PAGE
                fcntl.ioctl(self.fd, _ZEROPAGE, struct.pack("QQQq", addr, PAGE, 0, 0))

        thread = threading.Thread(target=work)
        thread.start()
        return thread

    def unregister(self) -> None:
        fcntl.ioctl(self.fd, _UNREGISTER, struct.pack("QQ", self.start, self.size))


@contextmanager
def other(start: int, size: int) -> Iterator[Other]:
    needs("uffd")
    made = Other(start, size)
    try:
        yield made
    finally:
        os.close(made.fd)


@pytest.fixture
def space(nothing_left_behind: None) -> Iterator[pm.AddressSpace]:
    delivery = "thread" if os.geteuid() == 0 else "inline"
    with pm.AddressSpace(fault_delivery=delivery) as mm:
        yield mm


def test_each_serves_its_own_memory(space: pm.AddressSpace) -> None:
    needs("move", "uffd_events", "pagemap")
    ours = space.mmap(SIZE)
    data = np.frombuffer(ours, np.uint8)
    data[:] = 7
    theirs = foreign.mmap(0, SIZE)
    with other(theirs, SIZE) as library, pm.DeviceMemory(pm.Device("d"), SIZE) as vram:
        assert pm.migrate_to_device(space, ours.addr, ours.addr + SIZE, vram) == PAGES
        thread = library.serve(PAGES)
        content = ctypes.create_string_buffer(b"x" * SIZE, SIZE)
        # A foreign function does not hold the lock that the serving thread needs.
        libc.memcpy(content, ctypes.c_void_p(theirs), ctypes.c_size_t(SIZE))
        assert content.raw == bytes(SIZE)
        assert (data == 7).all()
        thread.join()
        assert vram.used == 0
    foreign.munmap(theirs, SIZE)


def test_memory_that_another_has_stays_where_it_is_and_the_refusal_names_it(space: pm.AddressSpace) -> None:
    needs("move", "uffd_events", "pagemap")
    buf = space.mmap(SIZE)
    data = np.frombuffer(buf, np.uint8)
    data[:] = 7
    device = pm.Device("d")
    with other(buf.addr, SIZE) as library, pm.DeviceMemory(device, SIZE) as vram:
        assert space.watch(buf.addr, buf.addr + SIZE) == 0
        for call, argument in (
            (lambda end: pm.migrate_to_device(space, buf.addr, end, vram), buf.addr + SIZE),
            (lambda addr: pm.make_device_exclusive(space, addr, device), buf.addr),
        ):
            with pytest.raises(pm.MirrorError, match=r"another userfaultfd of this process has") as refused:
                call(argument)
            assert (refused.value.errno, refused.value.addr) == (errno.EBUSY, buf.addr)
            assert refused.value.vma == space.vma_lookup(buf.addr)
            assert "UFFDIO_UNREGISTER" in str(refused.value)
        assert vram.used == 0
        library.unregister()
        assert pm.migrate_to_device(space, buf.addr, buf.addr + SIZE, vram) == PAGES
    assert (data == 7).all()


def test_memory_that_another_has_is_mirrored_without_being_watched(space: pm.AddressSpace) -> None:
    needs("pagemap")
    buf = space.mmap(SIZE)
    np.frombuffer(buf, np.uint8)[:] = 7
    with (
        other(buf.addr, SIZE),
        pm.Mirror(space) as mirror,
        mirror.range(buf.addr, buf.addr + SIZE) as rng,
    ):
        rng.default_flags = FAULT
        assert rng.wait_until_valid(timeout=5.0)
        rng.fault()
        assert (rng.pfns & pm.HMM_PFN_VALID).all()


def test_what_is_watched_is_busy_for_another(space: pm.AddressSpace) -> None:
    needs("uffd", "wp_async", "pagemap")
    buf = space.mmap(SIZE)
    with pm.Mirror(space) as mirror, mirror.range(buf.addr, buf.addr + SIZE):
        with pytest.raises(OSError, match="busy") as refused, other(buf.addr, SIZE):
            raise AssertionError("both have it")
        assert refused.value.errno == errno.EBUSY


def test_another_address_space_over_the_same_memory_is_another(space: pm.AddressSpace) -> None:
    needs("move", "uffd_events", "pagemap")
    buf = space.mmap(SIZE)
    np.frombuffer(buf, np.uint8)[:] = 7
    space.watch(buf.addr, buf.addr + SIZE)
    with (
        pm.AddressSpace(fault_delivery=space.fault_delivery) as second,
        pm.DeviceMemory(pm.Device("d"), SIZE) as vram,
        pytest.raises(pm.MirrorError, match="close the other AddressSpace"),
    ):
        pm.migrate_to_device(second, buf.addr, buf.addr + SIZE, vram)
