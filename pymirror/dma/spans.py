# SPDX-License-Identifier: MIT
"""Intervals that dma-debug looks things up by: DMA addresses, and the cache lines that devices write."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from .._shim import ffi, lib
from ..errors import check

if TYPE_CHECKING:
    from .entry import DmaEntry
    from .record import Site

CACHE_LINE = 64


class Spans:
    """Intervals that are looked up by what they overlap (native/spans.c)."""

    def __init__(self) -> None:
        spans = ffi.new("pm_spans **")
        check(lib.pm_spans_create(spans), "dma-debug")
        self._native = ffi.gc(spans[0], lib.pm_spans_destroy)

    def add(self, start: int, last: int, cookie: int) -> tuple[Any, int]:
        """The new span, and the cookie of one that it overlaps, 0 without one."""
        span, other = ffi.new("pm_span **"), ffi.new("uint64_t *")
        check(lib.pm_spans_add(self._native, start, last, cookie, span, other), "dma-debug")
        return span[0], int(other[0])

    def find(self, start: int, last: int) -> int:
        """The cookie of one that holds all of [start, last], else of one that it overlaps, 0 without one."""
        if not 0 <= start <= last < 1 << 64:
            return 0
        other = ffi.new("uint64_t *")
        return int(other[0]) if lib.pm_spans_find(self._native, start, last, other) == 0 else 0

    def remove(self, span: Any) -> None:
        lib.pm_spans_remove(self._native, span)


class WrittenLines:
    """The cache lines of driver memory that some device may write, whatever device that is."""

    def __init__(self) -> None:
        self._renew()
        os.register_at_fork(after_in_child=self._renew)

    def _renew(self) -> None:
        self.spans = Spans()
        self.sites: dict[int, Site] = {}

    def add(self, entry: DmaEntry) -> Site | None:
        """Where a mapping of some of the same cache lines was made."""
        start = entry.cpu_addr & -CACHE_LINE
        last = (entry.cpu_addr + entry.size - 1) | (CACHE_LINE - 1)
        entry.lines, other = self.spans.add(start, last, entry.number)
        self.sites[entry.number] = entry.site
        return self.sites.get(other)

    def remove(self, entry: DmaEntry) -> None:
        if self.sites.pop(entry.number, None) is not None:
            self.spans.remove(entry.lines)


#: Of this process.
written_lines = WrittenLines()
