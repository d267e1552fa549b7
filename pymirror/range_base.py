# SPDX-License-Identifier: MIT
"""RangeBase: what a mirrored range and pinned pages have in common, and all that mapping for DMA needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .dma.record import DmaMapping
    from .mm import AddressSpace
    from .pfn import PfnArray


class RangeBase:
    """Pages [start, end) of an mm, and a pfn for each.

    ``hmm_range_dma_map()`` and ``gup_range_dma_map()`` share this base: the one adds to it a notifier and a
    sequence number, the other pages that are held.
    """

    __slots__ = ("_dma_mappings",)

    mm: AddressSpace
    start: int
    end: int
    #: What is mapped, by cookie, for every device; callbacks take it out in other threads.
    _dma_mappings: dict[int, DmaMapping]

    def _dma_pages(self) -> PfnArray:
        """HMM pfns, one a 4 KiB page; those without HMM_PFN_VALID are not mapped."""
        raise NotImplementedError

    def _dma_source(self, options: Any, seq: int) -> None:
        """Say in a ``struct pm_dmap_options`` how a device reaches the pages."""
        raise NotImplementedError

    def _dma_stands(self, seq: int) -> bool:
        """Whether a mapping made under ``seq`` can be handed out, now that callbacks can find it."""
        return True
