# SPDX-License-Identifier: MIT
"""Threads that block SIGBUS: the kernel kills a process whose thread meets an inline fault so."""

from __future__ import annotations

import os

from ..inspection import procfs
from .check import Check, Status

# Pymirror's own block all signals while they wait in native code, where they touch no mirrored memory; the
# kernel's io_uring workers have no user code.
_EXEMPT = ("pymirror-", "iou-")


def check(pid: int | None = None) -> Check:
    """Of this process, or of another one; ESRCH where there is no such process."""
    if pid is not None:
        procfs.process(pid)
    found = procfs.threads(pid or os.getpid())
    whose = "this process" if pid is None else f"process {pid}"
    if not found:
        return Check(
            "threads",
            "blocked_sigbus",
            Status.UNKNOWN,
            f"threads of {whose} unknown",
            why="/proc/PID/task cannot be read",
            command="sudo mount -t proc proc /proc",
        )
    blocking = [thread for thread in found if thread.blocks_sigbus and not thread.name.startswith(_EXEMPT)]
    data = {"threads": len(found), "blocking": [{"tid": one.tid, "name": one.name} for one in blocking]}
    if not blocking:
        return Check("threads", "blocked_sigbus", Status.OK, f"no thread of {whose} blocks SIGBUS", data=data)
    names = ", ".join(f"{thread.name} ({thread.tid})" for thread in blocking)
    return Check(
        "threads",
        "blocked_sigbus",
        Status.LIMITED,
        f"{len(blocking)} of {len(found)} threads of {whose} block SIGBUS: {names}",
        lost='with fault_delivery="inline" the kernel kills the process when such a thread touches a page'
        " that is on a device",
        why="SigBlk of /proc/PID/task/TID/status has bit 6 set",
        command="signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGBUS})   # in the thread, or in who"
        " starts it",
        data=data,
    )
