# SPDX-License-Identifier: MIT
"""What the tests of reliability have done, counted: printed at the end of a run, for docs/reliability.md."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

_counts: dict[str, Counter[str]] = {}
_seconds: Counter[str] = Counter()


def add(kind: str, **counts: int) -> None:
    """Names of counts are their units: ``add("fault injection", faults=1)``."""
    _counts.setdefault(kind, Counter()).update(counts)


@contextmanager
def timed(kind: str) -> Iterator[None]:
    began = time.monotonic()
    try:
        yield
    finally:
        _seconds[kind] += time.monotonic() - began  # type: ignore[assignment]


def lines() -> list[str]:
    """One a kind of test."""
    return [
        f"{kind}: "
        + ", ".join(f"{n:,} {unit.replace('_', ' ')}" for unit, n in counts.items())
        + (f", {_seconds[kind]:.1f} s" if kind in _seconds else "")
        for kind, counts in _counts.items()
    ]
