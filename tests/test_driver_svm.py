"""Shared virtual memory: chunks, notifiers, fault intake, partial unmap, device memory and its timeslice."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mirroring import PAGE, as_bytes, filled
from racing import CHANGES, GONE, changes, eventually, in_child
from seams import WAIT_S, Background, errno_of, foreign, needs, points

import pymirror as pm
from pymirror.drivers import svm_devmem
from pymirror.drivers.svm import Svm
from pymirror.drivers.svm_range import SvmContext, SvmRange, chunk_of

KiB64, HUGE = 64 << 10, 2 << 20
DEVICE_MEMORY = ("uffd_kernel", "uffd_events", "move", "pagemap")


@pytest.fixture
def svm(mm: pm.AddressSpace) -> Iterator[Svm]:
    with Svm(mm, timeout=10.0) as made:
        yield made
    check_all_gone(made)


def check_all_gone(svm: Svm) -> None:
    assert svm.ranges == svm.notifiers == []
    assert svm.device.page_table.stats()["entries"] == 0
    assert svm.mm.stats()["interval_notifiers"] == 0
    assert not svm.mm.errors
    assert svm.device.stats.stale == 0


def aligned(mm: pm.AddressSpace, size: int = 2 * HUGE) -> tuple[pm.Region, int]:
    """A Region, and an address in it from which on ``size`` bytes are aligned to 2 MiB."""
    buf = mm.mmap(size + HUGE)
    return buf, -(-buf.addr // HUGE) * HUGE


def spans(svm: Svm) -> list[tuple[int, int]]:
    return [(rng.start, rng.end) for rng in svm.ranges]


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


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class TestDeviceMemory:
    SIZE = 4 * HUGE

    @pytest.fixture
    def clock(self) -> Clock:
        needs(*DEVICE_MEMORY)
        return Clock()

    @pytest.fixture
    def make(self, mm: pm.AddressSpace, clock: Clock) -> Iterator[Callable[..., Svm]]:
        made: list[tuple[Svm, pm.DeviceMemory]] = []

        def one(size: int = self.SIZE, **how: Any) -> Svm:
            device = pm.Device("gpu0")
            vram = pm.DeviceMemory(device, size)
            svm = Svm(mm, device=device, vram=vram, clock=clock, timeout=10.0, **how)
            made.append((svm, vram))
            return svm

        yield one
        for svm, vram in made:
            svm.close()
            assert vram.used == 0
            vram.close()
            check_all_gone(svm)

    def chunks(self, svm: Svm, n: int) -> tuple[pm.Region, list[int]]:
        """n chunks of 2 MiB, each with its number as its bytes."""
        buf, at = aligned(svm.mm, n * HUGE)
        starts = [at + one * HUGE for one in range(n)]
        for number, start in enumerate(starts, 1):
            ctypes.memset(start, number, HUGE)
        return buf, starts

    def there(self, svm: Svm) -> list[int]:
        return [rng.start for rng in svm.ranges if rng.resident]

    def test_bind_moves_and_maps_nothing(self, make: Callable[..., Svm]) -> None:
        svm = make()
        buf, starts = self.chunks(svm, 2)
        assert svm.bind(starts[0], starts[0] + 2 * HUGE) == 2
        assert svm.vram is not None
        assert svm.vram.used == 2 * HUGE
        assert self.there(svm) == starts
        assert svm.device.page_table.stats()["entries"] == 0
        assert (svm.stats.migrations, svm.stats.migrated_pages) == (2, 1024)
        assert svm.bind(starts[0], starts[0] + HUGE) == 0
        del buf

    def test_what_is_there_is_seen_by_both(self, make: Callable[..., Svm]) -> None:
        svm = make()
        buf, (start,) = self.chunks(svm, 1)
        assert svm.device.read(svm.mm, start + 5, 4) == b"\1\1\1\1"
        svm.device.write(svm.mm, start + 6, b"gpu")
        assert ctypes.string_at(start + 5, 5) == b"\1gpu\1"
        ctypes.memset(start + 7, 9, 1)
        svm.mm.sync(WAIT_S)
        assert svm.device.read(svm.mm, start + 5, 5) == b"\1g\x09u\1"
        assert svm.stats.migrations >= 2
        del buf

    def test_the_device_uses_it_where_it_is(self, make: Callable[..., Svm]) -> None:
        svm = make()
        buf, (start,) = self.chunks(svm, 1)
        svm.device.write(svm.mm, start + PAGE, b"here")
        assert svm.device.read(svm.mm, start, PAGE) == bytes([1]) * PAGE
        assert svm.vram is not None
        assert (svm.vram.used, svm.mm.stats()["device_faults"]) == (HUGE, 0)
        assert (svm.stats.faults, self.there(svm)) == (1, [start])
        del buf

    def test_memory_that_nobody_has_touched_moves_too(self, make: Callable[..., Svm]) -> None:
        svm = make()
        buf, start = aligned(svm.mm, HUGE)
        assert svm.device.read(svm.mm, start, PAGE) == bytes(PAGE)
        svm.device.write(svm.mm, start, b"first")
        assert (svm.stats.migrations, self.there(svm)) == (1, [start])
        assert ctypes.string_at(start, 6) == b"first\0"
        del buf

    def test_after_a_fork_a_write_breaks_copy_on_write(self, make: Callable[..., Svm]) -> None:
        svm = make()
        buf, (start,) = self.chunks(svm, 1)
        svm.device.write(svm.mm, start, b"before")

        def child() -> None:
            assert ctypes.string_at(start, 6) == b"before"
            ctypes.memset(start, 9, 6)

        assert in_child(child) == 0
        assert svm.device.read(svm.mm, start, 6) == b"before"
        svm.device.write(svm.mm, start, b"after!")
        assert ctypes.string_at(start, 6) == b"after!"
        del buf

    def test_an_atomic_moves_memory_to_the_device(self, make: Callable[..., Svm]) -> None:
        svm = make()
        buf, (start,) = self.chunks(svm, 1)
        svm.handle_fault(start, ctx=SvmContext(devmem_possible=False))
        one = int.from_bytes(b"\1" * 8, "little")
        assert svm.device.atomic_add(svm.mm, start, 2) == one
        assert svm.device.compare_and_swap(svm.mm, start, one + 2, 5) == one + 2
        assert (self.there(svm), svm.stats.exclusive) == ([start], 0)
        assert in_child(lambda: None) == 0
        assert svm.device.atomic_add(svm.mm, start, 1) == 5
        assert ctypes.string_at(start, 8) == (6).to_bytes(8, "little")
        del buf

    def test_without_device_memory_it_has_the_page_to_itself(self, svm: Svm) -> None:
        needs(*DEVICE_MEMORY)
        buf = filled(svm.mm, 4)
        before = int.from_bytes(as_bytes(buf)[PAGE : PAGE + 8], "little")
        for number in range(3):
            assert svm.device.atomic_add(svm.mm, buf.addr + PAGE, 1) == before + number
        assert svm.stats.exclusive == 1
        assert int.from_bytes(as_bytes(buf)[PAGE : PAGE + 8], "little") == before + 3
        svm.mm.sync(WAIT_S)
        assert svm.device.atomic_add(svm.mm, buf.addr + PAGE, 1) == before + 3
        assert svm.stats.exclusive == 2
        assert svm.device.read(svm.mm, buf.addr, 4) == bytes(as_bytes(buf)[:4])

    def test_an_atomic_on_memory_that_cannot_be_had_alone(self, svm: Svm) -> None:
        needs(*DEVICE_MEMORY)
        shared = svm.mm.mmap(PAGE, shared=True)
        assert errno_of(svm.device.atomic_add, svm.mm, shared.addr, 1) == errno.EOPNOTSUPP
        readonly = svm.mm.mmap(PAGE, prot=mmap.PROT_READ)
        assert errno_of(svm.device.atomic_add, svm.mm, readonly.addr, 1) == errno.EPERM

    def test_an_atomic_on_a_page_that_stayed_behind(self, make: Callable[..., Svm]) -> None:
        """The rest of its chunk moved; a pinned page cannot be had."""
        needs("io_uring")
        svm = make()
        buf, (start,) = self.chunks(svm, 1)
        with pm.pin_user_pages(svm.mm, start, 1, pm.FOLL_WRITE | pm.FOLL_LONGTERM):
            svm.device.write(svm.mm, start, b"12345678")
            assert svm.vram is not None
            assert svm.vram.used == HUGE - PAGE
            assert errno_of(svm.device.atomic_add, svm.mm, start, 1) == errno.EOPNOTSUPP
            assert svm.device.read(svm.mm, start, 8) == b"12345678"
        assert svm.device.atomic_add(svm.mm, start, 1) == int.from_bytes(b"12345678", "little")
        assert ctypes.string_at(start, 8) == b"22345678"
        del buf

    def test_a_migration_that_fails_is_made_again(
        self, make: Callable[..., Svm], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        svm = make()
        buf, (start,) = self.chunks(svm, 1)

        def fails(*_: object) -> int:
            raise pm.MirrorError(errno.ETIMEDOUT, "migrate")

        with monkeypatch.context() as patched:
            patched.setattr(svm_devmem, "migrate_to_device", fails)
            assert errno_of(svm.handle_fault, start) == errno.ETIMEDOUT
            assert self.there(svm) == []
        with monkeypatch.context() as patched:
            svm.device.read(svm.mm, start, 4)
            assert self.there(svm) == [start]
            patched.setattr(svm_devmem, "migrate_to_system", fails)
            assert errno_of(svm.evict, svm.ranges[0]) == errno.ETIMEDOUT
        assert svm._devmem._make_room(svm.vram, self.SIZE, 0.0)
        assert self.there(svm) == []
        del buf

    def test_its_own_events_are_filtered(self, make: Callable[..., Svm]) -> None:
        svm = make()
        buf, (start,) = self.chunks(svm, 1)
        svm.bind(start, start + HUGE)
        before = svm.stats.invalidations
        assert svm.stats.own_events >= 1
        (found,) = svm.ranges
        assert svm.evict(found) == 512
        assert (svm.stats.invalidations, svm.stats.evicted_pages) == (before, 512)
        assert not found.resident
        with pm.DeviceMemory(pm.Device("other"), self.SIZE) as others:
            pm.migrate_to_device(svm.mm, start, start + HUGE, others)
            assert svm.stats.invalidations == before + 1
        del buf

    def test_the_longest_there_makes_room(self, make: Callable[..., Svm], clock: Clock) -> None:
        svm = make(2 * HUGE)
        buf, starts = self.chunks(svm, 3)
        for start in starts:
            clock.now += 1
            svm.bind(start, start + HUGE)
        assert self.there(svm) == starts[1:]
        assert svm.stats.evictions == 1
        assert [ctypes.string_at(start, 1)[0] for start in starts] == [1, 2, 3]
        del buf

    def test_not_before_its_timeslice_is_over(self, make: Callable[..., Svm], clock: Clock) -> None:
        svm = make(HUGE, ctx=SvmContext(timeslice=5.0))
        buf, starts = self.chunks(svm, 2)
        svm.bind(starts[0], starts[0] + HUGE)
        clock.now += 4.9
        assert svm.bind(starts[1], starts[1] + HUGE) == 0
        assert (self.there(svm), svm.stats.no_room) == ([starts[0]], 1)
        assert svm.device.read(svm.mm, starts[1], 1) == b"\2"
        clock.now += 0.2
        assert svm.bind(starts[1], starts[1] + HUGE) == 1
        assert self.there(svm) == [starts[1]]
        del buf

    def test_what_the_cpu_touches_moves_again(self, make: Callable[..., Svm]) -> None:
        svm = make()
        buf, (start,) = self.chunks(svm, 1)
        svm.bind(start, start + HUGE)
        assert ctypes.string_at(start + PAGE, 1) == b"\1"
        svm.mm.sync()
        assert self.there(svm) == []
        assert svm.bind(start, start + HUGE) == 1
        assert svm.vram is not None
        assert svm.vram.used == HUGE
        del buf

    def test_memory_that_must_be_there_and_cannot(self, make: Callable[..., Svm]) -> None:
        svm = make(ctx=SvmContext(devmem_only=True))
        shared = svm.mm.mmap(PAGE, shared=True)
        assert errno_of(svm.bind, shared.addr, shared.addr + PAGE) == errno.EBUSY
        assert errno_of(svm.device.read, svm.mm, shared.addr, 4) == errno.EFAULT
        assert svm.handle_fault(shared.addr, ctx=SvmContext()).valid

    def test_memory_that_need_not_be_there(self, make: Callable[..., Svm]) -> None:
        svm = make()
        buf, (start,) = self.chunks(svm, 1)
        svm.handle_fault(start, ctx=SvmContext(devmem_possible=False))
        assert svm.stats.migrations == 0
        shared = svm.mm.mmap(PAGE, shared=True)
        assert svm.device.read(svm.mm, shared.addr, 4) == bytes(4)
        del buf

    @pytest.mark.parametrize("policy", ["drop", "split"])
    def test_a_partial_unmap(self, make: Callable[..., Svm], policy: str) -> None:
        svm = make(partial_unmap=policy)
        buf, starts = self.chunks(svm, 2)
        svm.bind(starts[0], starts[0] + HUGE)
        svm.mm.munmap(starts[0] + KiB64, PAGE)
        svm.handle_fault(starts[1], ctx=SvmContext(devmem_possible=False))
        assert svm.vram is not None
        assert svm.vram.used == (0 if policy == "drop" else HUGE - PAGE)
        assert ctypes.string_at(starts[0] + KiB64 - 1, 1) == b"\1"
        assert ctypes.string_at(starts[0] + KiB64 + PAGE, 1) == b"\1"
        del buf


STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            [
                "read",
                "write",
                "cpu",
                "bind",
                "evict",
                "drop",
                "foreign",
                "unmap",
                "protect",
                "fork",
                "pin",
                "add",
            ]
        ),
        st.integers(0, 16 * PAGE - 1),
        st.integers(0, 4 * PAGE),
    ),
    max_size=15,
)


@pytest.mark.parametrize("policy", ["drop", "split"])
@pytest.mark.parametrize("with_vram", [False, True], ids=["system", "vram"])
@given(STEPS)
@settings(deadline=None, max_examples=25, derandomize="CI" in os.environ)
def test_the_device_sees_what_the_cpu_sees(
    policy: str, with_vram: bool, steps: list[tuple[str, int, int]]
) -> None:
    """A model of bytes and permissions, over memory that comes and goes between CPU and device."""
    with pm.AddressSpace() as mm:
        if any(name not in mm.features for name in DEVICE_MEMORY):
            with_vram = False
        device = pm.Device("gpu0")
        vram = pm.DeviceMemory(device, 12 * PAGE) if with_vram else None
        svm = Svm(
            mm, device=device, vram=vram, partial_unmap=policy, chunk_sizes=(4 * PAGE, PAGE), timeout=10.0
        )
        buf = mm.mmap(16 * PAGE)
        model, prot = bytearray(buf.size), [3] * 16
        for number, (step, at, n) in enumerate(steps, 1):
            n = min(n, buf.size - at)
            page = at // PAGE
            touched: list[int | None] = list(prot[page : (at + n + PAGE - 1) // PAGE]) if n else []
            addr = buf.addr + page * PAGE
            if step == "read":
                if None in touched:
                    assert errno_of(device.read, mm, buf.addr + at, n) == errno.EFAULT
                else:
                    assert device.read(mm, buf.addr + at, n) == model[at : at + n]
            elif step == "write" and set(touched) <= {3}:
                device.write(mm, buf.addr + at, bytes([number]) * n)
                model[at : at + n] = bytes([number]) * n
            elif step == "write" and touched[0] != 3:
                refused = errno.EFAULT if touched[0] is None else errno.EPERM
                assert errno_of(device.write, mm, buf.addr + at, b"x") == refused
            elif step == "cpu" and prot[page] == 3:
                buf[at] = model[at] = number
            elif step == "bind" and prot[page] is not None:
                svm.bind(addr, addr + PAGE)
            elif step == "evict" and svm.ranges:
                svm.evict(svm.ranges[number % len(svm.ranges)])
            elif step in ("drop", "foreign") and prot[page] is not None:
                (mm if step == "drop" else foreign).madvise(addr, PAGE, mmap.MADV_DONTNEED)
                model[page * PAGE : (page + 1) * PAGE] = bytes(PAGE)
            elif step == "unmap" and page % 5 == 4 and prot[page] is not None:
                mm.munmap(addr, PAGE)
                prot[page] = None  # type: ignore[call-overload]
            elif step == "protect" and prot[page] is not None:
                prot[page] = mmap.PROT_READ if prot[page] == 3 else 3
                mm.mprotect(addr, PAGE, prot[page])
            elif step == "add" and prot[page] == 3 and with_vram:
                word = at // 8 * 8
                old = int.from_bytes(model[word : word + 8], "little")
                assert device.atomic_add(mm, buf.addr + word, number) == old
                model[word : word + 8] = ((old + number) % (1 << 64)).to_bytes(8, "little")
            elif step == "fork":
                assert in_child(lambda: None) == 0
            elif step == "pin" and prot[page] == 3 and "io_uring" in mm.features:
                with pm.pin_user_pages(mm, addr, 1) as pin:
                    assert pin.read() == model[page * PAGE : (page + 1) * PAGE]
        for page, allowed in enumerate(prot):
            if allowed is not None:
                assert (
                    ctypes.string_at(buf.addr + page * PAGE, PAGE) == model[page * PAGE : (page + 1) * PAGE]
                )
        svm.close()
        if vram is not None:
            assert vram.used == 0
            vram.close()
        check_all_gone(svm)


def test_ranges_tell_what_they_are(svm: Svm) -> None:
    found = svm.handle_fault(svm.mm.mmap(PAGE).addr)
    assert repr(found).endswith(" valid>")
    rng = SvmRange(found.notifier, 0, 4 * PAGE, holes=[(PAGE, 2 * PAGE), (0, PAGE)])
    assert rng.left() == [(2 * PAGE, 4 * PAGE)]
    assert np.all([rng.unmapped, rng.partial_unmap])
