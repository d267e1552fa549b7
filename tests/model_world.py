"""An address space with its model, two devices and a log: what a step does to them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable

from forked import Child
from model import FILE, HUGE, PAGE, PRESENT, File, Interval, Model, merged
from model_checks import Checks, Pending, text
from model_device import (
    Expected,
    IntervalDriver,
    Log,
    Mapped,
    MirrorDriver,
    Recorder,
    blocks,
)
from seams import errno_of, foreign

import pymirror as pm

PENDING_KEPT = 4


class World(Checks):
    def __init__(self, *, disable: Iterable[str] = (), queue_length: int = 1024) -> None:
        super().__init__()
        self.mm = pm.AddressSpace(disable=disable, queue_length=queue_length)
        self.events = "uffd_events" in self.mm.features
        #: Writes after a fork are seen, and files on disk are watched.
        self.tracks = "wp_async" in self.mm.features and self.events
        self.model = Model()
        self.log: Log = []
        self.mirror = MirrorDriver(self.mm, self.log)
        self.intervals = IntervalDriver(self.mm, self.log)
        Recorder(self.mm, self.log)
        self.tables = {
            driver.device.page_table: Expected(driver.device) for driver in (self.mirror, self.intervals)
        }
        self.pendings: list[Pending] = []
        self.files: list[File] = []
        self.regions: list[pm.Region] = []
        self.children: list[Child] = []
        #: Pages that a Region may believe to be its own still: mapped over behind its back.
        self.doubtful: set[int] = set()
        self.in_doubt = False

    def change(
        self,
        call: Callable[[], object],
        *,
        api: bool,
        changed: Iterable[int],
        within: Iterable[Interval],
        errnos: Iterable[int] = (0,),
        event: pm.Event | None = None,
        told: bool = True,
    ) -> int:
        """Make a call that changes memory; gives its errno.

        Through the API it must announce exactly the pages that change, no more than ``within`` where it is
        refused, and with ``event``. Behind the library's back those that are watched must be told, if
        ``told``. The call may fill in ``changed`` and ``within``.
        """
        before = set(self.model.pages)
        code = errno_of(call)
        assert code in set(errnos), f"errno {code}, must be one of {set(errnos)}"
        pages, bounds = set(changed), list(within)
        seen = self.settle()
        covered = {addr for addr in before if any(one.start <= addr < one.end for one in seen)}
        for one in seen:
            if one.overflow:
                continue
            assert any(start <= one.start and one.end <= end for start, end in merged_bounds(bounds)), (
                f"{one}: too much"
            )
            assert event in (None, one.event), str(one)
            assert not api or one.guarantee is pm.Guarantee.BEFORE, str(one)
        if api:
            missing = pages - covered
            assert not missing, f"not announced: {text(missing)}"
            assert code or covered == pages, f"announced too much: {text(covered - pages)}"
            return code
        missing = {addr for addr in pages - covered if told and self.model.pages[addr].watched}
        assert not missing, f"not told: {text(missing)}"
        self.unseen(pages - covered)
        return code

    def settle(self) -> list[pm.MmuNotifierRange]:
        """Wait for callbacks and bring the tables up to date with the log; the invalidations since then."""
        self.mm.sync()
        seen: list[pm.MmuNotifierRange] = []
        for one in self.log:
            if isinstance(one, Mapped):
                self.tables[one.table].map(one)
                self.watched(one.start, one.start + len(one.pfns) * PAGE, files=True)
                continue
            seen.append(one)
            self.in_doubt |= one.overflow
            if one.guarantee is pm.Guarantee.DETECTED:
                self._check_detected(one)
            self.tables[self.mirror.device.page_table].clear(one.start, one.end)
            for sub in self.intervals.subs:
                first, last = max(one.start, sub.start), min(one.end, sub.start + sub.length)
                self.tables[self.intervals.device.page_table].clear(first, last)
            for pending in self.pendings:
                pending.invalidated(one.start, one.end)
        self.log.clear()
        return seen

    def _check_detected(self, one: pm.MmuNotifierRange) -> None:
        """Nothing is detected that has not changed."""
        everyone = [table.unseen for table in self.tables.values()] + [p.unseen for p in self.pendings]
        for addr in range(one.start, one.end, PAGE):
            page = self.model.pages.get(addr)
            if page is None or page.huge == "thp" or any(addr in unseen for unseen in everyone):
                continue
            assert self.kernel_moved(), f"{one}: {addr:#x} has not changed"

    def unseen(self, pages: Iterable[int]) -> None:
        """The frames of these pages may change, or what may be done to them, and no event tells."""
        for addr in pages:
            for table in self.tables.values():
                if addr in table.entries:
                    table.unseen.add(addr)
            for pending in self.pendings:
                if pending.start <= addr < pending.end:
                    pending.unseen.add(addr)

    def watched(self, start: int, end: int, *, files: bool = False) -> None:
        for _, page in self.model.inside(start, end) if self.events else ():
            on_disk = page.file is not None and page.file.disk
            if page.anonymous or page.huge == "hugetlb" or (files and (self.tracks or not on_disk)):
                page.watched = True

    def watch(self, start: int, end: int) -> None:
        self.mm.watch(start, end, files=True)
        self.watched(start, end, files=True)

    def about_to_write(self, start: int, end: int) -> None:
        """A write may give pages that are not this process's alone another frame."""
        moving = set()
        for addr, page in self.model.inside(start, end):
            if page.shared or page.exclusive:
                continue
            moving.add(addr)
            if page.huge == "hugetlb":
                first = addr - addr % HUGE
                moving.update(range(first, first + HUGE, PAGE))
        self.unseen(moving)

    def lazy_bytes(self, start: int, end: int) -> dict[int, bytes]:
        """What lazy pages hold before a write."""
        return {addr: self.read(addr, PAGE) for addr, page in self.model.inside(start, end) if page.lazy}

    def faulted_for_write(self, start: int, end: int) -> None:
        """By a walk, which takes what it is blind to for writable."""
        for _, page in self.model.inside(start, end):
            if not page.blind or (page.own is None and not page.anonymous):
                page.split_off()

    def settle_copies(self, start: int, end: int) -> None:
        """After a refusal: which private pages have got copies of their own?"""
        for addr, page in self.model.inside(start, end):
            raw = self.pagemap.read(addr, addr + PAGE)[0]
            if (
                not page.shared
                and page.own is None
                and not page.anonymous
                and raw & PRESENT
                and not raw & FILE
            ):
                page.split_off()

    def doubt(self, pages: Iterable[int]) -> None:
        """Regions cannot be sure of what is mapped there now."""
        self.doubtful.update(addr for addr, page in self.model.among(pages) if page.owner is not None)
        self.in_doubt |= bool(self.doubtful)

    def keep(self, pending: Pending) -> None:
        while len(self.pendings) >= PENDING_KEPT:
            self.forget(self.pendings[0])
        self.pendings.append(pending)

    def forget(self, pending: Pending) -> None:
        self.pendings.remove(pending)
        if isinstance(pending.target, pm.Range):
            pending.target.unregister()

    def remove_interval(self, sub: pm.IntervalNotifier) -> None:
        for pending in [one for one in self.pendings if one.target is sub]:
            self.forget(pending)
        self.intervals.remove(sub)
        self.tables[self.intervals.device.page_table].clear(sub.start, sub.start + sub.length)

    def reap(self) -> None:
        """Let the oldest child look at its memory and end; what it marked in shared memory stays."""
        child = self.children[0]
        for inode, index in child.reap():
            file = next(file for file in self.files if file.inode == inode)
            file.pages[index] = child.mark + file.at(index)[len(child.mark) :]
        del self.children[0]

    def mapped_by_devices(self, segments: list[Interval]) -> list[Interval]:
        """Those of which a device has entries, or soon may have."""
        hot = [(one.start, one.end) for one in self.pendings]
        hot += [block for table in self.tables.values() for block in blocks(table.entries)]
        return [(start, end) for start, end in segments if any(a < end and start < b for a, b in hot)]

    def make_room_for_interval(self) -> None:
        while len(self.intervals.subs) >= self.intervals.KEPT:
            self.remove_interval(self.intervals.subs[0])

    def born_watched(self, start: int, end: int) -> bool:
        """Whether memory mapped there by the API is watched from its birth."""
        subs = [(sub.start, sub.start + sub.length) for sub in self.intervals.subs]
        subs += [(one.start, one.end) for one in self.pendings if isinstance(one.target, pm.Range)]
        return self.events and any(first < end and start < last for first, last in subs)

    def check(self, touched: Iterable[int] = ()) -> None:
        self.settle()
        super().check(touched)

    def close(self) -> None:
        try:
            while self.children:
                self.reap()
            self.check(self.model.pages)
            self.check_bytes(self.model.pages)
            for pending in list(self.pendings):
                self.forget(pending)
            self.mirror.unregister()
            self.check_quiet()
            if self.in_doubt:
                # What a Region is not sure of it leaves mapped.
                for start, end in merged(self.model.pages):
                    self.mm.munmap(start, end - start)
                self.model.pages.clear()
            self.mm.close()
            # Regions are alive, so that their memory is mapped still.
            self.check_bytes(self.model.pages)
        finally:
            self.release()

    def release(self) -> None:
        for child in self.children:
            child.kill()
        self.mm.close()
        for start, end in merged(addr for addr, page in self.model.pages.items() if page.owner is None):
            foreign.munmap(start, end - start)
        self.model.pages.clear()
        self.regions.clear()
        for file in self.files:
            file.close()
        super().release()


def merged_bounds(bounds: list[Interval]) -> list[Interval]:
    """The intervals and what they make together, where they touch."""
    found: list[list[int]] = []
    for start, end in sorted(bounds):
        if found and start <= found[-1][1]:
            found[-1][1] = max(found[-1][1], end)
        else:
            found.append([start, end])
    return [(start, end) for start, end in found]


def store(addr: int, data: bytes) -> None:
    """CPU stores."""
    ctypes.memmove(addr, data, len(data))


def load(addr: int, size: int) -> bytes:
    """CPU loads."""
    return ctypes.string_at(addr, size)
