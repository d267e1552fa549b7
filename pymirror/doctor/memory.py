# SPDX-License-Identifier: MIT
"""Huge pages, limits on mappings, pins and descriptors, overcommit and swap."""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Iterator

from ..features import memlock_command
from ..inspection.procfs import fields, read
from .check import Check, Status
from .system import Privileges, size, sysctl
from .system import number as number_of

AREA = "memory"
_THP = "/sys/kernel/mm/transparent_hugepage/enabled"
_POOL = "/sys/kernel/mm/hugepages/hugepages-2048kB"
_MAPS = 65530
_FILES = 256
_FILES_OF_A_SPACE = 6
_PINNED = 64 << 20
# Newer kernels charge the ring itself too.
_RING = 2 * 4096


def checks(who: Privileges) -> Iterator[Check]:
    yield _thp()
    yield _hugetlb()
    yield _memlock(who)
    yield _nofile()
    yield _max_map_count()
    yield _overcommit()
    yield _swap()


def _thp() -> Check:
    text = read(_THP)
    if text is None:
        return Check(
            AREA,
            "thp",
            Status.MISSING,
            "no transparent huge pages",
            lost='huge="thp" gives pages of 4 KiB',
            why=f"{_THP} cannot be read",
            command="boot a kernel built with CONFIG_TRANSPARENT_HUGEPAGE=y; mount /sys",
        )
    chosen = re.search(r"\[(\w+)\]", text)
    mode = chosen[1] if chosen else "?"
    data = {"mode": mode}
    if mode == "never":
        return Check(
            AREA,
            "thp",
            Status.LIMITED,
            "never",
            lost='huge="thp" gives pages of 4 KiB',
            why=f"{_THP} says so",
            command=f"echo madvise | sudo tee {_THP}",
            data=data,
        )
    if fields(read("/proc/self/status") or "").get("THP_enabled") == "0":
        return Check(
            AREA,
            "thp",
            Status.LIMITED,
            f"{mode}, but not for this process",
            lost='huge="thp" gives pages of 4 KiB',
            why="prctl(PR_SET_THP_DISABLE) was called here or by a parent",
            command="start it from a process without it",
            data=data,
        )
    return Check(AREA, "thp", Status.OK, mode, data=data)


def _hugetlb() -> Check:
    names = ("free_hugepages", "resv_hugepages", "nr_overcommit_hugepages", "surplus_hugepages")
    found = {name: number_of(f"{_POOL}/{name}") for name in names}
    data: dict[str, object] = dict(found)
    if found["free_hugepages"] is None:
        return Check(
            AREA,
            "hugetlb",
            Status.MISSING,
            "no pool of 2 MiB pages",
            lost='huge="hugetlb" is ENOMEM',
            why=f"{_POOL} is not there",
            command="boot a kernel built with CONFIG_HUGETLBFS=y; mount /sys",
            data=data,
        )
    free, reserved, overcommit, surplus = (found[name] or 0 for name in names)
    left = max(0, free - reserved) + max(0, overcommit - surplus)
    data["available"] = left
    if left:
        value = f"{left} of 2 MiB to be had: {free} free, {reserved} reserved, overcommit {overcommit}"
        return Check(AREA, "hugetlb", Status.OK, value, data=data)
    return Check(
        AREA,
        "hugetlb",
        Status.MISSING,
        "0 pages of 2 MiB to be had",
        lost='huge="hugetlb" is ENOMEM',
        why=f"{free} free, {reserved} reserved, overcommit {overcommit} of which {surplus} are in use",
        command=f"echo {overcommit + 64} | sudo tee {_POOL}/nr_overcommit_hugepages",
        data=data,
    )


