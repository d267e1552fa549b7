# SPDX-License-Identifier: MIT
"""The two-step API: IOVAs first, then pieces of memory linked into them one by one, without a scatterlist.

Only behind an IOMMU: dma_iova_try_alloc() gives None without one, and the driver falls back to
dma_map_page().
"""

from __future__ import annotations

import errno
from bisect import bisect_left, insort
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..arguments import check_is, device_call, integer
from ..errors import MirrorError
from .direction import DmaDirection, check_direction
from .entry import DmaEntry, DmaType
from .iova import IovaExtent
from .memory import PAGE_SIZE, Export, map_pages
from .record import DmaMapping, Site
from .report import DmaDebugCategory
from .streaming import check_piece

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from .device import DmaDevice


@dataclass(slots=True, eq=False)
class DmaIovaState:
    """``struct dma_iova_state``: ``size`` bytes of IOVAs from ``addr`` on, and what is linked there."""

    addr: int
    size: int
    extent: IovaExtent | None
    entry: DmaEntry
    pieces: list[_Piece] = field(default_factory=list)

    @property
    def linked(self) -> int:
        """Bytes that are linked, synced or not."""
        return sum(piece.size for piece in self.pieces)

    @property
    def mappings(self) -> list[DmaMapping]:
        """Of the pieces that are synced, in order."""
        return [piece.mapping for piece in self.pieces if piece.mapping is not None]

    def unmap(self, direction: DmaDirection | None) -> None:
        """All of it: the device goes away."""
        for piece in self.pieces:
            _take_down(piece)
            piece.export.release()
        self.pieces.clear()
        extent, self.extent = self.extent, None
        if extent is not None:
            extent.free()


@dataclass(slots=True, eq=False)
class _Piece:
    """``size`` bytes at ``offset`` of the state; mapped once it is synced."""

    offset: int
    size: int
    export: Export
    entry: DmaEntry
    mapping: DmaMapping | None = None

    def __lt__(self, other: _Piece) -> bool:
        return self.offset < other.offset


def dma_iova_try_alloc(device: DmaDevice, size: int, phys: int = 0) -> DmaIovaState | None:
    """IOVAs for size bytes whose first piece begins at that place within its page, for dma_iova_link().

    ``phys`` is the address of the first piece, of which the last 12 bits count. None without an IOMMU, and
    when there is no room: use dma_map_page() then. EINVAL: no size.
    """
    what = device_call(device, "dma_iova_try_alloc")
    device._check_bound(what)
    size, phys = integer(what, "size", size), integer(what, "phys", phys)
    if size <= 0:
        raise MirrorError(errno.EINVAL, f"{what}: {size} bytes", hint="give a size in bytes")
    if not device.domain.iommu:
        return None
    inside = phys % PAGE_SIZE
    extent = IovaExtent.alloc(device, inside + size)
    if extent is None:
        return None
    addr = extent.start + inside
    entry = DmaEntry(addr, size, DmaDirection.NONE, DmaType.IOVA, Site.of_caller())
    state = entry.backing = DmaIovaState(addr, size, extent, entry)
    device.dma_debug.add_all([entry], state)
    return state


def dma_use_iova(state: DmaIovaState | None) -> bool:
    """Whether dma_iova_try_alloc() gave IOVAs, which are still there."""
    if state is None:
        return False
    _check_state("dma_use_iova", state)
    return state.extent is not None


def dma_iova_link(
    device: DmaDevice,
    state: DmaIovaState,
    buffer: Buffer,
    offset: int,
    size: int,
    direction: int,
    *,
    at: int = 0,
) -> None:
    """Link ``size`` bytes of a buffer, from byte ``at`` of it on, to ``offset`` of the state.

    The device reaches them after dma_iova_sync(). Pieces behind the first begin at page borders, of the IOVAs
    and of memory, the first one where ``phys`` was said to be: EIO and EINVAL otherwise, as when it is beyond
    the state. EFAULT: read-only memory that the device would write to. DmaDebugError (EEXIST): some of it is
    linked already.
    """
    what = device_call(device, "dma_iova_link")
    device._check_bound(what)
    way = check_direction(what, direction)
    _check_inside(what, state, offset, size)
    iova = state.addr + offset
    if offset and iova % PAGE_SIZE:
        raise MirrorError(
            errno.EIO,
            f"{what}: offset {offset:#x} is within a page, at IOVA {iova:#x}",
            hint="only the first piece may begin within a page",
        )
    at = integer(what, "at", at)
    export = Export(what, buffer, writable=way.device_writes)
    entry = DmaEntry(iova, size, way, DmaType.IOVA, Site.of_caller(), export.addr + at, backing=state)
    try:
        check_piece(what, export, at, size)
        _check_alike(what, export.addr + at, iova)
        _check_free(device, state, entry, offset, size)
        device.dma_debug.add(entry)
    except BaseException:
        device.dma_debug.remove(entry)
        export.release()
        raise
    insort(state.pieces, _Piece(offset, size, export, entry))


def dma_iova_sync(device: DmaDevice, state: DmaIovaState, offset: int, size: int) -> None:
    """Let the device reach what is linked in [offset, offset + size). ENOMEM: none of it is then."""
    what = device_call(device, "dma_iova_sync")
    device._check_bound(what)
    _check_inside(what, state, offset, size)
    done: list[_Piece] = []
    try:
        for piece in _within(state, offset, size):
            if piece.mapping is None:
                entry = piece.entry
                piece.mapping = map_pages(
                    device, DmaType.IOVA, entry.cpu_addr, piece.size, entry.direction, iova=entry.address
                )
                done.append(piece)
    except BaseException:
        for piece in done:
            _take_down(piece)
        raise


