# SPDX-License-Identifier: MIT
"""One look at a process: everything that /proc and its status pages show at that moment."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from . import procfs
from .pages import Pages, count
from .procfs import Process, Thread, Userfaultfd, as_root
from .status import Space, Wait, spaces

#: Between two looks at the threads that sleep in userfaultfd: they are served in microseconds, or in 0.1 s
#: where the monitor waits for a device write.
SECOND_LOOK_S = 0.2
_FEW_THREADS = 32


@dataclass(frozen=True, slots=True)
class Look:
    """``now_ns`` is CLOCK_MONOTONIC of the process. ``asleep`` gives, by tid, since when (by the same clock)
    a thread has been seen asleep in userfaultfd without waking up; ``unseen`` names what was refused.
    """

    process: Process
    now_ns: int
    spaces: list[Space]
    threads: list[Thread]
    userfaultfds: list[Userfaultfd]
    pages: Pages
    asleep: dict[int, int]
    unseen: list[str] = field(default_factory=list)

    def age_s(self, since_ns: int) -> float:
        return max(0, self.now_ns - since_ns) / 1e9

    def thread(self, ns_tid: int) -> Thread | None:
        """The thread that calls itself ``ns_tid``, None when it has ended."""
        return next((thread for thread in self.threads if thread.ns_tid == ns_tid), None)

    def waits(self) -> list[Wait]:
        """The waits for locks of Python's, each once: every address space tells all of them."""
        every = (one for space in self.spaces if not space.inherited_from for one in space.waits)
        return [one for one in dict.fromkeys(every) if self.thread(one.tid)]

    def concerned(self) -> list[Thread]:
        """All threads where they are few, else the main one and who holds, runs or waits for something."""
        if len(self.threads) <= _FEW_THREADS:
            return self.threads
        tids = {self.process.ns_pid}
        locks = set()
        for space in self.spaces:
            tids |= {space.lock_tid, space.monitor_tid, space.dispatch_tid, space.inflight_tid}
            tids |= {one.tid for one in space.invalidations}
            tids |= {tid for one in space.waits for tid in (one.tid, one.holder_tid)}
            locks.add((procfs.FUTEX, space.lock_addr))
        return [
            thread
            for thread in self.threads
            if thread.ns_tid in tids or thread.in_userfaultfd or thread.syscall[:2] in locks
        ]


class Watch:
    """Remembers from look to look since when a thread has not moved."""

    def __init__(self) -> None:
        self._since: dict[tuple[int, int], int] = {}

    def asleep(self, threads: list[Thread], now_ns: int) -> dict[int, int]:
        keys = {(thread.tid, thread.switches): thread.tid for thread in threads if thread.in_userfaultfd}
        self._since = {key: self._since.get(key, now_ns) for key in keys}
        return {keys[key]: since for key, since in self._since.items()}


def look_at(pid: int, watch: Watch | None = None) -> Look:
    """Look at a process. Waits for nobody; at most some seconds for the kernel to count pages.

    ESRCH: no such process. ENOENT: no address space is open there. EACCES: this user may not look; the hint
    has the command. EPROTO: the status page is of another layout.
    """
    watch = watch or Watch()
    process = procfs.process(pid)
    links = procfs.descriptors(process)
    found = spaces(process, links)
    offset = procfs.clock_offset_ns(pid)
    threads = procfs.threads(pid)
    watch.asleep(threads, time.monotonic_ns() + offset)
    if any(thread.in_userfaultfd for thread in threads):
        time.sleep(SECOND_LOOK_S)
        found, threads = spaces(process, links), procfs.threads(pid)
    now = time.monotonic_ns() + offset
    asleep = {tid: since for tid, since in watch.asleep(threads, now).items() if since < now}
    ranges = sorted({span for space in found if not space.inherited_from for span in space.watched})
    pages = count(pid, ranges)
    return Look(
        process=process,
        now_ns=now,
        spaces=found,
        threads=threads,
        userfaultfds=procfs.userfaultfds(pid, links),
        pages=pages,
        asleep=asleep,
        unseen=_unseen(process, threads, pages),
    )


def _unseen(process: Process, threads: list[Thread], pages: Pages) -> list[str]:
    lines = []
    if not any(thread.syscall or thread.state == "R" for thread in threads):
        lines.append(
            "system calls of threads: the kernel shows them to whom it lets ptrace;"
            f" do: {as_root(f'inspect {process.pid}')}"
        )
    if not any(thread.stack for thread in threads):
        lines.append(
            "kernel stacks of threads: shown to CAP_SYS_ADMIN; do: " + as_root(f"inspect {process.pid}")
        )
    if pages.why:
        lines.append(f"pages: {pages.why}")
    return lines
