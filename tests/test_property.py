"""Random operations on real memory, in every order that Hypothesis thinks of, against the model of an address space.

PYMIRROR_STRESS=N runs N times as many examples; with CI set they are the same ones every time.
"""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
from forked import Child, raw_clone
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from model import (
    COLD,
    COLLAPSE,
    DONTNEED,
    DROPS,
    FREE,
    HUGE,
    NONE,
    PAGE,
    PAGEOUT,
    POPULATE_READ,
    POPULATE_WRITE,
    PRESENT,
    READ,
    REMOVE,
    WRITE,
    ZERO,
    File,
    Interval,
    Page,
    pieces,
)
from model_device import FAULT, FAULT_WRITE, IntervalDriver, MirrorDriver, again, same_frame
from model_world import Pending, World, load, store
from seams import errno_of, foreign

import pymirror as pm
from pymirror.replay.hugepages import overcommit

STRESS = int(os.environ.get("PYMIRROR_STRESS", "1"))
EXAMPLES, STEPS = 40, 50
SMALL_PAGES = 160
HUGE_PAGES = 64
CHILDREN = 2
MAP_FIXED = 0x10
PUNCH_HOLE = 3

KINDS = ("anonymous", "shared", "memfd_private", "memfd_shared", "disk_private", "disk_shared", "again")
HUGE_KINDS = ("thp", "hugetlb", "hugetlb_shared")
RAW_KINDS = ("anonymous", "memfd_private", "memfd_shared", "again")
UNMAP, CLEAR = (pm.Event.UNMAP,), (pm.Event.CLEAR,)
PROTECTION_VMA, PROTECTION_PAGE = (pm.Event.PROTECTION_VMA,), (pm.Event.PROTECTION_PAGE,)


class Pick(NamedTuple):
    """How to choose an interval of what is mapped: a mapping, where in it, how long, whether it may go beyond it."""

    which: int
    first: int
    pages: int
    beyond: bool


NUMBERS = st.integers(0, 255)
PICKS = st.builds(Pick, NUMBERS, NUMBERS, st.integers(1, 9), st.booleans())
PROTS = st.sampled_from((WRITE, WRITE, READ, NONE))
API = st.booleans()
ADVICE = st.sampled_from((*DROPS, DONTNEED, COLD, PAGEOUT, POPULATE_READ, POPULATE_WRITE, COLLAPSE))
DATA = st.builds(
    lambda seed, size: bytes((seed + 7 * i) % 255 + 1 for i in range(size)),
    NUMBERS,
    st.sampled_from((1, 8, 100, PAGE, PAGE + 1, 3 * PAGE)),
)


class AddressSpaceMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.touched: list[int] = []

    # Choosing

    def span(self, pick: Pick) -> Interval | None:
        """An interval that begins in a mapping; it may end in its neighbour or in a hole."""
        segments = self.world.model.segments()
        if not segments:
            return None
        start, end = segments[pick.which % len(segments)]
        pages = (end - start) // PAGE
        first = start + pick.first % pages * PAGE
        if pages > 64 and pick.pages > 7:
            first, last = start, end
        else:
            last = first + pick.pages * PAGE
        if last > end and not self._may_reach(end, last, pick.beyond):
            last = end
        self.touched = list(range(*self._whole_huge_pages(first, last), PAGE))[:32]
        return self._whole_huge_pages(first, last)

    def _may_reach(self, end: int, last: int, beyond: bool) -> bool:
        """Beyond the mapping there is another of ours, or a hole in which nothing of anybody's is."""
        if not beyond:
            return False
        vma = self.world.mm.find_vma(end)
        return self.world.model.hole(end, last) is None or vma is None or vma.start >= last

    def _whole_huge_pages(self, start: int, end: int) -> Interval:
        """hugetlb memory is not cut."""
        pages = self.world.model.pages
        if pages[start].huge == "hugetlb":
            start -= start % HUGE
        last = pages.get(end - PAGE)
        if last is not None and last.huge == "hugetlb":
            end = -(-end // HUGE) * HUGE
        return start, end

    def _by(self, api: bool) -> Any:
        return self.world.mm if api else foreign

    # Mapping

    @initialize(kinds=st.lists(st.sampled_from(KINDS + HUGE_KINDS), min_size=2, max_size=4))
    def begin(self, kinds: list[str]) -> None:
        for i, kind in enumerate(kinds):
            self._map(kind, 4 + i, WRITE, i, self._map_by_api)

    @rule(kind=st.sampled_from(KINDS), pages=st.integers(1, 10), prot=PROTS, which=NUMBERS)
    def mmap(self, kind: str, pages: int, prot: int, which: int) -> None:
        if len(self.world.model.pages) <= SMALL_PAGES:
            self._map(kind, pages, prot, which, self._map_by_api)

    @rule(kind=st.sampled_from(HUGE_KINDS), prot=PROTS)
    def mmap_huge(self, kind: str, prot: int) -> None:
        if sum(page.huge is not None for page in self.world.model.pages.values()) < 3 * HUGE // PAGE:
            self._map(kind, 1, prot, 0, self._map_by_api)

    @rule(kind=st.sampled_from(RAW_KINDS), pages=st.integers(1, 10), prot=PROTS, which=NUMBERS)
    def mmap_foreign(self, kind: str, pages: int, prot: int, which: int) -> None:
        if len(self.world.model.pages) <= SMALL_PAGES:
            self._map(kind, pages, prot, which, self._map_by_libc)

    def _map(self, kind: str, pages: int, prot: int, which: int, how: Callable[..., None]) -> None:
        size = pages * (HUGE if kind in HUGE_KINDS else PAGE)
        file, index = None, 0
        if kind == "again":
            small = [file for file in self.world.files if file.npages < HUGE // PAGE]
            if not small:
                return
            file = small[which % len(small)]
            index = which % file.npages
            size = min(size, (file.npages - index) * PAGE)
        elif kind.startswith(("memfd", "disk")):
            file = self._new_file(pages + which % 3, disk=kind.startswith("disk"), seed=which)
        shared = kind.endswith("shared") or (kind == "again" and which % 2 == 0)
        try:
            how(kind, size, prot, shared, file, index)
        except pm.MirrorError as refused:
            if refused.errno != errno.ENOMEM or not kind.startswith("hugetlb"):
                raise
        assert self.world.settle() == []

    def _map_by_api(self, kind: str, size: int, prot: int, shared: bool, file: File | None, index: int) -> None:
        huge = kind.removesuffix("_shared") if kind in HUGE_KINDS else None
        fd = -1 if file is None else file.fd
        region = self.world.mm.mmap(size, prot=prot, shared=shared, fd=fd, offset=index * PAGE, huge=huge)
        if file is None and shared:
            file = File(region.fd)
            self.world.files.append(file)
        self.world.regions.append(region)
        watched = self.world.born_watched(region.addr, region.addr + size)
        self.world.model.map(
            region.addr, size, prot, shared=shared, huge=huge, file=file, index=index, owner=region, watched=watched
        )

    def _map_by_libc(self, kind: str, size: int, prot: int, shared: bool, file: File | None, index: int) -> None:
        flags = (mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE) | (mmap.MAP_ANONYMOUS if file is None else 0)
        fd = -1 if file is None else file.fd
        addr = foreign.mmap(0, size, prot, flags, fd, index * PAGE)
        self.world.model.map(addr, size, prot, shared=shared, file=file, index=index)

    def _new_file(self, pages: int, *, disk: bool, seed: int) -> File:
        if disk:
            with tempfile.TemporaryFile(prefix="pymirror-") as temporary:
                fd = os.dup(temporary.fileno())
        else:
            fd = os.memfd_create("pymirror-test")
        os.ftruncate(fd, pages * PAGE)
        file = File(fd, disk=disk)
        os.close(fd)
        for index in range(0, pages, 2):
            file.pages[index] = bytes([1 + (seed + index) % 255]) * PAGE
            os.pwrite(file.fd, file.pages[index], index * PAGE)
        self.world.files.append(file)
        return file

    @rule(pick=PICKS, prot=PROTS)
    def map_over(self, pick: Pick, prot: int) -> None:
        """mmap(MAP_FIXED) behind the library's back: other memory at the same address."""
        span = self.span(pick)
        if span is None or not self._foreign_may_take(*span):
            return
        start, end = span
        world = self.world
        taken = world.model.inside(start, end)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_FIXED
        world.change(
            lambda: foreign.mmap(start, end - start, prot, flags),
            api=False,
            changed=[addr for addr, _ in taken],
            within=[span],
            events=UNMAP,
        )
        world.doubtful.update(addr for addr, page in taken if page.owner is not None)
        world.model.map(start, end - start, prot)

    def _foreign_may_take(self, start: int, end: int) -> bool:
        """A Region learns that its memory was taken from an event: there must be one, or it unmaps what comes after."""
        owned = any(page.owner is not None for _, page in self.world.model.inside(start, end))
        if owned and self.world.events:
            self.world.watch(start, end)
        return self.world.events or not owned

    # Changing

    @rule(pick=PICKS, api=API)
    def munmap(self, pick: Pick, api: bool) -> None:
        span = self.span(pick)
        if span is None or not (api or self._foreign_may_take(*span)):
            return
        world, (start, end) = self.world, span
        world.change(
            lambda: self._by(api).munmap(start, end - start),
            api=api,
            changed=[addr for addr, _ in world.model.inside(start, end)],
            within=[span],
            events=UNMAP,
        )
        world.model.unmap(start, end)
        vma = world.mm.find_vma(start)
        assert vma is None or vma.start >= end or end - start > 32 * PAGE

    @rule(pick=PICKS, api=API, prot=PROTS)
    def mprotect(self, pick: Pick, api: bool, prot: int) -> None:
        span = self.span(pick)
        if span is None:
            return
        world, (start, end) = self.world, span
        code, changed = world.model.protected(start, end, prot)
        world.change(
            lambda: self._by(api).mprotect(start, end - start, prot),
            api=api,
            changed=changed,
            within=[span],
            errnos=(code,),
            events=PROTECTION_VMA,
            told=False,
        )
        for addr in changed:
            world.model.pages[addr].prot = prot

    @rule(pick=PICKS, api=API, advice=ADVICE, read=st.booleans())
    def madvise(self, pick: Pick, api: bool, advice: int, read: bool) -> None:
        span = self.span(pick)
        if span is None:
            return
        world, (start, end) = self.world, span
        code, done = world.model.advised(start, end, advice)
        errnos = {code}
        pages = world.model.pages
        if advice == COLLAPSE:
            if any(pages[addr].huge != "thp" for addr in done):
                return
            errnos |= {errno.EINVAL, errno.EAGAIN, errno.EBUSY, errno.ENOMEM}
        if advice == POPULATE_WRITE:
            world.about_to_write(start, end)
        changed, aliases = self._zapped(done, advice, api)
        if any(pages[addr].file is not None and pages[addr].file.disk for addr in done) and advice == REMOVE:
            errnos.add(errno.EOPNOTSUPP)
        code = world.change(
            lambda: self._by(api).madvise(start, end - start, advice),
            api=api,
            changed=changed,
            within=[span, *((addr, addr + PAGE) for addr in changed)],
            errnos=errnos,
            events=CLEAR,
            told=advice in DROPS,
        )
        world.unseen(aliases)
        if code == errno.EOPNOTSUPP:
            return
        self._advised(done, advice, code)
        if read:
            self._device_read(world.mirror, start, end)

    def _zapped(self, done: list[int], advice: int, api: bool) -> tuple[list[int], list[int]]:
        """What an advice zaps, and what it zaps elsewhere with nobody told."""
        model = self.world.model
        if advice in (COLD, POPULATE_READ, POPULATE_WRITE):
            return [], []
        if advice not in (REMOVE, PAGEOUT):
            return done, []
        elsewhere: set[int] = set()
        for addr in done:
            page = model.pages[addr]
            if page.file is not None:
                elsewhere.update(model.of_file(page.file, (page.index,)))
        if api and advice == REMOVE:
            return sorted(elsewhere | set(done)), []
        return done, sorted(elsewhere - set(done))

    def _advised(self, done: list[int], advice: int, code: int) -> None:
        model = self.world.model
        for addr in done:
            page = model.pages[addr]
            if advice == DONTNEED:
                page.drop()
            elif advice == FREE and page.own is not None:
                page.lazy = True
            elif advice == REMOVE:
                assert page.file is not None
                page.file.punch((page.index,))
        if advice == POPULATE_WRITE and done:
            if code:
                self.world.settle_copies(done[0], done[-1] + PAGE)
            else:
                self.world.populated_for_write(done[0], done[-1] + PAGE)

    @rule(pick=PICKS, api=API, how=st.sampled_from(("grow", "shrink", "move", "dontunmap", "over", "twice")), n=NUMBERS)
    def mremap(self, pick: Pick, api: bool, how: str, n: int) -> None:
        span = self.span(pick)
        if span is None or self.world.model.hole(*span) is not None:
            return
        world, (start, end) = self.world, span
        first = world.model.pages[start]
        size, new, flags, target = end - start, end - start, pm.MREMAP_MAYMOVE, 0
        hugetlb = any(page.huge == "hugetlb" for _, page in world.model.inside(start, end))
        if hugetlb and how not in ("shrink", "move"):
            return
        if not api and not self._foreign_may_take(start, end):
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
        world, model, (start, end) = self.world, self.world.model, span
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
            events=UNMAP,
        )
        if code:
            return
        if owner is not None:
            world.regions.append(owner)
        if not size:
            model.duplicate(start, place, new, owner)
        else:
            self._lose_if_moved(span, place, new, api, flags)
            model.move(span, place, new, owner, leave=bool(flags & pm.MREMAP_DONTUNMAP))
        if api and world.born_watched(place, place + new):
            world.watched(place, place + new)

    def _moved_away(self, span: Interval, size: int, new: int, flags: int, place: int) -> list[int]:
        """What mremap() took from where it was: all that moved, all that was at the target, or what was cut off."""
        if not size:
            return []
        old = range(*span, PAGE)
        if not flags & (pm.MREMAP_DONTUNMAP | pm.MREMAP_FIXED) and place == span[0]:
            return [addr for addr in old if addr >= place + new]
        return [*old, *(addr for addr, _ in self.world.model.inside(place, place + new))]

    def _lose_if_moved(self, span: Interval, place: int, new: int, api: bool, flags: int) -> None:
        """Behind its back a Region keeps what stays where it is."""
        if api:
            return
        pages = self.world.model.pages
        stays = range(span[0], span[1], PAGE) if flags & pm.MREMAP_DONTUNMAP else range(place, place + new, PAGE)
        self.world.doubtful.update(addr for addr in stays if addr in pages and pages[addr].owner is not None)

    def _target(self, size: int, how: str, n: int, span: Interval, *, api: bool) -> int:
        """Where to move to: a place made for it, or over what is mapped. 0: nowhere."""
        world = self.world
        page = world.model.pages[span[0]]
        if how == "move":
            room = world.mm.mmap(size, prot=NONE, huge="thp" if page.huge else None)
            world.regions.append(room)
            watched = world.born_watched(room.addr, room.addr + size)
            world.model.map(room.addr, size, NONE, owner=room, watched=watched, huge="thp" if page.huge else None)
            target = room.addr
        else:
            segments = world.model.segments()
            target = segments[n % len(segments)][0]
        last = target + size
        over = world.model.inside(target, last)
        if len(over) * PAGE != size or (target < span[1] and span[0] < last) or any(p.huge == "hugetlb" for _, p in over):
            return 0
        return target if api or self._foreign_may_take(target, last) else 0

    @rule(which=NUMBERS, first=NUMBERS, data=DATA, how=st.sampled_from(("write", "punch", "truncate")))
    def change_file(self, which: int, first: int, data: bytes, how: str) -> None:
        """Writes to a file behind mappings, and holes in it, by its descriptor."""
        world = self.world
        if not world.files:
            return
        file = world.files[which % len(world.files)]
        huge = HUGE // PAGE if os.fstat(file.fd).st_blksize == HUGE else 1
        index = first % file.npages
        if how == "write":
            if huge > 1:
                return
            data = data[: (file.npages - index) * PAGE]
            os.pwrite(file.fd, data, index * PAGE)
            for at, offset, piece in pieces(index * PAGE, data):
                page = file.at(at // PAGE)
                file.pages[at // PAGE] = page[:offset] + piece + page[offset + len(piece) :]
        elif how == "punch":
            index -= index % huge
            npages = min(max(huge, len(data) // PAGE or 1), file.npages - index)
            world.unseen(world.model.of_file(file, range(index, index + npages)))
            foreign._call("fallocate", file.fd, PUNCH_HOLE, index * PAGE, npages * PAGE)
            file.punch(range(index, index + npages))
        elif not world.children:
            pages = world.model.of_file(file, range(file.npages))
            world.unseen(pages)
            os.ftruncate(file.fd, 0)
            os.ftruncate(file.fd, file.npages * PAGE)
            file.pages.clear()
            for addr in pages:
                world.model.pages[addr].drop()
        self.touched = world.model.of_file(file, range(index, index + 4))

    # The CPU

    @rule(pick=PICKS, offset=st.sampled_from((0, 1, 2000, PAGE - 1)), data=DATA)
    def cpu_write(self, pick: Pick, offset: int, data: bytes) -> None:
        place = self._place(pick, offset, data, lambda page: page.writable)
        if place is None:
            return
        addr, data = place
        world, start, end = self.world, addr - addr % PAGE, -(-(addr + len(data)) // PAGE) * PAGE
        world.about_to_write(start, end)
        lazy = world.lazy_bytes(start, end)
        store(addr, data)
        world.model.write(addr, data, lazy)

    @rule(pick=PICKS)
    def cpu_read(self, pick: Pick) -> None:
        span = self.span(pick)
        if span is None:
            return
        start, end = span
        for addr in range(start, min(self.world.model.readable_prefix(start, end), start + 16 * PAGE), PAGE):
            self.world.check_page(addr, load(addr, PAGE), "the CPU")

    def _place(
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
            events=PROTECTION_PAGE,
        )
        world.children += born
        self._after_fork(private)

    def _after_fork(self, private: list[int]) -> None:
        """A fork is told of whatever is watched."""
        world = self.world
        world.model.forked()
        for table in world.tables.values():
            assert not set(private) & set(table.entries), "entries of private memory outlived a fork"

    @rule(which=NUMBERS)
    def reap(self, which: int) -> None:
        if self.world.children and which % 2:
            self.world.reap()

    def _raw_clone(self) -> None:
        world = self.world
        if "event_fork" not in world.mm.features:
            return
        private = [addr for addr, page in world.model.pages.items() if not page.shared and page.watched]
        world.change(raw_clone, api=False, changed=private, within=[(0, 1 << 64)], events=PROTECTION_PAGE)
        self._after_fork(private)

    # Drivers

    @rule(pick=PICKS, mode=st.sampled_from(("read", "write", "some", "snapshot")))
    def look_by_range(self, pick: Pick, mode: str) -> None:
        span = self.span(pick)
        if span is None:
            return
        world, (start, end) = self.world, span
        rng = world.mirror.range(start, end)
        rng.register()
        world.watched(start, end)
        asked = self._asked(start, end, mode)
        write = mode == "write"
        seq: list[int] = []

        def attempt() -> bool:
            assert rng.wait_until_valid()
            rng.pfns = [asked.get(addr, 0) for addr in range(start, end, PAGE)]
            seq.append(rng.snapshot() if mode == "snapshot" else rng.fault())
            return True

        if write:
            world.about_to_write(start, end)
        code = errno_of(again, attempt, lambda: len(world.log))
        world.settle()
        bad, expected = self._first_bad(start, end, asked, mode)
        assert code == expected, f"errno {code}, must be {expected} at {bad:#x}"
        if code:
            assert not rng.pfns[(bad - start) // PAGE :].any()
            rng.unregister()
            world.settle_copies(start, bad)
            return
        if write:
            world.populated_for_write(start, end)
        world.keep(Pending(rng, start, end, seq[-1], rng.pfns))
        self._check_pfns(start, rng.pfns.tolist(), asked)

    @rule(pick=PICKS, around=st.integers(0, 3), two_pass=st.booleans())
    def insert_interval(self, pick: Pick, around: int, two_pass: bool) -> None:
        span = self.span(pick)
        if span is None:
            return
        self.world.make_room_for_interval()
        start, end = span[0] - around * PAGE, span[1] + around * PAGE
        self.world.intervals.insert(start, end, two_pass=two_pass)
        self.world.watched(start, end)

    @rule(which=NUMBERS)
    def remove_interval(self, which: int) -> None:
        if subs := self.world.intervals.subs:
            self.world.remove_interval(subs[which % len(subs)])

    @rule(which=NUMBERS, pick=PICKS, write=st.booleans())
    def look_by_interval(self, which: int, pick: Pick, write: bool) -> None:
        """hmm_range_fault() over a part of an interval notifier's interval."""
        world, subs = self.world, self.world.intervals.subs
        if not subs:
            return
        sub = subs[which % len(subs)]
        pages = sub.length // PAGE
        start = sub.start + pick.first % pages * PAGE
        end = min(start + pick.pages * PAGE, sub.start + sub.length)
        if any(addr not in world.model.pages and world.mm.vma_lookup(addr) for addr in range(start, end, PAGE)):
            return
        flags = FAULT_WRITE if write else FAULT
        asked = dict.fromkeys(range(start, end, PAGE), flags)
        found: list[Any] = []

        def attempt() -> bool:
            found[:] = world.intervals.look(sub, start, end, flags)
            return True

        if write:
            world.about_to_write(start, end)
        code = errno_of(again, attempt, lambda: len(world.log))
        world.settle()
        bad, expected = self._first_bad(start, end, asked, "write" if write else "read")
        assert code == expected, f"errno {code}, must be {expected} at {bad:#x}"
        if code:
            world.settle_copies(start, bad)
            return
        if write:
            world.populated_for_write(start, end)
        seq, pfns = found
        world.keep(Pending(sub, start, end, seq, pfns))
        self._check_pfns(start, pfns.tolist(), asked)

    def _asked(self, start: int, end: int, mode: str) -> dict[int, int]:
        """The request of each page."""
        if mode == "snapshot":
            return {}
        step = 3 * PAGE if mode == "some" else PAGE
        return dict.fromkeys(range(start, end, step), FAULT_WRITE if mode == "write" else FAULT)

    def _first_bad(self, start: int, end: int, asked: dict[int, int], mode: str) -> tuple[int, int]:
        """The first page that the walk must refuse, and with which errno."""
        for addr in range(start, end, PAGE):
            page = self.world.model.pages.get(addr)
            if mode != "snapshot" and not asked.get(addr):
                continue
            if page is None:
                return addr, errno.EFAULT
            if not page.readable:
                return addr, errno.EPERM if mode == "snapshot" else errno.EFAULT
            if asked.get(addr) == FAULT_WRITE and not page.writable:
                return addr, errno.EPERM
        return end, 0

    def _check_pfns(self, start: int, pfns: list[int], asked: dict[int, int]) -> None:
        raw = self.world.pagemap.read(start, start + len(pfns) * PAGE)
        for i, pfn in enumerate(pfns):
            addr = start + i * PAGE
            page = self.world.model.pages.get(addr)
            if page is None or not page.readable:
                assert pfn == pm.HMM_PFN_ERROR, f"{addr:#x}: {pfn:#x}"
                continue
            if not pfn and asked and addr not in asked and (page.huge or page.file is not None):
                # The kernel has faulted it with a neighbour, after it was looked at.
                continue
            assert bool(pfn & pm.HMM_PFN_VALID) == bool(raw[i] & PRESENT), f"{addr:#x}: {pfn:#x}, CPU {raw[i]:#x}"
            assert pfn & asked.get(addr, 0) == asked.get(addr, 0), f"{addr:#x}: {pfn:#x} is less than asked for"
            if not pfn:
                continue
            assert same_frame(pfn, raw[i]) or page.huge == "thp", f"{addr:#x}: {pfn:#x}, CPU {raw[i]:#x}"
            assert page.writable or not pfn & pm.HMM_PFN_WRITE, f"{addr:#x}: {pfn:#x} in memory that is read-only"
            if page.writable and page.exclusive and page.huge is None:
                assert pfn & pm.HMM_PFN_WRITE, f"{addr:#x}: {pfn:#x}, but it was written since the last fork"

    @rule(which=NUMBERS)
    def commit(self, which: int) -> None:
        """page_table.map() succeeds if and only if nothing has overlapped since the sequence number was taken."""
        if not self.world.pendings:
            return
        one = self.world.pendings[which % len(self.world.pendings)]
        unseen = frozenset(one.unseen)
        if isinstance(one.target, pm.Range):
            done = self.world.mirror.commit(one.target, one.seq, unseen)
        else:
            done = self.world.intervals.commit(one.target, one.seq, one.start, one.pfns, unseen)
        assert done == (not one.moved)

    @rule(which=NUMBERS)
    def forget(self, which: int) -> None:
        if pendings := self.world.pendings:
            self.world.forget(pendings[which % len(pendings)])

    @rule(pick=PICKS, by_mirror=st.booleans())
    def clear(self, pick: Pick, by_mirror: bool) -> None:
        span = self.span(pick)
        if span is None:
            return
        driver = self._driver(by_mirror)
        table = self.world.tables[driver.device.page_table]
        before = len(table.entries)
        table.clear(*span)
        with driver.lock:
            assert driver.device.page_table.clear(*span) == before - len(table.entries)

    @rule(pick=PICKS, by_mirror=st.booleans())
    def device_read(self, pick: Pick, by_mirror: bool) -> None:
        span = self.span(pick)
        if span is not None:
            self._device_read(self._driver(by_mirror), *span)

    def _driver(self, by_mirror: bool) -> MirrorDriver | IntervalDriver:
        self.world.make_room_for_interval()
        return self.world.mirror if by_mirror else self.world.intervals

    def _device_read(self, driver: MirrorDriver | IntervalDriver, start: int, end: int) -> None:
        world = self.world
        served = world.model.readable_prefix(start, end) == end
        data = bytearray(end - start)
        code = errno_of(driver.device.read_into, world.mm, start, data)
        world.settle()
        assert code == (0 if served else errno.EFAULT)
        if served:
            for addr in range(start, end, PAGE):
                world.check_page(addr, bytes(data[addr - start : addr - start + PAGE]), "the device")

    @rule(pick=PICKS, offset=st.sampled_from((0, 1, 2000, PAGE - 1)), data=DATA, by_mirror=st.booleans())
    def device_write(self, pick: Pick, offset: int, data: bytes, by_mirror: bool) -> None:
        place = self._place(pick, offset, data, lambda _: True)
        if place is None:
            return
        addr, data = place
        world, start, end = self.world, addr - addr % PAGE, -(-(addr + len(data)) // PAGE) * PAGE
        driver = self._driver(by_mirror)
        world.about_to_write(start, end)
        lazy = world.lazy_bytes(start, end)
        code = errno_of(driver.device.write, world.mm, addr, data)
        world.settle()
        bad = world.model.writable_prefix(start, end)
        if bad == end:
            assert code == 0
            world.model.write(addr, data, lazy)
            return
        assert code == (errno.EPERM if world.model.readable_prefix(start, end) > bad else errno.EFAULT)
        self._written_before(addr, data[: max(0, bad - addr)], lazy)
        world.settle_copies(start, bad)

    def _written_before(self, addr: int, data: bytes, lazy: dict[int, bytes]) -> None:
        """A refused write may have been made up to a page before the one that refuses; no further, and no less."""
        model, may = self.world.model, True
        for page, offset, piece in pieces(addr, data):
            if may and self.world.read(page + offset, len(piece)) == piece:
                model.write(page + offset, piece, lazy)
            else:
                may = False

    # The library

    @rule(pick=PICKS, event=st.sampled_from((pm.Event.CLEAR, pm.Event.UNMAP, pm.Event.MIGRATE)))
    def invalidate(self, pick: Pick, event: pm.Event) -> None:
        """While an invalidation runs nothing is valid or mapped in it; elsewhere it does not matter."""
        span = self.span(pick)
        if span is None:
            return
        world, (start, end) = self.world, span
        with world.mm.invalidate(start, end, event):
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
                world.watched(end, end + PAGE)

    @rule(which=NUMBERS)
    def close_region(self, which: int) -> None:
        world = self.world
        if not world.regions:
            return
        region = world.regions[which % len(world.regions)]
        left = [addr for start, end in region.left for addr in range(start, end, PAGE)]
        mapped = [addr for addr in left if addr in world.model.pages]
        if any(addr not in world.model.pages and world.mm.vma_lookup(addr) for addr in left):
            return
        world.change(region.close, api=True, changed=mapped, within=region.left, events=UNMAP)
        for addr in left:
            world.model.unmap(addr, addr + PAGE)
        assert region.closed

    @rule(pick=PICKS, which=NUMBERS)
    def refused(self, pick: Pick, which: int) -> None:
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
        index = which % len(calls)
        before = [str(vma) for vma in mm.vmas(start - 16 * PAGE, end + 16 * PAGE)]
        assert errno_of(calls[index]) == codes.get(index, errno.EINVAL)
        assert world.settle() == []
        assert [str(vma) for vma in mm.vmas(start - 16 * PAGE, end + 16 * PAGE)] == before

    @invariant()
    def what_must_hold(self) -> None:
        self.world.check(self.touched)
        self.touched = []

    def teardown(self) -> None:
        self.world.close()


@pytest.mark.timeout(60 * STRESS)
def test_the_address_space_behaves_as_the_model() -> None:
    with overcommit(HUGE_PAGES):
        run_state_machine_as_test(AddressSpaceMachine, settings=SETTINGS)


SETTINGS = settings(
    max_examples=EXAMPLES * STRESS,
    stateful_step_count=STEPS,
    deadline=None,
    derandomize="CI" in os.environ,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
