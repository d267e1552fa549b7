# SPDX-License-Identifier: MIT
"""The notifiers of one mm, and who is told of an invalidation (the kernel's mmu_notifier_subscriptions).

Order of a delivery: the interval notifiers that overlap, by address (of two-pass ones every first pass, then
every finish), then the whole-mm notifiers, oldest first; when the change is made, the whole-mm ones once
more. Callbacks run with no lock of the library held but the mmap lock of the operation that makes the change.
"""

from __future__ import annotations

import errno
import itertools
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from . import trace
from ._shim import ffi, lib
from .arguments import seconds
from .callback import Callback, failure, logger, may_wait
from .delivery import Delivery, State
from .dispatcher import Dispatcher
from .errors import MirrorError, check, error
from .event import WHOLE_MM_END, Event, Guarantee, MmuNotifierRange, native_end, python_end
from .lock import SLICE, renew_in_child

if TYPE_CHECKING:
    from .mm import AddressSpace
    from .notifier import IntervalNotifier, MmuNotifier

#: `kind` of the nodes in the native interval tree: who wants callbacks, and who only a sequence number.
KIND_INTERVAL = 1
KIND_RANGE = 2

HISTORY_LENGTH = 256
REMOVE_TIMEOUT = 10.0

#: The whole-mm notifiers that got a start and are owed an end.
Token = tuple["MmuNotifier", ...]


class Invalidation(NamedTuple):
    """A delivered invalidation as the history remembers it; ``when`` is time.monotonic()."""

    seq: int
    start: int
    end: int
    event: Event
    guarantee: Guarantee
    when: float
    overflow: bool
    first_seq: int


