# SPDX-License-Identifier: MIT
"""Exclusive access: a device has pages to itself, until the CPU touches them; atomics of both never mix."""

from __future__ import annotations

import ctypes
import errno
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from mirroring import DELIVERIES, PAGE, space_by
from racing import in_child
from seams import Background, errno_of, foreign, needs, points

import pymirror as pm

pytestmark = [pytest.mark.root, pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")]

ROUNDS = 400


class Gpu:
    """A device whose driver takes exclusive access for atomics, and faults ordinary accesses."""

    def __init__(self, mm: pm.AddressSpace, start: int, size: int) -> None:
        self.mm = mm
        self.dev = pm.Device("gpu", fault_timeout=30.0)
        self.lock = pm.DriverLock()
        self.events: list[tuple[pm.Event, Any]] = []
        self.sub = pm.IntervalNotifier(mm, start, size, self._invalidate)
        self.dev.set_fault_handler(self._fault)

    def _invalidate(self, sub: pm.IntervalNotifier, update: pm.MmuNotifierRange, seq: int) -> bool:
        with self.lock:
            sub.set_seq(seq)
            self.events.append((update.event, update.owner))
            self.dev.page_table.clear(update.start, update.end)
        return True

    def _fault(self, fault: pm.DeviceFault) -> None:
        if fault.atomic:
            pm.make_device_exclusive(self.mm, fault.addr, self.dev)
        pfns = np.zeros(1, np.uint64)
        seq = self.sub.read_begin()
        pfns[:] = pm.exclusive_pfns(self.mm, fault.addr, fault.addr + PAGE)
        if not pfns[0]:
            flags = pm.HMM_PFN_REQ_FAULT | (pm.HMM_PFN_REQ_WRITE if fault.write else 0)
            pm.hmm_range_fault(self.sub, fault.addr, fault.addr + PAGE, pfns, default_flags=flags, seq=seq)
        with self.lock:
            self.dev.page_table.map(self.sub, seq, fault.addr, pfns)

    def close(self) -> None:
        self.sub.remove()
        self.dev.page_table.clear(0, 1 << 64)


@pytest.fixture(params=DELIVERIES)
def mm(request: pytest.FixtureRequest) -> Iterator[pm.AddressSpace]:
    needs("uffd_kernel", "uffd_events", "sigbus", "pagemap")
    with space_by(request.param) as mm:
        yield mm


@pytest.fixture
def buf(mm: pm.AddressSpace) -> pm.Region:
    buf = mm.mmap(4 * PAGE)
    np.frombuffer(buf, np.uint64)[:] = np.arange(4 * PAGE // 8)
    return buf


@pytest.fixture
def gpu(mm: pm.AddressSpace, buf: pm.Region) -> Iterator[Gpu]:
    gpu = Gpu(mm, buf.addr, buf.size)
    yield gpu
    gpu.close()


class KernelsOrder(Gpu):
    """The sequence is read first, and the driver's own event is ignored, as nouveau_atomic_range_fault()
    does.
    """

    tries = 0

    def _invalidate(self, sub: pm.IntervalNotifier, update: pm.MmuNotifierRange, seq: int) -> bool:
        if update.event is pm.Event.EXCLUSIVE and update.owner is self.dev:
            return True
        return super()._invalidate(sub, update, seq)

    def _fault(self, fault: pm.DeviceFault) -> None:
        while True:
            self.tries += 1
            seq = self.sub.read_begin()
            page = pm.make_device_exclusive(self.mm, fault.addr, self.dev)
            with self.lock:
                if not self.sub.read_retry(seq) and self.dev.page_table.map(
                    self.sub, seq, fault.addr, page.pfns
                ):
                    return


class TestTheKernelsOrder:
    @pytest.fixture
    def gpu(self, mm: pm.AddressSpace, buf: pm.Region) -> Iterator[KernelsOrder]:
        gpu = KernelsOrder(mm, buf.addr, buf.size)
        yield gpu
        gpu.close()

    def test_the_second_try_finds_the_page_its_own(
        self, mm: pm.AddressSpace, buf: pm.Region, gpu: KernelsOrder
    ) -> None:
        assert gpu.dev.atomic_add(mm, buf.addr + 8, 4) == 1
        assert (gpu.tries, gpu.events, list(mm.errors)) == (2, [], [])

    def test_another_owner_is_told_of(self, mm: pm.AddressSpace, buf: pm.Region, gpu: KernelsOrder) -> None:
        pm.make_device_exclusive(mm, buf.addr, gpu.dev)
        other = pm.Device("other")
        pm.make_device_exclusive(mm, buf.addr, other)
        assert (pm.Event.EXCLUSIVE, other) in gpu.events
        pm.make_device_exclusive(mm, buf.addr, other)
        assert gpu.events.count((pm.Event.EXCLUSIVE, other)) == 1

    def test_the_next_stay_is_told_of(self, mm: pm.AddressSpace, buf: pm.Region) -> None:
        gpu = Gpu(mm, buf.addr, buf.size)
        for _ in range(2):
            pm.make_device_exclusive(mm, buf.addr, gpu.dev).release()
        gpu.close()
        assert gpu.events == [(pm.Event.EXCLUSIVE, gpu.dev)] * 4


class TestExclusive:
    def test_a_touch_ends_it(self, mm: pm.AddressSpace, buf: pm.Region, gpu: Gpu) -> None:
        page = pm.make_device_exclusive(mm, buf.addr, gpu.dev)
        assert (page.held, gpu.events) == (1, [(pm.Event.EXCLUSIVE, gpu.dev)])
        assert pm.is_device_exclusive_pfn(page.pfns).all()
        assert buf[0] == 0
        mm.sync()
        assert (page.held, gpu.events[1:]) == (0, [(pm.Event.EXCLUSIVE, None)])
        page.release()
        assert len(gpu.events) == 2

    def test_pfns_of_what_is_over_are_refused(self, mm: pm.AddressSpace, buf: pm.Region, gpu: Gpu) -> None:
        """Else the device's atomics would go to a slot that nobody's memory is in."""
        page = pm.make_device_exclusive(mm, buf.addr, gpu.dev)
        words = np.frombuffer(buf, np.uint64)
        words[0] += 1
        mm.sync()
        seq = gpu.sub.read_begin()
        with gpu.lock:
            assert not gpu.dev.page_table.map(gpu.sub, seq, buf.addr, page.pfns)
        assert gpu.dev.atomic_add(mm, buf.addr, 2) == 1
        assert words[0] == 3

    def test_a_context_ends_it(self, mm: pm.AddressSpace, buf: pm.Region, gpu: Gpu) -> None:
        with pm.make_device_exclusive(mm, buf.addr + PAGE, gpu.dev) as page:
            assert page.held == 1
        assert page.held == 0
        assert mm.stats()["device_faults"] == 0
        assert np.frombuffer(buf, np.uint64)[512] == 512

    def test_the_page_stays_the_same(self, mm: pm.AddressSpace, buf: pm.Region, gpu: Gpu) -> None:
        pfns = np.zeros(1, np.uint64)

        def pfn() -> int:
            seq = gpu.sub.read_begin()
            pm.hmm_range_fault(gpu.sub, buf.addr, buf.addr + PAGE, pfns, seq=seq)
            return pm.hmm_pfn_to_pfn(int(pfns[0]))

        needs("pfn")
        before = pfn()
        assert before != 0
        with pm.make_device_exclusive(mm, buf.addr, gpu.dev):
            assert pfn() == 0
        # A page that is copied out and back may be any.
        assert pfn() == before or ("move" not in mm.features and pfn() != 0)

    def test_a_walk_that_faults_ends_it(self, mm: pm.AddressSpace, buf: pm.Region, gpu: Gpu) -> None:
        page = pm.make_device_exclusive(mm, buf.addr, gpu.dev)
        assert gpu.dev.read(mm, buf.addr, 8) == bytes(8)
        assert page.held == 1
        gpu.dev.page_table.clear(0, 1 << 64)
        other = Gpu(mm, buf.addr, buf.size)
        other.dev.set_fault_handler(lambda fault: self.fault(other, fault))
        assert other.dev.read(mm, buf.addr, 8) == bytes(8)
        assert page.held == 0
        other.close()

    @staticmethod
    def fault(gpu: Gpu, fault: pm.DeviceFault) -> None:
        pfns = np.zeros(1, np.uint64)
        seq = gpu.sub.read_begin()
        pm.hmm_range_fault(
            gpu.sub, fault.addr, fault.addr + PAGE, pfns, default_flags=pm.HMM_PFN_REQ_FAULT, seq=seq
        )
        with gpu.lock:
            gpu.dev.page_table.map(gpu.sub, seq, fault.addr, pfns)

    def test_a_range(self, mm: pm.AddressSpace, buf: pm.Region, gpu: Gpu) -> None:
        with pm.pin_user_pages(mm, buf.addr + PAGE, 1):
            pages = pm.make_device_exclusive_range(mm, buf.addr, buf.addr + buf.size, gpu.dev)
        assert [bool(pfn) for pfn in pages.pfns] == [True, False, True, True]
        assert pages.held == 3
        pages.release()

    def test_what_cannot_be_had(self, mm: pm.AddressSpace, buf: pm.Region, gpu: Gpu) -> None:
        shared = mm.mmap(PAGE, shared=True)
        assert errno_of(pm.make_device_exclusive, mm, shared.addr, gpu.dev) == errno.EBUSY
        with pm.pin_user_pages(mm, buf.addr, 1):
            assert errno_of(pm.make_device_exclusive, mm, buf.addr, gpu.dev) == errno.EBUSY
        mm.mprotect(buf.addr, PAGE, 1)
        assert errno_of(pm.make_device_exclusive, mm, buf.addr, gpu.dev) == errno.EFAULT
        mm.munmap(buf.addr, PAGE)
        assert errno_of(pm.make_device_exclusive, mm, buf.addr, gpu.dev) == errno.EFAULT
        assert errno_of(pm.make_device_exclusive, mm, buf.addr + 1, gpu.dev) == errno.EINVAL

    def test_a_fork_ends_it(self, mm: pm.AddressSpace, buf: pm.Region, gpu: Gpu) -> None:
        page = pm.make_device_exclusive(mm, buf.addr, gpu.dev)
        gpu.dev.atomic_add(mm, buf.addr, 5)
        assert in_child(lambda: int(np.frombuffer(buf, np.uint64)[0]) == 5 or 1 / 0) == 0
        assert page.held == 0
        assert np.frombuffer(buf, np.uint64)[0] == 5

    def test_it_ends_with_the_address_space(self, buf: pm.Region, mm: pm.AddressSpace, gpu: Gpu) -> None:
        pm.make_device_exclusive_range(mm, buf.addr, buf.addr + buf.size, gpu.dev)
        gpu.dev.atomic_add(mm, buf.addr + PAGE, 1)
        gpu.close()
        mm.close()
        assert np.frombuffer(buf, np.uint64)[512] == 513


class TestAtomics:
    @pytest.mark.parametrize("size", [4, 8])
    def test_results(self, mm: pm.AddressSpace, buf: pm.Region, gpu: Gpu, size: int) -> None:
        top = (1 << 8 * size) - 1
        assert gpu.dev.atomic_add(mm, buf.addr, top, size) == 0
        assert gpu.dev.atomic_add(mm, buf.addr, 3, size) == top
        assert gpu.dev.compare_and_swap(mm, buf.addr, 7, 9, size) == 2
        assert gpu.dev.compare_and_swap(mm, buf.addr, 2, 9, size) == 2
        assert gpu.dev.read(mm, buf.addr, size) == (9).to_bytes(size, "little")
        assert (gpu.dev.stats.atomic, gpu.dev.stats.atomics) == (0, 4)
        assert int.from_bytes(bytes(buf[:size]), "little") == 9

    def test_on_device_memory(self, mm: pm.AddressSpace, buf: pm.Region, gpu: Gpu) -> None:
        with pm.DeviceMemory(gpu.dev, pm.MiB) as vram:
            pm.migrate_to_device(mm, buf.addr, buf.addr + buf.size, vram)
            pfns = np.zeros(4, np.uint64)
            seq = gpu.sub.read_begin()
            pm.hmm_range_fault(
                gpu.sub, buf.addr, buf.addr + buf.size, pfns, seq=seq, dev_private_owner=gpu.dev
            )
            with gpu.lock:
                assert gpu.dev.page_table.map(gpu.sub, seq, buf.addr, pfns)
            assert gpu.dev.atomic_add(mm, buf.addr + 8, 10) == 1
            assert gpu.dev.stats.faults == 0
            assert np.frombuffer(buf, np.uint64)[1] == 11

    def test_refused(self, mm: pm.AddressSpace, buf: pm.Region, gpu: Gpu) -> None:
        assert errno_of(gpu.dev.atomic_add, mm, buf.addr + 4, 1) == errno.EINVAL
        assert errno_of(gpu.dev.atomic_add, mm, buf.addr, 1, 2) == errno.EINVAL
        assert errno_of(gpu.dev.atomic_add, mm, 1 << 47, 1) == errno.EINVAL
        gpu.dev.set_fault_handler(None)
        assert errno_of(gpu.dev.atomic_add, mm, buf.addr, 1) == errno.EFAULT

    def test_memory_of_both_is_a_fault(self, mm: pm.AddressSpace, buf: pm.Region, gpu: Gpu) -> None:
        gpu.dev.write(mm, buf.addr, b"x")
        assert gpu.dev.atomic_add(mm, buf.addr, 1) == ord("x")
        assert gpu.dev.stats.atomic == 1

    @pytest.mark.parametrize("size", [4, 8])
    def test_against_threads_of_the_cpu(
        self, mm: pm.AddressSpace, buf: pm.Region, gpu: Gpu, size: int
    ) -> None:
        np.frombuffer(buf, np.uint64)[:] = 0
        with atomic_adder(size) as add:

            def cpu() -> None:
                for _ in range(ROUNDS):
                    add(buf.addr, 1)

            threads = [threading.Thread(target=cpu) for _ in range(2)]
            for thread in threads:
                thread.start()
            for _ in range(ROUNDS):
                gpu.dev.atomic_add(mm, buf.addr, 1, size)
            for thread in threads:
                thread.join()
        assert int.from_bytes(bytes(buf[:size]), "little") == 3 * ROUNDS


@contextmanager
def atomic_adder(size: int) -> Iterator[Any]:
    """An atomic instruction of the CPU as a function: lock xadd %esi, (%rdi); ret."""
    code = b"\xf0\x0f\xc1\x37\xc3" if size == 4 else b"\xf0\x48\x0f\xc1\x37\xc3"
    with tempfile.TemporaryFile() as file:
        file.write(code)
        file.flush()
        addr = foreign.mmap(0, PAGE, prot=5, flags=2, fd=file.fileno())
    try:
        yield ctypes.CFUNCTYPE(None, ctypes.c_uint64, ctypes.c_uint64)(addr)
    finally:
        foreign.munmap(addr, PAGE)


def test_an_atomic_that_was_waited_for_too_long(mm: pm.AddressSpace, buf: pm.Region, gpu: Gpu) -> None:
    words = np.frombuffer(buf, np.uint64)
    gpu.dev.atomic_add(mm, buf.addr, 1)
    with points("ACCESS_LOOKED_UP") as point:
        late = Background(gpu.dev.atomic_add, mm, buf.addr, 1)
        point.wait()
        assert words[0] == 1
        words[0] = 5
        point.release()
        assert late.result() == 5
    assert words[0] == 6
