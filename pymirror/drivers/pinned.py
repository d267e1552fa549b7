# SPDX-License-Identifier: MIT
"""pinned: a driver whose device cannot be stopped, so that it pins what it maps (pin_user_pages()).

Pinning is slow, so registrations are kept in a cache, by address, the least recently used going first. That
is where the known problem comes from: when the process unmaps memory and maps other memory at the same
address, the cache finds the old registration, and the device goes on with pages that nobody sees any more.
``notified=True`` is the cure (hfi1's mmu_rb, rdma-core users' memory hooks): a notifier for each
registration, which takes it out of the cache. The device is not stopped by it: what is in use stays pinned
until it has been put.
"""

from __future__ import annotations

import errno
import os
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

from ..callback import may_wait
from ..device import Device
from ..errors import MirrorError
from ..event import Event, MmuNotifierRange
from ..gup import PinnedPages, pin_user_pages, unpin_user_pages
from ..gup_dma import gup_range_dma_map, gup_range_dma_unmap
from ..lock import DriverLock
from ..notifier import IntervalNotifier
from ..pfn import PfnArray
from ..walk import PAGE_SIZE, check_interval
from .counts import Counts, take
from .registration_cache import Registration, RegistrationCache
from .retry import HMM_RANGE_DEFAULT_TIMEOUT, RangeRetry, invalidated
from .segments import dma_segments

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from ..mm import AddressSpace

#: Bytes that stay pinned in the cache.
CACHE_SIZE = 256 << 20
#: What leaves pinned pages what they are at their addresses: a fork copies for the child at once.
_KEEPS = (Event.PROTECTION_PAGE, Event.SOFT_DIRTY)


@dataclass
class PinnedStats(Counts):
    """Counts: look-ups in the cache (``hits``, ``misses``), ``registrations`` made and the ``pages`` that
    they pinned, ``merges`` of registrations that overlapped, ``evictions`` for want of room,
    ``invalidations`` that took a registration out of the cache (with ``notified``).
    """

    hits: int = 0
    misses: int = 0
    registrations: int = 0
    pages: int = 0
    merges: int = 0
    evictions: int = 0
    invalidations: int = 0


