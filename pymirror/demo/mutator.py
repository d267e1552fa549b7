"""CPU threads that change memory through the API, as a program does under a device that mirrors it."""

from __future__ import annotations

import mmap
from collections.abc import Sequence

import numpy as np

import pymirror as pm
from pymirror.demo.checker import REFUSED
from pymirror.demo.forking import fork
from pymirror.demo.memory import PROT_NONE, RW, Chunk, Kind
from pymirror.demo.world import Operation, Worker, World

PAGES_PER_WRITE = 16


def write(worker: Worker, chunk: Chunk) -> None:
    """Some pages get new bytes: CPU stores, of which no driver is told but by a copy-on-write."""
    if not chunk.writable:
        _protect(worker.world, chunk, RW)
    pages = chunk.view().reshape(-1, mmap.PAGESIZE)
    chosen = worker.rng.integers(0, len(pages), PAGES_PER_WRITE)
    data = worker.world.fresh_data(worker.rng, PAGES_PER_WRITE * mmap.PAGESIZE)
    pages[chosen] = data.reshape(-1, mmap.PAGESIZE)


def unmap(worker: Worker, chunk: Chunk) -> None:
    """munmap, then new memory (or the same file again) where the kernel likes, filled if it is private."""
    worker.world.memory.unmap(chunk)
    worker.world.memory.map_anew(chunk)
    if not chunk.kind.shared:
        chunk.view()[:] = worker.world.fresh_data(worker.rng, chunk.size)


def mprotect(worker: Worker, chunk: Chunk) -> None:
    """Turn read-only memory writable, and the other way."""
    _protect(worker.world, chunk, mmap.PROT_READ if chunk.writable else RW)


def mprotect_none(worker: Worker, chunk: Chunk) -> None:
    """Take every access away: the device must be refused as the CPU would be; then give it back."""
    world = worker.world
    world.mm.mprotect(chunk.addr, chunk.size, PROT_NONE)
    try:
        world.device.read(world.mm, chunk.addr, 1)
        world.fail(f"the device read memory without access at {chunk.addr:#x}")
    except pm.StaleAccessError:
        raise
    except pm.MirrorError as error:
        if error.errno not in REFUSED:
            raise
        worker.tally["device_reads_refused"] += 1
    finally:
        _protect(world, chunk, RW)


def dontneed(worker: Worker, chunk: Chunk) -> None:
    """madvise(MADV_DONTNEED) on half of it: zeroes, or the file's bytes again."""
    half = chunk.size // 2
    start = int(worker.rng.integers(0, 2)) * half
    worker.world.mm.madvise(chunk.addr + start, half, mmap.MADV_DONTNEED)


def mremap(worker: Worker, chunk: Chunk) -> None:
    """Move the memory, pages and all, over a hole that was reserved for it."""
    mm = worker.world.mm
    hole = mm.mmap(chunk.size, prot=PROT_NONE, huge="thp" if chunk.kind is Kind.THP else None)
    flags = pm.MREMAP_MAYMOVE | pm.MREMAP_FIXED
    chunk.region = mm.mremap(chunk.addr, chunk.size, chunk.size, flags=flags, new_addr=hole.addr)
    chunk.addr = hole.addr


def _protect(world: World, chunk: Chunk, prot: int) -> None:
    world.mm.mprotect(chunk.addr, chunk.size, prot)
    chunk.writable = bool(prot & mmap.PROT_WRITE)


# How often, relative to each other.
WEIGHTS: dict[Operation, float] = {
    write: 40,
    unmap: 12,
    mprotect: 16,
    mprotect_none: 6,
    dontneed: 12,
    mremap: 10,
    fork: 2,
}
# What gives a hugetlb page back may not get another: the pool is the whole machine's. Copies need more of it.
NOT_ON_HUGETLB = (unmap, dontneed, mremap, fork)


class Mutator(Worker):
    """Changes chunks that were mapped through the API."""

    def __init__(self, world: World, name: str, seed: Sequence[int], chunks: list[Chunk]) -> None:
        super().__init__(world, name, seed, chunks)
        self._choices = {kind: _choices(kind) for kind in {chunk.kind for chunk in chunks}}

    def step(self, chunk: Chunk) -> None:
        operation = self.pick(*self._choices[chunk.kind])
        operation(self, chunk)
        self.tally[operation.__name__] += 1


def _choices(kind: Kind) -> tuple[list[Operation], list[float]]:
    operations = [op for op in WEIGHTS if kind is not Kind.HUGETLB or op not in NOT_ON_HUGETLB]
    weights = np.array([WEIGHTS[op] for op in operations])
    return operations, list(weights / weights.sum())
