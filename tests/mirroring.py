"""A small driver and helpers for tests of mirrors and ranges."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from notifying import PAGE, invalidate
from seams import WAIT_S, errno_of, needs

import pymirror as pm
from pymirror.pfn import PfnArray

FAULT = pm.HMM_PFN_REQ_FAULT
WRITE = pm.HMM_PFN_REQ_FAULT | pm.HMM_PFN_REQ_WRITE


class Driver(pm.Mirror):
    def __init__(self, mm: pm.AddressSpace, device: pm.Device | None = None) -> None:
        self.device = device or pm.Device("d")
        self.updates: list[pm.MmuNotifierRange] = []
        self.released = 0
        super().__init__(mm)

    def sync_cpu_device_pagetables(self, update: pm.MmuNotifierRange) -> None:
        with self.lock:
            self.updates.append(update)
            self.device.page_table.clear(update.start, update.end)

    def release(self) -> None:
        self.released += 1


def valid(pfns: PfnArray) -> list[bool]:
    return ((pfns & pm.HMM_PFN_VALID) != 0).tolist()


def writable(pfns: PfnArray) -> list[bool]:
    return ((pfns & pm.HMM_PFN_WRITE) != 0).tolist()


def whole(driver: pm.Mirror, buf: pm.Region, flags: int = FAULT) -> pm.Range:
    rng = driver.range(buf.addr, buf.addr + buf.size)
    rng.default_flags = flags
    return rng


#: Of CPU faults on a device's pages, and how these got there.
DELIVERIES = ("thread", "inline", "thread without move", "inline without move")


def space_by(delivery: str) -> pm.AddressSpace:
    """For device memory, by one of DELIVERIES."""
    fault_delivery, *off = delivery.split(" without ")
    needs("sigbus" if fault_delivery == "inline" else "uffd_kernel", "uffd_events", "pagemap")
    return pm.AddressSpace(fault_delivery=fault_delivery, disable=off)


@pytest.fixture(params=DELIVERIES)
def every_delivery(nothing_left_behind: None, request: pytest.FixtureRequest) -> Iterator[pm.AddressSpace]:
    """An address space by each of them, for a module that says ``mm = every_delivery``."""
    with space_by(request.param) as space:
        yield space


def errno_in_a_callback(mm: pm.AddressSpace, call: Callable[..., object], *args: Any) -> int:
    """The errno of what a call raises in an invalidation callback of other memory."""
    other = filled(mm, 1)
    found: list[int] = []

    def callback(sub: pm.IntervalNotifier, update: pm.MmuNotifierRange, seq: int) -> bool:
        sub.set_seq(seq)
        found.append(errno_of(call, *args))
        return True

    sub = pm.IntervalNotifier(mm, other.addr, other.size, callback)
    invalidate(mm, other.addr)
    sub.remove()
    (code,) = found
    return code


def as_bytes(buf: pm.Region) -> memoryview:
    return memoryview(buf).cast("B")


def modern_fault(mm: pm.AddressSpace, buf: pm.Region, flags: int = 0) -> PfnArray:
    """hmm_range_fault() over the region, under an interval notifier of its own."""
    sub = pm.IntervalNotifier(mm, buf.addr, buf.size, lambda sub, range, seq: sub.set_seq(seq))
    pfns = np.zeros(buf.size // PAGE, np.uint64)
    try:
        pm.hmm_range_fault(
            sub, buf.addr, buf.addr + buf.size, pfns, default_flags=flags, seq=sub.read_begin()
        )
    finally:
        sub.remove()
    return pfns


class FaultDriver(pm.Mirror):
    """A driver that maps what the device misses, one fault at a time, with the full retry loop."""

    def __init__(self, mm: pm.AddressSpace) -> None:
        self.device = pm.Device("d")
        self.faults: list[pm.DeviceFault] = []
        self.clears = True
        super().__init__(mm)
        self.device.set_fault_handler(self.handle)

    def sync_cpu_device_pagetables(self, update: pm.MmuNotifierRange) -> None:
        with self.lock:
            if self.clears:
                self.device.page_table.clear(update.start, update.end)

    def handle(self, fault: pm.DeviceFault) -> None:
        self.faults.append(fault)
        self.map(fault.addr, fault.end, WRITE if fault.write else FAULT)

    def map(self, start: int, end: int, flags: int = FAULT) -> None:
        with self.range(start, end) as rng:
            rng.default_flags = flags
            while True:
                rng.wait_until_valid(timeout=WAIT_S)
                try:
                    seq = rng.fault()
                except pm.MirrorError as refused:
                    if refused.errno not in (errno.EBUSY, errno.EAGAIN):
                        raise
                    continue
                with self.lock:
                    if rng.valid and self.device.page_table.map(rng, seq):
                        return


def filled(mm: pm.AddressSpace, pages: int, **how: Any) -> pm.Region:
    buf = mm.mmap(pages * PAGE, **how)
    np.frombuffer(buf, np.uint8)[:] = np.arange(buf.size, dtype=np.uint64) % 251
    return buf
