"""RDMA on-demand paging: keys and rights, page faults, invalidation, atomics."""

from __future__ import annotations

import errno
import json
import mmap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from dma import nothing_mapped
from mirroring import PAGE, as_bytes, filled
from notifying import invalidate
from odp_driver import ALL, HUGE, PAGES, bits, changes_once, odp_by_bus, whole
from racing import in_child
from seams import Background, errno_of

import pymirror as pm
from pymirror.drivers.odp import (
    ADVICE_PREFETCH,
    ADVICE_PREFETCH_WRITE,
    IB_ACCESS_HUGETLB,
    IB_ACCESS_LOCAL_WRITE,
    IB_ACCESS_ON_DEMAND,
    IB_ACCESS_REMOTE_ATOMIC,
    IB_ACCESS_REMOTE_READ,
    IB_ACCESS_REMOTE_WRITE,
    U64_MAX,
    IbSge,
    Odp,
)
from pymirror.drivers.umem_odp import ODP_READ_ALLOWED, ODP_WRITE_ALLOWED

odp = odp_by_bus


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
