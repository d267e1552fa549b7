"""Shared virtual memory on device memory: what moves and when, atomics, the timeslice; and a model of all."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mirroring import PAGE, as_bytes, filled
from racing import in_child
from seams import WAIT_S, errno_of, foreign, needs
from svm_driver import DEVICE_MEMORY, HUGE, KiB64, aligned, check_all_gone

import pymirror as pm
from pymirror.drivers import svm_devmem
from pymirror.drivers.svm import Svm
from pymirror.drivers.svm_range import SvmContext


@pytest.fixture
def svm(mm: pm.AddressSpace) -> Iterator[Svm]:
    with Svm(mm, timeout=10.0) as made:
        yield made
    check_all_gone(made)


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
