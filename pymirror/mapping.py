# SPDX-License-Identifier: MIT
"""How memory of each kind is mapped: private, shared, of a file, in huge pages."""

from __future__ import annotations

import errno
import mmap as _mmap
import os
from pathlib import Path
from typing import Any

from . import affected
from ._shim import ffi, lib
from .affected import HUGE_SIZE, PAGE_SIZE
from .arguments import integer, shown
from .errors import MirrorError, check, error
from .refusals import refused_hint

_MAP_SHARED = _mmap.MAP_SHARED
_MAP_PRIVATE = _mmap.MAP_PRIVATE
_MAP_ANONYMOUS = _mmap.MAP_ANONYMOUS
_MAP_FIXED = 0x10
_MAP_HUGETLB = 0x40000
_MAP_HUGE_2MB = 21 << 26
_MFD_HUGE_2MB = 21 << 26

_HUGE = (None, "thp", "hugetlb")


def check_mmap(size: int, offset: int, fd: int, huge: str | None) -> tuple[int, int]:
    size, offset = integer("mmap", "size", size), integer("mmap", "offset", offset)
    fd = integer("mmap", "fd", fd)
    if size <= 0:
        wrong, hint = f"size {size}", "give a size in bytes, at least 1"
    elif offset < 0 or offset % PAGE_SIZE:
        wrong = f"offset {offset} is not a multiple of {PAGE_SIZE}"
        hint = f"give offset {offset // PAGE_SIZE * PAGE_SIZE if offset > 0 else 0}, and a larger size"
    elif huge not in _HUGE:
        wrong, hint = f"huge={shown(huge)} is no kind of page", 'give None, "thp" or "hugetlb"'
    elif huge == "hugetlb" and fd >= 0:
        wrong, hint = 'huge="hugetlb" with a file', "leave huge out: a file on hugetlbfs is huge by itself"
    elif fd < 0 and offset:
        wrong, hint = f"offset {offset} without a file", "give fd, or leave offset out"
    else:
        return affected.page_up(size, HUGE_SIZE if huge == "hugetlb" else PAGE_SIZE), offset
    raise MirrorError(errno.EINVAL, f"mmap: {wrong}", hint=hint)


def backing(size: int, shared: bool, fd: int, huge: str | None) -> int:
    """The Region's own descriptor: a duplicate of the caller's, a memfd for shared memory, else -1."""
    try:
        if fd >= 0:
            return os.dup(fd)
        if not shared:
            return -1
        flags = os.MFD_CLOEXEC | (os.MFD_HUGETLB | _MFD_HUGE_2MB if huge == "hugetlb" else 0)
        fd = os.memfd_create("pymirror", flags)
    except OSError as failed:
        number = failed.errno or errno.EIO
        what = f"mmap: fd {fd} cannot be duplicated" if fd >= 0 else "mmap: no memfd for shared memory"
        hint = "give a descriptor that is open" if number == errno.EBADF else None
        raise error(number, what, hint=hint) from None
    try:
        os.fchmod(fd, 0o600)
        os.ftruncate(fd, size)
    except OSError as failed:
        os.close(fd)
        hint = "give a size below 2**63, or see ulimit -f" if failed.errno == errno.EFBIG else None
        raise error(failed.errno or errno.EIO, f"mmap: a memfd of {size} bytes", hint=hint) from None
    return fd


def map_memory(
    native: Any, size: int, prot: int, shared: bool, fd: int, offset: int, huge: str | None
) -> int:
    flags = (_MAP_SHARED if shared else _MAP_PRIVATE) | (_MAP_ANONYMOUS if fd < 0 else 0)
    if huge == "hugetlb" and fd < 0:
        flags |= _MAP_HUGETLB | _MAP_HUGE_2MB
    if huge == "thp":
        return _map_aligned(native, size, prot, flags, fd, offset)
    ret, addr = _map_call(native, 0, size, prot, flags, fd, offset)
    if ret == -errno.ENOMEM and huge == "hugetlb":
        raise _no_huge_pages(size)
    check(ret, f"mmap of {size} bytes", hint=refused_hint("mmap", -ret))
    return addr


def _map_aligned(native: Any, size: int, prot: int, flags: int, fd: int, offset: int) -> int:
    """Reserve too much, map over the aligned part, give the rest back."""
    room = size + HUGE_SIZE - PAGE_SIZE
    ret, reserved = _map_call(native, 0, room, 0, _MAP_PRIVATE | _MAP_ANONYMOUS, -1, 0)
    check(ret, f"mmap of {size} bytes", hint=refused_hint("mmap", -ret))
    addr = affected.page_up(reserved, HUGE_SIZE)
    ret, _ = _map_call(native, addr, size, prot, flags | _MAP_FIXED, fd, offset)
    if ret < 0:
        lib.pm_munmap(native, reserved, room)
        check(ret, f"mmap of {size} bytes", hint=refused_hint("mmap", -ret))
    for start, end in ((reserved, addr), (addr + size, reserved + room)):
        ret = lib.pm_munmap(native, start, end - start) if start < end else 0
        if ret < 0:
            lib.pm_munmap(native, reserved, room)
            check(ret, f"mmap of {size} bytes", hint=refused_hint("mmap", -ret))
    return addr


def _map_call(
    native: Any, addr: int, size: int, prot: int, flags: int, fd: int, offset: int
) -> tuple[int, int]:
    place = ffi.new("uint64_t *")
    ret = lib.pm_mmap(native, addr, size, prot, flags, fd, offset, place)
    return ret, int(place[0])


def _surplus() -> int:
    """Huge pages beyond the reserved ones that are in use already: they count against the limit."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("HugePages_Surp:"):
            return int(line.split()[1])
    return 0


def _no_huge_pages(size: int) -> MirrorError:
    pages = size // HUGE_SIZE
    return MirrorError(
        errno.ENOMEM,
        f"mmap: no {pages} free hugetlb pages of 2 MiB",
        hint=f"echo {pages + _surplus()} | sudo tee /proc/sys/vm/nr_overcommit_hugepages   # free memory;"
        f" or reserve them: echo {pages} | sudo tee /proc/sys/vm/nr_hugepages",
    )
