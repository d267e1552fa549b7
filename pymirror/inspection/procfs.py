# SPDX-License-Identifier: MIT
"""Another process through /proc: its state, threads and descriptors. Only files that need no lock of its mm.

Numbers of threads are those of this process's pid namespace; the status page has those of the other's
(``ns_tid``).
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import MirrorError

_SYSCALLS = {
    0: "read",
    1: "write",
    7: "poll",
    9: "mmap",
    10: "mprotect",
    11: "munmap",
    16: "ioctl",
    17: "pread64",
    23: "select",
    25: "mremap",
    28: "madvise",
    34: "pause",
    35: "nanosleep",
    45: "recvfrom",
    56: "clone",
    57: "fork",
    61: "wait4",
    202: "futex",
    230: "clock_nanosleep",
    232: "epoll_wait",
    247: "waitid",
    257: "openat",
    270: "pselect6",
    271: "ppoll",
    281: "epoll_pwait",
    285: "fallocate",
    310: "process_vm_readv",
    311: "process_vm_writev",
    426: "io_uring_enter",
    435: "clone3",
}
FUTEX = 202
_STATES = {
    "R": "running",
    "S": "sleeping",
    "D": "in uninterruptible sleep",
    "T": "stopped",
    "t": "stopped by a debugger",
    "Z": "a zombie",
    "X": "dead",
    "I": "idle",
}


@dataclass(frozen=True, slots=True)
class Process:
    """A process: ``state`` is the kernel's letter, ``ns_pid`` its number in its own pid namespace.

    ``pinned_bytes`` is what the kernel counts as pinned in its mm (VmPin).
    """

    pid: int
    ns_pid: int
    name: str
    uid: int
    state: str
    tracer: int
    threads: int
    pinned_bytes: int = 0

    @property
    def state_text(self) -> str:
        return _STATES.get(self.state, self.state)


@dataclass(frozen=True, slots=True)
class Thread:
    """One thread, where the kernel shows it to be.

    ``wchan`` is the kernel function it sleeps in ("" unknown or running), ``syscall`` its number and six
    arguments (empty: running or not shown), ``stack`` the kernel's functions from the innermost, ``switches``
    how often it has left the CPU.
    """

    tid: int
    ns_tid: int
    name: str
    state: str
    wchan: str
    syscall: tuple[int, ...]
    stack: tuple[str, ...]
    switches: int
    blocks_sigbus: bool

    @property
    def in_userfaultfd(self) -> bool:
        """It sleeps until a page fault is served or an event is read."""
        return self.wchan.startswith(("handle_userfault", "userfaultfd_event_wait"))

    @property
    def where(self) -> str:
        """One line: the system call, and where in the kernel it sleeps."""
        parts = [_call(self.syscall)] if self.syscall else []
        if self.wchan:
            parts.append(f"asleep in {self.wchan}")
        if not parts:
            parts.append(f"{_STATES.get(self.state, self.state)}, no system call shown")
        return ", ".join(parts)


def _call(syscall: tuple[int, ...]) -> str:
    number, *args = syscall
    name = _SYSCALLS.get(number, f"system call {number}")
    return f"{name}({', '.join(f'{arg:#x}' for arg in args[:4])})"


def read(path: str) -> str | None:
    """The text of a /proc file, or None where it is gone or refused."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return None


