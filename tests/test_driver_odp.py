"""RDMA on-demand paging: keys and rights, page faults, invalidation, implicit regions, prefetch, atomics."""

from __future__ import annotations

import errno
import json
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from dma import nothing_mapped
from hypothesis import given, settings
from hypothesis import strategies as st
from mirroring import PAGE, as_bytes, errno_in_a_callback, filled
from notifying import invalidate
from racing import CHANGES, FOREIGN, GONE, changes, in_child
from seams import Background, errno_of, foreign, needs, points

import pymirror as pm
from pymirror.drivers.odp import (
    ADVICE_PREFETCH,
    ADVICE_PREFETCH_NO_FAULT,
    ADVICE_PREFETCH_WRITE,
    IB_ACCESS_HUGETLB,
    IB_ACCESS_LOCAL_WRITE,
    IB_ACCESS_ON_DEMAND,
    IB_ACCESS_REMOTE_ATOMIC,
    IB_ACCESS_REMOTE_READ,
    IB_ACCESS_REMOTE_WRITE,
    U64_MAX,
    IbSge,
    ImplicitMr,
    Odp,
    OdpMr,
)
from pymirror.drivers.umem_odp import ODP_READ_ALLOWED, ODP_WRITE_ALLOWED

PAGES = 8
CHUNK = 64 << 10
HUGE = 2 << 20
ALL = (
    IB_ACCESS_ON_DEMAND
    | IB_ACCESS_LOCAL_WRITE
    | IB_ACCESS_REMOTE_WRITE
    | IB_ACCESS_REMOTE_READ
    | IB_ACCESS_REMOTE_ATOMIC
)


@pytest.fixture(params=[True, False], ids=["iommu", "direct"])
def odp(request: pytest.FixtureRequest, mm: pm.AddressSpace) -> Iterator[Odp]:
    if not request.param:
        needs("pfn")
    device = pm.Device("mlx5_0", iommu=request.param)
    with Odp(mm, device=device, timeout=10.0, imr_chunk=CHUNK) as made:
        yield made
    assert nothing_mapped(device)
    assert mm.stats()["interval_notifiers"] == 0


def whole(odp: Odp, buf: pm.Region, access: int = ALL) -> OdpMr:
    return odp.reg_user_mr(buf.addr, buf.size, access)


def bits(mr: OdpMr) -> list[int]:
    return (mr.umem.dma_list & np.uint64(ODP_READ_ALLOWED | ODP_WRITE_ALLOWED)).tolist()


