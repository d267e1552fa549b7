# SPDX-License-Identifier: MIT
"""The DMA engine of a device: copies by DMA address, and what an IOMMU says when it refuses."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, TypeVar

from .._shim import ffi, lib
from ..arguments import integer, wrong
from ..callback import may_wait
from ..errors import MirrorError, error
from ..history import ago, invalidated_text
from .direction import DMA_MAPPING_ERROR
from .domain import DmaDomain, inherited

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from ..notifier import Invalidation
    from .record import DmaMapping

_F = TypeVar("_F", bound="IommuFaultError")

#: Bytes of one native call, so that Ctrl-C is heard in between.
_CALL_BYTES = 64 << 20


class IommuFaultReason(StrEnum):
    """Why a DMA access was refused."""

    UNMAPPED = "unmapped"
    READONLY = "readonly"
    FENCED = "fenced"
    STALE = "stale"
    CHANGED = "changed"
    DIRECTION = "direction"
    MASK = "mask"


_REASONS = {
    lib.PM_FAULT_MISSING: IommuFaultReason.UNMAPPED,
    lib.PM_FAULT_READONLY: IommuFaultReason.READONLY,
    lib.PM_FAULT_FENCED: IommuFaultReason.FENCED,
    lib.PM_FAULT_STALE: IommuFaultReason.STALE,
    lib.PM_FAULT_CHANGED: IommuFaultReason.CHANGED,
    lib.PM_FAULT_DIRECTION: IommuFaultReason.DIRECTION,
    lib.PM_FAULT_MASK: IommuFaultReason.MASK,
}

_TEXT = {
    IommuFaultReason.UNMAPPED: (
        "nothing is mapped there",
        "map it, and keep the mapping while the device works",
    ),
    IommuFaultReason.READONLY: ("the page is mapped for reading", "ask for HMM_PFN_REQ_WRITE before mapping"),
    IommuFaultReason.FENCED: ("it was invalidated, the callback has not run yet", "fault and map it again"),
    IommuFaultReason.CHANGED: (
        "the page behind it had been exchanged unseen, and was invalidated now",
        "fault and map it again",
    ),
    IommuFaultReason.DIRECTION: ("against the direction of the mapping", "map it DMA_BIDIRECTIONAL"),
    IommuFaultReason.MASK: ("beyond the device's dma_mask", "give the device addresses that it can form"),
}


class IommuFaultError(MirrorError):
    """The IOMMU refused an access of a device, as hardware reports it: address, access, reason.

    ``iova`` is the DMA address, ``write`` the access, ``reason`` an IommuFaultReason, ``mapping`` the
    DmaMapping there (None: nothing was mapped).
    """

    iova: int
    write: bool
    reason: IommuFaultReason
    mapping: DmaMapping | None


class StaleDmaError(IommuFaultError):
    """A device used a mapping whose invalidation is over and that its driver did not tear down: a bug.

    No memory was touched: the entry is fenced. ``mapping`` tells who mapped it and where, ``invalidated``
    what should have torn it down; None where that is too long ago.
    """

    invalidated: Invalidation | None


@dataclass(slots=True)
class DmaStats:
    """Counts since the device was made; ``faults`` are refused accesses, by reason the fields after it."""

    reads: int = 0
    writes: int = 0
    read_bytes: int = 0
    write_bytes: int = 0
    redone: int = 0
    faults: int = 0
    unmapped: int = 0
    readonly: int = 0
    fenced: int = 0
    stale: int = 0
    changed: int = 0
    direction: int = 0
    mask: int = 0


class DmaEngine:
    """The part of a device that copies by DMA address."""

    name: str
    dma_mask: int

    def __init__(self) -> None:
        self.dma_stats = DmaStats()
        self._dma_lock = threading.Lock()

    @property
    def domain(self) -> DmaDomain:
        raise NotImplementedError

    def dma_read(self, daddr: int, n: int) -> bytes:
        """The n bytes at DMA address daddr. Errors as dma_read_into(); that one copies once less."""
        _check_span(f"{self.name}: DMA read", daddr, n)
        into = bytearray(n)
        self.dma_read_into(daddr, into)
        return bytes(into)

    def dma_read_into(self, daddr: int, buffer: Buffer) -> None:
        """Fill a writable contiguous buffer from DMA address daddr on, across mappings in a row.

        IommuFaultError (EFAULT): unmapped, against the direction, beyond the mask, or invalidated.
        StaleDmaError: the driver did not tear a mapping down. EDEADLK in a callback or under a driver lock.
        What was read before an error stands in the buffer.
        """
        with ffi.from_buffer(buffer, require_writable=True) as memory:
            self._dma(daddr, memory, len(memory), False)

    def dma_write(self, daddr: int, data: Buffer) -> None:
        """Write a contiguous buffer at daddr. Errors as dma_read_into(); what was written stays."""
        with ffi.from_buffer(data) as memory:
            self._dma(daddr, memory, len(memory), True)

    def dma_read_sg(self, segments: Iterable[tuple[int, int]]) -> bytes:
        """Gather: the bytes of ``(daddr, length)`` after ``(daddr, length)``. Errors as dma_read_into()."""
        listed = self._segments("dma_read_sg", segments)
        into = bytearray(sum(length for _, length in listed))
        self._dma_sg(listed, ffi.from_buffer(into, require_writable=True), False)
        return bytes(into)

    def dma_write_sg(self, segments: Iterable[tuple[int, int]], data: Buffer) -> None:
        """Scatter ``data`` over ``(daddr, length)`` after ``(daddr, length)``.

        EINVAL unless the lengths add up to it. Errors as dma_write(), segment by segment.
        """
        listed = self._segments("dma_write_sg", segments)
        with ffi.from_buffer(data) as memory:
            if sum(length for _, length in listed) != len(memory):
                raise MirrorError(
                    errno.EINVAL,
                    f"{self.name}: dma_write_sg: the segments are not of {len(memory)} bytes in all",
                    hint="give as many bytes as the scatter list has",
                )
            self._dma_sg(listed, memory, True)

    def _segments(self, what: str, segments: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
        """Checked before the first byte moves: no length may lead out of the caller's buffer."""
        try:
            listed = [(daddr, length) for daddr, length in segments]
        except (TypeError, ValueError):
            wanted = "pairs of a DMA address and a length"
            raise wrong(f"{self.name}: {what}", "segments", segments, wanted) from None
        for daddr, length in listed:
            _check_span(f"{self.name}: {what}", daddr, length)
        return listed

    def _dma_sg(self, segments: list[tuple[int, int]], memory: Any, write: bool) -> None:
        # No memoryviews: one in a frame of a traceback that is collected with a cycle crashes Python 3.11.
        at = 0
        for daddr, length in segments:
            self._dma(daddr, memory + at, length, write)
            at += length

    def _dma(self, daddr: int, memory: Any, size: int, write: bool) -> None:
        what = f"{self.name}: DMA {'write' if write else 'read'}"
        may_wait(what)
        _check_span(what, daddr, size)
        access = ffi.new("struct pm_dma_access *", {"write": write, "mask": self.dma_mask})
        done = 0
        while done < size:
            access.addr = daddr + done
            access.buf = memory + done
            access.len = min(size - done, _CALL_BYTES)
            ret = lib.pm_dma_access(self.domain.native, access)
            done += access.done
            self._count_dma(access, write, ret == 0 and done == size)
            if ret < 0:
                raise self._refused(what, ret, access, daddr + done)

    def _refused(self, what: str, ret: int, access: Any, daddr: int) -> MirrorError:
        mapping = self.domain.mapping_of(access.cookie)
        if ret == -errno.EOPNOTSUPP and mapping is not None and mapping.mm is not None:
            mapping.mm.features.require("process_vm", what)
        if ret != -errno.EFAULT:
            if ret == -errno.ESRCH:
                return inherited(what)
            return error(-ret, f"{what} at {daddr:#x}")
        if access.fault == lib.PM_FAULT_NONE:
            return MirrorError(
                errno.EFAULT,
                f"{what} at {daddr:#x}: the other side, the buffer of the caller, is not mapped",
                hint="keep the buffer until the access is over",
            )
        reason = _REASONS[access.fault]
        self._count_iommu_fault(reason)
        if reason is IommuFaultReason.STALE:
            return _stale(what, access, daddr, mapping)
        if reason is IommuFaultReason.CHANGED and mapping is not None and mapping.mm is not None:
            mapping.mm._detected(access.fault_start, access.fault_end)
        why, hint = _TEXT[reason]
        return _fault(IommuFaultError, what, why, hint, access, daddr, reason, mapping)

    def _count_dma(self, access: Any, write: bool, finished: bool) -> None:
        stats = self.dma_stats
        with self._dma_lock:
            stats.redone += access.redone
            if write:
                stats.write_bytes += access.done
                stats.writes += finished
            else:
                stats.read_bytes += access.done
                stats.reads += finished

    def _count_iommu_fault(self, reason: IommuFaultReason) -> None:
        with self._dma_lock:
            self.dma_stats.faults += 1
            setattr(self.dma_stats, reason.value, getattr(self.dma_stats, reason.value) + 1)


