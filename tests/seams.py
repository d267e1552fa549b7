"""Seams for tests: injected errors, named points, threads of one call, calls behind pymirror's back."""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import pytest

from pymirror._shim import lib
from pymirror.errors import FeatureError
from pymirror.features import DISABLE_VARIABLE, probe

T = TypeVar("T")

WAIT_S = 10.0
# Not in this kernel, whoever asks: anything else that is missing is a matter of privilege.
_ABSENT = {errno.ENOSYS, errno.EINVAL, errno.ENOTTY, errno.ENOENT, errno.ENODEV, errno.EOPNOTSUPP}
NOT_HERE = "not on this kernel"


def needs(*features: str) -> None:
    """Leave the test out unless the features (names as in pymirror.features) are there."""
    found = probe()
    for name in features:
        if name in found:
            continue
        why = found.missing(name)
        where = NOT_HERE if found.why.get(name, 0) in _ABSENT else "not for this user"
        pytest.skip(f"{where}: {name} ({why.reason})")


def switched_off() -> list[str]:
    """Features that PYMIRROR_DISABLE names."""
    return [name for name in os.environ.get(DISABLE_VARIABLE, "").split(",") if name]


_OFF_FOR_ALL = frozenset(switched_off())


def needs_all() -> None:
    """Leave the test out where a feature is switched off: what it compares with was made with all of them."""
    needs(*switched_off())


class Injection:
    """How often the error has struck, known once the block has ended."""

    def __init__(self) -> None:
        self.struck = 0


@contextmanager
def inject(
    sys: str, nth: int = 1, err: int = errno.ENOMEM, times: int = 1, tid: int = 0
) -> Iterator[Injection]:
    """Make the nth call of a kind ("MMAP", "IOCTL", "ANY") fail, ``times`` in a row, in one thread or any."""
    injection = Injection()
    assert lib.pm_inject(getattr(lib, f"PM_SYS_{sys}"), nth, times, err, tid) == 0
    try:
        yield injection
    finally:
        injection.struck = lib.pm_inject_clear()


class Point:
    """A named point: the next thread that passes it stops there until release()."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._number = getattr(lib, f"PM_POINT_{name}")
        self.arm()

    def arm(self) -> None:
        assert lib.pm_point_arm(self._number) == 0, f"{self.name} is armed already"

    def wait(self, timeout: float = WAIT_S) -> None:
        """Until a thread stands here."""
        if lib.pm_point_wait(self._number, int(timeout * 1e9)) != 0:
            raise AssertionError(f"no thread came to {self.name} in {timeout} s")

    def reached(self) -> bool:
        return bool(lib.pm_point_wait(self._number, 0) == 0)

    def release(self) -> None:
        lib.pm_point_release(self._number)


@contextmanager
def points(*names: str) -> Iterator[Any]:
    """Arm points; gives one Point, or a tuple of them. All are released at the end."""
    armed: list[Point] = []
    try:
        armed.extend(map(Point, names))
        yield armed[0] if len(armed) == 1 else tuple(armed)
    finally:
        for point in armed:
            point.release()


class Background(Generic[T]):
    """One call in a thread of its own; result() gives its value or raises what it raised."""

    def __init__(self, fn: Callable[..., T], *args: Any, **kwargs: Any) -> None:
        self._value: T | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(fn, args, kwargs), daemon=True)
        self._thread.start()

    def _run(self, fn: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        try:
            self._value = fn(*args, **kwargs)
        except BaseException as error:
            self._error = error

    @property
    def tid(self) -> int:
        return self._thread.native_id or 0

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def stays(self, seconds: float = 0.05) -> bool:
        """Is the call still under way after so long?"""
        self._thread.join(seconds)
        return self._thread.is_alive()

    def result(self, timeout: float = WAIT_S) -> T:
        self._thread.join(timeout)
        if self._thread.is_alive():
            raise AssertionError(f"the call has not returned after {timeout} s")
        if self._error is not None:
            raise self._error
        return self._value  # type: ignore[return-value]


class Foreign:
    """System calls as some other library in the process would make them: pymirror is not asked."""

    _libc = ctypes.CDLL(None, use_errno=True)

    def _call(self, name: str, *args: int) -> int:
        fn = getattr(self._libc, name)
        fn.restype = ctypes.c_long
        result: int = fn(*(ctypes.c_long(arg) for arg in args))
        if result == -1:
            code = ctypes.get_errno()
            raise OSError(code, f"{name}: {os.strerror(code)}")
        return result

    def munmap(self, addr: int, size: int) -> None:
        self._call("munmap", addr, size)

    def madvise(self, addr: int, size: int, advice: int) -> None:
        self._call("madvise", addr, size, advice)

    def mprotect(self, addr: int, size: int, prot: int) -> None:
        self._call("mprotect", addr, size, prot)

    def mremap(self, addr: int, old_size: int, new_size: int, flags: int = 1, new_addr: int = 0) -> int:
        return self._call("mremap", addr, old_size, new_size, flags, new_addr)

    def mmap(
        self, addr: int, size: int, prot: int = 3, flags: int = 0x22, fd: int = -1, offset: int = 0
    ) -> int:
        return self._call("mmap", addr, size, prot, flags, fd, offset)

    def punch_hole(self, fd: int, offset: int, size: int) -> None:
        self._call("fallocate", fd, 3, offset, size)  # with FALLOC_FL_KEEP_SIZE, as it must be


foreign = Foreign()


def errno_of(fn: Callable[..., object], *args: Any, **kwargs: Any) -> int:
    """The errno of the OSError that a call raises, 0 if it raises none.

    A refusal for the want of what PYMIRROR_DISABLE switches off is passed on: it is no test's subject.
    """
    try:
        fn(*args, **kwargs)
    except OSError as error:
        if isinstance(error, FeatureError) and error.feature in _OFF_FOR_ALL:
            raise
        return error.errno or 0
    return 0


__all__ = [
    "Background",
    "Injection",
    "Point",
    "errno_of",
    "foreign",
    "inject",
    "needs",
    "needs_all",
    "points",
    "switched_off",
]