class TestAccess:
    def test_it_reads_what_the_cpu_wrote_and_the_cpu_what_it_wrote(self, odp: Odp) -> None:
        buf = filled(odp.mm, PAGES)
        mr = whole(odp, buf)
        at = buf.addr + PAGE - 3
        assert odp.read(mr.rkey, at, 2 * PAGE) == bytes(as_bytes(buf)[PAGE - 3 : 3 * PAGE - 3])
        odp.write(mr.rkey, at, b"by the device")
        assert bytes(as_bytes(buf)[PAGE - 3 : PAGE + 10]) == b"by the device"

    def test_registering_touches_nothing(self, odp: Odp) -> None:
        buf = odp.mm.mmap(PAGES * PAGE)
        mr = whole(odp, buf)
        assert bits(mr) == [0] * PAGES
        assert mr.stats.as_dict() == dict.fromkeys(mr.stats.as_dict(), 0)

    def test_a_request_is_one_page_fault(self, odp: Odp) -> None:
        buf = filled(odp.mm, PAGES)
        mr = whole(odp, buf)
        odp.read(mr.rkey, buf.addr + PAGE, 3 * PAGE)
        odp.read(mr.rkey, buf.addr + PAGE, 3 * PAGE)
        assert (mr.stats.faults, mr.stats.page_faults) == (1, 3)

    def test_bits_say_what_an_entry_permits(self, odp: Odp) -> None:
        buf = odp.mm.mmap(4 * PAGE)
        mr = whole(odp, buf)
        odp.read(mr.rkey, buf.addr, 2 * PAGE)
        assert bits(mr) == [ODP_READ_ALLOWED] * 2 + [0, 0]
        odp.write(mr.rkey, buf.addr + PAGE, b"x")
        assert bits(mr) == [ODP_READ_ALLOWED, ODP_READ_ALLOWED | ODP_WRITE_ALLOWED, 0, 0]
        assert mr.stats.faults == 2

    def test_an_invalidation_takes_pages_off_and_the_next_access_faults(self, odp: Odp) -> None:
        buf = filled(odp.mm, PAGES)
        mr = whole(odp, buf)
        odp.read(mr.rkey, buf.addr, buf.size)
        odp.mm.madvise(buf.addr + 2 * PAGE, PAGE, mmap.MADV_DONTNEED)
        assert [page for page, bit in enumerate(bits(mr)) if not bit] == [2]
        assert (mr.stats.invalidations, mr.stats.page_invalidations) == (1, 1)
        assert odp.read(mr.rkey, buf.addr + 2 * PAGE, PAGE) == bytes(PAGE)
        assert mr.stats.page_faults == PAGES + 1

    def test_an_invalidation_that_meets_nothing_is_a_false_one(self, odp: Odp) -> None:
        buf = filled(odp.mm, PAGES)
        mr = whole(odp, buf)
        invalidate(odp.mm, buf.addr)
        assert (mr.stats.invalidations, mr.stats.false_invalidations) == (1, 1)

    def test_one_that_may_not_wait_is_refused_while_the_lock_is_held(self, odp: Odp) -> None:
        buf = filled(odp.mm, PAGES)
        mr = whole(odp, buf)
        odp.read(mr.rkey, buf.addr, PAGE)
        with mr.umem.umem_mutex:
            reap = Background(errno_of, odp.mm.oom_reap, buf.addr, buf.addr + buf.size)
            assert reap.result() == errno.EAGAIN
        assert odp.read(mr.rkey, buf.addr, 4) == bytes(as_bytes(buf)[:4])
        odp.mm.oom_reap(buf.addr, buf.addr + buf.size)
        assert odp.read(mr.rkey, buf.addr, 4) == bytes(4)

    def test_regions_over_the_same_memory_do_not_meet(self, odp: Odp) -> None:
        buf = filled(odp.mm, PAGES)
        one, two = whole(odp, buf), whole(odp, buf, ALL & ~IB_ACCESS_REMOTE_WRITE)
        odp.write(one.rkey, buf.addr, b"one")
        assert odp.read(two.rkey, buf.addr, 3) == b"one"
        odp.dereg_mr(one)
        assert odp.read(two.rkey, buf.addr, 3) == b"one"
        assert (two.stats.faults, two.stats.invalidations) == (1, 0)

    def test_local_work_goes_by_lkey(self, odp: Odp) -> None:
        buf = filled(odp.mm, PAGES)
        mr = whole(odp, buf, IB_ACCESS_ON_DEMAND | IB_ACCESS_LOCAL_WRITE)
        sg_list = [IbSge(buf.addr + 100, 5, mr.lkey), IbSge(buf.addr + 3 * PAGE, 7, mr.lkey)]
        view = as_bytes(buf)
        assert odp.gather(sg_list) == bytes(view[100:105]) + bytes(view[3 * PAGE : 3 * PAGE + 7])
        odp.scatter(sg_list, b"hello world")
        assert (bytes(view[100:105]), bytes(view[3 * PAGE : 3 * PAGE + 6])) == (b"hello", b" world")
        assert errno_of(odp.scatter, sg_list, bytes(13)) == errno.EINVAL

    @pytest.mark.hugetlb
    def test_huge_pages_have_an_entry_each(self, odp: Odp) -> None:
        buf = odp.mm.mmap(2 * HUGE, huge="hugetlb")
        as_bytes(buf)[HUGE : HUGE + 5] = b"hello"
        mr = whole(odp, buf, ALL | IB_ACCESS_HUGETLB)
        assert mr.umem.dma_list.size == 2
        assert odp.read(mr.rkey, buf.addr + HUGE - 2, 7) == b"\0\0hello"
        odp.write(mr.rkey, buf.addr + HUGE, b"HELLO")
        assert bytes(as_bytes(buf)[HUGE : HUGE + 5]) == b"HELLO"
        assert errno_of(whole, odp, filled(odp.mm, PAGES), ALL | IB_ACCESS_HUGETLB) == errno.EINVAL


