# SPDX-License-Identifier: MIT
"""The text of AddressSpace.dump(): what waits for what, from the status page and from Python's own locks.

It reads the status page and plain attributes only, so that it works while every lock is held.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from typing import TYPE_CHECKING, Any

from ._shim import ffi, lib
from .event import WHOLE_MM_END, Event, Guarantee
from .lock import driver_locks

if TYPE_CHECKING:
    from .mm import AddressSpace

_MONITOR = (
    "not running",
    "polling",
    "wants the device lock",
    "holds the device lock",
    "drains device writes",
)


def dump(mm: AddressSpace) -> str:
    """One fact a line, what is stuck first."""
    now = time.monotonic_ns()
    status = _status(mm)
    lines = [f"{mm!r}, at CLOCK_MONOTONIC {now / 1e9:.3f} s"]
    lines += _invalidations(status, now)
    lines += _callbacks(mm)
    lines += _locks(mm, now)
    lines += _native(status, now)
    lines += _memory(mm)
    lines += [f"callback error: {error}" for error in list(mm.errors)[-5:]]
    return "\n  ".join(lines) + "\n"


def _status(mm: AddressSpace) -> Any:
    fd = lib.pm_mm_status_fd(mm.native) if os.getpid() == mm.pid else -1
    if fd < 0:
        return None
    status = ffi.new("struct pm_status *")
    try:
        page = os.pread(fd, ffi.sizeof("struct pm_status"), 0)
    except OSError:
        return None
    ffi.memmove(status, page, len(page))
    return status


def _invalidations(status: Any, now: int) -> list[str]:
    if status is None:
        return ["no status page"]
    lines = [f"sequence {status.seq}; {status.active} invalidation(s) running"]
    return lines + [f"running: {_running(one, now)}" for one in status.inv if one.since_ns]


def _running(one: Any, now: int) -> str:
    guarantee = Guarantee.from_native(one.guarantee)
    interval = f"{one.start:#x}-{one.end or WHOLE_MM_END:#x}"
    return f"{Event(one.event).name} {interval} ({guarantee}) for {_age(one.since_ns, now)}"


def in_the_way(mm: AddressSpace, start: int, end: int) -> list[str]:
    """Invalidations of [start, end) that run, as far as the status page has room, and whose they are."""
    status, now = _status(mm), time.monotonic_ns()
    names = {thread.native_id: thread.name for thread in threading.enumerate()}
    return [
        f"{_running(one, now)}, begun by thread {names.get(one.tid, one.tid)}"
        for one in (status.inv if status is not None else ())
        if one.since_ns and one.start < end and start < (one.end or WHOLE_MM_END)
    ]


def _callbacks(mm: AddressSpace) -> list[str]:
    places = {callback.thread: where(callback.thread) for callback in mm.notifiers.running()}
    lines = [f"callback: {line}" for line in mm.notifiers.describe()]
    return lines + [f"thread {_name(ident)} is at {place}" for ident, place in places.items()]


def _locks(mm: AddressSpace, now: int) -> list[str]:
    lines = []
    for how, ident, since in mm._mmap_lock.holders():
        held = f"held ({how}) for {_age(since, now)} by thread {_name(ident)}, at {where(ident)}"
        lines.append(f"mmap lock: {held}")
    if mm._mmap_lock.waiting_writers:
        lines.append(f"mmap lock: {mm._mmap_lock.waiting_writers} writer(s) wait")
    for lock in driver_locks():
        owner = lock.owner
        if owner is not None:
            held = f"held for {_age(lock.since_ns, now)} by thread {_name(owner)}, at {where(owner)}"
            lines.append(f"driver lock {lock.name!r}: {held}")
    return lines or ["mmap lock and driver locks: free"]


def _native(status: Any, now: int) -> list[str]:
    if status is None:
        return []
    oldest = f", the oldest for {_age(status.oldest_event_ns, now)}" if status.oldest_event_ns else ""
    lines = [f"kernel events: {status.queue_depth} queued{oldest}; {status.queue_overflows} overflow(s)"]
    if status.callback_since_ns:
        lines.append(f"the dispatcher has been delivering an event for {_age(status.callback_since_ns, now)}")
    state = _MONITOR[status.monitor_state] if status.monitor_state < len(_MONITOR) else "?"
    if status.monitor_tid:
        state += f" (tid {status.monitor_tid}), went round {_age(status.monitor_loop_ns, now)} ago"
    lines.append(f"monitor: {state}")
    if status.lock_tid:
        lines.append(f"device lock: held by tid {status.lock_tid} for {_age(status.lock_since_ns, now)}")
    if status.inflight:
        oldest = _age(status.inflight_since_ns, now)
        lines.append(f"device accesses: {status.inflight} in flight, the oldest for {oldest}")
    counts = ", ".join(f"{event.name} {status.events[event]}" for event in Event if status.events[event])
    lines.append(f"events so far: {counts or 'none'}")
    lines.append(f"{status.subs} interval notifier(s) and ranges; {status.watched_bytes} bytes watched")
    lines.append(f"{status.table_entries} device page-table entries")
    return lines


def _memory(mm: AddressSpace) -> list[str]:
    stats = mm.notifiers.stats()
    counted = ", ".join(f"{name} {value}" for name, value in stats.items())
    return [f"{len(mm._regions)} Region(s), {mm._regions.bytes} bytes; {counted}"]


def where(ident: int) -> str:
    """Where the Python thread stands: file, line and function."""
    frame = sys._current_frames().get(ident)
    if frame is None:
        return "no Python frame"
    top = traceback.extract_stack(frame, limit=1)[-1]
    return f"{top.filename}:{top.lineno} in {top.name}"


def _name(ident: int) -> str:
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return f"{names.get(ident, '?')} ({ident})"


def _age(since_ns: int, now: int) -> str:
    return f"{max(0, now - since_ns) / 1e9:.3f} s"
