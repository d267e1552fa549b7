# SPDX-License-Identifier: MIT
"""Scatterlists: many pieces of driver memory, mapped in one call, in a row for the device where it can be."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..arguments import check_is, device_call, integer
from ..errors import MirrorError
from .direction import DmaDirection, check_direction
from .entry import DmaEntry, DmaType
from .iova import IovaExtent
from .memory import PAGE_SIZE, Backing, Export, map_memory, map_pages
from .record import DmaMapping, Site
from .report import DmaDebugCategory
from .streaming import DMA_ATTR_SKIP_CPU_SYNC, check_piece

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from .device import DmaDevice


@dataclass(slots=True, eq=False)
class Scatterlist:
    """``struct scatterlist``: ``length`` bytes of a buffer, from ``offset`` on.

    After dma_map_sg() gave n, the first n entries of the list have ``dma_address`` and ``dma_length`` of the
    segments for the device; these need not be those entries' own memory.
    """

    buffer: Buffer
    offset: int
    length: int
    dma_address: int = 0
    dma_length: int = 0


def sg_list(*buffers: Buffer, max_segment: int | None = None) -> list[Scatterlist]:
    """A scatterlist of whole buffers, in pieces of at most max_segment bytes."""
    pieces = []
    for buffer in buffers:
        size = memoryview(buffer).nbytes
        step = max_segment or size
        pieces += [Scatterlist(buffer, at, min(step, size - at)) for at in range(0, size, step)]
    return pieces


def sg_dma_address(sg: Scatterlist) -> int:
    """The DMA address of a segment, once dma_map_sg() has filled it in."""
    check_is("sg_dma_address", "sg", sg, "dma_address", "an entry of a scatterlist")
    return sg.dma_address


def sg_dma_len(sg: Scatterlist) -> int:
    """The bytes of a segment, which may be several entries' memory."""
    check_is("sg_dma_len", "sg", sg, "dma_length", "an entry of a scatterlist")
    return sg.dma_length


def dma_map_sg(
    device: DmaDevice, sgl: Sequence[Scatterlist], nents: int, direction: int, *, attrs: int = 0
) -> int:
    """Map the first nents entries. Returns how many segments the device has to go through; 0: mapping failed.

    Behind an IOMMU all get IOVAs in a row, and entries that meet at page borders are merged, up to the
    device's max_segment_size and segment_boundary. EINVAL, EFAULT, FeatureError as dma_map_single().
    """
    what = device_call(device, "dma_map_sg")
    device._check_bound(what)
    way = check_direction(what, direction)
    entries = _entries(what, sgl, nents)
    pieces = _export_all(what, entries, way)
    mapped = _map_behind_iommu(device, pieces, way) if device.domain.iommu else _map_each(device, pieces, way)
    if mapped is None:
        for export, _, _ in pieces:
            export.release()
        return 0
    _record(device, entries, pieces, mapped, way)
    return _fill_in(device, sgl, entries, mapped.addresses)


def dma_map_sgtable(device: DmaDevice, sgl: Sequence[Scatterlist], direction: int, *, attrs: int = 0) -> int:
    """dma_map_sg() of the whole list; raises ENOMEM where that gives 0."""
    count = dma_map_sg(device, sgl, _length("dma_map_sgtable", sgl), direction, attrs=attrs)
    if count:
        return count
    raise MirrorError(
        errno.ENOMEM,
        f"{device.name}: dma_map_sgtable: no room for {sum(sg.length for sg in sgl)} bytes",
        hint="map less at once, or unmap what is done with",
    )


def dma_unmap_sg(
    device: DmaDevice, sgl: Sequence[Scatterlist], nents: int, direction: int, *, attrs: int = 0
) -> None:
    """Unmap what dma_map_sg() mapped, with the nents that it was given, not what it returned."""
    entry = _check(device, sgl, nents, direction)
    mapped = entry.backing
    assert isinstance(mapped, _Mapped)
    first, *others = mapped.records
    for one in others:
        device.dma_debug.remove(one)
    # Last, for a call that was interrupted finds the rest by the first.
    if not device.dma_debug.end(first, None if attrs & DMA_ATTR_SKIP_CPU_SYNC else entry.direction):
        return
    for sg in sgl:
        sg.dma_address = sg.dma_length = 0


def dma_unmap_sgtable(
    device: DmaDevice, sgl: Sequence[Scatterlist], direction: int, *, attrs: int = 0
) -> None:
    """dma_unmap_sg() of the whole list."""
    dma_unmap_sg(device, sgl, _length("dma_unmap_sgtable", sgl), direction, attrs=attrs)