def _check_span(what: str, daddr: int, size: int) -> None:
    daddr, size = integer(what, "daddr", daddr), integer(what, "size", size)
    if daddr >= 0 and size > 0 and daddr + size <= 1 << 64 and daddr != DMA_MAPPING_ERROR:
        return
    hint = "give a DMA address and at least one byte"
    if daddr == DMA_MAPPING_ERROR:
        wrong = f"{daddr:#x} is DMA_MAPPING_ERROR, and no address"
        hint = "ask dma_mapping_error() before an address is used; the logger pymirror.dma says why"
    elif size <= 0:
        wrong = f"{size} bytes at {daddr:#x}"
    else:
        wrong = f"[{daddr:#x}, {daddr + size:#x}) is beyond 64 bits of address"
    raise MirrorError(errno.EINVAL, f"{what}: {wrong}", hint=hint)


def _stale(what: str, access: Any, daddr: int, mapping: DmaMapping | None) -> StaleDmaError:
    seq = access.fence_seq
    mm = mapping.mm if mapping is not None else None
    invalidated = mm.notifiers.invalidation(seq) if mm is not None else None
    why = (
        f"a mapping that its driver did not tear down; {_mapped_text(mapping)};"
        f" {invalidated_text(invalidated, seq)}"
    )
    hint = "unmap the whole of [update.start, update.end) in the callback, before it returns"
    stale = _fault(StaleDmaError, what, why, hint, access, daddr, IommuFaultReason.STALE, mapping)
    stale.invalidated = invalidated
    return stale


def _fault(
    kind: type[_F],
    what: str,
    why: str,
    hint: str,
    access: Any,
    daddr: int,
    reason: IommuFaultReason,
    mapping: DmaMapping | None,
) -> _F:
    mm = mapping.mm if mapping is not None else None
    addr = access.fault_start if mapping is not None else None
    behind = f" (memory at {addr:#x})" if addr is not None and f"{addr:#x}" not in why else ""
    fault = kind(
        errno.EFAULT,
        f"{what} at {daddr:#x}: {why}{behind}",
        addr=addr,
        vma=mm._vma_for_error(addr) if mm is not None and addr is not None else None,
        hint=hint,
    )
    fault.iova, fault.write, fault.reason, fault.mapping = daddr, bool(access.write), reason, mapping
    return fault


def _mapped_text(mapping: DmaMapping | None) -> str:
    if mapping is None:
        return "who mapped it is not known"
    return f"mapped by {mapping.site} ({mapping.kind}, {mapping.direction}), {ago(mapping.when)}"
