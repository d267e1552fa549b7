"""What must hold after each step: tables, vmas, Regions and every byte, by the kernel and by the model."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from model import PAGE, PRESENT, Model, Page, merged
from model_device import (
    Expected,
    IntervalDriver,
    Pagemap,
    kernel_moves,
    same_frame,
)

import pymirror as pm
from pymirror.pfn import PfnArray

QUIET_S = 2.0
WINDOW = 96
SWAP = len(Path("/proc/swaps").read_text().splitlines()) > 1


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


class Checks:
    """The parts that are compared. ``regions`` are all that are not closed, ``doubtful`` see World."""

    mm: pm.AddressSpace
    model: Model
    tables: dict[pm.PageTable, Expected]
    intervals: IntervalDriver
    pendings: list[Pending]
    regions: list[pm.Region]
    doubtful: set[int]

    def __init__(self) -> None:
        self.pagemap = Pagemap()
        self._memory = os.open("/proc/self/mem", os.O_RDONLY | os.O_CLOEXEC)
        self._moves = kernel_moves()
        self._window = 0

    def release(self) -> None:
        self.pagemap.close()
        os.close(self._memory)

    def check(self, touched: Iterable[int] = ()) -> None:
        self.check_quiet()
        for table in self.tables.values():
            table.compare()
            self.check_frames(table)
        self.check_vmas()
        self.check_regions()
        self.check_pendings()
        self.check_bytes(self._some(touched))
        if self.kernel_moved():
            for pending in self.pendings:
                pending.unseen.update(range(pending.start, pending.end, PAGE))
            self._moves = kernel_moves()

    def check_quiet(self) -> None:
        stats = quiet(self.mm)
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
            if page.huge == "thp" or same_frame(entry, raw):
                continue
            if self.kernel_moved():
                table.unseen.add(addr)
                continue
            raise AssertionError(f"{table.device} at {addr:#x}: {entry:#x}, the CPU has {raw:#x}")

    def check_used(self, table: pm.PageTable, start: int, end: int, blind: Container[int] = ()) -> None:
        """What a device has just read or written is the page that the CPU has, also where nothing told.

        But ``blind`` ones: the write itself may have copied them.
        """
        entries = self.tables[table].entries
        for addr, raw in self.frames(addr for addr in range(start, end, PAGE) if addr not in blind):
            if same_frame(entries[addr], raw) or self.model.pages[addr].huge == "thp" or self.kernel_moved():
                continue
            raise AssertionError(f"used {entries[addr]:#x} at {addr:#x}, the CPU has {raw:#x}")

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
            assert owned[id(region)] <= left, f"{region} lost {text(owned[id(region)] - left)}"
            assert left - owned[id(region)] <= self.doubtful, f"{region} has {text(left - owned[id(region)])}"
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
        while len(data) < size and fault_in(start + len(data)):
            # A hole that is filled at a touch: a look from outside does not wait for that.
            data += os.pread(self._memory, size - len(data), start + len(data))
        assert len(data) == size, f"memory ends at {start + len(data):#x}"
        return data

    def frames(self, pages: Iterable[int]) -> list[tuple[int, int]]:
        """(address, pagemap entry) of pages."""
        found = []
        for start, end in merged(pages):
            found += list(zip(range(start, end, PAGE), self.pagemap.read(start, end), strict=True))
        return found

    def kernel_moved(self) -> bool:
        """Since the last step: then frames may differ without anybody's mistake."""
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


def quiet(mm: pm.AddressSpace) -> dict[str, Any]:
    """The stats, once nothing runs any more: a REMOVE goes on for 10 ms after its madvise() has returned."""
    until = time.monotonic() + QUIET_S
    busy = ("active", "queue_depth", "callbacks_running")
    while any((stats := mm.stats())[name] for name in busy) and time.monotonic() < until:
        time.sleep(0.0005)
    assert stats["active"] == 0, mm.dump()
    assert stats["invalidate_seq"] % 2 == 0, str(stats)
    assert stats["queue_depth"] == stats["inflight"] == stats["callbacks_running"] == 0, str(stats)
    return stats


def text(pages: Iterable[int]) -> str:
    return ", ".join(f"[{start:#x}, {end:#x})" for start, end in merged(pages))


def fault_in(addr: int) -> bool:
    """Have a system call read the byte at addr: whether it could."""
    read, write = os.pipe()
    try:
        return os.write(write, (ctypes.c_char * 1).from_address(addr)) == 1
    except OSError:
        return False
    finally:
        os.close(read)
        os.close(write)
