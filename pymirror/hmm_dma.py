# SPDX-License-Identifier: MIT
"""hmm_range_dma_map(): gup_range_dma_map() with a notifier in place of pins.

    notifier-specific preparation      fault the range: pages present, under a sequence number
    gup_range_dma_map(common base)     the same mapping as for pinned pages
    notifier-specific completion       nothing: the commit has compared the sequence under the device lock

No page is held. An invalidation fences the device's entries before the change (as far as its guarantee goes),
and the driver's callback unmaps them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .gup_dma import check_operands, gup_range_dma_map, gup_range_dma_unmap, pages_between
from .hmm_range import Range

if TYPE_CHECKING:
    from .dma.device import DmaDevice
    from .pfn import PfnArray


def hmm_range_dma_map(
    rng: Range, dev: DmaDevice, *, out: PfnArray | None = None, block: bool = True
) -> PfnArray:
    """hmm_range_dma_map() of 5.1: fault a registered range and map it for a device.

    Returns one DMA address a 4 KiB page, a uint64 array (``out``, if given), 0 where nothing is mapped: what
    was not asked for and is absent. Pages with HMM_PFN_WRITE are mapped both ways, others for reading.

    Errors of Range.fault(), and EBUSY: invalidated meanwhile, wait_until_valid() and go again; EFAULT: the
    mapping failed (IOVAs, or the device's mask). EOPNOTSUPP: a device that reaches only some pages would
    need a bounce buffer, and a copy of a page is no mirror of it. On an error nothing is mapped.
    """
    check_operands("hmm_range_dma_map", rng, dev, Range)
    dev._check_mirrorable("hmm_range_dma_map")
    seq = rng.fault(block)
    return gup_range_dma_map(rng, dev, out=out, seq=seq, kind="hmm")


def hmm_range_dma_unmap(
    rng: Range,
    dev: DmaDevice,
    daddrs: PfnArray | None = None,
    *,
    dirty: bool = False,
    start: int | None = None,
    end: int | None = None,
) -> int:
    """hmm_range_dma_unmap() of 5.1: off the device, entries that were fenced included. For callbacks too.

    As gup_range_dma_unmap(), and ``rng.pfns`` becomes NONE there. A device write has marked its page dirty
    by itself, so ``dirty`` only counts.
    """
    check_operands("hmm_range_dma_unmap", rng, dev, Range)
    taken = gup_range_dma_unmap(rng, dev, daddrs, dirty=dirty, start=start, end=end, kind="hmm")
    first, last = pages_between("hmm_range_dma_unmap", rng, start, end)
    rng._forget(first, last - first)
    return taken
