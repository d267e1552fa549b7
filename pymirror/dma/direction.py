# SPDX-License-Identifier: MIT
"""``enum dma_data_direction`` and the numbers that drivers compare DMA addresses with."""

from __future__ import annotations

import errno
from enum import IntEnum

from ..arguments import integer, shown, wrong
from ..errors import MirrorError


class DmaDirection(IntEnum):
    """Which way data goes: a device may read what is mapped TO_DEVICE, and write what is FROM_DEVICE."""

    BIDIRECTIONAL = 0
    TO_DEVICE = 1
    FROM_DEVICE = 2
    NONE = 3

    @property
    def device_reads(self) -> bool:
        """Whether the device may read."""
        return self in (DmaDirection.BIDIRECTIONAL, DmaDirection.TO_DEVICE)

    @property
    def device_writes(self) -> bool:
        """Whether the device may write."""
        return self in (DmaDirection.BIDIRECTIONAL, DmaDirection.FROM_DEVICE)

    def __str__(self) -> str:
        return f"DMA_{self.name}"


DMA_BIDIRECTIONAL = DmaDirection.BIDIRECTIONAL
DMA_TO_DEVICE = DmaDirection.TO_DEVICE
DMA_FROM_DEVICE = DmaDirection.FROM_DEVICE
DMA_NONE = DmaDirection.NONE

#: What dma_map_single() and dma_map_page() give when there was no room; see dma_mapping_error().
DMA_MAPPING_ERROR = (1 << 64) - 1


def DMA_BIT_MASK(n: int) -> int:  # noqa: N802
    """The mask of a device with n address lines."""
    if not 0 <= (n := integer("DMA_BIT_MASK", "n", n)) <= 64:
        raise wrong("DMA_BIT_MASK", "n", n, "a number of bits, 0 to 64")
    return (1 << n) - 1


def check_direction(what: str, direction: int) -> DmaDirection:
    """EINVAL unless it is one that data can go."""
    if isinstance(direction, DmaDirection) and direction is not DmaDirection.NONE:
        return direction
    if direction in (DmaDirection.BIDIRECTIONAL, DmaDirection.TO_DEVICE, DmaDirection.FROM_DEVICE):
        return DmaDirection(direction)
    raise MirrorError(
        errno.EINVAL,
        f"{what}: {shown(direction)} is no direction of data",
        hint="DMA_TO_DEVICE, DMA_FROM_DEVICE or DMA_BIDIRECTIONAL",
    )
