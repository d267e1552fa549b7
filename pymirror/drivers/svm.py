# SPDX-License-Identifier: MIT
"""svm: shared virtual memory, as nouveau takes faults in and drm_gpusvm and xe serve them.

The device faults on any address of the process. Faults are buffered; a worker sorts and coalesces a batch,
finds or makes the range around each address, moves it to device memory if it should, maps its pages, and lets
the device replay. Unmapped ranges are marked in the callback and collected before the next fault.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from ..callback import may_wait
from ..device import Device
from ..errors import MirrorError, error
from ..event import Event, MmuNotifierRange
from ..lock import DriverLock
from ..notifier import IntervalNotifier
from ..page_table import PM_ENTRY_FENCED
from ..pfn import HMM_PFN_REQ_FAULT, HMM_PFN_REQ_WRITE, HMM_PFN_VALID, HMM_PFN_WRITE, PfnArray
from ..vma import Vma
from ..walk import PAGE_SHIFT, check_interval
from .retry import HMM_RANGE_DEFAULT_TIMEOUT, RangeRetry, invalidated
from .svm_devmem import SvmDevmem
from .svm_exclusive import map_exclusive
from .svm_faults import FaultIntake
from .svm_range import SvmContext, SvmNotifier, SvmRange, SvmStats, check_chunks, chunk_of

if TYPE_CHECKING:
    from ..device_memory import DeviceMemory
    from ..mm import AddressSpace

__all__ = ["CHUNK_SIZES", "DROP", "NOTIFIER_SIZE", "SPLIT", "Svm", "SvmContext", "SvmRange", "SvmStats"]

CHUNK_SIZES = (2 << 20, 64 << 10, 4 << 10)
NOTIFIER_SIZE = 32 << 20
#: A range that comes and goes is looked up again so often: the process maps and unmaps meanwhile.
_ATTEMPTS = 8
DROP, SPLIT = "drop", "split"


class Svm:
    """Shared virtual memory of a device over ``mm``, and the worker that serves its faults.

    ``vram``: its memory, None for a device without. ``notifier_size`` and ``chunk_sizes`` are bytes, powers
    of two. ``partial_unmap``: what becomes of a range of which a part is unmapped, "drop" (it goes, and its
    device pages come home: drm_gpusvm) or "split" (what is left stays: amdkfd). ``clock`` gives seconds.

    Device accesses raise what their fault was cancelled with: EFAULT where no memory is, or it must move to
    the device (``devmem_only``) and does not, EPERM for a write to a read-only vma, EOPNOTSUPP for an atomic
    on shared or pinned memory; ETIMEDOUT, ESRCH.
    """

    def __init__(
        self,
        mm: AddressSpace,
        name: str = "gpu0",
        *,
        device: Device | None = None,
        vram: DeviceMemory | None = None,
        notifier_size: int = NOTIFIER_SIZE,
        chunk_sizes: Sequence[int] = CHUNK_SIZES,
        partial_unmap: str = DROP,
        ctx: SvmContext | None = None,
        timeout: float = HMM_RANGE_DEFAULT_TIMEOUT,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        check_chunks(chunk_sizes, notifier_size)
        if partial_unmap not in (DROP, SPLIT):
            raise MirrorError(
                errno.EINVAL, f"svm: partial_unmap={partial_unmap!r}", hint='give "drop" or "split"'
            )
        self.mm = mm
        self.device = Device(name) if device is None else device
        self.vram = vram
        self.notifier_size = notifier_size
        self.chunk_sizes = tuple(chunk_sizes)
        self.partial_unmap = partial_unmap
        self.ctx = SvmContext() if ctx is None else ctx
        self.notifier_lock = DriverLock("gpusvm->notifier_lock")
        self.retry = RangeRetry(self.notifier_lock, timeout=timeout)
        self.stats = SvmStats()
        # Held while a fault is served, over migration and mapping; callbacks do not take it.
        self._svm_lock = threading.Lock()
        self._closed = False
        self._notifiers: dict[int, SvmNotifier] = {}
        self._collect: dict[SvmRange, None] = {}
        self._devmem = SvmDevmem(mm, vram, self.notifier_lock, self.stats, clock)
        self.faults = FaultIntake(
            self.device,
            lambda fault: self.handle_fault(fault.addr, fault.write, atomic=fault.atomic),
            self.stats,
            timeout=4 * timeout + 1.0,
            busy_is_final=self.ctx.devmem_only,
        )

    def close(self) -> None:
        """End the worker; device pages home, no notifier any more. Idempotent, quiet in a forked child.

        EDEADLK in a callback and under a driver lock.
        """
        if os.getpid() != self.mm.pid:
            return
        may_wait("svm: close")
        self.faults.close()
        with self._svm_lock:
            self._closed = True
            self._garbage_collect()
            for rng in self.ranges:
                self._remove(rng)
            for notifier in self.notifiers:
                self._remove_notifier(notifier)

    def __repr__(self) -> str:
        return f"<Svm {self.device.name!r} {len(self._notifiers)} notifiers, {self.stats}>"

    def __enter__(self) -> Svm:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    @property
    def owner(self) -> object:
        """device_private_page_owner: whose MIGRATE events and device-private pages are the driver's own."""
        return self.device if self.vram is None else self.vram.owner

    @property
    def ranges(self) -> list[SvmRange]:
        """In order of address."""
        with self.notifier_lock:
            windows = [notifier for _, notifier in sorted(self._notifiers.items())]
            return [rng for notifier in windows for rng in notifier.ranges]

    @property
    def notifiers(self) -> list[SvmNotifier]:
        """In order of address."""
        with self.notifier_lock:
            return [notifier for _, notifier in sorted(self._notifiers.items())]

    def handle_fault(
        self, addr: int, write: bool = False, ctx: SvmContext | None = None, *, atomic: bool = False
    ) -> SvmRange:
        """xe_svm_handle_pagefault(): find or insert the range, migrate it, get its pages, map them.

        For an ``atomic`` the memory moves to the device, or, where it does not, the device has the page to
        itself until the CPU touches it.

        ENOENT: no vma. EPERM: a write to a vma that is not writable, or with ``read_only``. EFAULT: no
        memory can be had, or it is unmapped again and again. EBUSY: at the deadline, or ``devmem_only``.
        EOPNOTSUPP: an atomic on memory that can neither move nor be had alone. ENOMEM, ESRCH; EDEADLK in a
        callback and under a driver lock.
        """
        may_wait("svm: handle_fault")
        ctx = self.ctx if ctx is None else ctx
        sizes = self.chunk_sizes
        with self._svm_lock:
            self._check_open()
            for _ in range(_ATTEMPTS):
                self._garbage_collect()
                found = self._find_or_insert(addr, write or atomic, ctx, sizes)
                if not atomic and self._serves(found, addr, write):
                    self.stats.add(valid=1)
                    return found
                try:
                    if self._map(found, addr, write, ctx, atomic):
                        self.stats.add(faults=1, pages=len(found) >> PAGE_SHIFT)
                        return found
                except MirrorError as refused:
                    if found.unmapped:
                        continue
                    if refused.errno != errno.EFAULT or len(found) == self.chunk_sizes[-1]:
                        raise
                    # Not all of a chunk can be had: beyond the end of a file, say.
                    self._remove(found, keep_notifier=True)
                    sizes = self.chunk_sizes[-1:]
        raise error(
            errno.EFAULT,
            f"svm: unmapped or made read-only {_ATTEMPTS} times while it was faulted",
            addr=addr,
            mm=self.mm,
            hint="go again when it stays as it is",
        )

    def bind(self, start: int, end: int, ctx: SvmContext | None = None) -> int:
        """DRM_NOUVEAU_SVM_BIND: move [start, end) to device memory now, mapping nothing; ranges moved.

        ENOENT at a hole, after what precedes it has moved. EINVAL: not page-aligned, empty. EBUSY with
        ``devmem_only``. EDEADLK in a callback and under a driver lock.
        """
        may_wait("svm: bind")
        start, end = check_interval("svm: bind", start, end, mm=self.mm)
        ctx = self.ctx if ctx is None else ctx
        moved = 0
        with self._svm_lock:
            self._check_open()
            self._garbage_collect()
            at = start
            while at < end:
                found = self._find_or_insert(at, False, ctx)
                moved += self._devmem.migrate(found, ctx)
                at = found.end
        return moved

    def evict(self, rng: SvmRange) -> int:
        """drm_gpusvm_range_evict(): bring its pages home; how many came. Errors as migrate_to_system()."""
        may_wait("svm: evict")
        with self._svm_lock:
            return self._devmem.evict(rng)

    def _invalidate(
        self, notifier: SvmNotifier, sub: IntervalNotifier, update: MmuNotifierRange, cur_seq: int
    ) -> bool:
        def take_off() -> None:
            sub.set_seq(cur_seq)
            own = update.owner is self.owner and self._devmem.moving
            mapped = False
            for rng in notifier.find(update.start, update.end):
                mapped |= self.device.page_table.clear(rng.start, rng.end) > 0
                rng.valid = False
                if own:
                    continue
                if update.event is Event.UNMAP:
                    rng.holes.append((max(rng.start, update.start), min(rng.end, update.end)))
                    self._collect[rng] = None
                elif update.event in (Event.CLEAR, Event.MIGRATE):
                    # The CPU touched it, and it is to move again.
                    rng.resident = False
            if own:
                self.stats.add(own_events=1)
            else:
                self.stats.add(invalidations=1, false_invalidations=not mapped)

        return invalidated(self.notifier_lock, update, take_off)

    # From here on with _svm_lock held.

    def _check_open(self) -> None:
        if self._closed:
            raise MirrorError(errno.ESRCH, "svm: the driver is closed", hint="make another one")

    def _find_or_insert(
        self, addr: int, write: bool, ctx: SvmContext, sizes: Sequence[int] | None = None
    ) -> SvmRange:
        vma = self.mm.vma_lookup(addr)
        if vma is None:
            raise error(errno.ENOENT, "svm: no vma", addr=addr, mm=self.mm, hint="map memory there first")
        if write and (ctx.read_only or not vma.prot & mmap.PROT_WRITE):
            raise error(errno.EPERM, "svm: a write to read-only memory", addr=addr, mm=self.mm)
        notifier = self._notifier_at(addr)
        with self.notifier_lock:
            found = notifier.find(addr, addr + 1)
        if found and self._is_alike(found[0], vma):
            return found[0]
        for rng in found:
            # Parts of it permit something else by now.
            self._remove(rng, keep_notifier=True)
        start, end = chunk_of(
            addr,
            self.chunk_sizes if sizes is None else sizes,
            (max(vma.start, notifier.start), min(vma.end, notifier.end)),
            lambda start, end: not notifier.find(start, end),
            lambda start, end: (
                end - start > ctx.check_pages_threshold or self._has_pages(notifier, start, end)
            ),
        )
        return self._insert(SvmRange(notifier, start, end))

    def _insert(self, rng: SvmRange) -> SvmRange:
        with self.notifier_lock:
            rng.notifier.insert(rng)
        self.stats.add(inserted=1)
        return rng

    def _serves(self, rng: SvmRange, addr: int, write: bool) -> bool:
        """Whether another fault has mapped it meanwhile, and no invalidation waits for its callback."""
        page = addr >> PAGE_SHIFT << PAGE_SHIFT
        entry = int(self.device.page_table.entries(page, page + (1 << PAGE_SHIFT))[0])
        return rng.valid and (rng.writable or not write) and bool(entry) and not entry & PM_ENTRY_FENCED

    def _notifier_at(self, addr: int) -> SvmNotifier:
        index = addr // self.notifier_size
        if index not in self._notifiers:
            made = SvmNotifier(self.mm, addr, self.notifier_size, self.notifier_lock, self._invalidate)
            with self.notifier_lock:
                self._notifiers[index] = made
        return self._notifiers[index]

    def _is_alike(self, rng: SvmRange, vma: Vma) -> bool:
        """Whether the whole of a range has the permissions of that vma."""
        at = rng.start
        for one in self.mm.vmas(rng.start, rng.end):
            if one.start > at or one.prot != vma.prot:
                return False
            at = one.end
        return at >= rng.end

    def _has_pages(self, notifier: SvmNotifier, start: int, end: int) -> bool:
        """drm_gpusvm_check_pages(): whether the CPU has all of [start, end)."""
        pfns = self.retry.fault(
            notifier.sub, start, end, lambda seq, pfns: None, dev_private_owner=self.owner
        )
        return bool((pfns & np.uint64(HMM_PFN_VALID)).all())

    def _map(self, rng: SvmRange, addr: int, write: bool, ctx: SvmContext, atomic: bool) -> bool:
        """Where the memory should be, and mapped with the access that is asked for; False: again."""
        if not atomic:
            self._devmem.migrate(rng, ctx)
            self._get_pages(rng, write)
        elif not self._devmem.migrate_for_atomic(rng, addr, ctx):
            map_exclusive(self.retry, self.device, rng.notifier.sub, addr, self.owner)
            self.stats.add(exclusive=1)
            return True
        else:
            self._get_pages(rng, True)
        if rng.writable or not (write or atomic):
            return True
        # Device pages that a fork made read-only: copy-on-write is broken at home, as of all memory.
        self._devmem.evict(rng)
        self._get_pages(rng, True)
        return not atomic

    def _get_pages(self, rng: SvmRange, write: bool) -> None:
        """drm_gpusvm_range_get_pages(), and the device's page table."""

        def program(seq: int, pfns: PfnArray) -> bool:
            if rng.unmapped:
                raise error(errno.EFAULT, "svm: unmapped meanwhile", addr=rng.start, mm=self.mm)
            if not self.device.page_table.map(rng.notifier.sub, seq, rng.start, pfns):
                return False
            rng.valid = True
            rng.writable = bool((pfns & np.uint64(HMM_PFN_WRITE)).all())
            return True

        self.retry.fault(
            rng.notifier.sub,
            rng.start,
            rng.end,
            program,
            default_flags=HMM_PFN_REQ_FAULT | (HMM_PFN_REQ_WRITE if write else 0),
            dev_private_owner=self.owner,
        )

    def _garbage_collect(self) -> None:
        """What callbacks have marked as unmapped."""
        while (rng := next(iter(self._collect), None)) is not None:
            if self.partial_unmap == SPLIT and self._split(rng):
                self.stats.add(split=1)
            elif rng in rng.notifier.find(rng.start, rng.end):
                self._remove(rng)
                self.stats.add(dropped=1)
            with self.notifier_lock:
                # Not before: where this is cut short, the next fault collects it.
                self._collect.pop(rng, None)

    def _split(self, rng: SvmRange) -> bool:
        """svm_range_split(): what is left of a range become ranges of their own, where they are."""
        with self.notifier_lock:
            pieces = rng.left()
            if not pieces or rng not in rng.notifier.find(rng.start, rng.end):
                return False
            rng.notifier.remove(rng)
            for start, end in pieces:
                part = SvmRange(rng.notifier, start, end)
                self._devmem.adopt(part, rng)
                rng.notifier.insert(part)
        self._devmem.forget(rng)
        return True

    def _remove(self, rng: SvmRange, *, keep_notifier: bool = False) -> None:
        """drm_gpusvm_range_remove(): pages home; and its notifier with the last range of it."""
        self._devmem.evict(rng)
        with self.notifier_lock:
            rng.notifier.remove(rng)
            self.device.page_table.clear(rng.start, rng.end)
            rng.valid = False
            empty = not rng.notifier.ranges
        if empty and not keep_notifier:
            self._remove_notifier(rng.notifier)

    def _remove_notifier(self, notifier: SvmNotifier) -> None:
        notifier.sub.remove()
        with self.notifier_lock:
            self._notifiers.pop(notifier.start // self.notifier_size, None)
