"""Device memory: what a CPU fault on it takes, and moving pages there and home."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from time import perf_counter_ns

import numpy as np

import pymirror as pm
from benchmarks.floors import floor, timed
from benchmarks.memory import HUGE_PAGE, PAGE, Aligned, Pages, expect, huge_pages, small_buffer, small_pages
from benchmarks.registry import Scale, Side, Sides, benchmark

THERE, HOME, BOTH_WAYS = 1, 2, 3
GOAL_2M = 1.15
#: "At most 1.15 times the floor, plus 100 us" is at most 1.15 times this much more than the floor.
EXTRA_2M = 100_000 / GOAL_2M


class Driver(pm.Mirror):
    """Counts what it is told, and does nothing else: it has no device entries for this memory."""

    told = 0

    def sync_cpu_device_pagetables(self, update: pm.MmuNotifierRange) -> None:
        self.told += 1


@dataclass(frozen=True)
class OnDevice:
    """Memory that a driver mirrors, and device memory that has room for all of it."""

    mm: pm.AddressSpace
    memory: Aligned
    vram: pm.DeviceMemory
    driver: Driver

    def there(self) -> int:
        return pm.migrate_to_device(self.mm, self.memory.start, self.memory.end, self.vram)

    def home(self) -> int:
        return pm.migrate_to_system(self.mm, self.memory.start, self.memory.end, self.vram)


@contextmanager
def on_device(
    size: int,
    *,
    delivery: str = "thread",
    around: int = PAGE,
    pages: Pages = small_pages,
) -> Iterator[OnDevice]:
    with ExitStack() as stack:
        mm = stack.enter_context(pm.AddressSpace(fault_delivery=delivery))
        vram = stack.enter_context(pm.DeviceMemory(pm.Device("bench"), size, fault_around=around))
        memory = pages(mm, size)
        memory.bytes[:] = 1
        driver = stack.enter_context(Driver(mm))
        stack.enter_context(driver.range(memory.start, memory.end))
        yield OnDevice(mm, memory, vram, driver)


@contextmanager
def touching(npages: int, percent: int, delivery: str) -> Iterator[Side]:
    """A touch of a page on the device, at this percentile of a round's touches of ``npages`` pages."""
    ns = np.zeros(npages, np.uint64)
    with on_device(npages * PAGE, delivery=delivery) as device:

        def one_round() -> float:
            expect(device.there() == npages, "pages did not move")
            before, told = device.mm.stats()["device_faults"], device.driver.told
            right = timed().timed_touches(device.memory.start, npages, ns.ctypes.data)
            device.mm.sync()
            faults = device.mm.stats()["device_faults"] - before
            expect(right == faults == npages, f"{faults} faults, {right} right bytes for {npages} pages")
            expect(device.driver.told > told, "the driver was not told")
            return float(np.percentile(ns, percent, method="lower"))

        yield one_round


@contextmanager
def fault_back(scale: Scale, delivery: str, percent: int) -> Iterator[Sides]:
    npages = scale.count(1024)
    with ExitStack() as stack:
        bare = stack.enter_context(floor(f"fault_back_{delivery}", npages, percent, work=npages))
        ours = stack.enter_context(touching(npages, percent, delivery))
        others = {}
        if delivery == "inline":
            others["thread delivery"] = stack.enter_context(touching(npages, percent, "thread"))
        yield Sides(ours, bare, others)


@benchmark("fault-back-thread", goal=1.15, unit="us", rounds=40, setups=5)
@contextmanager
def fault_back_thread(scale: Scale) -> Iterator[Sides]:
    """p50 of a CPU fault on a 4 KiB page on a device, a driver attached; against a bare C handler thread."""
    with fault_back(scale, "thread", 50) as sides:
        yield sides


@benchmark("fault-back-thread-p99", goal=None, unit="us", rounds=40, setups=5)
@contextmanager
def fault_back_thread_p99(scale: Scale) -> Iterator[Sides]:
    """The same, p99."""
    with fault_back(scale, "thread", 99) as sides:
        yield sides


@benchmark("fault-back-inline", goal=1.15, unit="us", rounds=40, setups=5)
@contextmanager
def fault_back_inline(scale: Scale) -> Iterator[Sides]:
    """p50 of such a fault with inline delivery; against a bare handler of SIGBUS."""
    with fault_back(scale, "inline", 50) as sides:
        yield sides


