"""The retry loop that the drivers share: fresh sequences, the lock, the deadline, and giving back."""

from __future__ import annotations

import errno
import mmap
from collections.abc import Iterator

import numpy as np
import pytest
from mirroring import FAULT, PAGE, WRITE, filled
from notifying import invalidate
from seams import Background, errno_of, points

import pymirror as pm
from pymirror.drivers.retry import RangeRetry
from pymirror.pfn import PfnArray

PAGES = 4


class Looper:
    def __init__(self, mm: pm.AddressSpace, timeout: float = 10.0) -> None:
        self.mm = mm
        self.lock = pm.DriverLock("looper->update")
        self.retry = RangeRetry(self.lock, timeout=timeout)
        self.device = pm.Device("d")
        self.buf = filled(mm, PAGES)
        self.end = self.buf.addr + self.buf.size
        self.sub = pm.IntervalNotifier(
            mm, self.buf.addr, self.buf.size, self.invalidate, update_lock=self.lock
        )
        self.seqs: list[int] = []

    def invalidate(self, sub: pm.IntervalNotifier, update: pm.MmuNotifierRange, seq: int) -> bool:
        with self.lock:
            sub.set_seq(seq)
            self.device.page_table.clear(update.start, update.end)
        return True

    def program(self, seq: int, pfns: PfnArray) -> bool:
        assert self.lock.held
        self.seqs.append(seq)
        return self.device.page_table.map(self.sub, seq, self.buf.addr, pfns)

    def fault(self, flags: int = FAULT) -> PfnArray:
        return self.retry.fault(self.sub, self.buf.addr, self.end, self.program, default_flags=flags)


@pytest.fixture
def looper(mm: pm.AddressSpace) -> Iterator[Looper]:
    made = Looper(mm)
    yield made
    made.sub.remove()


def test_it_programs_what_was_seen(looper: Looper) -> None:
    pfns = looper.fault(WRITE)
    assert ((pfns & pm.HMM_PFN_WRITE) != 0).all()
    assert looper.device.page_table.stats()["entries"] == PAGES
    assert (looper.retry.stats.begun, looper.retry.stats.done, looper.retry.stats.retries) == (1, 1, 0)


def test_a_change_while_it_looks_makes_it_look_again_with_a_fresh_sequence(looper: Looper) -> None:
    with points("WALK_AFTER_READ") as point:
        fault = Background(looper.fault)
        point.wait()
        looper.mm.madvise(looper.buf.addr, PAGE, mmap.MADV_DONTNEED)
        point.release()
        fault.result()
    assert looper.retry.stats.busy == 1
    assert looper.device.read(looper.mm, looper.buf.addr, 4) == bytes(4)


def test_a_change_before_the_lock_is_taken_makes_it_go_again(looper: Looper) -> None:
    changes = [lambda: invalidate(looper.mm, looper.buf.addr)] * 3
    seen: list[int] = []

    def look(seq: int) -> int:
        if changes:
            changes.pop()()
        seen.append(seq)
        return seq

    assert looper.retry.run(looper.sub, look, lambda seq, found: None) == seen[-1]
    assert len(seen) == 4
    assert seen == sorted(set(seen))
    assert looper.retry.stats.moved == 3


@pytest.mark.parametrize("refusal", [False, np.False_])
def test_a_program_that_refuses_is_called_again(looper: Looper, refusal: object) -> None:
    answers = [refusal, None]
    looper.retry.run(looper.sub, lambda seq: seq, lambda seq, seen: answers.pop(0))
    assert answers == []


def test_a_page_table_that_refuses_makes_it_go_again(looper: Looper) -> None:
    answers = [False, False, True]
    looper.retry.run(looper.sub, lambda seq: None, lambda seq, found: answers.pop(0))
    assert answers == []


