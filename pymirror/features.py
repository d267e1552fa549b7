# SPDX-License-Identifier: MIT
"""What this kernel and this process's privileges offer, what is lost without each, and what grants it.

The shim probes by trying; kernel versions are named for people only. ``PYMIRROR_DISABLE`` (names separated by
commas) and ``AddressSpace(disable=...)`` make pymirror do without features that are there.
"""

from __future__ import annotations

import errno
import os
import resource
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ._shim import ffi, lib
from .arguments import wrong
from .errors import FeatureError, MirrorError, check, errno_name

DISABLE_VARIABLE = "PYMIRROR_DISABLE"

_ABSENT = {
    errno.ENOSYS,
    errno.EINVAL,
    errno.ENOTTY,
    errno.EOPNOTSUPP,
    errno.ENOENT,
    errno.ENODEV,
    errno.ENXIO,
}


_NO_ROOM = {errno.EMFILE, errno.ENFILE}


@dataclass(frozen=True, slots=True)
class Feature:
    """One feature of the kernel: its name here, what pymirror cannot do without it, and how to get it.

    ``since`` is the first kernel that has it, ``config`` what that kernel must be built with; ``grant`` is
    the command that gives the privilege when the kernel has it and refuses it. Without the feature that it
    ``needs`` it is missing too.
    """

    name: str
    bit: int
    lost: str
    since: str
    config: str
    grant: str
    needs: str = ""


# Not setcap on the interpreter: a process with file capabilities is not dumpable, and its own
# /proc/self/pagemap is closed to it.
_CAPABLE = (
    "sudo setpriv --reuid=$USER --init-groups --inh-caps=+sys_admin,+sys_ptrace"
    " --ambient-caps=+sys_admin,+sys_ptrace {python} ...   # or run as root"
)
_UFFD = "sudo setfacl -m u:$USER:rw /dev/userfaultfd   # or: sudo sysctl -w vm.unprivileged_userfaultfd=1"
_PROC = "sudo mount -t proc proc /proc   # the process needs its own /proc, readable"