@benchmark("fault-back-inline-p99", goal=None, unit="us", rounds=40, setups=5)
@contextmanager
def fault_back_inline_p99(scale: Scale) -> Iterator[Sides]:
    """The same, p99."""
    with fault_back(scale, "inline", 99) as sides:
        yield sides


@benchmark("fault-back-stream", goal=3, unit="ms", rounds=12, setups=3)
@contextmanager
def fault_back_stream(scale: Scale) -> Iterator[Sides]:
    """memcpy of 256 MiB of 4 KiB pages on a device, 2 MiB coming home a fault; against memcpy at home."""
    size, piece = scale.size(256 * pm.MiB, multiple=pm.MiB), pm.MiB
    buffer = np.frombuffer(small_buffer(piece), np.uint8)
    with floor("copy", size, piece, work=size) as bare, on_device(size, around=HUGE_PAGE) as device:

        def ours() -> float:
            expect(device.there() == size // PAGE, "pages did not move")
            ns = timed().timed_copy(device.memory.start, size, buffer.ctypes.data, piece)
            expect(device.vram.used == 0 and bool((buffer == 1).all()), "something is still on the device")
            return float(ns)

        yield Sides(ours, bare)


@contextmanager
def migrate(scale: Scale, ways: int, *, huge: bool, extra_ns: float = 0) -> Iterator[Sides]:
    """256 MiB there and home. ``ways``: what of it is timed."""
    size = scale.size(256 * pm.MiB, multiple=HUGE_PAGE)
    npages, page = size // PAGE, HUGE_PAGE if huge else PAGE
    with (
        floor("migrate", size, int(huge), ways, work=size // page) as bare,
        on_device(size, pages=huge_pages if huge else small_pages) as device,
    ):

        def ours() -> float:
            start = perf_counter_ns()
            out = device.there()
            halfway = perf_counter_ns()
            home = device.home()
            end = perf_counter_ns()
            expect(out == home == npages, f"{out} pages out and {home} home of {npages}")
            expect(bool((device.memory.bytes[::page] == 1).all()), "bytes were lost")
            return (halfway - start if ways & THERE else 0) + (end - halfway if ways & HOME else 0)

        def with_extra() -> float:
            return bare() + extra_ns * ways.bit_count()

        yield Sides(ours, with_extra)


@benchmark("migrate-4k", goal=1.15, unit="ms", rounds=20, setups=4)
@contextmanager
def migrate_4k(scale: Scale) -> Iterator[Sides]:
    """256 MiB of 4 KiB pages to the device and home; against pread of their pagemap and UFFDIO_MOVE."""
    with migrate(scale, BOTH_WAYS, huge=False) as sides:
        yield sides


@benchmark("migrate-4k-there", goal=1.15, unit="ms", rounds=20, setups=4)
@contextmanager
def migrate_4k_there(scale: Scale) -> Iterator[Sides]:
    """The way to the device alone."""
    with migrate(scale, THERE, huge=False) as sides:
        yield sides


@benchmark("migrate-4k-home", goal=1.15, unit="ms", rounds=20, setups=4)
@contextmanager
def migrate_4k_home(scale: Scale) -> Iterator[Sides]:
    """The way home alone."""
    with migrate(scale, HOME, huge=False) as sides:
        yield sides


@benchmark("migrate-2m", goal=GOAL_2M, unit="us", rounds=20, setups=4)
@contextmanager
def migrate_2m(scale: Scale) -> Iterator[Sides]:
    """256 MiB of 2 MiB pages both ways; against UFFDIO_REGISTER, UFFDIO_MOVE and 100/1.15 us each way."""
    with migrate(scale, BOTH_WAYS, huge=True, extra_ns=EXTRA_2M) as sides:
        yield sides


@benchmark("migrate-2m-there", goal=GOAL_2M, unit="us", rounds=20, setups=4)
@contextmanager
def migrate_2m_there(scale: Scale) -> Iterator[Sides]:
    """The way to the device alone."""
    with migrate(scale, THERE, huge=True, extra_ns=EXTRA_2M) as sides:
        yield sides


@benchmark("migrate-2m-home", goal=GOAL_2M, unit="us", rounds=20, setups=4)
@contextmanager
def migrate_2m_home(scale: Scale) -> Iterator[Sides]:
    """The way home alone."""
    with migrate(scale, HOME, huge=True, extra_ns=EXTRA_2M) as sides:
        yield sides