class TestRefusals:
    """What a completion would say, and nothing is touched."""

    def refused(self, odp: Odp, number: int, text: str, call: Callable[..., object], *args: object) -> None:
        with pytest.raises(pm.MirrorError, match=text) as caught:
            call(*args)
        assert caught.value.errno == number
        assert caught.value.hint

    def test_a_key_that_names_nothing(self, odp: Odp) -> None:
        buf = filled(odp.mm, PAGES)
        mr = whole(odp, buf)
        local = whole(odp, buf, IB_ACCESS_ON_DEMAND)
        assert local.rkey == 0
        for key in (0, mr.rkey + 1, mr.rkey ^ 1 << 8, -1, local.lkey):
            self.refused(odp, errno.EINVAL, "REM_ACCESS_ERR", odp.read, key, buf.addr, 1)
        self.refused(odp, errno.EINVAL, "LOC_PROT_ERR", odp.gather, [IbSge(buf.addr, 1, 77)])

    def test_a_key_of_a_region_that_is_gone(self, odp: Odp) -> None:
        buf = filled(odp.mm, PAGES)
        mr = whole(odp, buf)
        odp.read(mr.rkey, buf.addr, 8)
        odp.dereg_mr(mr)
        odp.dereg_mr(mr)
        self.refused(odp, errno.EINVAL, "names no region", odp.read, mr.rkey, buf.addr, 8)
        assert whole(odp, buf).rkey != mr.rkey

    @pytest.mark.parametrize(("start", "n"), [(-1, 1), (0, PAGES * PAGE + 1), (PAGES * PAGE, 1), (5, -1)])
    def test_beyond_the_region(self, odp: Odp, start: int, n: int) -> None:
        buf = filled(odp.mm, PAGES)
        mr = whole(odp, buf)
        self.refused(odp, errno.EFAULT, "not inside", odp.read, mr.rkey, buf.addr + start, n)
        assert mr.stats.faults == 0

    def test_a_region_may_end_inside_a_page_and_nothing_beyond_is_to_be_had(self, odp: Odp) -> None:
        buf = filled(odp.mm, PAGES)
        mr = odp.reg_user_mr(buf.addr + 10, 20, ALL)
        assert odp.read(mr.rkey, buf.addr + 10, 20) == bytes(as_bytes(buf)[10:30])
        for at, n in ((9, 1), (29, 2)):
            self.refused(odp, errno.EFAULT, "not inside", odp.read, mr.rkey, buf.addr + at, n)

    def test_rights_that_are_missing(self, odp: Odp) -> None:
        buf = filled(odp.mm, PAGES)
        rights = {
            IB_ACCESS_REMOTE_READ: lambda key: odp.read(key, buf.addr, 8),
            IB_ACCESS_REMOTE_WRITE: lambda key: odp.write(key, buf.addr, b"x"),
            IB_ACCESS_REMOTE_ATOMIC: lambda key: odp.fetch_add(key, buf.addr, 1),
        }
        before = bytes(as_bytes(buf))
        for right, call in rights.items():
            mr = whole(odp, buf, ALL & ~right)
            self.refused(odp, errno.EACCES, "does not permit", call, mr.rkey)
        mr = whole(odp, buf, IB_ACCESS_ON_DEMAND)
        self.refused(odp, errno.EACCES, "LOC_PROT_ERR", odp.scatter, [IbSge(buf.addr, 1, mr.lkey)], b"x")
        self.refused(
            odp,
            errno.EACCES,
            "LOC_PROT_ERR",
            odp.advise_mr,
            ADVICE_PREFETCH_WRITE,
            [IbSge(buf.addr, 1, mr.lkey)],
        )
        assert bytes(as_bytes(buf)) == before

    def test_memory_that_is_not_there(self, odp: Odp) -> None:
        buf = filled(odp.mm, PAGES)
        mr = whole(odp, buf)
        odp.mm.munmap(buf.addr + 4 * PAGE, PAGE)
        odp.mm.mprotect(buf.addr + 6 * PAGE, PAGE, mmap.PROT_READ)
        assert errno_of(odp.read, mr.rkey, buf.addr, buf.size) == errno.EFAULT
        assert errno_of(odp.write, mr.rkey, buf.addr + 6 * PAGE, b"x") == errno.EPERM
        assert odp.read(mr.rkey, buf.addr + 6 * PAGE, 1) == bytes(as_bytes(buf)[6 * PAGE : 6 * PAGE + 1])

    @pytest.mark.parametrize(
        ("access", "number"),
        [
            (0, errno.EINVAL),
            (IB_ACCESS_LOCAL_WRITE, errno.EINVAL),
            (IB_ACCESS_ON_DEMAND | 1 << 30, errno.EINVAL),
            (IB_ACCESS_ON_DEMAND | IB_ACCESS_REMOTE_WRITE, errno.EINVAL),
            (IB_ACCESS_ON_DEMAND | IB_ACCESS_REMOTE_ATOMIC, errno.EINVAL),
        ],
    )
    def test_access_that_makes_no_sense(self, odp: Odp, access: int, number: int) -> None:
        buf = filled(odp.mm, PAGES)
        assert errno_of(whole, odp, buf, access) == number

    @pytest.mark.parametrize(
        ("start", "length", "number"),
        [
            (PAGE, 0, errno.EINVAL),
            (-PAGE, PAGE, errno.EINVAL),
            (PAGE, -1, errno.EINVAL),
            (PAGE, 1 << 47, errno.EOVERFLOW),
            (PAGE, U64_MAX, errno.EOVERFLOW),
        ],
    )
    def test_intervals_that_make_no_sense(self, odp: Odp, start: int, length: int, number: int) -> None:
        assert errno_of(odp.reg_user_mr, start, length, ALL) == number
        assert odp.mrs == []

    def test_a_closed_address_space(self) -> None:
        mm = pm.AddressSpace()
        odp = Odp(mm)
        buf = filled(mm, PAGES)
        mr = whole(odp, buf)
        odp.read(mr.rkey, buf.addr, 8)
        mm.close()
        assert errno_of(odp.read, mr.rkey, buf.addr, 8) == errno.ESRCH
        assert errno_of(whole, odp, buf) == errno.ESRCH
        odp.close()
        assert nothing_mapped(odp.device)

    def test_a_forked_child(self, odp: Odp) -> None:
        buf = filled(odp.mm, PAGES)
        mr = whole(odp, buf)
        odp.read(mr.rkey, buf.addr, 8)

        def child() -> None:
            assert errno_of(odp.read, mr.rkey, buf.addr, 8) == errno.ESRCH
            odp.close()

        assert in_child(child) == 0
        assert odp.read(mr.rkey, buf.addr, 8) == bytes(as_bytes(buf)[:8])


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


