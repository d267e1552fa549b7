# SPDX-License-Identifier: MIT
"""DmaDevice: the side of a device that does DMA: which addresses it can form, and what translates them."""

from __future__ import annotations

import errno
import threading
from typing import TYPE_CHECKING

import numpy as np

from ..errors import MirrorError
from ..features import probe
from .domain import DmaDomain, domain_of
from .driver_memory import DriverMemory
from .engine import DmaEngine

if TYPE_CHECKING:
    from ..pfn import PfnArray
    from ..range_base import RangeBase
    from .record import DmaMapping
    from .swiotlb import SwiotlbPool

#: Physical addresses have 52 bits at most on x86-64.
_ALL_MEMORY = (1 << 52) - 1


class DmaDevice(DmaEngine, DriverMemory):
    """``struct device`` as the DMA API sees it.

    ``dma_mask``: the highest DMA address that it can form, all ones below its top bit. ``iommu``: True for an
    IommuDomain of its own, False for none (DMA addresses are physical), or a domain, which several devices
    may share. ``swiotlb``: the bounce pool, without an IOMMU, instead of the process's.
    """

    def __init__(
        self,
        name: str,
        *,
        dma_mask: int = (1 << 64) - 1,
        iommu: bool | DmaDomain = True,
        swiotlb: SwiotlbPool | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.dma_mask = _check_mask(name, dma_mask)
        self._iommu = iommu
        self._domain: DmaDomain | None = None
        self._range_mappings: dict[RangeBase, list[DmaMapping]] = {}
        self._ranges_lock = threading.Lock()
        self._init_driver_memory(name, swiotlb)

    @property
    def domain(self) -> DmaDomain:
        """What translates its DMA addresses, made when it is first wanted."""
        if self._domain is None:
            self._domain = domain_of(self._iommu)
        return self._domain

    def _add_range_mapping(self, rng: RangeBase, mapping: DmaMapping) -> None:
        """A range is mapped; it is kept alive until it is not."""
        with self._ranges_lock:
            self._range_mappings.setdefault(rng, []).append(mapping)

    def _range_mapping(self, rng: RangeBase, daddrs: PfnArray | None) -> DmaMapping | None:
        """The range's mapping that gave these DMA addresses, or its last one. EINVAL for others'."""
        with self._ranges_lock:
            found = list(self._range_mappings.get(rng, ()))
        if daddrs is None or not daddrs.any():
            return found[-1] if found and daddrs is None else None
        page = int(np.flatnonzero(daddrs)[0])
        for mapping in reversed(found):
            if mapping.gave(page, int(daddrs[page])):
                return mapping
        raise MirrorError(
            errno.EINVAL,
            f"{self.name}: no mapping of {rng!r} has the DMA address {int(daddrs[page]):#x} at page {page}",
            hint="give what the map call returned, or leave it out",
        )

    def _drop_range_mapping(self, rng: RangeBase, mapping: DmaMapping) -> None:
        """It is unmapped."""
        with self._ranges_lock:
            left = [one for one in self._range_mappings.get(rng, ()) if one is not mapping]
            if left:
                self._range_mappings[rng] = left
            else:
                self._range_mappings.pop(rng, None)

    def _check_mirrorable(self, what: str) -> None:
        """EOPNOTSUPP where bounce buffers would stand between the device and some pages."""
        if self.domain.iommu or self.dma_mask >= _ALL_MEMORY:
            return
        raise MirrorError(
            errno.EOPNOTSUPP,
            f"{what}: {self.name} has no IOMMU and reaches addresses up to {self.dma_mask:#x} only; a page"
            " that is bounced is a copy, and no mirror",
            hint=f"iommu=True, or dma_mask={_ALL_MEMORY:#x}",
        )

    def _require_pfns(self, what: str) -> None:
        """FeatureError when physical addresses are not to be seen."""
        probe().require("pfn", what)


def _check_mask(name: str, mask: int) -> int:
    if 0xFFF <= mask < 1 << 64 and mask & (mask + 1) == 0:
        return mask
    raise MirrorError(
        errno.EINVAL,
        f"{name}: dma_mask {mask:#x} is not all ones below its top bit",
        hint="give DMA_BIT_MASK(n), n from 12 to 64",
    )
