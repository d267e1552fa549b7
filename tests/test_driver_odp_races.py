"""RDMA on-demand paging while memory changes, regions go and callbacks call; and a model of all."""

from __future__ import annotations

import errno
import mmap
import os
import threading

import pytest
from dma import nothing_mapped
from hypothesis import given, settings
from hypothesis import strategies as st
from mirroring import PAGE, as_bytes, errno_in_a_callback, filled
from odp_driver import ALL, PAGES, odp_by_bus, whole
from racing import CHANGES, FOREIGN, GONE, changes, in_child
from seams import Background, errno_of, foreign, needs, points

import pymirror as pm
from pymirror.drivers.odp import (
    ADVICE_PREFETCH_NO_FAULT,
    U64_MAX,
    IbSge,
    Odp,
)

odp = odp_by_bus


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
