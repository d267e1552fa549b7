"""An address space with its model, two devices and a log: what must hold after each step."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from forked import Child
from model import FILE, HUGE, PAGE, PRESENT, File, Interval, Model, Page, merged
from model_device import (
    Expected,
    IntervalDriver,
    Log,
    Mapped,
    MirrorDriver,
    Pagemap,
    Recorder,
    blocks,
    kernel_moves,
    same_frame,
)
from seams import errno_of, foreign

import pymirror as pm
from pymirror.pfn import PfnArray

QUIET_S = 2.0
WINDOW = 96
SWAP = len(Path("/proc/swaps").read_text().splitlines()) > 1
PENDING_KEPT = 4


@dataclass(eq=False)
class Pending:
    """What a walk of [start, end) found. ``moved``: an invalidation has overlapped the target since."""

    target: pm.Range | pm.IntervalNotifier
    start: int
    end: int
    seq: int
    pfns: PfnArray
    moved: bool = False
    unseen: set[int] = field(default_factory=set)

    def invalidated(self, start: int, end: int) -> None:
        first = self.target.start
        last = self.target.end if isinstance(self.target, pm.Range) else first + self.target.length
        self.moved |= first < end and start < last


class World:
    def __init__(self, *, disable: Iterable[str] = (), queue_length: int = 1024) -> None:
        self.mm = pm.AddressSpace(disable=disable, queue_length=queue_length)
        self.events = "uffd_events" in self.mm.features
        self.watches_disks = "wp_async" in self.mm.features
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
        self.pagemap = Pagemap()
        self._memory = os.open("/proc/self/mem", os.O_RDONLY | os.O_CLOEXEC)
        self._moves = kernel_moves()
        self._window = 0

    # What happened

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
            assert not missing, f"not announced: {_text(missing)}"
            assert code or covered == pages, f"announced too much: {_text(covered - pages)}"
            return code
        missing = {addr for addr in pages - covered if told and self.model.pages[addr].watched}
        assert not missing, f"not told: {_text(missing)}"
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
            if page.anonymous or page.huge == "hugetlb" or (files and (self.watches_disks or not on_disk)):
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

    def populated_for_write(self, start: int, end: int) -> None:
        for _, page in self.model.inside(start, end):
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

    # What must hold

    def check(self, touched: Iterable[int] = ()) -> None:
        self.settle()
        self.check_quiet()
        for table in self.tables.values():
            table.compare()
            self.check_frames(table)
        self.check_vmas()
        self.check_regions()
        self.check_pendings()
        self.check_bytes(self._some(touched))

    def check_quiet(self) -> None:
        until = time.monotonic() + QUIET_S
        while (stats := self.mm.stats())["active"] and time.monotonic() < until:
            time.sleep(0.0005)
        assert stats["active"] == 0, self.mm.dump()
        assert stats["invalidate_seq"] % 2 == 0
        assert stats["queue_depth"] == stats["inflight"] == stats["callbacks_running"] == 0
        assert stats["callback_errors"] == 0, str(list(self.mm.errors))
        assert stats["drain_timeouts"] == 0
        ranges = sum(isinstance(one.target, pm.Range) for one in self.pendings)
        assert stats["subs"] == ranges + len(self.intervals.subs)

    def check_frames(self, table: Expected) -> None:
        """An entry names the page that the CPU has and allows no more; what nobody told of excepted."""
        for addr, raw in self.frames(addr for addr in table.entries if addr not in table.unseen):
            entry, page = table.entries[addr], self.model.pages.get(addr)
            assert page is not None, f"{table.device} has an entry at {addr:#x}, where nothing is mapped"
            assert page.readable, f"{table.device} has an entry at {addr:#x}, which cannot be read"
            assert page.writable or not entry & pm.HMM_PFN_WRITE, f"{table.device} may write to {addr:#x}"
            if page.huge == "thp" or same_frame(entry, raw) or self.kernel_moved():
                continue
            raise AssertionError(f"{table.device} at {addr:#x}: {entry:#x}, the CPU has {raw:#x}")

    def check_vmas(self) -> None:
        """What is mapped is mapped as the model has it."""
        for start, end in merged(self.model.pages):
            at = start
            for vma in self.mm.vmas(start, end):
                assert vma.start <= at, f"{at:#x} is not mapped"
                stop = min(vma.end, end)
                for addr in range(at, stop, PAGE):
                    self._check_vma(vma, addr, self.model.pages[addr])
                at = stop
            assert at == end, f"{at:#x} is not mapped"

    def _check_vma(self, vma: pm.Vma, addr: int, page: Page) -> None:
        assert (vma.prot, vma.shared) == (page.prot, page.shared), f"{addr:#x}: {vma}, must be {page}"
        assert vma.hugetlb == (page.huge == "hugetlb"), f"{addr:#x}: {vma}"
        if page.file is not None:
            assert vma.inode == page.file.inode, f"{addr:#x}: {vma}, must be {page}"
            assert vma.offset + addr - vma.start == page.index * PAGE, f"{addr:#x}: {vma}, must be {page}"

    def check_regions(self) -> None:
        """Each Region owns what it should, and nothing that was taken from it with a word said."""
        owned: dict[int, set[int]] = {id(region): set() for region in self.regions}
        for addr, page in self.model.pages.items():
            if page.owner is not None:
                owned[id(page.owner)].add(addr)
        for region in self.regions:
            left = {addr for start, end in region.left for addr in range(start, end, PAGE)}
            assert owned[id(region)] <= left, f"{region} lost {_text(owned[id(region)] - left)}"
            assert left - owned[id(region)] <= self.doubtful, (
                f"{region} has {_text(left - owned[id(region)])}"
            )
        self.regions = [region for region in self.regions if not region.closed]

    def check_pendings(self) -> None:
        for one in self.pendings:
            assert one.target.read_retry(one.seq) == one.moved, f"{one}"
            if isinstance(one.target, pm.Range):
                assert one.target.valid == (not one.moved), f"{one}"

    def check_bytes(self, pages: Iterable[int]) -> None:
        for start, end in merged(addr for addr, raw in self.frames(pages) if self._can_be_read(addr, raw)):
            data = self.read(start, end - start)
            for addr in range(start, end, PAGE):
                found = data[addr - start : addr - start + PAGE]
                self.check_page(addr, found, "memory")

    def check_page(self, addr: int, found: bytes, what: str) -> None:
        page = self.model.pages[addr]
        if found in page.allowed:
            return
        must = page.allowed[0]
        first = next(i for i in range(PAGE) if found[i] != must[i])
        raise AssertionError(
            f"{what} at {addr + first:#x}: {found[first : first + 8]!r}, must be {must[first : first + 8]!r}"
        )

    def _can_be_read(self, addr: int, raw: int) -> bool:
        """Not guard pages, nor what needs a page of the hugetlb pool first: that may be empty."""
        page = self.model.pages[addr]
        return not page.guard and (bool(raw & PRESENT) or page.huge != "hugetlb" or page.own is not None)

    def read(self, start: int, size: int) -> bytes:
        """What memory holds, also where the CPU may not read; an error where nothing is mapped."""
        data = os.pread(self._memory, size, start)
        assert len(data) == size, f"memory ends at {start + len(data):#x}"
        return data

    def frames(self, pages: Iterable[int]) -> list[tuple[int, int]]:
        """(address, pagemap entry) of pages."""
        found = []
        for start, end in merged(pages):
            found += list(zip(range(start, end, PAGE), self.pagemap.read(start, end), strict=True))
        return found

    def kernel_moved(self) -> bool:
        return kernel_moves() != self._moves

    def _some(self, touched: Iterable[int]) -> set[int]:
        """Pages to look at: what was touched, and a window that goes round. Absent pages are left absent."""
        pages = sorted(self.model.pages)
        self._window = (self._window + WINDOW) % max(len(pages), 1)
        near = {addr for addr in touched if addr in self.model.pages}
        near.update((pages + pages)[self._window : self._window + WINDOW])
        return {addr for addr, raw in self.frames(near) if raw & PRESENT or self._must_be_there(addr)}

    def _must_be_there(self, addr: int) -> bool:
        page = self.model.pages[addr]
        return page.own is not None and not page.lazy and not SWAP

    # The end

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
        self.pagemap.close()
        os.close(self._memory)


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


def _text(pages: Iterable[int]) -> str:
    return ", ".join(f"[{start:#x}, {end:#x})" for start, end in merged(pages))
