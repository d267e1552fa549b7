# SPDX-License-Identifier: MIT
"""IOVAs that are allocated apart from what is mapped there: of scatterlists and of the two-step API."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from .._shim import ffi, lib
from ..errors import check

if TYPE_CHECKING:
    from .device import DmaDevice
    from .domain import DmaDomain


class IovaExtent:
    """IOVAs of a domain, ``size`` bytes from ``start`` on, until free()."""

    __slots__ = ("domain", "size", "start")

    def __init__(self, domain: DmaDomain, start: int, size: int) -> None:
        self.domain, self.start, self.size = domain, start, size

    @classmethod
    def alloc(cls, device: DmaDevice, size: int) -> IovaExtent | None:
        """The highest that the device can form; None when there is no room."""
        domain, out = device.domain, ffi.new("uint64_t *")
        if size >= 1 << 64:
            return None
        iovas = lib.pm_domain_iovas(domain.native)
        ret = lib.pm_iova_alloc(iovas, size, device.dma_mask, out)
        if ret == -errno.ENOSPC and domain.flush():
            ret = lib.pm_iova_alloc(iovas, size, device.dma_mask, out)
        if ret in (-errno.ENOSPC, -errno.ENOMEM):
            return None
        check(ret, f"{device.name}: IOVA allocation")
        return cls(domain, int(out[0]), size)

    def flush(self) -> None:
        """What was unmapped here is out of the IOTLB, also where flushing is lazy."""
        if not getattr(self.domain, "strict", True):
            self.domain.flush()

    def free(self) -> None:
        """The pages in it must be unmapped."""
        self.flush()
        iovas = lib.pm_domain_iovas(self.domain.native)
        check(lib.pm_iova_free(iovas, self.start, self.size), f"free of IOVA {self.start:#x}")