def test_what_was_taken_is_given_back_before_the_next_round(looper: Looper) -> None:
    given: list[int] = []
    answers = [False, True]
    looper.retry.run(looper.sub, lambda seq: len(answers), lambda *_: answers.pop(0), undo=given.append)
    assert given == [2]

    def fails(seq: int, seen: int) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        looper.retry.run(looper.sub, lambda seq: 7, fails, undo=given.append)
    assert given == [2, 7]
    assert not looper.lock.held


def test_it_ends_at_the_deadline_when_an_invalidation_does_not(mm: pm.AddressSpace) -> None:
    looper = Looper(mm, timeout=0.05)
    with mm.invalidate(looper.buf.addr, looper.end), pytest.raises(pm.MirrorError) as caught:
        looper.fault()
    assert caught.value.errno == errno.EBUSY
    assert "for 0.05 s" in str(caught.value)
    assert looper.retry.stats.deadline == 1
    looper.sub.remove()


def test_it_ends_at_the_deadline_when_they_come_again_and_again(mm: pm.AddressSpace) -> None:
    looper = Looper(mm, timeout=0.05)
    with pytest.raises(pm.MirrorError) as caught:
        looper.retry.run(looper.sub, lambda seq: invalidate(mm, looper.buf.addr), lambda *_: None)
    assert caught.value.errno == errno.EBUSY
    assert looper.retry.stats.moved >= 1
    looper.sub.remove()


def test_a_time_out_of_0_is_one_round(mm: pm.AddressSpace) -> None:
    looper = Looper(mm, timeout=0)
    looper.fault()
    assert errno_of(
        looper.retry.run, looper.sub, lambda seq: invalidate(mm, looper.buf.addr), lambda *_: None
    ) == (errno.EBUSY)
    assert looper.retry.stats.moved == 1
    looper.sub.remove()


def test_other_errors_end_it_at_once(looper: Looper) -> None:
    looper.mm.mprotect(looper.buf.addr, PAGE, mmap.PROT_READ)
    assert errno_of(looper.fault, WRITE) == errno.EPERM
    assert (looper.retry.stats.begun, looper.retry.stats.done, looper.retry.stats.deadline) == (1, 0, 0)


def test_requests_of_each_page_stand_in_every_round(looper: Looper) -> None:
    fresh = looper.mm.mmap(PAGES * PAGE)
    sub = pm.IntervalNotifier(looper.mm, fresh.addr, fresh.size, looper.invalidate, update_lock=looper.lock)
    requests = np.array([FAULT, 0, WRITE, 0], np.uint64)
    answers = [False, True]
    found = looper.retry.fault(
        sub,
        fresh.addr,
        fresh.addr + fresh.size,
        lambda seq, pfns: answers.pop(0),
        pfns=requests,
        pfn_flags_mask=FAULT | WRITE,
    )
    assert ((found & pm.HMM_PFN_VALID) != 0).tolist() == [True, False, True, False]
    assert requests.tolist() == [FAULT, 0, WRITE, 0]
    sub.remove()


def test_a_notifier_of_another_lock_is_refused(looper: Looper) -> None:
    other = pm.IntervalNotifier(looper.mm, looper.buf.addr, PAGE, looper.invalidate)
    assert errno_of(looper.retry.run, other, lambda seq: None, lambda *_: None) == errno.EINVAL
    other.remove()
    assert errno_of(RangeRetry, looper.lock, timeout=-1) == errno.EINVAL


def test_what_makes_no_sense(looper: Looper) -> None:
    start = looper.buf.addr
    for interval in ((start + PAGE, start), (start, start), (start, start + 1)):
        assert errno_of(looper.retry.fault, looper.sub, *interval, looper.program) == errno.EINVAL
    for timeout in (-1.0, float("nan")):
        assert errno_of(RangeRetry, looper.lock, timeout=timeout) == errno.EINVAL


def test_it_cannot_be_waited_for_under_the_lock(looper: Looper) -> None:
    with looper.lock:
        assert errno_of(looper.fault) == errno.EDEADLK
