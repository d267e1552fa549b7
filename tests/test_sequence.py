"""Sequence numbers: when what was seen is void, and who waits for whom."""

from __future__ import annotations

import errno
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from notifying import (
    PAGE,
    SOMEWHERE,
    interval,
    invalidate,
)
from seams import WAIT_S, Background, errno_of, points

import pymirror as pm


class TestSequence:
    def test_read_retry_tells_of_an_overlapping_invalidation(self, mm: pm.AddressSpace) -> None:
        sub = interval(mm, SOMEWHERE)
        seq = sub.read_begin()
        assert not sub.read_retry(seq)
        assert not sub.check_retry(seq)
        invalidate(mm, SOMEWHERE)
        assert sub.read_retry(seq)
        assert sub.check_retry(seq)
        again = sub.read_begin()
        assert again != seq
        assert not sub.read_retry(again)

    def test_it_is_void_from_the_start_of_the_invalidation(self, mm: pm.AddressSpace) -> None:
        sub = interval(mm, SOMEWHERE)
        seq = sub.read_begin()
        with mm.invalidate(SOMEWHERE, SOMEWHERE + PAGE):
            assert sub.read_retry(seq)

    def test_other_memory_does_not_move_it(self, mm: pm.AddressSpace) -> None:
        sub = interval(mm, SOMEWHERE)
        seq = sub.read_begin()
        with mm.invalidate(SOMEWHERE + PAGE, SOMEWHERE + 2 * PAGE):
            assert not sub.read_retry(seq)
            assert sub.read_begin(timeout=0.0) == seq
        assert not sub.read_retry(seq)

    def test_read_begin_waits_for_the_end_of_the_invalidation(self, mm: pm.AddressSpace) -> None:
        sub = interval(mm, SOMEWHERE)
        with mm.invalidate(SOMEWHERE, SOMEWHERE + PAGE):
            waiter = Background(sub.read_begin)
            assert waiter.stays()
        assert not sub.read_retry(waiter.result())

    def test_read_begin_waits_for_every_one_of_several(self, mm: pm.AddressSpace) -> None:
        sub = interval(mm, SOMEWHERE, 2)
        with mm.invalidate(SOMEWHERE, SOMEWHERE + PAGE):
            inner = mm.invalidate(SOMEWHERE + PAGE, SOMEWHERE + 2 * PAGE)
            inner.__enter__()
            waiter = Background(sub.read_begin)
            inner.__exit__(None, None, None)
            assert waiter.stays()
        assert not sub.read_retry(waiter.result())

    def test_read_begin_times_out(self, mm: pm.AddressSpace) -> None:
        sub = interval(mm, SOMEWHERE)
        with mm.invalidate(SOMEWHERE, SOMEWHERE + PAGE):
            began = time.monotonic()
            assert errno_of(sub.read_begin, timeout=0.12) == errno.ETIMEDOUT
            assert 0.1 < time.monotonic() - began < 2.0

    def test_a_notifier_made_during_an_invalidation_waits_for_it(self, mm: pm.AddressSpace) -> None:
        with mm.invalidate(SOMEWHERE, SOMEWHERE + PAGE):
            sub = interval(mm, SOMEWHERE)
            assert errno_of(sub.read_begin, timeout=0.0) == errno.ETIMEDOUT
        assert not sub.read_retry(sub.read_begin())

    def test_a_removed_notifier_always_says_retry(self, mm: pm.AddressSpace) -> None:
        sub = interval(mm, SOMEWHERE)
        seq = sub.read_begin()
        sub.remove()
        assert sub.read_retry(seq)
        assert errno_of(sub.read_begin) == errno.ESRCH

    def test_removal_wakes_a_waiter(self, mm: pm.AddressSpace) -> None:
        sub = interval(mm, SOMEWHERE)
        with mm.invalidate(SOMEWHERE, SOMEWHERE + PAGE):
            waiter = Background(sub.read_begin)
            assert waiter.stays()
            sub.remove()
            assert errno_of(waiter.result) == errno.ESRCH

    def test_the_sequence_moves_before_the_callback_runs(self, mm: pm.AddressSpace) -> None:
        seen = []
        sub = interval(
            mm,
            SOMEWHERE,
            invalidate=lambda sub, range, seq: (sub.set_seq(seq), seen.append(sub.read_retry(begun))),
        )
        begun = sub.read_begin()
        invalidate(mm, SOMEWHERE)
        assert seen == [True]

    def test_nobody_begins_between_the_native_step_and_the_callback(self, mm: pm.AddressSpace) -> None:
        sub = interval(mm, SOMEWHERE)
        with points("INVALIDATE_FENCED") as fenced:
            operation = Background(invalidate, mm, SOMEWHERE)
            fenced.wait()
            assert errno_of(sub.read_begin, timeout=0.0) == errno.ETIMEDOUT
            fenced.release()
            operation.result()
        assert sub.read_begin(timeout=1.0)


class TestCtrlC:
    """Every wait ends at Ctrl-C, in the time of one native slice."""

    def test_read_begin(self, mm: pm.AddressSpace) -> None:
        sub = interval(mm, SOMEWHERE)
        with mm.invalidate(SOMEWHERE, SOMEWHERE + PAGE):
            assert interrupted(sub.read_begin)

    def test_wait_until_valid(self, mm: pm.AddressSpace) -> None:
        end = SOMEWHERE + PAGE
        with pm.Mirror(mm) as mirror, mirror.range(SOMEWHERE, end) as rng, mm.invalidate(SOMEWHERE, end):
            assert interrupted(rng.wait_until_valid, timeout=None)

    def test_remove(self, mm: pm.AddressSpace) -> None:
        inside, go = threading.Event(), threading.Event()

        def slow(sub: pm.IntervalNotifier, range: pm.MmuNotifierRange, seq: int) -> bool:
            sub.set_seq(seq)
            inside.set()
            return go.wait(WAIT_S)

        sub = interval(mm, SOMEWHERE, invalidate=slow)
        operation = Background(invalidate, mm, SOMEWHERE)
        assert inside.wait(WAIT_S)
        assert interrupted(sub.remove)
        go.set()
        operation.result()
        sub.remove()


def interrupted(wait: Callable[..., object], **how: Any) -> bool:
    """Whether SIGINT, a moment after the wait began, ends it at once."""
    going, main = threading.Event(), threading.get_ident()

    def strike() -> float:
        assert going.wait(WAIT_S)
        time.sleep(0.1)
        signal.pthread_kill(main, signal.SIGINT)
        return time.monotonic()

    struck = Background(strike)
    try:
        going.set()
        wait(**how)
    except KeyboardInterrupt:
        return time.monotonic() - struck.result() < 1.0
    return False


def test_two_invalidations_at_once_each_answer_for_themselves(mm: pm.AddressSpace) -> None:
    """Callbacks of one notifier run in two threads; one of them forgets set_seq, and only it is reported."""
    both = threading.Barrier(2, timeout=WAIT_S)
    forgetful: list[int] = []

    def take(sub: pm.IntervalNotifier, range: pm.MmuNotifierRange, seq: int) -> bool:
        if both.wait() == 0:
            forgetful.append(seq)
        else:
            sub.set_seq(seq)
        both.wait()
        return True

    sub = interval(mm, SOMEWHERE, invalidate=take)
    for operation in [Background(invalidate, mm, SOMEWHERE) for _ in range(2)]:
        operation.result()
    assert [report.seq for report in mm.errors] == forgetful
    mm.errors.clear()
    sub.remove()
