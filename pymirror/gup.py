# SPDX-License-Identifier: MIT
"""GUP: pages pinned for a device that cannot follow the page table (pin_user_pages()).

A pin is real: a registered buffer of an io_uring, which the kernel makes with pin_user_pages(FOLL_WRITE |
FOLL_LONGTERM). The page stays what it is after MADV_DONTNEED, munmap and fork; what the CPU then has at the
address is another page. See docs/pinning.md.
"""

from __future__ import annotations

import errno
import os
import warnings
from types import TracebackType
from typing import TYPE_CHECKING, Any

from . import trace
from ._shim import ffi, lib
from .arguments import check_is, check_mm, integer
from .errors import MirrorError, error
from .gup_flags import FOLL_LONGTERM, FOLL_WRITE, check_flags
from .gup_pinning import pin_pages
from .pin_registry import caller
from .range_base import RangeBase
from .walk import PAGE_SHIFT, PAGE_SIZE, check_interval

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from .mm import AddressSpace
    from .pfn import PfnArray

#: Bytes of one native call, so that Ctrl-C is heard in between.
_CALL_BYTES = 64 << 20


class PinnedPages(RangeBase):
    """npages pinned pages of an mm, from ``start`` to ``end``. Made by pin_user_pages(); a context manager.

    ``pfns`` are HMM pfns (uint64, one a 4 KiB page: VALID, WRITE, order and PFN, without CAP_SYS_ADMIN the
    PFN 0) as they were when the pages were pinned; the pages stay those. ``pinned_at`` and ``unpinned_at``
    are ``file:line`` of who did it, the latter None before.

    read(), read_into() and write() go through the pin: to the pinned pages, whatever is mapped at their
    addresses now. Any thread may use them, in a callback too; offsets are bytes.
    """

    __slots__ = (
        "__weakref__",
        "_held",
        "_native",
        "_pfns",
        "end",
        "mm",
        "npages",
        "pinned_at",
        "start",
        "unpinned_at",
    )

    def __init__(self, mm: AddressSpace, start: int, npages: int, held: Any, pfns: PfnArray) -> None:
        """Not for users: pin_user_pages() makes them, with a ``pm_pin **`` that puts its pin in the end."""
        self.mm = mm
        self.start = start
        self.end = start + npages * PAGE_SIZE
        self.npages = npages
        self.pinned_at = caller()
        self.unpinned_at: str | None = None
        self._held = held
        self._native = held[0]
        self._pfns = pfns
        self._dma_mappings = {}
        pfns.flags.writeable = False
        mm._pins.add(self)

    @property
    def pfns(self) -> PfnArray:
        """The pages as they were pinned: uint64, one HMM pfn a 4 KiB page, read-only."""
        return self._pfns

    @property
    def native(self) -> Any:
        """The ``pm_pin *``."""
        return self._native

    @property
    def pinned(self) -> bool:
        """Whether the pages are held: not unpinned, the mm not closed, not inherited by a child."""
        return self.unpinned_at is None and not self.mm.closed and os.getpid() == self.mm.pid

    def read(self, offset: int = 0, n: int | None = None) -> bytes:
        """Read n bytes (None: all the rest) from offset on. Errors as read_into()."""
        offset = integer("PinnedPages.read", "offset", offset)
        n = max(0, len(self) - offset) if n is None else integer("PinnedPages.read", "n", n)
        self._check_inside("read", offset, n)
        into = bytearray(n)
        self.read_into(offset, into)
        return bytes(into)

    def read_into(self, offset: int, buffer: Buffer) -> None:
        """Fill a writable contiguous buffer with the pinned bytes from offset on.

        EINVAL: beyond the pin, or unpinned. ESRCH: the mm is closed, or this is a forked child. EFAULT: the
        buffer's memory is not there. ETIMEDOUT: the kernel does not complete the request. What was read
        before an error stands in the buffer.
        """
        with ffi.from_buffer(buffer, require_writable=True) as memory:
            self._access("read", offset, memory, False)

    def write(self, offset: int, data: Buffer) -> None:
        """Write the bytes of a contiguous buffer at offset. As read_into(); what was written stays."""
        with ffi.from_buffer(data) as memory:
            self._access("write", offset, memory, True)

    def __enter__(self) -> PinnedPages:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None
    ) -> None:
        """Unpin, unless that was done. As dirty: a pin is for writing."""
        if self.pinned:
            unpin_user_pages(self, dirty=True)

    def __len__(self) -> int:
        """Bytes."""
        return self.npages << PAGE_SHIFT

    def __repr__(self) -> str:
        state = "pinned" if self.pinned else "unpinned" if self.unpinned_at else "gone with its mm"
        return f"<PinnedPages {self.start:#x}-{self.end:#x} {state}>"

    def __del__(self) -> None:
        # A pin whose making failed half-way has no attributes.
        if not getattr(self, "_native", None) or not self.pinned:
            return
        lib.pm_pin_release(self._native)
        self.mm._pins.discard(self)
        warnings.warn(
            f"{self!r} was collected pinned: unpin_user_pages() it; pinned at {self.pinned_at}",
            ResourceWarning,
            source=self,
            stacklevel=2,
        )

    def _dma_pages(self) -> PfnArray:
        self._check("gup_range_dma_map")
        return self._pfns

    def _dma_source(self, options: Any, seq: int) -> None:
        """Through the pin, which is held while it is mapped."""
        options.source = lib.PM_DMA_PIN
        options.pin = self._native
        options.pfns = ffi.from_buffer("uint64_t[]", self._pfns)

    def _access(self, what: str, offset: int, memory: Any, write: bool) -> None:
        offset, size = integer(f"PinnedPages.{what}", "offset", offset), len(memory)
        self._check_inside(what, offset, size)
        done, step = 0, ffi.new("uint64_t *")
        while done < size:
            n = min(size - done, _CALL_BYTES)
            ret = lib.pm_pin_access(self._native, offset + done, memory + done, n, write, step)
            done += step[0]
            if ret < 0:
                self._check(f"PinnedPages.{what}")
                at = self.start + offset + done
                wrong = f"PinnedPages.{what} of {self!r}, after {done} of {size} bytes"
                raise error(-ret, wrong, addr=at, hint=_HINTS.get(-ret))

    def _check_inside(self, what: str, offset: int, size: int) -> None:
        self._check(f"PinnedPages.{what}")
        if 0 <= offset <= offset + size <= len(self):
            return
        raise MirrorError(
            errno.EINVAL,
            f"{what}: bytes [{offset}, {offset + size}) are not inside the {len(self)} bytes of {self!r}",
            addr=self.start,
            hint="give offsets in bytes from the pin's start",
        )

    def _check(self, what: str) -> None:
        """EINVAL once unpinned, ESRCH when the mm is closed or another process's."""
        self.mm._check_here(what)
        if self.unpinned_at is not None:
            raise MirrorError(
                errno.EINVAL,
                f"{what}: {self!r} was pinned at {self.pinned_at} and unpinned at {self.unpinned_at}",
                addr=self.start,
                hint="unpin once, after the last use",
            )