def _memlock(who: Privileges) -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    free = who.has("ipc_lock") or soft == resource.RLIM_INFINITY
    data = {
        "soft": _none(soft),
        "hard": _none(hard),
        "pinnable_bytes": None if free else max(0, soft - _RING),
    }
    if free:
        held = "CAP_IPC_LOCK is held" if who.has("ipc_lock") else "RLIMIT_MEMLOCK is unlimited"
        return Check(
            AREA, "memlock", Status.OK, f"as many bytes can be pinned as there are: {held}", data=data
        )
    value = f"{size(soft)} can be pinned by all processes of uid {os.getuid()} together, rings included"
    if soft >= _PINNED:
        return Check(AREA, "memlock", Status.OK, value, data=data)
    return Check(
        AREA,
        "memlock",
        Status.LIMITED if soft > _RING else Status.MISSING,
        value,
        lost="pin_user_pages() beyond it is ENOMEM",
        why=f"RLIMIT_MEMLOCK is {size(soft)}, hard {'unlimited' if hard < 0 else size(hard)},"
        " and CAP_IPC_LOCK is not held",
        command=memlock_command(),
        data=data,
    )


def _none(limit: int) -> int | None:
    return None if limit == resource.RLIM_INFINITY else limit


def _nofile() -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = _open_files()
    data = {"soft": _none(soft), "hard": _none(hard), "open": used}
    value = f"{soft} descriptors{'' if used is None else f', {used} open'}; an address space takes"
    value += f" {_FILES_OF_A_SPACE}"
    if soft == resource.RLIM_INFINITY or soft >= _FILES:
        return Check(AREA, "nofile", Status.OK, value, data=data)
    enough = soft - (used or 0) >= _FILES_OF_A_SPACE
    raised = _FILES * 4 if hard == resource.RLIM_INFINITY else min(hard, _FILES * 4)
    return Check(
        AREA,
        "nofile",
        Status.LIMITED if enough else Status.MISSING,
        value,
        lost="AddressSpace() and files are EMFILE beyond it",
        why=f"RLIMIT_NOFILE is {soft}, hard {hard}",
        command=f"ulimit -n {raised}" if hard > soft else "sudo prlimit --pid $$ --nofile=1024:4096",
        data=data,
    )


def _open_files() -> int | None:
    try:
        return len(os.listdir("/proc/self/fd")) - 1
    except OSError:
        return None


def _max_map_count() -> Check:
    limit = sysctl("vm.max_map_count")
    if limit is None:
        return _unknown("max_map_count", "vm.max_map_count")
    data = {"vm.max_map_count": limit}
    if limit >= _MAPS:
        return Check(AREA, "max_map_count", Status.OK, f"{limit} vmas a process", data=data)
    return Check(
        AREA,
        "max_map_count",
        Status.LIMITED,
        f"{limit} vmas a process",
        lost="watching and mprotect() of parts split vmas: beyond the limit they are ENOMEM",
        why=f"vm.max_map_count is below the usual {_MAPS}",
        command="sudo sysctl -w vm.max_map_count=262144",
        data=data,
    )


def _overcommit() -> Check:
    mode = sysctl("vm.overcommit_memory")
    if mode is None:
        return _unknown("overcommit", "vm.overcommit_memory")
    data = {"vm.overcommit_memory": mode}
    words = {0: "heuristic", 1: "always", 2: "never"}
    value = f"vm.overcommit_memory = {mode} ({words.get(mode, '?')})"
    if mode != 2:
        return Check(AREA, "overcommit", Status.OK, value, data=data)
    return Check(
        AREA,
        "overcommit",
        Status.LIMITED,
        value,
        lost="mmap() of large private memory is ENOMEM beyond the commit limit, untouched as it is",
        why="the kernel counts what is mapped, not what is used",
        command="sudo sysctl -w vm.overcommit_memory=0",
        data=data,
    )


def _swap() -> Check:
    text = read("/proc/swaps")
    if text is None:
        return Check(
            AREA, "swap", Status.UNKNOWN, "swap unknown", why="/proc/swaps cannot be read", command=_mount()
        )
    kib = sum(int(line.split()[2]) for line in text.splitlines()[1:])
    value = f"{size(kib << 10)}: pages can be swapped out, which shows as detected" if kib else "none"
    return Check(AREA, "swap", Status.INFO, value, data={"bytes": kib << 10})


def _unknown(name: str, key: str) -> Check:
    return Check(
        AREA,
        name,
        Status.UNKNOWN,
        f"{key} unknown",
        why=f"/proc/sys/{key.replace('.', '/')} cannot be read",
        command=_mount(),
    )


def _mount() -> str:
    return "sudo mount -t proc proc /proc"
