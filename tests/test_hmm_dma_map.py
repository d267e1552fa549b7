"""hmm_dma_map_alloc(), map_pfn, unmap_pfn and free: sticky bits, idempotent, under a notifier's sequence."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

import numpy as np
import pytest
from dma import nothing_mapped, numbers
from hypothesis import given, settings
from hypothesis import strategies as st
from mirroring import FAULT, PAGE, WRITE
from seams import errno_of, needs

import pymirror as pm
from pymirror.dma.direction import DMA_MAPPING_ERROR

PAGES = 8
HUGE = 2 << 20
MADV_NOHUGEPAGE = 15
MAPPED = np.uint64(pm.HMM_PFN_DMA_MAPPED)


class Odp:
    """As an RDMA driver on demand does it: one notifier, one map, pages mapped as they are asked for."""

    def __init__(self, mm: pm.AddressSpace, device: pm.Device, buf: pm.Region, entry: int = PAGE) -> None:
        self.mm, self.device, self.buf = mm, device, buf
        self.bytes = numbers(buf)
        self.map: pm.HmmDmaMap | None = None
        self.unmapped: list[int] = []
        self.refuses = False
        self.sub = pm.IntervalNotifier(mm, buf.addr, buf.size, self.invalidate)
        self.map = pm.hmm_dma_map_alloc(device, self.sub, buf.addr, buf.size // entry, entry)

    def invalidate(self, sub: pm.IntervalNotifier, range: pm.MmuNotifierRange, seq: int) -> bool:
        sub.set_seq(seq)
        if self.refuses:
            return False
        if self.map is not None:
            indices = self.map.entries(range.start, range.end)
            self.unmapped += [idx for idx in indices if pm.hmm_dma_unmap_pfn(self.device, self.map, idx)]
        return True

    def fault(self, flags: int = WRITE) -> int:
        assert self.map is not None
        seq = self.sub.read_begin()
        pm.hmm_range_fault(
            self.sub,
            self.buf.addr,
            self.buf.addr + self.buf.size,
            self.map.pfn_list,
            seq=seq,
            default_flags=flags,
        )
        return seq

    def close(self) -> None:
        assert self.map is not None
        if not self.map.freed:
            for idx in range(self.map.nr_entries):
                pm.hmm_dma_unmap_pfn(self.device, self.map, idx)
            pm.hmm_dma_map_free(self.device, self.map)
        self.sub.remove()


@pytest.fixture(params=[True, False], ids=["iommu", "direct"])
def odp(request: pytest.FixtureRequest, mm: pm.AddressSpace) -> Iterator[Odp]:
    if not request.param:
        needs("pfn")
    device = pm.Device("d", iommu=request.param)
    made = Odp(mm, device, mm.mmap(PAGES * PAGE))
    yield made
    made.close()
    assert nothing_mapped(device)


def test_what_is_mapped_is_reached_and_remembered(odp: Odp) -> None:
    assert odp.map is not None
    seq = odp.fault()
    daddr = pm.hmm_dma_map_pfn(odp.device, odp.map, 3, seq=seq)
    assert odp.device.dma_read(daddr, PAGE) == odp.bytes[3 * PAGE : 4 * PAGE].tobytes()
    odp.device.dma_write(daddr, b"device")
    assert odp.bytes[3 * PAGE : 3 * PAGE + 6].tobytes() == b"device"
    assert ((odp.map.pfn_list & MAPPED) != 0).tolist() == [page == 3 for page in range(PAGES)]


def test_mapping_again_is_the_same(odp: Odp) -> None:
    assert odp.map is not None
    seq = odp.fault()
    daddr = pm.hmm_dma_map_pfn(odp.device, odp.map, 3, seq=seq)
    stats = odp.device.domain.stats()
    assert pm.hmm_dma_map_pfn(odp.device, odp.map, 3, seq=seq) == daddr
    assert pm.hmm_dma_map_pfn(odp.device, odp.map, 3, seq=odp.fault()) == daddr
    assert odp.device.domain.stats() == stats


def test_the_bits_are_kept_across_faults_that_fail_too(odp: Odp) -> None:
    assert odp.map is not None
    pm.hmm_dma_map_pfn(odp.device, odp.map, 1, seq=odp.fault())
    odp.fault(0)
    assert odp.map.pfn_list[1] & MAPPED
    seq = odp.sub.read_begin()
    with odp.mm.invalidate(odp.buf.addr + 7 * PAGE, odp.buf.addr + 8 * PAGE):
        pass
    failed = errno_of(
        pm.hmm_range_fault, odp.sub, odp.buf.addr, odp.buf.addr + odp.buf.size, odp.map.pfn_list, seq=seq
    )
    assert failed == errno.EBUSY
    assert odp.map.pfn_list[1] & MAPPED


def test_what_is_not_valid_is_a_mapping_error(odp: Odp) -> None:
    assert odp.map is not None
    assert pm.hmm_dma_map_pfn(odp.device, odp.map, 0, seq=odp.sub.read_begin()) == DMA_MAPPING_ERROR


def test_a_sequence_that_moved_is_ebusy(odp: Odp) -> None:
    assert odp.map is not None
    seq = odp.fault()
    odp.mm.madvise(odp.buf.addr + 5 * PAGE, PAGE, 4)
    assert errno_of(pm.hmm_dma_map_pfn, odp.device, odp.map, 0, seq=seq) == errno.EBUSY
    assert odp.device.domain.stats()["mapped_pages"] == 0


def test_an_invalidation_takes_it_off_and_it_can_be_mapped_anew(odp: Odp) -> None:
    assert odp.map is not None
    daddr = pm.hmm_dma_map_pfn(odp.device, odp.map, 2, seq=odp.fault())
    odp.mm.madvise(odp.buf.addr + 2 * PAGE, PAGE, 4)
    assert odp.unmapped == [2]
    assert not odp.map.pfn_list[2] & MAPPED
    assert errno_of(odp.device.dma_read, daddr, 1) == errno.EFAULT
    again = pm.hmm_dma_map_pfn(odp.device, odp.map, 2, seq=odp.fault())
    assert odp.device.dma_read(again, PAGE) == bytes(PAGE)
    assert not pm.hmm_dma_unmap_pfn(odp.device, odp.map, 4)
    assert pm.hmm_dma_unmap_pfn(odp.device, odp.map, 2)
    assert not pm.hmm_dma_unmap_pfn(odp.device, odp.map, 2)


def test_from_read_only_to_writable_the_address_stays(mm: pm.AddressSpace) -> None:
    buf = mm.mmap(PAGE, shared=True)
    odp = Odp(mm, pm.Device("d"), buf)
    assert odp.map is not None
    mm.mprotect(buf.addr, PAGE, 1)
    daddr = pm.hmm_dma_map_pfn(odp.device, odp.map, 0, seq=odp.fault(FAULT))
    assert errno_of(odp.device.dma_write, daddr, b"x") == errno.EFAULT
    mm.mprotect(buf.addr, PAGE, 3)
    assert pm.hmm_dma_map_pfn(odp.device, odp.map, 0, seq=odp.fault()) == daddr
    odp.device.dma_write(daddr, b"x")
    odp.close()


def test_it_is_freed_once_nothing_is_mapped(odp: Odp) -> None:
    assert odp.map is not None
    pm.hmm_dma_map_pfn(odp.device, odp.map, 0, seq=odp.fault())
    assert errno_of(pm.hmm_dma_map_free, odp.device, odp.map) == errno.EBUSY
    pm.hmm_dma_unmap_pfn(odp.device, odp.map, 0)
    pm.hmm_dma_map_free(odp.device, odp.map)
    pm.hmm_dma_map_free(odp.device, odp.map)
    assert errno_of(pm.hmm_dma_map_pfn, odp.device, odp.map, 0, seq=2) == errno.EINVAL


def test_a_device_that_would_need_bounce_buffers_is_refused(mm: pm.AddressSpace) -> None:
    needs("pfn")
    buf = mm.mmap(PAGE)
    small = pm.Device("small", iommu=False, dma_mask=(1 << 24) - 1)
    sub = pm.IntervalNotifier(mm, buf.addr, PAGE, lambda sub, range, seq: sub.set_seq(seq))
    assert errno_of(pm.hmm_dma_map_alloc, small, sub, buf.addr, 1) == errno.EOPNOTSUPP
    sub.remove()


@pytest.mark.parametrize(
    ("start", "entries", "size"),
    [(1, 1, PAGE), (0, 0, PAGE), (0, PAGES + 1, PAGE), (0, 1, 12345), (-PAGE, 1, PAGE)],
)
def test_wrong_arguments(odp: Odp, start: int, entries: int, size: int) -> None:
    at = odp.buf.addr + start
    assert errno_of(pm.hmm_dma_map_alloc, odp.device, odp.sub, at, entries, size) == errno.EINVAL
    assert odp.map is not None
    assert errno_of(pm.hmm_dma_map_pfn, odp.device, odp.map, PAGES, seq=2) == errno.EINVAL
    assert errno_of(pm.hmm_dma_unmap_pfn, pm.Device("other"), odp.map, 0) == errno.EINVAL


@pytest.mark.hugetlb
def test_entries_of_huge_pages(mm: pm.AddressSpace) -> None:
    huge = 2 << 20
    odp = Odp(mm, pm.Device("d"), mm.mmap(2 * huge, huge="hugetlb"), huge)
    assert odp.map is not None
    seq = odp.fault()
    daddrs = [pm.hmm_dma_map_pfn(odp.device, odp.map, idx, seq=seq) for idx in range(2)]
    assert daddrs[1] - daddrs[0] == huge
    assert odp.device.dma_read(daddrs[1], huge) == odp.bytes[huge:].tobytes()
    assert odp.device.domain.stats()["mapped_pages"] == 1024
    del odp.bytes
    odp.close()


def test_what_a_refused_invalidation_dropped_is_mapped_anew(odp: Odp) -> None:
    assert odp.map is not None
    pm.hmm_dma_map_pfn(odp.device, odp.map, 2, seq=odp.fault())
    odp.refuses = True
    assert errno_of(odp.mm.oom_reap, odp.buf.addr, odp.buf.addr + odp.buf.size) == errno.EAGAIN
    odp.refuses = False
    assert odp.device.domain.stats()["mapped_pages"] == 0
    daddr = pm.hmm_dma_map_pfn(odp.device, odp.map, 2, seq=odp.fault())
    assert odp.device.dma_read(daddr, PAGE) == odp.bytes[2 * PAGE : 3 * PAGE].tobytes()
    assert odp.device.domain.stats()["mappings"] == 1


def test_an_entry_that_lost_a_page_in_the_middle_is_mapped_anew(mm: pm.AddressSpace) -> None:
    odp = Odp(mm, pm.Device("d"), mm.mmap(HUGE, huge="thp"), HUGE)
    assert odp.map is not None
    daddr = pm.hmm_dma_map_pfn(odp.device, odp.map, 0, seq=odp.fault())
    page = odp.buf.addr + 5 * PAGE
    odp.refuses = True
    assert errno_of(mm.oom_reap, page, page + PAGE) == errno.EAGAIN
    odp.refuses = False
    assert errno_of(odp.device.dma_read, daddr + 5 * PAGE, 1) == errno.EFAULT
    assert pm.hmm_dma_map_pfn(odp.device, odp.map, 0, seq=odp.fault()) == daddr
    assert odp.device.dma_read(daddr, HUGE) == odp.bytes.tobytes()
    odp.close()
    assert nothing_mapped(odp.device)


def test_without_an_iommu_an_entry_is_one_piece_of_memory(mm: pm.AddressSpace) -> None:
    needs("pfn")
    buf = mm.mmap(HUGE, huge="thp")
    mm.madvise(buf.addr, HUGE, MADV_NOHUGEPAGE)
    # Every other page from elsewhere: they are faulted from both ends.
    view = np.frombuffer(buf, np.uint8)
    for page in [at for pair in zip(range(256), range(511, 255, -1), strict=True) for at in pair]:
        view[page * PAGE] = 1
    odp = Odp(mm, pm.Device("d", iommu=False), buf, HUGE)
    assert odp.map is not None
    assert pm.hmm_dma_map_pfn(odp.device, odp.map, 0, seq=odp.fault()) == DMA_MAPPING_ERROR
    assert not (odp.map.pfn_list & MAPPED).any()
    odp.close()
    assert nothing_mapped(odp.device)


def test_a_range_is_mapped_for_devices_with_domains_of_their_own(mm: pm.AddressSpace) -> None:
    buf = mm.mmap(2 * PAGE)
    view = numbers(buf)
    devices = [pm.Device(name) for name in ("one", "two", "three")]
    with pm.Mirror(mm) as mirror, mirror.range(buf.addr, buf.addr + buf.size) as rng:
        rng.default_flags = FAULT
        daddrs = [pm.hmm_range_dma_map(rng, device) for device in devices]
        for device, daddr in zip(devices, daddrs, strict=True):
            assert device.dma_read(int(daddr[1]), 8) == view[PAGE : PAGE + 8].tobytes()
        assert [pm.hmm_range_dma_unmap(rng, device) for device in devices] == [2, 2, 2]
        assert all(nothing_mapped(device) for device in devices)
    del view


def one_by_one(odp: Odp, first: int, seq: int) -> list[int]:
    assert odp.map is not None
    return [pm.hmm_dma_map_pfn(odp.device, odp.map, idx, seq=seq) for idx in range(first, PAGES)]


def all_at_once(odp: Odp, first: int, seq: int) -> list[int]:
    assert odp.map is not None
    return pm.hmm_dma_map_pfns(odp.device, odp.map, first, PAGES - first, seq=seq).tolist()


class TestRunsOfEntries:
    """hmm_dma_map_pfns() and _unmap_pfns() are the loops over the calls for one entry."""

    @given(
        st.lists(
            st.tuples(st.sampled_from(["read", "write", "look", "unmap", "drop"]), st.integers(0, PAGES - 1)),
            min_size=1,
            max_size=10,
        ),
        st.booleans(),
    )
    @settings(deadline=None, max_examples=50, derandomize="CI" in os.environ)
    def test_they_are_the_loops(self, steps: list[tuple[str, int]], iommu: bool) -> None:
        with pm.AddressSpace() as mm:
            iommu = iommu or "pfn" not in mm.features
            buf = mm.mmap(PAGES * PAGE)
            single, runs = (Odp(mm, pm.Device("d", iommu=iommu), buf) for _ in range(2))
            for step, first in steps:
                if step == "drop":
                    mm.madvise(buf.addr + first * PAGE, PAGE, 4)
                elif step == "unmap":
                    assert self.unmap_all(runs, first) == self.unmap_one_by_one(single, first)
                else:
                    flags = {"read": FAULT, "write": WRITE, "look": 0}[step]
                    # First for both: a fault may exchange the zero page, which is found by comparing.
                    self.settled(runs, flags)
                    seq, other = self.settled(single, flags), self.settled(runs, flags)
                    mapped, expected = all_at_once(runs, first, other), one_by_one(single, first, seq)
                    assert self.offsets(runs, mapped) == self.offsets(single, expected)
                self.compare(single, runs)
            for odp in (single, runs):
                odp.close()
                assert nothing_mapped(odp.device)
                del odp.bytes

    def settled(self, odp: Odp, flags: int) -> int:
        while True:
            try:
                return odp.fault(flags)
            except pm.MirrorError as refused:
                if refused.errno != errno.EBUSY:
                    raise

    def unmap_all(self, odp: Odp, first: int) -> int:
        assert odp.map is not None
        return pm.hmm_dma_unmap_pfns(odp.device, odp.map, first, PAGES - first)

    def unmap_one_by_one(self, odp: Odp, first: int) -> int:
        assert odp.map is not None
        return sum(pm.hmm_dma_unmap_pfn(odp.device, odp.map, idx) for idx in range(first, PAGES))

    def offsets(self, odp: Odp, daddrs: list[int]) -> list[int | None]:
        assert odp.map is not None
        return [None if daddr == DMA_MAPPING_ERROR else daddr - odp.map.iova for daddr in daddrs]

    def compare(self, single: Odp, runs: Odp) -> None:
        assert single.map is not None
        assert runs.map is not None
        assert ((single.map.pfn_list ^ runs.map.pfn_list) & MAPPED == 0).all()
        pages = single.device.domain.stats()["mapped_pages"]
        assert runs.device.domain.stats()["mapped_pages"] == pages

    def test_a_sequence_that_moved_is_ebusy_and_nothing_is_mapped(self, odp: Odp) -> None:
        assert odp.map is not None
        seq = odp.fault()
        odp.mm.madvise(odp.buf.addr + 5 * PAGE, PAGE, 4)
        assert errno_of(pm.hmm_dma_map_pfns, odp.device, odp.map, 0, PAGES, seq=seq) == errno.EBUSY
        assert odp.device.domain.stats()["mapped_pages"] == 0

    @pytest.mark.parametrize(("first", "n"), [(0, 0), (0, PAGES + 1), (-1, 2), (PAGES, 1), (3, -1)])
    def test_wrong_runs(self, odp: Odp, first: int, n: int) -> None:
        assert odp.map is not None
        seq = odp.fault()
        assert errno_of(pm.hmm_dma_map_pfns, odp.device, odp.map, first, n, seq=seq) == errno.EINVAL
        assert errno_of(pm.hmm_dma_unmap_pfns, odp.device, odp.map, first, n) == errno.EINVAL
        assert errno_of(pm.hmm_dma_unmap_pfns, pm.Device("x"), odp.map, 0, 1) == errno.EINVAL

    @pytest.mark.hugetlb
    def test_entries_of_huge_pages(self, mm: pm.AddressSpace) -> None:
        odp = Odp(mm, pm.Device("d"), mm.mmap(2 * HUGE, huge="hugetlb"), HUGE)
        assert odp.map is not None
        daddrs = pm.hmm_dma_map_pfns(odp.device, odp.map, 0, 2, seq=odp.fault())
        assert int(daddrs[1] - daddrs[0]) == HUGE
        assert odp.device.dma_read(int(daddrs[1]), HUGE) == odp.bytes[HUGE:].tobytes()
        assert pm.hmm_dma_unmap_pfns(odp.device, odp.map, 0, 2) == 1024
        del odp.bytes
        odp.close()
