# SPDX-License-Identifier: MIT
"""ctypes arrays over given memory, whose buffer exports can be counted.

ctypes exports buffers without a release slot, and numpy then refers to the exporter directly, from arrays
that the garbage collector does not track: such a view would be invisible. With a release slot, even one
that does nothing, numpy goes through a memoryview, which can be found. Only an extension type could fill
that slot properly.
"""

from __future__ import annotations

import ctypes
import gc
from functools import lru_cache
from typing import Any

# What holds an exporter's buffer: memoryview (numpy goes through it too) and cffi's from_buffer().
_HOLDERS = ("managedbuffer", "__CDataFromBuf")

# PyTypeObject: a PyVarObject head, tp_name, tp_basicsize, ..., tp_as_buffer. PyBufferProcs: get, release.
_WORD = ctypes.sizeof(ctypes.c_void_p)
_HEAD = object.__basicsize__ + _WORD
_BASICSIZE = _HEAD + _WORD
_AS_BUFFER = _HEAD + 17 * _WORD

# Any function that does nothing with what it is given. Not a Python one: it would be gone before the last
# view is when the interpreter ends.
_nothing = ctypes.CDLL(None).getpid


@lru_cache(maxsize=256)
def array_type(size: int, base: type) -> Any:
    """A class of arrays of ``size`` bytes, derived from ``base``; from_address() makes instances."""
    metaclass: Any = type(ctypes.Array)
    body = {"_type_": ctypes.c_ubyte, "_length_": size, "__module__": base.__module__}
    made = metaclass(base.__name__, (base, ctypes.Array), body)
    _release_slot(made).value = ctypes.cast(_nothing, ctypes.c_void_p).value
    return made


def live_views(exporter: object) -> int:
    """How many buffers of the exporter are held. Only the garbage collector's lists know."""
    return sum(type(holder).__name__ in _HOLDERS for holder in gc.get_referrers(exporter))


def _release_slot(kind: type) -> ctypes.c_void_p:
    procs = ctypes.c_void_p.from_address(id(kind) + _AS_BUFFER).value
    assert procs is not None
    return ctypes.c_void_p.from_address(procs + _WORD)


def _check_layout() -> None:
    """Types are laid out as this module believes: the known answers of three built-in ones."""
    for kind, releases in ((bytes, False), (bytearray, True), (memoryview, True)):
        size = ctypes.c_ssize_t.from_address(id(kind) + _BASICSIZE).value
        if size != kind.__basicsize__ or bool(_release_slot(kind).value) != releases:
            raise ImportError("pymirror does not know the type layout of this Python: use CPython")


_check_layout()
