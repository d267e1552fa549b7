# SPDX-License-Identifier: MIT
"""Region: memory that pymirror mapped, as an object that exports a writable buffer.

An address space keeps its Regions alive, and mapped, until munmap() or close(). After AddressSpace.close()
the memory stays until the last view of it is gone, so that no array ever loses its bytes to a close.
"""

from __future__ import annotations

import os
import threading
import weakref
from bisect import bisect_left, bisect_right, insort
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

from ._shim import ffi, lib
from .exporter import array_type, live_views

if TYPE_CHECKING:
    from .mm import AddressSpace


class Region:
    """``size`` bytes of memory at ``addr``, mapped by AddressSpace.mmap() or mremap().

    It is a ctypes array of bytes: index it, or make views with np.frombuffer() or
    memoryview(r).cast("B"). ``prot``, ``shared`` and ``huge`` (None, "thp", "hugetlb") are as it was mapped.
    ``fd`` is the Region's own descriptor of the file or memfd behind it, -1 for private anonymous memory and
    once nothing of it is left.

    A view does not keep memory that AddressSpace.munmap() took away: touching it is then a SIGSEGV, as in C.
    """

    addr: int
    size: int
    prot: int
    shared: bool
    huge: str | None
    mm: AddressSpace
    _held: _Held
    _heirs: list[Region]

    @property
    def fd(self) -> int:
        """The descriptor of the file or memfd behind it, the Region's own; -1 without one."""
        return self._held.fd

    @property
    def left(self) -> list[tuple[int, int]]:
        """The intervals [start, end) that are still this Region's own, in order of address."""
        return list(self._held.extents)

    @property
    def closed(self) -> bool:
        """Whether nothing of it is left."""
        return not self._held.extents

    def close(self) -> None:
        """Unmap what is left. Idempotent. A forked child leaves it alone.

        BufferError while a view lives. Errors as AddressSpace.munmap().
        """
        if self.closed or not self._held.here():
            return
        if views := live_views(self):
            raise BufferError(
                f"close: {views} view(s) of the Region at {self.addr:#x} live: del them first, or munmap() it"
            )
        self.mm._unmap_region(self)

    def __enter__(self) -> Region:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def __getitem__(self, index: Any) -> Any:
        self._check_open()
        return super().__getitem__(index)  # type: ignore[misc]

    def __setitem__(self, index: Any, value: Any) -> None:
        self._check_open()
        super().__setitem__(index, value)  # type: ignore[misc]

    def __len__(self) -> int:
        return self.size

    if TYPE_CHECKING:

        def __buffer__(self, flags: int, /) -> memoryview: ...

    def __repr__(self) -> str:
        state = "" if not self.closed else " closed"
        return f"<Region {self.addr:#x}-{self.addr + self.size:#x}{state}>"

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError(f"the Region at {self.addr:#x} is unmapped; do: mmap() a new one")


