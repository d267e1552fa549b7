"""Steps of mremap(): grow, shrink, move, leave, map over and map twice."""

from __future__ import annotations

import errno

from hypothesis import strategies as st
from hypothesis.stateful import rule
from machine import API, NUMBERS, PICKS, Pick, Steps
from model import HUGE, NONE, PAGE, Interval
from seams import foreign

import pymirror as pm


class MremapSteps(Steps):
    @rule(
        pick=PICKS,
        api=API,
        how=st.sampled_from(("grow", "shrink", "move", "dontunmap", "over", "twice")),
        n=NUMBERS,
    )
    def mremap(self, pick: Pick, api: bool, how: str, n: int) -> None:
        span = self.span(pick)
        if span is None or self.world.model.hole(*span) is not None:
            return
        world, (start, end) = self.world, span
        first = world.model.pages[start]
        size, new, flags, target = end - start, end - start, pm.MREMAP_MAYMOVE, 0
        hugetlb = any(page.huge == "hugetlb" for _, page in world.model.inside(start, end))
        if hugetlb and (
            how not in ("shrink", "move") or world.model.pages[end - PAGE].mapping != first.mapping
        ):
            return
        if not api and not self.foreign_may_take(start, end):
            return
        vma = world.mm.find_vma(start)
        assert vma is not None
        several = vma.end < end
        if several and how not in ("grow", "shrink"):
            return
        if how == "grow":
            new = size + (1 + n % 4) * PAGE
            if first.file is not None:
                first.file.grow(first.index + new // PAGE)
        elif how == "shrink":
            new = size - (1 + n % 3) * (HUGE if hugetlb else PAGE)
            if new <= 0:
                return
        elif how == "twice":
            if not first.shared:
                return
            size = 0
        elif how == "dontunmap":
            flags |= pm.MREMAP_DONTUNMAP
        else:
            target = self._target(new, how, n, span, api=api)
            flags |= pm.MREMAP_FIXED
            if not target:
                return
        self._mremap(span, size, new, flags, target, api=api, several=several)

    def _mremap(
        self, span: Interval, size: int, new: int, flags: int, target: int, *, api: bool, several: bool
    ) -> None:
        world, model, start = self.world, self.world.model, span[0]
        place, gone, within = start, [], [span]
        owner: pm.Region | None = None

        def call() -> None:
            nonlocal place, owner
            if api:
                owner = world.mm.mremap(start, size, new, flags=flags, new_addr=target or None)
                place = owner.addr
            else:
                place = foreign.mremap(start, size, new, flags, target)
            gone.extend(self._moved_away(span, size, new, flags, place))
            within.append((place, place + new))

        code = world.change(
            call,
            api=api,
            changed=gone,
            within=within,
            errnos=(0, errno.EFAULT) if several else (0,),
            event=pm.Event.UNMAP,
        )
        if code:
            return
        if owner is not None:
            world.regions.append(owner)
        if not size:
            model.duplicate(start, place, new, owner)
        else:
            if not api:
                # A Region keeps what stays where it is.
                world.doubt(range(*(span if flags & pm.MREMAP_DONTUNMAP else (place, place + new)), PAGE))
            model.move(span, place, new, owner, leave=bool(flags & pm.MREMAP_DONTUNMAP))
        if api and world.born_watched(place, place + new):
            world.watched(place, place + new)

    def _moved_away(self, span: Interval, size: int, new: int, flags: int, place: int) -> list[int]:
        """What mremap() took away: all that moved and was at the target, or what was cut off."""
        if not size:
            return []
        old = range(*span, PAGE)
        if not flags & (pm.MREMAP_DONTUNMAP | pm.MREMAP_FIXED) and place == span[0]:
            return [addr for addr in old if addr >= place + new]
        return [*old, *(addr for addr, _ in self.world.model.inside(place, place + new))]

    def _target(self, size: int, how: str, n: int, span: Interval, *, api: bool) -> int:
        """Where to move to: a place made for it, or over what is mapped. 0: nowhere."""
        world = self.world
        page = world.model.pages[span[0]]
        if how == "move":
            room = world.mm.mmap(size, prot=NONE, huge="thp" if page.huge else None)
            world.regions.append(room)
            watched = world.born_watched(room.addr, room.addr + size)
            world.model.map(
                room.addr, size, NONE, owner=room, watched=watched, huge="thp" if page.huge else None
            )
            target = room.addr
        else:
            segments = world.model.segments()
            target = segments[n % len(segments)][0]
        last = target + size
        over = world.model.inside(target, last)
        if (
            len(over) * PAGE != size
            or (target < span[1] and span[0] < last)
            or any(p.huge == "hugetlb" for _, p in over)
        ):
            return 0
        return target if api or self.foreign_may_take(target, last) else 0
