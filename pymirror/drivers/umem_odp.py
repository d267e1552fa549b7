# SPDX-License-Identifier: MIT
"""UmemOdp: memory that a device maps on demand, one notifier and one DMA map (``struct ib_umem_odp``).

The part of RDMA's on-demand paging that knows HMM: page faults in, invalidations out. Keys and access rights
are the concern of odp.py.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from dataclasses import dataclass
from threading import get_ident
from typing import TYPE_CHECKING

import numpy as np

from .. import trace
from ..callback import may_wait
from ..dma.direction import DMA_MAPPING_ERROR
from ..dma.engine import IommuFaultError, StaleDmaError
from ..errors import error
from ..event import MmuNotifierRange
from ..hmm_dma_map import (
    HmmDmaMap,
    hmm_dma_map_alloc,
    hmm_dma_map_free,
    hmm_dma_map_pfns,
    hmm_dma_unmap_pfns,
)
from ..lock import DriverLock
from ..notifier import IntervalNotifier
from ..pfn import (
    HMM_PFN_ERROR,
    HMM_PFN_INOUT_FLAGS,
    HMM_PFN_REQ_FAULT,
    HMM_PFN_REQ_WRITE,
    HMM_PFN_VALID,
    HMM_PFN_WRITE,
    PfnArray,
    hmm_pfn_to_map_order,
)
from ..walk import PAGE_SHIFT, PAGE_SIZE
from .counts import Counts
from .retry import RangeRetry, RetryStats, invalidated
from .segments import Segments, dma_segments

if TYPE_CHECKING:
    from ..device import Device
    from ..mm import AddressSpace

#: Bits of an entry of ``dma_list``, below the DMA address.
ODP_READ_ALLOWED = 1 << 0
ODP_WRITE_ALLOWED = 1 << 1
ODP_DMA_ADDR_MASK = ~0xFFF & (1 << 64) - 1
#: Seconds, of the order that an access takes.
_ACCESS_S = 0.001


@dataclass
class OdpStats(Counts):
    """Counts: ``faults`` and ``invalidations`` are events, the others pages (``rdma statistic show mr``).

    ``false_invalidations`` are those that met nothing mapped.
    """

    faults: int = 0
    invalidations: int = 0
    false_invalidations: int = 0
    page_faults: int = 0
    page_invalidations: int = 0
    page_prefetch: int = 0


class UmemOdp:
    """[start, end) bytes on demand, an entry each ``1 << page_shift`` bytes.

    ``dma_list`` is uint64, an entry a page: its DMA address with ODP_READ_ALLOWED and ODP_WRITE_ALLOWED, 0
    where nothing is mapped. ``npages`` are mapped. Both are ``umem_mutex``'s; who reads ``dma_list`` without
    it may see what was taken off just now, and the IOMMU refuses that.
    """

    def __init__(
        self,
        mm: AddressSpace,
        device: Device,
        start: int,
        end: int,
        stats: OdpStats,
        *,
        timeout: float,
        retries: RetryStats,
        page_shift: int = PAGE_SHIFT,
        emptied: Callable[[UmemOdp], object] = lambda umem: None,
    ) -> None:
        """ib_umem_odp_get(). ``emptied(umem)`` is called in callbacks that took off the last page.

        ``stats`` and ``retries`` are counted on.

        Errors as hmm_dma_map_alloc() and IntervalNotifier.
        """
        self.mm = mm
        self.device = device
        self.start = start
        self.end = end
        self.page_shift = page_shift
        self.npages = 0
        self.stats = stats
        self.dying = False
        #: Accesses that use it, for who destroys it when it is empty; guarded by the owner.
        self.users = 0
        self.dma_list: PfnArray = np.zeros((end - start) >> page_shift, np.uint64)
        self.umem_mutex = DriverLock("umem_odp->umem_mutex")
        self.retry = RangeRetry(self.umem_mutex, timeout=timeout, stats=retries)
        self._emptied = emptied
        # Threads in access(), by ident; single operations only.
        self._accessing: set[int] = set()
        self._map: HmmDmaMap | None = None
        self.notifier = IntervalNotifier(
            mm, start, end - start, self._invalidate, update_lock=self.umem_mutex
        )
        try:
            self._map = hmm_dma_map_alloc(device, self.notifier, start, self.dma_list.size, 1 << page_shift)
        except BaseException:
            self.notifier.remove()
            raise

    def release(self) -> None:
        """ib_umem_odp_release(): off the device, no callback any more, IOVAs back. Idempotent.

        Waits for accesses that have translated an address: its IOVA is another region's soon. EDEADLK in a
        callback and under a driver lock.
        """
        may_wait("odp: release")
        with self.umem_mutex:
            self.dying = True
        while self._accessing - {get_ident()}:
            time.sleep(_ACCESS_S)
        self.notifier.remove()
        with self.umem_mutex:
            self._unmap(self.start, self.end)
            map, self._map = self._map, None
        if map is not None:
            hmm_dma_map_free(self.device, map)

    def map_dma(
        self, start: int, end: int, write: bool, *, fault: bool = True, prefetch: bool = False
    ) -> int:
        """ib_umem_odp_map_dma_and_lock(), which unlocks: map the pages that [start, end) touches.

        Without ``fault`` only what is present. Returns the pages that were mapped. EFAULT, EPERM as
        hmm_range_fault(); EBUSY at the deadline; EINVAL: CPU mappings smaller than an entry, or released.
        """
        first, last = self._entries(start, end)
        request = HMM_PFN_REQ_FAULT | (HMM_PFN_REQ_WRITE if write else 0)
        mapped = 0
        # What was mapped here after the registration is not watched yet.
        self.mm.watch(start // PAGE_SIZE * PAGE_SIZE, -(-end // PAGE_SIZE) * PAGE_SIZE, files=True)

        def program(seq: int, pfns: PfnArray) -> None:
            nonlocal mapped
            self._check_living(start)
            self._check_order(pfns, start)
            mapped = self._program(seq, first, last, pfns)
            self._count_fault(mapped, prefetch)

        what = "odp prefetch" if prefetch else "odp page fault"
        with trace.span(trace.Track.FAULT, what, self.mm, start, end, write=write):
            self.retry.fault(
                self.notifier,
                self.start + (first << self.page_shift),
                self.start + (last << self.page_shift),
                program,
                default_flags=request if fault else 0,
            )
        return mapped

    def permits(self, addr: int, n: int, write: bool) -> bool:
        """Whether the entries of [addr, addr + n) permit the access at this moment."""
        first, last = self._entries(addr, addr + n)
        allowed = np.uint64(ODP_WRITE_ALLOWED if write else ODP_READ_ALLOWED)
        return bool((self.dma_list[first:last] & allowed).all())

    def access(self, addr: int, memory: memoryview, write: bool) -> bool:
        """The device's copy of [addr, addr + len(memory)); False where it met a page fault."""
        try:
            self._accessing.add(get_ident())
            # After that: either release() waits for this access, or its end is seen here.
            segments = None if self.dying else self._translate(addr, len(memory), write)
            if segments is None:
                return False
            for daddr, n in segments:
                if write:
                    self.device.dma_write(daddr, memory[:n])
                else:
                    self.device.dma_read_into(daddr, memory[:n])
                memory = memory[n:]
        except StaleDmaError:
            raise
        except IommuFaultError:
            return False
        finally:
            self._accessing.discard(get_ident())
        return True

    def _translate(self, addr: int, n: int, write: bool) -> Segments | None:
        """DMA addresses and lengths of [addr, addr + n), None where an entry does not permit the access."""
        first, last = self._entries(addr, addr + n)
        allowed = ODP_WRITE_ALLOWED if write else ODP_READ_ALLOWED
        size = 1 << self.page_shift
        if last - first == 1:
            entry = int(self.dma_list[first])
            found = [((entry & ODP_DMA_ADDR_MASK) + (addr - self.start) % size, n)]
            return found if entry & allowed else None
        # Once, for the callbacks change them meanwhile.
        entries = self.dma_list[first:last].copy()
        if not (entries & np.uint64(allowed)).all():
            return None
        return dma_segments(entries & np.uint64(ODP_DMA_ADDR_MASK), self.start + first * size, addr, n, size)

    def _program(self, seq: int, first: int, last: int, pfns: PfnArray) -> int:
        assert self._map is not None
        per_entry = self._map.pages_per_entry
        kept = self._map.pfn_list[first * per_entry : last * per_entry]
        kept &= np.uint64(HMM_PFN_INOUT_FLAGS)
        kept |= np.where((pfns & np.uint64(HMM_PFN_ERROR)) != 0, 0, pfns).astype(np.uint64)
        daddrs = hmm_dma_map_pfns(self.device, self._map, first, last - first, seq=seq)
        writable = ((pfns & np.uint64(HMM_PFN_WRITE)) != 0).reshape(-1, per_entry).all(axis=1)
        entries = daddrs | np.uint64(ODP_READ_ALLOWED) | writable * np.uint64(ODP_WRITE_ALLOWED)
        entries[daddrs == DMA_MAPPING_ERROR] = 0
        found = self.dma_list[first:last]
        self.npages += int(np.count_nonzero(entries)) - int(np.count_nonzero(found))
        changed = int(np.count_nonzero((entries != found) & (entries != 0)))
        found[:] = entries
        return changed

    def _invalidate(self, sub: IntervalNotifier, update: MmuNotifierRange, cur_seq: int) -> bool:
        def take_off() -> None:
            sub.set_seq(cur_seq)
            before = self.npages
            self._unmap(max(update.start, self.start), min(update.end, self.end))
            gone = before - self.npages
            self.stats.add(invalidations=1, false_invalidations=not gone, page_invalidations=gone)
            if gone and not self.npages:
                self._emptied(self)

        return invalidated(self.umem_mutex, update, take_off)

    def _unmap(self, start: int, end: int) -> None:
        """ib_umem_odp_unmap_dma_pages(), with the lock held."""
        if self._map is None or start >= end:
            return
        first, last = self._entries(start, end)
        hmm_dma_unmap_pfns(self.device, self._map, first, last - first)
        self.npages -= int(np.count_nonzero(self.dma_list[first:last]))
        self.dma_list[first:last] = 0

    def _entries(self, start: int, end: int) -> tuple[int, int]:
        size = 1 << self.page_shift
        return (start - self.start) >> self.page_shift, -(-(end - self.start) // size)

    def _count_fault(self, mapped: int, prefetch: bool) -> None:
        if prefetch:
            self.stats.add(page_prefetch=mapped)
        else:
            self.stats.add(faults=1, page_faults=mapped)

    def _check_living(self, addr: int) -> None:
        if self.dying:
            raise error(
                errno.EINVAL,
                "odp: the memory region was deregistered",
                addr=addr,
                hint="finish the work that uses a key, then dereg_mr()",
            )

    def _check_order(self, pfns: PfnArray, addr: int) -> None:
        """An entry is mapped by the CPU as a whole, or it is not one piece of memory."""
        valid = (pfns & np.uint64(HMM_PFN_VALID)) != 0
        if not (valid & (hmm_pfn_to_map_order(pfns) + np.uint64(PAGE_SHIFT) < self.page_shift)).any():
            return
        raise error(
            errno.EINVAL,
            f"odp: pages of the CPU smaller than the entries of {1 << self.page_shift} bytes,",
            addr=addr,
            mm=self.mm,
            hint="register without IB_ACCESS_HUGETLB",
        )
