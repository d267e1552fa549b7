"""Raw libc calls on memory: what other code in a process does without asking the library.

Each raises OSError with the kernel's errno. ctypes releases the GIL around them, as a C library's own call
would.
"""

from __future__ import annotations

import ctypes
import mmap as _mmap
import os

PROT_READ = _mmap.PROT_READ
PROT_WRITE = _mmap.PROT_WRITE

GUARD = _mmap.PAGESIZE

_MAP_FIXED = 0x10
_MREMAP_MAYMOVE = 1
_MREMAP_FIXED = 2
_FALLOC_FL_PUNCH_HOLE = 3  # with FALLOC_FL_KEEP_SIZE, without which the kernel refuses it

_libc = ctypes.CDLL(None, use_errno=True)
_addr, _len, _int, _off = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int64
_libc.mmap.argtypes = (_addr, _len, _int, _int, _int, _off)
_libc.mmap.restype = ctypes.c_void_p
_libc.munmap.argtypes = (_addr, _len)
_libc.mprotect.argtypes = (_addr, _len, _int)
_libc.madvise.argtypes = (_addr, _len, _int)
_libc.mremap.argtypes = (_addr, _len, _len, _int, _addr)
_libc.mremap.restype = ctypes.c_void_p
_libc.fallocate.argtypes = (_int, _int, _off, _off)

_FAILED = ctypes.c_void_p(-1).value


def _checked(failed: bool, what: str) -> None:
    if failed:
        err = ctypes.get_errno()
        raise OSError(err, f"{what}: {os.strerror(err)}")


def mmap(
    size: int, fd: int = -1, offset: int = 0, *, at: int | None = None, prot: int = PROT_READ | PROT_WRITE
) -> int:
    """Private anonymous memory, or a shared mapping of fd: over whatever is `at`, or where there is room."""
    flags = _mmap.MAP_SHARED if fd >= 0 else _mmap.MAP_PRIVATE | _mmap.MAP_ANONYMOUS
    if at is not None:
        flags |= _MAP_FIXED
    addr = _libc.mmap(at, size, prot, flags, fd, offset)
    _checked(addr == _FAILED, "mmap")
    return int(addr)


def mmap_guarded(size: int, fd: int = -1, offset: int = 0) -> int:
    """As mmap(), with a page without access behind it, so that the kernel merges it with nothing.

    mremap(2) moves whole vmas: a driver that mirrors (and so watches) a part of a merged one would split it.
    """
    return mmap(size, fd, offset, at=mmap(size + GUARD, prot=0))


def munmap_guarded(addr: int, size: int) -> None:
    munmap(addr, size + GUARD)


def mremap_guarded(addr: int, size: int) -> int:
    """Move what mmap_guarded() gave to another place; its new address."""
    new = mremap(addr, size, mmap(size + GUARD, prot=0))
    munmap(addr + size, GUARD)
    return new


def munmap(addr: int, size: int) -> None:
    _checked(_libc.munmap(addr, size) != 0, "munmap")


def mprotect(addr: int, size: int, prot: int) -> None:
    _checked(_libc.mprotect(addr, size, prot) != 0, "mprotect")


def madvise(addr: int, size: int, advice: int) -> None:
    _checked(_libc.madvise(addr, size, advice) != 0, "madvise")


def mremap(addr: int, size: int, to: int) -> int:
    """Move `size` bytes from addr over whatever is at `to`."""
    new = _libc.mremap(addr, size, size, _MREMAP_MAYMOVE | _MREMAP_FIXED, to)
    _checked(new == _FAILED, "mremap")
    return int(new)


def punch_hole(fd: int, offset: int, size: int) -> None:
    _checked(_libc.fallocate(fd, _FALLOC_FL_PUNCH_HOLE, offset, size) != 0, "fallocate")


def free_hugetlb_bytes() -> int:
    """Bytes of 2 MiB hugetlb pages to be had: free in the machine's pool, or beyond it by overcommit."""
    return max(0, _pool("free") + _pool("nr_overcommit") - _pool("surplus")) << 21


def _pool(name: str) -> int:
    try:
        with open(f"/sys/kernel/mm/hugepages/hugepages-2048kB/{name}_hugepages") as file:
            return int(file.read())
    except (OSError, ValueError):
        return 0
