# SPDX-License-Identifier: MIT
"""What a device can do as the DMA API knows it: masks, segment limits, whether it needs bounces and syncs."""

from __future__ import annotations

import errno
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from ..arguments import check_device, device_call, integer
from ..errors import MirrorError
from .swiotlb import IO_TLB_SEGSIZE, IO_TLB_SIZE

if TYPE_CHECKING:
    from .device import DmaDevice

#: As a driver that sets nothing has it in the kernel: 64 KiB segments that cross no 4 GiB boundary.
MAX_SEGMENT_SIZE = 64 << 10
SEGMENT_BOUNDARY = (1 << 32) - 1


def check_mask(what: str, mask: int, number: int = errno.EIO) -> int:
    """An error unless the mask is all ones below its top bit and reaches at least a page."""
    if 0xFFF <= integer(what, "mask", mask) < 1 << 64 and mask & (mask + 1) == 0:
        return mask
    raise MirrorError(
        number,
        f"{what}: mask {mask:#x} is not all ones below its top bit",
        hint="give DMA_BIT_MASK(n), n from 12 to 64",
    )


def dma_set_mask(device: DmaDevice, mask: int) -> None:
    """Set the highest DMA address that the device can form. EIO for one that cannot be."""
    device.dma_mask = check_mask(device_call(device, "dma_set_mask"), mask)


def dma_set_coherent_mask(device: DmaDevice, mask: int) -> None:
    """The same for dma_alloc_coherent()."""
    device.coherent_dma_mask = check_mask(device_call(device, "dma_set_coherent_mask"), mask)


def dma_set_mask_and_coherent(device: DmaDevice, mask: int) -> None:
    """dma_set_mask() and dma_set_coherent_mask() in one. EIO, and neither is set."""
    dma_set_mask(device, mask)
    dma_set_coherent_mask(device, mask)


def dma_get_mask(device: DmaDevice) -> int:
    """The highest DMA address that the device can form."""
    check_device("dma_get_mask", device)
    return device.dma_mask


def dma_get_required_mask(device: DmaDevice) -> int:
    """The mask that reaches all memory: of the machine without an IOMMU, else of any page."""
    check_device("dma_get_required_mask", device)
    if device.domain.iommu:
        return (1 << 64) - 1
    return (1 << (_end_of_memory() - 1).bit_length()) - 1


def dma_set_max_seg_size(device: DmaDevice, size: int) -> None:
    """The bytes that a segment of a scatterlist may have at most."""
    what = device_call(device, "dma_set_max_seg_size")
    if integer(what, "size", size) <= 0:
        raise MirrorError(errno.EINVAL, f"{what}: {size} bytes", hint="give 1 or more")
    device.max_segment_size = size


def dma_get_max_seg_size(device: DmaDevice) -> int:
    """The bytes that a segment of a scatterlist has at most."""
    check_device("dma_get_max_seg_size", device)
    return device.max_segment_size


def dma_set_seg_boundary(device: DmaDevice, mask: int) -> None:
    """A segment must not cross a multiple of mask + 1 bytes, a power of two of at least a page."""
    what = device_call(device, "dma_set_seg_boundary")
    if integer(what, "mask", mask) < 0xFFF or mask & (mask + 1):
        raise MirrorError(
            errno.EINVAL,
            f"{what}: mask {mask:#x} is not all ones below its top bit",
            hint="give DMA_BIT_MASK(n), n at least 12",
        )
    device.segment_boundary = mask


def dma_get_seg_boundary(device: DmaDevice) -> int:
    """What dma_set_seg_boundary() set: no segment crosses a multiple of mask + 1 bytes."""
    check_device("dma_get_seg_boundary", device)
    return device.segment_boundary


def dma_addressing_limited(device: DmaDevice) -> bool:
    """Whether memory may have to be bounced: no IOMMU, and more memory than the mask reaches."""
    return dma_get_mask(device) < dma_get_required_mask(device) and not device.domain.iommu


def dma_need_sync(device: DmaDevice, addr: int) -> bool:
    """Whether dma_sync_*() does anything for the DMA address: it is one of a bounce buffer."""
    check_device("dma_need_sync", device)
    addr = integer("dma_need_sync", "addr", addr)
    return not device.domain.iommu and device.swiotlb.owns(addr)


def dma_max_mapping_size(device: DmaDevice) -> int:
    """The bytes that one mapping may have: 256 KiB where it might have to be bounced."""
    return IO_TLB_SIZE * IO_TLB_SEGSIZE if dma_addressing_limited(device) else (1 << 64) - 1


@cache
def _end_of_memory() -> int:
    """The first physical address behind all memory: holes below it count, as for a device."""
    text = Path("/proc/zoneinfo").read_text()
    spans = re.findall(r"spanned\s+(\d+).*?start_pfn:\s+(\d+)", text, re.DOTALL)
    return max(int(start) + int(spanned) for spanned, start in spans) << 12
