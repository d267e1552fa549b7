# SPDX-License-Identifier: MIT
"""What dma-debug records of a mapping: ``struct dma_debug_entry``."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol

from .direction import DmaDirection
from .record import Site

if TYPE_CHECKING:
    from .record import DmaMapping


class DmaType(StrEnum):
    """What a mapping was made as; the last four are not streaming mappings of the driver's memory."""

    SINGLE = "single"
    PAGE = "page"
    SG = "scatter-gather"
    COHERENT = "coherent"
    IOVA = "iova"
    HMM = "hmm"
    GUP = "gup"


@dataclass(slots=True, eq=False)
class DmaEntry:
    """``struct dma_debug_entry``: the record of a mapping, or of one segment of a scatterlist's.

    ``address`` is the DMA address, ``size`` bytes, ``cpu_addr`` the process address (0: not the driver's own
    memory), ``site`` the line that made it. ``nents`` is how many entries the list had. ``checked``:
    dma_mapping_error() was asked. ``backing`` is what unmap undoes, ``syncs`` the bounce buffer's copies.
    """

    address: int
    size: int
    direction: DmaDirection
    type: DmaType
    site: Site
    cpu_addr: int = 0
    nents: int = 1
    checked: bool = True
    backing: Backed | None = None
    syncs: Any = None
    number: int = 0
    place: Any = None
    lines: Any = None

    def is_meant(self, size: int, direction: DmaDirection, type_: DmaType, cpu_addr: int, nents: int) -> bool:
        """Whether an unmapping call with these arguments is beyond reproach."""
        return (
            self.size == size
            and self.direction is direction
            and self.type is type_
            and self.checked
            and (self.nents == nents or type_ is not DmaType.SG)
            and (self.cpu_addr == cpu_addr or type_ is not DmaType.COHERENT)
        )

    @property
    def mappings(self) -> list[DmaMapping]:
        """The DmaMappings behind it, in order of address."""
        return self.backing.mappings if self.backing is not None else []


class Backed(Protocol):
    """What an entry is the record of. One may have several entries."""

    @property
    def mappings(self) -> list[DmaMapping]: ...

    def unmap(self, direction: DmaDirection | None) -> None:
        """Idempotent. With a direction, what the device wrote is copied back from bounce buffers."""
