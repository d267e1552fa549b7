# SPDX-License-Identifier: MIT
"""Device memory of shared virtual memory: which ranges move there, and which make room (``drm_pagemap``)."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from ..errors import MirrorError, error
from ..lock import DriverLock
from ..migrate import migrate_to_device, migrate_to_system
from ..walk import PAGE_SHIFT, PAGE_SIZE
from .svm_range import SvmContext, SvmRange, SvmStats

if TYPE_CHECKING:
    from ..device_memory import DeviceMemory
    from ..mm import AddressSpace

_TRIES = 3


class SvmDevmem:
    """``vram``, None for none, and the ranges of a driver in it. One thread at a time uses it.

    Flags of ranges are changed under ``lock``. ``clock`` gives seconds, for the timeslice.
    """

    def __init__(
        self,
        mm: AddressSpace,
        vram: DeviceMemory | None,
        lock: DriverLock,
        stats: SvmStats,
        clock: Callable[[], float],
    ) -> None:
        self.mm = mm
        self.vram = vram
        self._lock = lock
        self._stats = stats
        self._clock = clock
        self._there: dict[SvmRange, None] = {}
        #: The thread that migrates now: its own events tell it nothing.
        self._mover: int | None = None

    @property
    def moving(self) -> bool:
        """Whether the calling thread is in a migration of this driver: a callback's own event."""
        return self._mover == threading.get_ident()

    def migrate(self, rng: SvmRange, ctx: SvmContext) -> bool:
        """drm_gpusvm_migrate_to_devmem(), if it should be there and is not; whether anything moved.

        EBUSY: ``devmem_only``, and some of it does not move in three tries.
        """
        if self.vram is None or not ctx.devmem_possible or rng.resident:
            return False
        if not ctx.devmem_only:
            return self._move(self.vram, rng, ctx) > 0
        for _ in range(_TRIES):
            # So that what moves is counted as a whole.
            self.evict(rng)
            if self._move(self.vram, rng, ctx) == len(rng) >> PAGE_SHIFT:
                return True
        raise error(
            errno.EBUSY,
            f"svm: {rng!r} does not move to device memory as a whole",
            addr=rng.start,
            mm=self.mm,
            hint="unpin it, make room, or serve it without devmem_only",
        )

    def evict(self, rng: SvmRange) -> int:
        """drm_gpusvm_range_evict(): bring its pages home; how many came."""
        if self.vram is None or not rng.has_devmem_pages:
            self._there.pop(rng, None)
            return 0
        home = self._bring_home(self.vram, rng)
        self._there.pop(rng, None)
        with self._lock:
            rng.has_devmem_pages = rng.resident = False
        self._stats.add(evictions=home > 0, evicted_pages=home)
        return home

    def migrate_for_atomic(self, rng: SvmRange, addr: int, ctx: SvmContext) -> bool:
        """Move all of a range, with the page at addr; whether it is there. Errors as migrate()."""
        if self.vram is None or not ctx.devmem_possible:
            return False
        page = addr >> PAGE_SHIFT << PAGE_SHIFT
        if rng.resident and not self.vram.holds(page, page + PAGE_SIZE).all():
            # It stayed behind.
            with self._lock:
                rng.resident = False
        try:
            self.migrate(rng, replace(ctx, devmem_only=True))
        except MirrorError as refused:
            if refused.errno != errno.EBUSY or ctx.devmem_only:
                raise
            return False
        return True

    def adopt(self, rng: SvmRange, parent: SvmRange) -> None:
        """A range that was a part of another one."""
        rng.resident, rng.since = parent.resident, parent.since
        rng.has_devmem_pages = parent.has_devmem_pages
        if parent in self._there:
            self._there[rng] = None

    def forget(self, rng: SvmRange) -> None:
        """A range that is gone; its pages are others'."""
        self._there.pop(rng, None)

    def _move(self, vram: DeviceMemory, rng: SvmRange, ctx: SvmContext) -> int:
        if not self._make_room(vram, len(rng), ctx.timeslice):
            self._stats.add(no_room=1)
            return 0
        with self._lock:
            # Before: a CPU fault right after the move is to find it.
            rng.has_devmem_pages = rng.resident = True
            rng.since = self._clock()
        self._there[rng] = None
        moved = 0
        try:
            with self._move_own():
                found = migrate_to_device(self.mm, rng.start, rng.end, vram)
                # alloc_page() and clear_highpage() for what nobody has touched yet.
                vram.populate(rng.start, rng.end)
                moved = found
        except MirrorError as refused:
            if refused.errno not in (errno.EBUSY, errno.EINVAL, errno.ENOSPC):
                raise
            # Unmapped meanwhile, being forked, or full: it is served where it is.
        finally:
            if not moved:
                with self._lock:
                    rng.resident = False
        if moved:
            self._stats.add(migrations=1, migrated_pages=moved)
        return moved

    def _make_room(self, vram: DeviceMemory, size: int, timeslice: float) -> bool:
        """Evict ranges that have had their timeslice, the longest there first."""
        for victim in sorted(self._there, key=lambda one: one.since):
            if vram.size - vram.used >= size:
                return True
            if self._clock() - victim.since < timeslice:
                return False
            self.evict(victim)
        return vram.size - vram.used >= size

    def _bring_home(self, vram: DeviceMemory, rng: SvmRange) -> int:
        try:
            with self._move_own():
                return migrate_to_system(self.mm, rng.start, rng.end, vram)
        except MirrorError as refused:
            # The end of the mm has brought everything home.
            if refused.errno != errno.ESRCH:
                raise
            return 0

    @contextmanager
    def _move_own(self) -> Iterator[None]:
        self._mover = threading.get_ident()
        try:
            yield
        finally:
            self._mover = None
