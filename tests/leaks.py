"""What a test may not leave behind: threads, children, descriptors, named mappings, memory, armed seams."""

from __future__ import annotations

import gc
import os
import time
from dataclasses import dataclass

PATIENCE_S = 2.0
# malloc and the stacks that glibc keeps for later threads come and go; a large Region forgotten is more.
MEMORY_TOLERANCE = 96 << 20
_NAMES = ("/pymirror-", "memfd:", "anon_hugepage", "/dev/zero")


@dataclass(frozen=True)
class Holdings:
    """What the process holds at one moment."""

    threads: frozenset[int]
    children: frozenset[int]
    fds: frozenset[tuple[int, str]]
    mappings: frozenset[str]
    memory: int

    @classmethod
    def now(cls) -> Holdings:
        mappings, memory = _mappings()
        threads = frozenset(map(int, os.listdir("/proc/self/task")))
        return cls(threads, _children(threads), _fds(), mappings, memory)

    def beyond(self, before: Holdings) -> list[str]:
        """Lines that say what is held now and was not before."""
        lines = [f"thread {tid} ({_thread_name(tid)})" for tid in sorted(self.threads - before.threads)]
        lines += [f"child process {pid}" for pid in sorted(self.children - before.children)]
        lines += [f"fd {fd} -> {target}" for fd, target in sorted(self.fds - before.fds)]
        lines += [f"mapping {line}" for line in sorted(self.mappings - before.mappings)]
        if self.memory - before.memory > MEMORY_TOLERANCE:
            lines.append(f"{(self.memory - before.memory) >> 20} MiB of private memory")
        return lines


def _children(threads: frozenset[int]) -> frozenset[int]:
    found: set[int] = set()
    for tid in threads:
        try:
            with open(f"/proc/self/task/{tid}/children") as children:
                found.update(map(int, children.read().split()))
        except OSError:
            continue
    return frozenset(found)


def _fds() -> frozenset[tuple[int, str]]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            found.add((int(name), os.readlink(f"/proc/self/fd/{name}")))
        except FileNotFoundError:
            continue
    return frozenset(found)


def _mappings() -> tuple[frozenset[str], int]:
    named, memory = set(), 0
    with open("/proc/self/maps") as maps:
        for line in maps:
            span, prot, _, _, inode, *name = line.split(maxsplit=5)
            if name and any(part in name[0] for part in _NAMES):
                named.add(f"{span} {name[0].strip()}")
            elif inode == "0" and prot.startswith("rw"):
                start, end = (int(part, 16) for part in span.split("-"))
                memory += end - start
    return frozenset(named), memory


def _thread_name(tid: int) -> str:
    try:
        with open(f"/proc/self/task/{tid}/comm") as comm:
            return comm.read().strip()
    except OSError:
        return "gone"


def left_behind(before: Holdings) -> list[str]:
    """What is held beyond ``before``, after garbage has been collected and threads had time to end."""
    if not (lines := Holdings.now().beyond(before)):
        return []
    deadline = time.monotonic() + PATIENCE_S
    gc.collect()
    while (lines := Holdings.now().beyond(before)) and time.monotonic() < deadline:
        time.sleep(0.01)
    return lines


def armed_seams() -> list[str]:
    """Points and injections that a test left armed; disarms them."""
    from pymirror._shim import ffi, lib

    lines = []
    for number, name in ffi.typeof("enum pm_point").elements.items():
        if name == "PM_POINT_COUNT":
            continue
        if lib.pm_point_arm(number) != 0:
            lines.append(f"{name} is armed")
        lib.pm_point_release(number)
    if struck := lib.pm_inject_clear():
        lines.append(f"an injected error was not cleared (it struck {struck} times)")
    return lines