def dma_sync_sg_for_cpu(device: DmaDevice, sgl: Sequence[Scatterlist], nents: int, direction: int) -> None:
    """dma_sync_single_for_cpu() of the whole list."""
    entry = _check_sync(device, sgl, nents, direction, for_cpu=True)
    for backing in _backings(entry):
        backing.sync_for_cpu(entry.direction)


def dma_sync_sg_for_device(device: DmaDevice, sgl: Sequence[Scatterlist], nents: int, direction: int) -> None:
    """dma_sync_single_for_device() of the whole list."""
    entry = _check_sync(device, sgl, nents, direction, for_cpu=False)
    for backing in _backings(entry):
        backing.sync_for_device(entry.direction)


_Piece = tuple[Export, int, int]  # export, address, size


@dataclass(slots=True)
class _Mapped:
    """What a mapped scatterlist stands on."""

    addresses: list[int]
    backings: list[Backing]
    extent: IovaExtent | None
    exports: list[Export]
    records: list[DmaEntry]

    @property
    def mappings(self) -> list[DmaMapping]:
        return [backing.mapping for backing in self.backings]

    def unmap(self, direction: DmaDirection | None) -> None:
        backings, self.backings = self.backings, []
        extent, self.extent = self.extent, None
        exports, self.exports = self.exports, []
        for backing in backings:
            backing.unmap(direction)
        if extent is not None:
            extent.free()
        for export in exports:
            export.release()


def _backings(entry: DmaEntry) -> list[Backing]:
    return entry.backing.backings if isinstance(entry.backing, _Mapped) else []


def _length(what: str, sgl: Sequence[Scatterlist]) -> int:
    check_is(what, "sgl", sgl, "__len__", "a list of Scatterlist entries: sg_list() makes it")
    return len(sgl)


def _entries(what: str, sgl: Sequence[Scatterlist], nents: int) -> list[Scatterlist]:
    if 0 < integer(what, "nents", nents) <= _length(what, sgl):
        entries = list(sgl[:nents])
        for sg in entries:
            check_is(what, "entry", sg, "dma_address", "Scatterlist entries: sg_list() makes them")
        return entries
    raise MirrorError(
        errno.EINVAL,
        f"{what}: {nents} entries of a list of {len(sgl)}",
        hint="nents is from 1 to the list's length",
    )


def _export_all(what: str, entries: Sequence[Scatterlist], way: DmaDirection) -> list[_Piece]:
    pieces: list[_Piece] = []
    try:
        for sg in entries:
            if not isinstance(sg, Scatterlist):
                raise MirrorError(
                    errno.EINVAL,
                    f"{what}: an entry is a {type(sg).__name__}, no Scatterlist",
                    hint="sg_list(buffer, ...) makes a list",
                )
            export = Export(what, sg.buffer, writable=way.device_writes)
            pieces.append((export, export.addr + sg.offset, sg.length))
            check_piece(what, export, sg.offset, sg.length)
    except MirrorError:
        for export, _, _ in pieces:
            export.release()
        raise
    return pieces


def _map_behind_iommu(device: DmaDevice, pieces: Sequence[_Piece], way: DmaDirection) -> _Mapped | None:
    offsets, total = _lay_out(pieces, device.segment_boundary)
    extent = IovaExtent.alloc(device, total)
    if extent is None:
        device.dma_debug.no_room(f"no {total} bytes of IOVAs in a row are left within {device.dma_mask:#x}")
        return None
    addresses = [extent.start + offset for offset in offsets]
    mappings: list[DmaMapping] = []
    here = Site.of_caller()
    try:
        for (_, addr, size), iova in zip(pieces, addresses, strict=True):
            mappings.append(map_pages(device, DmaType.SG, addr, size, way, iova=iova, site=here))
    except BaseException as failed:
        for mapping in mappings:
            mapping.unmap()
        extent.free()
        if isinstance(failed, MirrorError) and failed.errno == errno.ENOMEM:
            return None
        raise
    backings = [
        Backing(mapping, size, address=iova)
        for mapping, (_, _, size), iova in zip(mappings, pieces, addresses, strict=True)
    ]
    return _Mapped(addresses, backings, extent, [export for export, _, _ in pieces], [])


