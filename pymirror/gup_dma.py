# SPDX-License-Identifier: MIT
"""gup_range_dma_map(): mapping the pages of a range for a device, whatever keeps them from going away.

This is what mirroring and pinning drivers share: IOVAs, IOMMU entries, bookkeeping. Nothing here knows of
notifiers: how a device reaches a page, and what ends that, the range itself says (RangeBase).
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import numpy as np

from . import trace
from ._shim import ffi
from .arguments import integer, shown
from .dma.device import DmaDevice
from .dma.direction import DMA_BIDIRECTIONAL
from .dma.record import DmaMapping
from .errors import MirrorError, error
from .range_base import RangeBase
from .walk import PAGE_SHIFT, check_pfns

if TYPE_CHECKING:
    from .pfn import PfnArray


def gup_range_dma_map(
    rng: RangeBase, dev: DmaDevice, *, out: PfnArray | None = None, seq: int = 0, kind: str = "gup"
) -> PfnArray:
    """Map the valid pages of a range for a device: one DMA address a 4 KiB page, 0 where nothing is mapped.

    Pages with HMM_PFN_WRITE are mapped both ways, others for reading. ``out`` is a uint64 array to fill
    instead of a new one.

    EFAULT: the mapping failed: no IOVAs are left below the device's mask, or, without an IOMMU, a page is
    beyond it. EBUSY: a mirrored range was invalidated since ``seq``. EINVAL; ENOMEM; ESRCH. On an error
    nothing is mapped.
    """
    check_operands(f"{kind}_range_dma_map", rng, dev)
    pages = rng._dma_pages()
    daddrs = np.empty(pages.size, np.uint64) if out is None else out
    check_pfns(f"{kind}_range_dma_map: out", daddrs, pages.size)
    options = ffi.new("struct pm_dmap_options *")
    options.start, options.n = rng.start, pages.size
    options.daddrs = ffi.from_buffer("uint64_t[]", daddrs)
    rng._dma_source(options, seq)
    made: dict[int, DmaMapping] = {}
    try:
        DmaMapping(dev, kind, DMA_BIDIRECTIONAL, options, mm=rng.mm, owner=rng, into=made)
        rng._dma_mappings.update(made)
        if not rng._dma_stands(seq):
            raise error(errno.EBUSY, f"{kind}_range_dma_map")
    except BaseException as failed:
        for mapping in made.values():
            _take_down(rng, mapping)
            daddrs[:] = 0
        if isinstance(failed, MirrorError):
            raise _failure(kind, rng, dev, failed) from None
        raise
    return daddrs


def gup_range_dma_unmap(
    rng: RangeBase,
    dev: DmaDevice,
    daddrs: PfnArray | None = None,
    *,
    dirty: bool = False,
    start: int | None = None,
    end: int | None = None,
    kind: str = "gup",
) -> int:
    """Unmap what gup_range_dma_map() mapped; returns how many pages were mapped still. For callbacks too.

    ``daddrs`` is what it returned, and is zeroed where unmapped; without it the range's last mapping for the
    device is meant. [``start``, ``end``), page-aligned bytes, limits it to a part; the mapping is gone with
    its last page. ``dirty`` counts the pages that a device could write to as dirtied. 0 when nothing is
    mapped, or the interval and the range have no page in common: a callback is told of changes of the whole
    address space. EINVAL for an interval that is reversed or not of whole pages, or a foreign ``daddrs``.
    """
    check_operands(f"{kind}_range_dma_unmap", rng, dev)
    first, last = pages_between(f"{kind}_range_dma_unmap", rng, start, end)
    if daddrs is not None:
        check_pfns(f"{kind}_range_dma_unmap: daddrs", daddrs, (rng.end - rng.start) >> PAGE_SHIFT)
    mapping = _mapping_of(rng, dev, daddrs)
    if mapping is None or first == last:
        return 0
    if first == 0 and last == mapping.npages:
        taken, writable = _take_down(rng, mapping)
    else:
        taken, writable = mapping.unlink(first, last - first)
        if not mapping.info().linked:
            _take_down(rng, mapping)
    if dirty:
        mapping.dirtied(writable)
    if daddrs is not None:
        daddrs[first:last] = 0
    return taken


def _mapping_of(rng: RangeBase, dev: DmaDevice, daddrs: PfnArray | None) -> DmaMapping | None:
    """The range's mapping that gave these DMA addresses, or its last one. EINVAL for others'."""
    found = [mapping for mapping in list(rng._dma_mappings.values()) if mapping.device is dev]
    if daddrs is None or not daddrs.any():
        return found[-1] if found and daddrs is None else None
    page = int(np.flatnonzero(daddrs)[0])
    for mapping in reversed(found):
        if mapping.gave(page, int(daddrs[page])):
            return mapping
    raise MirrorError(
        errno.EINVAL,
        f"{dev.name}: no mapping of {rng!r} has the DMA address {int(daddrs[page]):#x} at page {page}",
        hint="give what the map call returned, or leave it out",
    )


def _take_down(rng: RangeBase, mapping: DmaMapping) -> tuple[int, int]:
    """Unmap it all, and forget it only then; as DmaMapping.unmap()."""
    taken = mapping.unmap()
    rng._dma_mappings.pop(mapping.cookie, None)
    return taken


def check_operands(what: str, rng: RangeBase, dev: DmaDevice, kind: type[RangeBase] = RangeBase) -> None:
    """EINVAL unless it is a range of that kind, and a device."""
    # What it was made with may be missing from a half-built one.
    if isinstance(rng, kind) and isinstance(dev, DmaDevice) and hasattr(dev, "dma_debug"):
        return
    pinned = isinstance(rng, RangeBase) and isinstance(dev, DmaDevice)
    raise MirrorError(
        errno.EINVAL,
        f"{what}: {shown(rng)} for {shown(dev)}",
        hint=f"{what.replace('hmm_', 'gup_')}() is for pinned pages"
        if pinned
        else "give a Range of a mirror, or pinned pages, and a Device, in this order",
    )


def pages_between(what: str, rng: RangeBase, start: int | None, end: int | None) -> tuple[int, int]:
    """The range's pages in [start, end), as indices; the same twice if there are none."""
    first = rng.start if start is None else integer(what, "start", start)
    last = rng.end if end is None else integer(what, "end", end)
    if first % (1 << PAGE_SHIFT) or last % (1 << PAGE_SHIFT) or first > last:
        raise MirrorError(
            errno.EINVAL,
            f"{what}: [{first:#x}, {last:#x}) of {rng!r}: reversed, or not of whole pages",
            addr=rng.start,
            vma=rng.mm._vma_for_error(rng.start),
            hint="give page-aligned bytes, the first and the one after the last, or leave start and end out",
        )
    first, last = (min(max(addr, rng.start), rng.end) for addr in (first, last))
    return (first - rng.start) >> PAGE_SHIFT, (last - rng.start) >> PAGE_SHIFT


def _failure(kind: str, rng: RangeBase, dev: DmaDevice, failed: MirrorError) -> MirrorError:
    what = f"{kind}_range_dma_map of [{rng.start:#x}, {rng.end:#x}) for {dev.name}"
    if failed.errno == errno.EBUSY:
        trace.instant(trace.Track.RETRY, f"{kind}_range_dma_map: invalidated", rng.mm, rng.start, rng.end)
        hint = "wait_until_valid(), then go again"
        why = "invalidated meanwhile, nothing is mapped"
        return MirrorError(
            errno.EBUSY, f"{what}: {why}", addr=rng.start, vma=rng.mm._vma_for_error(rng.start), hint=hint
        )
    if failed.errno == errno.ENOSPC:
        why, hint = "no IOVAs are left", "unmap something, or give the device a wider dma_mask or aperture"
    elif failed.errno == errno.EFAULT:
        why = f"a page is beyond the device's mask {dev.dma_mask:#x}"
        hint = "give the device an IOMMU, or a wider dma_mask"
    else:
        return failed
    vma = rng.mm._vma_for_error(rng.start)
    return MirrorError(errno.EFAULT, f"{what}: {why}, nothing is mapped", addr=rng.start, vma=vma, hint=hint)
