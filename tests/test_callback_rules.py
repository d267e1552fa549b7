"""What a callback must do and must not do, and what becomes of one that does otherwise."""

from __future__ import annotations

import errno
import logging
import mmap
import weakref
from collections.abc import Callable
from typing import Any

import pytest
from notifying import PAGE, SOMEWHERE, Recorder, interval, interval_recorder, invalidate
from seams import errno_of

import pymirror as pm


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
