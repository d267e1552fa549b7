"""Ranges: faulting what is there, what is not, and a single page."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from time import perf_counter_ns
from typing import Any

import numpy as np

import pymirror as pm
from benchmarks.floors import floor, timed
from benchmarks.memory import (
    HUGE_PAGE,
    PAGE,
    VALID_WRITE,
    Aligned,
    Pages,
    expect,
    huge_pages,
    hugetlb_pages,
    mirrored,
    small_pages,
)
from benchmarks.registry import Scale, Side, Sides, benchmark

PM_PRESENT = 1 << 63
PM_EXCLUSIVE = 1 << 56
PM_FILE = 1 << 61
PM_PFN_MASK = (1 << 55) - 1


def pagemap_read(memory: Aligned) -> AbstractContextManager[Side]:
    """The floor of a warm fault of this memory."""
    size = memory.end - memory.start
    return floor("pagemap_read", os.getpid(), memory.start, size, work=size // PAGE)


def timed_fault(rng: pm.Range) -> float:
    start = perf_counter_ns()
    rng.fault()
    return perf_counter_ns() - start


def expect_writable(pfns: np.ndarray, npages: int) -> None:
    """In C: what numpy would do here with arrays of its own drives struct pages out of the cache."""
    writable = timed().timed_check(pfns.ctypes.data, pfns.size, int(VALID_WRITE))
    expect(writable == npages, f"{writable} of {npages} pages are valid and writable")


@benchmark("fault-warm", goal=1.15, unit="us", rounds=100, setups=5)
@contextmanager
def fault_warm(scale: Scale) -> Iterator[Sides]:
    """rng.fault() for writing of 64 MiB of present 4 KiB pages; against one pread of their pagemap."""
    size = scale.size(64 * pm.MiB)
    npages = size // PAGE
    with (
        mirrored(size) as (memory, rng),
        pagemap_read(memory) as bare,
        open("/proc/self/pagemap", "rb", buffering=0) as pagemap,
    ):

        def ours() -> float:
            ns = timed_fault(rng)
            expect_writable(rng.pfns, npages)
            return ns

        def alternative(decode: Callable[[bytes], Any]) -> Side:
            def one_round() -> float:
                start = perf_counter_ns()
                pfns = decode(os.pread(pagemap.fileno(), npages * 8, memory.start // PAGE * 8))
                ns = perf_counter_ns() - start
                expect_writable(np.asarray(pfns, np.uint64), npages)
                return ns

            return one_round

        others = {"os.pread + numpy": alternative(by_numpy), "os.pread + loop": alternative(by_loop)}
        yield Sides(ours, bare, others)


def by_numpy(data: bytes) -> np.ndarray:
    """The pfns of private anonymous memory as a user would get them who knows numpy."""
    entries = np.frombuffer(data, np.uint64)
    present = (entries & np.uint64(PM_PRESENT)) != 0
    own = (entries & np.uint64(PM_EXCLUSIVE | PM_FILE)) == np.uint64(PM_EXCLUSIVE)
    pfns = np.where(present, entries & np.uint64(PM_PFN_MASK | PM_PRESENT), np.uint64(0))
    pfns[present & own] |= np.uint64(pm.HMM_PFN_WRITE)
    return pfns


def by_loop(data: bytes) -> list[int]:
    """And one who does not."""
    pfns = []
    for entry in memoryview(data).cast("Q"):
        if not entry & PM_PRESENT:
            pfns.append(0)
        elif entry & PM_EXCLUSIVE and not entry & PM_FILE:
            pfns.append(entry & PM_PFN_MASK | PM_PRESENT | pm.HMM_PFN_WRITE)
        else:
            pfns.append(entry & PM_PFN_MASK | PM_PRESENT)
    return pfns


@contextmanager
def warm(size: int, pages: Pages = small_pages, disable: tuple[str, ...] = ()) -> Iterator[Sides]:
    """Present memory; ours may go without features."""
    npages = size // PAGE
    with mirrored(size, pages, disable) as (memory, rng), pagemap_read(memory) as bare:

        def ours() -> float:
            ns = timed_fault(rng)
            expect_writable(rng.pfns, npages)
            return ns

        yield Sides(ours, bare)


@benchmark("fault-warm-1g", goal=1.15, unit="ms", rounds=20, setups=2)
@contextmanager
def fault_warm_1g(scale: Scale) -> Iterator[Sides]:
    """fault-warm of 1 GiB."""
    with warm(scale.size(pm.GiB)) as sides:
        yield sides


@benchmark("presence-warm", goal=0.9, unit="us", rounds=100, setups=5)
@contextmanager
def presence_warm(scale: Scale) -> Iterator[Sides]:
    """fault-warm without PFNs, as an ordinary user has it; against the same pread of the pagemap."""
    with warm(scale.size(64 * pm.MiB), disable=("pfn",)) as sides:
        yield sides


@benchmark("fault-warm-huge", goal=0.5, unit="us", rounds=100, setups=5)
@contextmanager
def fault_warm_huge(scale: Scale) -> Iterator[Sides]:
    """fault-warm of transparent huge pages, with PFNs; against a pread of the same memory's pagemap."""
    with warm(scale.size(64 * pm.MiB, multiple=HUGE_PAGE), huge_pages) as sides:
        yield sides


