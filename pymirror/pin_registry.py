# SPDX-License-Identifier: MIT
"""Which pins an mm has, what was counted, and the report of those that are left when it closes."""

from __future__ import annotations

import logging
import os
import sys
import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .gup import PinnedPages

logger = logging.getLogger("pymirror")

_PACKAGE = os.path.dirname(os.path.abspath(__file__)) + os.sep


class PinRegistry:
    """The PinnedPages of an mm that are not unpinned. ``dirtied`` counts pages unpinned as dirty."""

    def __init__(self) -> None:
        self.dirtied = 0
        # No WeakSet: one that another thread adds to cannot be gone through.
        self._live: dict[int, weakref.ref[PinnedPages]] = {}

    def add(self, pin: PinnedPages) -> None:
        self._live[id(pin)] = weakref.ref(pin)

    def discard(self, pin: PinnedPages) -> None:
        self._live.pop(id(pin), None)

    def live(self) -> list[PinnedPages]:
        """In order of address."""
        pins = [ref() for ref in list(self._live.values())]
        return sorted(
            (pin for pin in pins if pin is not None and pin.unpinned_at is None), key=lambda pin: pin.start
        )

    def report_leaks(self) -> None:
        """For each pin that close() is about to take back: who made it."""
        for pin in self.live():
            logger.warning(
                "%r was never unpinned; pinned at %s; closing the address space gives its pages back",
                pin,
                pin.pinned_at,
            )


def caller() -> str:
    """``file:line`` of the innermost frame that is not pymirror's own."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"
