# SPDX-License-Identifier: MIT
"""AddressSpace: this process's mm as a driver sees it, with its notifiers, its lock and its end.

The operations on memory are in ops.py, the text of dump() in dump.py.
"""

from __future__ import annotations

import atexit
import errno
import os
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import Any

from . import features as _features
from . import waiting
from ._shim import ffi, lib
from .adopt import Adoptions
from .arguments import integer, seconds, shown
from .dump import dump
from .errors import MirrorError, check
from .event import Event, python_end
from .forking import before_fork
from .lock import MmapLock, not_under_driver_lock
from .notifier import CallbackError, NotifierSet
from .ops import MemoryOperations
from .pin_registry import PinRegistry
from .region import Region, RegionMap

_FAULT_DELIVERY = ("thread", "inline")
_ERRORS_KEPT = 256
_EXIT_TIMEOUT = 10.0


# By id; single dict operations only, so that a fork at any moment leaves it usable.
_open: dict[int, weakref.ref[AddressSpace]] = {}


class AddressSpace(MemoryOperations):
    """The mirror state of this process's memory (``struct mm_struct`` with its notifier subscriptions).

    ``fault_delivery`` is how a CPU fault on a device-resident page is served: by a "thread" of its own, or
    "inline", in the thread that touches, by a handler of SIGBUS; it has an effect only on memory that was
    migrated to a device. Inline is faster, but a system call on such a page is EFAULT, and a thread that
    blocks SIGBUS is killed by a touch; see docs/device-memory.md. ``disable`` names features to do without
    (see Features), ``queue_length`` is how many kernel events are kept for callbacks before they become one
    that says "everything".

    Several may be open at once, and each may be used by any thread. Close it, or use it as a context
    manager. One that is collected unclosed gives a ResourceWarning, and no callbacks run: notifiers keep
    their mm alive, so they are garbage with it. In a forked child every call raises ESRCH, and close() does
    nothing.

    ``features`` are the Features that were found, ``errors`` the last 256 CallbackErrors, ``pid`` the process
    it belongs to, ``native`` the ``pm_mm *``, ``notifiers`` the NotifierSet.
    """

    def __init__(
        self, *, fault_delivery: str = "thread", disable: Iterable[str] = (), queue_length: int = 1024
    ) -> None:
        if fault_delivery not in _FAULT_DELIVERY:
            raise _einval(f"fault_delivery={shown(fault_delivery)}", 'give "thread" or "inline"')
        if not 1 <= integer("AddressSpace", "queue_length", queue_length) <= 1 << 20:
            raise _einval(f"queue_length={queue_length}", "give a number from 1 to 1048576")
        disabled = _features.disable_bits(disable)
        self.pid = os.getpid()
        self.fault_delivery = fault_delivery
        self.native = _create(disabled, queue_length, fault_delivery)
        self.features = _probed(self.native, disabled)
        self.errors: deque[CallbackError] = deque(maxlen=_ERRORS_KEPT)
        self._mmap_lock = MmapLock()
        self._regions = RegionMap()
        self._adoptions = Adoptions()
        self._pins = PinRegistry()
        self._device_memory = set()
        self._exclusive_arena = None
        self._closing = False
        self._teardown = threading.Lock()
        self.notifiers = NotifierSet(self)
        self._closed = False
        _open[id(self)] = weakref.ref(self)

    @property
    def closed(self) -> bool:
        """Whether close() is over. Other calls answer ESRCH from its beginning on."""
        return self._closed

    def sync(self, timeout: float = 10.0) -> None:
        """Wait until the callbacks of every kernel event so far have returned (mmu_notifier_synchronize()).

        ETIMEDOUT; ESRCH; EDEADLK in a callback and under a driver lock.
        """
        self._check("sync")
        not_under_driver_lock("sync")
        ticket = ffi.new("uint64_t *")
        deadline = time.monotonic() + seconds("sync", "timeout", timeout)
        ret = lib.pm_event_sync(self.native, 0, ticket)
        if ret == -errno.ETIMEDOUT:
            # Events may wait while there is no notifier, and so nobody to take them.
            self.notifiers.start_dispatcher()
        while ret in (-errno.ETIMEDOUT, -errno.EINTR) and (left := deadline - time.monotonic()) > 0:
            ret = lib.pm_event_sync(self.native, int(left * 1e9), ticket)
        check(
            -errno.ETIMEDOUT if ret == -errno.EINTR else ret, f"sync: callbacks did not return in {timeout} s"
        )

    def dump(self) -> str:
        """What waits for what, as text for a person, when a process hangs. Takes no lock, never waits."""
        return dump(self)

    def stats(self) -> dict[str, Any]:
        """Counters: those of ``struct pm_mm_stats`` (events by name), of notifiers, Regions and pins.

        Those of device memory are "device_...", see ``struct pm_devmem_stats``: pages or times. Names that
        end in _bytes are bytes, others times or things. For callbacks too. ESRCH in a child.
        """
        self._check_pid("stats")
        raw = ffi.new("struct pm_mm_stats *")
        check(lib.pm_mm_stats(self.native, raw), "stats")
        found = {name: getattr(raw, name) for name, _ in ffi.typeof(raw[0]).fields if name != "events"}
        events = {event.name: raw.events[event] for event in Event}
        regions = {"regions": len(self._regions), "region_bytes": self._regions.bytes}
        return {
            **found,
            "events": events,
            **self.notifiers.stats(),
            **regions,
            **self._pin_stats(),
            **self._device_memory_stats(),
        }

    def _device_memory_stats(self) -> dict[str, int]:
        raw = ffi.new("struct pm_devmem_stats *")
        check(lib.pm_devmem_stats(self.native, raw), "stats")
        return {f"device_{name}": int(getattr(raw, name)) for name, _ in ffi.typeof(raw[0]).fields}

    def _pin_stats(self) -> dict[str, int]:
        raw = ffi.new("struct pm_pin_stats *")
        check(lib.pm_pin_stats(self.native, raw), "stats")
        found = {f"pin_{name}": int(getattr(raw, name)) for name, _ in ffi.typeof(raw[0]).fields}
        pins, pages = found.pop("pin_pins"), found.pop("pin_pages")
        return {"pins": pins, "pinned_pages": pages, **found, "pin_dirtied_pages": self._pins.dirtied}

    def close(self, timeout: float = 10.0) -> None:
        """End the mirror of this mm (exit_mmap()): RELEASE to the notifiers, then no more events.

        Memory stays mapped where views of it live. Idempotent, and quiet in a forked child. ETIMEDOUT while
        another thread holds read_lock() or runs an operation: the mm is then open still. EDEADLK in a
        callback, under a driver lock and under one's own read_lock().
        """
        if self._closed or os.getpid() != self.pid:
            return
        self._mmap_lock.check_free("close")
        deadline = time.monotonic() + timeout
        if not self._closing:
            self._begin_close(timeout)
        if not self._teardown.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise MirrorError(
                errno.ETIMEDOUT,
                f"close: another thread's close() still runs after {timeout} s",
                hint="AddressSpace.dump() shows what it waits for",
            )
        try:
            if not self._closed:
                self._tear_down(deadline)
        finally:
            self._teardown.release()

    def __enter__(self) -> AddressSpace:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if self._closed or self.pid != os.getpid():
            return
        _open.pop(id(self), None)
        whose = repr(self)
        lib.pm_mm_close(self.native)
        self._leave_device_memory()
        self._drain_events()
        self._closed = True
        warnings.warn(
            f"{whose} was collected unclosed: close() it", ResourceWarning, source=self, stacklevel=2
        )

    def __repr__(self) -> str:
        return f"<AddressSpace of process {self.pid}, {self._state()}>"

    def _state(self) -> str:
        if os.getpid() != self.pid:
            return "inherited by this child, unusable here"
        return "closed" if self._closed else "closing" if self._closing else "open"

    def _begin_close(self, timeout: float) -> None:
        """No operation and no reader from here on; those that run have ended."""
        try:
            with self._mmap_lock.write("close", timeout):
                self._closing = True
                self._mmap_lock.kill()
        except MirrorError as refused:
            # Killed already: another thread closes too.
            if refused.errno != errno.ESRCH:
                raise

    def _tear_down(self, deadline: float) -> None:
        """Every step, whatever the one before it raised."""
        with ExitStack() as steps:
            steps.callback(self._end)
            steps.callback(self._drain_events)
            steps.callback(self._join_dispatcher, deadline)
            steps.callback(self._leave_device_memory)
            # It brings home what is in device memory, and wakes the dispatcher, which has been told to stop.
            steps.callback(lib.pm_mm_close, self.native)
            steps.callback(self._pins.report_leaks)
            steps.callback(self.notifiers.stop, 0)
            steps.callback(self.notifiers.release)

    def _memory_owner(self, number: int) -> Any:
        """The owner of device memory by what native code calls it; None once the memory is closed."""
        owners = [vram.owner for vram in list(self._device_memory)]
        return next((owner for owner in owners if id(owner) == number), None)

    def _leave_device_memory(self) -> None:
        for vram in list(self._device_memory):
            vram._leave_closed()

    def _end(self) -> None:
        self._closed = True
        _open.pop(id(self), None)
        self._regions.clear()

    def _join_dispatcher(self, deadline: float) -> None:
        if self.notifiers.stop(max(0.1, deadline - time.monotonic())):
            return
        running = "; ".join(self.notifiers.describe())
        raise MirrorError(
            errno.ETIMEDOUT,
            f"close: the address space is closed, but a callback still runs: {running or 'just returning'}",
            hint="see what the callback waits for",
        )

    def _drain_events(self) -> None:
        """Nobody is called for these any more, but they say what was unmapped."""
        event = ffi.new("struct pm_event *")
        while lib.pm_event_wait(self.native, 0, event) == 0:
            if event.type == Event.UNMAP:
                self._foreign_unmap(event.start, python_end(event.end))
            lib.pm_event_done(self.native)

    def _foreign_unmap(self, start: int, end: int) -> None:
        """Memory unmapped or moved behind our back is no Region's any more: none may unmap what is there now.

        What is mapped there when the event is taken up may be another's, or a Region younger than the event.
        So it stays the Region's, but is not unmapped unasked. Events that the queue could not hold come as
        one over everything: then every Region is in doubt.
        """
        for first, last, region in self._regions.overlapping(start, end):
            region._held.doubtful.append((first, last))
            # ESRCH: the mm is closed, and all of it stays in doubt.
            with suppress(MirrorError):
                for hole in self._holes(first, last):
                    self._regions.settle(self._regions.disown(*hole, only=region))

    def _holes(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        at = start
        for vma in self._walk(start, end):
            if at < vma.start:
                yield at, vma.start
            at = vma.end
        if at < end:
            yield at, end

    def _unmap_region(self, region: Region) -> None:
        """Region.close(). Looks under the lock at what is left: another thread may unmap it too."""
        try:
            with self._operation("Region.close"):
                for start, end in region.left:
                    self._unmap("Region.close", start, end)
        except MirrorError as refused:
            if refused.errno != errno.ESRCH:
                raise
            self.close()
            region._held.release()


def _create(disabled: int, queue_length: int, fault_delivery: str) -> Any:
    flags = lib.PM_MM_INLINE if fault_delivery == "inline" else 0
    asked = {"disable": disabled, "queue_length": queue_length, "flags": flags}
    options = ffi.new("struct pm_mm_options *", asked)
    created = ffi.new("pm_mm **")
    check(
        lib.pm_mm_create(options, created),
        "AddressSpace",
        hint="ulimit -n, free memory and /proc are what it needs",
    )
    return ffi.gc(created[0], lib.pm_mm_put)


def _probed(native: Any, disabled: int) -> _features.Features:
    found = ffi.new("struct pm_features *")
    check(lib.pm_mm_features(native, found), "AddressSpace")
    return _features.from_native(found, disabled)


def _einval(wrong: str, hint: str) -> MirrorError:
    return MirrorError(errno.EINVAL, f"AddressSpace: {wrong}", hint=hint)


def _open_mms() -> list[AddressSpace]:
    return [mm for reference in list(_open.values()) if (mm := reference()) is not None]


before_fork(_open_mms)
waiting.shown_by(lambda: [mm.native for mm in _open_mms()])


@atexit.register
def _close_all() -> None:
    """At the interpreter's exit, while threads and callbacks can still run."""
    with ExitStack() as closes:
        for mm in _open_mms():
            # Each, whatever another raised.
            closes.callback(mm.close, _EXIT_TIMEOUT)
