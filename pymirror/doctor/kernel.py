# SPDX-License-Identifier: MIT
"""The kernel, how it was built, who we are in it, and its HMM test device."""

from __future__ import annotations

import glob
import gzip
import platform
import resource
from collections.abc import Iterator

from ..inspection.procfs import as_root, read
from .check import Check, Status
from .system import Privileges, sysctl

#: Built in, and what goes without it.
_CONFIG = {
    "CONFIG_USERFAULTFD": "foreign changes are not told",
    "CONFIG_PTE_MARKER_UFFD_WP": "files on disk are not watched",
    "CONFIG_PROC_PAGE_MONITOR": "ranges cannot be looked at or faulted",
    "CONFIG_CROSS_MEMORY_ATTACH": "a device cannot read or write memory",
    "CONFIG_IO_URING": "pages cannot be pinned",
    "CONFIG_TRANSPARENT_HUGEPAGE": 'no huge="thp"',
    "CONFIG_HUGETLBFS": 'no huge="hugetlb"',
    "CONFIG_SWAP": "pages are never swapped out",
}
_HEX_ORACLE = "CONFIG_TEST_HMM"


def checks(who: Privileges) -> Iterator[Check]:
    yield _kernel()
    config, where = _config()
    yield _options(config, where)
    yield _oracle(config)
    yield from _who(who)


def _kernel() -> Check:
    machine, page = platform.machine(), resource.getpagesize()
    data = {"release": platform.release(), "machine": machine, "page_size": page}
    value = f"Linux {platform.release()}, {machine}, pages of {page} bytes"
    if machine == "x86_64" and page == 4096:
        return Check("kernel", "version", Status.OK, value, data=data)
    return Check(
        "kernel",
        "version",
        Status.MISSING,
        value,
        lost="pymirror is written for 4 KiB pages and the system calls of x86-64",
        why=f"this is {machine} with pages of {page} bytes",
        command="run it on an x86-64 machine",
        data=data,
    )


def _config() -> tuple[dict[str, str], str]:
    """The options that are set, and where that was read."""
    path = "/proc/config.gz"
    try:
        with gzip.open(path, "rt") as file:
            return _parse(file.read()), path
    except (OSError, EOFError):
        path = f"/boot/config-{platform.release()}"
    text = read(path)
    return ({}, "") if text is None else (_parse(text), path)


def _parse(text: str) -> dict[str, str]:
    pairs = (line.partition("=") for line in text.splitlines() if line.startswith("CONFIG_"))
    return {name: value for name, _, value in pairs}


def _options(config: dict[str, str], where: str) -> Check:
    if not config:
        return Check(
            "kernel",
            "config",
            Status.UNKNOWN,
            "how it was built cannot be read",
            why="neither /proc/config.gz nor a file of /boot is there",
            command="sudo modprobe configs   # where it is a module; features are tried, whatever it says",
        )
    off = [name for name in _CONFIG if name not in config]
    data = {"file": where, "options": {name: config.get(name, "n") for name in (*_CONFIG, _HEX_ORACLE)}}
    if not off:
        return Check("kernel", "config", Status.OK, f"all that is needed is built in ({where})", data=data)
    return Check(
        "kernel",
        "config",
        Status.LIMITED,
        f"{', '.join(off)} not set ({where})",
        lost="; ".join(_CONFIG[name] for name in off),
        why="this kernel was built without",
        command=f"build it with {' '.join(f'{name}=y' for name in off)}",
        data=data,
    )


def _oracle(config: dict[str, str]) -> Check:
    nodes = sorted(glob.glob("/dev/hmm_dmirror*"))
    data = {"nodes": nodes}
    if nodes:
        return Check("kernel", "hmm_dmirror", Status.OK, f"{', '.join(nodes)}: a real oracle", data=data)
    built = config.get(_HEX_ORACLE)
    value = "no /dev/hmm_dmirror*: the recordings are what there is to compare with"
    if built == "m":
        return Check("kernel", "hmm_dmirror", Status.INFO, value, command="sudo modprobe test_hmm", data=data)
    return Check(
        "kernel",
        "hmm_dmirror",
        Status.INFO,
        value,
        command="build a kernel with CONFIG_TEST_HMM=m, then: sudo modprobe test_hmm",
        data=data,
    )


def _who(who: Privileges) -> Iterator[Check]:
    data = {"uid": who.uid, "capabilities": None if who.capabilities is None else sorted(who.capabilities)}
    if who.capabilities is None:
        yield Check(
            "privileges",
            "capabilities",
            Status.UNKNOWN,
            f"uid {who.uid}, capabilities unknown",
            why="/proc/self/status cannot be read",
            command="sudo mount -t proc proc /proc",
            data=data,
        )
        return
    yield Check("privileges", "capabilities", Status.INFO, f"uid {who.uid}, {_caps(who)}", data=data)
    if who.user_namespace:
        yield Check(
            "privileges",
            "user_namespace",
            Status.INFO,
            "in a user namespace (a rootless container): capabilities count for what belongs to it only",
            data={"user_namespace": True},
        )
    if who.no_new_privs:
        yield Check(
            "privileges",
            "no_new_privs",
            Status.INFO,
            "no_new_privs is set: sudo and setpriv give nothing in here, run commands outside",
            data={"no_new_privs": True},
        )
    if who.seccomp:
        yield Check(
            "privileges",
            "seccomp",
            Status.INFO,
            "a seccomp filter is on: it may refuse userfaultfd, io_uring and process_vm_readv to every uid",
            command="docker run --security-opt seccomp=unconfined ...   # or a profile that allows them",
            data={"seccomp": True},
        )
    yield from _yama(who)


def _caps(who: Privileges) -> str:
    held = who.capabilities or frozenset()
    needed = ("sys_admin", "sys_ptrace", "ipc_lock", "sys_resource")
    some = [f"CAP_{name.upper()} {'yes' if name in held else 'no'}" for name in needed]
    return f"{len(held)} capabilities ({', '.join(some)})"


def _yama(who: Privileges) -> Iterator[Check]:
    scope = sysctl("kernel.yama.ptrace_scope")
    if not scope or who.has("sys_ptrace"):
        return
    yield Check(
        "privileges",
        "ptrace_scope",
        Status.LIMITED,
        f"kernel.yama.ptrace_scope = {scope}",
        lost="pymirror inspect does not show what system call another process's thread is in",
        why="yama lets only a parent look, and CAP_SYS_PTRACE is not held",
        command=f"sudo sysctl -w kernel.yama.ptrace_scope=0   # or: {as_root('inspect PID')}",
        data={"kernel.yama.ptrace_scope": scope},
    )
