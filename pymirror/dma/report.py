# SPDX-License-Identifier: MIT
"""What dma-debug reports: the categories, the report, and the error of a call that cannot be done."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from ..errors import MirrorError
from .direction import DmaDirection
from .record import Site


class DmaDebugCategory(StrEnum):
    """The checks of the kernel's kernel/dma/debug.c and, the last four, of its IOMMU code."""

    LEAK = "leak"
    FREE_INVALID = "free-invalid"
    FREE_UNALLOCATED = "free-unallocated"
    SIZE_MISMATCH = "size-mismatch"
    TYPE_MISMATCH = "type-mismatch"
    CPU_ADDRESS_MISMATCH = "cpu-address-mismatch"
    DIRECTION_MISMATCH = "direction-mismatch"
    SG_NENTS_MISMATCH = "sg-nents-mismatch"
    MAP_ERROR_UNCHECKED = "map-error-unchecked"
    MAP_STACK = "map-stack"
    MAP_TEXT = "map-text"
    MAP_OVERLAP = "map-overlap"
    SYNC_UNALLOCATED = "sync-unallocated"
    SYNC_BEYOND = "sync-beyond"
    SYNC_DIRECTION = "sync-direction"
    SEGMENT_LENGTH = "segment-length"
    SEGMENT_BOUNDARY = "segment-boundary"
    MASK_EXCEEDED = "mask-exceeded"
    IOVA_NOT_LINKED = "iova-not-linked"
    IOVA_LINKED_TWICE = "iova-linked-twice"
    IOVA_STILL_LINKED = "iova-still-linked"

    @property
    def refused(self) -> int:
        """The errno of the call, 0 where it goes on after the report.

        The kernel only warns, and then does what corrupts memory, or nothing at all. Here a call that cannot
        be done as it was asked for is refused and changes nothing.
        """
        return _REFUSED.get(self, 0)


_REFUSED = {
    DmaDebugCategory.FREE_INVALID: errno.EINVAL,
    DmaDebugCategory.FREE_UNALLOCATED: errno.EINVAL,
    DmaDebugCategory.SIZE_MISMATCH: errno.EINVAL,
    DmaDebugCategory.TYPE_MISMATCH: errno.EINVAL,
    DmaDebugCategory.CPU_ADDRESS_MISMATCH: errno.EINVAL,
    DmaDebugCategory.SYNC_UNALLOCATED: errno.EINVAL,
    DmaDebugCategory.SYNC_BEYOND: errno.EINVAL,
    DmaDebugCategory.IOVA_NOT_LINKED: errno.EINVAL,
    DmaDebugCategory.IOVA_LINKED_TWICE: errno.EEXIST,
    DmaDebugCategory.IOVA_STILL_LINKED: errno.EBUSY,
}
_HINTS = {
    DmaDebugCategory.FREE_INVALID: "unmap only what dma_mapping_error() found to be mapped",
    DmaDebugCategory.FREE_UNALLOCATED: "unmap once, with the address that mapping returned; a range has"
    " hmm_range_dma_unmap() or gup_range_dma_unmap()",
    DmaDebugCategory.SIZE_MISMATCH: "give the size that was mapped",
    DmaDebugCategory.TYPE_MISMATCH: "undo it by the counterpart of the function that mapped it",
    DmaDebugCategory.CPU_ADDRESS_MISMATCH: "give the view and the address of one dma_alloc_coherent()",
    DmaDebugCategory.SYNC_UNALLOCATED: "sync between mapping and unmapping; ranges need no syncs",
    DmaDebugCategory.SYNC_BEYOND: "sync the mapping, or a part of it",
    DmaDebugCategory.IOVA_NOT_LINKED: "unlink once, what dma_iova_link() linked",
    DmaDebugCategory.IOVA_LINKED_TWICE: "dma_iova_unlink() it first, or link behind it",
    DmaDebugCategory.IOVA_STILL_LINKED: "dma_iova_unlink() all of it first, or dma_iova_destroy()",
}


@dataclass(frozen=True, slots=True)
class DmaDebugReport:
    """One bug of a driver: what, where it was found, and where the mapping that it is about was made.

    ``device`` is the device's name, ``address`` a DMA address, ``size`` bytes, ``type`` the kind of mapping
    ("single", "page", "scatter-gather", "coherent", "iova", "hmm", "gup"). ``mapped`` is None where there is
    no mapping.
    """

    category: DmaDebugCategory
    device: str
    address: int
    size: int
    direction: DmaDirection
    type: str
    mapped: Site | None
    detected: Site
    text: str

    def __str__(self) -> str:
        where = f"; mapped at {self.mapped}" if self.mapped else ""
        return (
            f"{self.device}: DMA-API: {self.text} [device address={self.address:#018x}]"
            f" [size={self.size} bytes] [direction={self.direction}] [mapped as {self.type}]{where};"
            f" found at {self.detected}"
        )


class DmaDebugError(MirrorError):
    """A call of the DMA API that cannot be done as it was asked for. Nothing is changed. ``report`` tells."""

    def __init__(self, report: DmaDebugReport) -> None:
        super().__init__(report.category.refused, str(report), hint=_HINTS[report.category])
        self.addr = report.address
        self.report = report

    def __reduce__(self) -> tuple[Any, ...]:
        return (DmaDebugError, (self.report,))
