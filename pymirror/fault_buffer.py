# SPDX-License-Identifier: MIT
"""FaultBuffer: replayable faults of a device, taken in by its driver in batches.

As GPUs have it: an access that faults writes an entry and stalls; the driver fetches entries, serves them,
and replays, or cancels what it cannot serve. The buffer is of bounded size; what finds it full is dropped and
faults again after the next replay.
"""

from __future__ import annotations

import copy
import errno
import threading
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .arguments import check_is, integer
from .callback import may_wait
from .errors import MirrorError, error
from .lock import SLICE

if TYPE_CHECKING:
    from .device_fault import DeviceFault


class FaultEntry:
    """One entry: a fault, and how many stalled accesses wait for it. ``when`` is time.monotonic()."""

    __slots__ = ("_refused", "_stalled", "accesses", "fault", "when")

    def __init__(self, fault: DeviceFault) -> None:
        self.fault = fault
        self.accesses = 1
        self.when = time.monotonic()
        self._stalled = True
        self._refused: MirrorError | None = None

    def __repr__(self) -> str:
        access = "write" if self.fault.write else "read"
        return f"<FaultEntry {self.fault.addr:#x} {access} x{self.accesses}>"


@dataclass(slots=True)
class FaultBufferStats:
    """Counts since it was made.

    ``entered`` entries, ``coalesced`` faults that joined one, ``dropped`` for want of room, ``fetched``,
    ``replays``, ``cancelled``; ``most`` entries at a time.
    """

    entered: int = 0
    coalesced: int = 0
    dropped: int = 0
    fetched: int = 0
    replays: int = 0
    cancelled: int = 0
    most: int = 0


