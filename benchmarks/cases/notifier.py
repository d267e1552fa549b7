"""Interval notifiers, many and few. The floor of these is pymirror itself with a thousand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from time import perf_counter_ns

import numpy as np

import pymirror as pm
from benchmarks.memory import PAGE, expect
from benchmarks.registry import Scale, Sides, benchmark

FEW, MANY = 1_000, 1_000_000


class Crowd:
    """An address space with an interval notifier on every other page of a reservation."""

    def __init__(self, mm: pm.AddressSpace, count: int) -> None:
        self.mm = mm
        self.region = mm.mmap(2 * count * PAGE)
        self.called = 0
        self.subs = [self.insert(self.page(i)) for i in range(count)]
        order = np.random.default_rng(1).permutation(count)
        self.order = [self.page(int(i)) for i in order[:1000]]

    def page(self, i: int) -> int:
        return self.region.addr + 2 * i * PAGE

    def insert(self, addr: int) -> pm.IntervalNotifier:
        return pm.IntervalNotifier(self.mm, addr, PAGE, self.invalidate)

    def invalidate(self, sub: pm.IntervalNotifier, update: pm.MmuNotifierRange, cur_seq: int) -> bool:
        sub.set_seq(cur_seq)
        self.called += 1
        return True


@contextmanager
def crowds(scale: Scale) -> Iterator[tuple[Crowd, Crowd]]:
    with pm.AddressSpace() as one, pm.AddressSpace() as other:
        yield Crowd(one, scale.count(MANY)), Crowd(other, scale.count(FEW))


def both(crowds: tuple[Crowd, Crowd], work: Callable[[Crowd], float]) -> AbstractContextManager[Sides]:
    """The same work in two address spaces: as ours with many notifiers, as the floor with few."""
    many, few = crowds
    return nullcontext(Sides(partial(work, many), partial(work, few)))


@benchmark("notifier-insert", goal=None, unit="us", fixture=crowds)
def notifier_insert(crowds: tuple[Crowd, Crowd]) -> AbstractContextManager[Sides]:
    """Insertion of an interval notifier beside 10^6 others, on a watched page; against the same with 10^3."""

    def work(crowd: Crowd) -> float:
        start = perf_counter_ns()
        subs = [crowd.insert(addr + PAGE) for addr in crowd.order]
        ns = perf_counter_ns() - start
        for sub in subs:
            sub.remove()
        return ns / len(subs)

    return both(crowds, work)


@benchmark("notifier-remove", goal=None, unit="us", fixture=crowds)
def notifier_remove(crowds: tuple[Crowd, Crowd]) -> AbstractContextManager[Sides]:
    """Removal of an interval notifier with 10^6 others there; against the same with 10^3."""

    def work(crowd: Crowd) -> float:
        subs = [crowd.insert(addr + PAGE) for addr in crowd.order]
        start = perf_counter_ns()
        for sub in subs:
            sub.remove()
        return (perf_counter_ns() - start) / len(subs)

    return both(crowds, work)


@benchmark("invalidate-million", goal=1.5, unit="us", fixture=crowds)
def invalidate_million(crowds: tuple[Crowd, Crowd]) -> AbstractContextManager[Sides]:
    """Invalidation of one page, one callback, with 10^6 interval notifiers; against the same with 10^3."""

    def work(crowd: Crowd) -> float:
        crowd.called = 0
        invalidate = crowd.mm.invalidate
        start = perf_counter_ns()
        for addr in crowd.order:
            with invalidate(addr, addr + PAGE):
                pass
        ns = perf_counter_ns() - start
        count = len(crowd.order)
        expect(crowd.called == count, f"{crowd.called} callbacks for {count} invalidations")
        return ns / count

    return both(crowds, work)