@benchmark("fault-warm-hugetlb", goal=0.5, unit="us", rounds=100, setups=5)
@contextmanager
def fault_warm_hugetlb(scale: Scale) -> Iterator[Sides]:
    """fault-warm of hugetlb pages, with PFNs; against a pread of the same memory's pagemap."""
    with warm(scale.size(64 * pm.MiB, multiple=HUGE_PAGE), hugetlb_pages) as sides:
        yield sides


@benchmark("fault-cold", goal=1.05, unit="ms", rounds=24, setups=3, primed=False)
@contextmanager
def fault_cold(scale: Scale) -> Iterator[Sides]:
    """rng.fault() for writing of 64 MiB never touched; against MADV_POPULATE_WRITE plus pread of pagemap."""
    size = scale.size(64 * pm.MiB)
    npages = size // PAGE
    with floor("populate_read", size, work=npages) as bare, pm.AddressSpace() as mm, pm.Mirror(mm) as mirror:

        def ours() -> float:
            memory = small_pages(mm, size)
            with mirror.range(memory.start, memory.end) as rng:
                rng.default_flags = pm.HMM_PFN_REQ_FAULT | pm.HMM_PFN_REQ_WRITE
                rng.wait_until_valid()
                ns = timed_fault(rng)
                expect_writable(rng.pfns, npages)
            mm.munmap(memory.region.addr, memory.region.size)
            return ns

        yield Sides(ours, bare)


@contextmanager
def one_page(times: int, size: int, pages: Pages) -> Iterator[Sides]:
    with floor("query_read", times, work=times, per=times) as bare, mirrored(size, pages) as (_, rng):

        def ours() -> float:
            fault = rng.fault
            start = perf_counter_ns()
            for _ in range(times):
                fault()
            ns = perf_counter_ns() - start
            expect_writable(rng.pfns, size // PAGE)
            return ns / times

        yield Sides(ours, bare)


@benchmark("fault-one-page", goal=4, unit="us", rounds=40, setups=2)
@contextmanager
def fault_one_page(scale: Scale) -> Iterator[Sides]:
    """rng.fault() of one present page; against PROCMAP_QUERY plus an 8 byte pread of the pagemap."""
    with one_page(scale.count(2000), PAGE, small_pages) as sides:
        yield sides


@benchmark("fault-one-page-hugetlb", goal=None, unit="us", rounds=40, setups=2)
@contextmanager
def fault_one_page_hugetlb(scale: Scale) -> Iterator[Sides]:
    """rng.fault() of one hugetlb page, 512 entries; against PROCMAP_QUERY plus an 8 byte pread."""
    with one_page(scale.count(2000), HUGE_PAGE, hugetlb_pages) as sides:
        yield sides
