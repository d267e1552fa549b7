"""The IOVA allocator with many and few IOVAs live. The floor of these is pymirror itself with a thousand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter_ns
from typing import Any

import numpy as np

from benchmarks.memory import PAGE, expect
from benchmarks.registry import Scale, Sides, benchmark
from pymirror._shim import ffi, lib

FEW, MANY = 1_000, 1_000_000
LAST = (1 << 48) - 1
TURNS = 1000


class Space:
    """An IOVA space with so many single pages live, scattered: every third of a run is free."""

    def __init__(self, live: int) -> None:
        space = ffi.new("pm_iova_space **")
        expect(lib.pm_iova_create(0, LAST, space) == 0, "no space")
        self.native = ffi.gc(space[0], lib.pm_iova_destroy)
        self.out = ffi.new("uint64_t *")
        held = np.array([self.alloc(PAGE) for _ in range(live * 3 // 2)], np.uint64)
        for iova in held[::3]:
            self.free(int(iova), PAGE)
        self.held = np.delete(held, np.s_[::3])

    def alloc(self, size: int) -> int:
        expect(lib.pm_iova_alloc(self.native, size, LAST, self.out) == 0, "the space is full")
        return int(self.out[0])

    def free(self, iova: int, size: int) -> None:
        expect(lib.pm_iova_free(self.native, iova, size) == 0, f"{iova:#x} is not live")

    def turns(self, size: int) -> float:
        """Nanoseconds of an allocation and a free, of which TURNS allocations come first."""
        native, out, alloc, free = self.native, self.out, lib.pm_iova_alloc, lib.pm_iova_free
        start = perf_counter_ns()
        iovas = []
        for _ in range(TURNS):
            alloc(native, size, LAST, out)
            iovas.append(out[0])
        for iova in iovas:
            free(native, iova, size)
        return (perf_counter_ns() - start) / TURNS


@contextmanager
def spaces(scale: Scale) -> Iterator[dict[int, Space]]:
    yield {live: Space(scale.count(live)) for live in (MANY, FEW, 1)}


def sides(spaces: dict[int, Space], size: int) -> Sides:
    def of(live: int) -> Any:
        return lambda: spaces[live].turns(size)

    return Sides(of(MANY), of(FEW), {"1 live": of(1)})


@benchmark("iova", goal=1.5, unit="us", fixture=spaces)
@contextmanager
def iova(spaces: dict[int, Space]) -> Iterator[Sides]:
    """Allocation and free of a page's IOVA by cffi, 10^6 others live; against the same with 10^3."""
    yield sides(spaces, PAGE)


@benchmark("iova-large", goal=1.5, unit="us", fixture=spaces)
@contextmanager
def iova_large(spaces: dict[int, Space]) -> Iterator[Sides]:
    """The same with IOVAs of 2 MiB."""
    yield sides(spaces, 512 * PAGE)
