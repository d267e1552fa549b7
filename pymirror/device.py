# SPDX-License-Identifier: MIT
"""A software device: it reads and writes process memory by address, through the page table of its driver."""

from __future__ import annotations

import errno
import operator
import threading
import time
from typing import TYPE_CHECKING, Any

from . import trace
from ._shim import ffi, lib
from .arguments import integer, shown
from .callback import may_wait
from .device_fault import FAULT_REASONS, DeviceFault, DeviceStats, FaultHandler, FaultReason, StaleAccessError
from .dma.device import DmaDevice
from .dma.domain import DmaDomain
from .dma.swiotlb import SwiotlbPool
from .errors import MirrorError, error
from .page_table import PageTable
from .walk import PAGE_SIZE, USER_END, detected

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from .mm import AddressSpace

#: Bytes of one native call, so that Ctrl-C is heard in between.
_CALL_BYTES = 64 << 20


class Device(DmaDevice):
    """A device with a page table and no memory of its own.

    ``read``, ``read_into`` and ``write`` go through ``page_table``, by virtual address. What it does not
    serve is a device fault: the driver's handler maps it, and the access goes on. ``fault_timeout`` is for
    how many seconds an access may make no progress.

    ``dma_read``, ``dma_read_into`` and ``dma_write`` go by DMA address, through ``domain``: see DmaDevice for
    ``dma_mask``, ``iommu`` and ``swiotlb``.
    """

    def __init__(
        self,
        name: str,
        *,
        fault_timeout: float = 1.0,
        dma_mask: int = (1 << 64) - 1,
        iommu: bool | DmaDomain = True,
        swiotlb: SwiotlbPool | None = None,
    ) -> None:
        super().__init__(name, dma_mask=dma_mask, iommu=iommu, swiotlb=swiotlb)
        self.page_table = PageTable()
        self.fault_timeout = fault_timeout
        self.stats = DeviceStats()
        self._handler: FaultHandler | None = None
        self._stats_lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<Device {self.name!r}>"

    def set_fault_handler(self, handler: FaultHandler | None) -> None:
        """``handler(fault)`` maps ``fault.addr``, and more if it likes, and returns.

        It runs in the accessing thread. What it raises ends the access, but for EBUSY and EAGAIN, which mean
        "again". None: faults are EFAULT. EINVAL for what cannot be called.
        """
        if handler is not None and not callable(handler):
            raise MirrorError(
                errno.EINVAL,
                f"{self.name}: handler={shown(handler)}",
                hint="give a function of a fault, or None",
            )
        self._handler = handler

    def read(self, mm: AddressSpace, addr: int, n: int) -> bytes:
        """Read n bytes at addr. Errors as read_into(); that one copies once less."""
        check_access(mm, f"{self.name}: read", addr, n)
        into = bytearray(n)
        self.read_into(mm, addr, into)
        return bytes(into)

    def read_into(self, mm: AddressSpace, addr: int, buffer: Buffer) -> None:
        """Fill a writable contiguous buffer from addr on, without a copy in between.

        EFAULT: no handler, or the memory is not there. EPERM from the handler. StaleAccessError: the driver
        did not clear an entry. ETIMEDOUT: no progress for fault_timeout. EDEADLK in a callback or under a
        driver lock. EINVAL: beyond the address space. ESRCH: the mm is closed, or another process's. EXDEV:
        the table has entries of another mm. What was read before an error stands in the buffer.
        """
        with ffi.from_buffer(buffer, require_writable=True) as memory:
            self._access(mm, addr, memory, False)

    def write(self, mm: AddressSpace, addr: int, data: Buffer) -> None:
        """Write the bytes of a contiguous buffer at addr. Errors as read_into(); what was written stays."""
        with ffi.from_buffer(data) as memory:
            self._access(mm, addr, memory, True)

    def atomic_add(self, mm: AddressSpace, addr: int, value: int, size: int = 8) -> int:
        """Add value to the unsigned little-endian word of ``size`` bytes, 4 or 8, at addr; gives what was
        there.

        It wraps. No thread of the CPU sees a part of it: the page is in device memory, or the device has it
        to itself (make_device_exclusive()). Else it is a device fault with ``atomic``. EINVAL: misaligned.
        Errors otherwise as read_into().
        """
        return self._atomic(mm, addr, size, lib.PM_ATOMIC_ADD, value)

    def compare_and_swap(self, mm: AddressSpace, addr: int, expected: int, value: int, size: int = 8) -> int:
        """Store value at addr if the word there is ``expected``; gives what was there. As atomic_add()."""
        return self._atomic(mm, addr, size, lib.PM_ATOMIC_CAS, value, expected)

    def _atomic(
        self, mm: AddressSpace, addr: int, size: int, op: int, operand: int, expected: int = 0
    ) -> int:
        what = f"{self.name}: atomic"
        may_wait(what)
        self.page_table.check_mm(mm, what)
        addr = check_access(mm, what, addr, size)
        if size not in (4, 8) or addr % size:
            raise error(
                errno.EINVAL,
                f"{what}: {size} bytes",
                addr=addr,
                mm=mm,
                hint="4 or 8 bytes, naturally aligned",
            )
        mask = (1 << 8 * size) - 1
        atomic = ffi.new("struct pm_atomic *", {"addr": addr, "size": size, "op": op})
        atomic.operand, atomic.expected = operator.index(operand) & mask, operator.index(expected) & mask
        faults = _Patience(self.fault_timeout)
        while True:
            ret = self.page_table._atomic(mm, atomic)
            if ret == 0:
                with self._stats_lock:
                    self.stats.atomics += 1
                return int(atomic.old)
            if ret != -errno.EFAULT:
                mm._check_here(what)
                raise error(-ret, what, addr=addr, mm=mm)
            faults.again(mm, what, atomic)
            faults.refused = self._fault(mm, atomic, addr + size, what, atomic=True)

    def _access(self, mm: AddressSpace, addr: int, memory: Any, write: bool) -> None:
        what = f"{self.name}: {'write' if write else 'read'}"
        may_wait(what)
        self.page_table.check_mm(mm, what)
        size = len(memory)
        addr = check_access(mm, what, addr, size)
        done = 0
        faults = _Patience(self.fault_timeout)
        about = {"device": self.name, "write": write}
        access = ffi.new("struct pm_access *")
        access.write = write
        while done < size:
            access.addr = addr + done
            access.buf = memory + done
            access.len = min(size - done, _CALL_BYTES)
            ret = self.page_table.access(mm, access)
            done += access.done
            if ret == -errno.EOPNOTSUPP:
                mm.features.require("process_vm", what)
            if ret not in (0, -errno.EFAULT):
                mm._check_here(what)
                if ret in (-errno.ENOSYS, -errno.EPERM):
                    mm.features.require("process_vm", what)
                raise error(-ret, what, addr=addr + done, mm=mm)
            self._count_access(access, write, ret == 0 and done == size)
            if access.redone:
                trace.instant(trace.Track.RETRY, "read redone", mm, access.addr, addr + done, **about)
            if access.done:
                faults.reset()
            if ret == 0:
                continue
            if access.fault == lib.PM_FAULT_NONE:
                raise error(
                    errno.EFAULT,
                    f"{what}: the other side of the copy, the buffer of the caller, is not mapped,",
                    addr=addr + done,
                    mm=mm,
                    hint="keep the buffer until the access is over",
                )
            faults.again(mm, what, access)
            with trace.span(
                trace.Track.FAULT, FAULT_REASONS[access.fault], mm, access.fault_start, addr + size, **about
            ):
                faults.refused = self._fault(mm, access, addr + size, what)

    def _fault(
        self, mm: AddressSpace, access: Any, end: int, what: str, atomic: bool = False
    ) -> MirrorError | None:
        reason = FAULT_REASONS[access.fault]
        page = access.fault_start
        write = atomic or bool(access.write)
        self._count_fault(reason)
        if reason is FaultReason.STALE:
            seq = access.fence_seq
            mapped = self.page_table.who_mapped(page)
            invalidated = mm.notifiers.invalidation(seq)
            raise StaleAccessError(self, page, write, mapped, invalidated, seq, mm._vma_for_error(page))
        if reason is FaultReason.CHANGED:
            detected(mm, page, access.fault_end)
            return None
        last = -(-end // PAGE_SIZE) * PAGE_SIZE
        return self._serve(DeviceFault(self, mm, page, last, write, reason, atomic), what)

    def _serve(self, fault: DeviceFault, what: str) -> MirrorError | None:
        if self._handler is None:
            raise error(
                errno.EFAULT,
                f"{what}: device fault ({fault.reason}) without a handler",
                addr=fault.addr,
                mm=fault.mm,
                hint="set_fault_handler(), or map the memory before the access",
            )
        try:
            self._handler(fault)
        except MirrorError as refused:
            if refused.errno not in (errno.EBUSY, errno.EAGAIN):
                raise
            trace.instant(trace.Track.RETRY, "device fault refused", fault.mm, fault.addr, fault.end)
            return refused
        return None

    def _count_access(self, access: Any, write: bool, finished: bool) -> None:
        stats = self.stats
        with self._stats_lock:
            stats.redone += access.redone
            if write:
                stats.write_bytes += access.done
                stats.writes += finished
            else:
                stats.read_bytes += access.done
                stats.reads += finished

    def _count_fault(self, reason: FaultReason) -> None:
        field = "detected" if reason is FaultReason.CHANGED else reason.value
        with self._stats_lock:
            setattr(self.stats, field, getattr(self.stats, field) + 1)


class _Patience:
    """How long an access keeps faulting without progress."""

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self.refused: MirrorError | None = None
        self._deadline: float | None = None

    def reset(self) -> None:
        self._deadline = None
        self.refused = None

    def again(self, mm: AddressSpace, what: str, access: Any) -> None:
        """Before a fault is served: ETIMEDOUT if it has been served for too long, and to no avail."""
        now = time.monotonic()
        if self._deadline is None:
            self._deadline = now + self.timeout
        if now <= self._deadline:
            return
        raise error(
            errno.ETIMEDOUT,
            f"{what}: device fault ({FAULT_REASONS[access.fault]}), not served in {self.timeout} s,",
            addr=access.fault_start,
            mm=mm,
            hint="the fault handler must map fault.addr before it returns; see also Device.fault_timeout",
        ) from self.refused


def check_access(mm: AddressSpace, what: str, addr: int, size: int) -> int:
    """The address as an int; EINVAL where [addr, addr + size) leaves the address space."""
    addr, size = integer(what, "addr", addr), integer(what, "size", size)
    if 0 <= addr <= addr + size <= USER_END:
        return addr
    if size < 0:
        wrong, hint = f"{size} bytes", "give a number of bytes, 0 or more"
    else:
        wrong = f"[{addr:#x}, {addr + size:#x}) is beyond the address space (0-{USER_END:#x})"
        hint = "give a virtual address; DMA addresses are for dma_read() and dma_write()"
    raise error(errno.EINVAL, f"{what}: {wrong}", addr=addr, mm=mm, hint=hint)
