# SPDX-License-Identifier: MIT
"""The dispatcher: the one thread on which callbacks run for what the kernel reports, in order.

It holds the address space only by a weak reference, so it never keeps one alive, and the native half by the
cffi object, so that it never waits on freed memory.
"""

from __future__ import annotations

import errno
import threading
import weakref
from typing import TYPE_CHECKING, Any

from ._shim import ffi, lib
from .callback import logger

if TYPE_CHECKING:
    from .notifier_set import NotifierSet

#: How long it takes the thread to see that nobody needs it any more.
_SLICE_NS = 200_000_000

NAME = "pymirror-dispatch"
#: As /proc and debuggers show it: 15 bytes at most.
NATIVE_NAME = b"pymirror-disp"


class Dispatcher:
    """Starts with the first notifier; `stop` ends it. A forked child has none: there every call is ESRCH."""

    def __init__(self, native: Any, notifiers: NotifierSet) -> None:
        self._stop = threading.Event()
        self.thread = threading.Thread(
            target=_dispatch, args=(native, weakref.ref(notifiers), self._stop), name=NAME, daemon=True
        )
        self.thread.start()

    def stop(self, timeout: float) -> bool:
        """Let the event that is being delivered be the last; False if it takes longer than that."""
        self._stop.set()
        if self.thread is not threading.current_thread():
            self.thread.join(timeout)
        return not self.thread.is_alive()


def _dispatch(native: Any, notifiers: weakref.ref[NotifierSet], stop: threading.Event) -> None:
    lib.pm_thread_name(NATIVE_NAME)
    event = ffi.new("struct pm_event *")
    while not stop.is_set():
        ret = lib.pm_event_wait(native, _SLICE_NS, event)
        if ret == 0:
            _deliver(native, notifiers(), event)
        elif ret not in (-errno.ETIMEDOUT, -errno.EINTR) or notifiers() is None:
            return


def _deliver(native: Any, notifiers: NotifierSet | None, event: Any) -> None:
    try:
        if notifiers is not None:
            notifiers.deliver_event(event)
    except BaseException:
        # Whatever it was, the events behind it still have to be delivered.
        logger.exception("pymirror: delivering a kernel event failed")
    finally:
        lib.pm_event_done(native)
