# SPDX-License-Identifier: MIT
"""Traces: what happens to mirrored memory, on a time line that Perfetto and chrome://tracing show.

The library calls span() and instant() where things happen; without a Trace these do nothing. What native code
does by itself (a CPU fault that brings a device page home) is seen when its event is delivered.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from contextlib import AbstractContextManager, suppress
from enum import StrEnum
from types import TracebackType
from typing import TYPE_CHECKING, Any

from . import _version
from .arguments import integer
from .errors import MirrorError
from .trace_file import TraceFile

if TYPE_CHECKING:
    from .mm import AddressSpace

DEFAULT_LIMIT = 256 << 20

logger = logging.getLogger("pymirror")

#: The trace that is on. Hooks in hot paths test this attribute, and do nothing else while it is None.
active: Trace | None = None
_turn = threading.Lock()


class Track(StrEnum):
    """What a row of the time line is about; each thread that has such events has a row of its own."""

    RUN = "runs"
    OPERATION = "CPU operations"
    INVALIDATION = "invalidations"
    CALLBACK = "callbacks"
    FAULT = "device faults"
    WALK = "range faults"
    RETRY = "retries"
    MIGRATION = "migrations"
    DMA = "DMA maps"
    PIN = "pins"


_ORDER = {track: place for place, track in enumerate(Track)}


class Trace:
    """Write the events of this process to a file, in the Chrome trace format, until close().

    ``mm`` limits it to one address space. Spans ("X") have the names of calls, events and fault reasons, and
    in ``args`` the interval [start, end), and the errno if they failed; retries are instants ("i"). What is
    not over at close() is a begin without an end ("B"). Times are CLOCK_MONOTONIC, in microseconds.

    Beyond ``limit`` bytes of file events are dropped and counted: ``events``, ``dropped``. The file parses at
    every moment, also after SIGKILL. In a forked child it is off. A context manager; one at a time.

    EBUSY: another trace is on. EINVAL: no regular file. OSError of open(2).
    """

    def __init__(
        self, path: str | os.PathLike[str], mm: AddressSpace | None = None, *, limit: int = DEFAULT_LIMIT
    ) -> None:
        global active
        limit = integer("Trace", "limit", limit)
        with _turn:
            if active is not None:
                raise MirrorError(
                    errno.EBUSY, f"Trace: {active.path} is being written", hint="close() that trace first"
                )
            self.mm = mm
            self._pid = os.getpid()
            self._file = TraceFile(path, limit)
            self._tracks: dict[tuple[Track, int, str], int] = {}
            self._open: dict[int, Span] = {}
            self._name_lock = threading.RLock()
            self._metadata("process_name", 0, name=f"pymirror {self._pid}")
            active = self

    @property
    def path(self) -> str:
        """Where it is written to."""
        return self._file.path

    @property
    def events(self) -> int:
        """How many are in the file, or will be soon."""
        return self._file.events

    @property
    def dropped(self) -> int:
        """How many found no room."""
        return self._file.dropped

    def close(self) -> None:
        """Stop, and complete the file. Idempotent, and quiet in a forked child.

        A file that could not be written to the end (ENOSPC) is reported on the logger "pymirror".
        """
        global active
        with _turn:
            if active is self:
                active = None
        if os.getpid() != self._pid:
            return
        unfinished = []
        # One by one, for others end meanwhile.
        while self._open:
            with suppress(KeyError):
                unfinished.append(self._open.popitem()[1])
        for span in sorted(unfinished, key=lambda span: span.begun):
            self._write("B", span.track, span.row, span.name, span.begun, args=span.args)
        about = {
            "version": f"pymirror {_version.__version__}",
            "clock": "CLOCK_MONOTONIC",
            "events": self.events,
            "dropped": self.dropped,
        }
        self._file.close(about)
        if self._file.error is not None:
            logger.warning("Trace: %s has not all events: %s", self.path, self._file.error)

    def __enter__(self) -> Trace:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "on" if active is self else "closed"
        return f"<Trace {self.path!r} {state}, {self.events} events>"

    def _wants(self, mm: AddressSpace | None) -> bool:
        return self.mm is None or mm is self.mm

    def _begin(self, span: Span) -> None:
        span.row = self._row(span.track)
        self._open[id(span)] = span

    def _end(self, span: Span, now: int) -> None:
        if self._open.pop(id(span), None) is not None:
            dur = (now - span.begun) / 1e3
            self._write("X", span.track, span.row, span.name, span.begun, dur=dur, args=span.args)

    def _instant(self, track: Track, name: str, args: dict[str, Any]) -> None:
        self._write("i", track, self._row(track), name, time.monotonic_ns(), s="t", args=args)

    def _write(self, phase: str, track: Track, row: int, name: str, when: int, **fields: Any) -> None:
        self._file.add(
            {
                "name": name,
                "cat": track.value,
                "ph": phase,
                "ts": when / 1e3,
                **fields,
                "pid": self._pid,
                "tid": row,
            }
        )

    def _row(self, track: Track) -> int:
        """The number of this thread's row, which gets its name when it is new."""
        thread = threading.current_thread()
        key = track, threading.get_ident(), thread.name
        row = self._tracks.get(key)
        if row is not None:
            return row
        with self._name_lock:
            row = self._tracks.setdefault(key, len(self._tracks) + 1)
            self._metadata("thread_name", row, name=f"{track.value}: {thread.name}")
            self._metadata("thread_sort_index", row, sort_index=_ORDER[track])
        return row

    def _metadata(self, what: str, row: int, **args: Any) -> None:
        self._file.add({"name": what, "ph": "M", "ts": 0, "pid": self._pid, "tid": row, "args": args})

    def _leave(self) -> None:
        """In a forked child."""
        self._open.clear()
        self._file.forget()