def printable(text: str) -> str:
    """What another process calls itself, without what a terminal would obey."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def fields(text: str) -> dict[str, str]:
    """`Name:  value` lines, as of /proc/PID/status."""
    pairs = (line.partition(":") for line in text.split("\n"))
    return {name.strip(): value.strip() for name, _, value in pairs}


def process(pid: int) -> Process:
    """ESRCH: there is none."""
    text = read(f"/proc/{pid}/status")
    if text is None:
        if not os.path.exists("/proc/self"):
            raise MirrorError(
                errno.ENOENT, "inspect: /proc is not mounted here", hint="sudo mount -t proc proc /proc"
            )
        raise MirrorError(errno.ESRCH, f"there is no process {pid}", hint="ps -ef | grep python")
    status = fields(text)
    name = printable(status.get("Name", "?"))
    if status.get("State", "?")[0] in "ZX":
        raise MirrorError(
            errno.ESRCH,
            f"inspect: process {pid} ({name}) has ended; it is a zombie until process"
            f" {status.get('PPid', '?')} waits for it",
            hint="nothing of its memory is left to look at",
        )
    return Process(
        pid=int(status.get("Tgid", pid)),
        ns_pid=_innermost(status, pid),
        name=name,
        uid=int(status.get("Uid", "0").split()[0]),
        state=status.get("State", "?")[:1],
        tracer=int(status.get("TracerPid", 0)),
        threads=int(status.get("Threads", 0)),
        pinned_bytes=int(status.get("VmPin", "0").split()[0]) << 10,
    )


def _innermost(status: dict[str, str], otherwise: int) -> int:
    numbers = status.get("NSpid", "").split()
    return int(numbers[-1]) if numbers else otherwise


def threads(pid: int) -> list[Thread]:
    try:
        tids = sorted(map(int, os.listdir(f"/proc/{pid}/task")))
    except OSError:
        return []
    return [found for tid in tids if (found := thread(pid, tid)) is not None]


def thread(pid: int, tid: int) -> Thread | None:
    """None when it has ended."""
    folder = f"/proc/{pid}/task/{tid}"
    text = read(f"{folder}/status")
    if text is None:
        return None
    status = fields(text)
    wchan = (read(f"{folder}/wchan") or "").strip()
    return Thread(
        tid=tid,
        ns_tid=_innermost(status, tid),
        name=printable(status.get("Name", "?")),
        state=status.get("State", "?")[:1],
        wchan="" if wchan == "0" else wchan,
        syscall=_parse_syscall(read(f"{folder}/syscall") or ""),
        stack=tuple(_parse_stack(read(f"{folder}/stack") or "")),
        switches=int(status.get("voluntary_ctxt_switches", 0)),
        blocks_sigbus=blocks_sigbus(status),
    )


def blocks_sigbus(status: dict[str, str]) -> bool:
    """Of a thread's /proc status: SIGBUS is signal 7, bit 6."""
    return bool(int(status.get("SigBlk", "0"), 16) >> 6 & 1)


def _parse_syscall(text: str) -> tuple[int, ...]:
    words = text.split()
    if len(words) < 7 or words[0] == "-1":
        return ()
    return (int(words[0]), *(int(word, 16) for word in words[1:7]))


def _parse_stack(text: str) -> Iterator[str]:
    for line in text.splitlines():
        name = line.split(" ", 1)[-1].partition("+")[0].strip()
        if name and not name.startswith(("entry_SYSCALL", "do_syscall", "0x")):
            yield name


def as_root(arguments: str) -> str:
    """Of pymirror, by its interpreter: the path that sudo searches has no virtual environment's commands."""
    return f"sudo {sys.executable or 'python3'} -m pymirror.cli {arguments}"


def permission_hint(pid: int) -> str:
    if os.geteuid() != 0:
        return as_root(f"inspect {pid}")
    return "run it with CAP_SYS_PTRACE in the user namespace of that process"


def descriptors(process: Process) -> dict[int, str]:
    """What each descriptor leads to. EACCES when this user may not look."""
    folder = f"/proc/{process.pid}/fd"
    found: dict[int, str] = {}
    try:
        for name in os.listdir(folder):
            try:
                found[int(name)] = os.readlink(f"{folder}/{name}")
            except FileNotFoundError:
                continue
    except PermissionError:
        raise MirrorError(
            errno.EACCES,
            f"inspect: process {process.pid} ({process.name}) is uid {process.uid}'s,"
            f" and its descriptors are closed to uid {os.geteuid()}",
            hint=permission_hint(process.pid),
        ) from None
    except (FileNotFoundError, ProcessLookupError):
        raise MirrorError(
            errno.ESRCH, f"inspect: process {process.pid} has ended meanwhile", hint="ps -ef | grep python"
        ) from None
    return found


@dataclass(frozen=True, slots=True)
class Userfaultfd:
    """``pending`` faults that nobody has read, ``total`` with those read and not resolved."""

    fd: int
    pending: int
    total: int


def userfaultfds(pid: int, links: dict[int, str]) -> list[Userfaultfd]:
    found = []
    for fd, target in sorted(links.items()):
        if "userfaultfd" not in target:
            continue
        info = fields(read(f"/proc/{pid}/fdinfo/{fd}") or "")
        if "pending" in info:
            found.append(Userfaultfd(fd, int(info["pending"]), int(info.get("total", 0))))
    return found


def clock_offset_ns(pid: int) -> int:
    """What CLOCK_MONOTONIC of that process is ahead of this one's: 0 unless their time namespaces differ."""
    return _monotonic_offset(pid) - _monotonic_offset("self")


def _monotonic_offset(pid: int | str) -> int:
    for line in (read(f"/proc/{pid}/timens_offsets") or "").splitlines():
        words = line.split()
        if len(words) == 3 and words[0] in ("monotonic", "1"):
            return int(words[1]) * 10**9 + int(words[2])
    return 0
