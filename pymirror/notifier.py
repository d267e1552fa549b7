# SPDX-License-Identifier: MIT
"""MMU notifiers: how a driver learns that memory it mirrors is about to change, or did.

``MmuNotifier`` sees every invalidation of an mm (``struct mmu_notifier``), ``IntervalNotifier`` those of one
interval, with a sequence number to check for races (``struct mmu_interval_notifier``). The rule of the
sequence number:

    read_begin() -> seq; look at the memory; take the driver's lock; if read_retry(seq): go again; program the
    device.

A callback may call set_seq, read_retry, check_retry, PageTable.clear and entries, Range.valid, dump and
stats; every other call of the library raises EDEADLK there.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ._shim import ffi, lib
from .arguments import check_mm, integer, seconds
from .callback import CallbackError, current, may_wait
from .delivery import State
from .errors import MirrorError, check
from .event import Event, Guarantee, MmuNotifierRange
from .lock import DriverLock, in_callback, not_in_callback
from .notifier_set import KIND_INTERVAL, KIND_RANGE, REMOVE_TIMEOUT, Invalidation, NotifierSet

if TYPE_CHECKING:
    from .mm import AddressSpace

__all__ = [
    "KIND_INTERVAL",
    "KIND_RANGE",
    "CallbackError",
    "Event",
    "Guarantee",
    "IntervalNotifier",
    "Invalidation",
    "MmuNotifier",
    "MmuNotifierRange",
    "NotifierSet",
    "in_callback",
    "not_in_callback",
]

_ADDRESS_SPACE_LAST = (1 << 64) - 1

#: An interval from which on there is no point in watching what lies in it now: the heap of the interpreter
#: would be watched with it. Regions are, and what a device maps through such a notifier when it is mapped.
_WATCH_LIMIT = 1 << 46

Invalidate = Callable[["IntervalNotifier", MmuNotifierRange, int], Any]


def _no_attribute(owner: object, name: str) -> AttributeError:
    """Of a notifier: it says so when ``super().__init__()`` was forgotten, which is not seen otherwise."""
    kind = type(owner).__name__
    text = f"{kind!r} object has no attribute {name!r}"
    try:
        object.__getattribute__(owner, "_state")
    except AttributeError:
        text += f": super().__init__() has not run; do: call super().__init__(mm, ...) in {kind}.__init__()"
    return AttributeError(text, name=name, obj=owner)


class MmuNotifier:
    """``struct mmu_notifier``: subclass it and override what you need. Registered by its construction.

    The registry keeps it alive until unregister() or the end of the mm.
    """

    def __init__(self, mm: AddressSpace) -> None:
        """mmu_notifier_register(). ESRCH on a closed mm; EDEADLK inside a callback."""
        self._state = State.NEW
        not_in_callback("MmuNotifier")
        check_mm(type(self).__name__, mm)
        self.mm = mm
        self._wants_end = type(self).invalidate_range_end is not MmuNotifier.invalidate_range_end
        self.__notifiers = mm.notifiers
        self.__notifiers.register(self)
        mm._watch_regions()

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            raise _no_attribute(self, name)

    def invalidate_range_start(self, range: MmuNotifierRange) -> Any:
        """[range.start, range.end) is about to change, or did (range.guarantee): stop using what you know of
        it.

        False or -EAGAIN is an answer only when ``range.blockable`` is false.
        """

    def invalidate_range_end(self, range: MmuNotifierRange) -> None:
        """The change is made. Called once for each start that was served."""

    def release(self) -> None:
        """The mm is going away; called once, not after unregister()."""

    @property
    def registered(self) -> bool:
        """Whether callbacks may run: not unregistered, and the mm is not released."""
        return self._state == State.REGISTERED and not self.__notifiers.released

    def unregister(self, timeout: float = REMOVE_TIMEOUT) -> None:
        """mmu_notifier_unregister(): on return no callback of this notifier runs or will run. Idempotent.

        Waits for one that runs in another thread, at most `timeout` seconds (ETIMEDOUT). EDEADLK inside a
        callback and under a driver lock.
        """
        if self._state != State.NEW:
            self.__notifiers.remove(self, f"{type(self).__name__}.unregister", timeout)


class IntervalNotifier:
    """``struct mmu_interval_notifier`` over [start, start + length) bytes. Inserted by its construction.

    Callbacks are given as functions or overridden as methods:

    * ``invalidate(sub, range, cur_seq)``: under the driver's lock call ``sub.set_seq(cur_seq)`` and take the
      interval off the device. False only when ``range.blockable`` is false and it would have to wait.
    * or in two passes, for devices that can flush in parallel: ``invalidate_start(sub, range, cur_seq)``
      begins and returns anything that ``invalidate_finish(finish)`` ends, or None when it is done. All starts
      of a delivery run first.

    ``update_lock`` names the driver's lock, as a lockdep_assert_held() does in a driver: set_seq(),
    read_retry() and what programs a device under this notifier are EPERM without it. None: nobody looks.

    The registry keeps it alive until remove() or the end of the mm.
    """

    __slots__ = (
        "__weakref__",
        "_begin",
        "_cookie",
        "_finish",
        "_invalidate",
        "_native",
        "_state",
        "length",
        "mm",
        "start",
        "update_lock",
    )

    _native: Any

    def __init__(
        self,
        mm: AddressSpace,
        start: int,
        length: int,
        invalidate: Invalidate | None = None,
        *,
        invalidate_start: Invalidate | None = None,
        invalidate_finish: Callable[[Any], Any] | None = None,
        update_lock: DriverLock | None = None,
    ) -> None:
        """mmu_interval_notifier_insert().

        EOVERFLOW when the interval is empty or ends beyond 2**64, EINVAL without a callback or with half of a
        two-pass pair, ESRCH on a closed mm, EDEADLK inside a callback.
        """
        start = integer("IntervalNotifier", "start", start)
        length = integer("IntervalNotifier", "length", length)
        self._native = None
        self._state = State.NEW
        self._cookie = 0
        self.mm = mm
        self.start = start
        self.length = length
        self.update_lock = update_lock
        self._invalidate = invalidate
        self._begin = invalidate_start
        self._finish = invalidate_finish
        not_in_callback("IntervalNotifier")
        check_mm("IntervalNotifier", mm)
        self._check_interval()
        self._check_callbacks()
        try:
            mm.notifiers.insert(self, start + length - 1)
            if length < _WATCH_LIMIT:
                mm.watch(start & ~0xFFF, (start + length + 0xFFF) & ~0xFFF)
            else:
                mm._watch_regions(start, start + length)
        except BaseException:
            self.remove()
            raise

    def __del__(self, put: Callable[[Any], None] = lib.pm_sub_put) -> None:
        # Here and not in remove(): another thread may still be inside a native call on it.
        if (native := getattr(self, "_native", None)) is not None:
            put(native)

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            raise _no_attribute(self, name)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.start:#x}-{self.start + self.length:#x}>"

    @property
    def last(self) -> int:
        """The last byte, inclusive, as the kernel's interval_tree.last."""
        return self.start + self.length - 1

    @property
    def native(self) -> Any:
        """The ``pm_sub *``."""
        return self._native

    @property
    def two_pass(self) -> bool:
        """Whether its callbacks are a pair, ``invalidate_start`` and ``invalidate_finish``."""
        return self._begin is not None or type(self).invalidate_start is not IntervalNotifier.invalidate_start

    @property
    def watched(self) -> bool:
        """Whether the vmas of the interval are watched since the insertion."""
        return self.length < _WATCH_LIMIT

    def invalidate(self, range: MmuNotifierRange, cur_seq: int) -> Any:
        """mmu_interval_notifier_ops.invalidate: override it, or give a function, which this calls."""
        assert self._invalidate is not None
        return self._invalidate(self, range, cur_seq)

    def invalidate_start(self, range: MmuNotifierRange, cur_seq: int) -> Any:
        """The first pass: begin, and return what invalidate_finish() needs; None when it is done."""
        assert self._begin is not None
        return self._begin(self, range, cur_seq)

    def invalidate_finish(self, finish: Any) -> None:
        """The second pass, after every notifier has begun: wait for what invalidate_start() returned."""
        assert self._finish is not None
        self._finish(finish)

    def read_begin(self, timeout: float | None = None) -> int:
        """mmu_interval_read_begin(): wait until no invalidation of the interval runs; the sequence number.

        Unlike the kernel's it waits only for invalidations that overlap. ``timeout`` in seconds, None: for
        ever, but Ctrl-C ends it. ETIMEDOUT; ESRCH when the notifier or the mm is gone; EDEADLK in a callback
        and under a driver lock.
        """
        may_wait("read_begin")
        seq = ffi.new("uint64_t *")
        ret = wait_read_begin(self._native, seq, timeout)
        if ret < 0:
            self.mm._check_pid("read_begin")
            check(
                ret,
                f"read_begin: {self!r} {_begin_why(ret)}",
                addr=self.start,
                mm=self.mm,
                hint=_begin_hint(ret),
            )
        return int(seq[0])

    def read_retry(self, seq: int) -> bool:
        """mmu_interval_read_retry(), under the driver's lock: is what was seen since read_begin void?

        EPERM: the notifier has an ``update_lock``, which the thread does not hold: the answer would be void
        as soon as it is given.
        """
        if self.update_lock is not None:
            self._check_lock("read_retry")
        return self.check_retry(seq)

    def check_retry(self, seq: int) -> bool:
        """mmu_interval_check_retry(): a look without the lock. True is certain, False only a hint."""
        return self._native is None or lib.pm_sub_read_retry(self._native, seq) != 0

    def _check_lock(self, what: str) -> None:
        """lockdep_assert_held(): EPERM unless the thread holds ``update_lock``, or there is none."""
        if self.update_lock is None or self.update_lock.held:
            return
        raise MirrorError(
            errno.EPERM,
            f"{what} of {self!r} without {self.update_lock.name!r}: an invalidation may pass right after it",
            addr=self.start,
            hint=f"take {self.update_lock.name!r} around read_retry() and the programming, and in callbacks",
        )

    def set_seq(self, seq: int) -> None:
        """mmu_interval_set_seq(): in the callback, under the driver's lock, with the number it was given.

        EINVAL outside a callback of this notifier, or with another number; EPERM without its ``update_lock``.
        The native side has moved the number before the callback began; the call is how the driver tells that
        it kept the rule.
        """
        callback = current.callback
        if callback is None or callback.notifier is not self:
            raise MirrorError(
                errno.EINVAL,
                f"set_seq({seq}) of {self!r}: not in a callback of this notifier",
                addr=self.start,
                hint="call it in invalidate, on the notifier that invalidate was given",
            )
        if seq != callback.range.seq:
            raise MirrorError(
                errno.EINVAL,
                f"set_seq({seq}) of {self!r}: the invalidation, {callback.range}, has {callback.range.seq}",
                addr=callback.range.start,
                hint="pass the cur_seq of the callback",
            )
        self._check_lock("set_seq")
        callback.acked = True

    def remove(self, timeout: float = REMOVE_TIMEOUT) -> None:
        """mmu_interval_notifier_remove(): on return no callback of this notifier runs or will run.

        Idempotent. Waits for one that runs in another thread, at most `timeout` seconds (ETIMEDOUT). EDEADLK
        inside a callback and under a driver lock.
        """
        self.mm.notifiers.remove(self, "IntervalNotifier.remove", timeout)

    def _check_interval(self) -> None:
        if self.start >= 0 and self.length > 0 and self.last <= _ADDRESS_SPACE_LAST:
            return
        self.length, length = 0, self.length
        raise MirrorError(
            errno.EOVERFLOW,
            f"IntervalNotifier: {length:#x} bytes from {self.start:#x} are no interval below 2**64",
            addr=self.start,
            hint="give a start and a length in bytes, at least 1",
        )

    def _check_callbacks(self) -> None:
        own = type(self)
        if self.two_pass:
            if self._finish is not None or own.invalidate_finish is not IntervalNotifier.invalidate_finish:
                return
            missing = "invalidate_start needs invalidate_finish"
        elif self._finish is not None:
            missing = "invalidate_finish needs invalidate_start"
        elif self._invalidate is not None or own.invalidate is not IntervalNotifier.invalidate:
            return
        else:
            missing = "no callback"
        raise MirrorError(
            errno.EINVAL,
            f"IntervalNotifier: {missing}",
            addr=self.start,
            hint="give invalidate, or invalidate_start and invalidate_finish",
        )