class TestAtomics:
    def test_fetch_add_and_cmp_swap(self, odp: Odp) -> None:
        buf = odp.mm.mmap(PAGE)
        numbers = np.frombuffer(buf, np.uint64)
        mr = whole(odp, buf)
        numbers[1] = (1 << 64) - 1
        assert odp.fetch_add(mr.rkey, buf.addr + 8, 3) == (1 << 64) - 1
        assert numbers[1] == 2
        assert odp.cmp_swap(mr.rkey, buf.addr + 8, 7, 9) == 2
        assert numbers[1] == 2
        assert odp.cmp_swap(mr.rkey, buf.addr + 8, 2, 9) == 2
        assert numbers[1] == 9
        assert mr.stats.faults == 1
        del numbers

    def test_they_are_atomic_among_themselves(self, odp: Odp) -> None:
        buf = odp.mm.mmap(PAGE)
        mr = whole(odp, buf)
        peers = [
            Background(lambda: [odp.fetch_add(mr.rkey, buf.addr, 1) for _ in range(50)]) for _ in range(4)
        ]
        seen = sorted(old for peer in peers for old in peer.result())
        assert seen == list(range(200))

    def test_one_that_is_not_aligned(self, odp: Odp) -> None:
        buf = odp.mm.mmap(PAGE)
        mr = whole(odp, buf)
        assert errno_of(odp.fetch_add, mr.rkey, buf.addr + 4, 1) == errno.EINVAL
        assert errno_of(odp.fetch_add, mr.rkey, buf.addr + PAGE - 7, 1) == errno.EFAULT


