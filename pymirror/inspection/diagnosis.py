# SPDX-License-Identifier: MIT
"""What is wrong with a process, in sentences, the cause before its consequences. Looks only at a Look."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .._shim import lib
from .look import Look
from .procfs import FUTEX, Thread
from .status import MONITOR_STATES, Space

#: The monitor goes round once a second when there is nothing to do.
_MONITOR_ROUND_S = 1.5
_MONITOR_NAME = "pymirror-mon"
_DISPATCHER_NAME = "pymirror-disp"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong: ``kind`` is HUNG, STOPPED or SLOW, ``do`` what to look at or do next."""

    kind: str
    text: str
    do: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}"


def diagnose(look: Look, after_s: float = 2.0) -> list[Finding]:
    """What has been waiting for ``after_s`` seconds or more; [] when nothing has."""
    if look.process.state in ("T", "t"):
        return [_stopped(look)]
    found: list[Finding] = list(_waits(look, after_s))
    for space in look.spaces:
        if not space.inherited_from:
            found += _space(look, space, after_s)
    return found + list(_faults(look))


def waiters(look: Look, space: Space) -> list[Thread]:
    """The threads that sleep at the futex of the device lock."""
    return [thread for thread in look.threads if thread.syscall[:2] == (FUTEX, space.lock_addr)]


def named(look: Look, ns_tid: int) -> str:
    """`name (tid)` of a thread of the process."""
    thread = look.thread(ns_tid)
    return f"{thread.name} ({thread.tid})" if thread else f"thread {ns_tid}, which has ended"


def _stopped(look: Look) -> Finding:
    pid, tracer = look.process.pid, look.process.tracer
    if tracer:
        return Finding("STOPPED", f"process {tracer} traces it, and has stopped it", "continue it there")
    return Finding("STOPPED", "a signal has stopped the process; nothing in it runs", f"kill -CONT {pid}")


def _waits(look: Look, after_s: float) -> Iterator[Finding]:
    for one in look.waits():
        age = look.age_s(one.since_ns)
        if age < after_s:
            continue
        held = f"held by {named(look, one.holder_tid)} for {look.age_s(one.held_since_ns):.1f} s"
        yield Finding(
            "HUNG",
            f"{named(look, one.tid)} has waited for the lock {one.lock!r} for {age:.1f} s,"
            f" {held if one.holder_tid else 'held by nobody who is known'}",
            _debug(look, one.holder_tid or one.tid),
        )


def _space(look: Look, space: Space, after_s: float) -> Iterator[Finding]:
    yield from _lock(look, space, after_s)
    yield from _callbacks(look, space, after_s)
    yield from _accesses(look, space, after_s)
    yield from _dispatcher(look, space, after_s)
    yield from _monitor(look, space, after_s)
    yield from _operations(look, space, after_s)


def _lock(look: Look, space: Space, after_s: float) -> Iterator[Finding]:
    age = look.age_s(space.lock_since_ns)
    if not space.lock_tid or age < after_s:
        return
    number = len(waiters(look, space))
    queue = f"; waiting for it: {number} thread(s)" if number else ""
    yield Finding(
        "HUNG",
        f"the device lock has been held for {age:.1f} s by {named(look, space.lock_tid)}{queue}",
        _debug(look, space.lock_tid),
    )


def _callbacks(look: Look, space: Space, after_s: float) -> Iterator[Finding]:
    for one in space.invalidations:
        age = look.age_s(one.since_ns)
        if one.undelivered and age >= after_s:
            yield Finding(
                "HUNG",
                f"a callback for {one} has been running for {age:.1f} s in {named(look, one.tid)}",
                _debug(look, one.tid),
            )
    age = look.age_s(space.callback_since_ns)
    if space.callback_since_ns and age >= after_s:
        yield Finding(
            "HUNG",
            f"a callback for an event of the kernel has been running for {age:.1f} s in"
            f" {named(look, space.dispatch_tid)}; {space.queue_depth} more event(s) wait behind it",
            _debug(look, space.dispatch_tid),
        )


