"""Steps of drivers and devices: look at memory, map what was found, read and write."""

from __future__ import annotations

import errno
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import rule
from machine import DATA, NUMBERS, PICKS, Pick, Steps
from model import PAGE, PRESENT, READ, pieces, refuses_device
from model_checks import Pending
from model_device import FAULT, FAULT_WRITE, again, same_frame
from seams import errno_of

import pymirror as pm


class DeviceSteps(Steps):
    @rule(pick=PICKS, mode=st.sampled_from(("read", "write", "some", "snapshot")), then_map=st.booleans())
    def look_by_range(self, pick: Pick, mode: str, then_map: bool) -> None:
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
            world.faulted_for_write(start, end)
        self._found(Pending(rng, start, end, seq[-1], rng.pfns), asked, then_map)

    @rule(pick=PICKS, around=st.integers(0, 3), two_pass=st.booleans())
    def insert_interval(self, pick: Pick, around: int, two_pass: bool) -> None:
        span = self.span(pick)
        if span is None:
            return
        self.world.make_room_for_interval()
        start, end = span[0] - around * PAGE, span[1] + around * PAGE
        self.world.intervals.insert(start, end, two_pass=two_pass)
        self.world.watched(start, end)

    @rule(which=NUMBERS, pick=PICKS, write=st.booleans(), then_map=st.booleans())
    def look_by_interval(self, which: int, pick: Pick, write: bool, then_map: bool) -> None:
        """hmm_range_fault() over a part of an interval notifier's interval."""
        world, subs = self.world, self.world.intervals.subs
        if not subs:
            return
        sub = subs[which % len(subs)]
        pages = sub.length // PAGE
        start = sub.start + pick.first % pages * PAGE
        end = min(start + pick.pages * PAGE, sub.start + sub.length)
        if any(
            addr not in world.model.pages and world.mm.vma_lookup(addr) for addr in range(start, end, PAGE)
        ):
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
            world.faulted_for_write(start, end)
        seq, pfns = found
        self._found(Pending(sub, start, end, seq, pfns), asked, then_map)

    def _found(self, pending: Pending, asked: dict[int, int], then_map: bool) -> None:
        self.world.keep(pending)
        self._check_pfns(pending.start, pending.pfns.tolist(), asked)
        if then_map:
            self._commit(pending)

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
            if mode == "snapshot" and page is not None:
                refused = 0 if page.prot & READ else errno.EPERM
            else:
                refused = refuses_device(page, asked.get(addr) == FAULT_WRITE)
            if refused:
                return addr, refused
        return end, 0

    def _check_pfns(self, start: int, pfns: list[int], asked: dict[int, int]) -> None:
        raw = self.world.pagemap.read(start, start + len(pfns) * PAGE)
        for i, pfn in enumerate(pfns):
            addr = start + i * PAGE
            page = self.world.model.pages.get(addr)
            if page is None or not page.prot & READ:
                assert pfn == pm.HMM_PFN_ERROR, f"{addr:#x}: {pfn:#x}"
                continue
            if not pfn and asked and addr not in asked and (page.huge or page.file is not None):
                # The kernel has faulted it with a neighbour, after it was looked at.
                continue
            assert bool(pfn & pm.HMM_PFN_VALID) == bool(raw[i] & PRESENT), (
                f"{addr:#x}: {pfn:#x}, CPU {raw[i]:#x}"
            )
            assert pfn & asked.get(addr, 0) == asked.get(addr, 0), (
                f"{addr:#x}: {pfn:#x} is less than asked for"
            )
            if not pfn:
                continue
            assert same_frame(pfn, raw[i]) or page.huge == "thp", f"{addr:#x}: {pfn:#x}, CPU {raw[i]:#x}"
            assert page.writable or not pfn & pm.HMM_PFN_WRITE, (
                f"{addr:#x}: {pfn:#x} in memory that is read-only"
            )
            if page.writable and page.exclusive and page.huge is None:
                assert pfn & pm.HMM_PFN_WRITE, f"{addr:#x}: {pfn:#x}, but it was written since the last fork"

    @rule(which=NUMBERS)
    def commit(self, which: int) -> None:
        if pendings := self.world.pendings:
            self._commit(pendings[which % len(pendings)])

    def _commit(self, one: Pending) -> None:
        """page_table.map() succeeds if and only if nothing has overlapped since the sequence number."""
        unseen = frozenset(one.unseen)
        if isinstance(one.target, pm.Range):
            done = self.world.mirror.commit(one.target, one.seq, unseen)
        else:
            done = self.world.intervals.commit(one.target, one.seq, one.start, one.pfns, unseen)
        assert done == (not one.moved)

    @rule(pick=PICKS, by_mirror=st.booleans())
    def device_read(self, pick: Pick, by_mirror: bool) -> None:
        span = self.span(pick)
        if span is not None:
            self.read_by(self.driver(by_mirror), *span)

    @rule(pick=PICKS, offset=st.sampled_from((0, 1, 2000, PAGE - 1)), data=DATA, by_mirror=st.booleans())
    def device_write(self, pick: Pick, offset: int, data: bytes, by_mirror: bool) -> None:
        place = self.place(pick, offset, data, lambda _: True)
        if place is None:
            return
        addr, data = place
        world, start, end = self.world, addr - addr % PAGE, -(-(addr + len(data)) // PAGE) * PAGE
        driver = self.driver(by_mirror)
        world.about_to_write(start, end)
        lazy = world.lazy_bytes(start, end)
        blind = {at for at, page in world.model.inside(start, end) if page.blind}
        code = errno_of(driver.device.write, world.mm, addr, data)
        world.settle()
        bad, refused = end, 0
        while not refused and start < end:
            bad, refused = start, refuses_device(world.model.pages.get(start), True)
            start += PAGE
        assert code == refused
        if not refused:
            world.check_used(driver.device.page_table, addr - addr % PAGE, start, blind)
            world.unseen(blind)
            world.model.write(addr, data, lazy)
            return
        self._written_before(addr, data[: max(0, bad - addr)], lazy)
        world.settle_copies(addr - addr % PAGE, bad)

    def _written_before(self, addr: int, data: bytes, lazy: dict[int, bytes]) -> None:
        """A refused write may have been made up to a page before the one that refuses, with no gap."""
        model, may = self.world.model, True
        for page, offset, piece in pieces(addr, data):
            if may and self.world.read(page + offset, len(piece)) == piece:
                model.write(page + offset, piece, lazy)
            else:
                may = False

    def clear(self, pick: Pick, by_mirror: bool) -> None:
        span = self.span(pick)
        if span is None:
            return
        driver = self.driver(by_mirror)
        table = self.world.tables[driver.device.page_table]
        before = len(table.entries)
        table.clear(*span)
        with driver.lock:
            assert driver.device.page_table.clear(*span) == before - len(table.entries)
