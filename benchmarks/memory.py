"""Mirrored memory for benchmarks, laid out as the floors lay out theirs."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np

import pymirror as pm

PAGE = 4096
HUGE_PAGE = 2 << 20
VALID_WRITE = np.uint64(pm.HMM_PFN_VALID | pm.HMM_PFN_WRITE)
MADV_NOHUGEPAGE = 15


class WorkError(RuntimeError):
    """A side did not do what it was timed for."""


def expect(right: bool, what: str) -> None:
    if not right:
        raise WorkError(what)


@dataclass(frozen=True)
class Aligned:
    """[start, end) begins on a 2 MiB boundary, inside a Region a little larger."""

    region: pm.Region
    start: int
    end: int

    @property
    def bytes(self) -> np.ndarray:
        first = self.start - self.region.addr
        return np.frombuffer(self.region, np.uint8)[first : first + self.end - self.start]


def small_pages(mm: pm.AddressSpace, size: int) -> Aligned:
    """Memory in 4 KiB pages, untouched."""
    return _aligned(mm, size, MADV_NOHUGEPAGE)


def huge_pages(mm: pm.AddressSpace, size: int) -> Aligned:
    """The same, in huge pages where it is touched."""
    return _aligned(mm, size, mmap.MADV_HUGEPAGE)


def hugetlb_pages(mm: pm.AddressSpace, size: int) -> Aligned:
    """The same, of the pool of huge pages. MirrorError: there are too few."""
    region = mm.mmap(size, huge="hugetlb")
    return Aligned(region, region.addr, region.addr + size)


def _aligned(mm: pm.AddressSpace, size: int, advice: int) -> Aligned:
    region = mm.mmap(size + HUGE_PAGE)
    start = region.addr + -region.addr % HUGE_PAGE
    mm.madvise(start, size, advice)
    return Aligned(region, start, start + size)


Pages = Callable[[pm.AddressSpace, int], Aligned]


@contextmanager
def mirrored(
    size: int, pages: Pages = small_pages, disable: tuple[str, ...] = ()
) -> Iterator[tuple[Aligned, pm.Range]]:
    """Touched memory in an address space of its own, and a range over it that asks for write access."""
    with ExitStack() as stack:
        mm = stack.enter_context(pm.AddressSpace(disable=disable))
        memory = pages(mm, size)
        memory.bytes[:] = 1
        rng = stack.enter_context(stack.enter_context(pm.Mirror(mm)).range(memory.start, memory.end))
        rng.default_flags = pm.HMM_PFN_REQ_FAULT | pm.HMM_PFN_REQ_WRITE
        rng.wait_until_valid()
        yield memory, rng


def small_buffer(size: int) -> mmap.mmap:
    """Touched private memory that pymirror knows nothing of, for results."""
    buffer = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    buffer.madvise(mmap.MADV_NOHUGEPAGE)
    buffer[:] = bytes(size)
    return buffer