FEATURES: tuple[Feature, ...] = (
    Feature(
        "uffd",
        lib.PM_FEAT_UFFD,
        "as without wp_async; munmap, mremap, madvise and fork behind pymirror's back are found late,"
        " by comparing page tables; there is no device memory and no exclusive access",
        "4.11",
        "CONFIG_USERFAULTFD=y",
        _UFFD,
    ),
    Feature(
        "uffd_kernel",
        lib.PM_FEAT_UFFD_KERNEL,
        'device memory and exclusive access take fault_delivery="inline":'
        " a system call on a device-resident page gives EFAULT",
        "4.11",
        "CONFIG_USERFAULTFD=y",
        _UFFD,
        "uffd",
    ),
    Feature(
        "wp_async",
        lib.PM_FEAT_UFFD_WP_ASYNC,
        "files on disk are not watched, nor do copies of their pages move to a device,"
        " and pages that were shared with a child count as writable once it is gone",
        "6.7",
        "CONFIG_PTE_MARKER_UFFD_WP=y",
        _UFFD,
        "uffd",
    ),
    Feature(
        "wp_unpopulated",
        lib.PM_FEAT_UFFD_WP_UNPOPULATED,
        "nothing today: no page is write-protected before it is there",
        "6.4",
        "CONFIG_PTE_MARKER_UFFD_WP=y",
        _UFFD,
        "uffd",
    ),
    Feature(
        "uffd_events",
        lib.PM_FEAT_UFFD_EVENTS,
        "as without wp_async; munmap, mremap and madvise behind pymirror's back are found late,"
        " by comparing page tables; there is no device memory and no exclusive access",
        "4.11",
        "CONFIG_USERFAULTFD=y",
        _UFFD,
        "uffd",
    ),
    Feature(
        "event_fork",
        lib.PM_FEAT_UFFD_EVENT_FORK,
        "a fork by a raw clone() is not seen; os.fork() and libc's fork() are",
        "4.11",
        "CONFIG_USERFAULTFD=y",
        _CAPABLE,
        "uffd",
    ),
    Feature(
        "move",
        lib.PM_FEAT_UFFD_MOVE,
        "pages migrate by copying instead of moving: a huge page comes apart; there is no coherent memory",
        "6.8",
        "CONFIG_USERFAULTFD=y",
        _UFFD,
        "uffd",
    ),
    Feature(
        "sigbus",
        lib.PM_FEAT_UFFD_SIGBUS,
        'fault_delivery="inline" is not available',
        "4.14",
        "CONFIG_USERFAULTFD=y",
        _UFFD,
        "uffd",
    ),
    Feature(
        "pagemap",
        lib.PM_FEAT_PAGEMAP,
        "ranges cannot be looked at or faulted: fault() and snapshot() raise FeatureError"
        "; there is no device memory and no exclusive access",
        "4.2",
        "CONFIG_PROC_PAGE_MONITOR=y",
        _PROC,
    ),
    Feature(
        "pfn",
        lib.PM_FEAT_PFN,
        "pfns carry presence only, and a page that was exchanged for another is not noticed;"
        " there is no coherent memory and no DMA without an IOMMU",
        "4.2",
        "CONFIG_PROC_PAGE_MONITOR=y",
        _CAPABLE,
        "pagemap",
    ),
    Feature(
        "pagemap_scan",
        lib.PM_FEAT_PAGEMAP_SCAN,
        "a transparent huge page has order 0, and comes apart when it migrates",
        "6.7",
        "CONFIG_PROC_PAGE_MONITOR=y",
        _PROC,
        "pagemap",
    ),
    Feature(
        "procmap_query",
        lib.PM_FEAT_PROCMAP_QUERY,
        "vmas are read from the text of /proc/self/maps, which is slower",
        "6.11",
        "CONFIG_PROC_FS=y",
        _PROC,
    ),
    Feature(
        "populate",
        lib.PM_FEAT_POPULATE,
        "pages are faulted in one by one",
        "5.14",
        "CONFIG_MMU=y",
        "allow madvise() in the sandbox's seccomp profile",
    ),
    Feature(
        "process_vm",
        lib.PM_FEAT_PROCESS_VM,
        "a device cannot read or write memory; without populate too, no page can be faulted",
        "3.2",
        "CONFIG_CROSS_MEMORY_ATTACH=y",
        "allow process_vm_readv() and process_vm_writev() in the sandbox's seccomp profile",
    ),
    Feature(
        "io_uring",
        lib.PM_FEAT_IO_URING,
        "pages cannot be pinned: pin_user_pages() is not available",
        "5.19",
        "CONFIG_IO_URING=y",
        "sudo sysctl -w kernel.io_uring_disabled=0   # and allow it in the sandbox's seccomp profile",
    ),
    Feature(
        "guard",
        lib.PM_FEAT_GUARD,
        "copies of pages of a file on disk stay in system memory,"
        " with inline delivery those of a file in memory too",
        "6.15",
        "CONFIG_MMU=y",
        "boot with proc_mem.force_override=always   # and allow madvise() in the sandbox's seccomp profile",
    ),
)

_BY_NAME = {feature.name: feature for feature in FEATURES}
_UFFD_SOURCES = ("", "/dev/userfaultfd", "system call", "user-mode-only")


@dataclass(frozen=True, slots=True)
class Missing:
    """A feature that is not there: why, what is lost, and the command that grants it."""

    feature: str
    errno: int
    reason: str
    lost: str
    command: str


