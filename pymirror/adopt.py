# SPDX-License-Identifier: MIT
"""Memory that is there already: the whole pages inside a buffer that somebody else made.

Its owner can neither free nor resize it while it is adopted, since a buffer export is held. What would throw
its contents away asks for ``force=True``.
"""

from __future__ import annotations

import errno
import os
import weakref
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from .affected import PAGE_SIZE, page_up
from .errors import MirrorError
from .event import Event

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from .mm import AddressSpace


class Adopted:
    """The whole pages [addr, addr + size) of a buffer, made by AddressSpace.adopt(). Sizes are bytes.

    ``edges`` are the intervals [start, end) of the buffer that share their page with other memory and are
    left out. ``readonly`` is what the buffer says of itself: the page table does not know of it, so a driver
    must not ask for HMM_PFN_REQ_WRITE then. ``view`` is the whole pages as a memoryview of bytes.

    The memory stays the owner's: close() lets it go, and so does collection; nothing is unmapped.
    """

    addr: int
    size: int
    edges: tuple[tuple[int, int], ...]
    readonly: bool
    mm: AddressSpace

    def __init__(self, mm: AddressSpace, buffer: Buffer) -> None:
        """EINVAL: not contiguous, or without a whole page."""
        held = _bytes_of(buffer)
        start = held.ctypes.data
        end = start + held.nbytes
        first, last = page_up(start), end // PAGE_SIZE * PAGE_SIZE
        if first >= last:
            raise MirrorError(
                errno.EINVAL,
                f"adopt: the {end - start} bytes at {start:#x} hold no whole page",
                addr=start,
                vma=mm._vma_for_error(start),
                hint=f"adopt {2 * PAGE_SIZE - 1} bytes or more, or allocate them page-aligned",
            )
        self.mm = mm
        self.addr, self.size = first, last - first
        self.edges = tuple(edge for edge in ((start, first), (last, end)) if edge[0] < edge[1])
        self.readonly = not held.flags.writeable
        self._pid = os.getpid()
        self._view: memoryview | None = held[first - start : last - start].data

    @property
    def view(self) -> memoryview:
        """The whole pages, for the CPU's side. ValueError once closed."""
        if self._view is None:
            raise ValueError(f"the memory at {self.addr:#x} is not adopted any more; do: adopt() it again")
        return self._view

    @property
    def closed(self) -> bool:
        """Whether the buffer has been let go."""
        return self._view is None

    def close(self) -> None:
        """Let the buffer go: devices lose it (event UNMAP, before), its owner may free it. Idempotent.

        EDEADLK in a callback, under a driver lock and under read_lock().
        """
        if self._view is None:
            return
        if os.getpid() == self._pid and not self.mm.closed:
            with self.mm.invalidate(self.addr, self.addr + self.size, Event.UNMAP):
                pass
        self._view = None

    def __enter__(self) -> Adopted:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def __len__(self) -> int:
        return self.size

    def __repr__(self) -> str:
        state = " closed" if self.closed else ""
        return f"<Adopted {self.addr:#x}-{self.addr + self.size:#x}{state}>"


class Adoptions:
    """What of an mm is adopted. Intervals may overlap; what was collected or closed does not count."""

    def __init__(self) -> None:
        # By identity: a WeakSet cannot be looked at while another thread adds to it.
        self._all: weakref.WeakValueDictionary[int, Adopted] = weakref.WeakValueDictionary()

    def add(self, adopted: Adopted) -> None:
        self._all[id(adopted)] = adopted

    def __len__(self) -> int:
        return len(self.live())

    def live(self) -> list[Adopted]:
        return [one for ref in self._all.valuerefs() if (one := ref()) is not None and not one.closed]

    def check(self, mm: AddressSpace, what: str, start: int, end: int) -> None:
        """EBUSY if [start, end) holds adopted memory."""
        for one in self.live():
            if start < one.addr + one.size and one.addr < end:
                first = max(start, one.addr)
                raise MirrorError(
                    errno.EBUSY,
                    f"{what}: the contents of adopted memory, {one!r}, would be lost",
                    addr=first,
                    vma=mm._vma_for_error(first),
                    hint="close() it first, or give force=True",
                )


def _bytes_of(buffer: Buffer) -> npt.NDArray[np.uint8]:
    """The bytes of a contiguous buffer in order of address, holding its export."""
    try:
        held = np.asarray(buffer if isinstance(buffer, np.ndarray) else memoryview(buffer))
    except (TypeError, ValueError) as wrong:
        what = f"a {type(buffer).__name__} has no buffer ({wrong})"
        raise _refused(what, "give an array, a bytearray or a mmap") from None
    if held.dtype.hasobject:
        raise _refused("the array holds Python objects", "adopt numbers: a device cannot follow pointers")
    if not held.flags.forc:
        raise _refused("the buffer is not contiguous", "adopt the whole array, or a copy of it")
    if not held.nbytes:
        raise _refused("the buffer is empty", f"adopt {PAGE_SIZE} bytes or more")
    in_order = held if held.flags.c_contiguous else held.T
    return in_order.reshape(-1).view(np.uint8)


def _refused(wrong: str, hint: str) -> MirrorError:
    return MirrorError(errno.EINVAL, f"adopt: {wrong}", hint=hint)
