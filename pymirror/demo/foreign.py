"""A thread that changes memory behind the library's back, with plain libc calls.

What the kernel tells of it arrives with the guarantee `after`; what it does not tell is found by comparing
page tables (`detected`). Either way the device must agree with the CPU once the call has returned.
"""

from __future__ import annotations

import mmap
import time

import pymirror as pm
from pymirror.demo import libc
from pymirror.demo.checker import REFUSED
from pymirror.demo.memory import RW, Chunk, Kind
from pymirror.demo.world import Operation, Worker

POLL_INTERVAL = 0.001


def write(worker: Worker, chunk: Chunk) -> None:
    chunk.view()[:] = worker.world.fresh_data(worker.rng, chunk.size)


def unmap(worker: Worker, chunk: Chunk) -> None:
    """munmap, then new memory wherever the kernel likes, which is often the same place."""
    worker.world.memory.unmap(chunk)
    worker.world.memory.map_anew(chunk)
    _refill(worker, chunk)


def map_over(worker: Worker, chunk: Chunk) -> None:
    """mmap(MAP_FIXED) over it: the old pages go and others stand at the same addresses."""
    libc.mmap(chunk.size, chunk.fd, chunk.offset, at=chunk.addr)
    _refill(worker, chunk)


def mremap(worker: Worker, chunk: Chunk) -> None:
    """Move the memory, pages and all."""
    chunk.addr = libc.mremap_guarded(chunk.addr, chunk.size)


def dontneed(worker: Worker, chunk: Chunk) -> None:
    libc.madvise(chunk.addr, chunk.size, mmap.MADV_DONTNEED)


def mprotect(worker: Worker, chunk: Chunk) -> None:
    """Make it read-only, of which the kernel says nothing: a device write must be refused all the same."""
    world = worker.world
    libc.mprotect(chunk.addr, chunk.size, mmap.PROT_READ)
    try:
        _look(worker, chunk)
        try:
            world.device.write(world.mm, chunk.addr, b"refuse me")
            world.fail(f"the device wrote to read-only memory at {chunk.addr:#x}")
        except pm.StaleAccessError:
            raise
        except pm.MirrorError as error:
            if error.errno not in REFUSED:
                raise
            worker.tally["device_writes_refused"] += 1
    finally:
        libc.mprotect(chunk.addr, chunk.size, RW)


def punch_hole(worker: Worker, chunk: Chunk) -> None:
    """fallocate(PUNCH_HOLE) in the memfd: its pages go, the mapping stays."""
    half = chunk.size // 2
    libc.punch_hole(chunk.fd, chunk.offset + half, half)
    _look(worker, chunk)


def _refill(worker: Worker, chunk: Chunk) -> None:
    if not chunk.kind.shared:
        write(worker, chunk)


def _look(worker: Worker, chunk: Chunk) -> None:
    """A driver's snapshot, in which the library compares page tables and so learns what it was not told."""
    worker.world.driver.snapshot(chunk)


OPERATIONS: dict[Kind, tuple[Operation, ...]] = {
    Kind.RAW: (write, unmap, map_over, mremap, dontneed, mprotect),
    Kind.RAW_SHARED: (write, unmap, map_over, mremap, dontneed, mprotect, punch_hole),
}


class ForeignMutator(Worker):
    """Changes chunks that libc mapped, once the device has them in its page table."""

    def visit(self, chunk: Chunk) -> None:
        if chunk.seen:
            super().visit(chunk)
        else:
            time.sleep(POLL_INTERVAL)

    def step(self, chunk: Chunk) -> None:
        chunk.seen = False
        operation = self.pick(OPERATIONS[chunk.kind])
        operation(self, chunk)
        self.tally[operation.__name__] += 1
