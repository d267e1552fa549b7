# SPDX-License-Identifier: MIT
"""DmaDevice: the side of a device that does DMA: which addresses it can form, and what translates them."""

from __future__ import annotations

import errno

from ..arguments import shown
from ..errors import MirrorError
from ..features import probe
from .domain import DmaDomain, domain_of
from .driver_memory import DriverMemory
from .engine import DmaEngine
from .parameters import check_mask
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
        self.dma_mask = check_mask(f"{name}: dma_mask", dma_mask, errno.EINVAL)
        if not isinstance(iommu, bool | DmaDomain) or not isinstance(swiotlb, SwiotlbPool | None):
            raise MirrorError(
                errno.EINVAL,
                f"{name}: iommu={shown(iommu)}, swiotlb={shown(swiotlb)}",
                hint="iommu is True, False or a domain, swiotlb a SwiotlbPool",
            )
        self._iommu = iommu
        self._domain: DmaDomain | None = None
        self._made_domains: list[DmaDomain] = []
        self._init_driver_memory(name, swiotlb)

    @property
    def domain(self) -> DmaDomain:
        """What translates its DMA addresses, made when it is first wanted."""
        if self._domain is None:
            # Of two threads that make one each, both take the first.
            self._made_domains.append(domain_of(self._iommu))
            self._domain = self._made_domains[0]
        return self._domain

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
