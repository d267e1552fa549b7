# SPDX-License-Identifier: MIT
"""hmm_dma_map_alloc() and its kin: the DMA side of HMM since 6.16, page by page under a notifier.

IOVAs are allocated once for all the pages that may come. What is mapped of them is remembered in the pfns
themselves, by bits that hmm_range_fault() leaves alone, so that mapping again costs nothing.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from . import trace
from ._shim import ffi, lib
from .arguments import check_is, integer
from .dma.direction import DMA_BIDIRECTIONAL, DMA_MAPPING_ERROR
from .dma.domain import checked
from .dma.record import DmaMapping
from .errors import MirrorError, error
from .pfn import HMM_PFN_DMA_MAPPED, HMM_PFN_INOUT_FLAGS, HMM_PFN_ORDER_SHIFT, HMM_PFN_VALID
from .walk import PAGE_SHIFT, PAGE_SIZE, check_covers, check_interval

if TYPE_CHECKING:
    from .dma.device import DmaDevice
    from .notifier import IntervalNotifier
    from .pfn import PfnArray

_KEPT_OUT = (1 << 64) - 1 ^ HMM_PFN_INOUT_FLAGS


class HmmDmaMap:
    """``struct hmm_dma_map``: IOVAs for ``nr_entries`` entries, and their pfns. Made by hmm_dma_map_alloc().

    ``pfn_list`` is a uint64 array with a pfn a 4 KiB page, for hmm_range_fault() under ``notifier`` from
    address ``start`` on. An entry is ``dma_entry_size`` bytes. ``iova`` is the DMA address of the first
    entry, 0 without an IOMMU, where each page has an address of its own.
    """

    def __init__(
        self, dev: DmaDevice, notifier: IntervalNotifier, start: int, nr_entries: int, dma_entry_size: int
    ) -> None:
        self.dev = dev
        self.notifier = notifier
        self.start = start
        self.nr_entries = nr_entries
        self.dma_entry_size = dma_entry_size
        self.pages_per_entry = dma_entry_size >> PAGE_SHIFT
        self.pfn_list: PfnArray = np.zeros(nr_entries * self.pages_per_entry, np.uint64)
        #: Behind an IOMMU one mapping, whose pages come and go; else one for each entry that is mapped.
        self._whole: DmaMapping | None = None
        self._each: dict[int, DmaMapping] = {}
        self.freed = False
        if dev.domain.iommu:
            self._whole = self._make(start, self.pfn_list, 0, lib.PM_DMAP_EMPTY)

    @property
    def iova(self) -> int:
        """The DMA address of the first entry; 0 without an IOMMU, where each page has one of its own."""
        return self._whole.iova if self._whole is not None else 0

    @property
    def end(self) -> int:
        """The address after the last page."""
        return self.start + self.nr_entries * self.dma_entry_size

    def entries(self, start: int, end: int) -> range:
        """The indices of the entries that [start, end), bytes, touches: what a callback unmaps."""
        start, end = integer("entries", "start", start), integer("entries", "end", end)
        first, last = max(start, self.start) - self.start, min(end, self.end) - self.start
        return range(first // self.dma_entry_size, -(-last // self.dma_entry_size))

    def __repr__(self) -> str:
        state = " freed" if self.freed else ""
        return f"<HmmDmaMap {self.start:#x}-{self.end:#x} of {self.dev.name}{state}>"

    def _pages(self, idx: int) -> PfnArray:
        return self.pfn_list[idx * self.pages_per_entry : (idx + 1) * self.pages_per_entry]

    def _make(self, start: int, pfns: PfnArray, seq: int, flags: int) -> DmaMapping:
        options = ffi.new("struct pm_dmap_options *")
        options.source, options.flags = lib.PM_DMA_MIRROR, flags
        options.sub, options.seq = self.notifier.native, seq
        options.start, options.n = start, pfns.size
        options.pfns = ffi.from_buffer("uint64_t[]", pfns)
        return DmaMapping(self.dev, "hmm", DMA_BIDIRECTIONAL, options, mm=self.notifier.mm)

    def _present(self, first: int, n: int = 1) -> PfnArray:
        """What the device has for the pages of entries, 0 for nothing; without an IOMMU of one entry."""
        found: PfnArray = np.zeros(n * self.pages_per_entry, np.uint64)
        mapping, page = self._mapping(first)
        if mapping is not None:
            into = ffi.from_buffer("uint64_t[]", found)
            checked(lib.pm_dmap_read(mapping.native, page, found.size, into), "hmm_dma_map_pfn")
        return found

    def _mapping(self, idx: int) -> tuple[DmaMapping | None, int]:
        if self._whole is not None:
            return self._whole, idx * self.pages_per_entry
        return self._each.get(idx), 0

    def _address(self, idx: int) -> int:
        if self._whole is not None:
            return self._whole.iova + idx * self.dma_entry_size
        return self._each[idx].iova

    def _link(self, idx: int, pfns: PfnArray, seq: int) -> None:
        if self._whole is None:
            self._each[idx] = self._make(self.start + idx * self.dma_entry_size, pfns, seq, 0)
            return
        first = self.start + idx * self.dma_entry_size
        end = first + (pfns.size << PAGE_SHIFT)
        with trace.span(trace.Track.DMA, "link", self.notifier.mm, first, end):
            ret = lib.pm_dmap_link(
                self._whole.native,
                self.notifier.native,
                seq,
                idx * self.pages_per_entry,
                pfns.size,
                ffi.from_buffer("uint64_t[]", pfns),
            )
        checked(ret, "hmm_dma_map_pfn")

    def _unlink(self, first: int, n: int = 1) -> int:
        """The pages that were mapped of n entries; without an IOMMU of one entry."""
        mapping, page = self._mapping(first)
        if mapping is None:
            return 0
        if self._whole is None:
            del self._each[first]
            return mapping.unmap()[0]
        return mapping.unlink(page, n * self.pages_per_entry)[0]

    def _check(self, what: str, idx: int) -> None:
        if self.freed:
            raise MirrorError(
                errno.EINVAL,
                f"{what}: {self!r} was freed",
                addr=self.start,
                hint="make a new one: hmm_dma_map_alloc()",
            )
        if not 0 <= integer(what, "idx", idx) < self.nr_entries:
            raise MirrorError(
                errno.EINVAL,
                f"{what}: index {idx} is not one of the {self.nr_entries} entries of {self!r}",
                addr=self.start,
                hint=f"an entry is {self.dma_entry_size} bytes: (addr - start) // {self.dma_entry_size}",
            )

    def _free(self) -> None:
        linked = len(self._each) if self._whole is None else int(self._whole.info().linked)
        if linked:
            raise MirrorError(
                errno.EBUSY,
                f"hmm_dma_map_free: {linked} pages of {self!r} are mapped still",
                addr=self.start,
                hint="hmm_dma_unmap_pfn() each of them first",
            )
        if self._whole is not None:
            self._whole.unmap()
        self.freed = True


def hmm_dma_map_alloc(
    dev: DmaDevice,
    notifier: IntervalNotifier,
    start: int,
    nr_entries: int,
    dma_entry_size: int = PAGE_SIZE,
) -> HmmDmaMap:
    """hmm_dma_map_alloc(): IOVAs and pfns for ``nr_entries`` entries of memory from ``start`` on.

    The kernel's has neither notifier nor address: there a pfn is enough to reach a page. Here the device
    reaches it by address, under the notifier's eyes. ``dma_entry_size`` is 4 KiB or 2 MiB.

    EOPNOTSUPP: the device would need bounce buffers. EINVAL: not aligned, empty, not inside the notifier.
    ENOSPC: no IOVAs; ENOMEM; ESRCH: the mm is closed; FeatureError without an IOMMU and PFNs.
    """
    what = "hmm_dma_map_alloc"
    if dma_entry_size not in (PAGE_SIZE, 2 << 20):
        raise MirrorError(
            errno.EINVAL,
            f"{what}: dma_entry_size {dma_entry_size} is no size of page here",
            addr=start,
            hint="give 4096, or 2 MiB for huge pages",
        )
    check_is(what, "dev", dev, "dma_debug", "a Device")
    check_is(what, "notifier", notifier, "start", "an IntervalNotifier")
    start, nr_entries = integer(what, "start", start), integer(what, "nr_entries", nr_entries)
    check_interval(what, start, start + nr_entries * dma_entry_size, dma_entry_size.bit_length() - 1)
    check_covers(notifier, what, start, start + nr_entries * dma_entry_size)
    notifier.mm._check_here(what)
    dev._check_mirrorable(what)
    return HmmDmaMap(dev, notifier, start, nr_entries, dma_entry_size)


def hmm_dma_map_pfn(dev: DmaDevice, map: HmmDmaMap, idx: int, *, seq: int) -> int:
    """hmm_dma_map_pfn(): map an entry that hmm_range_fault() made valid under ``seq``; its DMA address.

    Under the driver's lock. Idempotent: what is mapped as the pfns say is left as it is, and gives the same
    address; what is mapped otherwise, or was invalidated and not unmapped, is mapped anew. DMA_MAPPING_ERROR
    where a pfn is not valid, and without an IOMMU where the pages of an entry are not next to each other.
    EBUSY: invalidated since ``seq``: fault again. EINVAL: not of this map. EPERM without the notifier's
    ``update_lock``.
    """
    _check_device("hmm_dma_map_pfn", dev, map)
    map._check("hmm_dma_map_pfn", idx)
    pages = map._pages(idx)
    if not (pages & np.uint64(HMM_PFN_VALID)).all():
        return DMA_MAPPING_ERROR
    _check_stands("hmm_dma_map_pfn", map, idx, seq)
    present = map._present(idx)
    if (present != pages & np.uint64(_KEPT_OUT)).any():
        # A refused invalidation leaves a mapping without entries; one of a part leaves the others.
        if present.any() or not dev.domain.iommu:
            map._unlink(idx)
        pages &= np.uint64(_KEPT_OUT)
        if not dev.domain.iommu and not _in_a_row(pages):
            return DMA_MAPPING_ERROR
        map._link(idx, pages, seq)
    pages |= np.uint64(HMM_PFN_DMA_MAPPED)
    return map._address(idx)


def hmm_dma_map_pfns(dev: DmaDevice, map: HmmDmaMap, first: int, n: int, *, seq: int) -> PfnArray:
    """The driver's loop of hmm_dma_map_pfn() over entries [first, first + n): their DMA addresses, uint64.

    DMA_MAPPING_ERROR where hmm_dma_map_pfn() would return it. Behind an IOMMU it is one native call for each
    run of entries that are not mapped as the pfns say. Errors as hmm_dma_map_pfn(); on an error what was
    mapped stays.
    """
    what = "hmm_dma_map_pfns"
    _check_run(what, dev, map, first, n)
    _check_stands(what, map, first, seq)
    if map._whole is None:
        each = [hmm_dma_map_pfn(dev, map, idx, seq=seq) for idx in range(first, first + n)]
        return np.array(each, np.uint64)
    pages = map.pfn_list[first * map.pages_per_entry : (first + n) * map.pages_per_entry]
    entries = pages.reshape(n, map.pages_per_entry)
    present = map._present(first, n).reshape(entries.shape)
    valid = ((entries & np.uint64(HMM_PFN_VALID)) != 0).all(axis=1)
    differs = (present != entries & np.uint64(_KEPT_OUT)).any(axis=1)
    for start, end in _runs(valid & differs):
        if present[start:end].any():
            map._unlink(first + start, end - start)
        entries[start:end] &= np.uint64(_KEPT_OUT)
        map._link(first + start, entries[start:end].ravel(), seq)
    entries[valid] |= np.uint64(HMM_PFN_DMA_MAPPED)
    daddrs = np.arange(first, first + n, dtype=np.uint64) * np.uint64(map.dma_entry_size) + np.uint64(
        map.iova
    )
    daddrs[~valid] = DMA_MAPPING_ERROR
    return daddrs


def hmm_dma_unmap_pfn(dev: DmaDevice, map: HmmDmaMap, idx: int) -> bool:
    """hmm_dma_unmap_pfn(): off the device, and the bits of it cleared. For callbacks.

    False if it was not mapped. EINVAL: not of this map.
    """
    _check_device("hmm_dma_unmap_pfn", dev, map)
    map._check("hmm_dma_unmap_pfn", idx)
    pages = map._pages(idx)
    unmapped = map._unlink(idx) > 0
    pages &= np.uint64(_KEPT_OUT)
    return unmapped


def hmm_dma_unmap_pfns(dev: DmaDevice, map: HmmDmaMap, first: int, n: int) -> int:
    """The driver's loop of hmm_dma_unmap_pfn() over entries [first, first + n). For callbacks.

    Gives how many 4 KiB pages of them were mapped. EINVAL: not of this map.
    """
    what = "hmm_dma_unmap_pfns"
    _check_run(what, dev, map, first, n)
    pages = map.pfn_list[first * map.pages_per_entry : (first + n) * map.pages_per_entry]
    if map._whole is not None:
        unmapped = map._unlink(first, n)
    else:
        unmapped = sum(map._unlink(idx) for idx in range(first, first + n) if idx in map._each)
    pages &= np.uint64(_KEPT_OUT)
    return unmapped


def hmm_dma_map_free(dev: DmaDevice, map: HmmDmaMap) -> None:
    """hmm_dma_map_free(): give the IOVAs back. Idempotent. EBUSY while entries are mapped."""
    _check_device("hmm_dma_map_free", dev, map)
    if not map.freed:
        map._free()


def _in_a_row(pages: PfnArray) -> bool:
    """Whether the pages are next to each other in memory."""
    numbers = pages & np.uint64((1 << HMM_PFN_ORDER_SHIFT) - 1)
    return bool((np.diff(numbers) == 1).all())


def _runs(wanted: npt.NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """[start, end) of each run of True."""
    edges = np.flatnonzero(np.diff(wanted, prepend=False, append=False))
    yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)


def _check_stands(what: str, map: HmmDmaMap, idx: int, seq: int) -> None:
    """EBUSY when the sequence has moved, EPERM without the driver's lock."""
    map.notifier.mm._check_pid(what)
    map.notifier._check_lock(what)
    if not map.notifier.check_retry(seq):
        return
    trace.instant(trace.Track.RETRY, f"{what}: invalidated meanwhile", map.notifier.mm, seq=seq)
    raise error(
        errno.EBUSY,
        f"{what}: entry {idx} of {map!r} was invalidated since sequence {seq}",
        addr=map.start + idx * map.dma_entry_size,
        mm=map.notifier.mm,
        hint="hmm_dma_unmap_pfn() it, read_begin() for a fresh sequence, and fault it again",
    )


def _check_run(what: str, dev: DmaDevice, map: HmmDmaMap, first: int, n: int) -> None:
    """EINVAL unless entries [first, first + n), one at least, are of this map."""
    _check_device(what, dev, map)
    first, n = integer(what, "first", first), integer(what, "n", n)
    for idx in (first, first + n - 1 if n > 0 else -1):
        map._check(what, idx)


def _check_device(what: str, dev: DmaDevice, map: HmmDmaMap) -> None:
    check_is(what, "map", map, "freed", "what hmm_dma_map_alloc() gave")
    check_is(what, "dev", dev, "dma_debug", "a Device")
    if map.dev is not dev:
        raise MirrorError(
            errno.EINVAL,
            f"{what}: {map!r} is not {dev.name}'s",
            addr=map.start,
            hint=f"give the device that it was allocated for, {map.dev.name}",
        )
