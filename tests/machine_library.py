"""Steps of the library itself: invalidations by hand, the ends of things, and calls that are refused."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import rule
from machine import EVENTS, PICKS, Pick, Steps
from model import DONTNEED, PAGE, Interval
from seams import errno_of

import pymirror as pm


class LibrarySteps(Steps):
    @rule(pick=PICKS, event=EVENTS, answer=st.sampled_from(("clear", "forget", "refuse")))
    def invalidate(self, pick: Pick, event: pm.Event, answer: str) -> None:
        """While an invalidation runs nothing is valid or mapped in it; elsewhere it does not matter."""
        span = self.span(pick)
        if span is None:
            return
        world, (start, end) = self.world, span
        mirror = world.mirror
        mapped = [addr for addr in world.tables[mirror.device.page_table].entries if start <= addr < end]
        mirror.answer = answer
        if answer == "refuse":
            with pytest.raises(pm.MirrorError, match="EAGAIN"):
                world.mm.invalidate(start, end, event, blockable=False).__enter__()
        else:
            with world.mm.invalidate(start, end, event):
                self._within(span, event)
        mirror.answer = "clear"
        if answer == "forget":
            self._find_stale(mapped)
        world.watched(end, end + PAGE)

    def _within(self, span: Interval, event: pm.Event) -> None:
        world, (start, end) = self.world, span
        seen = world.settle()
        assert [(one.start, one.end, one.event) for one in seen] == [(start, end, event)]
        stats = world.mm.stats()
        assert (stats["active"], stats["invalidate_seq"] % 2) == (1, 1)
        with world.mirror.range(start, end) as rng:
            assert errno_of(rng.wait_until_valid, 0.001) == errno.ETIMEDOUT
            assert not world.mirror.commit(rng, rng.seq)
        world.watched(start, end)
        with world.mirror.range(end, end + PAGE) as rng:
            assert rng.wait_until_valid(0.001)

    def _find_stale(self, mapped: list[int]) -> None:
        """What a driver forgot to clear is found out at the access, and not used."""
        world, device = self.world, self.world.mirror.device
        before = device.stats.stale
        for addr in mapped[:3]:
            with pytest.raises(pm.StaleAccessError):
                device.read(world.mm, addr, 1)
        assert device.stats.stale == before + len(mapped[:3])
        assert device.page_table.stats()["fenced"] == len(mapped)
        for addr in mapped:
            device.page_table.clear(addr, addr + PAGE)

    @rule(
        pick=PICKS, what=st.sampled_from(("reap", "remove", "forget", "clear", "close", "refused", "refused"))
    )
    def aside(self, pick: Pick, what: str) -> None:
        world = self.world
        if what == "reap" and world.children:
            world.reap()
        elif what == "remove" and world.intervals.subs:
            world.remove_interval(world.intervals.subs[pick.which % len(world.intervals.subs)])
        elif what == "forget" and world.pendings:
            world.forget(world.pendings[pick.which % len(world.pendings)])
        elif what == "clear":
            self.clear(pick, pick.which % 2 == 0)
        elif what == "close":
            self._close_region(pick.which)
        elif what == "refused":
            self._refused(pick)

    def _close_region(self, which: int) -> None:
        world = self.world
        if not world.regions:
            return
        region = world.regions[which % len(world.regions)]
        left = [addr for start, end in region.left for addr in range(start, end, PAGE)]
        mapped = [addr for addr in left if addr in world.model.pages]
        if any(addr not in world.model.pages and world.mm.vma_lookup(addr) for addr in left):
            return
        world.change(region.close, api=True, changed=mapped, within=region.left, event=pm.Event.UNMAP)
        for addr in left:
            world.model.unmap(addr, addr + PAGE)
        assert region.closed

    def _refused(self, pick: Pick) -> None:
        """A refused call tells nobody anything and changes nothing."""
        span = self.span(pick)
        if span is None:
            return
        world, mm, (start, end) = self.world, self.world.mm, span
        size = end - start
        calls: list[Callable[[], object]] = [
            lambda: mm.munmap(start + 1, size),
            lambda: mm.munmap(start, 0),
            lambda: mm.munmap(start, 1 << 50),
            lambda: mm.mprotect(start, size, 1 << 20),
            lambda: mm.madvise(start, size, 9999),
            lambda: mm.madvise(start + 8, size, DONTNEED),
            lambda: mm.mremap(start, size, size, flags=pm.MREMAP_FIXED, new_addr=start),
            lambda: mm.mremap(start, size, 0),
            lambda: mm.mmap(0),
            lambda: mm.mmap(PAGE, offset=5),
            lambda: world.mirror.range(start + 1, end),
            lambda: world.mirror.range(end, start),
            lambda: world.mirror.device.page_table.clear(end, start) and None,
            lambda: pm.IntervalNotifier(mm, start, 0, lambda *_: True),
        ]
        codes = {12: 0, 13: errno.EOVERFLOW}
        index = pick.first % len(calls)
        before = [str(vma) for vma in mm.vmas(start - 16 * PAGE, end + 16 * PAGE)]
        assert errno_of(calls[index]) == codes.get(index, errno.EINVAL)
        assert world.settle() == []
        assert [str(vma) for vma in mm.vmas(start - 16 * PAGE, end + 16 * PAGE)] == before