class Pinned:
    """A pinning driver over ``mm`` with its registration cache of at most ``cache_size`` bytes.

    ``notified``: invalidations take registrations out of the cache; without it a look-up may find one whose
    pages are not the process's any more. ``timeout`` is for how many seconds a notified registration is
    tried again. Close the driver before its address space, which else reports the pins as leaks.
    """

    def __init__(
        self,
        mm: AddressSpace,
        name: str = "pinned",
        *,
        device: Device | None = None,
        cache_size: int = CACHE_SIZE,
        notified: bool = False,
        timeout: float = HMM_RANGE_DEFAULT_TIMEOUT,
    ) -> None:
        if cache_size < 0:
            raise MirrorError(errno.EINVAL, f"Pinned: cache_size {cache_size}", hint="give bytes, 0 or more")
        self.mm = mm
        self.device = Device(name) if device is None else device
        self.cache_size = cache_size
        self.notified = notified
        self.stats = PinnedStats()
        #: Of the cache and what is in it; callbacks take it, so no memory is pinned under it.
        self.lock = DriverLock("pinned->update")
        self.retry = RangeRetry(self.lock, timeout=timeout)
        self._registering = threading.Lock()
        self._cache = RegistrationCache()
        self._held: set[Registration] = set()
        self._removable: deque[IntervalNotifier] = deque()

    @property
    def pinned(self) -> int:
        """Bytes that are pinned now."""
        with self.lock:
            return sum(map(len, self._held))

    @property
    def cached(self) -> list[Registration]:
        """What look-ups find, the least recently used first."""
        with self.lock:
            return list(self._cache)

    def close(self) -> None:
        """Give everything back. Idempotent, and quiet in a forked child. EDEADLK in a callback.

        EBUSY: a registration is in use.
        """
        if os.getpid() != self.mm.pid:
            return
        self.flush()
        with self.lock:
            used = next(iter(self._held), None)
        if used is not None:
            raise MirrorError(
                errno.EBUSY, f"close: {used!r}", addr=used.start, hint="put() it when the device is done"
            )

    def __repr__(self) -> str:
        return f"<Pinned {self.device.name!r} {len(self._held)} registrations, {self.stats}>"

    def __enter__(self) -> Pinned:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def register(self, addr: int, n: int) -> Registration:
        """Pages that hold [addr, addr + n), pinned and mapped: from the cache, or now. put() it in the end.

        EINVAL: no bytes, beyond the address space. EBUSY: with ``notified``, invalidated for ``timeout``
        seconds. Else as pin_user_pages() and gup_range_dma_map(). EDEADLK in a callback and
        under a driver lock.
        """
        may_wait("register")
        start, end = addr // PAGE_SIZE * PAGE_SIZE, -(-(addr + n) // PAGE_SIZE) * PAGE_SIZE
        check_interval("register", start, max(start, end) if n > 0 else start, mm=self.mm)
        with self._registering:
            self._reap()
            with self.lock:
                if (found := self._cache.look_up(start, end)) is not None:
                    found.users += 1
                    self.stats.add(hits=1)
                    return found
            self.stats.add(misses=1)
            return self._register(start, end)

    def put(self, registration: Registration) -> None:
        """The device is done with it. In the cache it stays pinned; else its last user unpins it.

        EINVAL: it has no users, or is another driver's.
        """
        with self.lock:
            if registration.users < 1 or registration not in self._held:
                raise MirrorError(
                    errno.EINVAL,
                    f"put: {registration!r}",
                    addr=registration.start,
                    hint="put() what register() of the same driver has given, once for each time",
                )
            registration.users -= 1
            self._free_unused(registration)
            self._evict(self.cache_size)

    @contextmanager
    def registered(self, addr: int, n: int) -> Iterator[Registration]:
        """register() and put() around a body."""
        registration = self.register(addr, n)
        try:
            yield registration
        finally:
            self.put(registration)

    def read(self, addr: int, n: int) -> bytes:
        """The device reads n bytes at addr: from the pages that are pinned for that address.

        Errors as register(); EFAULT where the memory cannot be pinned.
        """
        if not n:
            return b""
        with self.registered(addr, n) as registration:
            return self.device.dma_read_sg(self._segments(registration, addr, n))

    def write(self, addr: int, data: Buffer) -> None:
        """The device writes at addr: to the pages that are pinned for that address. Errors as read()."""
        view = memoryview(data).cast("B")
        if not len(view):
            return
        with self.registered(addr, len(view)) as registration:
            registration.dirty = True
            self.device.dma_write_sg(self._segments(registration, addr, len(view)), view)

    def flush(self) -> None:
        """Empty the cache. What is in use is unpinned when it is put. EDEADLK in a callback."""
        may_wait("flush")
        with self._registering:
            with self.lock:
                for registration in list(self._cache):
                    self._drop(registration)
            self._reap()

    def _segments(self, registration: Registration, addr: int, n: int) -> list[tuple[int, int]]:
        assert registration.daddrs is not None
        return dma_segments(registration.daddrs, registration.start, addr, n)

    def _register(self, start: int, end: int) -> Registration:
        """One of its own, or one for all that it overlaps: registrations in the cache do not."""
        with self.lock:
            overlapping = self._cache.overlapping(start, end)
        if overlapping:
            union = min(start, overlapping[0].start), max(end, overlapping[-1].end)
            # What was cached may not be there any more.
            with suppress(MirrorError):
                registration = self._insert(*union, overlapping)
                self.stats.add(merges=1)
                return registration
        return self._insert(start, end, overlapping)

    def _insert(self, start: int, end: int, instead_of: list[Registration]) -> Registration:
        """A new registration in the place of those, with its first user."""
        registration = Registration(start, end)
        try:
            self._pin(registration, instead_of)
        except MirrorError as refused:
            if refused.errno != errno.ENOMEM:
                raise
            # RLIMIT_MEMLOCK, or the memory: what is only kept for later makes room.
            with self.lock:
                self._evict(0)
            self._pin(registration, instead_of)
        return registration

    def _pin(self, registration: Registration, instead_of: list[Registration]) -> None:
        """Pin and map; with ``notified`` until nothing was invalidated from before the pin on."""

        def look(seq: int) -> tuple[PinnedPages, PfnArray]:
            pages = (registration.end - registration.start) // PAGE_SIZE
            pin = pin_user_pages(self.mm, registration.start, pages)
            try:
                return pin, gup_range_dma_map(pin, self.device)
            except BaseException:
                unpin_user_pages(pin)
                raise

        def program(seq: int, seen: tuple[PinnedPages, PfnArray]) -> None:
            registration.pin, registration.daddrs = seen
            registration.users = 1
            self._held.add(registration)
            self.stats.add(registrations=1, pages=seen[0].npages)
            for one in instead_of:
                self._drop(one)
            self._cache.add(registration)
            self._evict(self.cache_size)

        def undo(seen: tuple[PinnedPages, PfnArray]) -> None:
            """It was invalidated meanwhile, or Ctrl-C struck, wherever that was."""
            with self.lock:
                self._forget(registration)
            self._unpin(*seen, dirty=False)

        if not self.notified:
            seen = look(0)
            try:
                with self.lock:
                    program(0, seen)
            except BaseException:
                undo(seen)
                raise
            return
        registration.notifier = IntervalNotifier(
            self.mm,
            registration.start,
            len(registration),
            lambda sub, update, seq: self._invalidate(registration, sub, update, seq),
            update_lock=self.lock,
        )
        try:
            self.retry.run(
                registration.notifier,
                look,
                program,
                undo=undo,
                addr=registration.start,
            )
        except BaseException:
            registration.notifier.remove()
            registration.notifier = None
            raise

    def _invalidate(
        self, registration: Registration, sub: IntervalNotifier, update: MmuNotifierRange, cur_seq: int
    ) -> bool:
        def take_out() -> None:
            sub.set_seq(cur_seq)
            if update.event not in _KEEPS and registration.cached:
                self.stats.add(invalidations=1)
                self._drop(registration)

        return invalidated(self.lock, update, take_out)

    def _evict(self, size: int) -> None:
        """Down to so many bytes in the cache, of what nobody uses; with the lock held."""
        for registration in self._cache.beyond(size):
            self.stats.add(evictions=1)
            self._drop(registration)

    def _drop(self, registration: Registration) -> None:
        """Out of the cache, and unpinned if nobody uses it; with the lock held, in callbacks too."""
        self._cache.discard(registration)
        self._free_unused(registration)

    def _forget(self, registration: Registration) -> None:
        """As if it had never been made; its pin is the caller's."""
        self._cache.discard(registration)
        self._held.discard(registration)
        registration.users = 0

    def _free_unused(self, registration: Registration) -> None:
        if registration.cached or registration.users or registration not in self._held:
            return
        self._held.discard(registration)
        assert registration.pin is not None
        assert registration.daddrs is not None
        self._unpin(registration.pin, registration.daddrs, dirty=registration.dirty)
        if registration.notifier is not None:
            # In a callback none can be removed.
            self._removable.append(registration.notifier)

    def _unpin(self, pin: PinnedPages, daddrs: PfnArray, *, dirty: bool) -> None:
        gup_range_dma_unmap(pin, self.device, daddrs, dirty=dirty)
        if pin.pinned:
            unpin_user_pages(pin, dirty=dirty)

    def _reap(self) -> None:
        """Remove the notifiers of registrations that are gone; outside of callbacks."""
        while (notifier := take(self._removable)) is not None:
            notifier.remove()
