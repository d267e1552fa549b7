# SPDX-License-Identifier: MIT
"""The delivery of one invalidation to notifiers: the passes, in order, and what each answer means."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from . import trace
from .callback import Callback, current
from .errors import MirrorError
from .event import Event, MmuNotifierRange
from .lock import callback_scope

if TYPE_CHECKING:
    from .notifier import IntervalNotifier, MmuNotifier
    from .notifier_set import NotifierSet

_FAILED = object()

_WAIT = "wait for the lock; only a range with blockable=False may be refused"
_SET_SEQ = "call sub.set_seq(cur_seq) in every callback, under the driver's lock"


class State:
    """Of a notifier: while REMOVING no new callback starts, and one that runs is waited for."""

    NEW, REGISTERED, REMOVING, REMOVED = range(4)


class Delivery:
    """One invalidation on its way round the notifiers.

    ``blocked``: a callback could not serve a non-blockable range. ``interrupt``: what a callback raised that
    is no Exception, to be raised again. ``started``: whole-mm notifiers that are owed an end.
    """

    __slots__ = ("blocked", "held", "interrupt", "notifiers", "range", "started")

    def __init__(self, notifiers: NotifierSet, range: MmuNotifierRange) -> None:
        self.notifiers = notifiers
        self.range = range
        self.blocked = False
        self.interrupt: BaseException | None = None
        self.started: list[MmuNotifier] = []
        self.held: dict[int, MmuNotifier | IntervalNotifier] = {}

    @property
    def failed(self) -> bool:
        return self.blocked or self.interrupt is not None

    def to_intervals(self, overlapping: Iterable[IntervalNotifier]) -> None:
        """The interval notifiers: every first pass, then every finish, also when one of them refused."""
        finishes: list[tuple[Callback, Any]] = []
        try:
            for notifier in overlapping:
                if self._hold(notifier):
                    self._first_pass(notifier, finishes)
                if self.blocked:
                    break
        finally:
            for callback, finish in finishes:
                result = self._invoke(callback, callback.notifier.invalidate_finish, finish)
                self._judge(callback, None if result is not _FAILED else result)

    def start(self, whole: Iterable[MmuNotifier]) -> None:
        """The whole-mm notifiers, before the change. All are asked, also after one refused."""
        range = self.range
        for notifier in whole:
            if not self._hold(notifier):
                continue
            callback = Callback(notifier, range, "invalidate_range_start")
            result = self._invoke(callback, notifier.invalidate_range_start, range)
            self._drop(notifier)
            refused = result is False or result == -errno.EAGAIN
            if refused and not range.blockable:
                self.blocked = True
                continue
            if notifier._wants_end:
                self.started.append(notifier)
            if refused:
                self._report(callback, errno.EAGAIN, f"returned {result}, but the range is blockable", _WAIT)

    def end(self, started: Iterable[MmuNotifier]) -> None:
        """The whole-mm notifiers, after the change."""
        for notifier in started:
            if self._hold(notifier):
                callback = Callback(notifier, self.range, "invalidate_range_end")
                self._invoke(callback, notifier.invalidate_range_end, self.range)
                self._drop(notifier)

    def release(self, whole: Iterable[MmuNotifier]) -> None:
        """The whole-mm notifiers, at the end of the mm."""
        for notifier in whole:
            if self._hold(notifier):
                self._invoke(Callback(notifier, self.range, "release"), notifier.release)
                self._drop(notifier)

    def let_go(self) -> None:
        """At the end: of what Ctrl-C left held."""
        for notifier in list(self.held.values()):
            self._drop(notifier)

    def _hold(self, notifier: MmuNotifier | IntervalNotifier) -> bool:
        self.held[id(notifier)] = notifier
        return self.notifiers.hold(notifier, self)

    def _drop(self, notifier: MmuNotifier | IntervalNotifier) -> None:
        self.notifiers.drop(notifier, self)
        self.held.pop(id(notifier), None)

    def _first_pass(self, notifier: IntervalNotifier, finishes: list[tuple[Callback, Any]]) -> None:
        range = self.range
        if not notifier.two_pass:
            callback = Callback(notifier, range, "invalidate")
            self._judge(callback, self._invoke(callback, notifier.invalidate, range, range.seq))
            return
        callback = Callback(notifier, range, "invalidate_start")
        result = self._invoke(callback, notifier.invalidate_start, range, range.seq)
        if result is None or result is False or result is _FAILED:
            self._judge(callback, result)
            return
        callback.name = "invalidate_finish"
        finishes.append((callback, result))

    def _judge(self, callback: Callback, result: Any) -> None:
        """The end of an interval notifier's part: did it keep the rules?"""
        self._drop(callback.notifier)
        if result is _FAILED:
            return
        if result is False and not self.range.blockable:
            self.blocked = True
        elif result is False:
            self._report(callback, errno.EAGAIN, "returned False, but the range is blockable", _WAIT)
        elif not callback.acked and not self._migrates():
            self._report(callback, errno.EINVAL, f"returned without set_seq({self.range.seq})", _SET_SEQ)

    def _migrates(self) -> bool:
        """A driver that takes it for its own may ignore it, and drivers of the kernel do, without set_seq."""
        return self.range.owner is not None and self.range.event in (Event.MIGRATE, Event.EXCLUSIVE)

    def _invoke(self, callback: Callback, function: Callable[..., Any], *args: Any) -> Any:
        outer = current.callback
        try:
            self.notifiers.begin(callback)
            current.callback = callback
            with callback_scope(callback):
                if trace.active is None:
                    return function(*args)
                return self._traced(callback, function, *args)
        except Exception as error:
            self.notifiers.report(callback, error)
        except BaseException as error:
            self.interrupt = error
            self.notifiers.report(callback, error)
        finally:
            current.callback = outer
            self.notifiers.finish(callback)
        return _FAILED

    def _traced(self, callback: Callback, function: Callable[..., Any], *args: Any) -> Any:
        range, name = self.range, f"{type(callback.notifier).__name__}.{callback.name}"
        with trace.span(trace.Track.CALLBACK, name, range.mm, range.start, range.end, seq=range.seq):
            return function(*args)

    def _report(self, callback: Callback, number: int, what: str, hint: str) -> None:
        self.notifiers.report(
            callback, MirrorError(number, f"the callback {what}", addr=callback.range.start, hint=hint)
        )
