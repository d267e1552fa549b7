# SPDX-License-Identifier: MIT
"""RangeRetry: the retry loop that all drivers here share, with a deadline and a fresh sequence each time.

again:  seq = mmu_interval_read_begin()         inside the loop: a sequence that was refused stays refused
        hmm_range_fault()                       -EBUSY: again
        take driver->update                     the lock that the callback takes
        mmu_interval_read_retry() ? again       with the lock held, or the answer is void
        program the device
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from .. import trace
from ..errors import MirrorError, error
from ..event import MmuNotifierRange
from ..lock import DriverLock
from ..notifier import IntervalNotifier
from ..pfn import PfnArray
from ..walk import PAGE_SHIFT, hmm_range_fault
from .counts import Counts

HMM_RANGE_DEFAULT_TIMEOUT = 1.0

_T = TypeVar("_T")


@dataclass
class RetryStats(Counts):
    """Counts since the driver was made: loops that were ``begun``, ``done`` and given up at the ``deadline``.

    ``busy`` rounds ended with EBUSY while they looked at memory, ``moved`` ones when the lock was taken.
    """

    begun: int = 0
    done: int = 0
    busy: int = 0
    moved: int = 0
    deadline: int = 0

    @property
    def retries(self) -> int:
        """Rounds that had to be made again."""
        return self.busy + self.moved


class RangeRetry:
    """The loop of one driver, under its ``lock``. ``timeout`` is in seconds, for a loop as a whole.

    Its notifiers name the same lock: ``IntervalNotifier(..., update_lock=lock)``.
    """

    def __init__(
        self,
        lock: DriverLock,
        *,
        timeout: float = HMM_RANGE_DEFAULT_TIMEOUT,
        stats: RetryStats | None = None,
    ) -> None:
        """``stats`` are shared by the loops of a driver that has several locks. EINVAL: time-out below 0."""
        if not timeout >= 0:
            raise MirrorError(errno.EINVAL, f"RangeRetry: timeout {timeout}", hint="give seconds, 0 or more")
        self.lock = lock
        self.timeout = timeout
        self.stats = RetryStats() if stats is None else stats

    def __repr__(self) -> str:
        return f"<RangeRetry {self.lock.name!r} {self.timeout} s, {self.stats}>"

    def fault(
        self,
        sub: IntervalNotifier,
        start: int,
        end: int,
        program: Callable[[int, PfnArray], object],
        *,
        default_flags: int = 0,
        pfns: PfnArray | None = None,
        pfn_flags_mask: int = 0,
        dev_private_owner: object = None,
    ) -> PfnArray:
        """hmm_range_fault() over [start, end), then ``program(seq, pfns)`` with the lock held; the pfns.

        Arguments as hmm_range_fault(); ``pfns`` are requests, which every round begins with anew. Errors as
        hmm_range_fault() and run(), and what ``program`` raises.
        """
        requests = np.zeros(max(0, end - start) >> PAGE_SHIFT, np.uint64) if pfns is None else pfns

        def look(seq: int) -> PfnArray:
            found = requests.copy()
            hmm_range_fault(
                sub,
                start,
                end,
                found,
                default_flags=default_flags,
                pfn_flags_mask=pfn_flags_mask,
                seq=seq,
                dev_private_owner=dev_private_owner,
            )
            return found

        return self.run(sub, look, program, addr=start)

    def run(
        self,
        sub: IntervalNotifier,
        look: Callable[[int], _T],
        program: Callable[[int, _T], object],
        *,
        undo: Callable[[_T], object] | None = None,
        addr: int | None = None,
    ) -> _T:
        """The bare loop: ``look(seq)``, then ``program(seq, seen)`` with the lock held; what was seen.

        Either may raise EBUSY, and ``program`` answer False: again. What ``look`` took, as pins,
        ``undo(seen)`` gives back before the next round, and when ``program`` raises.

        EBUSY: ``timeout`` is over, and the interval is being invalidated still or again; ``addr`` is for the
        message. EINVAL: the notifier does not name this lock. ESRCH: it was removed, or the mm is closed.
        EDEADLK in a callback or under a driver lock.
        """
        self._check(sub)
        self.stats.add(begun=1)
        deadline = time.monotonic() + self.timeout
        rounds = 0
        while True:
            left = deadline - time.monotonic()
            if rounds and left <= 0:
                raise self._too_late(sub, rounds, addr)
            rounds += 1
            seq = self._begin(sub, max(0.0, left), rounds, addr)
            try:
                seen = look(seq)
            except MirrorError as refused:
                if refused.errno != errno.EBUSY:
                    raise
                self.stats.add(busy=1)
                continue
            if self._program(sub, seq, seen, program, undo):
                self.stats.add(done=1)
                return seen
            self.stats.add(moved=1)
            trace.instant(trace.Track.RETRY, "read_retry: invalidated meanwhile", sub.mm, seq=seq)

    def _begin(self, sub: IntervalNotifier, timeout: float, rounds: int, addr: int | None) -> int:
        try:
            return sub.read_begin(timeout)
        except MirrorError as refused:
            if refused.errno != errno.ETIMEDOUT:
                raise
            raise self._too_late(sub, rounds, addr) from refused

    def _program(
        self,
        sub: IntervalNotifier,
        seq: int,
        seen: _T,
        program: Callable[[int, _T], object],
        undo: Callable[[_T], object] | None,
    ) -> bool:
        done = False
        try:
            with self.lock:
                done = not sub.read_retry(seq) and not _refuses(program(seq, seen))
        except MirrorError as refused:
            if refused.errno != errno.EBUSY:
                raise
        finally:
            if not done and undo is not None:
                undo(seen)
        return done

    def _check(self, sub: IntervalNotifier) -> None:
        if sub.update_lock is self.lock:
            return
        raise MirrorError(
            errno.EINVAL,
            f"RangeRetry: {sub!r} names {sub.update_lock!r} as its lock, not {self.lock!r}",
            addr=sub.start,
            hint="insert it with update_lock=, the lock that its callback takes",
        )

    def _too_late(self, sub: IntervalNotifier, rounds: int, addr: int | None) -> MirrorError:
        self.stats.add(deadline=1)
        return error(
            errno.EBUSY,
            f"{sub!r} was invalidated for {self.timeout} s, in all of {rounds} rounds,",
            addr=sub.start if addr is None else addr,
            mm=sub.mm,
            hint="AddressSpace.dump() shows what invalidates it; then go again",
        )


def _refuses(answer: object) -> bool:
    """Whether a program has answered False, numpy's too, rather than nothing or anything else."""
    return isinstance(answer, bool | np.bool_) and not answer


def invalidated(lock: DriverLock, update: MmuNotifierRange, take_off: Callable[[], object]) -> bool:
    """A callback's work under the driver's lock, for it to return.

    False, and nothing done, where the invalidation is not blockable and the lock would have to be waited for.
    """
    if update.blockable:
        with lock:
            take_off()
        return True
    if not lock.acquire(0):
        return False
    try:
        take_off()
    finally:
        lock.release()
    return True
