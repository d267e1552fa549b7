"""Notifiers: who is told of an invalidation, in which order and thread; sequence numbers; broken rules."""

from __future__ import annotations

import errno
import gc
import logging
import mmap
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from seams import WAIT_S, Background, errno_of, foreign, needs, points

import pymirror as pm

PAGE = 4096
WHOLE = 1 << 64
SOMEWHERE = 0x1000_0000_0000


class Recorder(pm.MmuNotifier):
    """A whole-mm notifier that writes down what it is told."""

    def __init__(self, mm: pm.AddressSpace, log: list[Any] | None = None, name: str = "whole") -> None:
        self.log = [] if log is None else log
        self.name = name
        super().__init__(mm)

    def invalidate_range_start(self, range: pm.MmuNotifierRange) -> Any:
        self.log.append((self.name, "start", range.event.name, range.start, range.end))

    def invalidate_range_end(self, range: pm.MmuNotifierRange) -> None:
        self.log.append((self.name, "end", range.event.name, range.start, range.end))

    def release(self) -> None:
        self.log.append((self.name, "release"))


def keeps_the_rules(sub: pm.IntervalNotifier, range: pm.MmuNotifierRange, cur_seq: int) -> bool:
    sub.set_seq(cur_seq)
    return True


def interval(
    mm: pm.AddressSpace, start: int, pages: int = 1, invalidate: Callable[..., Any] = keeps_the_rules
) -> pm.IntervalNotifier:
    return pm.IntervalNotifier(mm, start, pages * PAGE, invalidate)


def invalidate(mm: pm.AddressSpace, start: int, pages: int = 1, **how: Any) -> None:
    with mm.invalidate(start, start + pages * PAGE, **how):
        pass


@contextmanager
def interval_recorder(
    mm: pm.AddressSpace, start: int, pages: int = 1
) -> Iterator[tuple[pm.IntervalNotifier, list[pm.MmuNotifierRange]]]:
    seen: list[pm.MmuNotifierRange] = []

    def take(sub: pm.IntervalNotifier, range: pm.MmuNotifierRange, cur_seq: int) -> bool:
        sub.set_seq(cur_seq)
        seen.append(range)
        return True

    sub = interval(mm, start, pages, take)
    yield sub, seen
    sub.remove()


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


