# SPDX-License-Identifier: MIT
"""One DMA mapping: the native half, and who made it where, for reports."""

from __future__ import annotations

import errno
import sys
import time
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from .. import trace
from .._shim import ffi, lib
from ..errors import check
from .direction import DmaDirection
from .domain import checked

if TYPE_CHECKING:
    from ..mm import AddressSpace
    from ..range_base import RangeBase
    from .device import DmaDevice

_PACKAGE = __name__.partition(".")[0] + "."


class Site:
    """A line of a program, one object for each: what made or undid a mapping."""

    __slots__ = ("file", "line")

    _known: dict[tuple[str, int], Site] = {}  # noqa: RUF012

    def __init__(self, file: str, line: int) -> None:
        self.file, self.line = file, line

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"

    def __repr__(self) -> str:
        return f"<Site {self}>"

    @classmethod
    def of_caller(cls) -> Site:
        """The innermost line outside this package."""
        frame = sys._getframe(1)
        while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(_PACKAGE):
            frame = frame.f_back
        key = frame.f_code.co_filename, frame.f_lineno
        site = cls._known.get(key)
        if site is None:
            site = cls._known[key] = cls(*key)
        return site


_HINTS = {
    errno.ENOSPC: "unmap something, or give the device a wider dma_mask or its domain a larger aperture",
    errno.EBUSY: "take a fresh sequence number, fault the range and map it again",
}


class DmaMapping:
    """What a device may reach at ``iova``: ``npages`` pages, ``size`` bytes, in one ``direction``.

    ``kind`` is the function that made it, by its short name ("hmm", "gup", "page", "single", "sg", ...),
    ``start`` the process address of the first byte, ``mm`` the address space of mirrored memory. ``when`` is
    time.monotonic().
    """

    __slots__ = (
        "_owner",
        "cookie",
        "device",
        "direction",
        "iova",
        "kind",
        "mm",
        "native",
        "npages",
        "site",
        "size",
        "start",
        "when",
    )

    def __init__(
        self,
        device: DmaDevice,
        kind: str,
        direction: DmaDirection,
        options: Any,
        site: Site | None = None,
        *,
        mm: AddressSpace | None = None,
        owner: RangeBase | None = None,
        into: dict[int, DmaMapping] | None = None,
    ) -> None:
        """Fill in what every mapping of the device has, and make it. Errors as pm_dmap_create().

        ``owner`` is kept alive. ``into`` has the mapping, by its cookie, before the domain has: Ctrl-C loses
        nothing that is mapped.
        """
        self.device = device
        self.kind = kind
        self.direction = direction
        self.site = site or Site.of_caller()
        self.mm = mm
        self._owner = owner
        self.start: int = options.start
        self.npages: int = options.n
        self.cookie = device.domain.new_cookie()
        options.domain = device.domain.native
        options.mask = options.mask or device.dma_mask
        options.direction = direction
        options.cookie = self.cookie
        made = ffi.new("pm_dmap **")
        ret = 0
        with self._span("map"):
            try:
                ret = lib.pm_dmap_create(options, made)
            finally:
                # Ctrl-C may strike as soon as the call returns: the mapping goes with this object then.
                if made[0] != ffi.NULL:
                    self.native = ffi.gc(made[0], lib.pm_dmap_put)
        if ret == -errno.EOPNOTSUPP:
            device._require_pfns(f"{device.name}: DMA without an IOMMU")
        check(
            ret,
            f"{device.name}: DMA map of {self.npages} pages",
            addr=self.start or None,
            hint=_HINTS.get(-ret),
        )
        info = self.info()
        self.iova: int = info.iova
        self.size: int = info.size
        self.when = time.monotonic()
        if into is not None:
            into[self.cookie] = self
        device.domain.remember(self)

    def __repr__(self) -> str:
        return (
            f"<DmaMapping {self.kind} {self.iova:#x}+{self.size:#x} {self.direction} of {self.device.name}>"
        )

    def _span(self, what: str) -> AbstractContextManager[Any]:
        end = self.start + (self.npages << 12)
        return trace.span(
            trace.Track.DMA, what, self.mm, self.start, end, kind=self.kind, device=self.device.name
        )

    def info(self) -> Any:
        """``struct pm_dmap_info``."""
        found = ffi.new("struct pm_dmap_info *")
        checked(lib.pm_dmap_info(self.native, found), "DmaMapping.info")
        return found

    @property
    def mapped(self) -> bool:
        """Whether it has not been unmapped."""
        return self.device.domain.mapping_of(self.cookie) is self

    def gave(self, page: int, daddr: int) -> bool:
        """Whether that is the DMA address of a page of it. Without an IOMMU every one may be."""
        return not self.device.domain.iommu or daddr == self.iova + (page << 12)

    def dirtied(self, pages: int) -> None:
        """A device may have written to so many of its pages."""
        lib.pm_dmap_dirtied(self.native, pages)

    def unlink(self, first: int, npages: int) -> tuple[int, int]:
        """Take pages out: how many were there, and how many of them a device could write to."""
        writable = ffi.new("uint64_t *")
        with self._span("unlink"):
            taken = checked(lib.pm_dmap_unlink(self.native, first, npages, writable), "DMA unmap")
        return taken, writable[0]

    def unmap(self) -> tuple[int, int]:
        """Take everything out and give the IOVAs back. As unlink(); (0, 0) when that was done before."""
        writable = ffi.new("uint64_t *")
        with self._span("unmap"):
            taken = checked(lib.pm_dmap_unmap(self.native, writable), "DMA unmap")
        self.device.domain.forget(self)
        return taken, writable[0]
