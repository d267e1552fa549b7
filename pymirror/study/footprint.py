# SPDX-License-Identifier: MIT
"""What a piece of memory takes of the machine, read from the page table and compared with what is pinned."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..mm import AddressSpace
from ..pfn import hmm_pfn_to_pfn
from .options import PAGE

_PRESENT = np.uint64(1 << 63)
_EXCLUSIVE = np.uint64(1 << 56)
_PFN = np.uint64((1 << 55) - 1)


@dataclass(frozen=True, slots=True)
class Footprint:
    """Counts of 4 KiB pages.

    ``resident``: of the memory, in RAM, but for the zero page. ``reclaimable``: of these, not pinned, so that
    the kernel may write them out, move or compact them. ``pinned``: held by pins of the whole address space.
    ``stranded``: of these, no more what the CPU has at their addresses. Where PFNs cannot be seen, the page
    at a pinned address counts as the pinned one.
    """

    resident: int
    reclaimable: int
    pinned: int
    stranded: int

    @classmethod
    def of(cls, mm: AddressSpace, addr: int, size: int) -> Footprint:
        """Of [addr, addr + size)."""
        start, end = addr // PAGE * PAGE, -(-(addr + size) // PAGE) * PAGE
        present, pfns = _pagemap(start, end)
        if zero := mm.features.zero_pfn:
            # What was only read is no memory of the process.
            present &= pfns != zero
        held = np.zeros(present.size, np.bool_)
        stranded = 0
        for pin in mm._pins.live():
            in_ram, now = _pagemap(pin.start, pin.end)
            ours = in_ram & (now == hmm_pfn_to_pfn(pin.pfns))
            stranded += int((~ours).sum())
            first, last = max(start, pin.start), min(end, pin.end)
            if first < last:
                at = slice((first - start) // PAGE, (last - start) // PAGE)
                held[at] |= ours[(first - pin.start) // PAGE : (last - pin.start) // PAGE]
        return cls(
            resident=int(present.sum()),
            reclaimable=int((present & ~held).sum()),
            pinned=int(mm.stats()["pinned_pages"]),
            stranded=stranded,
        )


def exclusive_pages(addr: int, size: int) -> int:
    """Pages of [addr, addr + size) that no other process has: after a fork, those that were copied."""
    return int(((_raw(addr, addr + size) & _EXCLUSIVE) != 0).sum())


def _pagemap(start: int, end: int) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.uint64]]:
    """Of each 4 KiB page: whether it is in RAM, and its PFN, 0 without CAP_SYS_ADMIN."""
    raw = _raw(start, end)
    return (raw & _PRESENT) != 0, raw & _PFN


def _raw(start: int, end: int) -> npt.NDArray[np.uint64]:
    fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return np.frombuffer(os.pread(fd, (end - start) // PAGE * 8, start // PAGE * 8), np.uint64)
    finally:
        os.close(fd)
