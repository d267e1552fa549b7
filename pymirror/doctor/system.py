# SPDX-License-Identifier: MIT
"""What the checks read of the system: files of /proc and /sys, this process's privileges, sizes in words."""

from __future__ import annotations

import os
from dataclasses import dataclass

from ..inspection.procfs import fields, read

#: linux/capability.h, by number.
CAPABILITIES = (
    "chown",
    "dac_override",
    "dac_read_search",
    "fowner",
    "fsetid",
    "kill",
    "setgid",
    "setuid",
    "setpcap",
    "linux_immutable",
    "net_bind_service",
    "net_broadcast",
    "net_admin",
    "net_raw",
    "ipc_lock",
    "ipc_owner",
    "sys_module",
    "sys_rawio",
    "sys_chroot",
    "sys_ptrace",
    "sys_pacct",
    "sys_admin",
    "sys_boot",
    "sys_nice",
    "sys_resource",
    "sys_time",
    "sys_tty_config",
    "mknod",
    "lease",
    "audit_write",
    "audit_control",
    "setfcap",
    "mac_override",
    "mac_admin",
    "syslog",
    "wake_alarm",
    "block_suspend",
    "audit_read",
    "perfmon",
    "bpf",
    "checkpoint_restore",
)


@dataclass(frozen=True, slots=True)
class Privileges:
    """Of this process. ``capabilities`` are the effective ones, None where /proc does not tell.

    In a ``user_namespace`` of its own (a rootless container) they count for what belongs to it only. What is
    not in the ``bounding`` set nothing gives to this process or its children: a container's root, for one.
    """

    uid: int
    capabilities: frozenset[str] | None
    no_new_privs: bool
    seccomp: bool
    user_namespace: bool
    bounding: frozenset[str] | None = None

    @classmethod
    def own(cls) -> Privileges:
        status = fields(read("/proc/self/status") or "")
        held, bounding = status.get("CapEff"), status.get("CapBnd")
        return cls(
            uid=os.geteuid(),
            capabilities=None if held is None else frozenset(_names(int(held, 16))),
            no_new_privs=status.get("NoNewPrivs") == "1",
            seccomp=status.get("Seccomp") == "2",
            user_namespace=_in_user_namespace(),
            bounding=None if bounding is None else frozenset(_names(int(bounding, 16))),
        )

    def has(self, name: str) -> bool:
        """Whether the kernel as a whole grants it. Where it is not known: what uid 0 usually has."""
        if self.user_namespace:
            return False
        return self.uid == 0 if self.capabilities is None else name in self.capabilities

    def can_get(self, name: str) -> bool:
        return self.bounding is None or name in self.bounding


def _in_user_namespace() -> bool:
    """The first one maps every uid there is onto itself."""
    words = (read("/proc/self/uid_map") or "").split()
    return bool(words) and words != ["0", "0", "4294967295"]


def _names(bits: int) -> list[str]:
    known = [name for number, name in enumerate(CAPABILITIES) if bits >> number & 1]
    unknown = range(len(CAPABILITIES), bits.bit_length())
    return known + [f"cap_{number}" for number in unknown if bits >> number & 1]


def number(path: str) -> int | None:
    """A file that holds one number, None where it is not there or not for this user."""
    text = read(path)
    if text is None or not text.split():
        return None
    try:
        return int(text.split()[0])
    except ValueError:
        return None


def sysctl(name: str) -> int | None:
    """`vm.overcommit_memory` and its like."""
    return number("/proc/sys/" + name.replace(".", "/"))


def size(bytes_: int) -> str:
    """`64 MiB`, `1.5 GiB`: in the unit that leaves the fewest digits."""
    value = float(bytes_)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.4g} {unit}"
        value /= 1024
    return f"{value:.4g} TiB"
