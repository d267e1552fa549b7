# SPDX-License-Identifier: MIT
"""What happened to an entry, in words: for the reports of stale accesses."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .notifier import Invalidation


def invalidated_text(invalidated: Invalidation | None, seq: int) -> str:
    """What invalidated it, how that was learnt, and when."""
    if invalidated is None:
        return f"what invalidated it (seq {seq}) is too long ago"
    return (
        f"invalidated by {invalidated.event.name} ({invalidated.guarantee}) of"
        f" [{invalidated.start:#x}, {invalidated.end:#x}), seq {invalidated.seq}, {ago(invalidated.when)}"
    )


def ago(when: float) -> str:
    """Of a time.monotonic()."""
    return f"{max(0.0, time.monotonic() - when) * 1e3:.3f} ms ago"
