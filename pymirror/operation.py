# SPDX-License-Identifier: MIT
"""What operations on memory are put together from: the mmap lock, invalidations, what Regions lose."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, cast

from . import trace
from ._shim import ffi, lib
from .affected import Interval
from .errors import MirrorError, check
from .event import Event
from .mm_base import MmBase
from .refusals import refused_hint
from .region import Piece

if TYPE_CHECKING:
    from .mm import AddressSpace

_ANY_KIND = 0xFFFFFFFF

logger = logging.getLogger("pymirror")


class Operation(MmBase):
    """The part of AddressSpace that brackets its operations."""

    def _keep_adopted(self, what: str, start: int, end: int, force: bool) -> None:
        if not force:
            self._adoptions.check(cast("AddressSpace", self), what, start, end)

    @contextmanager
    def _disowned(self, intervals: list[Interval]) -> Iterator[list[Piece]]:
        """What a system call is about to take away from its Regions; they have it back when it is refused."""
        lost = [piece for interval in intervals for piece in self._regions.disown(*interval)]
        try:
            yield lost
        except MirrorError:
            self._regions.restore(lost)
            raise

    def _check_range(self, ret: int, what: str, start: int, end: int) -> None:
        """As check(); of ENOMEM it says whether a hole was meant, and where."""
        addr = start
        hint = refused_hint(what.split()[0], -ret)
        if ret == -errno.ENOMEM:
            hint = "the process has too many vmas: /proc/sys/vm/max_map_count"
            if (hole := self._first_hole(start, end)) is not None:
                addr, hint = hole, "leave the hole out; what precedes it was done"
        check(ret, what, addr=addr, mm=self, hint=hint)

    def _first_hole(self, start: int, end: int) -> int | None:
        """The first address of [start, end) that is in no vma."""
        at = start
        for vma in self._walk(start, end):
            if vma.start > at:
                break
            at = vma.end
        return at if at < end else None

    def _watch_new(self, start: int, end: int) -> None:
        """Memory that is new inside a notifier's interval brings no event: watch it from its birth."""
        if (
            not self.notifiers.whole_mm
            and lib.pm_overlapping(self.native, start, end, _ANY_KIND, ffi.NULL, 0) <= 0
        ):
            return
        watched = lib.pm_watch(self.native, start, end, lib.PM_WATCH_EXACT)
        if watched < 0:
            # The memory is good; only what changes behind our back is then found late, not reported.
            logger.warning("mmap: [%#x, %#x) is not watched: %s", start, end, os.strerror(-watched))

    @contextmanager
    def _operation(
        self,
        what: str,
        start: int = 0,
        end: int = 0,
        *,
        write: bool = True,
        track: trace.Track = trace.Track.OPERATION,
    ) -> Iterator[Any]:
        self._check_here(what)
        self._mmap_lock.check_free(what)
        lock = self._mmap_lock.write(what) if write else self._mmap_lock.read(what)
        with trace.span(track, what, cast("AddressSpace", self), start, end) as span, lock:
            yield span

    @contextmanager
    def _migrating(
        self, what: str, start: int, end: int, owner: Any, event: Event = Event.MIGRATE
    ) -> Iterator[None]:
        with (
            self._operation(what, start, end, write=False, track=trace.Track.MIGRATION),
            self._invalidation(start, end, event, owner),
        ):
            yield

    @contextmanager
    def _invalidating(self, change: Iterable[Interval], event: Event) -> Iterator[None]:
        with ExitStack() as stack:
            for start, end in change:
                stack.enter_context(self._invalidation(start, end, event))
            yield
