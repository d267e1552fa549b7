"""Address spaces, and operations on their memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter_ns

import numpy as np

import pymirror as pm
from benchmarks.floors import floor, timed
from benchmarks.memory import PAGE, expect, small_pages
from benchmarks.registry import Scale, Sides, benchmark


@benchmark("open-close", goal=None, unit="us")
@contextmanager
def open_close(scale: Scale) -> Iterator[Sides]:
    """AddressSpace() and close(); against opening and closing what one keeps open before it watches."""
    times = scale.count(50)
    with floor("open_close", times, work=times, per=times) as bare:

        def ours() -> float:
            start = perf_counter_ns()
            for _ in range(times):
                pm.AddressSpace().close()
            return (perf_counter_ns() - start) / times

        yield Sides(ours, bare)


@benchmark("munmap-notified", goal=None, unit="us", rounds=21)
@contextmanager
def munmap_notified(scale: Scale) -> Iterator[Sides]:
    """mm.munmap of 64 touched, watched pages under an interval notifier; against a bare munmap."""
    size, times = 64 * PAGE, scale.count(100)
    called = []

    def invalidate(sub: pm.IntervalNotifier, update: pm.MmuNotifierRange, cur_seq: int) -> bool:
        sub.set_seq(cur_seq)
        called.append(update.start)
        return True

    with floor("munmap", size, times, work=times, per=times) as bare, pm.AddressSpace() as mm:

        def one() -> int:
            region = mm.mmap(size)
            np.frombuffer(region, np.uint8)[:] = 1
            sub = pm.IntervalNotifier(mm, region.addr, size, invalidate)
            start = perf_counter_ns()
            mm.munmap(region.addr, size)
            ns = perf_counter_ns() - start
            sub.remove()
            return ns

        def ours() -> float:
            called.clear()
            ns = sum(one() for _ in range(times))
            expect(len(called) == times, f"{len(called)} callbacks for {times} munmaps")
            return ns / times

        yield Sides(ours, bare)


@benchmark("watched-madvise", goal=1.15, unit="us", rounds=60, setups=3)
@contextmanager
def watched_madvise(scale: Scale) -> Iterator[Sides]:
    """MADV_DONTNEED and munmap, foreign, of 64 watched pages each; against a bare C reader of the events."""
    times = scale.count(100)
    with floor("event_reader", times, work=times, per=times) as bare, pm.AddressSpace() as mm:

        def ours() -> float:
            memory = small_pages(mm, times * 64 * PAGE)
            memory.bytes[:] = 1
            before = mm.stats()["events"]
            with pm.Mirror(mm) as mirror, mirror.range(memory.start, memory.end):
                ns = timed().timed_removes(memory.start, times)
                mm.sync()
            after = mm.stats()["events"]
            seen = [after[event] - before[event] for event in ("CLEAR", "UNMAP")]
            expect(seen == [times, times], f"{seen} events for {times} calls of each kind")
            mm.munmap(memory.region.addr, memory.region.size)
            return ns / times

        yield Sides(ours, bare)
