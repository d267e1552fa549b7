"""Steps of the CPU: loads, stores and forks."""

from __future__ import annotations

from forked import Child, raw_clone
from hypothesis import strategies as st
from hypothesis.stateful import rule
from machine import DATA, PICKS, Pick, Steps
from model import HUGE, PAGE, POPULATE_READ, POPULATE_WRITE
from model_world import load, store
from seams import errno_of, foreign

import pymirror as pm

CHILDREN = 2


class CpuSteps(Steps):
    @rule(pick=PICKS, offset=st.sampled_from((0, 1, 2000, PAGE - 1)), data=DATA)
    def cpu_write(self, pick: Pick, offset: int, data: bytes) -> None:
        place = self.place(pick, offset, data, lambda page: page.writable)
        if place is None:
            return
        addr, data = place
        world, start, end = self.world, addr - addr % PAGE, -(-(addr + len(data)) // PAGE) * PAGE
        world.about_to_write(start, end)
        if not self._huge_pages_are_there(start, end, POPULATE_WRITE):
            return
        lazy = world.lazy_bytes(start, end)
        store(addr, data)
        world.model.write(addr, data, lazy)

    @rule(pick=PICKS)
    def cpu_read(self, pick: Pick) -> None:
        span = self.span(pick)
        if span is None:
            return
        start, end = span
        end = min(self.world.model.readable_prefix(start, end), start + 16 * PAGE)
        if not self._huge_pages_are_there(start, end, POPULATE_READ):
            return
        for addr in range(start, end, PAGE):
            self.world.check_page(addr, load(addr, PAGE), "the CPU")

    def _huge_pages_are_there(self, start: int, end: int, advice: int) -> bool:
        """Others may have emptied the pool since: then a refusal, and not a SIGBUS."""
        huge = {
            addr - addr % HUGE for addr, page in self.world.model.inside(start, end) if page.huge == "hugetlb"
        }
        return all(errno_of(foreign.madvise, addr, HUGE, advice) == 0 for addr in huge)

    @rule(mark=st.binary(min_size=8, max_size=8), raw=st.sampled_from((False, False, True)))
    def fork(self, mark: bytes, raw: bool) -> None:
        if raw:
            self._raw_clone()
        elif len(self.world.children) < CHILDREN:
            self._fork(mark)

    def _fork(self, mark: bytes) -> None:
        world, born = self.world, []
        private = [addr for addr, page in world.model.pages.items() if not page.shared]
        world.change(
            lambda: born.append(Child(world.model, mark)),
            api=False,
            changed=(),
            within=[(0, 1 << 64)],
            event=pm.Event.PROTECTION_PAGE,
        )
        world.children += born
        self._after_fork(private)

    def _after_fork(self, private: list[int]) -> None:
        """A fork is told of whatever is watched."""
        world = self.world
        world.model.forked(tracked=world.tracks)
        for table in world.tables.values():
            assert not set(private) & set(table.entries), "entries of private memory outlived a fork"

    def _raw_clone(self) -> None:
        world = self.world
        if "event_fork" not in world.mm.features:
            return
        private = [addr for addr, page in world.model.pages.items() if not page.shared and page.watched]
        world.change(
            raw_clone, api=False, changed=private, within=[(0, 1 << 64)], event=pm.Event.PROTECTION_PAGE
        )
        self._after_fork(private)