def dma_iova_unlink(device: DmaDevice, state: DmaIovaState, offset: int, size: int, direction: int) -> None:
    """Unlink the pieces of [offset, offset + size), and flush the IOTLB.

    DmaDebugError (EINVAL) when nothing is linked at a byte of it; EINVAL when it cuts a piece in two. Nothing
    is unlinked then.
    """
    what = device_call(device, "dma_iova_unlink")
    device._check_here(what)
    way = check_direction(what, direction)
    _check_inside(what, state, offset, size)
    pieces = _within(state, offset, size)
    _check_linked(device, state, offset, size, way, pieces)
    for piece in pieces:
        if piece.offset < offset or piece.offset + piece.size > offset + size:
            raise MirrorError(
                errno.EINVAL,
                f"{what}: [{offset:#x}, {offset + size:#x}) cuts the piece linked at {piece.entry.site}",
                hint="unlink pieces as they were linked",
            )
    for piece in pieces:
        if piece.entry.direction is not way:
            device.dma_debug.report(
                DmaDebugCategory.DIRECTION_MISMATCH,
                piece.entry,
                f"device driver unlinks as {way} memory that was linked {piece.entry.direction}",
                mapped=piece.entry,
            )
        _unlink(device, state, piece)
    if state.extent is not None:
        state.extent.flush()


def dma_iova_free(device: DmaDevice, state: DmaIovaState) -> None:
    """Give the IOVAs back, once everything is unlinked: DmaDebugError (EBUSY) before. Idempotent."""
    what = device_call(device, "dma_iova_free")
    device._check_here(what)
    _check_state(what, state)
    if state.pieces:
        device.dma_debug.report(
            DmaDebugCategory.IOVA_STILL_LINKED,
            state.entry,
            f"device driver frees IOVAs with {state.linked} bytes still linked, the first at"
            f" {state.pieces[0].entry.site}",
            mapped=state.entry,
        )
    if state.extent is not None and device.dma_debug.remove(state.entry):
        state.extent.free()
        state.extent = None


def dma_iova_destroy(device: DmaDevice, state: DmaIovaState, mapped_len: int, direction: int) -> None:
    """Unlink the first mapped_len bytes, which must be all that is linked, and give the IOVAs back."""
    if integer("dma_iova_destroy", "mapped_len", mapped_len):
        dma_iova_unlink(device, state, 0, mapped_len, direction)
    dma_iova_free(device, state)


def _check_state(what: str, state: DmaIovaState) -> None:
    check_is(what, "state", state, "extent", "the state that dma_iova_try_alloc() gave")


def _check_inside(what: str, state: DmaIovaState, offset: int, size: int) -> None:
    _check_state(what, state)
    offset, size = integer(what, "offset", offset), integer(what, "size", size)
    if state.extent is not None and offset >= 0 and size > 0 and offset + size <= state.size:
        return
    where = "freed IOVAs" if state.extent is None else f"{state.size} bytes of IOVAs"
    raise MirrorError(
        errno.EINVAL,
        f"{what}: [{offset:#x}, {offset + size:#x}) of {where}",
        hint="stay within what dma_iova_try_alloc() gave",
    )


def _check_alike(what: str, cpu_addr: int, iova: int) -> None:
    if cpu_addr % PAGE_SIZE == iova % PAGE_SIZE:
        return
    raise MirrorError(
        errno.EINVAL,
        f"{what}: memory at {cpu_addr:#x} cannot be linked to IOVA {iova:#x}: their places in a page differ",
        addr=cpu_addr,
        hint="give dma_iova_try_alloc() the address of the first piece; align the others to pages",
    )


def _check_free(device: DmaDevice, state: DmaIovaState, entry: DmaEntry, offset: int, size: int) -> None:
    for piece in _within(state, offset, size):
        device.dma_debug.report(
            DmaDebugCategory.IOVA_LINKED_TWICE,
            entry,
            f"device driver links IOVAs that are linked to {piece.entry.cpu_addr:#x} already",
            mapped=piece.entry,
        )


def _check_linked(
    device: DmaDevice, state: DmaIovaState, offset: int, size: int, way: DmaDirection, pieces: list[_Piece]
) -> None:
    at = offset
    for piece in pieces:
        if piece.offset > at:
            break
        at = piece.offset + piece.size
    if at >= offset + size:
        return
    device.dma_debug.report(
        DmaDebugCategory.IOVA_NOT_LINKED,
        DmaEntry(state.addr + at, offset + size - at, way, DmaType.IOVA, Site.of_caller()),
        f"device driver unlinks IOVAs that are not linked, from {state.addr + at:#x} on",
        mapped=state.entry,
    )


def _within(state: DmaIovaState, offset: int, size: int) -> list[_Piece]:
    """The pieces that overlap, in order. A piece takes whole pages of IOVAs."""
    first = bisect_left(state.pieces, offset, key=lambda piece: piece.offset + piece.size)
    found = []
    for piece in state.pieces[max(first - 1, 0) :]:
        if piece.offset >= offset + size:
            break
        if piece.offset + piece.size > offset:
            found.append(piece)
    return found


def _take_down(piece: _Piece) -> None:
    if piece.mapping is not None:
        piece.mapping.unmap()
        piece.mapping = None


def _unlink(device: DmaDevice, state: DmaIovaState, piece: _Piece) -> None:
    if not device.dma_debug.remove(piece.entry):
        return
    _take_down(piece)
    state.pieces.remove(piece)
    piece.export.release()
