# SPDX-License-Identifier: MIT
"""The status page of one address space (``struct pm_status``), read from the memfd of another process."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from typing import Any

from .._shim import ffi, lib
from ..errors import MirrorError
from ..event import WHOLE_MM_END, Event, Guarantee
from .procfs import Process, permission_hint, printable

NAME = "pymirror-status"
_MAGIC = b"mirror01"
_PAGE = 4096
STATES = {0: "being opened", 1: "open", 2: "closing", 3: "closed"}
MONITOR_STATES = {
    0: "not running",
    1: "polls",
    2: "wants the device lock",
    3: "holds the device lock",
    4: "waits for device writes in flight",
}
DISPATCH_STATES = {
    lib.PM_DISPATCH_NONE: "not started",
    lib.PM_DISPATCH_WAITING: "waits for events",
    lib.PM_DISPATCH_AWAY: "is between events",
}


@dataclass(frozen=True, slots=True)
class Invalidation:
    """One that runs: [start, end) in bytes. ``undelivered``: callbacks of an API operation still run."""

    start: int
    end: int
    event: str
    guarantee: str
    since_ns: int
    tid: int
    undelivered: bool

    def __str__(self) -> str:
        return f"{self.event} [{self.start:#x}, {self.end:#x}) ({self.guarantee})"


@dataclass(frozen=True, slots=True)
class Wait:
    """A thread that waits for a lock of Python's: a driver lock, by its name, or the mmap lock."""

    lock: str
    tid: int
    since_ns: int
    holder_tid: int
    held_since_ns: int


@dataclass(frozen=True, slots=True)
class Space:
    """One address space. Times are of CLOCK_MONOTONIC of that process, in ns, 0: not so now; tids its own."""

    fd: int
    version: str
    inherited_from: int
    state: str
    seq: int
    opened_ns: int
    monitor_tid: int
    monitor_state: int
    monitor_loop_ns: int
    lock_tid: int
    lock_since_ns: int
    lock_addr: int
    dispatch_tid: int
    dispatch_state: int
    dispatch_since_ns: int
    callback_since_ns: int
    queue_depth: int
    queue_overflows: int
    oldest_event_ns: int
    active: int
    invalidations: tuple[Invalidation, ...]
    inflight: int
    inflight_since_ns: int
    inflight_tid: int
    events: dict[str, int]
    notifiers: int
    table_entries: int
    watched_bytes: int
    watched_ranges: int
    watched: tuple[tuple[int, int], ...]
    waits: tuple[Wait, ...]


_AS_IT_IS = (
    "seq",
    "opened_ns",
    "monitor_tid",
    "monitor_state",
    "monitor_loop_ns",
    "lock_tid",
    "lock_since_ns",
    "lock_addr",
    "dispatch_tid",
    "dispatch_state",
    "dispatch_since_ns",
    "callback_since_ns",
    "queue_depth",
    "queue_overflows",
    "oldest_event_ns",
    "active",
    "inflight",
    "inflight_since_ns",
    "inflight_tid",
    "table_entries",
    "watched_bytes",
    "watched_ranges",
)


def spaces(process: Process, links: dict[int, str]) -> list[Space]:
    """Every address space of the process, in order of descriptors.

    ENOENT when it has none; EPROTO when a page is of another version's layout; EACCES.
    """
    fds = [fd for fd, target in sorted(links.items()) if target.startswith(f"/memfd:{NAME}")]
    found = [space for fd in fds if (space := _space(process, fd)) is not None]
    if found:
        return found
    raise MirrorError(
        errno.ENOENT,
        f"inspect: process {process.pid} ({process.name}) has no address space of pymirror open",
        hint="name the process that called AddressSpace(), after it did:"
        " sudo ls -l /proc/*/fd | grep pymirror-status",
    )


def _space(process: Process, fd: int) -> Space | None:
    page = _read(process, fd)
    if page is None or page[:8] != _MAGIC:
        return None  # closed, or just being opened
    status = ffi.new("struct pm_status *")
    ffi.memmove(status, page, ffi.sizeof("struct pm_status"))
    if status.layout != lib.PM_STATUS_LAYOUT:
        raise MirrorError(
            errno.EPROTO,
            f"inspect: process {process.pid} has a status page of layout {status.layout},"
            f" this pymirror reads layout {lib.PM_STATUS_LAYOUT}",
            hint="run the `pymirror inspect` of the version that the process uses",
        )
    return _decode(process, fd, status)


def _read(process: Process, fd: int) -> bytes | None:
    path = f"/proc/{process.pid}/fd/{fd}"
    try:
        # It may be another file by now: one whose open would wait for somebody.
        opened = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except PermissionError:
        raise MirrorError(
            errno.EACCES,
            f"inspect: the status page of process {process.pid} cannot be read by uid {os.geteuid()}",
            hint=permission_hint(process.pid),
        ) from None
    except OSError:
        return None
    try:
        page = os.pread(opened, _PAGE, 0)
    except OSError:
        return None
    finally:
        os.close(opened)
    return page if len(page) == _PAGE else None


def _decode(process: Process, fd: int, status: Any) -> Space:
    ranges = min(status.watched_ranges, lib.PM_STATUS_WATCHED)
    return Space(
        fd=fd,
        version=_text(status.version),
        inherited_from=0 if status.pid == process.ns_pid else status.pid,
        state=STATES.get(status.state, "?"),
        invalidations=tuple(_invalidation(one) for one in status.inv if one.since_ns),
        events={event.name: status.events[event] for event in Event},
        notifiers=status.subs,
        watched=tuple((one.start, one.end) for one in status.watched[0:ranges]),
        waits=tuple(_wait(one) for one in status.wait if one.since_ns),
        **{name: getattr(status, name) for name in _AS_IT_IS},
    )


def _invalidation(one: Any) -> Invalidation:
    return Invalidation(
        start=one.start,
        end=one.end or WHOLE_MM_END,
        event=_named(Event, one.event),
        guarantee=str(Guarantee.from_native(one.guarantee)) if one.guarantee < len(Guarantee) else "?",
        since_ns=one.since_ns,
        tid=one.tid,
        undelivered=bool(one.undelivered),
    )


def _wait(one: Any) -> Wait:
    return Wait(
        lock=_text(one.lock),
        tid=one.tid,
        since_ns=one.since_ns,
        holder_tid=one.holder_tid,
        held_since_ns=one.held_since_ns,
    )


def _text(chars: Any) -> str:
    return printable(ffi.string(chars, len(chars)).decode(errors="replace"))


def _named(enum: type[Event], value: int) -> str:
    # A torn page may hold any number.
    return enum(value).name if value in enum._value2member_map_ else str(value)
