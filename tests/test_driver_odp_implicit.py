"""RDMA on-demand paging of the whole address space by one key, and prefetch."""

from __future__ import annotations

import errno
import mmap

from mirroring import PAGE, as_bytes, filled
from odp_driver import ALL, CHUNK, PAGES, bits, odp_by_bus, whole
from seams import errno_of

from pymirror.drivers.odp import (
    ADVICE_PREFETCH,
    ADVICE_PREFETCH_NO_FAULT,
    ADVICE_PREFETCH_WRITE,
    U64_MAX,
    IbSge,
    ImplicitMr,
    Odp,
)

odp = odp_by_bus


class TestImplicit:
    """One key for the whole address space: children come with use, and go when they are empty."""

    def region(self, odp: Odp) -> ImplicitMr:
        mr = odp.reg_user_mr(0, U64_MAX, ALL)
        assert isinstance(mr, ImplicitMr)
        return mr

    def test_children_are_made_for_what_is_used(self, odp: Odp) -> None:
        mr = self.region(odp)
        assert mr.children == []
        buf = filled(odp.mm, 64)
        assert odp.read(mr.rkey, buf.addr, buf.size) == bytes(as_bytes(buf))
        first, last = buf.addr // CHUNK, (buf.addr + buf.size - 1) // CHUNK
        assert [umem.start // CHUNK for umem in mr.children] == list(range(first, last + 1))
        assert odp.mm.stats()["interval_notifiers"] == last - first + 1
        assert mr.stats.page_faults == 64

    def test_memory_that_did_not_exist_when_it_was_registered(self, odp: Odp) -> None:
        mr = self.region(odp)
        for _ in range(3):
            buf = filled(odp.mm, 4)
            assert odp.read(mr.rkey, buf.addr, PAGE) == bytes(as_bytes(buf)[:PAGE])
            odp.mm.munmap(buf.addr, buf.size)

    def test_a_child_whose_last_page_went_goes_at_the_next_access(self, odp: Odp) -> None:
        mr = self.region(odp)
        buf, other = filled(odp.mm, 32), filled(odp.mm, 32)
        odp.read(mr.rkey, buf.addr, buf.size)
        odp.mm.munmap(buf.addr, buf.size)
        odp.read(mr.rkey, other.addr, PAGE)
        assert all(umem.npages for umem in mr.children)

    def test_it_stays_while_an_access_uses_it(self, odp: Odp) -> None:
        mr = self.region(odp)
        buf = filled(odp.mm, 1)
        odp.read(mr.rkey, buf.addr, 8)
        with mr.umem_at(buf.addr) as umem:
            odp.mm.madvise(buf.addr, PAGE, mmap.MADV_DONTNEED)
            assert umem.npages == 0
            odp.read(mr.rkey, filled(odp.mm, 1).addr, 8)
            assert umem in mr.children
            assert umem.map_dma(buf.addr, buf.addr + PAGE, False) == 1
        assert odp.read(mr.rkey, buf.addr, 8) == bytes(8)

    def test_a_hole_is_efault_and_deregistering_leaves_nothing(self, odp: Odp) -> None:
        mr = self.region(odp)
        assert errno_of(odp.read, mr.rkey, PAGE, 8) == errno.EFAULT
        assert errno_of(odp.read, mr.rkey, 1 << 47, 8) == errno.EFAULT
        buf = filled(odp.mm, 1)
        odp.read(mr.rkey, buf.addr, 8)
        assert [umem.start // CHUNK for umem in mr.children] == [buf.addr // CHUNK]
        odp.dereg_mr(mr)
        assert errno_of(odp.read, mr.rkey, PAGE, 8) == errno.EINVAL
        assert odp.mm.stats()["interval_notifiers"] == 0

    def test_the_chunk_is_a_power_of_two(self, odp: Odp) -> None:
        for chunk in (0, 100, 3 * PAGE):
            assert errno_of(Odp, odp.mm, imr_chunk=chunk) == errno.EINVAL


class TestPrefetch:
    def test_it_maps_before_the_access(self, odp: Odp) -> None:
        buf = filled(odp.mm, PAGES)
        mr = whole(odp, buf)
        assert odp.advise_mr(ADVICE_PREFETCH, [IbSge(buf.addr, 3 * PAGE, mr.lkey)]) == 3
        odp.read(mr.rkey, buf.addr, 3 * PAGE)
        assert (mr.stats.faults, mr.stats.page_prefetch) == (0, 3)

    def test_for_writing(self, odp: Odp) -> None:
        buf = odp.mm.mmap(PAGES * PAGE)
        mr = whole(odp, buf)
        assert odp.advise_mr(ADVICE_PREFETCH_WRITE, [IbSge(buf.addr, buf.size, mr.lkey)]) == PAGES
        odp.write(mr.rkey, buf.addr, bytes(buf.size))
        assert mr.stats.faults == 0

    def test_no_fault_maps_what_is_there(self, odp: Odp) -> None:
        buf = odp.mm.mmap(4 * PAGE)
        buf[PAGE] = 1
        buf[2 * PAGE] = 1
        odp.mm.munmap(buf.addr + 3 * PAGE, PAGE)
        mr = whole(odp, buf)
        assert odp.advise_mr(ADVICE_PREFETCH_NO_FAULT, [IbSge(buf.addr, buf.size, mr.lkey)]) == 2
        assert [page for page, bit in enumerate(bits(mr)) if bit] == [1, 2]

    def test_over_children(self, odp: Odp) -> None:
        mr = odp.reg_user_mr(0, U64_MAX, ALL)
        buf = filled(odp.mm, 40)
        sg_list = [IbSge(buf.addr, 20 * PAGE, mr.lkey), IbSge(buf.addr + 20 * PAGE, 20 * PAGE, mr.lkey)]
        assert odp.advise_mr(ADVICE_PREFETCH, sg_list) == 40

    def test_a_wrong_entry_is_found_before_anything_is_done(self, odp: Odp) -> None:
        buf = filled(odp.mm, PAGES)
        mr = whole(odp, buf)
        sg_list = [IbSge(buf.addr, PAGE, mr.lkey), IbSge(buf.addr, PAGE, 5)]
        assert errno_of(odp.advise_mr, ADVICE_PREFETCH, sg_list) == errno.EINVAL
        assert errno_of(odp.advise_mr, 9, sg_list[:1]) == errno.EINVAL
        assert errno_of(odp.advise_mr, ADVICE_PREFETCH, sg_list[:1], flush=False) == errno.EOPNOTSUPP
        assert bits(mr) == [0] * PAGES
