# SPDX-License-Identifier: MIT
"""A sequence number that is used again after it was refused: the retry loop that cannot end.

Sequence numbers only grow, so what was refused once is refused for ever. A driver that calls read_begin()
before its loop instead of in it spins, in the kernel until its deadline and without a word.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .notifier import IntervalNotifier

#: One refusal is a race. A second may be a thread's next piece under the sequence that it had begun with.
_REFUSALS = 3


class _Last(threading.local):
    """The last stale sequence that this thread came with, whose it was, and how often."""

    sub: weakref.ref[IntervalNotifier] | None = None
    seq: int = 0
    times: int = 0


_last = _Last()


def note_refusal(sub: IntervalNotifier, seq: int) -> None:
    """hmm_range_fault() has refused ``seq``; RuntimeWarning when this thread gets that again and again."""
    # EBUSY has other reasons too: then the sequence may stand, and come again.
    if not sub.check_retry(seq):
        return
    again = _last.sub is not None and _last.sub() is sub and _last.seq == seq
    _last.times = _last.times + 1 if again else 1
    if not again:
        _last.sub, _last.seq = weakref.ref(sub), seq
    if _last.times != _REFUSALS:
        return
    warnings.warn(
        f"stale sequence: hmm_range_fault() under {sub!r} came {_last.times} times with sequence {seq}, which"
        " was refused and never stands again; do: call read_begin() inside the retry loop",
        RuntimeWarning,
        stacklevel=4,
    )