_HINTS = {
    errno.EFAULT: "keep the caller's buffer mapped until the call is over",
    errno.ETIMEDOUT: "the kernel did not complete an io_uring request: see dmesg",
}


def pin_user_pages(
    mm: AddressSpace, start: int, npages: int, flags: int = FOLL_WRITE | FOLL_LONGTERM
) -> PinnedPages:
    """Pin npages pages from ``start`` on, faulted in for writing (pin_user_pages()). All or none of them.

    The kernel's call may return fewer pages than asked for; this one fails then, and nothing is pinned.
    ``flags`` must be FOLL_WRITE | FOLL_LONGTERM, which is what the kernel does here. Pages shared
    copy-on-write get copies of their own: mirrors of the memory are told before (event CLEAR), and where the
    kernel moved a page to pin it, after (guarantee ``detected``).

    EINVAL: not page-aligned, empty, beyond the address space, flags that make no sense. EOPNOTSUPP: flags
    that user space cannot have. EFAULT, with ``addr``: a hole, not writable, special memory, a shared mapping
    of a file on disk, beyond the end of a file. ENOMEM: RLIMIT_MEMLOCK, or no memory. ENOSPC: the 16,384
    slots, one for each GiB of a pin, are taken. EBUSY: the memory was exchanged again and again meanwhile.
    FeatureError: no io_uring. ESRCH; EDEADLK in a callback, under a driver lock and under read_lock().
    """
    what = "pin_user_pages"
    check_mm(what, mm)
    start, npages = integer(what, "start", start), integer(what, "npages", npages)
    flags = integer(what, "flags", flags)
    check_flags(what, flags)
    check_interval(what, start, start + npages * PAGE_SIZE, mm=mm)
    return PinnedPages(mm, start, npages, *pin_pages(mm, what, start, npages))


def unpin_user_pages(pin: PinnedPages, dirty: bool = False) -> None:
    """Give pinned pages back (unpin_user_pages(); with ``dirty`` unpin_user_pages_dirty_lock()).

    ``dirty`` counts the pages in ``mm.stats()["pin_dirtied_pages"]``. There is nothing else to do: the pages
    were marked dirty when they were pinned for writing, and the kinds of memory that can be pinned are not
    cleaned meanwhile. May be called anywhere, in a callback too.

    EINVAL: unpinned already; the message has both places. EBUSY: still mapped for DMA. ESRCH: the mm is
    closed, which gave them back, or this is a forked child.
    """
    what = "unpin_user_pages"
    check_is(what, "pin", pin, "unpinned_at", "what pin_user_pages() gave")
    pin._check(what)
    # First, since Ctrl-C may strike right after the call: nobody is to unpin it once more.
    pin.unpinned_at = caller()
    with trace.span(trace.Track.PIN, what, pin.mm, pin.start, pin.end, dirty=dirty):
        ret = lib.pm_pin_release(pin._native)
    if ret == -errno.EBUSY:
        pin.unpinned_at = None
        raise MirrorError(
            errno.EBUSY,
            f"{what}: {pin!r} is mapped for DMA still; pinned at {pin.pinned_at}",
            addr=pin.start,
            hint="gup_range_dma_unmap() it for every device first",
        )
    if ret in (-errno.EALREADY, -errno.ESRCH):
        pin.mm._check_here(what)
        raise MirrorError(
            errno.EINVAL, f"{what}: another thread unpins {pin!r}", addr=pin.start, hint="unpin once"
        )
    pin.mm._pins.discard(pin)
    if dirty:
        pin.mm._pins.dirtied += pin.npages
    if ret < 0:
        raise error(
            -ret,
            f"{what}: the kernel did not let go of all pages of {pin!r}",
            addr=pin.start,
            hint="nothing: it is asked again at the next pin and at AddressSpace.close()",
        )
