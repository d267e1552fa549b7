# SPDX-License-Identifier: MIT
"""The driver's own memory as a device sees it: through IOVAs, at its physical address, or bounced.

Not for mirrored memory: that is mapped by hmm_range_dma_map() and never bounced, since nobody would copy.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from .._shim import ffi, lib
from ..errors import MirrorError
from .direction import DmaDirection
from .record import DmaMapping, Site
from .swiotlb import Bounce, Slots, no_slots

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from .device import DmaDevice

PAGE_SIZE = 4096
PAGE_SHIFT = 12

_PFN = (1 << 55) - 1
_PRESENT = np.uint64(1 << 63)
_USABLE = np.uint64(1 << 63 | 1 << 62)  # HMM_PFN_VALID | HMM_PFN_WRITE
_MADV_POPULATE_READ, _MADV_POPULATE_WRITE = 22, 23
# What a mapping that is not to be had is told by; anything else is an error of the caller or the process.
_NO_ROOM = (errno.ENOSPC, errno.EFAULT, errno.ENOMEM)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class Export:
    """A buffer whose owner can neither free nor resize it while this lives: ``addr``, ``size`` bytes."""

    __slots__ = ("_held", "addr", "size")

    def __init__(self, what: str, buffer: Buffer, *, writable: bool) -> None:
        try:
            self._held = ffi.from_buffer(buffer, require_writable=writable)
        except (BufferError, TypeError, ValueError) as refused:
            raise _no_memory(what, refused, writable=writable) from None
        self.addr = int(ffi.cast("uintptr_t", self._held))
        self.size = len(self._held)

    def release(self) -> None:
        ffi.release(self._held)


def _no_memory(what: str, refused: Exception, *, writable: bool) -> MirrorError:
    if writable:
        return MirrorError(
            errno.EFAULT,
            f"{what}: the device would write to memory that is no writable contiguous buffer ({refused})",
            hint="give a bytearray, a numpy array or a Region, or map DMA_TO_DEVICE",
        )
    return MirrorError(errno.EFAULT, f"{what}: no contiguous buffer ({refused})", hint="give a buffer")


class Backing:
    """What a DMA address of driver memory stands on: a native mapping and, where it must be, a bounce."""

    __slots__ = ("address", "bounce", "keep", "mapping", "size")

    def __init__(
        self, mapping: DmaMapping, size: int, bounce: Bounce | None = None, address: int | None = None
    ) -> None:
        self.mapping, self.size, self.bounce = mapping, size, bounce
        self.address = mapping.iova if address is None else address
        self.keep: Export | None = None

    def sync_for_cpu(self, direction: DmaDirection, offset: int = 0, size: int | None = None) -> None:
        """What the device wrote becomes visible to the CPU."""
        if self.bounce is not None and direction.device_writes:
            self.bounce.to_cpu(offset, self.size if size is None else size)

    def sync_for_device(self, direction: DmaDirection, offset: int = 0, size: int | None = None) -> None:
        if self.bounce is not None and direction.device_reads:
            self.bounce.to_device(offset, self.size if size is None else size)

    @property
    def mappings(self) -> list[DmaMapping]:
        return [self.mapping]

    def unmap(self, direction: DmaDirection | None) -> None:
        """No access is under way any more; with a direction, what the device wrote is copied back."""
        self.mapping.unmap()
        bounce, self.bounce = self.bounce, None
        keep, self.keep = self.keep, None
        try:
            if bounce is not None and direction is not None and direction.device_writes:
                bounce.to_cpu(0, self.size)
        finally:
            if bounce is not None:
                bounce.free()
            if keep is not None:
                keep.release()


def map_memory(
    device: DmaDevice, kind: str, addr: int, size: int, direction: DmaDirection, site: Site
) -> Backing | None:
    """Map [addr, addr + size) of this process. None: a mapping error, there is no room or no way."""
    pfns = None
    if not device.domain.iommu:
        pfns = physical_pages(device, addr, size, write=direction.device_writes)
        if not is_reachable(device, pfns, addr, size, device.dma_mask):
            return _map_bounced(device, kind, addr, size, direction, site)
    mapping = unless_no_room(
        device, lambda: map_pages(device, kind, addr, size, direction, pfns=pfns, site=site)
    )
    return None if mapping is None else Backing(mapping, size)


def unless_no_room(device: DmaDevice, make: Callable[[], DmaMapping]) -> DmaMapping | None:
    """The mapping that it makes; None where none is to be had, with the reason logged."""
    try:
        return make()
    except MirrorError as refused:
        if refused.errno in _NO_ROOM:
            device.dma_debug.no_room(str(refused))
            return None
        raise


def map_pages(
    device: DmaDevice,
    kind: str,
    addr: int,
    size: int,
    direction: DmaDirection,
    *,
    pfns: np.ndarray[Any, Any] | None = None,
    iova: int | None = None,
    mask: int = 0,
    site: Site | None = None,
) -> DmaMapping:
    """The native mapping: at these PFNs (no IOMMU), at an IOVA of the caller's, or wherever there is room.

    ``addr`` and ``iova`` lie alike in their pages. ``mask``: another than the device's, 0: that.
    """
    options = ffi.new("struct pm_dmap_options *")
    options.source, options.mask = lib.PM_DMA_KERNEL, mask
    options.start, options.size, options.n = addr, size, pages_of(addr, size)
    if pfns is not None:
        usable = np.ascontiguousarray(pfns | _USABLE)
        options.pfns = ffi.from_buffer("uint64_t[]", usable)
    if iova is not None:
        options.flags = lib.PM_DMAP_AT
        options.iova = iova & -PAGE_SIZE
    return DmaMapping(device, kind, direction, options, site)


def map_slots(
    device: DmaDevice,
    kind: str,
    slots: Slots,
    size: int,
    direction: DmaDirection,
    site: Site | None = None,
) -> DmaMapping:
    """Memory of the bounce pool, at its address on the bus."""
    first = slots.bus_addr >> PAGE_SHIFT
    pfns = np.arange(first, first + pages_of(slots.bus_addr, size), dtype=np.uint64)
    return map_pages(device, kind, slots.cpu_addr, size, direction, pfns=pfns, site=site)


def physical_pages(device: DmaDevice, addr: int, size: int, *, write: bool) -> np.ndarray[Any, Any]:
    """The PFNs of the pages that hold the memory, made present. EFAULT; FeatureError as ordinary user."""
    device._need_pfns()
    first, n = addr >> PAGE_SHIFT, pages_of(addr, size)
    advice = _MADV_POPULATE_WRITE if write else _MADV_POPULATE_READ
    if _libc.madvise(first << PAGE_SHIFT, n << PAGE_SHIFT, advice):
        _refuse_memory(device, addr, size, write)
    fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        raw = np.frombuffer(os.pread(fd, n * 8, first * 8), np.uint64)
    finally:
        os.close(fd)
    return np.where(raw & _PRESENT, raw & np.uint64(_PFN), np.uint64(0))


def _refuse_memory(device: DmaDevice, addr: int, size: int, write: bool) -> NoReturn:
    """A copy to or from a bounce buffer would be this process's end."""
    raise MirrorError(
        errno.EFAULT,
        f"{device.name}: DMA map of {size} bytes at {addr:#x}: not all of it is memory that this process may"
        f" {'write' if write else 'read'}",
        addr=addr,
        hint="mmap() or mprotect() it first, or map it DMA_TO_DEVICE" if write else "mmap() it first",
    )