def _lay_out(pieces: Sequence[_Piece], boundary: int) -> tuple[list[int], int]:
    """Where each piece begins, from the start of the IOVAs on, and how many bytes of IOVAs there are.

    Each lies in its pages as it does in memory. One that would cross the boundary, and need not, begins
    behind it: the IOVAs are aligned to their size, so an offset tells where the boundaries are.
    """
    offsets, at = [], 0
    for _, addr, size in pieces:
        inside = addr % PAGE_SIZE
        if size <= boundary + 1 and (at + inside) // (boundary + 1) != (at + inside + size - 1) // (
            boundary + 1
        ):
            at = (at // (boundary + 1) + 1) * (boundary + 1)
        offsets.append(at + inside)
        at += -(-(inside + size) // PAGE_SIZE) * PAGE_SIZE
    return offsets, at


def _map_each(device: DmaDevice, pieces: Sequence[_Piece], way: DmaDirection) -> _Mapped | None:
    backings: list[Backing] = []
    done, here = False, Site.of_caller()
    try:
        for _, addr, size in pieces:
            backing = map_memory(device, DmaType.SG, addr, size, way, here)
            if backing is None:
                return None
            backings.append(backing)
        done = True
    finally:
        if not done:
            for backing in backings:
                backing.unmap(None)
    addresses = [backing.address for backing in backings]
    return _Mapped(addresses, backings, None, [export for export, _, _ in pieces], [])


def _record(
    device: DmaDevice,
    entries: Sequence[Scatterlist],
    pieces: Sequence[_Piece],
    mapped: _Mapped,
    way: DmaDirection,
) -> None:
    here = Site.of_caller()
    for backing, (_, cpu_addr, size) in zip(mapped.backings, pieces, strict=True):
        record = DmaEntry(backing.address, size, way, DmaType.SG, here, cpu_addr, len(entries))
        record.backing, record.syncs = mapped, backing
        mapped.records.append(record)
    device.dma_debug.add_all(mapped.records, mapped)
    for record in mapped.records:
        _check_segment(device, record)


def _check_segment(device: DmaDevice, record: DmaEntry) -> None:
    if record.size > device.max_segment_size:
        category = DmaDebugCategory.SEGMENT_LENGTH
        text = f"longer than device claims to support [max={device.max_segment_size}]"
        device.dma_debug.report(
            category, record, f"mapping a scatterlist segment of {record.size} bytes, {text}", mapped=record
        )
    if _crosses(record.address, record.size, device.segment_boundary):
        category = DmaDebugCategory.SEGMENT_BOUNDARY
        text = f"across a boundary [boundary={device.segment_boundary:#x}]"
        device.dma_debug.report(category, record, f"mapping a scatterlist segment {text}", mapped=record)


def _fill_in(
    device: DmaDevice, sgl: Sequence[Scatterlist], entries: Sequence[Scatterlist], addresses: Sequence[int]
) -> int:
    """Put the segments into the first entries; how many they are."""
    segments: list[tuple[int, int]] = []
    for sg, address in zip(entries, addresses, strict=True):
        if segments and device.domain.iommu:
            start, length = segments[-1]
            whole = length + sg.length
            if (
                start + length == address
                and whole <= device.max_segment_size
                and not _crosses(start, whole, device.segment_boundary)
            ):
                segments[-1] = (start, whole)
                continue
        segments.append((address, sg.length))
    for sg in sgl:
        sg.dma_address = sg.dma_length = 0
    for sg, (start, length) in zip(sgl, segments, strict=False):
        sg.dma_address, sg.dma_length = start, length
    return len(segments)


def _crosses(address: int, size: int, boundary: int) -> bool:
    return bool((address ^ (address + size - 1)) & ~boundary)


def _check(device: DmaDevice, sgl: Sequence[Scatterlist], nents: int, direction: int) -> DmaEntry:
    what = device_call(device, "dma_unmap_sg")
    device._check_here(what)
    way = check_direction(what, direction)
    first = _entries(what, sgl, min(integer(what, "nents", nents), _length(what, sgl)))[0]
    return device.dma_debug.check_unmap(first.dma_address, first.length, way, DmaType.SG, nents=nents)


def _check_sync(
    device: DmaDevice, sgl: Sequence[Scatterlist], nents: int, direction: int, *, for_cpu: bool
) -> DmaEntry:
    what = device_call(device, "dma_sync_sg")
    device._check_here(what)
    way = check_direction(what, direction)
    first = _entries(what, sgl, min(integer(what, "nents", nents), _length(what, sgl)))[0]
    return device.dma_debug.check_sync(
        first.dma_address, min(first.length, first.dma_length), way, for_cpu=for_cpu, nents=nents, sg=True
    )