class Span:
    """Something that takes time. ``note()`` adds to what is told of it."""

    __slots__ = ("args", "begun", "name", "row", "trace", "track")

    def __init__(self, trace: Trace, track: Track, name: str, args: dict[str, Any]) -> None:
        self.trace = trace
        self.track = track
        self.name = name
        self.args = args
        self.begun = 0
        self.row = 0

    def note(self, **args: Any) -> None:
        self.args |= args

    def __enter__(self) -> Span:
        self.begun = time.monotonic_ns()
        self.trace._begin(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None
    ) -> None:
        now = time.monotonic_ns()
        if value is not None:
            self.args["error"] = _error_name(value)
        self.trace._end(self, now)


class _Nothing:
    """The span of no trace."""

    __slots__ = ()

    def note(self, **args: Any) -> None:
        """Nowhere."""

    def __enter__(self) -> _Nothing:
        return self

    def __exit__(self, *_exc: object) -> None:
        pass


_NOTHING = _Nothing()


def span(
    track: Track, name: str, mm: AddressSpace | None, start: int = 0, end: int = 0, **args: Any
) -> AbstractContextManager[Span | _Nothing]:
    """Around something that takes time; nothing without a trace."""
    trace = active
    if trace is None or not trace._wants(mm):
        return _NOTHING
    return Span(trace, track, name, _interval(start, end) | args)


def instant(
    track: Track, name: str, mm: AddressSpace | None, start: int = 0, end: int = 0, **args: Any
) -> None:
    """Something that happens at once; nothing without a trace."""
    trace = active
    if trace is not None and trace._wants(mm):
        trace._instant(track, name, _interval(start, end) | args)


def _interval(start: int, end: int) -> dict[str, Any]:
    return {"start": f"{start:#x}", "end": f"{end:#x}"} if end else {}


def _error_name(error: BaseException) -> str:
    number = error.errno if isinstance(error, OSError) else None
    return errno.errorcode.get(number or 0, type(error).__name__)


def _off_in_child() -> None:
    global active, _turn
    _turn = threading.Lock()
    if active is not None:
        active._leave()
    active = None


os.register_at_fork(after_in_child=_off_in_child)