class TestBrokenRules:
    def test_a_callback_that_raises_is_reported_and_stops_nobody(
        self, mm: pm.AddressSpace, caplog: pytest.LogCaptureFixture
    ) -> None:
        buf = mm.mmap(2 * PAGE)
        memoryview(buf).cast("B")[0] = 1
        whole = Recorder(mm)

        def broken(sub: pm.IntervalNotifier, range: pm.MmuNotifierRange, seq: int) -> bool:
            raise ValueError("the driver is broken")

        interval(mm, buf.addr, 1, broken)
        with interval_recorder(mm, buf.addr + PAGE) as (_, seen), caplog.at_level(logging.ERROR, "pymirror"):
            mm.madvise(buf.addr, buf.size, mmap.MADV_DONTNEED)
            assert len(seen) == 1
        assert bytes(buf)[0] == 0
        assert [entry[1] for entry in whole.log] == ["start", "end"]
        (report,) = mm.errors
        assert isinstance(report.exception, ValueError)
        assert (report.event, report.start, report.end) == (pm.Event.CLEAR, buf.addr, buf.addr + buf.size)
        assert "in broken" in report.traceback
        assert "IntervalNotifier" in report.notifier
        assert [record.name for record in caplog.records] == ["pymirror"]
        assert "the driver is broken" in caplog.text
        assert mm.notifiers.stats()["callback_errors"] == 1
        whole.unregister()

    def test_a_forgotten_set_seq_is_reported(self, mm: pm.AddressSpace) -> None:
        interval(mm, SOMEWHERE, invalidate=lambda sub, range, seq: True)
        invalidate(mm, SOMEWHERE)
        (report,) = mm.errors
        assert report.exception.errno == errno.EINVAL
        assert "set_seq" in str(report.exception)

    def test_set_seq_may_come_in_the_second_pass(self, mm: pm.AddressSpace) -> None:
        class Late(pm.IntervalNotifier):
            def invalidate_start(self, range: pm.MmuNotifierRange, cur_seq: int) -> object:
                return cur_seq

            def invalidate_finish(self, finish: Any) -> None:
                if not forget:
                    self.set_seq(finish)

        forget = False
        Late(mm, SOMEWHERE, PAGE)
        invalidate(mm, SOMEWHERE)
        assert not mm.errors
        forget = True
        invalidate(mm, SOMEWHERE)
        assert [report.exception.errno for report in mm.errors] == [errno.EINVAL]

    def test_set_seq_with_another_number_or_elsewhere_is_einval(self, mm: pm.AddressSpace) -> None:
        other = interval(mm, SOMEWHERE + 8 * PAGE)
        seen = []

        def take(sub: pm.IntervalNotifier, range: pm.MmuNotifierRange, seq: int) -> bool:
            seen.append(errno_of(sub.set_seq, seq + 2))
            seen.append(errno_of(other.set_seq, seq))
            sub.set_seq(seq)
            return True

        sub = interval(mm, SOMEWHERE, invalidate=take)
        assert errno_of(sub.set_seq, 1) == errno.EINVAL
        invalidate(mm, SOMEWHERE)
        assert seen == [errno.EINVAL, errno.EINVAL]
        assert not mm.errors

    @pytest.mark.parametrize("whole", [False, True])
    def test_a_refusal_of_a_blockable_range_is_reported(self, mm: pm.AddressSpace, whole: bool) -> None:
        class Refuses(pm.MmuNotifier):
            def invalidate_range_start(self, range: pm.MmuNotifierRange) -> int:
                return -errno.EAGAIN

        if whole:
            Refuses(mm)
        else:
            interval(mm, SOMEWHERE, invalidate=lambda sub, range, seq: False)
        invalidate(mm, SOMEWHERE)
        assert [report.exception.errno for report in mm.errors] == [errno.EAGAIN]

    def test_reports_keep_no_frames_alive(self, mm: pm.AddressSpace) -> None:
        class Thing:
            pass

        gone: list[weakref.ref[Thing]] = []

        def broken(sub: pm.IntervalNotifier, range: pm.MmuNotifierRange, seq: int) -> bool:
            thing = Thing()
            gone.append(weakref.ref(thing))
            raise ValueError

        interval(mm, SOMEWHERE, invalidate=broken)
        invalidate(mm, SOMEWHERE)
        assert gone[0]() is None

    def test_ctrl_c_in_a_callback_reaches_the_caller_after_all_have_run(self, mm: pm.AddressSpace) -> None:
        def interrupted(sub: pm.IntervalNotifier, range: pm.MmuNotifierRange, seq: int) -> bool:
            raise KeyboardInterrupt

        bad = interval(mm, SOMEWHERE, invalidate=interrupted)
        with interval_recorder(mm, SOMEWHERE + PAGE) as (sub, seen):
            with pytest.raises(KeyboardInterrupt):
                invalidate(mm, SOMEWHERE, 2)
            assert len(seen) == 1
            assert not sub.read_retry(sub.read_begin(timeout=1.0))
        bad.remove()

    def test_ctrl_c_in_a_whole_mm_callback_leaves_starts_and_ends_paired(self, mm: pm.AddressSpace) -> None:
        class Interrupted(pm.MmuNotifier):
            def invalidate_range_start(self, range: pm.MmuNotifierRange) -> None:
                raise KeyboardInterrupt

        whole = Recorder(mm)
        bad = Interrupted(mm)
        with pytest.raises(KeyboardInterrupt):
            invalidate(mm, SOMEWHERE)
        assert [entry[1] for entry in whole.log] == ["start", "end"]
        bad.unregister()
        whole.unregister()


