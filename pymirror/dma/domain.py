# SPDX-License-Identifier: MIT
"""What stands between a device and memory: an IOMMU domain, or nothing (direct mapping).

The native half has the mappings; this one knows the Python objects that they were made for, for reports.
"""

from __future__ import annotations

import errno
import itertools
from typing import TYPE_CHECKING

from .._shim import ffi, lib
from ..arguments import check_is, integer
from ..errors import MirrorError, check

if TYPE_CHECKING:
    from .record import DmaMapping

PAGE_SIZE = 4096

#: Interrupt messages of x86 are writes to this window: no memory can be mapped there.
MSI_WINDOW = (0xFEE0_0000, 0xFEEF_FFFF)
#: 48 bits, as the second-level page tables of today's IOMMUs translate.
APERTURE_LAST = (1 << 48) - 1


#: Of mappings, unlike in all domains: a range has mappings in several.
_cookies = itertools.count(1)


class DmaDomain:
    """The DMA addresses of one or several devices. ``iommu`` tells whether they are translated."""

    iommu: bool

    def __init__(self, first: int, last: int, flags: int) -> None:
        first, last = integer("domain", "first", first), integer("domain", "last", last)
        if not 0 <= first < last <= (1 << 64) - 1:
            raise MirrorError(
                errno.EINVAL,
                f"{type(self).__name__}: the aperture {first:#x}-{last:#x} is empty or too large",
                hint="give the first and the last DMA address",
            )
        options = ffi.new("struct pm_domain_options *", {"first": first, "last": last, "flags": flags})
        made = ffi.new("pm_domain **")
        check(lib.pm_domain_create(options, made), type(self).__name__)
        self.native = ffi.gc(made[0], lib.pm_domain_put)
        self._mappings: dict[int, DmaMapping] = {}

    def flush(self) -> int:
        """Flush the IOTLB: what was unmapped lazily can be given out again. Returns of how many mappings."""
        return checked(lib.pm_domain_flush(self.native), "flush")

    def stats(self) -> dict[str, int]:
        """``struct pm_domain_stats``: mappings, pages, entries, segments, the iotlb's counts, bytes."""
        found = ffi.new("struct pm_domain_stats *")
        checked(lib.pm_domain_stats(self.native, found), "stats")
        return {name: getattr(found, name) for name, _ in ffi.typeof(found[0]).fields}

    def new_cookie(self) -> int:
        """A number for a mapping, by which native code names it."""
        return next(_cookies)

    def remember(self, mapping: DmaMapping) -> None:
        """It is mapped. For DmaMapping."""
        check_is("remember", "mapping", mapping, "cookie", "a DmaMapping")
        self._mappings[mapping.cookie] = mapping

    def forget(self, mapping: DmaMapping) -> None:
        """It is unmapped. Idempotent. For DmaMapping."""
        check_is("forget", "mapping", mapping, "cookie", "a DmaMapping")
        self._mappings.pop(mapping.cookie, None)

    def mapping_of(self, cookie: int) -> DmaMapping | None:
        """The mapping that native code names in a fault."""
        return self._mappings.get(integer("mapping_of", "cookie", cookie))

    def mappings(self) -> list[DmaMapping]:
        """What is mapped now."""
        return list(self._mappings.values())


class IommuDomain(DmaDomain):
    """An IOMMU's translation of [first, last], bytes, for one device or for several.

    IOVAs are given out from the top, aligned to their size. ``strict``: unmapping flushes the IOTLB at once;
    else (lazy) a batch of 256 unmappings shares one flush, and until then an access through what is unmapped
    meets a stale entry: it is refused and counted, where hardware would have served it.
    """

    iommu = True

    def __init__(self, *, first: int = PAGE_SIZE, last: int = APERTURE_LAST, strict: bool = True) -> None:
        super().__init__(first, last, 0 if strict else lib.PM_DOMAIN_LAZY)
        self.first, self.last, self.strict = first, last, strict
        if first <= MSI_WINDOW[1] and MSI_WINDOW[0] <= last:
            self.reserve(max(first, MSI_WINDOW[0]), min(last, MSI_WINDOW[1]))

    def reserve(self, first: int, last: int) -> None:
        """Never give out [first, last], bytes. EBUSY when some of it is in use; ENOSPC beyond 64 windows."""
        ret = lib.pm_iova_reserve(lib.pm_domain_iovas(self.native), first, last)
        why, hint = _RESERVE.get(-ret, ("cannot be reserved", None))
        checked(ret, f"reserve: [{first:#x}, {last:#x}] {why}", hint=hint)

    def iova_stats(self) -> dict[str, int]:
        """``struct pm_iova_stats``: what is given out, cached in magazines, reserved and unused."""
        found = ffi.new("struct pm_iova_stats *")
        checked(lib.pm_iova_stats(lib.pm_domain_iovas(self.native), found), "iova_stats")
        return {name: getattr(found, name) for name, _ in ffi.typeof(found[0]).fields}


class DirectDomain(DmaDomain):
    """No IOMMU: the DMA address of a page is its physical one, so PFNs must be visible (CAP_SYS_ADMIN)."""

    iommu = False

    def __init__(self) -> None:
        super().__init__(0, (1 << 64) - 1, lib.PM_DOMAIN_DIRECT)


def domain_of(iommu: bool | DmaDomain) -> DmaDomain:
    """What ``Device(iommu=)`` names: a domain, or True for one of its own, False for none."""
    if isinstance(iommu, DmaDomain):
        return iommu
    return IommuDomain() if iommu else DirectDomain()


_RESERVE = {
    errno.EBUSY: ("is in use", "unmap what domain.mappings() shows there first, or reserve before mapping"),
    errno.EINVAL: ("is no interval", "give the first and the last byte, within 64 bits"),
    errno.ENOSPC: ("is one window too many", "reserve fewer windows, larger ones"),
}


def checked(ret: int, what: str, hint: str | None = None) -> int:
    """check(), with the ESRCH of a forked child told in full."""
    if ret == -errno.ESRCH:
        raise inherited(what)
    return check(ret, what, hint=hint)


def inherited(what: str) -> MirrorError:
    """ESRCH for a domain that a forked child has inherited."""
    return MirrorError(
        errno.ESRCH,
        f"{what}: the DMA domain belongs to the process that this one was forked from",
        hint="make a new Device in this process, and open a new AddressSpace",
    )
