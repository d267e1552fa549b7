"""Notifiers: who is told of an invalidation, in which order and thread, and the end."""

from __future__ import annotations

import errno
import gc
import mmap
import os
import threading
from typing import Any

import pytest
from notifying import (
    PAGE,
    SOMEWHERE,
    WHOLE,
    Recorder,
    interval,
    interval_recorder,
    invalidate,
    keeps_the_rules,
)
from seams import WAIT_S, Background, errno_of

import pymirror as pm


class TestDelivery:
    def test_a_notifier_is_told_before_the_change_and_after_it(self, mm: pm.AddressSpace) -> None:
        buf = mm.mmap(4 * PAGE)
        present = []

        class Looker(pm.MmuNotifier):
            def invalidate_range_start(self, range: pm.MmuNotifierRange) -> None:
                present.append((range.event, range.guarantee, bytes(buf)[0]))

            def invalidate_range_end(self, range: pm.MmuNotifierRange) -> None:
                present.append((range.event, range.guarantee, bytes(buf)[0]))

        memoryview(buf).cast("B")[0] = 7
        looker = Looker(mm)
        mm.madvise(buf.addr, buf.size, mmap.MADV_DONTNEED)
        assert present == [(pm.Event.CLEAR, "before", 7), (pm.Event.CLEAR, "before", 0)]
        looker.unregister()

    def test_order_is_intervals_by_address_two_pass_first_then_finishes_then_whole_mm(
        self, mm: pm.AddressSpace
    ) -> None:
        log: list[Any] = []

        def one_pass(sub: pm.IntervalNotifier, range: pm.MmuNotifierRange, cur_seq: int) -> bool:
            sub.set_seq(cur_seq)
            log.append(("one", sub.start))
            return True

        def first(sub: pm.IntervalNotifier, range: pm.MmuNotifierRange, cur_seq: int) -> object:
            sub.set_seq(cur_seq)
            log.append(("first", sub.start))
            return sub.start

        whole = Recorder(mm, log)
        later = Recorder(mm, log, "later")
        for at in (3, 1):
            interval(mm, SOMEWHERE + at * PAGE, invalidate=one_pass)
        for at in (2, 0):
            pm.IntervalNotifier(
                mm,
                SOMEWHERE + at * PAGE,
                PAGE,
                invalidate_start=first,
                invalidate_finish=lambda finish: log.append(("finish", finish)),
            )
        with mm.invalidate(SOMEWHERE, SOMEWHERE + 4 * PAGE):
            log.append("change")
        where = (SOMEWHERE, SOMEWHERE + 4 * PAGE)
        assert log == [
            ("first", SOMEWHERE),
            ("one", SOMEWHERE + PAGE),
            ("first", SOMEWHERE + 2 * PAGE),
            ("one", SOMEWHERE + 3 * PAGE),
            ("finish", SOMEWHERE),
            ("finish", SOMEWHERE + 2 * PAGE),
            ("whole", "start", "CLEAR", *where),
            ("later", "start", "CLEAR", *where),
            "change",
            ("whole", "end", "CLEAR", *where),
            ("later", "end", "CLEAR", *where),
        ]
        whole.unregister()
        later.unregister()

    def test_two_pass_notifier_that_returns_none_is_done_in_one(self, mm: pm.AddressSpace) -> None:
        finished: list[Any] = []

        class Sometimes(pm.IntervalNotifier):
            def invalidate_start(self, range: pm.MmuNotifierRange, cur_seq: int) -> object:
                self.set_seq(cur_seq)
                return range.start if range.start == SOMEWHERE else None

            def invalidate_finish(self, finish: object) -> None:
                finished.append(finish)

        Sometimes(mm, SOMEWHERE, 2 * PAGE)
        invalidate(mm, SOMEWHERE)
        invalidate(mm, SOMEWHERE + PAGE)
        assert finished == [SOMEWHERE]
        assert not mm.errors

    @pytest.mark.parametrize(
        ("start", "pages", "told"),
        [
            (-1, 1, False),
            (-1, 2, True),
            (0, 1, True),
            (1, 1, True),
            (1, 5, True),
            (2, 1, False),
            (-4, 20, True),
        ],
    )
    def test_only_overlapping_intervals_are_told(
        self, mm: pm.AddressSpace, start: int, pages: int, told: bool
    ) -> None:
        with interval_recorder(mm, SOMEWHERE, 2) as (_, seen):
            invalidate(mm, SOMEWHERE + start * PAGE, pages)
            assert bool(seen) is told

    def test_an_interval_over_the_whole_mm_is_told_of_all(self, mm: pm.AddressSpace) -> None:
        seen = []
        sub = pm.IntervalNotifier(
            mm, 0, WHOLE, lambda sub, range, seq: (sub.set_seq(seq), seen.append(range.start))
        )
        assert sub.last == WHOLE - 1
        invalidate(mm, 0)
        invalidate(mm, SOMEWHERE)
        assert seen == [0, SOMEWHERE]

    def test_the_range_carries_what_the_invalidator_said(self, mm: pm.AddressSpace) -> None:
        owner = object()
        with interval_recorder(mm, SOMEWHERE) as (_, seen):
            invalidate(mm, SOMEWHERE, event=pm.Event.MIGRATE, owner=owner, guarantee=pm.Guarantee.DETECTED)
        (range,) = seen
        assert range.mm is mm
        assert (range.event, range.owner, range.guarantee) == (pm.Event.MIGRATE, owner, "detected")
        assert range.blockable
        assert range.seq % 2 == 1

    def test_callbacks_run_in_the_thread_of_the_operation(self, mm: pm.AddressSpace) -> None:
        threads = []
        interval(
            mm,
            SOMEWHERE,
            invalidate=lambda sub, range, seq: (sub.set_seq(seq), threads.append(threading.get_ident())),
        )
        invalidate(mm, SOMEWHERE)
        assert threads == [threading.get_ident()]

    def test_many_overlapping_intervals_are_all_told_in_order(self, mm: pm.AddressSpace) -> None:
        told: list[int] = []

        def take(sub: pm.IntervalNotifier, range: pm.MmuNotifierRange, seq: int) -> bool:
            sub.set_seq(seq)
            told.append(sub.start)
            return True

        starts = [SOMEWHERE + i * 3 * PAGE for i in range(1000)]
        subs = [interval(mm, at, invalidate=take) for at in reversed(starts)]
        invalidate(mm, SOMEWHERE, 3000)
        assert told == starts
        for sub in subs:
            sub.remove()


