"""What the drivers share besides the retry loop: segments for DMA, counts, callbacks under a lock."""

from __future__ import annotations

import itertools
import threading
from collections import deque
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from seams import Background

import pymirror as pm
from pymirror.drivers.counts import Counts, take
from pymirror.drivers.odp import IB_ACCESS_ON_DEMAND, Odp
from pymirror.drivers.pinned import Pinned
from pymirror.drivers.retry import invalidated
from pymirror.drivers.segments import dma_segments
from pymirror.drivers.svm import Svm
from pymirror.drivers.userptr import Userptr

PAGE, BASE = 4096, 7 << 20


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.data())
def test_segments_are_the_bytes_in_order_and_as_few_as_can_be(frames: list[int], data: st.DataObject) -> None:
    daddrs = np.array(frames, np.uint64) * np.uint64(PAGE)
    size = len(frames) * PAGE
    start = data.draw(st.integers(0, size))
    n = data.draw(st.integers(0, size - start))
    found = dma_segments(daddrs, BASE, BASE + start, n)
    expected = [frames[at // PAGE] * PAGE + at % PAGE for at in range(start, start + n)]
    assert [at + i for at, count in found for i in range(count)] == expected
    joined = [one[0] + one[1] == other[0] for one, other in itertools.pairwise(found)]
    assert not any(joined)


@dataclass
class Two(Counts):
    """A pair."""

    one: int = 0
    two: int = 0


def test_counts_of_many_threads_are_all_there() -> None:
    counts = Two()
    threads = [Background(lambda: [counts.add(one=1, two=2) for _ in range(500)]) for _ in range(4)]
    for thread in threads:
        thread.result()
    assert counts.as_dict() == {"one": 2000, "two": 4000}


def test_drivers_tell_what_they_are_with_their_locks_held(mm: pm.AddressSpace) -> None:
    """A hung process is looked at from wherever it is."""
    with Odp(mm) as odp, Svm(mm) as svm, Userptr(mm) as userptr, Pinned(mm) as pinned:
        odp.reg_user_mr(mm.mmap(4096).addr, 4096, IB_ACCESS_ON_DEMAND)
        with svm.notifier_lock, userptr.notifier_lock, pinned.lock:
            told = [repr(one) for one in (odp, svm, userptr, pinned, svm.retry)]
    assert told[0].startswith("<Odp 'mlx5_0' 1 regions, RetryStats(begun=0")
    assert told[1].startswith("<Svm 'gpu0' 0 notifiers, SvmStats(batches=0")
    assert told[2].startswith("<Userptr 'amdgpu' 0 objects, UserptrStats(jobs=0")
    assert told[3].startswith("<Pinned 'pinned' 0 registrations, PinnedStats(hits=0")
    assert told[4].startswith("<RangeRetry 'gpusvm->notifier_lock' 1.0 s, RetryStats(begun=0")


def test_what_is_left_for_later_is_taken_once() -> None:
    left = deque(range(2000))
    threads = [Background(lambda: list(iter(lambda: take(left), None))) for _ in range(4)]
    assert sorted(one for thread in threads for one in thread.result()) == list(range(2000))


@pytest.mark.parametrize("blockable", [True, False])
def test_a_callback_that_may_not_wait_does_not(mm: pm.AddressSpace, blockable: bool) -> None:
    lock, done = pm.DriverLock("update"), threading.Event()
    update = pm.MmuNotifierRange(mm, 0, PAGE, pm.Event.CLEAR, blockable=blockable)
    with lock:
        callback = Background(invalidated, lock, update, done.set)
        if blockable:
            assert callback.stays()
        else:
            assert callback.result() is False
        assert not done.is_set()
    if blockable:
        assert callback.result() is True
    assert invalidated(lock, update, done.set)
    assert done.is_set()
    assert lock.owner is None


def test_the_lock_is_let_go_when_the_callback_fails(mm: pm.AddressSpace) -> None:
    lock = pm.DriverLock("update")

    def fails() -> None:
        raise ZeroDivisionError

    for blockable in (True, False):
        update = pm.MmuNotifierRange(mm, 0, PAGE, pm.Event.CLEAR, blockable=blockable)
        with pytest.raises(ZeroDivisionError):
            invalidated(lock, update, fails)
        assert lock.owner is None
