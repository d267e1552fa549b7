# SPDX-License-Identifier: MIT
"""Where a workload plays against one driver: the address space, the clock, and what is found wrong."""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..mm import AddressSpace
from .contender import Contender
from .footprint import Footprint, exclusive_pages
from .forked import Child
from .options import Options

Bytes = npt.NDArray[np.uint8]


@dataclass(slots=True)
class StageCounts:
    """What the study itself has counted.

    ``stale_reads`` gave the device other bytes than the CPU has; ``lost_writes`` of it did not reach what the
    CPU has; ``wrong_snapshots`` gave a forked child other bytes than at its fork.

    The others are 4 KiB pages. ``copied``: of what was shared after a fork, by the fork itself or a write. At
    the end of the last operation ``resident``: of the workload's memory in RAM; ``reclaimable``: of these not
    pinned, so that the kernel can take or move them; ``pinned``; ``stranded``: of these no more what the CPU
    has at their addresses. ``left_behind``: mapped or pinned still when the driver was closed.
    """

    operations: int = 0
    reads: int = 0
    writes: int = 0
    stale_reads: int = 0
    lost_writes: int = 0
    wrong_snapshots: int = 0
    copied: int = 0
    resident: int = 0
    pinned: int = 0
    reclaimable: int = 0
    stranded: int = 0
    left_behind: int = 0


@dataclass(slots=True)
class Clock:
    """Nanoseconds: ``used`` by all threads of the process, the kernel's part included, and ``elapsed``.

    What else runs on the machine, and the time until a thread that was woken runs, are in ``elapsed`` alone.
    """

    used: int = 0
    elapsed: int = 0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the time of what is done inside."""
        elapsed, used = time.perf_counter_ns(), time.process_time_ns()
        yield
        self.used += time.process_time_ns() - used
        self.elapsed += time.perf_counter_ns() - elapsed


class Stage:
    """For one workload and one driver."""

    def __init__(self, mm: AddressSpace, contender: Contender, options: Options) -> None:
        self.mm = mm
        self.contender = contender
        self.options = options
        self.rng = np.random.default_rng(options.seed)
        self.counts = StageCounts()
        self.cpu_clock = Clock()
        self.device_clock = Clock()

    @contextmanager
    def cpu(self) -> Iterator[None]:
        """Around what the CPU does to memory, callbacks included, as the kernel's call includes them."""
        with self.cpu_clock.running():
            yield
            self.mm.sync()

    def register(self, addr: int, size: int) -> None:
        with self.device_clock.running():
            self.contender.register(addr, size)

    def device_reads(self, addr: int, memory: Bytes) -> None:
        """The device reads what the CPU has in ``memory``, at ``addr``, and should see the same."""
        with self.device_clock.running():
            seen = self.contender.read(addr, memory.size)
        self.counts.reads += 1
        self.counts.stale_reads += not np.array_equal(np.frombuffer(seen, np.uint8), memory)

    def device_writes(self, addr: int, memory: Bytes, value: int) -> None:
        """The device fills ``memory``, at ``addr``, with a byte, and the CPU should see it."""
        data = bytes([value]) * memory.size
        with self.device_clock.running():
            self.contender.write(addr, data)
        self.counts.writes += 1
        self.counts.lost_writes += memory.tobytes() != data

    @contextmanager
    def child(self, addr: int, memory: Bytes) -> Iterator[None]:
        """Inside there is a forked child, which must have at the end what was there at the fork."""
        expected = zlib.crc32(memory.data)
        with self.cpu():
            child = Child(memory.data)
        with child:
            yield
            self.counts.wrong_snapshots += child.checksum() != expected
            self.counts.copied += exclusive_pages(addr, memory.size)

    def look_at(self, addr: int, size: int) -> None:
        """Count what is resident and what is pinned of the workload's memory, and beyond it."""
        found = Footprint.of(self.mm, addr, size)
        counts = self.counts
        counts.resident, counts.reclaimable = found.resident, found.reclaimable
        counts.pinned, counts.stranded = found.pinned, found.stranded

    def look_behind(self) -> None:
        """Count what the driver, closed by now, has not given back."""
        device = self.contender.device
        mapped = device.domain.stats()["mapped_pages"] + device.page_table.stats()["entries"]
        self.counts.left_behind = mapped + self.mm.stats()["pinned_pages"]
