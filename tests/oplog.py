"""What tests of memory operations share: a log of invalidations, and a look at the pages."""

from __future__ import annotations

from typing import Any

import pymirror as pm

PAGE = 4096


class Log(pm.MmuNotifier):
    """Every invalidation, as (event, start, end); the sequence number stays odd while one runs."""

    def __init__(self, mm: pm.AddressSpace) -> None:
        self.ranges: list[pm.MmuNotifierRange] = []
        self.ends = 0
        super().__init__(mm)

    def invalidate_range_start(self, range: pm.MmuNotifierRange) -> None:
        self.ranges.append(range)

    def invalidate_range_end(self, range: pm.MmuNotifierRange) -> None:
        self.ends += 1

    def take(self) -> list[tuple[str, int, int]]:
        assert self.ends == len(self.ranges)
        assert all(one.guarantee == "before" and one.blockable for one in self.ranges)
        taken = [(one.event.name, one.start, one.end) for one in self.ranges]
        self.ranges.clear()
        self.ends = 0
        return taken


def pages(mm: pm.AddressSpace, n: int, **how: Any) -> pm.Region:
    return mm.mmap(n * PAGE, **how)


def prots(mm: pm.AddressSpace, region: pm.Region) -> list[str]:
    """The protection of each page of the Region, "-" for a hole."""
    found = []
    for addr in range(region.addr, region.addr + region.size, PAGE):
        vma = mm.vma_lookup(addr)
        found.append("-" if vma is None else str(vma).split()[1][:2])
    return found