def test_page_faults_and_retries_are_on_a_trace(odp: Odp, tmp_path: Path) -> None:
    buf = filled(odp.mm, PAGES)
    mr = whole(odp, buf)
    path = tmp_path / "trace.json"
    with pm.Trace(path):
        odp.advise_mr(ADVICE_PREFETCH, [IbSge(buf.addr, PAGE, mr.lkey)])
        odp.read(mr.rkey, buf.addr, 2 * PAGE)
        mr.umem.retry.run(mr.umem.notifier, lambda seq: changes_once(odp, buf, mr), lambda *_: None)
    names = [event["name"] for event in json.loads(path.read_text())["traceEvents"]]
    assert (names.count("odp prefetch"), names.count("odp page fault")) == (1, 1)
    assert names.count("read_retry: invalidated meanwhile") == 1


def changes_once(odp: Odp, buf: pm.Region, mr: OdpMr) -> None:
    if not mr.stats.invalidations:
        invalidate(odp.mm, buf.addr)


class TestRaces:
    @pytest.mark.parametrize(
        ("change", "where"),
        [(change, "WALK_AFTER_READ") for change in CHANGES]
        # Here the driver's lock is held, which the callback of an operation through the API waits for.
        + [(change, "DMA_MAP_BEFORE_COMMIT") for change in FOREIGN],
    )
    def test_a_page_that_goes_while_it_is_faulted(self, odp: Odp, change: str, where: str) -> None:
        needs("uffd_events", "pagemap")
        buf = filled(odp.mm, 4)
        mr = whole(odp, buf)
        with points(where) as point:
            read = Background(odp.read, mr.rkey, buf.addr + PAGE, 4)
            point.wait()
            CHANGES[change](odp.mm, buf.addr + PAGE)
            point.release()
            if change in GONE:
                assert errno_of(read.result) == errno.EFAULT
            else:
                assert read.result() == bytes(4)

    @changes(CHANGES)
    def test_a_page_that_goes_after_it_was_mapped(self, odp: Odp, change: str) -> None:
        needs("uffd_events", "pagemap")
        buf = filled(odp.mm, 4)
        mr = whole(odp, buf)
        odp.read(mr.rkey, buf.addr, buf.size)
        CHANGES[change](odp.mm, buf.addr + PAGE)
        if change in GONE:
            assert errno_of(odp.read, mr.rkey, buf.addr + PAGE, 4) == errno.EFAULT
        else:
            assert odp.read(mr.rkey, buf.addr + PAGE, 4) == bytes(4)
        assert odp.read(mr.rkey, buf.addr, 4) == bytes(as_bytes(buf)[:4])

    def test_a_region_that_is_deregistered_while_it_faults(self, odp: Odp) -> None:
        buf = filled(odp.mm, 4)
        mr = whole(odp, buf)
        with points("WALK_AFTER_READ") as point:
            read = Background(odp.read, mr.rkey, buf.addr, 4)
            point.wait()
            odp.dereg_mr(mr)
            point.release()
            assert errno_of(read.result) in (errno.EINVAL, errno.ESRCH)

    @pytest.mark.parametrize("implicit", [False, True])
    def test_no_address_is_anothers_while_an_access_goes_to_it(
        self, odp: Odp, monkeypatch: pytest.MonkeyPatch, implicit: bool
    ) -> None:
        buf = filled(odp.mm, 4)
        mr = odp.reg_user_mr(0, U64_MAX, ALL) if implicit else whole(odp, buf)
        odp.read(mr.rkey, buf.addr, 4)
        translated, go = threading.Event(), threading.Event()
        dma_read_into = odp.device.dma_read_into

        def late(daddr: int, memory: memoryview) -> None:
            translated.set()
            assert go.wait(10)
            dma_read_into(daddr, memory)

        with monkeypatch.context() as patched:
            patched.setattr(odp.device, "dma_read_into", late)
            read = Background(odp.read, mr.rkey, buf.addr, 4)
            assert translated.wait(10)
            dereg = Background(odp.dereg_mr, mr)
            assert dereg.stays()
            go.set()
            assert read.result() == bytes(as_bytes(buf)[:4])
            dereg.result()
        assert errno_of(odp.read, mr.rkey, buf.addr, 4) == errno.EINVAL

    @pytest.mark.parametrize("implicit", [False, True])
    def test_a_callback_cannot_deregister_and_nothing_is_changed(self, odp: Odp, implicit: bool) -> None:
        buf = filled(odp.mm, 4)
        mr = odp.reg_user_mr(0, U64_MAX, ALL) if implicit else whole(odp, buf)
        odp.read(mr.rkey, buf.addr, 4)
        assert errno_in_a_callback(odp.mm, odp.dereg_mr, mr) == errno.EDEADLK
        assert odp.read(mr.rkey, buf.addr, 4) == bytes(as_bytes(buf)[:4])
        assert errno_of(odp.dereg_mr, mr) == 0

    def test_a_region_of_another_device(self, odp: Odp) -> None:
        buf = filled(odp.mm, 4)
        with Odp(odp.mm, "mlx5_1") as another:
            theirs, ours = whole(another, buf), whole(odp, buf)
            assert theirs.lkey == ours.lkey
            assert errno_of(odp.dereg_mr, theirs) == errno.EINVAL
            assert odp.read(ours.rkey, buf.addr, 4) == bytes(as_bytes(buf)[:4])

    def test_memory_that_is_invalidated_for_ever(self, mm: pm.AddressSpace) -> None:
        with Odp(mm, timeout=0.05) as odp:
            buf = filled(mm, 1)
            mr = whole(odp, buf)
            with mm.invalidate(buf.addr, buf.addr + PAGE):
                assert errno_of(odp.read, mr.rkey, buf.addr, 4) == errno.EBUSY
            assert odp.retries.deadline == 1


STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            ["read", "write", "cpu", "drop", "unmap", "protect", "prefetch", "again", "foreign", "fork"]
        ),
        st.integers(0, PAGES * PAGE - 1),
        st.integers(0, 3 * PAGE),
    ),
    max_size=15,
)


@pytest.mark.parametrize("implicit", [False, True])
@given(STEPS)
@settings(deadline=None, max_examples=40, derandomize="CI" in os.environ)
def test_the_device_sees_what_the_cpu_sees(implicit: bool, steps: list[tuple[str, int, int]]) -> None:
    """A model of bytes and permissions: whatever happens, reads are true, and refusals have their errno."""
    with pm.AddressSpace() as mm, Odp(mm, timeout=10.0, imr_chunk=4 * PAGE) as odp:
        buf = mm.mmap(PAGES * PAGE)
        mr = odp.reg_user_mr(0, U64_MAX, ALL) if implicit else whole(odp, buf)
        model, prot = bytearray(buf.size), [3] * PAGES
        for number, (step, at, n) in enumerate(steps, 1):
            n = min(n, buf.size - at)
            page = at // PAGE
            touched = prot[page : (at + n + PAGE - 1) // PAGE] if n else []
            addr = buf.addr + page * PAGE
            if step == "read":
                if None in touched:
                    assert errno_of(odp.read, mr.rkey, buf.addr + at, n) == errno.EFAULT
                else:
                    assert odp.read(mr.rkey, buf.addr + at, n) == model[at : at + n]
            elif step == "write":
                data = bytes([number]) * n
                failed = errno_of(odp.write, mr.rkey, buf.addr + at, data)
                allowed = {0} if set(touched) <= {3} else {errno.EFAULT, errno.EPERM}
                assert failed in allowed
                if not failed:
                    model[at : at + n] = data
            elif step == "cpu" and prot[page] == 3:
                buf[at] = number
                model[at] = number
            elif step in ("drop", "foreign") and prot[page] is not None:
                (mm if step == "drop" else foreign).madvise(addr, PAGE, mmap.MADV_DONTNEED)
                model[page * PAGE : (page + 1) * PAGE] = bytes(PAGE)
            elif step == "unmap" and page == PAGES - 1 and prot[page] is not None:
                mm.munmap(addr, PAGE)
                prot[page] = None
            elif step == "protect" and prot[page] is not None:
                prot[page] = mmap.PROT_READ if prot[page] == 3 else 3
                mm.mprotect(addr, PAGE, prot[page])
            elif step == "prefetch" and implicit is False:
                odp.advise_mr(ADVICE_PREFETCH_NO_FAULT, [IbSge(buf.addr + at, n, mr.lkey)])
            elif step == "again" and not implicit:
                odp.dereg_mr(mr)
                mr = whole(odp, buf)
            elif step == "fork":
                assert in_child(lambda: None) == 0
        assert mm.errors == type(mm.errors)(maxlen=mm.errors.maxlen)
    assert nothing_mapped(odp.device)
