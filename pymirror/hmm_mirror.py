# SPDX-License-Identifier: MIT
"""Hmm and Mirror: what the mirrors of an mm share, and a driver's side of one (``hmm``, ``hmm_mirror``)."""

from __future__ import annotations

import errno
import os
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from ._shim import lib
from .arguments import check_mm
from .encoding import encoding_of
from .errors import MirrorError
from .event import MmuNotifierRange
from .hmm_range import Range
from .lock import DriverLock, not_in_callback
from .notifier import MmuNotifier
from .notifier_set import REMOVE_TIMEOUT
from .walk import PAGE_SHIFT

if TYPE_CHECKING:
    from .mm import AddressSpace

_instances: weakref.WeakKeyDictionary[AddressSpace, weakref.ref[Hmm]] = weakref.WeakKeyDictionary()
_instances_lock: threading.Lock


def _make_lock() -> None:
    global _instances_lock
    _instances_lock = threading.Lock()


_make_lock()
# A thread that is not there may hold the old one.
os.register_at_fork(after_in_child=_make_lock)


class Hmm:
    """``struct hmm``: one for an mm, as long as a mirror or a registered range uses it.

    Its reference count is Python's own: whoever uses it holds it, and the registry holds it weakly. With the
    mm it dies, and every later call of its users is a clean EFAULT.
    """

    __slots__ = ("__weakref__", "mm")

    def __init__(self, mm: AddressSpace) -> None:
        self.mm = mm

    @classmethod
    def get(cls, mm: AddressSpace) -> Hmm:
        """hmm_get_or_create(): the mm's instance. EFAULT when the mm is closed, ESRCH in a forked child."""
        check_mm("Mirror", mm)
        _check_alive(mm, "Mirror")
        with _instances_lock:
            known = _instances.get(mm)
            hmm = known() if known is not None else None
            if hmm is None:
                hmm = cls(mm)
                _instances[mm] = weakref.ref(hmm)
        return hmm

    @property
    def dead(self) -> bool:
        """The mm is going away, or gone; set before the first release()."""
        return _is_dead(self.mm)

    def check_alive(self, what: str) -> None:
        """EFAULT when dead; ESRCH in a forked child, where the mm is another process's."""
        _check_alive(self.mm, what)


def _is_dead(mm: AddressSpace) -> bool:
    return mm.notifiers.released or lib.pm_mm_alive(mm.native) != 1


def _check_alive(mm: AddressSpace, what: str) -> None:
    if not _is_dead(mm):
        return
    if lib.pm_mm_alive(mm.native) < 0:
        raise MirrorError(
            errno.ESRCH,
            f"{what}: the address space belongs to process {mm.pid}, this is a fork of it",
            hint="open a new AddressSpace in the child",
        )
    raise MirrorError(errno.EFAULT, f"{what}: the address space is closed", hint="open a new AddressSpace")


class Mirror(MmuNotifier):
    """``struct hmm_mirror``: subclass it and override sync_cpu_device_pagetables.

    Registered by its construction. ``lock`` is the driver's lock, to be taken by the callback and around
    ``rng.valid`` and ``page_table.map``. A subclass with an ``__init__`` of its own sets what its callbacks
    need before it calls this one.
    """

    def __init__(self, mm: AddressSpace) -> None:
        """hmm_mirror_register(). EFAULT on a closed mm; ESRCH in a forked child; EDEADLK in a callback."""
        not_in_callback("Mirror")
        self.lock = DriverLock(f"{type(self).__name__}.lock")
        self._hmm: Hmm | None = Hmm.get(mm)
        super().__init__(mm)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.unregister()

    def sync_cpu_device_pagetables(self, update: MmuNotifierRange) -> Any:
        """ops->sync_cpu_device_pagetables: take [update.start, update.end) off the device before returning.

        Runs in the thread that makes the change, or on the dispatcher for what the kernel reported. -EAGAIN
        (or False) is an answer only when ``update.blockable`` is false.
        """

    def release(self) -> None:
        """ops->release: the mm is going away. Once; ranges are invalid by then and their waiters awake."""

    def invalidate_range_start(self, range: MmuNotifierRange) -> Any:
        return self.sync_cpu_device_pagetables(range)

    @property
    def hmm(self) -> Hmm:
        """The shared state; EFAULT once the mirror is unregistered."""
        if self._hmm is None:
            raise MirrorError(
                errno.EFAULT, f"{type(self).__name__} is not registered", hint="make a new Mirror of the mm"
            )
        return self._hmm

    def mm_is_alive(self) -> bool:
        """hmm_mirror_mm_is_alive(): registered, and the mm is not being torn down."""
        return self._hmm is not None and not self._hmm.dead

    @contextmanager
    def mm_down_read(self, timeout: float | None = None) -> Iterator[None]:
        """hmm_mirror_mm_down_read() and _up_read(), as the series proposed them: the mmap lock, for reading.

        EINVAL when the mm is being torn down or the mirror is unregistered; ESRCH in a forked child; EDEADLK
        and ETIMEDOUT as AddressSpace.read_lock().
        """
        self.mm._check_pid("mm_down_read")
        if not self.mm_is_alive():
            raise MirrorError(
                errno.EINVAL,
                "mm_down_read: the mm is going away, or the mirror is not registered",
                hint="stop mirroring: release() has been called",
            )
        with self.mm.read_lock(timeout):
            yield

    def range(
        self,
        start: int,
        end: int,
        page_shift: int = PAGE_SHIFT,
        *,
        flags: Sequence[int] | None = None,
        values: Sequence[int] | None = None,
        pfn_shift: int | None = None,
    ) -> Range:
        """A Range over [start, end) bytes, not yet registered: use it as a context manager, or register() it.

        With ``page_shift=21`` an entry of ``pfns`` is a 2 MiB page, of hugetlb memory only. ``flags``,
        ``values`` and ``pfn_shift``, all three or none, select the driver's own entries: see PfnEncoding.

        EINVAL: not aligned, empty, reversed, beyond the address space. EDEADLK in a callback.
        """
        not_in_callback("Mirror.range")
        return Range(self, start, end, page_shift, encoding_of(flags, values, pfn_shift))

    def unregister(self, timeout: float = REMOVE_TIMEOUT) -> None:
        """hmm_mirror_unregister(): no callback runs after it. Idempotent.

        ETIMEDOUT, EDEADLK as MmuNotifier.unregister().
        """
        super().unregister(timeout)
        self._hmm = None
