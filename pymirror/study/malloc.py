# SPDX-License-Identifier: MIT
"""The C library's malloc() and free(), which nobody asks the library about: what programs use."""

from __future__ import annotations

import ctypes
import errno

import numpy as np

from ..errors import MirrorError
from .stage import Bytes

#: Blocks from this size on are mappings of their own, which free() unmaps.
THRESHOLD = 128 << 10

_M_MMAP_THRESHOLD = -3

_libc = ctypes.CDLL(None, use_errno=True)
_libc.aligned_alloc.argtypes = (ctypes.c_size_t, ctypes.c_size_t)
_libc.aligned_alloc.restype = ctypes.c_void_p
_libc.free.argtypes = (ctypes.c_void_p,)
_libc.free.restype = None


def map_large_blocks() -> None:
    """Keep glibc's threshold where it begins. Otherwise the first free() of a mapped block raises it to the
    block's size, and the next ones come from a heap, or do not, as the program's past has it."""
    if hasattr(_libc, "mallopt"):
        _libc.mallopt(_M_MMAP_THRESHOLD, THRESHOLD)


def aligned_alloc(size: int) -> int:
    """malloc() of a power of two at a multiple of it: it crosses no window of a notifier. ENOMEM."""
    addr = _libc.aligned_alloc(size, size)
    if not addr:
        raise MirrorError(errno.ENOMEM, f"malloc of {size} bytes", hint="ask for less, or raise ulimit -v")
    return int(addr)


def free(addr: int) -> int:
    """Free a block, or nothing at 0; gives 0, for the variable that had the address."""
    _libc.free(addr or None)
    return 0


def view(addr: int, size: int) -> Bytes:
    """The block's bytes; not to be used after free()."""
    return np.frombuffer(memoryview((ctypes.c_uint8 * size).from_address(addr)), np.uint8)
