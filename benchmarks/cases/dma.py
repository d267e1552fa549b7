"""DMA: mapping ranges, mirrored and pinned, reading by DMA address, and what a mapping weighs."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from time import perf_counter_ns

import numpy as np

import pymirror as pm
from benchmarks.cases.fault import timed_fault
from benchmarks.floors import floor
from benchmarks.memory import PAGE, expect, mirrored, small_buffer, small_pages
from benchmarks.registry import Scale, Sides, benchmark

#: For each mapped page, besides a constant for a range.
BOOKKEEPING_BYTES = 16


@benchmark("hmm-dma-map", goal=1.5, unit="us", rounds=100, setups=5)
@contextmanager
def hmm_dma_map(scale: Scale) -> Iterator[Sides]:
    """hmm_range_dma_map of 64 MiB of present 4 KiB pages (it faults first); against rng.fault() alone."""
    npages = scale.size(64 * pm.MiB) // PAGE
    device = pm.Device("bench")
    with mirrored(npages * PAGE) as (_, rng):
        daddrs = np.empty(npages, np.uint64)

        def ours() -> float:
            start = perf_counter_ns()
            pm.hmm_range_dma_map(rng, device, out=daddrs)
            ns = perf_counter_ns() - start
            expect(np.count_nonzero(daddrs) == npages, "not every page has a DMA address")
            expect(pm.hmm_range_dma_unmap(rng, device) == npages, "not every page was mapped")
            return ns

        rng.pfn_flags_mask = 0
        yield Sides(ours, lambda: timed_fault(rng))


@benchmark("hmm-dma-unmap", goal=None, unit="us", rounds=60, setups=3)
@contextmanager
def hmm_dma_unmap(scale: Scale) -> Iterator[Sides]:
    """hmm_range_dma_unmap of 64 MiB mapped page by page; against rng.fault() of the same pages."""
    npages = scale.size(64 * pm.MiB) // PAGE
    device = pm.Device("bench")
    with mirrored(npages * PAGE) as (_, rng):

        def ours() -> float:
            pm.hmm_range_dma_map(rng, device)
            start = perf_counter_ns()
            taken = pm.hmm_range_dma_unmap(rng, device)
            ns = perf_counter_ns() - start
            expect(taken == npages, f"{taken} of {npages} pages were mapped")
            return ns

        rng.pfn_flags_mask = 0
        yield Sides(ours, lambda: timed_fault(rng))


@contextmanager
def many_mapped(count: int) -> Iterator[tuple[list[pm.Range], pm.Device]]:
    """So many ranges of a page, all mapped for one device."""
    device = pm.Device("bench")
    with pm.AddressSpace() as mm, pm.Mirror(mm) as mirror, ExitStack() as stack:
        memory = small_pages(mm, count * PAGE)
        memory.bytes[:] = 1
        ranges = []
        for addr in range(memory.start, memory.end, PAGE):
            rng = stack.enter_context(mirror.range(addr, addr + PAGE))
            rng.default_flags = pm.HMM_PFN_REQ_FAULT | pm.HMM_PFN_REQ_WRITE
            rng.wait_until_valid()
            pm.hmm_range_dma_map(rng, device)
            ranges.append(rng)
        yield ranges, device
        for rng in ranges:
            pm.hmm_range_dma_unmap(rng, device)


@benchmark("hmm-dma-many", goal=1.5, unit="us", rounds=40)
@contextmanager
def hmm_dma_many(scale: Scale) -> Iterator[Sides]:
    """hmm_range_dma_unmap and map of one page among 10^4 mapped ranges; against the same among 10."""
    few, many = scale.count(10), scale.count(10_000)
    with many_mapped(many) as among_many, many_mapped(few) as among_few:

        def turns(among: tuple[list[pm.Range], pm.Device], times: int = 1000) -> float:
            ranges, device = among
            unmap, remap = pm.hmm_range_dma_unmap, pm.hmm_range_dma_map
            picked = [ranges[i % len(ranges)] for i in range(0, times * 7, 7)]
            taken = 0
            start = perf_counter_ns()
            for rng in picked:
                taken += unmap(rng, device)
                remap(rng, device)
            ns = perf_counter_ns() - start
            expect(taken == times, f"{taken} of {times} pages were mapped")
            return ns / times

        yield Sides(lambda: turns(among_many), lambda: turns(among_few))


@benchmark("gup-dma-map", goal=None, unit="us", rounds=60, setups=3)
@contextmanager
def gup_dma_map(scale: Scale) -> Iterator[Sides]:
    """gup_range_dma_map of 64 MiB of pinned pages; against hmm_range_dma_map of as many, which faults."""
    npages = scale.size(64 * pm.MiB) // PAGE
    device = pm.Device("bench")
    with mirrored(npages * PAGE) as (memory, rng), pm.pin_user_pages(rng.mm, memory.start, npages) as pin:
        daddrs = np.empty(npages, np.uint64)
        rng.pfn_flags_mask = 0

        def pinned() -> float:
            start = perf_counter_ns()
            pm.gup_range_dma_map(pin, device, out=daddrs)
            ns = perf_counter_ns() - start
            expect(pm.gup_range_dma_unmap(pin, device) == npages, "not every page was mapped")
            return ns

        def by_mirroring() -> float:
            start = perf_counter_ns()
            pm.hmm_range_dma_map(rng, device, out=daddrs)
            ns = perf_counter_ns() - start
            expect(pm.hmm_range_dma_unmap(rng, device) == npages, "not every page was mapped")
            return ns

        yield Sides(pinned, by_mirroring)


@benchmark("dma-read", goal=1.1, unit="ms", rounds=40, setups=5)
@contextmanager
def dma_read(scale: Scale) -> Iterator[Sides]:
    """dma_read_into of 64 MiB of mirrored memory by 1 MiB; against process_vm_readv in the same pieces."""
    size, piece = scale.size(64 * pm.MiB, multiple=pm.MiB), pm.MiB
    buffer, other, device = small_buffer(piece), small_buffer(piece), pm.Device("bench")
    with (
        floor("vm_readv", size, piece, work=size) as bare,
        mirrored(size) as (memory, rng),
        pm.pin_user_pages(rng.mm, memory.start, size // PAGE) as pin,
    ):
        memory.bytes[:] = np.random.default_rng(1).integers(256, size=size, dtype=np.uint8)
        rng.wait_until_valid()
        mirror_at = int(pm.hmm_range_dma_map(rng, device)[0])
        pin_at = int(pm.gup_range_dma_map(pin, device)[0])

        def read(at: int, into: mmap.mmap) -> float:
            read_into = device.dma_read_into
            start = perf_counter_ns()
            for daddr in range(at, at + size, piece):
                read_into(daddr, into)
            ns = perf_counter_ns() - start
            expect(bytes(into) == bytes(memory.bytes[-piece:]), "the device read something else")
            return ns

        yield Sides(lambda: read(mirror_at, buffer), bare, {"through a pin": lambda: read(pin_at, other)})
        pm.hmm_range_dma_unmap(rng, device)
        pm.gup_range_dma_unmap(pin, device)


@benchmark("dma-bytes-per-page", goal=1.0, unit="bytes", rounds=1, primed=False)
@contextmanager
def dma_bytes_per_page(scale: Scale) -> Iterator[Sides]:
    """Memory of a mapping of 64 MiB, a page; against 16 bytes, what bookkeeping may take."""
    npages = scale.size(64 * pm.MiB) // PAGE
    device = pm.Device("bench")
    with mirrored(npages * PAGE) as (_, rng):
        pm.hmm_range_dma_map(rng, device)

        def ours() -> float:
            stats = device.domain.stats()
            expect(stats["mapped_pages"] == npages, f"{stats['mapped_pages']} of {npages} pages are mapped")
            return stats["bytes"] / npages

        yield Sides(ours, lambda: BOOKKEEPING_BYTES)
        pm.hmm_range_dma_unmap(rng, device)
