# SPDX-License-Identifier: MIT
"""Bounce buffers: memory that every device can address, for what a device without an IOMMU cannot reach.

The pool is real memory with bus addresses of its own in a low window. A device sees the bytes of the pool and
nothing else: what the driver's memory holds gets there, and back, at map, sync and unmap only.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from dataclasses import dataclass
from typing import Any

from .._shim import ffi
from ..errors import MirrorError

#: Bytes of a slot, and slots next to each other that one mapping may have (swiotlb.h of the kernel).
IO_TLB_SIZE = 1 << 11
IO_TLB_SEGSIZE = 128
#: Where the pool stands on the bus: just above the first MiB, in reach of 24 address lines.
BUS_WINDOW = 0x10_0000
POOL_SIZE = 4 << 20
_SEGMENT = (1 << IO_TLB_SEGSIZE) - 1
_PAGE = 4096


@dataclass(frozen=True, slots=True)
class Slots:
    """A run of slots: their process address, their bus address, and where they are in the pool."""

    cpu_addr: int
    bus_addr: int
    segment: int
    mask: int
    count: int


class SwiotlbPool:
    """``size`` bytes in slots of 2 KiB, at bus addresses from ``bus_addr`` on.

    ENOSPC is told by alloc() giving None: for a driver it is a mapping error. ``used`` and ``high_water`` are
    slots. A pool may serve several devices; default_pool() is the one of those that are given none.
    """

    def __init__(self, size: int = POOL_SIZE, bus_addr: int = BUS_WINDOW) -> None:
        per_segment = IO_TLB_SIZE * IO_TLB_SEGSIZE
        if size <= 0 or size % per_segment or bus_addr % per_segment or bus_addr <= 0:
            raise MirrorError(
                errno.EINVAL,
                f"SwiotlbPool: {size} bytes at bus address {bus_addr:#x}",
                hint=f"give multiples of {per_segment}, above 0",
            )
        self.size, self.bus_addr = size, bus_addr
        self._memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._view = ffi.from_buffer(self._memory, require_writable=True)
        self.cpu_addr = int(ffi.cast("uintptr_t", self._view))
        self._free = [_SEGMENT] * (size // per_segment)
        self._next = 0
        # A collection inside it may run a finalizer that gives slots back.
        self._lock = threading.RLock()
        self.slots = size // IO_TLB_SIZE
        self.used = self.high_water = self.exhausted = 0

    @property
    def bus_last(self) -> int:
        """The last bus address of its window, inclusive."""
        return self.bus_addr + self.size - 1

    def owns(self, bus_addr: int) -> bool:
        """Whether the bus address is in the pool's window, where no page of memory can be reached."""
        return self.bus_addr <= bus_addr <= self.bus_last

    def alloc(self, size: int, *, aligned: bool = False) -> Slots | None:
        """Slots next to each other for size bytes; None when there are none, or above 256 KiB.

        A page or more begins at a page boundary, as does what is asked to be ``aligned``.
        """
        count = -(-size // IO_TLB_SIZE)
        if not 0 < count <= IO_TLB_SEGSIZE:
            return None
        stride = _PAGE // IO_TLB_SIZE if aligned or size >= _PAGE else 1
        with self._lock:
            for step in range(len(self._free)):
                segment = (self._next + step) % len(self._free)
                at = _find(self._free[segment], count, stride)
                if at >= 0:
                    self._next = segment
                    return self._take(segment, at, count)
            self.exhausted += 1
        return None

    def free(self, slots: Slots) -> None:
        """Give back what alloc() gave, once."""
        with self._lock:
            self._free[slots.segment] |= slots.mask
            self.used -= slots.count

    def _take(self, segment: int, at: int, count: int) -> Slots:
        mask = ((1 << count) - 1) << at
        self._free[segment] &= ~mask
        self.used += count
        self.high_water = max(self.high_water, self.used)
        offset = (segment * IO_TLB_SEGSIZE + at) * IO_TLB_SIZE
        return Slots(self.cpu_addr + offset, self.bus_addr + offset, segment, mask, count)


def no_slots(pool: SwiotlbPool, size: int) -> str:
    """What alloc() gave None for, in words."""
    most = IO_TLB_SIZE * IO_TLB_SEGSIZE
    if size > most:
        return f"{size} bytes would be bounced, and bounce buffers are of at most {most}"
    return f"no bounce buffer of {size} bytes in a row is left: {pool.used} of {pool.slots} slots are used"


def _find(free: int, count: int, stride: int) -> int:
    """The lowest multiple of stride with that many bits set from it on, or -1."""
    runs, length = free, 1
    while runs and length < count:
        step = min(length, count - length)
        runs &= runs >> step
        length += step
    while runs:
        at = (runs & -runs).bit_length() - 1
        if at % stride == 0:
            return at
        runs &= runs - 1
    return -1


class Bounce:
    """A piece of driver memory and the slots that a device sees instead of it."""

    def __init__(self, pool: SwiotlbPool, slots: Slots, cpu_addr: int, size: int) -> None:
        self.pool, self.slots = pool, slots
        self.cpu_addr, self.size = cpu_addr, size

    def to_device(self, offset: int, size: int) -> None:
        """Copy from the driver's memory into the slots."""
        ffi.memmove(_at(self.slots.cpu_addr + offset), _at(self.cpu_addr + offset), size)

    def to_cpu(self, offset: int, size: int) -> None:
        """Copy from the slots into the driver's memory."""
        ffi.memmove(_at(self.cpu_addr + offset), _at(self.slots.cpu_addr + offset), size)

    def free(self) -> None:
        self.pool.free(self.slots)


def _at(addr: int) -> Any:
    return ffi.cast("char *", addr)


class _Default:
    """The pool of devices that are given none, made when the first of them needs it."""

    def __init__(self) -> None:
        self._pool: SwiotlbPool | None = None
        self._lock = threading.Lock()
        os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        # Private memory, and slots that only the parent's mappings give back.
        self._pool = None
        self._lock = threading.Lock()

    def pool(self) -> SwiotlbPool:
        with self._lock:
            if self._pool is None:
                self._pool = SwiotlbPool()
            return self._pool


_default = _Default()


def default_pool() -> SwiotlbPool:
    """The pool of this process: 4 MiB at bus addresses 0x100000 to 0x4fffff."""
    return _default.pool()