class FaultBuffer:
    """A device's fault handler that leaves the work to another thread: ``dev.set_fault_handler(buffer)``.

    ``size`` is in entries. ``timeout``: for how many seconds an access stalls before it ends with ETIMEDOUT.
    The driver's thread:

        while entries := buffer.fetch(batch):
            for first, *others in coalesce(entries):
                map first.fault.addr, or buffer.cancel() each of them
            buffer.replay()
    """

    def __init__(self, size: int = 256, *, timeout: float = 1.0) -> None:
        """EINVAL for a size below 1."""
        if integer("FaultBuffer", "size", size) < 1:
            raise MirrorError(errno.EINVAL, f"FaultBuffer: size {size}", hint="give a number of entries")
        self.size = size
        self.timeout = timeout
        self.stats = FaultBufferStats()
        self._entries: deque[FaultEntry] = deque()
        self._fetched: list[FaultEntry] = []
        self._dropped: list[FaultEntry] = []
        self._closed = False
        self._cond = threading.Condition()

    def __len__(self) -> int:
        """Entries that wait to be fetched."""
        return len(self._entries)

    def __call__(self, fault: DeviceFault) -> None:
        """The device's side: write an entry and stall until it is replayed (return) or cancelled (its error).

        ETIMEDOUT: not served in time; ESRCH: the buffer was closed. EDEADLK in a callback or under a driver
        lock.
        """
        may_wait("FaultBuffer")
        with self._cond:
            entry = self._enter(fault)
            try:
                self._stall(entry)
            finally:
                self._leave(entry)
        if entry._refused is not None:
            # Each access in its own thread: one object would gather the tracebacks of all of them.
            raise copy.copy(entry._refused)

    def fetch(self, batch: int | None = None, timeout: float | None = None) -> list[FaultEntry]:
        """The driver's side: up to ``batch`` entries (None: all), the oldest first; waits for one.

        Empty after ``timeout`` seconds (None: no limit; Ctrl-C ends the wait) and once the buffer is closed.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._cond:
            while not self._entries and not self._closed:
                left = SLICE if deadline is None else min(SLICE, deadline - time.monotonic())
                if left <= 0:
                    return []
                self._cond.wait(left)
            n = len(self._entries) if batch is None else min(batch, len(self._entries))
            taken = [self._entries.popleft() for _ in range(n)]
            self._fetched += taken
            self.stats.fetched += n
            return taken

    def replay(self) -> int:
        """Let the accesses go on whose entries were fetched or found no room. Returns how many entries."""
        with self._cond:
            going = self._fetched + self._dropped
            self._fetched, self._dropped = [], []
            self.stats.replays += 1
            self._release(going)
        return len(going)

    def cancel(self, entry: FaultEntry, refused: MirrorError | None = None) -> None:
        """End the accesses of a fetched entry with an error: EFAULT at its address, or the one given."""
        check_is("FaultBuffer.cancel", "entry", entry, "_stalled", "an entry that fetch() gave")
        with self._cond:
            if not entry._stalled:
                return
            fault = entry.fault
            entry._refused = refused or error(
                errno.EFAULT,
                f"{fault.device.name}: the driver cancelled the fault ({fault.reason})",
                addr=fault.addr,
                mm=fault.mm,
                hint="map the memory, with the access that is asked for",
            )
            self._fetched = [one for one in self._fetched if one is not entry]
            self.stats.cancelled += 1
            self._release([entry])

    def close(self) -> None:
        """Cancel all that stalls (ESRCH), and wake who waits in fetch(). Idempotent."""
        with self._cond:
            self._closed = True
            stalled = [*self._entries, *self._fetched, *self._dropped]
            self._entries.clear()
            self._fetched, self._dropped = [], []
            for entry in stalled:
                entry._refused = self._gone(entry.fault)
            self._release(stalled)

    def _enter(self, fault: DeviceFault) -> FaultEntry:
        if self._closed:
            raise self._gone(fault)
        for entry in self._entries:
            # Only with its like: a read may be served where a write is cancelled.
            if same_page(entry.fault, fault) and strength(entry.fault) == strength(fault):
                entry.accesses += 1
                self.stats.coalesced += 1
                return entry
        entry = FaultEntry(fault)
        if len(self._entries) >= self.size:
            self._dropped.append(entry)
            self.stats.dropped += 1
            return entry
        self._entries.append(entry)
        self.stats.entered += 1
        self.stats.most = max(self.stats.most, len(self._entries))
        self._cond.notify_all()
        return entry

    def _stall(self, entry: FaultEntry) -> None:
        deadline = time.monotonic() + self.timeout
        while entry._stalled:
            left = deadline - time.monotonic()
            if left <= 0:
                fault = entry.fault
                raise error(
                    errno.ETIMEDOUT,
                    f"{fault.device.name}: the fault was not replayed in {self.timeout} s",
                    addr=fault.addr,
                    mm=fault.mm,
                    hint="the driver's thread fetches, serves and replays; is it running?",
                )
            self._cond.wait(min(left, SLICE))

    def _leave(self, entry: FaultEntry) -> None:
        """An access that gave up; the last one takes the entry along."""
        entry.accesses -= 1
        if not entry._stalled or entry.accesses:
            return
        self._entries = deque(one for one in self._entries if one is not entry)
        self._fetched = [one for one in self._fetched if one is not entry]
        self._dropped = [one for one in self._dropped if one is not entry]

    def _release(self, entries: Iterable[FaultEntry]) -> None:
        for entry in entries:
            entry._stalled = False
        self._cond.notify_all()

    def _gone(self, fault: DeviceFault) -> MirrorError:
        return MirrorError(
            errno.ESRCH,
            f"{fault.device.name}: the fault buffer is closed",
            addr=fault.addr,
            hint="set another fault handler, or None",
        )


def same_page(one: DeviceFault, other: DeviceFault) -> bool:
    """Whether two faults are of the same page of an address space."""
    return one.mm is other.mm and one.addr == other.addr


def strength(fault: DeviceFault) -> tuple[bool, bool]:
    """How much a fault asks for, in order: an atomic more than a write, a write more than a read."""
    return fault.atomic, fault.write


def coalesce(entries: Iterable[FaultEntry]) -> list[list[FaultEntry]]:
    """Entries of a batch in order of address, those of one page together: atomics, writes, reads.

    Serve the first of each group: it asks for the most.
    """
    ordered = sorted(entries, key=lambda entry: strength(entry.fault), reverse=True)
    ordered.sort(key=lambda entry: (id(entry.fault.mm), entry.fault.addr))
    groups: list[list[FaultEntry]] = []
    for entry in ordered:
        if groups and same_page(groups[-1][0].fault, entry.fault):
            groups[-1].append(entry)
        else:
            groups.append([entry])
    return groups