def pages_of(addr: int, size: int) -> int:
    return ((addr + size - 1) >> PAGE_SHIFT) - (addr >> PAGE_SHIFT) + 1


def is_reachable(device: DmaDevice, pfns: np.ndarray[Any, Any], addr: int, size: int, mask: int) -> bool:
    """Whether the memory is one piece on the bus, within the mask and outside the bounce pool's window."""
    bus = int(pfns[0]) << PAGE_SHIFT
    if not bus or not np.array_equal(pfns, pfns[0] + np.arange(pfns.size, dtype=np.uint64)):
        return False
    pool = device.swiotlb
    if bus <= pool.bus_last and pool.bus_addr < bus + (pfns.size << PAGE_SHIFT):
        return False
    return bus + addr % PAGE_SIZE + size - 1 <= mask


def _map_bounced(
    device: DmaDevice, kind: str, addr: int, size: int, direction: DmaDirection, site: Site
) -> Backing | None:
    pool = device.swiotlb
    slots = pool.alloc(size)
    if slots is None:
        device.dma_debug.no_room(no_slots(pool, size))
        return None
    bounce, backing = Bounce(pool, slots, addr, size), None
    try:
        if slots.bus_addr + size - 1 <= device.dma_mask:
            # Also what the device only writes: it may write a part, and all is copied back.
            bounce.to_device(0, size)
            mapping = unless_no_room(device, lambda: map_slots(device, kind, slots, size, direction, site))
            backing = None if mapping is None else Backing(mapping, size, bounce)
    finally:
        if backing is None:
            bounce.free()
    return backing