class _Held:
    """What a Region has to give back: mapped intervals and a descriptor. Its finalizer holds it."""

    __slots__ = ("doubtful", "extents", "fd", "pid")

    def __init__(self, start: int, end: int, fd: int) -> None:
        self.extents = [(start, end)]
        self.fd = fd
        self.pid = os.getpid()
        self.doubtful: list[tuple[int, int]] = []

    def here(self) -> bool:
        """False in a forked child, whose descriptors and memory are not ours to take away."""
        return os.getpid() == self.pid

    def carve(self, start: int, end: int) -> None:
        """[start, end) is no longer the Region's."""
        pieces = [piece for s, e in self.extents for piece in ((s, min(e, start)), (max(s, end), e))]
        self.extents[:] = [(s, e) for s, e in pieces if s < e]

    def restore(self, start: int, end: int) -> None:
        """[start, end) is the Region's still."""
        merged: list[tuple[int, int]] = []
        for first, last in sorted([*self.extents, (start, end)]):
            if merged and merged[-1][1] == first:
                first = merged.pop()[0]
            merged.append((first, last))
        self.extents[:] = merged

    def close_fd(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def release(self) -> None:
        """Unmap what is left, without the address space: it is closed by now."""
        if not self.here():
            return
        for start, end in self.doubtful:
            self.carve(start, end)
        while self.extents:
            start, end = self.extents.pop()
            lib.pm_munmap(ffi.NULL, start, end - start)
        self.close_fd()


def make_region(
    mm: AddressSpace, addr: int, size: int, *, prot: int, shared: bool, huge: str | None, fd: int
) -> Region:
    """A Region over memory that is mapped already; takes the descriptor over."""
    region = cast(Region, array_type(size, Region).from_address(addr))
    region.addr, region.size = addr, size
    region.prot, region.shared, region.huge, region.mm = prot, shared, huge, mm
    region._held = _Held(addr, addr + size, fd)
    region._heirs = []
    weakref.finalize(region, region._held.release).atexit = False
    return region


Piece = tuple[int, int, Region]


class RegionMap:
    """Which Region owns which addresses of one mm.

    Who takes memory away disowns it first, makes the system call, and then settles, or restores when that
    failed: in the other order Ctrl-C after the call would leave a Region that unmaps what is another's.
    """

    def __init__(self) -> None:
        # A collection inside it may run a finalizer that closes a Region.
        self._lock = threading.RLock()
        self._starts: list[int] = []
        self._owned: dict[int, tuple[int, Region]] = {}

    def __len__(self) -> int:
        return len({id(region) for _, region in list(self._owned.values())})

    @property
    def bytes(self) -> int:
        return sum(end - start for start, (end, _) in list(self._owned.items()))

    def add(self, region: Region) -> None:
        """What was mapped just now is the Region's: who had it before lost it behind our back."""
        start, end = region.addr, region.addr + region.size
        self.settle(self.disown(start, end))
        with self._lock:
            self._insert(start, end, region)

    def overlapping(self, start: int, end: int) -> list[Piece]:
        """The owned pieces inside [start, end), cut to it, in order."""
        with self._lock:
            return self._overlapping(start, end)

    def around(self, start: int, end: int) -> list[tuple[int, int]]:
        """The owned pieces that [start, end) touches, whole, in order."""
        with self._lock:
            touched = {
                self._starts[bisect_right(self._starts, at) - 1] for at, _, _ in self._overlapping(start, end)
            }
            return sorted((at, self._owned[at][0]) for at in touched)

    def disown(self, start: int, end: int, only: Region | None = None) -> list[Piece]:
        """[start, end) leaves its Regions, or the one named; the pieces that they lost."""
        with self._lock:
            pieces = self._overlapping(start, end)
            pieces = [piece for piece in pieces if only is None or piece[2] is only]
            for first, last, region in pieces:
                self._cut(first, last)
                region._held.carve(first, last)
            return pieces

    def restore(self, pieces: list[Piece]) -> None:
        """The pieces were not taken away after all."""
        with self._lock:
            for start, end, region in pieces:
                self._insert(start, end, region)
                region._held.restore(start, end)

    def settle(self, pieces: list[Piece], heir: Region | None = None) -> None:
        """The pieces are gone. The Regions keep an ``heir`` alive, which has their memory now."""
        for _, _, region in pieces:
            if heir is not None:
                region._heirs.append(heir)
            if region.closed:
                region._held.close_fd()

    def clear(self) -> None:
        with self._lock:
            dropped = self._owned
            self._starts, self._owned = [], {}
        # Outside the lock: the last reference to a Region unmaps it.
        del dropped

    def _overlapping(self, start: int, end: int) -> list[Piece]:
        first = max(bisect_right(self._starts, start) - 1, 0)
        owned = [(at, *self._owned[at]) for at in self._starts[first : bisect_left(self._starts, end)]]
        return [(max(at, start), min(stop, end), region) for at, stop, region in owned if stop > start]

    def _insert(self, start: int, end: int, region: Region) -> None:
        insort(self._starts, start)
        self._owned[start] = (end, region)

    def _cut(self, start: int, end: int) -> None:
        at = self._starts[bisect_right(self._starts, start) - 1]
        stop, region = self._owned.pop(at)
        del self._starts[bisect_left(self._starts, at)]
        if at < start:
            self._insert(at, start, region)
        if end < stop:
            self._insert(end, stop, region)