def _accesses(look: Look, space: Space, after_s: float) -> Iterator[Finding]:
    age = look.age_s(space.inflight_since_ns)
    if space.inflight and space.inflight_since_ns and age >= after_s:
        yield Finding(
            "HUNG",
            f"a device access has been in flight for {age:.1f} s in {named(look, space.inflight_tid)}",
            _debug(look, space.inflight_tid),
        )


def _dispatcher(look: Look, space: Space, after_s: float) -> Iterator[Finding]:
    thread = look.thread(space.dispatch_tid) if space.dispatch_tid else None
    age = look.age_s(space.dispatch_since_ns)
    if thread is None or thread.name != _DISPATCHER_NAME or space.callback_since_ns or age < after_s:
        return
    if space.dispatch_state != lib.PM_DISPATCH_AWAY or thread in waiters(look, space):
        return
    yield Finding(
        "HUNG",
        f"the dispatcher ({thread.tid}) has waited for the GIL for {age:.1f} s: a thread holds it in native"
        f" code; {space.queue_depth} event(s) wait for their callbacks{_who_has_the_gil(look)}",
        f"py-spy dump --native --pid {look.process.pid}",
    )


def _who_has_the_gil(look: Look) -> str:
    """Those that wait for it are asleep on a futex."""
    others = [
        f"{thread.name} ({thread.tid})"
        for thread in look.threads
        if thread.name not in (_MONITOR_NAME, _DISPATCHER_NAME)
        and (thread.state == "R" or (thread.syscall and thread.syscall[0] != FUTEX))
    ]
    return f"; it is one of: {', '.join(others)}" if 0 < len(others) <= 8 else ""


def _monitor(look: Look, space: Space, after_s: float) -> Iterator[Finding]:
    if not space.monitor_tid or space.monitor_state == 0:
        return
    thread = look.thread(space.monitor_tid)
    if thread is None or thread.name != _MONITOR_NAME:
        yield Finding(
            "HUNG",
            "the monitor thread has ended, and memory is watched still: munmap, mremap and madvise wait for"
            " ever",
            f"kill {look.process.pid}",
        )
        return
    age = look.age_s(space.monitor_loop_ns)
    if age >= max(after_s, _MONITOR_ROUND_S):
        yield Finding(
            "HUNG",
            f"the monitor ({thread.tid}) has not gone round for {age:.1f} s: it"
            f" {MONITOR_STATES.get(space.monitor_state, '?')}",
            _debug(look, space.lock_tid or space.monitor_tid),
        )


def _operations(look: Look, space: Space, after_s: float) -> Iterator[Finding]:
    for one in space.invalidations:
        age = look.age_s(one.since_ns)
        if not one.undelivered and age >= after_s:
            yield Finding(
                "SLOW",
                f"the change behind {one} has been under way for {age:.1f} s in {named(look, one.tid)};"
                " its callbacks have returned",
                _debug(look, one.tid),
            )


def _faults(look: Look) -> Iterator[Finding]:
    for thread in look.threads:
        since = look.asleep.get(thread.tid)
        if since is None:
            continue
        fault = thread.wchan.startswith("handle_userfault")
        what = "a page fault that nobody serves" if fault else "an event that nobody reads"
        yield Finding(
            "HUNG",
            f"{thread.name} ({thread.tid}) waits for userfaultfd: {what}; seen there for"
            f" {look.age_s(since):.2f} s, in {thread.where}",
            "see what the monitor does; a page fault may also be another userfaultfd's of the process",
        )


def _debug(look: Look, ns_tid: int) -> str:
    thread = look.thread(ns_tid)
    pid = look.process.pid
    if thread is None or thread.name == _MONITOR_NAME:
        return f"gdb -p {pid} -batch -ex 'thread apply all bt'"
    return f"py-spy dump --pid {pid}   # thread {thread.tid}"
