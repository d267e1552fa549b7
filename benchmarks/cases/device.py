"""The software device: reading through its page table, and what that table weighs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter_ns

import numpy as np

import pymirror as pm
from benchmarks.floors import floor
from benchmarks.memory import PAGE, expect, mirrored, small_buffer
from benchmarks.registry import Scale, Sides, benchmark

ENTRY_BYTES = 8


@contextmanager
def mapped(size: int) -> Iterator[tuple[np.ndarray, pm.Range, pm.Device]]:
    """Memory that a device has entries for."""
    device = pm.Device("bench")
    with mirrored(size) as (memory, rng):
        expect(device.page_table.map(rng, rng.fault()), "the range was invalidated meanwhile")
        yield memory.bytes, rng, device


@benchmark("device-read", goal=1.1, unit="ms", rounds=40, setups=5)
@contextmanager
def device_read(scale: Scale) -> Iterator[Sides]:
    """device.read_into of 64 MiB of mirrored memory by 1 MiB; against process_vm_readv in the same pieces."""
    size, piece = scale.size(64 * pm.MiB, multiple=pm.MiB), pm.MiB
    buffer = small_buffer(piece)
    with floor("vm_readv", size, piece, work=size) as bare, mapped(size) as (memory, rng, device):
        memory[:] = np.random.default_rng(1).integers(256, size=size, dtype=np.uint8)

        def ours() -> float:
            mm, read_into = rng.mm, device.read_into
            start = perf_counter_ns()
            for addr in range(rng.start, rng.end, piece):
                read_into(mm, addr, buffer)
            ns = perf_counter_ns() - start
            expect(bytes(buffer) == bytes(memory[-piece:]), "the device read something else")
            return ns

        yield Sides(ours, bare)


@benchmark("bytes-per-page", goal=1.0, unit="bytes", rounds=1, primed=False)
@contextmanager
def bytes_per_page(scale: Scale) -> Iterator[Sides]:
    """Memory of the device's page table a page, 64 MiB being programmed; against the 8 bytes of an entry."""
    size = scale.size(64 * pm.MiB)
    with mapped(size) as (_, _, device):

        def ours() -> float:
            stats = device.page_table.stats()
            expect(stats["entries"] == size // PAGE, f"{stats['entries']} entries for {size // PAGE} pages")
            return stats["bytes"] / stats["entries"]

        yield Sides(ours, lambda: ENTRY_BYTES)