@dataclass(frozen=True, slots=True)
class Features:
    """The features found by one probe (``struct pm_features``).

    ``why`` has the errno that showed each missing feature to be missing. ``zero_pfn`` is 0 when unknown.
    ``uffd_source`` is where the userfaultfd comes from ("" for none), ``uffd_features`` the kernel's bits.
    """

    have: frozenset[str]
    why: dict[str, int]
    disabled: frozenset[str]
    zero_pfn: int
    uffd_source: str
    uffd_features: int

    def __contains__(self, name: object) -> bool:
        return name in self.have

    def require(self, name: str, what: str = "") -> None:
        """Raise FeatureError, in the name of the call ``what``, unless the feature is there."""
        if name in self.have:
            return
        missing = self.missing(name)
        raise FeatureError(name, missing.reason, missing.command, what=what, errno=missing.errno)

    def missing(self, name: str) -> Missing:
        """Why a feature is not there and what to do about it. Meaningful only where it is missing."""
        feature = _BY_NAME[name]
        if name in self.disabled:
            return Missing(
                name,
                errno.EOPNOTSUPP,
                f"switched off by {DISABLE_VARIABLE} or disable=",
                feature.lost,
                f"unset {DISABLE_VARIABLE}   # and leave {name!r} out of disable=",
            )
        if feature.needs and feature.needs not in self.have:
            needed = self.missing(feature.needs)
            reason = f"it needs {needed.feature!r}, which is missing too: {needed.reason}"
            return Missing(name, needed.errno, reason, feature.lost, needed.command)
        why = self.why.get(name, 0) or errno.EOPNOTSUPP
        return Missing(name, why, _reason(feature, why), feature.lost, _command(feature, why))

    def all_missing(self) -> list[Missing]:
        """Every feature that is not there, in the order of FEATURES."""
        return [self.missing(feature.name) for feature in FEATURES if feature.name not in self.have]


def disable_bits(names: Iterable[str]) -> int:
    """The ``disable`` bits of ``names`` and of PYMIRROR_DISABLE. EINVAL for a name that is no feature."""
    if isinstance(names, str):
        names = names.split(",")
    names = list(names) if isinstance(names, Iterable) else [names]
    if not all(isinstance(name, str) for name in names):
        raise wrong("AddressSpace", "disable", names, "names of features")
    bits = 0
    for name in [*names, *os.environ.get(DISABLE_VARIABLE, "").split(",")]:
        if not (name := name.strip()):
            continue
        if name not in _BY_NAME:
            raise MirrorError(
                errno.EINVAL,
                f"disable: no feature is called {name!r}",
                hint=f"name some of: {', '.join(_BY_NAME)} (disable=, {DISABLE_VARIABLE})",
            )
        bits |= 1 << _BY_NAME[name].bit
    return bits


def probe(disable: Iterable[str] = ()) -> Features:
    """Probe this kernel and process, without an address space."""
    bits = disable_bits(disable)
    found = ffi.new("struct pm_features *")
    check(lib.pm_features_probe(bits, found), "pm_features_probe")
    return from_native(found, bits)


def from_native(found: Any, disabled: int) -> Features:
    """A view of a filled ``struct pm_features``; ``disabled`` are the bits switched off by request."""
    have = {feature.name for feature in FEATURES if found.have >> feature.bit & 1}
    return Features(
        have=frozenset(have),
        why={feature.name: found.why[feature.bit] for feature in FEATURES if feature.name not in have},
        disabled=frozenset(feature.name for feature in FEATURES if disabled >> feature.bit & 1),
        zero_pfn=found.zero_pfn,
        uffd_source=_UFFD_SOURCES[found.uffd_source],
        uffd_features=found.uffd_features,
    )


def _reason(feature: Feature, why: int) -> str:
    text = f"{errno_name(why)} ({os.strerror(why)})"
    if _proc_is_missing(feature, why):
        return f"/proc is not mounted: {text}"
    if why in _ABSENT:
        return f"this kernel has not got it: {text}; it came with Linux {feature.since}, {feature.config}"
    return f"refused: {text}"


def _proc_is_missing(feature: Feature, why: int) -> bool:
    return feature.grant == _PROC and why == errno.ENOENT and not os.path.exists("/proc/self")


def _command(feature: Feature, why: int) -> str:
    if why in _NO_ROOM:
        return "ulimit -n 4096   # or close descriptors"
    if why == errno.ENOMEM:
        return memlock_command() if feature.name == "io_uring" else "free some memory"
    if why in _ABSENT and not _proc_is_missing(feature, why):
        return f"boot Linux {feature.since} or newer built with {feature.config}"
    return feature.grant.replace("{python}", _interpreter())


def memlock_command() -> str:
    """The shell's command that lets more memory be pinned."""
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if hard == resource.RLIM_INFINITY:
        return "ulimit -l unlimited"
    if hard > soft:
        return f"ulimit -l {hard >> 10}   # in KiB; beyond it: sudo prlimit --pid $$ --memlock=unlimited"
    return "sudo prlimit --pid $$ --memlock=unlimited"


def _interpreter() -> str:
    return sys.executable or "python3"