def forbidden_in_callbacks(
    mm: pm.AddressSpace, mirror: pm.Mirror, rng: pm.Range, sub: pm.IntervalNotifier
) -> dict[str, Callable[[], object]]:
    device = pm.Device("other")
    return {
        "mmap": lambda: mm.mmap(PAGE),
        "munmap": lambda: mm.munmap(rng.start, PAGE),
        "invalidate": lambda: invalidate(mm, rng.start),
        "sync": lambda: mm.sync(),
        "close": lambda: mm.close(),
        "read_lock": lambda: mm.read_lock().__enter__(),
        "MmuNotifier": lambda: pm.MmuNotifier(mm),
        "Mirror": lambda: pm.Mirror(mm),
        "IntervalNotifier": lambda: interval(mm, rng.start),
        "remove": sub.remove,
        "unregister": mirror.unregister,
        "read_begin": sub.read_begin,
        "range": lambda: mirror.range(rng.start, rng.end),
        "register": rng.register,
        "range.unregister": rng.unregister,
        "wait_until_valid": rng.wait_until_valid,
        "snapshot": rng.snapshot,
        "fault": rng.fault,
        "hmm_range_fault": lambda: pm.hmm_range_fault(sub, rng.start, rng.end, rng.pfns, seq=1),
        "map": lambda: device.page_table.map(rng, rng.seq),
        "device.read": lambda: device.read(mm, rng.start, 1),
        "device.write": lambda: device.write(mm, rng.start, b"x"),
    }


class TestWhatACallbackMayCall:
    def test_all_else_is_edeadlk(self, mm: pm.AddressSpace) -> None:
        buf = mm.mmap(PAGE)
        mirror = pm.Mirror(mm)
        rng = mirror.range(buf.addr, buf.addr + PAGE)
        rng.register()
        got: dict[str, int] = {}

        def take(sub: pm.IntervalNotifier, range: pm.MmuNotifierRange, seq: int) -> bool:
            sub.set_seq(seq)
            for name, call in forbidden_in_callbacks(mm, mirror, rng, sub).items():
                got[name] = errno_of(call)
            return True

        sub = interval(mm, buf.addr, 1, take)
        invalidate(mm, buf.addr)
        assert got
        assert got == dict.fromkeys(got, errno.EDEADLK)
        assert not mm.errors
        assert not mm.closed
        assert bytes(buf) == bytes(PAGE)
        sub.remove()
        rng.unregister()
        mirror.unregister()

    def test_what_it_may_call_works(self, mm: pm.AddressSpace) -> None:
        buf = mm.mmap(PAGE)
        device = pm.Device("d")
        with pm.Mirror(mm) as mirror, mirror.range(buf.addr, buf.addr + PAGE) as rng:
            seq = rng.seq
            seen: list[Any] = []

            def take(sub: pm.IntervalNotifier, range: pm.MmuNotifierRange, cur: int) -> bool:
                sub.set_seq(cur)
                seen.extend([sub.read_retry(seq), sub.check_retry(seq), rng.valid])
                seen.append(device.page_table.clear(range.start, range.end))
                seen.append(int(device.page_table.entries(rng.start, rng.end)[0]))
                assert mm.dump()
                assert mm.stats()
                return True

            interval(mm, buf.addr, 1, take)
            invalidate(mm, buf.addr)
            assert seen == [True, True, False, 0, 0]
            assert not mm.errors

    def test_remove_and_waits_under_a_driver_lock_are_edeadlk(self, mm: pm.AddressSpace) -> None:
        mirror = pm.Mirror(mm)
        sub = interval(mm, SOMEWHERE)
        with mirror.lock:
            assert errno_of(sub.remove) == errno.EDEADLK
            assert errno_of(sub.read_begin) == errno.EDEADLK
            assert errno_of(mirror.unregister) == errno.EDEADLK
        sub.remove()
        mirror.unregister()


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


def watched_buffer(mm: pm.AddressSpace, pages: int = 4) -> pm.Region:
    needs("uffd_events")
    buf = mm.mmap(pages * PAGE)
    memoryview(buf).cast("B")[:] = b"\1" * buf.size
    return buf


