# SPDX-License-Identifier: MIT
"""ctypes arrays over given memory, whose buffer exports are counted.

ctypes exports buffers without a release slot, and numpy then refers to the exporter directly. With one, numpy
goes through a memoryview, and each buffer is given back. Only an extension type could fill the slots
properly.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

from ._shim import ffi, lib

# PyTypeObject: a PyVarObject head, tp_name, tp_basicsize, ..., tp_as_buffer. PyBufferProcs: get, release.
_WORD = ctypes.sizeof(ctypes.c_void_p)
_HEAD = object.__basicsize__ + _WORD
_BASICSIZE = _HEAD + _WORD
_AS_BUFFER = _HEAD + 17 * _WORD

_GET = int(ffi.cast("uintptr_t", ffi.addressof(lib, "pm_export_get")))
_RELEASE = int(ffi.cast("uintptr_t", ffi.addressof(lib, "pm_export_release")))


@lru_cache(maxsize=256)
def array_type(size: int, base: type) -> Any:
    """A class of arrays of ``size`` bytes, derived from ``base``; from_address() makes instances."""
    metaclass: Any = type(ctypes.Array)
    body = {"_type_": ctypes.c_ubyte, "_length_": size, "__module__": base.__module__}
    made = metaclass(base.__name__, (base, ctypes.Array), body)
    get, release = _slots(made)
    get.value, release.value = _GET, _RELEASE
    return made


def live_views(exporter: object) -> int:
    """How many buffers of an instance are held: memoryviews (numpy goes through them too) and others."""
    return ctypes.c_uint64.from_address(id(exporter) + _COUNT).value


def _slots(kind: type) -> tuple[ctypes.c_void_p, ctypes.c_void_p]:
    procs = ctypes.c_void_p.from_address(id(kind) + _AS_BUFFER).value
    assert procs is not None
    return ctypes.c_void_p.from_address(procs), ctypes.c_void_p.from_address(procs + _WORD)


def _check_layout() -> None:
    """Types are laid out as this module believes: the known answers of three built-in ones."""
    for kind, releases in ((bytes, False), (bytearray, True), (memoryview, True)):
        size = ctypes.c_ssize_t.from_address(id(kind) + _BASICSIZE).value
        if size != kind.__basicsize__ or bool(_slots(kind)[1].value) != releases:
            raise ImportError("pymirror does not know the type layout of this Python: use CPython")


def _free_word() -> int:
    """Where an array that lies elsewhere has a word to spare: where a small one has its items."""
    small = (ctypes.c_ubyte * _WORD)()
    offset = ctypes.addressof(small) - id(small)
    elsewhere = type(small).from_address(ctypes.addressof(small))
    inside = object.__basicsize__ <= offset <= ctypes.Array.__basicsize__ - _WORD
    if not inside or ctypes.c_uint64.from_address(id(elsewhere) + offset).value:
        raise ImportError("pymirror does not know the layout of this Python's ctypes arrays: use CPython")
    return offset


_check_layout()
_COUNT = _free_word()
lib.pm_export_init(ffi.cast("int (*)(void *, void *, int)", _slots(ctypes.c_ubyte * _WORD)[0].value), _COUNT)
