"""What the steps of the state machine have in common: how they choose memory, and access it by a device."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any, NamedTuple

from hypothesis import strategies as st
from model import (
    COLD,
    COLLAPSE,
    DONTNEED,
    DROPS,
    GUARD_INSTALL,
    GUARD_REMOVE,
    HUGE,
    NONE,
    PAGE,
    PAGEOUT,
    POPULATE_READ,
    POPULATE_WRITE,
    READ,
    WRITE,
    Interval,
    Page,
)
from model_device import IntervalDriver, MirrorDriver
from model_world import World
from seams import errno_of, foreign

import pymirror as pm


class Pick(NamedTuple):
    """How to choose an interval of what is mapped: a mapping, where in it, how long, or beyond it."""

    which: int
    first: int
    pages: int
    beyond: bool


EVENTS = st.sampled_from((pm.Event.CLEAR, pm.Event.UNMAP, pm.Event.MIGRATE))
NUMBERS = st.integers(0, 255)
PICKS = st.builds(Pick, NUMBERS, NUMBERS, st.integers(1, 9), st.booleans())
PROTS = st.sampled_from((WRITE, WRITE, READ, NONE))
API = st.booleans()
ADVICE = st.sampled_from(
    (
        *DROPS,
        DONTNEED,
        COLD,
        PAGEOUT,
        POPULATE_READ,
        POPULATE_WRITE,
        COLLAPSE,
        GUARD_INSTALL,
        GUARD_INSTALL,
        GUARD_REMOVE,
    )
)
DATA = st.builds(
    lambda seed, size: bytes((seed + 7 * i) % 255 + 1 for i in range(size)),
    NUMBERS,
    st.sampled_from((1, 8, 100, PAGE, PAGE + 1, 3 * PAGE)),
)


class Steps:
    """A part of the machine. ``touched`` are the pages to look at after the step."""

    world: World
    touched: list[int]

    def span(self, pick: Pick, suits: Callable[[Page], bool] | None = None) -> Interval | None:
        """An interval that begins in a mapping; it may end in its neighbour or in a hole.

        Where there is a mapping that ``suits``, it is most often one of these.
        """
        segments = self.world.model.segments()
        if not segments:
            return None
        if suits is not None and pick.first % 4:
            segments = [one for one in segments if suits(self.world.model.pages[one[0]])] or segments
        if pick.which % 3:
            segments = self.world.mapped_by_devices(segments) or segments
        start, end = segments[pick.which // 3 % len(segments)]
        pages = (end - start) // PAGE
        first = start + pick.first % pages * PAGE
        last = first + pick.pages * PAGE
        if pages > 64 and pick.pages > 7:
            first, last = start, end
        if pick.beyond:
            last = max(last, end + pick.pages % 3 * PAGE)
        if last > end and not (pick.beyond and self._may_reach(end, last)):
            last = end
        span = self._whole_huge_pages(first, last)
        self.touched = list(range(*span, PAGE))[:32]
        return span

    def _may_reach(self, end: int, last: int) -> bool:
        """Beyond the mapping there are others of ours, or holes in which nothing of anybody's is."""
        pages, mm = self.world.model.pages, self.world.mm
        return all(addr in pages or mm.vma_lookup(addr) is None for addr in range(end, last, PAGE))

    def _whole_huge_pages(self, start: int, end: int) -> Interval:
        """hugetlb memory is not cut."""
        pages = self.world.model.pages
        if pages[start].huge == "hugetlb":
            start -= start % HUGE
        last = pages.get(end - PAGE)
        if last is not None and last.huge == "hugetlb":
            end = -(-end // HUGE) * HUGE
        return start, end

    def by(self, api: bool) -> Any:
        return self.world.mm if api else foreign

    def place(
        self, pick: Pick, offset: int, data: bytes, allows: Callable[[Page], bool]
    ) -> tuple[int, bytes] | None:
        """An address and as much of the data as goes there."""
        span = self.span(pick)
        if span is None or not allows(self.world.model.pages[span[0]]):
            return None
        pages = self.world.model.pages
        last = span[0]
        while last < span[1] and last in pages and allows(pages[last]):
            last += PAGE
        return span[0] + offset, data[: last - span[0] - offset]

    def foreign_may_take(self, start: int, end: int) -> bool:
        """A Region learns of its loss from an event: there must be one, or it unmaps what comes after."""
        self.world.watch(start, end)
        return all(page.watched or page.owner is None for _, page in self.world.model.inside(start, end))

    def driver(self, by_mirror: bool) -> MirrorDriver | IntervalDriver:
        self.world.make_room_for_interval()
        return self.world.mirror if by_mirror else self.world.intervals

    def read_by(self, driver: MirrorDriver | IntervalDriver, start: int, end: int) -> None:
        world = self.world
        served = world.model.readable_prefix(start, end) == end
        data = bytearray(end - start)
        code = errno_of(driver.device.read_into, world.mm, start, data)
        world.settle()
        assert code == (0 if served else errno.EFAULT)
        if served:
            world.check_used(driver.device.page_table, start, end)
            for addr in range(start, end, PAGE):
                world.check_page(addr, bytes(data[addr - start : addr - start + PAGE]), "the device")