class TestNotBlockable:
    def test_false_is_eagain_and_whole_mm_notifiers_are_not_asked(self, mm: pm.AddressSpace) -> None:
        whole = Recorder(mm)
        interval(mm, SOMEWHERE, invalidate=lambda sub, range, seq: False)
        assert errno_of(invalidate, mm, SOMEWHERE, blockable=False) == errno.EAGAIN
        assert whole.log == []
        assert not mm.errors
        whole.unregister()

    def test_first_passes_that_ran_get_their_finish(self, mm: pm.AddressSpace) -> None:
        finished: list[Any] = []

        def first(sub: pm.IntervalNotifier, range: pm.MmuNotifierRange, seq: int) -> object:
            sub.set_seq(seq)
            return "begun"

        pm.IntervalNotifier(mm, SOMEWHERE, PAGE, invalidate_start=first, invalidate_finish=finished.append)
        interval(mm, SOMEWHERE + PAGE, invalidate=lambda sub, range, seq: False)
        assert errno_of(invalidate, mm, SOMEWHERE, 2, blockable=False) == errno.EAGAIN
        assert finished == ["begun"]

    @pytest.mark.parametrize("answer", [False, -errno.EAGAIN])
    def test_whole_mm_notifiers_that_started_get_their_end(self, mm: pm.AddressSpace, answer: Any) -> None:
        log: list[Any] = []

        class Refuses(Recorder):
            def invalidate_range_start(self, range: pm.MmuNotifierRange) -> Any:
                self.log.append((self.name, "refused"))
                return answer

        notifiers = [Recorder(mm, log, "a"), Refuses(mm, log, "b"), Recorder(mm, log, "c")]
        assert errno_of(invalidate, mm, SOMEWHERE, blockable=False) == errno.EAGAIN
        assert [(name, what) for name, what, *_ in log] == [
            ("a", "start"),
            ("b", "refused"),
            ("c", "start"),
            ("a", "end"),
            ("c", "end"),
        ]
        for notifier in notifiers:
            notifier.unregister()

    def test_the_refused_invalidation_is_over(self, mm: pm.AddressSpace) -> None:
        sub = interval(mm, SOMEWHERE, invalidate=lambda sub, range, seq: False)
        assert errno_of(invalidate, mm, SOMEWHERE, blockable=False) == errno.EAGAIN
        seq = sub.read_begin(timeout=1.0)
        assert not sub.read_retry(seq)


