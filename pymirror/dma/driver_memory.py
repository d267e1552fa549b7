# SPDX-License-Identifier: MIT
"""What a device needs for the mappings of driver memory: limits, the bounce pool, the record, the release."""

from __future__ import annotations

import errno
import os
import warnings
from collections import deque
from types import TracebackType
from typing import TYPE_CHECKING, Self

from ..errors import MirrorError
from .debug import DmaDebug
from .domain import inherited
from .entry import DmaEntry, DmaType
from .parameters import MAX_SEGMENT_SIZE, SEGMENT_BOUNDARY
from .report import DmaDebugReport
from .swiotlb import SwiotlbPool, default_pool

if TYPE_CHECKING:
    from .domain import DmaDomain
    from .record import DmaMapping


class DriverMemory:
    """The part of a device that the DMA API's mappings of driver memory work with.

    ``max_segment_size`` and ``segment_boundary`` limit the segments of scatterlists; ``coherent_dma_mask`` is
    the mask for dma_alloc_coherent(). ``dma_debug`` has the record of what is mapped, ``dma_errors`` the last
    1024 reports of dma-debug.
    """

    name: str
    dma_mask: int
    _domain: DmaDomain | None

    def _init_driver_memory(self, name: str, swiotlb: SwiotlbPool | None) -> None:
        self.max_segment_size = MAX_SEGMENT_SIZE
        self.segment_boundary = SEGMENT_BOUNDARY
        self.dma_debug = DmaDebug(name)
        self.released = False
        self._owner = os.getpid()
        self._swiotlb = swiotlb
        self._coherent_dma_mask: int | None = None
        self._sees_pfns = False

    @property
    def domain(self) -> DmaDomain:
        raise NotImplementedError

    @property
    def swiotlb(self) -> SwiotlbPool:
        """The bounce pool that it uses without an IOMMU."""
        if self._swiotlb is None:
            self._swiotlb = default_pool()
        return self._swiotlb

    @property
    def coherent_dma_mask(self) -> int:
        """dma_mask, until it is set."""
        return self.dma_mask if self._coherent_dma_mask is None else self._coherent_dma_mask

    @coherent_dma_mask.setter
    def coherent_dma_mask(self, mask: int) -> None:
        self._coherent_dma_mask = mask

    @property
    def dma_errors(self) -> deque[DmaDebugReport]:
        """The last reports of DMA API debugging, oldest first; each is a driver's bug."""
        return self.dma_debug.reports

    def release(self) -> list[DmaDebugReport]:
        """The driver lets go of the device: what is still mapped is reported as leaked, then unmapped.

        Returns the reports, one for each mapping. Nothing can be mapped for it afterwards. Idempotent, and
        again does what Ctrl-C left undone. ESRCH in a forked child.
        """
        if self.released and not self._has_mappings():
            return []
        self._check_here(f"{self.name}: release")
        self.released = True
        entries = list(self.dma_debug.mappings())
        own = {id(mapping) for entry in entries for mapping in entry.mappings}
        others = [one for one in self._mapped() if id(one) not in own]
        leaks = self.dma_debug.leaks(_entry_of(one) for one in others)
        for entry in entries:
            self.dma_debug.end(entry, None)
        for mapping in others:
            mapping.unmap()
        return leaks

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.release()

    def __del__(self) -> None:
        if getattr(self, "released", True) or self._owner != os.getpid():
            return
        # Of a closed address space nothing is left to lose.
        if not len(self.dma_debug) and all(one.mm is not None and one.mm.closed for one in self._mapped()):
            return
        leaks = self.release()
        places = ", ".join(sorted({str(leak.mapped) for leak in leaks}))
        text = f"{self.name}: not released, {len(leaks)} DMA mapping(s) leaked; mapped at {places}"
        warnings.warn(text, ResourceWarning, stacklevel=1, source=self)

    def _check_here(self, what: str) -> None:
        """ESRCH in a forked child: the mappings are the parent's."""
        if self._owner != os.getpid():
            raise inherited(what)

    def _check_bound(self, what: str) -> None:
        """ESRCH in a forked child; ENODEV once it is released."""
        self._check_here(what)
        if self.released:
            raise MirrorError(errno.ENODEV, f"{what}: the device is released", hint="make a new Device")

    def _require_pfns(self, what: str) -> None:
        raise NotImplementedError

    def _need_pfns(self) -> None:
        """FeatureError when PFNs are not to be seen. It takes a while to find out, so it is done once."""
        if not self._sees_pfns:
            self._require_pfns(f"{self.name}: DMA without an IOMMU")
            self._sees_pfns = True

    def _has_mappings(self) -> bool:
        return bool(len(self.dma_debug) or self._mapped())

    def _mapped(self) -> list[DmaMapping]:
        domain = self._domain
        return [] if domain is None else [one for one in domain.mappings() if one.device is self]


def _entry_of(mapping: DmaMapping) -> DmaEntry:
    """The record of a mapping that another part of pymirror made."""
    kind = DmaType(mapping.kind) if mapping.kind in set(DmaType) else DmaType.HMM
    return DmaEntry(mapping.iova, mapping.size, mapping.direction, kind, mapping.site, mapping.start)
