# SPDX-License-Identifier: MIT
"""Streaming mappings of the driver's own memory: dma_map_single(), dma_map_page(), their syncs and unmaps.

Signatures are the kernel's, with a buffer for the pointer. A mapping keeps an export of the buffer.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from ..arguments import device_call, integer
from ..errors import MirrorError
from .direction import DMA_MAPPING_ERROR, DmaDirection, check_direction
from .entry import DmaEntry, DmaType
from .memory import PAGE_SIZE, Export, map_memory
from .record import Site
from .report import DmaDebugCategory

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from .device import DmaDevice

#: The CPU's view is left as it is: no copy at unmap. For who calls dma_sync_*() itself.
DMA_ATTR_SKIP_CPU_SYNC = 1 << 5


def dma_map_single(
    device: DmaDevice, ptr: Buffer, size: int, direction: int, *, attrs: int = 0, offset: int = 0
) -> int:
    """Map ``size`` bytes of a buffer, from ``offset`` on, for the device. Returns the DMA address.

    DMA_MAPPING_ERROR when there is no room (IOVAs, bounce slots) or no way (the mask): ask
    dma_mapping_error(). EINVAL: no such piece of the buffer, or no direction. EFAULT: read-only memory that
    the device would write to. FeatureError: without an IOMMU PFNs are needed. Until it is unmapped the buffer
    can neither be freed nor resized, and is the device's.
    """
    return _map(device, ptr, offset, size, direction, DmaType.SINGLE)


def dma_map_page(
    device: DmaDevice, page: Buffer, offset: int, size: int, direction: int, *, attrs: int = 0
) -> int:
    """As dma_map_single(), of memory that begins with a page: EINVAL for other buffers."""
    return _map(device, page, offset, size, direction, DmaType.PAGE)


def dma_unmap_single(device: DmaDevice, addr: int, size: int, direction: int, *, attrs: int = 0) -> None:
    """End a mapping: no access is under way any more, and what the device wrote is the CPU's to read.

    DmaDebugError (EINVAL) when the address or the size is not that of a mapping; nothing is changed then.
    """
    _unmap(device, addr, size, direction, DmaType.SINGLE, attrs)


def dma_unmap_page(device: DmaDevice, addr: int, size: int, direction: int, *, attrs: int = 0) -> None:
    """As dma_unmap_single()."""
    _unmap(device, addr, size, direction, DmaType.PAGE, attrs)


def dma_mapping_error(device: DmaDevice, addr: int) -> bool:
    """Whether mapping failed. Drivers must ask for each address that they get, before they use it."""
    what = device_call(device, "dma_mapping_error")
    return device.dma_debug.mapping_error(integer(what, "addr", addr))


def dma_sync_single_for_cpu(device: DmaDevice, addr: int, size: int, direction: int) -> None:
    """The CPU may read what the device wrote so far; ``addr`` and ``size`` may be a part of the mapping.

    DmaDebugError (EINVAL) when they are not within one mapping.
    """
    entry = _part(device, addr, size, direction, for_cpu=True)
    if entry.syncs is not None:
        entry.syncs.sync_for_cpu(entry.direction, addr - entry.address, size)


def dma_sync_single_for_device(device: DmaDevice, addr: int, size: int, direction: int) -> None:
    """The device may read what the CPU wrote so far. As dma_sync_single_for_cpu()."""
    entry = _part(device, addr, size, direction, for_cpu=False)
    if entry.syncs is not None:
        entry.syncs.sync_for_device(entry.direction, addr - entry.address, size)


def check_piece(what: str, export: Export, offset: int, size: int) -> None:
    """EINVAL unless it is a piece of the buffer, of a byte at least."""
    if offset >= 0 and size > 0 and offset + size <= export.size:
        return
    raise MirrorError(
        errno.EINVAL,
        f"{what}: {size} bytes from {offset} on are no piece of a buffer of {export.size}",
        hint="give an offset and a size within the buffer",
    )


def _map(device: DmaDevice, ptr: Buffer, offset: int, size: int, direction: int, type_: DmaType) -> int:
    what = device_call(device, f"dma_map_{type_}")
    device._check_bound(what)
    way = check_direction(what, direction)
    offset, size = integer(what, "offset", offset), integer(what, "size", size)
    export = Export(what, ptr, writable=way.device_writes)
    check_piece(what, export, offset, size)
    if type_ is DmaType.PAGE and export.addr % PAGE_SIZE:
        raise MirrorError(
            errno.EINVAL,
            f"{what}: the memory at {export.addr:#x} does not begin with a page",
            addr=export.addr,
            hint="dma_map_single() takes any buffer",
        )
    addr = export.addr + offset
    here = Site.of_caller()
    backing = map_memory(device, type_.value, addr, size, way, here)
    if backing is None:
        no_address(device, type_, addr, size, way)
        return DMA_MAPPING_ERROR
    backing.keep = export
    entry = DmaEntry(
        backing.address, size, way, type_, here, addr, checked=False, backing=backing, syncs=backing
    )
    device.dma_debug.add_all([entry], backing)
    return backing.address


def no_address(device: DmaDevice, type_: DmaType, addr: int, size: int, way: DmaDirection) -> None:
    """Report memory that the device cannot address, as the kernel does; being out of room is no bug."""
    if device.domain.iommu or device.swiotlb.bus_last <= device.dma_mask:
        return
    device.dma_debug.report(
        DmaDebugCategory.MASK_EXCEEDED,
        DmaEntry(DMA_MAPPING_ERROR, size, way, type_, Site.of_caller(), addr),
        f"neither memory at {addr:#x} nor the bounce pool up to {device.swiotlb.bus_last:#x} is within the"
        f" mask {device.dma_mask:#x} of the device",
    )


def _unmap(device: DmaDevice, addr: int, size: int, direction: int, type_: DmaType, attrs: int) -> None:
    what = device_call(device, f"dma_unmap_{type_}")
    device._check_here(what)
    way = check_direction(what, direction)
    addr, size = integer(what, "addr", addr), integer(what, "size", size)
    entry = device.dma_debug.check_unmap(addr, size, way, type_)
    device.dma_debug.end(entry, None if attrs & DMA_ATTR_SKIP_CPU_SYNC else entry.direction)


def _part(device: DmaDevice, addr: int, size: int, direction: int, *, for_cpu: bool) -> DmaEntry:
    what = device_call(device, "dma_sync_single")
    device._check_here(what)
    way = check_direction(what, direction)
    addr, size = integer(what, "addr", addr), integer(what, "size", size)
    return device.dma_debug.check_sync(addr, size, way, for_cpu=for_cpu)
