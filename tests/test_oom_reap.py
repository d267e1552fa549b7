"""The OOM reaper's invalidation: not blockable, so a callback that would have to wait may refuse."""

from __future__ import annotations

import errno
from typing import Any

import pytest
from mirroring import FAULT, PAGE, Driver, as_bytes, filled, whole
from notifying import Recorder, interval
from seams import errno_of

import pymirror as pm

MADV_FREE = 8


class Refusing(pm.Mirror):
    """A driver whose lock is taken: what it says then is ``answer``."""

    def __init__(self, mm: pm.AddressSpace, answer: Any = -errno.EAGAIN) -> None:
        self.answer = answer
        self.busy = True
        self.seen: list[pm.MmuNotifierRange] = []
        super().__init__(mm)

    def sync_cpu_device_pagetables(self, update: pm.MmuNotifierRange) -> Any:
        self.seen.append(update)
        return self.answer if self.busy else None


def test_private_memory_is_emptied_and_devices_lose_it_before(mm: pm.AddressSpace) -> None:
    buf = filled(mm, 4)
    with Driver(mm) as driver, whole(driver, buf, FAULT) as rng:
        assert driver.device.page_table.map(rng, rng.fault())
        before = bytes(buf)
        mm.oom_reap(buf.addr + PAGE, buf.addr + 3 * PAGE)
        assert not rng.valid
        mm.sync()
        (update,) = driver.updates
        assert (update.start, update.end) == (buf.addr + PAGE, buf.addr + 3 * PAGE)
        assert (update.event, update.guarantee) == (pm.Event.UNMAP, pm.Guarantee.BEFORE)
        assert not update.blockable
        assert driver.device.page_table.stats()["entries"] == 2
    assert bytes(buf) == before[:PAGE] + bytes(2 * PAGE) + before[3 * PAGE :]


def test_shared_memory_and_huge_pages_are_left_alone(mm: pm.AddressSpace) -> None:
    shared = mm.mmap(2 * PAGE, shared=True)
    as_bytes(shared)[:] = b"\1" * 2 * PAGE
    recorder = Recorder(mm)
    mm.oom_reap(shared.addr, shared.addr + shared.size)
    assert recorder.log == []
    assert bytes(shared) == b"\1" * 2 * PAGE
    recorder.unregister()


@pytest.mark.hugetlb
def test_huge_pages_are_left_alone(mm: pm.AddressSpace) -> None:
    huge = mm.mmap(pm.MiB * 2, huge="hugetlb")
    as_bytes(huge)[:3] = b"abc"
    mm.oom_reap(huge.addr, huge.addr + huge.size)
    assert bytes(as_bytes(huge)[:3]) == b"abc"


def test_a_private_mapping_of_a_file_reads_as_the_file_again(mm: pm.AddressSpace, tmp_path: Any) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"f" * 2 * PAGE)
    with path.open("rb") as file:
        buf = mm.mmap(2 * PAGE, fd=file.fileno())
    as_bytes(buf)[:PAGE] = b"w" * PAGE
    mm.oom_reap(buf.addr, buf.addr + buf.size)
    assert bytes(buf) == b"f" * 2 * PAGE


@pytest.mark.parametrize("answer", [False, -errno.EAGAIN])
def test_a_callback_may_refuse_and_nothing_is_reaped(mm: pm.AddressSpace, answer: Any) -> None:
    buf = filled(mm, 2)
    before = bytes(buf)
    with Refusing(mm, answer) as driver:
        with pytest.raises(pm.MirrorError, match="not reaped") as refused:
            mm.oom_reap(buf.addr, buf.addr + buf.size)
        assert refused.value.errno == errno.EAGAIN
        assert refused.value.addr == buf.addr
        assert bytes(buf) == before
        assert not mm.errors
        driver.busy = False
        mm.oom_reap(buf.addr, buf.addr + buf.size)
        assert bytes(buf) == bytes(buf.size)


def test_an_interval_notifier_may_refuse_too(mm: pm.AddressSpace) -> None:
    buf = filled(mm, 2)

    def busy(sub: pm.IntervalNotifier, range: pm.MmuNotifierRange, seq: int) -> bool:
        sub.set_seq(seq)
        return range.blockable

    sub = interval(mm, buf.addr, 2, busy)
    before = bytes(buf)
    assert errno_of(mm.oom_reap, buf.addr, buf.addr + buf.size) == errno.EAGAIN
    assert bytes(buf) == before
    sub.remove()


def test_one_vma_that_is_refused_does_not_spare_the_others(mm: pm.AddressSpace) -> None:
    room = filled(mm, 3)
    middle = bytes(room)[PAGE : 2 * PAGE]
    # Three vmas, of which the middle one is somebody's.
    mm.mprotect(room.addr + PAGE, PAGE, 1)

    def busy(sub: pm.IntervalNotifier, range: pm.MmuNotifierRange, seq: int) -> bool:
        sub.set_seq(seq)
        return range.blockable

    sub = interval(mm, room.addr + PAGE, 1, busy)
    assert errno_of(mm.oom_reap, room.addr, room.addr + room.size) == errno.EAGAIN
    assert bytes(room) == bytes(PAGE) + middle + bytes(PAGE)
    sub.remove()


def test_a_refusal_of_a_blockable_change_is_the_drivers_error(mm: pm.AddressSpace) -> None:
    buf = filled(mm, 1)
    with Refusing(mm):
        mm.munmap(buf.addr, PAGE)
        assert buf.closed
        assert mm.errors[-1].exception.errno == errno.EAGAIN  # type: ignore[attr-defined]


def test_wrong_intervals_are_refused(mm: pm.AddressSpace) -> None:
    buf = filled(mm, 2)
    before = bytes(buf)
    assert errno_of(mm.oom_reap, buf.addr + 1, buf.addr + PAGE) == errno.EINVAL
    assert errno_of(mm.oom_reap, buf.addr, buf.addr) == errno.EINVAL
    assert errno_of(mm.oom_reap, buf.addr + PAGE, buf.addr) == errno.EINVAL
    assert bytes(buf) == before


def test_it_is_refused_in_a_callback_and_under_a_driver_lock(mm: pm.AddressSpace) -> None:
    buf = filled(mm, 1)
    with Driver(mm) as driver, driver.lock:
        assert errno_of(mm.oom_reap, buf.addr, buf.addr + PAGE) == errno.EDEADLK
