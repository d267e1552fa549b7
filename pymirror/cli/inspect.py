"""`pymirror inspect`: a running or hung process, seen from outside."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

from pymirror.cli.main import EXIT_FAILURE, EXIT_OK, positive_int, seconds
from pymirror.cli.text import Lines, console
from pymirror.inspection import Finding, Look, Space, Watch, diagnose, look_at
from pymirror.inspection.diagnosis import named, waiters
from pymirror.inspection.status import DISPATCH_STATES, MONITOR_STATES


class InspectCommand:
    """Look at a running or hung process from outside: what is held, what runs, what waits, what is wrong.

    Reads /proc/PID and the status page that native code keeps there. The process is asked for nothing, so
    it may hang, be stopped, or have its GIL stuck. The diagnosis comes first: HUNG, STOPPED or SLOW with
    what to do next, or "no problem seen". Kernel stacks, and processes of other users, need root.

    examples:
      pymirror inspect 4242             one look
      pymirror inspect 4242 --watch 1   a look every second, until Ctrl-C
      pymirror inspect 4242 --json | jq .problems

    exit codes:
      0  no problem seen
      1  a problem was seen
      3  no look possible: no such process, no address space in it, no permission, another version's status
         page; the message says which, and the command that helps

    --json prints one object (with --watch one a line, a line a look):
      pid, name, uid, state, threads    the process; state is the kernel's letter, threads how many
      pinned_bytes                      of all its memory (VmPin)
      problems                          list of {kind, text, do}
      spaces                            one an address space. Ages are in seconds, null: not so now
        fd, version, state, age_s       of the status page; state "open" or "closing"
        inherited_from                  the pid whose page it is, where a raw clone() took it along, or null
        device_lock                     {tid, thread, age_s, waiters}, null when free
        monitor                         {tid, state, round_age_s}
        dispatcher                      {tid, state, age_s, callback_age_s}
        invalidations                   list of {event, start, end, guarantee, age_s, tid, callbacks_run}
        events                          {queued, oldest_age_s, overflows, by_type}
        accesses                        {inflight, oldest_age_s, tid}
        notifiers, table_entries        numbers of notifiers and ranges, and of device page-table entries
        watched                         {ranges, bytes}
      userfaultfds                      list of {fd, pending, total}: faults unread, and faults not resolved
      locks                             waits for the mmap lock and driver locks: list of {lock, tid, age_s,
                                        holder_tid, held_s}
      waiting                           threads asleep in userfaultfd: list of {tid, thread, age_s, where}
      pages                             4 KiB pages of watched memory: total, looked_at, present, absent, and
                                        huge, zero, swapped, file among them (null: this kernel does not
                                        tell); why: what kept from looking at all, or ""
      where                             by tid: {thread, state, where, stack} of every thread named above
      unseen                            what could not be read, and the command that grants it
    """

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("pid", metavar="PID", type=positive_int, help="the process")
        parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
        parser.add_argument(
            "--watch", metavar="SECONDS", type=seconds, help="look again and again, until Ctrl-C"
        )
        parser.add_argument(
            "--after",
            metavar="SECONDS",
            type=seconds,
            default=2.0,
            help="what has waited for so long is a problem (default: 2)",
        )

    def run(self, args: argparse.Namespace) -> int:
        watch = Watch()
        while True:
            look = look_at(args.pid, watch)
            found = diagnose(look, args.after)
            if args.json:
                json.dump(to_json(look, found), sys.stdout, indent=None if args.watch else 2)
                print()
            else:
                _print(look, found, clear=bool(args.watch))
            if not args.watch:
                return EXIT_FAILURE if found else EXIT_OK
            sys.stdout.flush()
            time.sleep(args.watch)


def to_json(look: Look, found: list[Finding]) -> dict[str, Any]:
    process = look.process
    return {
        "pid": process.pid,
        "name": process.name,
        "uid": process.uid,
        "state": process.state,
        "threads": process.threads,
        "pinned_bytes": process.pinned_bytes,
        "problems": [{"kind": one.kind, "text": one.text, "do": one.do} for one in found],
        "spaces": [_space_json(look, space) for space in look.spaces],
        "userfaultfds": [
            {"fd": one.fd, "pending": one.pending, "total": one.total} for one in look.userfaultfds
        ],
        "locks": [
            {
                "lock": one.lock,
                "tid": _tid(look, one.tid),
                "age_s": look.age_s(one.since_ns),
                "holder_tid": _tid(look, one.holder_tid),
                "held_s": _age(look, one.held_since_ns),
            }
            for one in look.waits()
        ],
        "waiting": [
            {
                "tid": thread.tid,
                "thread": thread.name,
                "age_s": look.age_s(look.asleep[thread.tid]),
                "where": thread.where,
            }
            for thread in look.threads
            if thread.tid in look.asleep
        ],
        "pages": look.pages.to_json(),
        "where": {
            str(thread.tid): {
                "thread": thread.name,
                "state": thread.state,
                "where": thread.where,
                "stack": list(thread.stack),
            }
            for thread in look.concerned()
        },
        "unseen": look.unseen,
    }


def _space_json(look: Look, space: Space) -> dict[str, Any]:
    return {
        "fd": space.fd,
        "version": space.version,
        "state": space.state,
        "age_s": look.age_s(space.opened_ns),
        "inherited_from": space.inherited_from or None,
        "device_lock": {
            "tid": _tid(look, space.lock_tid),
            "thread": _name(look, space.lock_tid),
            "age_s": _age(look, space.lock_since_ns),
            "waiters": [thread.tid for thread in waiters(look, space)],
        }
        if space.lock_tid
        else None,
        "monitor": {
            "tid": _tid(look, space.monitor_tid),
            "state": MONITOR_STATES.get(space.monitor_state, "?"),
            "round_age_s": _age(look, space.monitor_loop_ns),
        },
        "dispatcher": {
            "tid": _tid(look, space.dispatch_tid),
            "state": DISPATCH_STATES.get(space.dispatch_state, "?"),
            "age_s": _age(look, space.dispatch_since_ns),
            "callback_age_s": _age(look, space.callback_since_ns),
        },
        "invalidations": [
            {
                "event": one.event,
                "start": one.start,
                "end": one.end,
                "guarantee": one.guarantee,
                "age_s": look.age_s(one.since_ns),
                "tid": _tid(look, one.tid),
                "callbacks_run": one.undelivered,
            }
            for one in space.invalidations
        ],
        "events": {
            "queued": space.queue_depth,
            "oldest_age_s": _age(look, space.oldest_event_ns),
            "overflows": space.queue_overflows,
            "by_type": space.events,
        },
        "accesses": {
            "inflight": space.inflight,
            "oldest_age_s": _age(look, space.inflight_since_ns),
            "tid": _tid(look, space.inflight_tid),
        },
        "notifiers": space.notifiers,
        "table_entries": space.table_entries,
        "watched": {"ranges": space.watched_ranges, "bytes": space.watched_bytes},
    }


def _age(look: Look, since_ns: int) -> float | None:
    return look.age_s(since_ns) if since_ns else None


def _tid(look: Look, ns_tid: int) -> int | None:
    thread = look.thread(ns_tid) if ns_tid else None
    return thread.tid if thread else None


def _name(look: Look, ns_tid: int) -> str | None:
    thread = look.thread(ns_tid) if ns_tid else None
    return thread.name if thread else None


def _print(look: Look, found: list[Finding], clear: bool) -> None:
    lines = Lines()
    process = look.process
    lines.add(
        f"process {process.pid} ({process.name}) of uid {process.uid}, {process.state_text},"
        f" {process.threads} thread(s), {time.strftime('%H:%M:%S')}"
    )
    for one in found:
        lines.add(str(one), "bold red" if one.kind == "HUNG" else "bold yellow")
        lines.add(f"  do: {one.do}")
    if not found:
        lines.add("no problem seen", "green")
    for space in look.spaces:
        _space(lines, look, space)
    _waits(lines, look)
    _pages(lines, look)
    _threads(lines, look)
    for line in look.unseen:
        lines.add(f"not seen: {line}", "yellow")
    if clear and console().is_terminal:
        sys.stdout.write("\x1b[H\x1b[2J")
    elif clear:
        lines.add()
    lines.write()


def _space(lines: Lines, look: Look, space: Space) -> None:
    lines.add()
    lines.add(
        f"address space at fd {space.fd}: {space.state} for {look.age_s(space.opened_ns):.1f} s,"
        f" pymirror {space.version}",
        "bold",
    )
    if space.inherited_from:
        lines.add(f"  inherited from process {space.inherited_from} by a raw clone(): look at that one")
        return
    lines.pair("device lock", _lock_text(look, space))
    lines.pair("monitor", _monitor_text(look, space))
    lines.pair("dispatcher", _dispatcher_text(look, space))
    oldest = f", the oldest without its callbacks for {_ago(look, space.oldest_event_ns)}"
    lines.pair(
        "events",
        f"{space.queue_depth} queued{oldest if space.oldest_event_ns else ''};"
        f" {space.queue_overflows} overflow(s)",
    )
    counts = ", ".join(f"{name} {number:,}" for name, number in space.events.items() if number)
    lines.pair("", f"so far: {counts or 'none'}")
    lines.pair("invalidations", f"{space.active} running, sequence {space.seq}")
    for one in space.invalidations:
        step = "callbacks run" if one.undelivered else "callbacks have returned"
        lines.pair("", f"{one} for {_ago(look, one.since_ns)} in {named(look, one.tid)}; {step}")
    inflight = f", the oldest for {_ago(look, space.inflight_since_ns)} in {named(look, space.inflight_tid)}"
    lines.pair("accesses", f"{space.inflight} in flight{inflight if space.inflight else ''}")
    lines.pair(
        "mirrors",
        f"{space.notifiers} interval notifier(s) and ranges,"
        f" {space.table_entries:,} device page-table entries",
    )
    lines.pair("watched", f"{space.watched_ranges} range(s), {space.watched_bytes:,} bytes")


def _waits(lines: Lines, look: Look) -> None:
    lines.add()
    lines.add("waiting", "bold")
    for one in look.waits():
        by = f"{named(look, one.holder_tid)} for {_ago(look, one.held_since_ns)}"
        lines.pair(
            "lock",
            f"{named(look, one.tid)} for {one.lock!r} for {_ago(look, one.since_ns)},"
            f" held by {by if one.holder_tid else 'nobody who is known'}",
        )
    for thread in look.threads:
        if thread.tid in look.asleep:
            since = _ago(look, look.asleep[thread.tid])
            lines.pair("userfaultfd", f"{thread.name} ({thread.tid}), seen there for {since}: {thread.where}")
    for fd in look.userfaultfds:
        lines.pair("userfaultfd", f"fd {fd.fd}: {fd.pending} fault(s) unread, {fd.total} not resolved")
    if not (look.waits() or look.asleep or look.userfaultfds):
        lines.pair("nothing", "no thread waits for a lock or a fault, as far as can be seen")


def _ago(look: Look, since_ns: int) -> str:
    return f"{look.age_s(since_ns):.1f} s"


def _lock_text(look: Look, space: Space) -> str:
    if not space.lock_tid:
        return "free"
    waiting = ", ".join(f"{thread.name} ({thread.tid})" for thread in waiters(look, space))
    return f"held by {named(look, space.lock_tid)} for {_ago(look, space.lock_since_ns)}" + (
        f"; waiting for it: {waiting}" if waiting else ""
    )


def _monitor_text(look: Look, space: Space) -> str:
    if not space.monitor_tid:
        return "not started: nothing is watched"
    state = MONITOR_STATES.get(space.monitor_state, "?")
    return f"{named(look, space.monitor_tid)} {state}; went round {_ago(look, space.monitor_loop_ns)} ago"


def _dispatcher_text(look: Look, space: Space) -> str:
    if not space.dispatch_tid:
        return "not started: no notifier is registered"
    if space.callback_since_ns:
        return f"{named(look, space.dispatch_tid)} calls back for {_ago(look, space.callback_since_ns)}"
    state = DISPATCH_STATES.get(space.dispatch_state, "?")
    return f"{named(look, space.dispatch_tid)} {state}"


def _pages(lines: Lines, look: Look) -> None:
    pages = look.pages
    lines.add()
    lines.add("pages of watched memory, 4 KiB each", "bold")
    if look.process.pinned_bytes:
        lines.pair("pinned", f"{look.process.pinned_bytes >> 12:,} of all memory")
    if not pages.looked_at:
        lines.pair("total", f"{pages.total:,}, none looked at" if pages.total else "none is watched")
        return
    seen = "" if pages.looked_at == pages.total else f", {pages.looked_at:,} looked at"
    lines.pair("total", f"{pages.total:,}{seen}")
    for name in ("present", "absent", "huge", "zero", "swapped", "file"):
        number = getattr(pages, name)
        lines.pair(name, "unknown on this kernel" if number is None else f"{number:,}")


def _threads(lines: Lines, look: Look) -> None:
    lines.add()
    lines.add("threads, and where they are in the kernel", "bold")
    for thread in look.concerned():
        lines.add(f"  {thread.tid} {thread.name}: {thread.where}")
        if thread.stack:
            lines.add(f"    kernel: {' < '.join(thread.stack[:6])}")
