# SPDX-License-Identifier: MIT
"""What a DMA engine is given for an interval of bytes: a segment for each run of adjacent pages."""

from __future__ import annotations

import itertools

import numpy as np

from ..pfn import PfnArray

Segments = list[tuple[int, int]]


def dma_segments(daddrs: PfnArray, base: int, addr: int, n: int, size: int = 4096) -> Segments:
    """(DMA address, bytes) of [addr, addr + n), in order.

    ``daddrs`` is uint64, one DMA address for each page of ``size`` bytes from address ``base`` on.
    """
    if not n:
        return []
    first, last = (addr - base) // size, -(-(addr + n - base) // size)
    if last - first == 1:
        return [(int(daddrs[first]) + (addr - base) % size, n)]
    pages = daddrs[first:last]
    runs = [0, *(np.flatnonzero(np.diff(pages) != size) + 1).tolist(), last - first]
    found: Segments = []
    for run, after in itertools.pairwise(runs):
        begin = max(addr, base + (first + run) * size)
        end = min(addr + n, base + (first + after) * size)
        found.append((int(pages[run]) + (begin - base) % size, end - begin))
    return found
