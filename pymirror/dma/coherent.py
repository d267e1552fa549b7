# SPDX-License-Identifier: MIT
"""Coherent memory: what the CPU and the device both see at all times, without a sync."""

from __future__ import annotations

import ctypes
import errno
import mmap
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from .._shim import ffi
from ..arguments import device_call, integer
from ..errors import MirrorError
from .direction import DmaDirection
from .entry import DmaEntry, DmaType
from .memory import PAGE_SIZE, is_reachable, map_pages, map_slots, physical_pages, unless_no_room
from .record import DmaMapping, Site

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from .device import DmaDevice

_BOTH = DmaDirection.BIDIRECTIONAL
#: A child finds zeroes there. Left out of it (MADV_DONTFORK), the addresses would go to something else, which
#: the end of this memory would unmap.
_MADV_WIPEONFORK = 18


def dma_alloc_coherent(device: DmaDevice, size: int) -> tuple[memoryview, int]:
    """Memory of size bytes, zeroed, in whole pages: the CPU's view of it, and its DMA address.

    Without an IOMMU memory of more than a page in one piece comes out of the bounce pool, 256 KiB at most.
    ENOMEM: no room. EINVAL: no size. FeatureError: without an IOMMU PFNs are needed.
    """
    what = device_call(device, "dma_alloc_coherent")
    device._check_bound(what)
    if integer(what, "size", size) <= 0:
        raise MirrorError(errno.EINVAL, f"{what}: {size} bytes", hint="give a size in bytes")
    memory = _alloc(device, -(-size // PAGE_SIZE) * PAGE_SIZE)
    if memory is None:
        raise MirrorError(
            errno.ENOMEM,
            f"{what}: no room for {size} bytes within mask {device.coherent_dma_mask:#x}",
            hint="without an IOMMU ask for 256 KiB at most; free what is done with",
        )
    address = memory.mapping.iova
    entry = DmaEntry(
        address, size, _BOTH, DmaType.COHERENT, Site.of_caller(), memory.cpu_addr, backing=memory
    )
    device.dma_debug.add_all([entry], memory)
    return memory.view[:size], address


def dma_free_coherent(device: DmaDevice, size: int, cpu: Buffer, dma_handle: int) -> None:
    """Free it, with the size that was asked for and the view that was given, or an array of all of it.

    The device reaches it no more, and ``cpu`` is released. Where arrays or other views of it live, the memory
    stays until the last of them is gone. DmaDebugError (EINVAL) when size, view or address are others;
    nothing is changed then.
    """
    what = device_call(device, "dma_free_coherent")
    device._check_here(what)
    size, dma_handle = integer(what, "size", size), integer(what, "dma_handle", dma_handle)
    entry = device.dma_debug.check_unmap(dma_handle, size, _BOTH, DmaType.COHERENT, cpu_addr=_address_of(cpu))
    if device.dma_debug.end(entry, None) and isinstance(cpu, memoryview):
        with suppress(BufferError):
            cpu.release()


class _Memory:
    """Mapped memory, given back by ``give_back`` when it is unmapped and nobody looks at it any more."""

    def __init__(self, mapping: DmaMapping, addr: int, size: int, give_back: Callable[[], None]) -> None:
        self.mapping, self.cpu_addr = mapping, addr
        exporter = (ctypes.c_ubyte * size).from_address(addr)
        weakref.finalize(exporter, give_back).atexit = False
        self.view = memoryview(exporter).cast("B")

    @property
    def mappings(self) -> list[DmaMapping]:
        return [self.mapping]

    def unmap(self, direction: DmaDirection | None) -> None:
        self.mapping.unmap()


def _alloc(device: DmaDevice, size: int) -> _Memory | None:
    if not device.domain.iommu and size > PAGE_SIZE:
        return _alloc_slots(device, size)
    try:
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError):
        return None
    pages.madvise(_MADV_WIPEONFORK)
    with memoryview(pages) as view:
        addr = _address_of(view)
    pfns: Any = None
    if not device.domain.iommu:
        pfns = physical_pages(device, addr, size, write=True)
        if not is_reachable(device, pfns, addr, size, device.coherent_dma_mask):
            return _alloc_slots(device, size)
    mapping = unless_no_room(
        device,
        lambda: map_pages(
            device, DmaType.COHERENT, addr, size, _BOTH, pfns=pfns, mask=device.coherent_dma_mask
        ),
    )
    return None if mapping is None else _Memory(mapping, addr, size, pages.close)


def _alloc_slots(device: DmaDevice, size: int) -> _Memory | None:
    pool = device.swiotlb
    device._need_pfns()
    if pool.bus_last > device.coherent_dma_mask:
        return None
    slots = pool.alloc(size, aligned=True)
    if slots is None:
        return None
    ffi.memmove(ffi.cast("char *", slots.cpu_addr), bytes(size), size)
    mapping = None
    try:
        mapping = unless_no_room(device, lambda: map_slots(device, DmaType.COHERENT, slots, size, _BOTH))
    finally:
        if mapping is None:
            pool.free(slots)
    if mapping is None:
        return None
    return _Memory(mapping, slots.cpu_addr, size, partial(pool.free, slots))


def _address_of(view: Buffer) -> int:
    try:
        with ffi.from_buffer(view) as data:
            return int(ffi.cast("uintptr_t", data))
    except ValueError:  # released
        return 0