def wait_read_begin(
    native: Any, seq: Any, timeout: float | None, gone: Callable[[], bool] | None = None
) -> int:
    """pm_sub_read_begin() in slices, for Ctrl-C: 0 or a negative errno, -ESRCH also once `gone()`."""
    if timeout is not None:
        timeout = seconds("read_begin", "timeout", timeout)
    ns = _ns(timeout)
    ret = int(lib.pm_sub_read_begin(native, ns, seq))
    if ret != -errno.EINTR:
        return ret
    deadline = None if timeout is None else time.monotonic() + timeout - 0.05
    while ret == -errno.EINTR:
        if gone is not None and gone():
            return -errno.ESRCH
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        ret = int(lib.pm_sub_read_begin(native, _ns(left), seq))
    return ret


def _ns(timeout: float | None) -> int:
    if timeout is None or timeout > 1e9:
        return _ADDRESS_SPACE_LAST
    return max(0, int(timeout * 1e9))


def _begin_why(ret: int) -> str:
    if ret == -errno.ESRCH:
        return "was removed, or its address space is closed"
    return "is being invalidated still" if ret == -errno.ETIMEDOUT else "failed"


def _begin_hint(ret: int) -> str | None:
    return "insert a new IntervalNotifier of an open AddressSpace" if ret == -errno.ESRCH else None
