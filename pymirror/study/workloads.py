# SPDX-License-Identifier: MIT
"""The workloads: what programs do with memory that a device works on; real memory, and a seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from mmap import MADV_DONTNEED, PROT_READ, PROT_WRITE

import numpy as np

from . import malloc
from .options import PAGE
from .stage import Bytes, Stage

_WINDOW = 32 << 20
_MADV_NOHUGEPAGE = 15

RECORD = 64
PASSES = 8
SPARSE_READS = 512
MALLOCS = 128
FORKS = 16
SNAPSHOTS = 4
UPDATES = 64


@dataclass(frozen=True, slots=True)
class Workload:
    """``about`` says what it does, ``operation`` what is counted as one; ``run`` does it on a stage."""

    name: str
    about: str
    operation: str
    run: Callable[[Stage], None]


@contextmanager
def _buffer(stage: Stage, size: int) -> Iterator[tuple[int, Bytes]]:
    """Memory of 4 KiB pages, written once by the CPU, and registered.

    A vma of its own, in windows of notifiers that have nothing else in them: what drivers of aligned chunks
    and wide notifiers do is the same in every run.
    """
    mm = stage.mm
    window = max(_WINDOW, stage.options.notifier_span)
    reserved = mm.mmap(-(-size // window) * window + window, prot=0)
    addr = -(-reserved.addr // window) * window
    try:
        mm.mprotect(addr, size, PROT_READ | PROT_WRITE)
        mm.madvise(addr, size, _MADV_NOHUGEPAGE)
        offset = addr - reserved.addr
        memory = np.frombuffer(memoryview(reserved), np.uint8)[offset : offset + size]
        memory[:] = 1
        stage.register(addr, size)
        yield addr, memory
        stage.look_at(addr, size)
    finally:
        stage.contender.close()
        # The workload has views of it still, which close() would refuse.
        mm.munmap(reserved.addr, reserved.size)


def _chunks(stage: Stage, size: int) -> list[slice]:
    chunk = stage.options.chunk
    return [slice(at, at + chunk) for at in range(0, size, chunk)]


def stream_once(stage: Stage) -> None:
    """Fill a chunk, have the device read it, discard it: no page is used twice."""
    size = stage.options.size
    with _buffer(stage, size) as (addr, memory):
        for number, chunk in enumerate(_chunks(stage, size)):
            piece = memory[chunk]
            with stage.cpu():
                piece[:] = number % 251 + 1
            stage.device_reads(addr + chunk.start, piece)
            with stage.cpu():
                stage.mm.madvise(addr + chunk.start, piece.size, MADV_DONTNEED)
            stage.counts.operations += 1


def reuse(stage: Stage) -> None:
    """Change some bytes of a chunk, have the device read it; the whole buffer again and again."""
    size = stage.options.small
    with _buffer(stage, size) as (addr, memory):
        for number in range(PASSES):
            for chunk in _chunks(stage, size):
                with stage.cpu():
                    memory[chunk][:RECORD] = number + 2
                stage.device_reads(addr + chunk.start, memory[chunk])
                stage.counts.operations += 1


def malloc_churn(stage: Stage) -> None:
    """Allocate, fill, have the device read it, free(): the same address is other memory each time."""
    size = max(stage.options.chunk, 4 * malloc.THRESHOLD)
    malloc.map_large_blocks()
    addr = 0
    try:
        for number in range(MALLOCS):
            with stage.cpu():
                addr = malloc.aligned_alloc(size)
                memory = malloc.view(addr, size)
                memory[:] = number % 251 + 1
            stage.register(addr, size)
            stage.device_reads(addr, memory)
            stage.counts.operations += 1
            if number == MALLOCS - 1:
                stage.look_at(addr, size)
            with stage.cpu():
                addr = malloc.free(addr)
    finally:
        malloc.free(addr)
        stage.contender.close()


def fork_heavy(stage: Stage) -> None:
    """Fork, change memory while the child has it too, have the device read and write it."""
    size = stage.options.forked
    with _buffer(stage, size) as (addr, memory):
        chunks = _chunks(stage, size)
        for number in range(FORKS):
            chunk, other = chunks[number % len(chunks)], chunks[(number + 1) % len(chunks)]
            with stage.child(addr, memory):
                with stage.cpu():
                    memory[chunk] = number % 251 + 2
                stage.device_reads(addr + chunk.start, memory[chunk])
                stage.device_writes(addr + other.start, memory[other], number % 251 + 3)
            stage.counts.operations += 1


def sparse_random(stage: Stage) -> None:
    """Change a record somewhere in a large buffer, have the device read it."""
    size = stage.options.size
    with _buffer(stage, size) as (addr, memory):
        for number, page in enumerate(stage.rng.integers(0, size // PAGE, SPARSE_READS)):
            record = slice(int(page) * PAGE, int(page) * PAGE + RECORD)
            with stage.cpu():
                memory[record] = number % 251 + 2
            stage.device_reads(addr + record.start, memory[record])
            stage.counts.operations += 1


def cow_server(stage: Stage) -> None:
    """A server that forks for snapshots: CPU and device update records while a child keeps the old ones."""
    size = stage.options.forked
    with _buffer(stage, size) as (addr, memory):
        for _ in range(SNAPSHOTS):
            with stage.child(addr, memory):
                for number in range(UPDATES):
                    _update(stage, addr, memory, number)
                    stage.counts.operations += 1


def _update(stage: Stage, addr: int, memory: Bytes, number: int) -> None:
    """The CPU writes a record, which the device reads; the device writes one in some other page."""
    mine, its = (int(page) * PAGE for page in stage.rng.integers(0, memory.size // PAGE, 2))
    data = stage.rng.integers(0, 256, RECORD)
    record, other = slice(mine, mine + RECORD), slice(its + RECORD, its + 2 * RECORD)
    with stage.cpu():
        memory[record] = data
    stage.device_reads(addr + record.start, memory[record])
    stage.device_writes(addr + other.start, memory[other], number % 251 + 1)


WORKLOADS = (
    Workload(
        "stream-once",
        "fill a chunk, have the device read it, discard it (MADV_DONTNEED)",
        "a chunk",
        stream_once,
    ),
    Workload(
        "reuse",
        f"the device reads the same chunks {PASSES} times; the CPU changes some bytes",
        "a chunk",
        reuse,
    ),
    Workload(
        "malloc-churn",
        "malloc, fill, have the device read it, free; libc maps and unmaps",
        "a block",
        malloc_churn,
    ),
    Workload(
        "fork-heavy", "fork; CPU and device write while the child has the memory too", "a fork", fork_heavy
    ),
    Workload("sparse-random", "the device reads records in pages at random", "a record", sparse_random),
    Workload(
        "cow-server", "a child keeps a snapshot, while CPU and device update records", "an update", cow_server
    ),
)
