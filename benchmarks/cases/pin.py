"""Pinned pages: what a pin costs, and what reading through one does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter_ns

import numpy as np

import pymirror as pm
from benchmarks.floors import floor
from benchmarks.memory import PAGE, expect, small_buffer, small_pages
from benchmarks.registry import Scale, Sides, benchmark
from pymirror._shim import ffi, lib

PAGES = 64


@benchmark("pin", goal=None, unit="us", setups=5)
@contextmanager
def pin(scale: Scale) -> Iterator[Sides]:
    """pin_user_pages and unpin_user_pages of 64 present pages; against a buffer registered and dropped."""
    times = scale.count(1000)
    size = PAGES * PAGE
    with floor("pin", size, times, work=times, per=times) as bare, pm.AddressSpace() as mm:
        memory = small_pages(mm, size)
        memory.bytes[:] = 1
        start_at = memory.start
        pfns = np.zeros(PAGES, np.uint64)
        made = ffi.new("pm_pin **")
        buffer = ffi.from_buffer("uint64_t[]", pfns)
        request = ffi.new("struct pm_pinning *", {"start": start_at, "npages": PAGES, "pfns": buffer})

        def ours() -> float:
            take, give_back = pm.pin_user_pages, pm.unpin_user_pages
            start = perf_counter_ns()
            for _ in range(times):
                give_back(take(mm, start_at, PAGES))
            ns = perf_counter_ns() - start
            stats = mm.stats()
            expect(stats["pins"] == 0 and stats["pin_made"] >= times, f"{stats['pin_made']} pins were made")
            return ns / times

        def native() -> float:
            start = perf_counter_ns()
            for _ in range(times):
                expect(lib.pm_pin_create(mm.native, request, made) == 0, "no pin")
                lib.pm_pin_put(made[0])
            return (perf_counter_ns() - start) / times

        yield Sides(ours, bare, {"the native calls, by cffi": native})


@benchmark("pin-read", goal=None, unit="ms", rounds=40, setups=5)
@contextmanager
def pin_read(scale: Scale) -> Iterator[Sides]:
    """PinnedPages.read_into of 64 MiB by 1 MiB; against memcpy in the same pieces."""
    size, piece = scale.size(64 * pm.MiB, multiple=pm.MiB), pm.MiB
    buffer = small_buffer(piece)
    with (
        floor("copy", size, piece, work=size) as bare,
        floor("vm_readv", size, piece, work=size) as vm_readv,
        pm.AddressSpace() as mm,
    ):
        memory = small_pages(mm, size)
        memory.bytes[:] = np.random.default_rng(1).integers(256, size=size, dtype=np.uint8)
        with pm.pin_user_pages(mm, memory.start, size // PAGE) as pinned:

            def ours() -> float:
                read_into = pinned.read_into
                start = perf_counter_ns()
                for offset in range(0, size, piece):
                    read_into(offset, buffer)
                ns = perf_counter_ns() - start
                expect(bytes(buffer) == bytes(memory.bytes[-piece:]), "the device read something else")
                return ns

            yield Sides(ours, bare, {"process_vm_readv": vm_readv})
