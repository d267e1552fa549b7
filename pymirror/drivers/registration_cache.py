# SPDX-License-Identifier: MIT
"""What a pinning driver keeps: registrations by address, the least recently used first.

None in the cache overlaps another. It pins and unpins nothing, and its lock is the driver's.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import OrderedDict
from collections.abc import Iterator

from ..gup import PinnedPages
from ..notifier import IntervalNotifier
from ..pfn import PfnArray


class Registration:
    """[start, end) bytes pinned and mapped for the device. Made by Pinned.register(), given back by put().

    ``daddrs`` is uint64, one DMA address a 4 KiB page. ``users`` hold it; ``cached``: look-ups find it.
    """

    def __init__(self, start: int, end: int) -> None:
        self.start = start
        self.end = end
        self.users = 0
        self.cached = False
        self.dirty = False
        self.notifier: IntervalNotifier | None = None
        self.pin: PinnedPages | None = None
        self.daddrs: PfnArray | None = None

    def __len__(self) -> int:
        """Bytes."""
        return self.end - self.start

    def __repr__(self) -> str:
        state = "cached" if self.cached else "not cached"
        return f"<Registration {self.start:#x}-{self.end:#x} {state}, {self.users} users>"


class RegistrationCache:
    """Registrations that look-ups find; in order of their last use when it is iterated."""

    def __init__(self) -> None:
        self._lru: OrderedDict[int, Registration] = OrderedDict()
        self._starts: list[int] = []
        self._bytes = 0

    def __iter__(self) -> Iterator[Registration]:
        return iter(self._lru.values())

    def look_up(self, start: int, end: int) -> Registration | None:
        """What has all of [start, end), which is used by that."""
        at = bisect_right(self._starts, start) - 1
        if at < 0 or (found := self._lru[self._starts[at]]).end < end:
            return None
        self._lru.move_to_end(found.start)
        return found

    def overlapping(self, start: int, end: int) -> list[Registration]:
        """In order of address."""
        first = max(0, bisect_right(self._starts, start) - 1)
        found = [self._lru[at] for at in self._starts[first : bisect_left(self._starts, end)]]
        return [one for one in found if one.end > start]

    def beyond(self, size: int) -> list[Registration]:
        """What would have to go for the cache to be of so many bytes: of what nobody uses, the oldest."""
        found, left = [], self._bytes
        for registration in self:
            if left <= size:
                break
            if not registration.users:
                found.append(registration)
                left -= len(registration)
        return found

    def add(self, registration: Registration) -> None:
        """It overlaps nothing that is there."""
        registration.cached = True
        self._lru[registration.start] = registration
        insort(self._starts, registration.start)
        self._bytes += len(registration)

    def discard(self, registration: Registration) -> None:
        """Idempotent."""
        if not registration.cached:
            return
        registration.cached = False
        self._bytes -= len(registration)
        del self._lru[registration.start]
        del self._starts[bisect_left(self._starts, registration.start)]
