# SPDX-License-Identifier: MIT
"""Steps on memory that goes to devices and comes back, in one thread, against a model of its every byte."""

from __future__ import annotations

import ctypes
import errno
from dataclasses import dataclass
from typing import Any

import numpy as np
import tally
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from machine_uses import UseSteps
from model import HUGE, NONE, PAGE, READ, WRITE
from racing import in_child
from seams import errno_of, foreign
from stress_devices import PlaceDriver

import pymirror as pm

KINDS = ("anonymous", "anonymous", "shared", "thp")
PAGES = 12
MOST_PAGES = 40
DONTNEED = 4

NUMBERS = st.integers(0, 255)
PICKS = st.tuples(NUMBERS, NUMBERS, st.integers(1, 9))
DATA = st.builds(
    lambda seed, size: bytes((seed + 7 * i) % 255 + 1 for i in range(size)),
    NUMBERS,
    st.sampled_from((1, 8, PAGE, PAGE + 9)),
)
PROTS = st.sampled_from((WRITE, WRITE, READ, NONE))


@dataclass
class Page:
    kind: str
    prot: int
    data: bytes


class DeviceMemoryMachine(UseSteps, RuleBasedStateMachine):
    """Two small device memories of one owner, one device that uses both in place."""

    delivery = "thread"
    off: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.owner = object()
        self.mm = pm.AddressSpace(fault_delivery=self.delivery, disable=self.off)
        self.vrams = [self.new_memory(pages) for pages in (PAGES, HUGE // PAGE + 2)]
        self.driver = PlaceDriver(self.mm, [], self.owner)
        self.pages: dict[int, Page] = {}

    def new_memory(self, pages: int) -> pm.DeviceMemory:
        return pm.DeviceMemory(None, pages * PAGE, owner=self.owner)

    def span(self, pick: tuple[int, int, int]) -> tuple[int, int]:
        """Pages in a row that are mapped alike."""
        which, first, count = pick
        starts = sorted(self.pages)
        start = starts[(which * 256 + first) % len(starts)]
        end = start + PAGE
        while end - start < count * PAGE and self.alike(start, end):
            end += PAGE
        return start, end

    def alike(self, one: int, other: int) -> bool:
        a, b = self.pages[one], self.pages.get(other)
        return b is not None and (a.kind, a.prot) == (b.kind, b.prot)

    def expected(self, start: int, end: int) -> bytes:
        return b"".join(self.pages[addr].data for addr in range(start, end, PAGE))

    def wrote(self, addr: int, data: bytes) -> None:
        while data:
            start, offset = addr & -PAGE, addr % PAGE
            n, page = min(len(data), PAGE - offset), self.pages[start]
            page.data = page.data[:offset] + data[:n] + page.data[offset + n :]
            addr, data = addr + n, data[n:]

    def mapped(self) -> bool:
        return bool(self.pages)

    @precondition(lambda self: len(self.pages) < MOST_PAGES)
    @rule(kind=st.sampled_from(KINDS), count=st.integers(1, PAGES))
    def map(self, kind: str, count: int) -> None:
        if kind == "thp":
            addr = self.mm.mmap(HUGE, huge="thp").addr
            self.mm.munmap(addr + count * PAGE, HUGE - count * PAGE)
        else:
            addr = self.mm.mmap(count * PAGE, shared=kind == "shared").addr
        for page in range(count):
            self.pages[addr + page * PAGE] = Page(kind, WRITE, bytes(PAGE))

    @precondition(mapped)
    @rule(pick=PICKS, offset=st.sampled_from((0, 1, 4000)), data=DATA, device=st.booleans())
    def write(self, pick: tuple[int, int, int], offset: int, data: bytes, device: bool) -> None:
        start, end = self.span(pick)
        data, prot = data[: end - start - offset], self.pages[start].prot
        if device:
            code = errno_of(self.driver.device.write, self.mm, start + offset, data)
            assert code == {WRITE: 0, READ: errno.EPERM, NONE: errno.EFAULT}[prot], errno.errorcode.get(code)
        elif prot == WRITE:
            ctypes.memmove(start + offset, data, len(data))
        if prot == WRITE:
            self.wrote(start + offset, data)

    @precondition(mapped)
    @rule(pick=PICKS, device=st.booleans())
    def read(self, pick: tuple[int, int, int], device: bool) -> None:
        start, end = self.span(pick)
        if not self.pages[start].prot & READ:
            assert not device or errno_of(self.driver.device.read, self.mm, start, 1) == errno.EFAULT
            return
        found = (
            self.driver.device.read(self.mm, start, end - start)
            if device
            else ctypes.string_at(start, end - start)
        )
        assert found == self.expected(start, end)

    @precondition(mapped)
    @rule(pick=PICKS, number=st.integers(0, 1))
    def to_device(self, pick: tuple[int, int, int], number: int) -> None:
        start, end = self.span(pick)
        vram = self.vrams[number]
        before = vram.holds(start, end)
        code = errno_of(pm.migrate_to_device, self.mm, start, end, vram)
        if not self.pages[start].prot & READ:
            assert code == errno.EINVAL
        elif self.pages[start].kind == "shared":
            assert (code, vram.holds(start, end).any()) == (0, False)
        else:
            assert code == 0
            elsewhere = self.vrams[1 - number].holds(start, end)
            held = pm.exclusive_pfns(self.mm, start, end) != 0
            assert (vram.holds(start, end) | elsewhere | held).all()
            assert (vram.holds(start, end) >= before).all()

    @precondition(mapped)
    @rule(pick=PICKS)
    def to_system(self, pick: tuple[int, int, int]) -> None:
        start, end = self.span(pick)
        held = sum(int(vram.holds(start, end).sum()) for vram in self.vrams)
        held += int(np.count_nonzero(pm.exclusive_pfns(self.mm, start, end)))
        assert pm.migrate_to_system(self.mm, start, end) == held
        assert not any(vram.holds(start, end).any() for vram in self.vrams)

    @precondition(mapped)
    @rule(pick=PICKS, offset=st.integers(0, PAGE // 8 - 1), value=NUMBERS)
    def atomic(self, pick: tuple[int, int, int], offset: int, value: int) -> None:
        start, _ = self.span(pick)
        page, at = self.pages[start], start + offset * 8
        if page.kind == "shared" or page.prot != WRITE:
            return
        device, before = self.driver.device, int.from_bytes(page.data[offset * 8 : offset * 8 + 8], "little")
        after = (before + value) % (1 << 64)
        if value % 2:
            assert device.atomic_add(self.mm, at, value) == before
        else:
            assert device.compare_and_swap(self.mm, at, before + 1, 0) == before
            assert device.compare_and_swap(self.mm, at, before, after) == before
        self.wrote(at, after.to_bytes(8, "little"))

    @precondition(mapped)
    @rule(pick=PICKS, api=st.booleans(), prot=PROTS)
    def protect(self, pick: tuple[int, int, int], api: bool, prot: int) -> None:
        start, end = self.span(pick)
        self.by(api).mprotect(start, end - start, prot)
        for addr in range(start, end, PAGE):
            self.pages[addr].prot = prot

    @precondition(mapped)
    @rule(pick=PICKS, how=st.sampled_from(("api", "foreign", "reaper")))
    def drop(self, pick: tuple[int, int, int], how: str) -> None:
        start, end = self.span(pick)
        if how == "reaper":
            self.mm.oom_reap(start, end)
        else:
            self.by(how == "api").madvise(start, end - start, DONTNEED)
        for addr in range(start, end, PAGE):
            if self.pages[addr].kind != "shared":
                self.pages[addr].data = bytes(PAGE)

    @precondition(mapped)
    @rule(pick=PICKS, api=st.booleans())
    def unmap(self, pick: tuple[int, int, int], api: bool) -> None:
        start, end = self.span(pick)
        self.by(api).munmap(start, end - start)
        for addr in range(start, end, PAGE):
            del self.pages[addr]

    @precondition(mapped)
    @rule(pick=PICKS)
    def move(self, pick: tuple[int, int, int]) -> None:
        """Vma by vma, as the kernel wants it."""
        start, end = self.span(pick)
        vmas = [(max(vma.start, start), min(vma.end, end)) for vma in self.mm.vmas(start, end)]
        for first, last in vmas:
            place = self.mm.mremap(first, last - first, last - first, **self.room(last - first))
            for addr in range(first, last, PAGE):
                self.pages[place.addr + addr - first] = self.pages.pop(addr)

    def room(self, size: int) -> dict[str, Any]:
        return {"flags": pm.MREMAP_MAYMOVE | pm.MREMAP_FIXED, "new_addr": self.mm.mmap(size, prot=0).addr}

    @rule()
    def fork(self) -> None:
        spans = [(addr, page.data) for addr, page in self.pages.items() if page.prot & READ]

        def child() -> None:
            for addr, data in spans:
                assert ctypes.string_at(addr, PAGE) == data, f"{addr:#x} in the child"

        assert in_child(child) == 0

    @rule(number=st.integers(0, 1))
    def close_memory(self, number: int) -> None:
        self.vrams[number].close()
        self.vrams[number] = self.new_memory((PAGES, HUGE // PAGE + 2)[number])

    def by(self, api: bool) -> Any:
        return self.mm if api else foreign

    @invariant()
    def books_add_up(self) -> None:
        tally.add("steps on device memory", steps=1)
        stats = self.mm.stats()
        places = [(addr, addr + PAGE) for addr in self.pages]
        held = sum(int(np.count_nonzero(pm.exclusive_pfns(self.mm, *place))) for place in places)
        for vram in self.vrams:
            assert vram.used // PAGE == sum(int(vram.holds(*place).sum()) for place in places)
            assert vram.used <= vram.size
        assert stats["device_resident"] == held + sum(vram.used // PAGE for vram in self.vrams)
        assert (stats["device_child_lost"], stats["callback_errors"]) == (0, 0)
        assert self.driver.device.stats.stale == 0

    @invariant()
    def the_devices_table_is_the_cpus(self) -> None:
        self.mm.sync()
        table = self.driver.device.page_table
        if table.stats()["entries"]:
            assert [table.verify(addr, addr + PAGE) for addr in self.pages] == [None] * len(self.pages)

    @invariant()
    def a_walk_shows_what_is_where(self) -> None:
        for addr, page in self.pages.items():
            pfn = self.walked(addr)
            there = any(vram.holds(addr, addr + PAGE)[0] for vram in self.vrams)
            assert bool(pm.is_device_private_pfn(pfn)) == (there and bool(page.prot & READ)), f"{addr:#x}"
            assert page.prot == WRITE or not pfn & pm.HMM_PFN_WRITE, f"{addr:#x}: {pfn:#x}"

    def walked(self, addr: int) -> int:
        """Its HMM pfn, with the retry loop: a change behind the library's back may be under way still."""
        sub = self.driver.covering(addr, addr + PAGE) or self.driver.insert(addr, addr + PAGE)
        found: list[int] = []

        def attempt() -> bool:
            found[:] = self.driver.look(sub, addr, addr + PAGE, 0)[1].tolist()
            return True

        self.driver.again(attempt)
        return found[0]

    def teardown(self) -> None:
        try:
            for addr, page in self.pages.items():
                if not page.prot & READ:
                    self.mm.mprotect(addr, PAGE, READ)
                assert ctypes.string_at(addr, PAGE) == page.data, f"{addr:#x} at the end"
        finally:
            for vram in self.vrams:
                vram.close()
            self.mm.close()
            for addr in self.pages:
                foreign.munmap(addr, PAGE)
