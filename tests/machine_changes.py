"""Steps that change what is mapped: munmap, mprotect, madvise, and changes of the files behind it."""

from __future__ import annotations

import errno
import os

from hypothesis import strategies as st
from hypothesis.stateful import rule
from machine import ADVICE, API, DATA, NUMBERS, PICKS, PROTS, Pick, Steps
from model import (
    COLD,
    COLLAPSE,
    DONTNEED,
    DROPS,
    FREE,
    GUARD_INSTALL,
    GUARD_REMOVE,
    HUGE,
    PAGE,
    PAGEOUT,
    POPULATE_READ,
    POPULATE_WRITE,
    REMOVE,
    pieces,
    refuses,
)
from seams import foreign

import pymirror as pm


class ChangeSteps(Steps):
    @rule(pick=PICKS, api=API)
    def munmap(self, pick: Pick, api: bool) -> None:
        span = self.span(pick)
        if span is None or not (api or self.foreign_may_take(*span)):
            return
        world, (start, end) = self.world, span
        world.change(
            lambda: self.by(api).munmap(start, end - start),
            api=api,
            changed=[addr for addr, _ in world.model.inside(start, end)],
            within=[span],
            event=pm.Event.UNMAP,
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
            lambda: self.by(api).mprotect(start, end - start, prot),
            api=api,
            changed=changed,
            within=[span],
            errnos=(code,),
            event=pm.Event.PROTECTION_VMA,
            told=False,
        )
        for addr in changed:
            world.model.pages[addr].prot = prot

    @rule(pick=PICKS, api=API, advice=ADVICE, read=st.booleans())
    def madvise(self, pick: Pick, api: bool, advice: int, read: bool) -> None:
        span = self.span(pick, lambda page: not refuses(page, advice))
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
        if advice in (GUARD_INSTALL, GUARD_REMOVE):
            # Elsewhere they depend on the kernel's version.
            if any(not pages[addr].anonymous or pages[addr].huge == "hugetlb" for addr in done):
                return
            if not done and code == errno.EINVAL:
                return
        if advice == POPULATE_WRITE:
            world.about_to_write(start, end)
        changed, aliases = self._zapped(done, advice, api)
        if any(pages[addr].file is not None and pages[addr].file.disk for addr in done) and advice == REMOVE:
            errnos.add(errno.EOPNOTSUPP)
        code = world.change(
            lambda: self.by(api).madvise(start, end - start, advice),
            api=api,
            changed=changed,
            within=[span, *((addr, addr + PAGE) for addr in changed)],
            errnos=errnos,
            event=pm.Event.CLEAR,
            told=advice in DROPS,
        )
        world.unseen(aliases)
        if code == errno.EOPNOTSUPP:
            return
        self._advised(done, advice, code)
        if read:
            self.read_by(world.mirror, start, end)

    def _zapped(self, done: list[int], advice: int, api: bool) -> tuple[list[int], list[int]]:
        """What an advice zaps, and what it zaps elsewhere with nobody told."""
        model = self.world.model
        if advice in (COLD, POPULATE_READ, POPULATE_WRITE, GUARD_REMOVE):
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
            elif advice in (GUARD_INSTALL, GUARD_REMOVE):
                if advice == GUARD_INSTALL:
                    page.drop()
                page.guard = advice == GUARD_INSTALL
        if advice == POPULATE_WRITE and done:
            if code:
                self.world.settle_copies(done[0], done[-1] + PAGE)
            else:
                for addr in done:
                    model.pages[addr].split_off()

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
            foreign.punch_hole(file.fd, index * PAGE, npages * PAGE)
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
