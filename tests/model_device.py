"""What device tables must hold, and two small drivers that log what they mapped.

The log has everything in the order in which it happened, so that tables can be foretold entry by entry. That
order is exact while one thread works and waits for callbacks (mm.sync) before it goes on.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from model import PAGE, PFN, PRESENT, Interval

import pymirror as pm
from pymirror.pfn import PfnArray

FAULT = pm.HMM_PFN_REQ_FAULT
FAULT_WRITE = pm.HMM_PFN_REQ_FAULT | pm.HMM_PFN_REQ_WRITE
RETRIES = 64
ENTRY_PFN = (1 << 53) - 1
# What the kernel does of its own accord and that gives a page another frame, or takes it away.
MOVERS = ("pgmigrate_success", "thp_collapse_alloc", "thp_split", "pgsteal", "ksm_swpin_copy", "pswpout")


@dataclass(frozen=True, slots=True)
class Mapped:
    """A page_table.map() that succeeded."""

    table: pm.PageTable
    start: int
    pfns: PfnArray
    unseen: frozenset[int] = frozenset()


Log = list["Mapped | pm.MmuNotifierRange"]


class Recorder(pm.MmuNotifier):
    """Writes every invalidation of the mm into the log. Made last, so that drivers have been told by then."""

    def __init__(self, mm: pm.AddressSpace, log: Log) -> None:
        self.log = log
        super().__init__(mm)

    def invalidate_range_start(self, range: pm.MmuNotifierRange) -> None:
        self.log.append(range)


def again(attempt: Callable[[], bool], progress: Callable[[], object]) -> None:
    """Try until it succeeds. EBUSY and EAGAIN mean again, but only if something was invalidated meanwhile."""
    for _ in range(RETRIES):
        before = progress()
        try:
            if attempt():
                return
        except pm.MirrorError as refused:
            if refused.errno not in (errno.EBUSY, errno.EAGAIN):
                raise
            if progress() == before:
                raise AssertionError(f"refused, and nothing was invalidated: {refused}") from refused
    raise AssertionError(f"no success in {RETRIES} attempts")


class MirrorDriver(pm.Mirror):
    """Follows the whole mm and maps what its device misses, from the fault to the end of the access."""

    def __init__(self, mm: pm.AddressSpace, log: Log) -> None:
        self.device = pm.Device("by mirror")
        self.device.set_fault_handler(self.serve)
        self.log = log
        #: How it answers: "clear", "forget" to, or "refuse" where it may.
        self.answer = "clear"
        super().__init__(mm)

    def sync_cpu_device_pagetables(self, update: pm.MmuNotifierRange) -> bool:
        if self.answer == "refuse":
            return update.blockable
        with self.lock:
            if self.answer == "clear":
                self.device.page_table.clear(update.start, update.end)
        return True

    def serve(self, fault: pm.DeviceFault) -> None:
        with self.range(fault.addr, fault.end) as rng:
            rng.default_flags = FAULT_WRITE if fault.write else FAULT
            self.again(lambda: self.try_map(rng))

    def again(self, attempt: Callable[[], bool]) -> None:
        again(attempt, lambda: len(self.log))

    def try_map(self, rng: pm.Range) -> bool:
        assert rng.wait_until_valid()
        return self.commit(rng, rng.fault())

    def commit(self, rng: pm.Range, seq: int, unseen: frozenset[int] = frozenset()) -> bool:
        table = self.device.page_table
        with self.lock:
            if not table.map(rng, seq):
                return False
            self.log.append(Mapped(table, rng.start, rng.pfns.copy(), unseen))
            return True


class IntervalDriver:
    """Follows intervals, which may overlap; a fault outside all of them gets one of its own."""

    AROUND = 4 * PAGE
    KEPT = 4

    def __init__(self, mm: pm.AddressSpace, log: Log) -> None:
        self.mm = mm
        self.log = log
        self.lock = pm.DriverLock("intervals")
        self.device = pm.Device("by intervals")
        self.device.set_fault_handler(self.serve)
        self.subs: list[pm.IntervalNotifier] = []

    def insert(self, start: int, end: int, *, two_pass: bool = False) -> pm.IntervalNotifier:
        while len(self.subs) >= self.KEPT:
            self.remove(self.subs[0])
        callbacks: dict[str, Any] = {"invalidate": self._invalidate}
        if two_pass:
            callbacks = {"invalidate_start": self._begin, "invalidate_finish": self._finish}
        sub = pm.IntervalNotifier(self.mm, start, end - start, **callbacks)
        self.subs.append(sub)
        return sub

    def remove(self, sub: pm.IntervalNotifier) -> None:
        """What nobody will be told of any more goes first."""
        sub.remove()
        self.subs.remove(sub)
        with self.lock:
            self.device.page_table.clear(sub.start, sub.start + sub.length)

    def covering(self, start: int, end: int) -> pm.IntervalNotifier | None:
        return next((sub for sub in self.subs if sub.start <= start and end - 1 <= sub.last), None)

    def serve(self, fault: pm.DeviceFault) -> None:
        sub = self.covering(fault.addr, fault.end)
        if sub is None:
            sub = self.insert(max(PAGE, fault.addr - self.AROUND), fault.end + self.AROUND)
        flags = FAULT_WRITE if fault.write else FAULT
        self.again(lambda: self._try_map(sub, fault.addr, fault.end, flags))

    def again(self, attempt: Callable[[], bool]) -> None:
        again(attempt, lambda: len(self.log))

    def look(self, sub: pm.IntervalNotifier, start: int, end: int, flags: int) -> tuple[int, PfnArray]:
        pfns = np.zeros((end - start) // PAGE, np.uint64)
        seq = sub.read_begin(timeout=1.0)
        pm.hmm_range_fault(sub, start, end, pfns, default_flags=flags, seq=seq)
        return seq, pfns

    def commit(
        self,
        sub: pm.IntervalNotifier,
        seq: int,
        start: int,
        pfns: PfnArray,
        unseen: frozenset[int] = frozenset(),
    ) -> bool:
        table = self.device.page_table
        with self.lock:
            if not table.map(sub, seq, start, pfns):
                return False
            self.log.append(Mapped(table, start, pfns.copy(), unseen))
            return True

    def _try_map(self, sub: pm.IntervalNotifier, start: int, end: int, flags: int) -> bool:
        seq, pfns = self.look(sub, start, end, flags)
        return self.commit(sub, seq, start, pfns)

    def _invalidate(self, sub: pm.IntervalNotifier, range: pm.MmuNotifierRange, cur_seq: int) -> bool:
        with self.lock:
            sub.set_seq(cur_seq)
            self._clear(sub, range)
        return True

    def _begin(self, sub: pm.IntervalNotifier, range: pm.MmuNotifierRange, cur_seq: int) -> object:
        with self.lock:
            sub.set_seq(cur_seq)
        return sub, range

    def _finish(self, begun: Any) -> None:
        with self.lock:
            self._clear(*begun)

    def _clear(self, sub: pm.IntervalNotifier, range: pm.MmuNotifierRange) -> None:
        self.device.page_table.clear(max(range.start, sub.start), min(range.end, sub.start + sub.length))


@dataclass
class Expected:
    """The entries that a table must have, by address.

    ``unseen`` are those whose page may have changed with no event: such a change must be found, and no other.
    """

    device: pm.Device
    entries: dict[int, int] = field(default_factory=dict)
    unseen: set[int] = field(default_factory=set)

    def map(self, mapped: Mapped) -> None:
        for i in np.flatnonzero(mapped.pfns & np.uint64(pm.HMM_PFN_VALID)).tolist():
            addr = mapped.start + i * PAGE
            self.entries[addr] = int(mapped.pfns[i])
            self.unseen.discard(addr)
            if addr in mapped.unseen:
                self.unseen.add(addr)

    def clear(self, start: int, end: int) -> None:
        for addr in [addr for addr in self.entries if start <= addr < end]:
            del self.entries[addr]
            self.unseen.discard(addr)

    def compare(self) -> None:
        """The table has these entries, all usable, and no other."""
        table = self.device.page_table
        stats = table.stats()
        assert (stats["entries"], stats["fenced"]) == (len(self.entries), 0), f"{self.device}: {stats}"
        for start, end in blocks(self.entries):
            actual = table.entries(start, end)
            expected = [self.entries.get(addr, 0) for addr in range(start, end, PAGE)]
            if actual.tolist() != expected:
                raise AssertionError(_difference(self.device, start, actual.tolist(), expected))


def _difference(device: pm.Device, start: int, actual: list[int], expected: list[int]) -> str:
    lines = [
        f"  {start + i * PAGE:#x}: {a:#x}, must be {e:#x}"
        for i, (a, e) in enumerate(zip(actual, expected, strict=True))
        if a != e
    ]
    return "\n".join([f"entries of {device}:", *lines[:16]])


def blocks(addresses: dict[int, Any]) -> list[Interval]:
    """Few intervals that hold all of the pages, with gaps of at most 64 pages."""
    found: list[list[int]] = []
    for addr in sorted(addresses):
        if found and addr - found[-1][1] <= 64 * PAGE:
            found[-1][1] = addr + PAGE
        else:
            found.append([addr, addr + PAGE])
    return [(start, end) for start, end in found]


class Pagemap:
    """/proc/self/pagemap, read without pymirror."""

    def __init__(self) -> None:
        self._fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)

    def read(self, start: int, end: int) -> list[int]:
        raw = os.pread(self._fd, (end - start) // PAGE * 8, start // PAGE * 8)
        return np.frombuffer(raw, np.uint64).tolist()

    def close(self) -> None:
        os.close(self._fd)


def same_frame(pfn: int, raw: int) -> bool:
    """Whether a pagemap entry shows the page that a pfn or an entry names, 0 where frames are hidden."""
    mine, its = pfn & ((1 << 52) - 1), raw & PFN
    return bool(raw & PRESENT) and (not mine or not its or mine == its)


def kernel_moves() -> int:
    """How often the kernel has moved or taken pages on its own, in the whole machine."""
    lines = (line.split() for line in Path("/proc/vmstat").read_text().splitlines())
    return sum(int(value) for name, value in lines if name.startswith(MOVERS))
