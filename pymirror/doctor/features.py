# SPDX-License-Identifier: MIT
"""The features of the kernel, one check each, with the reason for a refusal where it can be found."""

from __future__ import annotations

import errno
import grp
import os
import pwd
import stat
from collections.abc import Iterator

from ..features import FEATURES, Feature, Features, Missing
from .check import Check, Status
from .system import Privileges, sysctl

AREA = "features"
_NODE = "/dev/userfaultfd"
_REFUSED = (errno.EPERM, errno.EACCES)
#: What EPERM means. The system call has a userfaultfd for everybody, but one that only user mode faults in.
_BY_CAPABILITY = {"pfn": "sys_admin", "event_fork": "sys_ptrace"}
_BY_FILTER = {
    "uffd": "userfaultfd()",
    "wp_async": "ioctl()",
    "move": "ioctl()",
    "process_vm": "process_vm_readv() and process_vm_writev()",
    "populate": "madvise()",
    "io_uring": "io_uring_setup(), io_uring_register() and io_uring_enter()",
}
_UFFD_SYSCTL = "sudo sysctl -w vm.unprivileged_userfaultfd=1"


def checks(found: Features, who: Privileges) -> Iterator[Check]:
    for feature in FEATURES:
        if feature.name in found:
            yield Check(AREA, feature.name, Status.OK, _there(feature, found))
            continue
        missing = found.missing(feature.name)
        yield Check(
            AREA,
            feature.name,
            Status.MISSING,
            "not to be had" if missing.feature not in found.disabled else "switched off",
            lost=missing.lost,
            why=_why(missing, found, who),
            command=_command(missing, found, who),
            data={"errno": missing.errno},
        )


def sources() -> Iterator[Check]:
    """Where a userfaultfd and an io_uring may come from, whether they did or not."""
    yield Check("userfaultfd", "device", Status.INFO, node(), data={"node": _NODE})
    allowed = sysctl("vm.unprivileged_userfaultfd")
    yield Check(
        "userfaultfd",
        "sysctl",
        Status.INFO,
        f"vm.unprivileged_userfaultfd {_not_there()}"
        if allowed is None
        else f"vm.unprivileged_userfaultfd = {allowed}: the system call gives one that resolves faults inside"
        f" system calls to {'everybody' if allowed else 'CAP_SYS_PTRACE'}",
        data={"vm.unprivileged_userfaultfd": allowed},
    )
    disabled, group = sysctl("kernel.io_uring_disabled"), sysctl("kernel.io_uring_group")
    yield Check(
        "io_uring",
        "sysctl",
        Status.INFO,
        f"kernel.io_uring_disabled {_not_there()}"
        if disabled is None
        else f"kernel.io_uring_disabled = {disabled}: {_io_uring_for(disabled, group)}",
        data={"kernel.io_uring_disabled": disabled, "kernel.io_uring_group": group},
    )


def _not_there() -> str:
    if not os.path.isdir("/proc/sys/kernel"):
        return "cannot be read: /proc/sys is not there"
    return "is not there: this kernel has no such switch"


def _io_uring_for(disabled: int, group: int | None) -> str:
    if disabled == 0:
        return "io_uring is for everybody"
    if disabled == 1:
        return f"io_uring is for CAP_SYS_ADMIN and members of kernel.io_uring_group = {group}"
    return "io_uring is for nobody"


def node() -> str:
    """The device node in words: mode, owner, and whether it can be opened."""
    try:
        seen = os.stat(_NODE)
    except OSError as error:
        return f"{_NODE} is not there ({error.strerror}); it came with Linux 6.1"
    opens = "open to" if os.access(_NODE, os.R_OK | os.W_OK, effective_ids=True) else "closed to"
    owner, group = _name(pwd.getpwuid, seen.st_uid), _name(grp.getgrgid, seen.st_gid)
    return f"{_NODE} is {stat.filemode(seen.st_mode)} {owner}:{group}, {opens} uid {os.geteuid()}"


def _name(lookup: object, number: int) -> str:
    try:
        return str(lookup(number)[0])  # type: ignore[operator]
    except KeyError:
        return str(number)


def _there(feature: Feature, found: Features) -> str:
    if feature.name == "uffd":
        return f"from {found.uffd_source}"
    return f"tried, works; came with Linux {feature.since}"


def _why(missing: Missing, found: Features, who: Privileges) -> str:
    if missing.feature in found.disabled or missing.errno not in _REFUSED:
        return missing.reason
    more = list(_reasons(_root_of(missing.feature, found), who))
    if who.seccomp and missing.feature != "pfn":
        more.append("a seccomp filter is on and may be what refuses")
    return "; ".join([missing.reason, *more])


def _root_of(name: str, found: Features) -> str:
    """The feature itself, or the one that it needs and that is missing too."""
    needs = next((feature.needs for feature in FEATURES if feature.name == name), "")
    return name if not needs or needs in found else needs


def _reasons(name: str, who: Privileges) -> Iterator[str]:
    if name in ("uffd", "uffd_kernel"):
        yield node()
        allowed = sysctl("vm.unprivileged_userfaultfd")
        yield f"vm.unprivileged_userfaultfd is {'not there' if allowed is None else allowed}"
        yield _held("sys_ptrace", who)
    elif name == "event_fork":
        yield _held("sys_ptrace", who)
    elif name == "pfn":
        yield _held("sys_admin", who)
    elif name == "io_uring":
        disabled = sysctl("kernel.io_uring_disabled")
        if disabled:
            yield f"kernel.io_uring_disabled is {disabled}"


def _held(name: str, who: Privileges) -> str:
    if who.user_namespace and name in (who.capabilities or ()):
        return f"CAP_{name.upper()} is held, but in this user namespace only"
    if who.has(name):
        return f"CAP_{name.upper()} is held"
    beyond = "" if who.can_get(name) else ", nor in the bounding set: nothing in here gives it"
    return f"CAP_{name.upper()} is not held{beyond}"


def _command(missing: Missing, found: Features, who: Privileges) -> str:
    """More exact than what the feature itself says, where the system shows which of its gates is shut."""
    if missing.feature in found.disabled or missing.errno not in _REFUSED:
        return missing.command
    root = _root_of(missing.feature, found)
    if who.user_namespace and root in _BY_CAPABILITY:
        return "sudo docker run --privileged ...   # or as root, outside of every user namespace"
    if root in _BY_CAPABILITY and not who.can_get(_BY_CAPABILITY[root]):
        return _start_container(who)
    if root in ("uffd", "uffd_kernel") and not os.path.exists(_NODE):
        return _UFFD_SYSCTL
    switch = sysctl("kernel.io_uring_disabled") if root == "io_uring" else 0
    if switch == 1:
        return "sudo sysctl -w kernel.io_uring_group=$(id -g)   # or kernel.io_uring_disabled=0"
    if root in _BY_FILTER and who.seccomp and not switch:
        return (
            f"docker run --security-opt seccomp=unconfined ...   # or allow {_BY_FILTER[root]} in its profile"
        )
    return missing.command


def _start_container(who: Privileges) -> str:
    """One command for all that this one was started without."""
    lacking = [name for name in _BY_CAPABILITY.values() if not who.can_get(name)]
    options = " ".join(f"--cap-add={name.upper()}" for name in lacking)
    return f"docker run {options} ...   # or the like of what started this without"
