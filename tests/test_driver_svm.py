"""Shared virtual memory: chunks, notifiers, fault intake, partial unmap."""

from __future__ import annotations

import ctypes
import errno
import mmap
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mirroring import PAGE, as_bytes, filled
from racing import CHANGES, GONE, changes, eventually, in_child
from seams import Background, errno_of, needs, points
from svm_driver import DEVICE_MEMORY, HUGE, KiB64, aligned, check_all_gone, spans

import pymirror as pm
from pymirror.drivers.svm import Svm
from pymirror.drivers.svm_range import SvmContext, SvmRange, chunk_of


@pytest.fixture
def svm(mm: pm.AddressSpace) -> Iterator[Svm]:
    with Svm(mm, timeout=10.0) as made:
        yield made
    check_all_gone(made)


class TestChunks:
    SIZES = (HUGE, KiB64, PAGE)

    @given(
        st.integers(0, 2 * HUGE // PAGE - 1),
        st.integers(0, 600),
        st.integers(0, 600),
        st.lists(st.integers(0, 2 * HUGE // PAGE - 1), max_size=3),
    )
    @settings(deadline=None, max_examples=300)
    def test_the_largest_aligned_one_inside_that_is_free(
        self, page: int, below: int, above: int, taken: list[int]
    ) -> None:
        base, addr = 4 * HUGE, 4 * HUGE + page * PAGE
        inside = max(base, addr - below * PAGE), min(base + 2 * HUGE, addr + (1 + above) * PAGE)
        used = {base + one * PAGE for one in taken} - {addr}

        def fits(start: int, end: int) -> bool:
            return inside[0] <= start and end <= inside[1] and not used & set(range(start, end, PAGE))

        start, end = chunk_of(
            addr, self.SIZES, inside, lambda start, end: not used & set(range(start, end, PAGE))
        )
        size = end - start
        assert start <= addr < end
        assert start % size == 0
        assert fits(start, end)
        assert not any(
            fits(addr // larger * larger, addr // larger * larger + larger)
            for larger in self.SIZES
            if larger > size
        )

    def test_one_that_is_not_wanted_but_the_smallest(self) -> None:
        whole = (0, 4 * HUGE)
        assert chunk_of(HUGE, self.SIZES, whole, lambda *_: True, lambda *_: False) == (HUGE, HUGE + PAGE)
        assert chunk_of(HUGE, self.SIZES, whole, lambda *_: True, lambda start, end: end - start < HUGE) == (
            HUGE,
            HUGE + KiB64,
        )

    @pytest.mark.parametrize(
        "how",
        [
            {"chunk_sizes": ()},
            {"chunk_sizes": (HUGE,)},
            {"chunk_sizes": (PAGE, HUGE)},
            {"chunk_sizes": (3 * PAGE, PAGE)},
            {"chunk_sizes": (HUGE, PAGE), "notifier_size": KiB64},
            {"notifier_size": 3 * HUGE},
            {"partial_unmap": "keep"},
        ],
    )
    def test_what_makes_no_sense(self, mm: pm.AddressSpace, how: dict[str, Any]) -> None:
        assert errno_of(Svm, mm, **how) == errno.EINVAL


class TestFaults:
    def test_the_device_reads_and_writes_any_memory(self, svm: Svm) -> None:
        buf = filled(svm.mm, 40)
        assert svm.device.read(svm.mm, buf.addr + 10, 20 * PAGE) == bytes(as_bytes(buf)[10 : 10 + 20 * PAGE])
        svm.device.write(svm.mm, buf.addr + PAGE - 3, b"device")
        assert bytes(as_bytes(buf)[PAGE - 3 : PAGE + 3]) == b"device"

    def test_a_fault_takes_a_chunk(self, svm: Svm) -> None:
        buf, at = aligned(svm.mm)
        svm.device.read(svm.mm, at + 5 * PAGE, 4)
        assert spans(svm) == [(at, at + HUGE)]
        svm.device.read(svm.mm, at + HUGE - 4, 4)
        assert (svm.stats.faults, svm.stats.inserted) == (1, 1)
        svm.device.read(svm.mm, at + HUGE, 4)
        assert spans(svm) == [(at, at + HUGE), (at + HUGE, at + 2 * HUGE)]
        del buf

    def test_a_small_chunk_is_taken_where_the_cpu_has_all_its_pages(self, mm: pm.AddressSpace) -> None:
        buf, at = aligned(mm)
        ctypes.memset(at, 1, KiB64)
        ctypes.memset(at + KiB64, 1, PAGE)
        with Svm(mm, chunk_sizes=(KiB64, PAGE)) as svm:
            svm.handle_fault(at + PAGE)
            svm.handle_fault(at + KiB64 + PAGE)
            assert spans(svm) == [(at, at + KiB64), (at + KiB64 + PAGE, at + KiB64 + 2 * PAGE)]
            svm.handle_fault(at + 2 * KiB64, ctx=SvmContext(check_pages_threshold=0))
            assert spans(svm)[-1] == (at + 2 * KiB64, at + 3 * KiB64)
        check_all_gone(svm)
        del buf

    def test_a_read_does_not_fault_for_writing(self, svm: Svm) -> None:
        buf = svm.mm.mmap(PAGE)
        found = svm.handle_fault(buf.addr)
        assert not found.writable
        assert svm.handle_fault(buf.addr, write=True) is found
        assert found.writable
        assert svm.handle_fault(buf.addr, write=True) is found
        assert (svm.stats.faults, svm.stats.valid) == (2, 1)

    def test_errors(self, svm: Svm) -> None:
        buf = svm.mm.mmap(4 * PAGE)
        svm.mm.mprotect(buf.addr + PAGE, PAGE, mmap.PROT_READ)
        svm.mm.mprotect(buf.addr + 2 * PAGE, PAGE, 0)
        svm.mm.munmap(buf.addr + 3 * PAGE, PAGE)
        assert errno_of(svm.handle_fault, buf.addr + 3 * PAGE) == errno.ENOENT
        assert errno_of(svm.handle_fault, buf.addr + PAGE, True) == errno.EPERM
        assert errno_of(svm.handle_fault, buf.addr, True, SvmContext(read_only=True)) == errno.EPERM
        assert errno_of(svm.handle_fault, buf.addr + 2 * PAGE) == errno.EFAULT
        access = svm.device
        assert errno_of(access.read, svm.mm, buf.addr + 3 * PAGE, 4) == errno.EFAULT
        assert errno_of(access.write, svm.mm, buf.addr + PAGE, b"x") == errno.EPERM
        assert access.read(svm.mm, buf.addr + PAGE, 4) == bytes(4)
        assert svm.stats.cancelled == 2
        with svm.notifier_lock:
            assert errno_of(svm.handle_fault, buf.addr) == errno.EDEADLK

    def test_a_chunk_that_ends_beyond_its_file(self, svm: Svm, tmp_path: Any) -> None:
        path = tmp_path / "file"
        path.write_bytes(b"x" * PAGE)
        with path.open("r+b") as file:
            buf = svm.mm.mmap(2 * HUGE + HUGE, shared=True, fd=file.fileno())
        assert svm.device.read(svm.mm, buf.addr, 4) == b"xxxx"
        assert errno_of(svm.device.read, svm.mm, buf.addr + PAGE, 4) == errno.EFAULT

    def test_a_range_whose_memory_permits_less_now_is_made_anew(self, svm: Svm) -> None:
        buf, at = aligned(svm.mm)
        svm.device.write(svm.mm, at, b"before")
        svm.mm.mprotect(at + HUGE - PAGE, PAGE, mmap.PROT_READ)
        svm.device.write(svm.mm, at, b"after!")
        assert ctypes.string_at(at, 6) == b"after!"
        assert errno_of(svm.device.write, svm.mm, at + HUGE - PAGE, b"x") == errno.EPERM
        assert svm.device.read(svm.mm, at + HUGE - PAGE, 1) == b"\0"
        del buf

    def test_faults_of_many_accesses_are_one_batch_and_one_page_is_served_once(self, svm: Svm) -> None:
        buf = filled(svm.mm, 32)
        with points("WALK_BEFORE_READ") as point:
            first = Background(svm.device.read, svm.mm, buf.addr, 4)
            point.wait()
            others = [Background(svm.device.read, svm.mm, buf.addr + 20 * PAGE, 4) for _ in range(4)]
            while svm.faults.buffer.stats.entered + svm.faults.buffer.stats.coalesced < 5:
                assert not any(other.done for other in others)
            point.release()
            assert first.result() == bytes(as_bytes(buf)[:4])
            assert {other.result() for other in others} == {bytes(as_bytes(buf)[20 * PAGE : 20 * PAGE + 4])}
        assert svm.stats.batches == 2
        assert svm.faults.buffer.stats.coalesced == 3

    @pytest.mark.parametrize("shared", [False, True])
    def test_what_asks_for_less_is_not_cancelled_with_what_asks_for_more(
        self, svm: Svm, shared: bool
    ) -> None:
        """A write joins no atomic in the fault buffer, and a read no write."""
        buf, device = filled(svm.mm, 32, shared=shared), svm.device
        at = buf.addr + 20 * PAGE
        if shared:
            needs(*DEVICE_MEMORY)
            more, refused = (lambda: device.atomic_add(svm.mm, at, 1)), errno.EOPNOTSUPP
            less, seen = (lambda: device.write(svm.mm, at, b"less")), None
        else:
            svm.mm.mprotect(at, PAGE, mmap.PROT_READ)
            more, refused = (lambda: device.write(svm.mm, at, b"more")), errno.EPERM
            less, seen = (lambda: device.read(svm.mm, at, 4)), bytes(as_bytes(buf)[20 * PAGE : 20 * PAGE + 4])
        with points("WALK_BEFORE_READ") as point:
            first = Background(device.read, svm.mm, buf.addr, 4)
            point.wait()
            accesses = [Background(errno_of, more), Background(less)]
            eventually(lambda: svm.faults.buffer.stats.entered + svm.faults.buffer.stats.coalesced >= 3)
            point.release()
            first.result()
            assert [one.result() for one in accesses] == [refused, seen]

    def test_a_driver_that_fails_ends_the_access_and_goes_on(
        self, svm: Svm, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        buf = filled(svm.mm, 1)

        def fails(*_: object) -> None:
            raise ZeroDivisionError

        with monkeypatch.context() as patched:
            patched.setattr(svm, "_get_pages", fails)
            assert errno_of(svm.device.read, svm.mm, buf.addr, 4) == errno.EIO
        assert "serving a fault" in caplog.text
        assert svm.device.read(svm.mm, buf.addr, 4) == bytes(as_bytes(buf)[:4])

    def test_an_access_of_a_closed_driver(self, mm: pm.AddressSpace) -> None:
        svm = Svm(mm)
        buf = filled(mm, 1)
        svm.device.read(mm, buf.addr, 4)
        svm.close()
        svm.close()
        assert errno_of(svm.device.read, mm, buf.addr, 4) == errno.ESRCH
        assert errno_of(svm.handle_fault, buf.addr) == errno.ESRCH
        assert errno_of(svm.bind, buf.addr, buf.addr + PAGE) == errno.ESRCH
        check_all_gone(svm)

    def test_a_closed_address_space(self) -> None:
        mm = pm.AddressSpace()
        svm = Svm(mm)
        buf = filled(mm, 1)
        svm.device.read(mm, buf.addr, 4)
        mm.close()
        assert errno_of(svm.device.read, mm, buf.addr, 4) == errno.ESRCH
        assert errno_of(svm.handle_fault, buf.addr) == errno.ESRCH
        svm.close()

    def test_a_forked_child(self, svm: Svm) -> None:
        buf = filled(svm.mm, 1)
        svm.device.read(svm.mm, buf.addr, 4)

        def child() -> None:
            assert errno_of(svm.device.read, svm.mm, buf.addr, 4) == errno.ESRCH
            svm.close()

        assert in_child(child) == 0
        assert svm.device.read(svm.mm, buf.addr, 4) == bytes(as_bytes(buf)[:4])


class TestNotifiers:
    def test_there_is_one_for_each_window_that_is_used(self, mm: pm.AddressSpace) -> None:
        buf, at = aligned(mm)
        with Svm(mm, notifier_size=HUGE) as svm:
            for start in (at, at + PAGE, at + HUGE):
                svm.handle_fault(start)
            assert [notifier.start for notifier in svm.notifiers] == [at, at + HUGE]
            assert mm.stats()["interval_notifiers"] == 2
        check_all_gone(svm)
        del buf

    def test_an_invalidation_takes_a_range_off_as_a_whole(self, svm: Svm) -> None:
        buf, at = aligned(svm.mm)
        found = svm.handle_fault(at)
        svm.mm.madvise(at + PAGE, PAGE, mmap.MADV_DONTNEED)
        assert not found.valid
        assert svm.device.page_table.stats()["entries"] == 0
        assert (svm.stats.invalidations, svm.stats.false_invalidations) == (1, 0)
        svm.mm.madvise(at + PAGE, PAGE, mmap.MADV_DONTNEED)
        assert (svm.stats.invalidations, svm.stats.false_invalidations) == (2, 1)
        svm.device.read(svm.mm, at, 4)
        assert svm.ranges == [found]
        del buf

    def test_one_that_may_not_wait_is_refused_while_the_lock_is_held(self, svm: Svm) -> None:
        buf = filled(svm.mm, 1)
        svm.handle_fault(buf.addr)
        with svm.notifier_lock:
            reap = Background(errno_of, svm.mm.oom_reap, buf.addr, buf.addr + PAGE)
            assert reap.result() == errno.EAGAIN
        assert svm.device.read(svm.mm, buf.addr, 4) == bytes(as_bytes(buf)[:4])

    @changes(CHANGES)
    def test_a_change_while_a_fault_is_served(self, svm: Svm, change: str) -> None:
        needs("uffd_events", "pagemap")
        buf = filled(svm.mm, 4)
        with points("WALK_AFTER_READ") as point:
            read = Background(svm.device.read, svm.mm, buf.addr + PAGE, 4)
            point.wait()
            CHANGES[change](svm.mm, buf.addr + PAGE)
            point.release()
            if change in GONE:
                assert errno_of(read.result) == errno.EFAULT
            else:
                assert read.result() == bytes(4)


class TestPartialUnmap:
    def test_a_collection_that_fails_is_made_again(
        self, mm: pm.AddressSpace, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with Svm(mm, timeout=10.0) as svm:
            buf, at = aligned(mm)
            for start in (at, at + HUGE):
                svm.device.write(mm, start, b"here")
                mm.munmap(start + PAGE, PAGE)

            def fails(_: SvmRange) -> int:
                raise pm.MirrorError(errno.ETIMEDOUT, "evict")

            with monkeypatch.context() as patched:
                patched.setattr(svm._devmem, "evict", fails)
                assert errno_of(svm.handle_fault, at) == errno.ETIMEDOUT
            for start in (at + HUGE, at):
                assert svm.device.read(mm, start, 4) == b"here"
            assert svm.stats.dropped == 2
            del buf
        check_all_gone(svm)

    def unmapped(self, mm: pm.AddressSpace, policy: str) -> tuple[Svm, int, pm.Region]:
        svm = Svm(mm, partial_unmap=policy)
        buf, at = aligned(mm)
        svm.device.write(mm, at, b"start")
        svm.device.write(mm, at + HUGE - 3, b"end")
        mm.munmap(at + KiB64, PAGE)
        return svm, at, buf

    @pytest.mark.parametrize("policy", ["drop", "split"])
    def test_what_is_left_reads_as_before(self, mm: pm.AddressSpace, policy: str) -> None:
        svm, at, buf = self.unmapped(mm, policy)
        assert svm.device.read(mm, at, 5) == b"start"
        assert svm.device.read(mm, at + HUGE - 3, 3) == b"end"
        assert errno_of(svm.device.read, mm, at + KiB64, 4) == errno.EFAULT
        svm.close()
        check_all_gone(svm)
        del buf

    def test_drop_forgets_the_range(self, mm: pm.AddressSpace) -> None:
        svm, at, buf = self.unmapped(mm, "drop")
        (found,) = svm.ranges
        assert found.partial_unmap
        svm.device.read(mm, at, 4)
        assert spans(svm) == [(at, at + KiB64)]
        assert (svm.stats.dropped, svm.stats.split) == (1, 0)
        svm.close()
        del buf

    def test_split_keeps_what_is_left(self, mm: pm.AddressSpace) -> None:
        svm, at, buf = self.unmapped(mm, "split")
        svm.device.read(mm, at, 4)
        assert spans(svm) == [(at, at + KiB64), (at + KiB64 + PAGE, at + HUGE)]
        assert (svm.stats.dropped, svm.stats.split) == (0, 1)
        svm.close()
        del buf

    @pytest.mark.parametrize("policy", ["drop", "split"])
    def test_all_of_it_takes_the_notifier_along(self, mm: pm.AddressSpace, policy: str) -> None:
        with Svm(mm, partial_unmap=policy, notifier_size=HUGE) as svm:
            buf, at = aligned(mm)
            other = mm.mmap(PAGE)
            svm.handle_fault(at)
            mm.munmap(buf.addr, buf.size)
            svm.handle_fault(other.addr)
            assert [notifier.start for notifier in svm.notifiers] == [other.addr // HUGE * HUGE]
            assert svm.stats.dropped == 1
        check_all_gone(svm)


def test_ranges_tell_what_they_are(svm: Svm) -> None:
    found = svm.handle_fault(svm.mm.mmap(PAGE).addr)
    assert repr(found).endswith(" valid>")
    rng = SvmRange(found.notifier, 0, 4 * PAGE, holes=[(PAGE, 2 * PAGE), (0, PAGE)])
    assert rng.left() == [(2 * PAGE, 4 * PAGE)]
    assert np.all([rng.unmapped, rng.partial_unmap])