class NotifierSet:
    """The registry of an AddressSpace, which makes the deliver calls. Drivers use the notifier classes."""

    def __init__(self, mm: AddressSpace) -> None:
        self._mm = weakref.ref(mm)
        self._native = mm.native
        self._make_locks()
        renew_in_child(self)
        self._whole: Token = ()
        self._intervals: dict[int, IntervalNotifier] = {}
        self._cookies = itertools.count(1)
        self._busy: dict[int, set[Delivery]] = {}
        self._running: set[Callback] = set()
        #: A callback has ended. Not a function in Python: Ctrl-C could strike at its door.
        self.finish = self._running.discard
        self._dispatcher: Dispatcher | None = None
        self._history: deque[Invalidation] = deque(maxlen=HISTORY_LENGTH)
        self.released = False
        self.callbacks = 0
        self.callback_errors = 0

    @property
    def whole_mm(self) -> bool:
        """Whether a notifier of the whole mm is registered."""
        return bool(self._whole)

    def register(self, notifier: MmuNotifier) -> None:
        """mmu_notifier_register(): whole-mm callbacks from the next invalidation on. ESRCH on a closed mm."""
        self._check_open("MmuNotifier")
        # First: a process that may have no more threads is to have no notifier whose construction failed.
        self.start_dispatcher()
        with self._lock:
            self._whole = (*self._whole, notifier)
            notifier._state = State.REGISTERED

    def insert(self, notifier: IntervalNotifier, last: int) -> None:
        """mmu_interval_notifier_insert(): put it in the tree, under a cookie of its own."""
        self._check_open("IntervalNotifier")
        if self._dispatcher is None:
            self.start_dispatcher()
        cookie = next(self._cookies)
        native = ffi.new("pm_sub **")
        # Before the tree has it: whoever finds the cookie there must find the notifier here.
        self._intervals[cookie] = notifier
        notifier._cookie = cookie
        notifier._state = State.REGISTERED
        ret = 0
        try:
            ret = lib.pm_sub_insert(self._native, notifier.start, last, cookie, KIND_INTERVAL, native)
        finally:
            # Ctrl-C may strike as soon as the call returns: what is in the tree must be found again.
            if native[0] != ffi.NULL:
                notifier._native = native[0]
            else:
                notifier._state = State.REMOVED
                del self._intervals[cookie]
        check(ret, "IntervalNotifier", addr=notifier.start)

    def remove(
        self, notifier: MmuNotifier | IntervalNotifier, what: str, timeout: float = REMOVE_TIMEOUT
    ) -> None:
        """Take a notifier out; on return none of its callbacks runs or will run. Idempotent.

        EDEADLK inside a callback or under a driver lock; ETIMEDOUT while a callback of it does not return (no
        new one starts by then, and remove may be called again). In a forked child it does nothing.
        """
        if lib.pm_mm_alive(self._native) < 0:
            return
        may_wait(what)
        with self._lock:
            if notifier._state in (State.NEW, State.REMOVED):
                return
            notifier._state = State.REMOVING
            self._wait_idle(notifier, what, timeout)
            self._forget(notifier)
            notifier._state = State.REMOVED

    def deliver_start(self, range: MmuNotifierRange, when: float | None = None) -> Token:
        """mmu_notifier_invalidate_range_start(): run the callbacks in this thread.

        Gives the token for the end. A non-blockable range that some callback cannot serve without waiting
        raises EAGAIN; whole-mm notifiers that got their start have had their end by then. A callback that
        raises is reported and stops nobody, but what is no Exception (Ctrl-C) is raised again when all have
        run.
        """
        self._remember(range, time.monotonic() if when is None else when)
        if not self._whole and not self._intervals:
            return ()
        delivery = Delivery(self, range)
        try:
            self._run(delivery, lambda: self._start(delivery))
        except BaseException:
            self.deliver_end(range, tuple(delivery.started))
            raise
        return tuple(delivery.started)

    def deliver_end(self, range: MmuNotifierRange, token: Token) -> None:
        """mmu_notifier_invalidate_range_end(), for the notifiers that got the start."""
        if not token:
            return
        delivery = Delivery(self, range)
        self._run(delivery, lambda: delivery.end(token))
        if delivery.interrupt is not None:
            raise delivery.interrupt

    def deliver_event(self, event: Any) -> None:
        """A ``struct pm_event`` of the kernel, by the dispatcher: start and end at once."""
        mm = self._mm()
        if mm is None:
            return
        range = MmuNotifierRange(
            mm,
            event.start,
            python_end(event.end),
            Event(event.type),
            mm._memory_owner(event.owner) if event.owner else None,
            guarantee=Guarantee.from_native(event.guarantee),
            seq=event.seq,
            overflow=bool(event.flags & lib.PM_EV_OVERFLOW),
            first_seq=event.first_seq if event.first_seq != event.seq else 0,
        )
        if range.event is Event.UNMAP:
            mm._foreign_unmap(range.start, range.end)
        # From here on its end is the callbacks': native code has fenced long since.
        late = {"guarantee": range.guarantee.value, "seq": range.seq, "told_us_ago": _us_since(event.when_ns)}
        with trace.span(trace.Track.INVALIDATION, range.event.name, mm, range.start, range.end, **late):
            self.deliver_end(range, self.deliver_start(range, event.when_ns / 1e9))

    def release(self) -> None:
        """mmu_notifier_release(): the mm goes away.

        RELEASE over everything to the interval notifiers, then release() of the others. Everything that
        registers from here on is refused. Call it while the native mm is open. Once.
        """
        with self._lock:
            if self.released:
                return
            self.released = True
        mm = self._mm()
        assert mm is not None, "release() is a call of the living mm"
        delivery = Delivery(self, MmuNotifierRange(mm, 0, WHOLE_MM_END, Event.RELEASE))
        self._run(delivery, lambda: self._release(delivery))
        if delivery.interrupt is not None:
            raise delivery.interrupt

    def start_dispatcher(self) -> None:
        """Have a thread that delivers kernel events; once there is one, nothing."""
        with self._lock:
            if self._dispatcher is None and not self.released:
                self._dispatcher = Dispatcher(self._native, self)

    def stop(self, timeout: float) -> bool:
        """End the dispatcher; False when a callback keeps it longer than `timeout` seconds."""
        dispatcher = self._dispatcher
        return dispatcher is None or dispatcher.stop(timeout)

    def history(self) -> list[Invalidation]:
        """The last invalidations, oldest first, at most HISTORY_LENGTH."""
        return list(self._history)

    def invalidation(self, seq: int) -> Invalidation | None:
        """The invalidation that set this sequence number, if it is not too long ago."""
        holding = (one for one in reversed(self.history()) if one.first_seq <= seq <= one.seq)
        return min(holding, key=lambda one: one.seq - one.first_seq, default=None)

    def running(self) -> list[Callback]:
        """The callbacks that run at this moment."""
        return list(self._running)

    def describe(self) -> list[str]:
        """One line for each callback that runs, for dumps."""
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        now = time.monotonic()
        return [
            f"{one.name} of {type(one.notifier).__name__} runs for {now - one.since:.3f} s in thread"
            f" {names.get(one.thread, one.thread)}: {one.range}"
            for one in self.running()
        ]

    def stats(self) -> dict[str, int]:
        return {
            "mmu_notifiers": len(self._whole),
            "interval_notifiers": len(self._intervals),
            "callbacks": self.callbacks,
            "callback_errors": self.callback_errors,
            "callbacks_running": len(self._running),
        }

    def report(self, callback: Callback, exception: BaseException) -> None:
        """Record and log a driver's mistake; the delivery goes on."""
        report = failure(callback, exception)
        self.callback_errors += 1
        mm = self._mm()
        if mm is not None:
            mm.errors.append(report)
        logger.error("%s\n%s", report, report.traceback.rstrip())

    def _check_open(self, what: str) -> None:
        alive = lib.pm_mm_alive(self._native)
        if alive == 1 and not self.released:
            return
        if alive < 0:
            raise MirrorError(
                errno.ESRCH,
                f"{what}: the address space belongs to the process that this one was forked from",
                hint="open a new AddressSpace in this process",
            )
        raise MirrorError(errno.ESRCH, f"{what}: the address space is closed", hint="open a new AddressSpace")

    def _remember(self, range: MmuNotifierRange, when: float) -> None:
        self._history.append(
            Invalidation(
                range.seq,
                range.start,
                range.end,
                range.event,
                range.guarantee,
                when,
                range.overflow,
                range.first_seq or range.seq,
            )
        )

    def _overlapping(self, range: MmuNotifierRange) -> list[IntervalNotifier]:
        if not self._intervals:
            return []
        room = 64
        while True:
            cookies = ffi.new("uint64_t[]", room)
            n = lib.pm_overlapping(
                self._native, range.start, native_end(range.end), KIND_INTERVAL, cookies, room
            )
            if n <= room:
                break
            room = n + 64
        if n <= 0:
            return []
        found = map(self._intervals.get, ffi.unpack(cookies, n))
        return [notifier for notifier in found if notifier is not None]

    def begin(self, callback: Callback) -> None:
        """A callback starts to run in this thread."""
        self.callbacks += 1
        self._running.add(callback)

    def hold(self, notifier: MmuNotifier | IntervalNotifier, delivery: Delivery) -> bool:
        """Keep remove() waiting; False if the notifier is on its way out."""
        with self._lock:
            if notifier._state != State.REGISTERED:
                return False
            self._busy.setdefault(id(notifier), set()).add(delivery)
            return True

    def drop(self, notifier: MmuNotifier | IntervalNotifier, delivery: Delivery) -> None:
        """The opposite; idempotent."""
        with self._lock:
            busy = self._busy.get(id(notifier), set())
            busy.discard(delivery)
            if busy:
                return
            self._busy.pop(id(notifier), None)
            if notifier._state == State.REMOVING:
                self._idle.notify_all()

    def _wait_idle(self, notifier: MmuNotifier | IntervalNotifier, what: str, timeout: float) -> None:
        until = time.monotonic() + seconds(what, "timeout", timeout)
        while id(notifier) in self._busy:
            left = until - time.monotonic()
            if left <= 0:
                raise MirrorError(
                    errno.ETIMEDOUT,
                    f"{what}: a callback of it has not returned within {timeout} s",
                    hint="AddressSpace.dump() shows the thread that it runs in; then call this again",
                )
            self._idle.wait(min(left, SLICE))

    def _forget(self, notifier: MmuNotifier | IntervalNotifier) -> None:
        cookie = getattr(notifier, "_cookie", None)
        if cookie is None:
            self._whole = tuple(one for one in self._whole if one is not notifier)
        elif self._intervals.pop(cookie, None) is not None:
            lib.pm_sub_remove(notifier._native)  # type: ignore[union-attr]

    def _make_locks(self) -> None:
        # Entered as itself: Condition's own __enter__ is Python, and Ctrl-C could strike between it and the
        # block. Reentrant, for handlers of signals.
        self._lock = threading.RLock()
        self._idle = threading.Condition(self._lock)

    def _run(self, delivery: Delivery, passes: Callable[[], None]) -> None:
        try:
            try:
                passes()
            finally:
                delivery.let_go()
        finally:
            # Once more: Ctrl-C may have struck at the door of the first.
            delivery.let_go()

    def _start(self, delivery: Delivery) -> None:
        delivery.to_intervals(self._overlapping(delivery.range))
        if not delivery.failed:
            delivery.start(self._whole)
        if delivery.failed:
            raise delivery.interrupt or _would_block(delivery.range)

    def _release(self, delivery: Delivery) -> None:
        self._release_intervals(delivery)
        delivery.release(self._whole)

    def _release_intervals(self, delivery: Delivery) -> None:
        invalidation, seq = ffi.new("pm_inv **"), ffi.new("uint64_t *")
        ret = lib.pm_invalidate_start(
            self._native, 0, 0, Event.RELEASE, Guarantee.BEFORE.native, invalidation, seq
        )
        if ret < 0:
            return
        try:
            delivery.range.seq = seq[0]
            self._remember(delivery.range, time.monotonic())
            delivery.to_intervals(self._overlapping(delivery.range))
        finally:
            lib.pm_invalidate_delivered(invalidation[0])
            lib.pm_invalidate_end(invalidation[0])


def _us_since(when_ns: int) -> float:
    return (time.monotonic_ns() - when_ns) / 1e3


def _would_block(range: MmuNotifierRange) -> MirrorError:
    return error(
        errno.EAGAIN,
        f"invalidate: a callback would have to wait to serve {range}, which is not blockable",
        addr=range.start,
        mm=range.mm,
        hint="nothing was invalidated: go again, or invalidate with blockable=True",
    )
