# SPDX-License-Identifier: MIT
"""One callback of one notifier: whether it runs, what it did of its duties, and the report when it did not.

A driver's mistake never stops an operation: native fencing has made the memory safe before any callback runs.
It is recorded in ``AddressSpace.errors``, logged on the logger "pymirror" and counted.
"""

from __future__ import annotations

import logging
import threading
import time
import traceback as _traceback
from dataclasses import dataclass, field
from typing import Any

from .event import Event, MmuNotifierRange
from .lock import not_in_callback, not_under_driver_lock

logger = logging.getLogger("pymirror")


@dataclass(slots=True, frozen=True)
class CallbackError:
    """A callback that raised or broke a rule.

    ``event`` and [``start``, ``end``) are of the invalidation, ``callback`` is the method's name,
    ``notifier`` the repr of the object it belongs to, ``exception`` what it raised (for a broken rule a
    MirrorError that says which), ``traceback`` the text of where. ``when`` is time.monotonic().
    """

    event: Event
    start: int
    end: int
    seq: int
    callback: str
    notifier: str
    exception: BaseException
    traceback: str
    thread: str
    when: float = field(default_factory=time.monotonic)

    def __str__(self) -> str:
        return (
            f"{self.callback} of {self.notifier} failed on {self.event.name} {self.start:#x}-{self.end:#x}"
            f" (seq {self.seq}, thread {self.thread}): {type(self.exception).__name__}: {self.exception}"
        )


class Callback:
    """A notifier's part in one delivery: its callback, or the pair of a two-pass notifier."""

    __slots__ = ("acked", "name", "notifier", "range", "since", "thread")

    def __init__(self, notifier: Any, range: MmuNotifierRange, name: str) -> None:
        self.notifier = notifier
        self.range = range
        self.name = name
        self.acked = False
        self.thread = threading.get_ident()
        self.since = time.monotonic()

    def __str__(self) -> str:
        return f"{self.name} of {_safe_repr(self.notifier)} for {self.range}"


class _Current(threading.local):
    callback: Callback | None = None


#: The callback that the thread is in, with what `lock.in_callback` does not know: whose it is.
current = _Current()


def may_wait(what: str) -> None:
    """EDEADLK for a call that waits for callbacks, made in one or under a driver lock."""
    not_in_callback(what)
    not_under_driver_lock(what)


def failure(callback: Callback, exception: BaseException) -> CallbackError:
    """The report. It keeps the traceback as text: frames would keep the driver's objects alive."""
    range = callback.range
    text = "".join(_traceback.format_exception(exception))
    return CallbackError(
        range.event,
        range.start,
        range.end,
        range.seq,
        callback.name,
        _safe_repr(callback.notifier),
        exception.with_traceback(None),
        text,
        threading.current_thread().name,
    )


def _safe_repr(thing: object) -> str:
    try:
        return repr(thing)
    except Exception as error:
        return f"<{type(thing).__name__}, whose repr() raised {type(error).__name__}>"
