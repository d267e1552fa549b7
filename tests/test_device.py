"""The software device: reads and writes by address, and device faults."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from mirroring import Driver, FaultDriver, filled, whole
from seams import errno_of

import pymirror as pm

PAGE = 4096
WHOLE = 1 << 64
FAULT = pm.HMM_PFN_REQ_FAULT
WRITE = pm.HMM_PFN_REQ_FAULT | pm.HMM_PFN_REQ_WRITE


@pytest.fixture
def driver(mm: pm.AddressSpace) -> Iterator[FaultDriver]:
    with FaultDriver(mm) as driver:
        yield driver


class TestReading:
    def test_a_read_faults_once_and_gives_the_bytes(self, mm: pm.AddressSpace, driver: FaultDriver) -> None:
        buf = filled(mm, 16)
        assert driver.device.read(mm, buf.addr, buf.size) == bytes(buf)
        assert [(fault.addr, fault.end, fault.write, fault.reason) for fault in driver.faults] == [
            (buf.addr, buf.addr + buf.size, False, "missing")
        ]
        assert driver.device.read(mm, buf.addr, buf.size) == bytes(buf)
        assert len(driver.faults) == 1
        stats = driver.device.stats
        assert (stats.reads, stats.read_bytes, stats.missing, stats.faults) == (2, 2 * buf.size, 1, 1)

    @pytest.mark.parametrize(("offset", "n"), [(0, 1), (1, 1), (4095, 2), (4095, 1), (100, 3 * PAGE), (0, 0)])
    def test_any_offset_and_length(
        self, mm: pm.AddressSpace, driver: FaultDriver, offset: int, n: int
    ) -> None:
        buf = filled(mm, 4)
        assert driver.device.read(mm, buf.addr + offset, n) == bytes(buf)[offset : offset + n]

    def test_read_into_fills_any_writable_buffer(self, mm: pm.AddressSpace, driver: FaultDriver) -> None:
        buf = filled(mm, 2)
        for into in (
            bytearray(2 * PAGE),
            np.zeros((2, PAGE), np.uint8),
            mm.mmap(2 * PAGE),
            mmap.mmap(-1, 2 * PAGE),
        ):
            driver.device.read_into(mm, buf.addr, into)
            assert memoryview(into).cast("B")[:] == memoryview(buf).cast("B")[:]

    def test_read_into_refuses_what_it_cannot_fill(self, mm: pm.AddressSpace, driver: FaultDriver) -> None:
        buf = filled(mm, 1)
        with pytest.raises(BufferError):
            driver.device.read_into(mm, buf.addr, bytes(16))
        with pytest.raises((BufferError, ValueError)):
            driver.device.read_into(mm, buf.addr, np.zeros(64, np.uint8)[::2])

    @pytest.mark.parametrize("how", [{}, {"shared": True}, {"huge": "thp"}])
    def test_kinds_of_memory(self, mm: pm.AddressSpace, driver: FaultDriver, how: dict[str, Any]) -> None:
        buf = filled(mm, 1024, **how)
        assert driver.device.read(mm, buf.addr, buf.size) == bytes(buf)
        driver.device.write(mm, buf.addr + 10, b"hello")
        assert bytes(buf)[10:15] == b"hello"

    @pytest.mark.hugetlb
    def test_hugetlb(self, mm: pm.AddressSpace, driver: FaultDriver) -> None:
        self.test_kinds_of_memory(mm, driver, {"huge": "hugetlb"})

    def test_a_file(self, mm: pm.AddressSpace, driver: FaultDriver, tmp_path: Any) -> None:
        path = tmp_path / "file"
        path.write_bytes(b"\7" * 4 * PAGE)
        fd = os.open(path, os.O_RDWR)
        buf = mm.mmap(4 * PAGE, shared=True, fd=fd)
        os.close(fd)
        assert driver.device.read(mm, buf.addr, buf.size) == b"\7" * buf.size
        driver.device.write(mm, buf.addr + PAGE, b"device")
        assert path.read_bytes()[PAGE : PAGE + 6] == b"device"

    def test_never_touched_memory_reads_as_zeroes(self, mm: pm.AddressSpace, driver: FaultDriver) -> None:
        buf = mm.mmap(4 * PAGE)
        assert driver.device.read(mm, buf.addr, buf.size) == bytes(buf.size)


class TestWriting:
    def test_the_cpu_sees_what_the_device_wrote(self, mm: pm.AddressSpace, driver: FaultDriver) -> None:
        buf = filled(mm, 4)
        driver.device.write(mm, buf.addr + 100, np.arange(PAGE, dtype=np.uint16))
        assert bytes(buf)[100 : 100 + 2 * PAGE] == np.arange(PAGE, dtype=np.uint16).tobytes()
        assert driver.device.stats.write_bytes == 2 * PAGE
        assert [fault.reason for fault in driver.faults] == ["missing"]

    def test_a_read_only_entry_faults_on_a_write(self, mm: pm.AddressSpace, driver: FaultDriver) -> None:
        buf = mm.mmap(PAGE)
        driver.device.read(mm, buf.addr, 1)
        driver.device.write(mm, buf.addr, b"x")
        assert [(fault.write, fault.reason) for fault in driver.faults] == [
            (False, "missing"),
            (True, "readonly"),
        ]
        assert bytes(buf)[:1] == b"x"

    def test_a_write_to_a_read_only_vma_is_the_handlers_eperm(
        self, mm: pm.AddressSpace, driver: FaultDriver
    ) -> None:
        buf = filled(mm, 1)
        before = bytes(buf)
        mm.mprotect(buf.addr, PAGE, mmap.PROT_READ)
        assert errno_of(driver.device.write, mm, buf.addr, b"x") == errno.EPERM
        assert bytes(buf) == before

    def test_what_precedes_a_hole_is_written(self, mm: pm.AddressSpace, driver: FaultDriver) -> None:
        buf = filled(mm, 2)
        start = buf.addr
        mm.munmap(start + PAGE, PAGE)
        driver.device.set_fault_handler(lambda fault: driver.map(fault.addr, fault.addr + PAGE, WRITE))
        assert errno_of(driver.device.write, mm, start, b"x" * 2 * PAGE) == errno.EFAULT
        assert ctypes.string_at(start, PAGE) == b"x" * PAGE
        assert driver.device.stats.write_bytes == PAGE
        assert driver.device.stats.writes == 0


class TestFaults:
    def test_without_a_handler_it_is_efault(self, mm: pm.AddressSpace) -> None:
        buf = filled(mm, 1)
        device = pm.Device("bare")
        with pytest.raises(pm.MirrorError) as failed:
            device.read(mm, buf.addr, 1)
        assert (failed.value.errno, failed.value.addr) == (errno.EFAULT, buf.addr)
        assert "handler" in str(failed.value)

    def test_a_handler_that_never_maps_ends_in_etimedout(self, mm: pm.AddressSpace) -> None:
        buf = filled(mm, 1)
        device = pm.Device("lazy", fault_timeout=0.1)
        calls = []
        device.set_fault_handler(calls.append)
        began = time.monotonic()
        assert errno_of(device.read, mm, buf.addr, 1) == errno.ETIMEDOUT
        assert 0.1 <= time.monotonic() - began < 2.0
        assert len(calls) > 1

    def test_ebusy_of_the_handler_means_again(self, mm: pm.AddressSpace, driver: FaultDriver) -> None:
        buf = filled(mm, 1)
        refusals = iter([errno.EBUSY, errno.EAGAIN])

        def handler(fault: pm.DeviceFault) -> None:
            for number in refusals:
                raise pm.MirrorError(number, "not now")
            driver.handle(fault)

        driver.device.set_fault_handler(handler)
        assert driver.device.read(mm, buf.addr, PAGE) == bytes(buf)
        assert driver.device.stats.missing == 3

    def test_a_slow_handler_is_not_late(self, mm: pm.AddressSpace, driver: FaultDriver) -> None:
        buf = filled(mm, 1)
        driver.device.fault_timeout = 0.01

        def handler(fault: pm.DeviceFault) -> None:
            time.sleep(0.05)
            driver.handle(fault)

        driver.device.set_fault_handler(handler)
        assert driver.device.read(mm, buf.addr, PAGE) == bytes(buf)

    def test_other_errors_of_the_handler_end_the_access(
        self, mm: pm.AddressSpace, driver: FaultDriver
    ) -> None:
        buf = filled(mm, 1)

        def handler(fault: pm.DeviceFault) -> None:
            raise ZeroDivisionError

        driver.device.set_fault_handler(handler)
        with pytest.raises(ZeroDivisionError):
            driver.device.read(mm, buf.addr, PAGE)

    def test_a_hole_is_efault(self, mm: pm.AddressSpace, driver: FaultDriver) -> None:
        buf = filled(mm, 1)
        start = buf.addr
        mm.munmap(start, PAGE)
        with pytest.raises(pm.MirrorError) as failed:
            driver.device.read(mm, start, 1)
        assert (failed.value.errno, failed.value.addr) == (errno.EFAULT, start)

    @pytest.mark.parametrize(("addr", "n"), [((1 << 47) - 1, 2), (1 << 47, 1), ((1 << 64) - 1, 1)])
    def test_beyond_the_address_space_is_einval(
        self, mm: pm.AddressSpace, driver: FaultDriver, addr: int, n: int
    ) -> None:
        assert errno_of(driver.device.read, mm, addr, n) == errno.EINVAL

    def test_under_a_driver_lock_it_is_edeadlk(self, mm: pm.AddressSpace, driver: FaultDriver) -> None:
        buf = filled(mm, 1)
        with driver.lock:
            assert errno_of(driver.device.read, mm, buf.addr, 1) == errno.EDEADLK
            assert errno_of(driver.device.write, mm, buf.addr, b"x") == errno.EDEADLK
        assert driver.faults == []

    def test_entries_of_another_address_space_are_exdev(
        self, mm: pm.AddressSpace, driver: FaultDriver
    ) -> None:
        buf = filled(mm, 1)
        driver.device.read(mm, buf.addr, 1)
        with pm.AddressSpace() as other, pm.Mirror(other) as mirror:
            assert errno_of(driver.device.read, other, buf.addr, 1) == errno.EXDEV
            with mirror.range(buf.addr, buf.addr + PAGE) as rng:
                rng.default_flags = FAULT
                assert errno_of(driver.device.page_table.map, rng, rng.fault()) == errno.EXDEV
                driver.device.page_table.clear(0, WHOLE)
                assert driver.device.page_table.map(rng, rng.seq)
                assert driver.device.read(other, buf.addr, PAGE) == bytes(buf)
            driver.device.page_table.clear(0, WHOLE)


def test_without_process_vm_a_device_reaches_no_process_memory() -> None:
    with pm.AddressSpace(disable=["process_vm"]) as mm:
        buf = filled(mm, 1)
        with Driver(mm) as driver, whole(driver, buf) as rng:
            assert driver.device.page_table.map(rng, rng.fault())
            daddr = int(pm.hmm_range_dma_map(rng, driver.device)[0])
            accesses = (lambda: driver.device.read(mm, buf.addr, 1), lambda: driver.device.dma_read(daddr, 1))
            for access in accesses:
                with pytest.raises(pm.FeatureError, match="process_vm") as missing:
                    access()
                assert missing.value.feature == "process_vm"
            pm.hmm_range_dma_unmap(rng, driver.device)
