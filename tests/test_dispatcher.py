"""The dispatcher: callbacks for what the kernel reports, and the history of invalidations."""

from __future__ import annotations

import gc
import mmap
import threading
import time
import weakref
from typing import Any

import pytest
from notifying import PAGE, SOMEWHERE, WHOLE, Recorder, interval, interval_recorder, invalidate
from seams import WAIT_S, foreign, needs

import pymirror as pm


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