class TestDispatcher:
    def test_a_foreign_change_is_delivered_afterwards_on_the_dispatcher(self, mm: pm.AddressSpace) -> None:
        buf = watched_buffer(mm)
        threads = []

        class Whole(Recorder):
            def invalidate_range_start(self, range: pm.MmuNotifierRange) -> Any:
                threads.append((threading.current_thread().name, threading.current_thread().daemon))
                return super().invalidate_range_start(range)

        whole = Whole(mm)
        with interval_recorder(mm, buf.addr, 4) as (sub, seen):
            seq = sub.read_begin()
            foreign.madvise(buf.addr, PAGE, mmap.MADV_DONTNEED)
            mm.sync()
            assert sub.read_retry(seq)
            (range,) = seen
            assert (range.start, range.end) == (buf.addr, buf.addr + PAGE)
            assert range.event == pm.Event.CLEAR
            assert [entry[1] for entry in whole.log] == ["start", "end"]
        assert threads == [("pymirror-dispatch", True)]
        whole.unregister()

    def test_events_arrive_in_order(self, mm: pm.AddressSpace) -> None:
        buf = watched_buffer(mm, 64)
        with interval_recorder(mm, buf.addr, 64) as (_, seen):
            for page in range(64):
                foreign.madvise(buf.addr + page * PAGE, PAGE, mmap.MADV_DONTNEED)
            mm.sync()
        assert [range.start for range in seen] == [buf.addr + page * PAGE for page in range(64)]

    def test_it_survives_a_broken_delivery(
        self, mm: pm.AddressSpace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        buf = watched_buffer(mm)
        with interval_recorder(mm, buf.addr, 4) as (_, seen):
            with monkeypatch.context() as patch:
                patch.setattr(pm.notifier.NotifierSet, "deliver_event", lambda self, event: 1 / 0)
                foreign.madvise(buf.addr, PAGE, mmap.MADV_DONTNEED)
                mm.sync()
            assert "ZeroDivisionError" in caplog.text
            foreign.madvise(buf.addr + PAGE, PAGE, mmap.MADV_DONTNEED)
            mm.sync()
            assert [range.start for range in seen] == [buf.addr + PAGE]

    def test_an_overflow_stands_for_everything(self) -> None:
        with pm.AddressSpace(queue_length=2) as mm:
            buf = watched_buffer(mm, 16)
            inside, go = threading.Event(), threading.Event()
            seen: list[pm.MmuNotifierRange] = []

            def slow(sub: pm.IntervalNotifier, range: pm.MmuNotifierRange, seq: int) -> bool:
                sub.set_seq(seq)
                seen.append(range)
                inside.set()
                assert go.wait(WAIT_S)
                return True

            interval(mm, buf.addr, 1, slow)
            mm.watch(buf.addr, buf.addr + buf.size)
            foreign.madvise(buf.addr, PAGE, mmap.MADV_DONTNEED)
            assert inside.wait(WAIT_S)
            for page in range(1, 16):
                foreign.madvise(buf.addr + page * PAGE, PAGE, mmap.MADV_DONTNEED)
            go.set()
            mm.sync()
            assert [(range.overflow, range.start, range.end) for range in seen] == [
                (False, buf.addr, buf.addr + PAGE),
                (True, 0, WHOLE),
            ]

    def test_it_ends_with_the_mm_within_a_second(self) -> None:
        mm = pm.AddressSpace()
        interval(mm, SOMEWHERE)
        (thread,) = [one for one in threading.enumerate() if one.name == "pymirror-dispatch"]
        began = time.monotonic()
        mm.close()
        thread.join(1.0)
        assert not thread.is_alive()
        assert time.monotonic() - began < 1.0

    def test_it_does_not_keep_the_mm_alive(self) -> None:
        mm = pm.AddressSpace()
        interval(mm, SOMEWHERE)
        (thread,) = [one for one in threading.enumerate() if one.name == "pymirror-dispatch"]
        gone = weakref.ref(mm)
        del mm
        with pytest.warns(ResourceWarning):
            gc.collect()
        assert gone() is None
        thread.join(2.0)
        assert not thread.is_alive()

    def test_the_history_remembers_the_last_invalidations(self, mm: pm.AddressSpace) -> None:
        with interval_recorder(mm, SOMEWHERE) as (_, seen):
            invalidate(mm, SOMEWHERE, event=pm.Event.PROTECTION_VMA)
        found = mm.notifiers.invalidation(seen[0].seq)
        assert found is not None
        assert (found.event, found.start, found.guarantee) == (pm.Event.PROTECTION_VMA, SOMEWHERE, "before")
        for _ in range(300):
            invalidate(mm, SOMEWHERE)
        assert mm.notifiers.invalidation(seen[0].seq) is None
        assert len(mm.notifiers.history()) == 256