class TestRemoval:
    def test_remove_and_unregister_are_idempotent(self, mm: pm.AddressSpace) -> None:
        sub, whole = interval(mm, SOMEWHERE), Recorder(mm)
        for _ in range(2):
            sub.remove()
            whole.unregister()
        invalidate(mm, SOMEWHERE)
        assert whole.log == []
        assert mm.stats()["subs"] == 0

    def test_remove_waits_for_a_callback_in_another_thread(self, mm: pm.AddressSpace) -> None:
        inside, go = threading.Event(), threading.Event()

        def slow(sub: pm.IntervalNotifier, range: pm.MmuNotifierRange, seq: int) -> bool:
            sub.set_seq(seq)
            inside.set()
            assert go.wait(WAIT_S)
            return True

        sub = interval(mm, SOMEWHERE, invalidate=slow)
        operation = Background(invalidate, mm, SOMEWHERE)
        assert inside.wait(WAIT_S)
        assert errno_of(sub.remove, timeout=0.05) == errno.ETIMEDOUT
        removal = Background(sub.remove)
        assert removal.stays()
        go.set()
        removal.result()
        operation.result()
        assert not mm.errors

    def test_remove_waits_for_the_second_pass_too(self, mm: pm.AddressSpace) -> None:
        inside, go = threading.Event(), threading.Event()
        log: list[str] = []

        def first(sub: pm.IntervalNotifier, range: pm.MmuNotifierRange, seq: int) -> object:
            sub.set_seq(seq)
            return "begun"

        def slow(sub: pm.IntervalNotifier, range: pm.MmuNotifierRange, seq: int) -> bool:
            sub.set_seq(seq)
            inside.set()
            assert go.wait(WAIT_S)
            return True

        pair = pm.IntervalNotifier(
            mm,
            SOMEWHERE,
            PAGE,
            invalidate_start=first,
            invalidate_finish=lambda finish: log.append("finished"),
        )
        other = interval(mm, SOMEWHERE + PAGE, invalidate=slow)
        operation = Background(invalidate, mm, SOMEWHERE, 2)
        assert inside.wait(WAIT_S)
        removal = Background(lambda: (pair.remove(), log.append("removed")))
        assert removal.stays()
        go.set()
        removal.result()
        operation.result()
        assert log == ["finished", "removed"]
        other.remove()

    def test_no_end_callback_after_unregister(self, mm: pm.AddressSpace) -> None:
        whole = Recorder(mm)
        with mm.invalidate(SOMEWHERE, SOMEWHERE + PAGE):
            Background(whole.unregister).result()
        assert [entry[1] for entry in whole.log] == ["start"]

    def test_a_callback_may_not_remove_itself(self, mm: pm.AddressSpace) -> None:
        got = []
        sub = interval(
            mm,
            SOMEWHERE,
            invalidate=lambda sub, range, seq: (sub.set_seq(seq), got.append(errno_of(sub.remove))),
        )
        invalidate(mm, SOMEWHERE)
        assert got == [errno.EDEADLK]
        sub.remove()

    def test_registered_notifiers_live_without_the_driver(self, mm: pm.AddressSpace) -> None:
        seen: list[int] = []
        interval(mm, SOMEWHERE, invalidate=lambda sub, range, seq: (sub.set_seq(seq), seen.append(seq)))
        gc.collect()
        invalidate(mm, SOMEWHERE)
        assert len(seen) == 1


class TestWrongUse:
    @pytest.mark.parametrize(
        ("start", "length"), [(0, 0), (PAGE, -1), (-PAGE, PAGE), (WHOLE - PAGE, 2 * PAGE), (1, WHOLE)]
    )
    def test_bad_intervals(self, mm: pm.AddressSpace, start: int, length: int) -> None:
        assert errno_of(pm.IntervalNotifier, mm, start, length, keeps_the_rules) == errno.EOVERFLOW
        assert mm.notifiers.stats()["interval_notifiers"] == 0

    def test_bad_callbacks(self, mm: pm.AddressSpace) -> None:
        for bad in ({}, {"invalidate_start": keeps_the_rules}, {"invalidate_finish": print}):
            assert errno_of(pm.IntervalNotifier, mm, SOMEWHERE, PAGE, **bad) == errno.EINVAL

    def test_a_closed_mm(self) -> None:
        mm = pm.AddressSpace()
        sub, whole = interval(mm, SOMEWHERE), Recorder(mm)
        seq = sub.read_begin()
        mm.close()
        assert errno_of(interval, mm, SOMEWHERE) == errno.ESRCH
        assert errno_of(Recorder, mm) == errno.ESRCH
        assert errno_of(sub.read_begin) == errno.ESRCH
        assert sub.read_retry(seq)
        sub.remove()
        whole.unregister()

    def test_a_forked_child(self, mm: pm.AddressSpace) -> None:
        sub, whole = interval(mm, SOMEWHERE), Recorder(mm)
        seq = sub.read_begin()
        child = os.fork()
        if child == 0:
            good = (
                errno_of(interval, mm, SOMEWHERE) == errno.ESRCH
                and errno_of(sub.read_begin) == errno.ESRCH
                and sub.read_retry(seq)
                and errno_of(sub.remove) == 0
                and errno_of(whole.unregister) == 0
            )
            os._exit(0 if good else 1)
        assert os.waitpid(child, 0)[1] == 0
        whole.unregister()
        sub.remove()


class TestRelease:
    def test_closing_tells_intervals_of_release_then_whole_mm_notifiers(self) -> None:
        mm = pm.AddressSpace()
        log: list[Any] = []

        def take(sub: pm.IntervalNotifier, range: pm.MmuNotifierRange, seq: int) -> bool:
            sub.set_seq(seq)
            log.append((range.event.name, range.start, range.end))
            return True

        interval(mm, SOMEWHERE, invalidate=take)
        Recorder(mm, log)
        gone = Recorder(mm, log, "gone")
        gone.unregister()
        mm.close()
        mm.close()
        assert log == [("RELEASE", 0, WHOLE), ("whole", "release")]
        assert not mm.errors

    def test_a_release_that_raises_is_reported(self) -> None:
        class Broken(pm.MmuNotifier):
            def release(self) -> None:
                raise ValueError("broken")

        mm = pm.AddressSpace()
        Broken(mm)
        after = Recorder(mm)
        mm.close()
        assert after.log == [("whole", "release")]
        assert [report.callback for report in mm.errors] == ["release"]
