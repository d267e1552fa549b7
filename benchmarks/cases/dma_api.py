"""The DMA API over driver memory: what its record costs, and whether many mappings cost more."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter_ns

import pymirror as pm
from benchmarks.memory import PAGE, expect
from benchmarks.registry import Scale, Sides, benchmark
from pymirror.dma.memory import Export, map_memory
from pymirror.dma.record import Site

FEW, MANY = 1_000, 100_000
TURNS = 200


def turns(work: Callable[[], None]) -> float:
    start = perf_counter_ns()
    for _ in range(TURNS):
        work()
    return (perf_counter_ns() - start) / TURNS


@benchmark("dma-debug", goal=None, unit="us")
@contextmanager
def dma_debug(scale: Scale) -> Iterator[Sides]:
    """dma_map_single, dma_mapping_error and dma_unmap_single of a page; against the same without record."""
    device, memory, way = pm.Device("bench"), bytearray(PAGE), pm.DMA_TO_DEVICE
    here = Site.of_caller()

    def ours() -> None:
        addr = pm.dma_map_single(device, memory, PAGE, way)
        expect(not pm.dma_mapping_error(device, addr), "no room")
        pm.dma_unmap_single(device, addr, PAGE, way)

    def bare() -> None:
        export = Export("bench", memory, writable=False)
        backing = map_memory(device, "single", export.addr, PAGE, way, here)
        expect(backing is not None, "no room")
        if backing is not None:
            backing.unmap(way)
        export.release()

    yield Sides(lambda: turns(ours), lambda: turns(bare))
    expect(device.release() == [] and not device.dma_errors, "dma-debug found something")


@contextmanager
def mapped(live: int) -> Iterator[pm.Device]:
    """A device with so many pages mapped."""
    with pm.Device("bench") as device:
        memory, way = bytearray(PAGE), pm.DMA_TO_DEVICE
        addrs = [pm.dma_map_single(device, memory, PAGE, way) for _ in range(live)]
        expect(not any(pm.dma_mapping_error(device, addr) for addr in addrs), "no room")
        yield device
        for addr in addrs:
            pm.dma_unmap_single(device, addr, PAGE, way)


@benchmark("dma-map-many", goal=1.5, unit="us")
@contextmanager
def dma_map_many(scale: Scale) -> Iterator[Sides]:
    """Mapping and unmapping a page with 10^5 others mapped; against the same with 10^3."""
    memory, way = bytearray(PAGE), pm.DMA_TO_DEVICE

    def work(device: pm.Device) -> None:
        addr = pm.dma_map_single(device, memory, PAGE, way)
        pm.dma_mapping_error(device, addr)
        pm.dma_unmap_single(device, addr, PAGE, way)

    with mapped(scale.count(MANY)) as many, mapped(scale.count(FEW)) as few:
        yield Sides(lambda: turns(lambda: work(many)), lambda: turns(lambda: work(few)))
